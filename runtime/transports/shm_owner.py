"""The owner's side of shm: admits writers to the pool and watches their end.

One thread holds all connections. A writer that has been given the pool is watched until its socket ends: the kernel
closes a process's sockets after its last thread has stopped, so the end of the connection proves that this life
writes no more. A paused writer's socket stays open: no proof.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import secrets
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvpoll.runtime.transports import shm_wire
from kvpoll.runtime.transports.forked_children import keep_from_children
from kvpoll.runtime.transports.interface import Death, TransportError

LOG: Final = logging.getLogger(__name__)
_HELLO_LIMIT_S: Final = 5.0
_CONNECTIONS_MAX: Final = 1024


class _Visitor:
    """One accepted connection: unknown until its hello, then one life of one writer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.life: tuple[str, int] | None = None
        self.said_bye = False
        self.hello_until_s = time.monotonic() + _HELLO_LIMIT_S


class Doorkeeper:
    """Listens for writers. ``files``: the control page's descriptor, then those of the shareable regions."""

    def __init__(self, files: Sequence[int], on_death: Death, socket_dir: Path | None) -> None:
        self.secret = secrets.token_bytes(shm_wire.SECRET_BYTES)
        self.counters = {"admitted": 0, "refused": 0, "writers_ended": 0}
        self._files = list(files)
        self._on_death = on_death
        self._newest: dict[str, int] = {}
        self._visitors: set[_Visitor] = set()
        self._folder: Path | None = None
        self._stopping = False
        self._listener, self.address = self._listen(socket_dir)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="kvpoll-shm-owner", daemon=True)
        self._thread.start()

    def _listen(self, socket_dir: Path | None) -> tuple[socket.socket, str]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if socket_dir is None:
                # Abstract: bound to no file, so a killed owner leaves nothing behind. Seen only within one network
                # namespace; across namespaces a folder that both sides see is needed.
                address = f"\0kvpoll-{secrets.token_hex(16)}"
            else:
                self._folder = Path(tempfile.mkdtemp(prefix="kvpoll-", dir=socket_dir))  # mode 0700
                address = str(self._folder / "pool")
            listener.bind(address)
            listener.listen(128)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise TransportError(
                f"shm: no Unix socket in {socket_dir or 'the abstract namespace'}: {error.strerror or error}: "
                f"name a writable folder with a short path as socket_dir"
            ) from None
        return keep_from_children(listener), address

    def close(self) -> None:
        """Stop listening and let go of all writers; no death is reported any more."""
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        self._thread.join(2.0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # --- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while not self._stopping:
                waiting = any(visitor.life is None for visitor in self._visitors)
                for key, _ in selector.select(0.5 if waiting else None):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.data, _Visitor):
                        self._hear(selector, key.data)
                self._drop_silent(selector)
            for visitor in self._visitors:
                visitor.connection.close()
        self._listener.close()
        os.close(self._bell)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # out of descriptors: the listener stays readable, and a busy loop cures nothing
            return
        if len(self._visitors) >= _CONNECTIONS_MAX:
            connection.close()
            self.counters["refused"] += 1
            return
        connection.setblocking(False)
        visitor = _Visitor(keep_from_children(connection))
        self._visitors.add(visitor)
        selector.register(connection, selectors.EVENT_READ, visitor)

    def _hear(self, selector: selectors.BaseSelector, visitor: _Visitor) -> None:
        try:
            message = visitor.connection.recv(shm_wire.MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._let_go(selector, visitor)
        elif visitor.life is None:
            self._admit(selector, visitor, message)
        elif message == shm_wire.BYE:
            visitor.said_bye = True

    def _admit(self, selector: selectors.BaseSelector, visitor: _Visitor, message: bytes) -> None:
        hello = shm_wire.unpack_hello(message)
        status = self._status_for(visitor.connection, hello)
        files = self._files if status == shm_wire.WELCOME else []
        answer = shm_wire.pack_answer(status, len(files))
        try:
            if files:
                socket.send_fds(visitor.connection, [answer], files)
            else:
                visitor.connection.send(answer)
        except OSError:
            status = 1
        if status != shm_wire.WELCOME or hello is None:
            self.counters["refused"] += 1
            self._let_go(selector, visitor)
            return
        visitor.life = (hello.node, hello.epoch)
        self._newest[hello.node] = hello.epoch
        self.counters["admitted"] += 1

    def _status_for(self, connection: socket.socket, hello: shm_wire.Hello | None) -> int:
        if hello is None:
            return 1
        if not hmac.compare_digest(hello.secret, self.secret):
            return 2
        if shm_wire.peer_uid(connection) not in (0, os.geteuid()):
            return 3
        if hello.epoch < self._newest.get(hello.node, hello.epoch):
            return 4
        return 5 if self._stopping else shm_wire.WELCOME

    def _let_go(self, selector: selectors.BaseSelector, visitor: _Visitor) -> None:
        selector.unregister(visitor.connection)
        visitor.connection.close()
        self._visitors.discard(visitor)
        if visitor.life is None or visitor.said_bye or self._stopping:
            return
        if any(other.life == visitor.life for other in self._visitors):
            return  # it connected again before its old connection was seen to end
        self.counters["writers_ended"] += 1
        try:
            self._on_death(*visitor.life)
        except Exception:  # it must not end the watch over the other writers
            LOG.exception("the on_death function that the transport was given raised")

    def _drop_silent(self, selector: selectors.BaseSelector) -> None:
        now = time.monotonic()
        for visitor in [v for v in self._visitors if v.life is None and v.hello_until_s < now]:
            self.counters["refused"] += 1
            self._let_go(selector, visitor)
