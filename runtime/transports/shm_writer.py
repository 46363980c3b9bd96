"""The writer's side of shm: maps a peer's pool and copies into it, one thread a peer.

A write is copied in pieces of a few MiB. Between two pieces the thread looks at everything that can end the write: an
abort, the owner's control page, the end of the owner's socket, the end of this transport. So a write that was told to
stop is quiet one piece later, and the thread's word for that is what ``drained`` repeats.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from typing import Final

import numpy as np

from kvpoll.runtime.transports import shm_wire
from kvpoll.runtime.transports.forked_children import keep_from_children
from kvpoll.runtime.transports.interface import TransportError
from kvpoll.runtime.transports.offsets import Plan, Space
from kvpoll.runtime.transports.posted import PostedWrites, Write
from kvpoll.runtime.transports.shm_control import ControlView
from kvpoll.runtime.transports.shm_memory import Mapping

LOG: Final = logging.getLogger(__name__)
PIECE_BYTES: Final = 4 << 20
PIECE_RANGES: Final = 4096
_ANSWER_LIMIT_S: Final = 5.0
_QUEUE_MAX: Final = 4096


class Address:
    """Where an owner is reached, from its descriptor: ``sizes`` of all regions, which of them are shared, secret."""

    def __init__(self, node: str, epoch: int, path: str, secret: bytes, sizes: list[int], shared: list[bool]) -> None:
        self.node, self.epoch, self.path, self.secret = node, epoch, path, secret
        self.sizes, self.shared = sizes, shared
        self.space = Space(sizes)

    def __str__(self) -> str:
        return f"{self.node} epoch {self.epoch}"


class Unreachable(Exception):
    """The owner cannot be written to; the message says why."""


class _Pool:
    """An open connection to an owner and the mapping of its pool."""

    def __init__(self, connection: socket.socket, address: Address, files: list[int]) -> None:
        self.connection = connection
        self.mappings: list[Mapping] = []
        self.control = ControlView(files[0], address.epoch)
        self._watch = select.poll()
        self._watch.register(connection, select.POLLIN)
        bases, rest = [], iter(files[1:])
        try:
            for nbytes, shared in zip(address.sizes, address.shared, strict=True):
                if shared:
                    self.mappings.append(Mapping(next(rest), nbytes))
                bases.append(self.mappings[-1].address if shared else 0)
        except BaseException:
            self.close()
            raise
        self.space = Space(address.sizes, bases)

    def has_owner(self) -> bool:
        """Whether the owner's end of the socket is open. Costs about a microsecond."""
        # The owner sends nothing after its welcome, so whatever there is to read is the end.
        return not self._watch.poll(0)

    def close(self, *, bye: bool = False) -> None:
        """Unmap, then end the connection: in this order its end proves that nothing is written any more."""
        for mapping in self.mappings:
            mapping.close()
        self.control.close()
        if bye:
            # An owner that is gone is nobody who could mistake this end for a death.
            with contextlib.suppress(OSError):
                self.connection.send(shm_wire.BYE, socket.MSG_DONTWAIT)
        self.connection.close()


class ShmPeer:
    """One owner as its writer sees it: a queue, a thread, and the mapping while there is one."""

    def __init__(
        self, address: Address, writes: PostedWrites, node: str, epoch: int, bytes_per_s: float | None
    ) -> None:
        self.address = address
        self._writes = writes
        self._hello = shm_wire.pack_hello(shm_wire.Hello(node, epoch, address.secret))
        self._bytes_per_s = bytes_per_s
        self._queue: deque[Write] = deque()
        self._lock = threading.Lock()
        self._gone: str | None = None
        self._retired = False
        self._pool: _Pool | None = None
        self._thread: threading.Thread | None = None
        self._bell = -1
        self._current: Write | None = None

    # --- called by the transport's user ------------------------------------------------------------

    def submit(self, write: Write) -> None:
        """Queue a write; it fails at once when the owner is known to be gone or the queue is full."""
        with self._lock:
            reason = self._gone
            if reason is None and len(self._queue) >= _QUEUE_MAX:
                reason = f"{len(self._queue)} writes are queued for {self.address} already"
            if reason is None:
                self._queue.append(write)
                self._start()
                os.eventfd_write(self._bell, 1)
        if reason is not None:
            self._writes.fail(write, reason, drained=True)

    def end(self, reason: str, *, retired: bool) -> None:
        """No further write is taken; the one in progress ends with its piece. Does not wait: see ``join``."""
        with self._lock:
            self._gone = self._gone or reason
            self._retired = retired
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def join(self, limit_s: float) -> bool:
        """Wait for the thread's end; True when it has ended, and with it every write to this owner."""
        if self._thread is not None:
            self._thread.join(limit_s)
            return not self._thread.is_alive()
        return True

    def _start(self) -> None:
        if self._thread is None:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            name = f"kvpoll-shm-to-{self.address.node}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    # --- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is, no write may stay pending for ever
            LOG.exception("the thread that writes to %s failed", self.address)
            self._lose(f"the thread that writes to {self.address} failed: {error}")
            if self._current is not None:
                self._writes.fail(self._current, str(self._gone), drained=True)
        self._clear_up()

    def _work(self) -> None:
        while self._gone is None:
            write = self._queue.popleft() if self._queue else None
            if write is None:
                self._wait(self._pool.connection if self._pool else None, None)
                if self._pool and not self._pool.has_owner():
                    self._lose(f"{self.address} has ended")
            elif write.progress.state == "pending":
                self._current = write
                self._serve(write)
                self._current = None

    def _clear_up(self) -> None:
        if self._pool:
            self._pool.close(bye=self._retired)
        with self._lock:
            left, bell, self._bell = list(self._queue), self._bell, -1
            self._queue.clear()
            os.close(bell)
        for write in left:
            self._writes.fail(write, str(self._gone), drained=True)

    def _serve(self, write: Write) -> None:
        if self._pool is None:
            try:
                self._pool = self._open()
            except (Unreachable, TransportError, OSError) as error:
                self._writes.fail(write, f"{self.address} cannot be reached: {error}", drained=True)
                return
        if self._writes.begin(write):
            assert write.plan is not None
            reason = self._copy(self._pool, write, write.plan)
            if reason is None:
                self._writes.finish(write)
            else:
                # The last piece is placed and this thread places no further one: that is the proof.
                self._writes.fail(write, reason, drained=True)

    def _copy(self, pool: _Pool, write: Write, plan: Plan) -> str | None:
        """Copy piece by piece; returns why it stopped early, or None."""
        if not np.asarray(self.address.shared)[plan.region].all():
            return f"a region of {self.address} is not shared memory: its owner allocates it with shm.allocate"
        source, target, nbytes, _ = plan
        into = Plan(source, pool.space.addresses_of(target, plan.region), nbytes, plan.region)
        piece_bytes = PIECE_BYTES
        if self._bytes_per_s is not None:  # at least twenty pieces a second, or an abort would wait for long
            piece_bytes = max(2, min(PIECE_BYTES, int(self._bytes_per_s / 20)))
        begun_s, placed = time.monotonic(), 0
        for piece in into.pieces(piece_bytes, PIECE_RANGES):
            reason = self._why_stop(pool, write)
            if reason is not None:
                return reason
            # memmove releases the interpreter's lock; map keeps the loop itself in C.
            columns = (piece.target.tolist(), piece.source.tolist(), piece.nbytes.tolist())
            deque(map(ctypes.memmove, *columns), maxlen=0)
            if self._bytes_per_s is not None:
                placed += piece.total
                self._rest(begun_s + placed / self._bytes_per_s)
        return None

    def _why_stop(self, pool: _Pool, write: Write) -> str | None:
        if write.aborted:
            return "aborted by its user"
        if self._gone is not None:
            return self._gone
        reason = pool.control.why_stop(write.tag.incarnation)
        if reason is None and not pool.has_owner():
            # Its memory is mapped here only and goes with the mapping: whatever was placed, nobody can see it.
            self._lose(f"{self.address} has ended")
            return f"{self.address} has ended"
        return reason

    def _rest(self, until_s: float) -> None:
        while self._gone is None and (left := until_s - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def _lose(self, reason: str) -> None:
        with self._lock:
            self._gone = self._gone or reason

    # --- connecting --------------------------------------------------------------------------------

    def _open(self) -> _Pool:
        connection = keep_from_children(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        files: list[int] = []
        try:
            connection.setblocking(False)
            connection.connect(self.address.path)
            connection.send(self._hello)
            self._await(connection)
            message, files, _, _ = socket.recv_fds(
                connection, shm_wire.MESSAGE_MAX, shm_wire.FILES_MAX + 1, socket.MSG_CMSG_CLOEXEC
            )
            self._check(message, files)
            return _Pool(connection, self.address, files)
        except BaseException as error:
            connection.close()
            if isinstance(error, BlockingIOError):
                raise Unreachable("its queue of connections is full") from None
            if isinstance(error, ConnectionRefusedError | FileNotFoundError):
                raise Unreachable("nobody listens at its socket: it has ended, or lives in another namespace") from None
            raise
        finally:
            for file in files:
                os.close(file)

    def _await(self, connection: socket.socket) -> None:
        until_s = time.monotonic() + _ANSWER_LIMIT_S
        while self._gone is None and (left := until_s - time.monotonic()) > 0:
            if self._wait(connection, left):
                return
        raise Unreachable(self._gone or f"no answer within {_ANSWER_LIMIT_S:g} s")

    def _check(self, message: bytes, files: list[int]) -> None:
        answer = shm_wire.unpack_answer(message)
        if answer is None:
            raise Unreachable("it closed the connection" if not message else "its answer was not understood")
        status, count = answer
        if status != shm_wire.WELCOME:
            raise Unreachable(shm_wire.REFUSALS.get(status, f"it refused (status {status})"))
        if len(files) != count or count != 1 + sum(self.address.shared):
            raise Unreachable(f"it sent {len(files)} of {count} files: raise the limit of open files (ulimit -n)")

    def _wait(self, connection: socket.socket | None, limit_s: float | None) -> bool:
        """Wait for the bell or the connection; True when the connection has something to read, or has ended."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if connection is not None:
            poll.register(connection, select.POLLIN)
        ready = dict(poll.poll(None if limit_s is None else max(1, int(limit_s * 1000))))
        if self._bell in ready:
            os.eventfd_read(self._bell)
        return connection is not None and connection.fileno() in ready
