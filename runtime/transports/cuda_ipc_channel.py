"""What two processes on one host say to each other beside the GPU's memory, and how each learns of the other's end.

A Unix socket in the abstract name space carries small messages. The other process's end is told apart from a closed
socket: only the operating system's word on the process itself (a pidfd that becomes readable) proves that nothing of
it reads or writes any more. Linux makes that pidfd readable after the process's files were closed, the driver's among
them, which is when the driver takes its GPU work down [inferred from the kernel's exit path; tests/gpu tries it].
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

import msgspec

FRAME_BYTES_MAX: Final = 64 << 20
READ_BYTES: Final = 1 << 20
_LENGTH: Final = struct.Struct("!I")
_CREDENTIALS: Final = struct.Struct("3i")


class Hello(msgspec.Struct, tag=True):
    """Writer to owner, first. exports and sizes: the writer's regions, if the owner is to pull."""

    node: str
    epoch: int
    cookie: bytes
    exports: list[bytes]
    sizes: list[int]


class Welcome(msgspec.Struct, tag=True):
    """Owner to writer: the hello was right."""


class Order(msgspec.Struct, tag=True):
    """Writer to owner: pull these ranges. source, target, nbytes: int64 arrays as bytes, offsets on either side.

    room: the incarnation (room, attempt, epoch) whose pages are the target. mark: after which point of the writer's
    work.
    """

    number: int
    room: tuple[int, int, int]
    source: bytes
    target: bytes
    nbytes: bytes
    mark: bytes


class Cancel(msgspec.Struct, tag=True):
    """Writer to owner: do not begin this order."""

    number: int


class Ended(msgspec.Struct, tag=True):
    """Owner to writer: nothing of this order moves any more. reason: why not all of it was copied, or None.

    unsure: the device failed, and what it still does is not known.
    """

    number: int
    reason: str | None
    unsure: bool = False


class Revoked(msgspec.Struct, tag=True):
    """Owner to writer: this incarnation's pages are given up; begin nothing more for it."""

    room: tuple[int, int, int]


class Closed(msgspec.Struct, tag=True):
    """Writer to owner, last: it has closed, and nothing that it began itself moves any more."""


Message = Hello | Welcome | Order | Cancel | Ended | Revoked | Closed


class Channel:
    """One connected socket and the thread that serves it.

    on_message(channel, message), on_lost(channel): the socket is gone, which proves nothing; on_death(channel): the
    process is. All are called from the channel's thread, on_death last and at most once.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_message: Callable[[Channel, Message], None],
        on_lost: Callable[[Channel], None],
        on_death: Callable[[Channel], None],
    ) -> None:
        self.peer: Any = None
        """For whoever uses the channel."""
        self.pid, self.uid, _ = credentials(connection)
        self._connection = connection
        self._connection.setblocking(False)
        self._on_message, self._on_lost, self._on_death = on_message, on_lost, on_death
        self._lock = threading.Lock()
        self._out = bytearray()
        self._heard = bytearray()
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._gone, self._process = _watch(self.pid)
        self._closed = False
        self.lost = False
        self.thread = threading.Thread(target=self._serve, name=f"cuda_ipc-channel-{self.pid}", daemon=True)

    @property
    def proves_death(self) -> bool:
        """False where the other process cannot be watched (another pid namespace)."""
        return self._gone or self._process is not None

    def start(self) -> None:
        self.thread.start()

    def send(self, message: Message) -> bool:
        """Queue a message. False when nobody will read it."""
        body = msgspec.msgpack.encode(message)
        with self._lock:
            if self._closed or self.lost or len(self._out) + len(body) > FRAME_BYTES_MAX:
                return False
            self._out += _LENGTH.pack(len(body)) + body
            os.eventfd_write(self._alarm, 1)
        return True

    def close(self) -> None:
        """Send what is queued as far as that goes at once, and end."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._alarm, 1)

    def join(self, limit_s: float) -> None:
        """Wait for the thread of a closed channel; not from that thread itself, which is on its way out."""
        if self.thread is not threading.current_thread():
            self.thread.join(limit_s)

    def _serve(self) -> None:
        dead = False
        try:
            dead = self._loop()
        finally:
            with self._lock:
                self._closed = True
                self._connection.close()
                os.close(self._alarm)
                if self._process is not None:
                    os.close(self._process)
        if dead:
            self._on_death(self)

    def _loop(self) -> bool:
        """Until closed (False) or the process has ended (True)."""
        while True:
            with self._lock:
                closed, writing = self._closed, bool(self._out) and not self.lost
            if closed:
                self._flush()
                return False
            waiting = select.poll()
            waiting.register(self._alarm, select.POLLIN)
            if self._process is not None:
                waiting.register(self._process, select.POLLIN)
            if not self.lost:
                waiting.register(self._connection, select.POLLIN | (select.POLLOUT if writing else 0))
            ready = dict(waiting.poll(0 if self._gone else None))
            if self._alarm in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._alarm)
            dead = self._gone or self._process in ready
            if not self.lost:
                self._flush()
                if dead or self._connection.fileno() in ready:
                    self._read()
            if dead:
                return True

    def _flush(self) -> None:
        with self._lock:
            try:
                while self._out and not self.lost:
                    del self._out[: self._connection.send(self._out)]
            except BlockingIOError:
                pass
            except OSError:
                self._out.clear()

    def _read(self) -> None:
        """All that has come. A damaged message ends the connection, not the thread."""
        try:
            while got := self._connection.recv(READ_BYTES):
                self._heard += got
                self._take()
        except BlockingIOError:
            return
        except (OSError, msgspec.MsgspecError, ValueError):
            pass
        with self._lock:
            self.lost = True
            self._out.clear()
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        self._on_lost(self)

    def _take(self) -> None:
        while len(self._heard) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._heard)
            if length > FRAME_BYTES_MAX:
                raise ValueError(f"a frame of {length} bytes")
            if len(self._heard) < _LENGTH.size + length:
                return
            body = bytes(self._heard[_LENGTH.size : _LENGTH.size + length])
            del self._heard[: _LENGTH.size + length]
            self._on_message(self, msgspec.msgpack.decode(body, type=Message))


class Listener:
    """Accepts connections of this user's processes."""

    def __init__(self, on_connection: Callable[[socket.socket], None]) -> None:
        self.name = f"kvpoll-cuda-ipc-{os.getpid()}-{os.urandom(8).hex()}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(64)
        self._on_connection = on_connection
        self._thread = threading.Thread(target=self._accept, name="cuda_ipc-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, then the socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if credentials(connection)[1] != os.getuid():
                connection.close()
                continue
            self._on_connection(connection)


def dial(name: str, limit_s: float) -> socket.socket:
    """Connect to a listener. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(limit_s)
        connection.connect(f"\0{name}")
    except OSError:
        connection.close()
        raise
    return connection


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """pid, uid and gid of the process at the other end, as the kernel knows them."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(packed)
    return pid, uid, gid


def _watch(pid: int) -> tuple[bool, int | None]:
    """Is the process gone already, and its pidfd; (False, None) for one that cannot be seen from here."""
    if pid <= 0:
        return False, None
    try:
        return False, os.pidfd_open(pid)
    except ProcessLookupError:
        return True, None
    except OSError:
        return False, None
