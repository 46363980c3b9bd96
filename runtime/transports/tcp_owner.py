"""The owner's side of tcp: receives frames and places them, so that it alone decides what enters its pages.

One thread a connection. Each turn of placing (one non-blocking receive, straight into the pages) holds the
connection's gate, and before it the incarnation is looked up among the revoked. ``revoke`` adds to the revoked, then
passes every gate once: after that, no byte of the incarnation can be placed. The rest of its frames is received into
a bin, so that other writes of the connection go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hmac
import secrets
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final

from kvpoll.runtime.transports import tcp_wire as wire
from kvpoll.runtime.transports.forked_children import keep_from_children
from kvpoll.runtime.transports.interface import Region, TransportError
from kvpoll.runtime.transports.offsets import BadRange, Space
from kvpoll.spec.vocabulary import Incarnation

_HELLO_LIMIT_S: Final = 5.0
_RETIRE_LIMIT_S: Final = 2.0
_REVOKE_LIMIT_S: Final = 1.0
_CONNECTIONS_MAX: Final = 256
_REVOKED_MAX: Final = 1 << 20
_TICK_MS: Final = 500
COUNTERS: Final = (
    "admitted", "refused", "malformed", "connections_ended", "writes_placed", "writes_revoked", "bytes_thrown",
)  # fmt: skip


class _Ended(Exception):
    """The connection is over; ``counter`` says how it is counted."""

    def __init__(self, counter: str = "connections_ended") -> None:
        super().__init__(counter)
        self.counter = counter


class Receiver:
    """Listens, admits writers and keeps what all connections share: regions, revoked incarnations, counters."""

    def __init__(
        self, epoch: int, regions: Sequence[Region], host: str, port: int, buffer_bytes: int | None, stall_s: float
    ) -> None:
        self.epoch, self.stall_s, self.buffer_bytes = epoch, stall_s, buffer_bytes
        self.cookie = secrets.token_bytes(wire.COOKIE_BYTES)
        self.space = Space([region.nbytes for region in regions])
        self.memory = [memoryview((ctypes.c_ubyte * r.nbytes).from_address(r.address)).cast("B") for r in regions]
        self._keep = list(regions)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._lock = threading.Lock()
        self._revoked: dict[Incarnation, None] = {}
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._newest: dict[str, int] = {}
        self._open: set[_Lane] = set()
        self.closing = False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = keep_from_children(socket.create_server((host, port), family=family, backlog=128))
        except OSError as error:
            raise TransportError(
                f"tcp: cannot listen on {host} port {port}: {error.strerror or error}: name an address of this host "
                f"and a free port (0 lets the system choose)"
            ) from None
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="kvpoll-tcp-owner", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not self.closing:
            if not poll.poll(_TICK_MS):
                continue
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(0.05)  # out of descriptors: the listener stays readable, and a busy loop cures nothing
                continue
            keep_from_children(connection)
            with self._lock:
                full = len(self._open) >= _CONNECTIONS_MAX or self.closing
                lane = None if full else _Lane(self, connection)
                if lane is not None:
                    self._open.add(lane)
            if lane is None:
                self.count("refused")
                connection.close()
            else:
                lane.thread.start()

    # --- called by lanes ---------------------------------------------------------------------------

    def admit(self, lane: _Lane, hello: wire.Hello) -> int:
        """Status for a hello. The older connection of the same lane is ended first: a welcome proves it quiet."""
        if not hmac.compare_digest(hello.cookie, self.cookie):
            return 17
        if hello.owner_epoch != self.epoch:
            return 18
        key = (hello.node, hello.lane)
        with self._lock:
            newest = self._newest.get(hello.node, hello.epoch)
            if hello.epoch < newest:
                return 19
            if self.closing:
                return 20
            self._newest[hello.node] = hello.epoch
            older = [self._lanes.get(key)]
            if hello.epoch > newest:  # a new life of the writer: all connections of the former one end
                older = [other for (node, _), other in self._lanes.items() if node == hello.node]
            self._lanes[key] = lane
        quiet = [other is None or other.end(_RETIRE_LIMIT_S) for other in older]
        return wire.WELCOME if all(quiet) else 20

    def is_revoked(self, incarnation: Incarnation) -> bool:
        """Whether these pages are given up. Asked with the lane's gate held."""
        return incarnation in self._revoked

    def left(self, lane: _Lane, counter: str) -> None:
        """A lane's thread has ended."""
        with self._lock:
            self._open.discard(lane)
            for key in [key for key, value in self._lanes.items() if value is lane]:
                del self._lanes[key]
        self.count(counter)

    def count(self, counter: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counters[counter] += amount

    # --- called by the transport's user ------------------------------------------------------------

    def revoke(self, incarnation: Incarnation) -> bool:
        """True when no byte of this incarnation can be placed any more; False when a thread did not let go in time.

        The newest 2**20 revocations are remembered.
        """
        with self._lock:
            self._revoked[incarnation] = None
            if len(self._revoked) > _REVOKED_MAX:
                del self._revoked[next(iter(self._revoked))]
            lanes = list(self._open)
        until_s = time.monotonic() + _REVOKE_LIMIT_S
        passed = [lane.pass_gate(until_s - time.monotonic()) for lane in lanes]
        return all(passed)

    def close(self, limit_s: float) -> None:
        """End all connections, and only then the listener: whoever is refused knows that nothing is placed any more."""
        self.closing = True
        until_s = time.monotonic() + limit_s
        with self._lock:
            lanes = list(self._open)
        for lane in lanes:
            lane.end(0)
        for lane in lanes:
            lane.end(max(0.0, until_s - time.monotonic()))
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
        self._thread.join(max(0.1, until_s - time.monotonic()))
        self._listener.close()


class _Lane:
    """One connection of one writer, with its thread."""

    def __init__(self, receiver: Receiver, connection: socket.socket) -> None:
        self._receiver = receiver
        self._connection = connection
        self._gate = threading.Lock()
        self._ending = False
        self._refused_write: int | None = None
        self._bin = memoryview(bytearray(1 << 20))
        self.thread = threading.Thread(target=self._run, name="kvpoll-tcp-lane", daemon=True)

    def pass_gate(self, limit_s: float) -> bool:
        """Wait until the thread is not placing, for at most so long."""
        if not self._gate.acquire(timeout=max(0.001, limit_s)):
            return False
        self._gate.release()
        return True

    def end(self, limit_s: float) -> bool:
        """End the connection; True when its thread places nothing any more."""
        self._ending = True
        with contextlib.suppress(OSError):  # it may have ended by itself
            self._connection.shutdown(socket.SHUT_RD)
        if self.thread is threading.current_thread() or self.thread.ident is None:
            return True
        self.thread.join(limit_s)
        return not self.thread.is_alive()

    def _run(self) -> None:
        counter = "connections_ended"
        try:
            self._connection.setblocking(False)
            wire.tune(self._connection, self._receiver.buffer_bytes, self._receiver.stall_s)
            self._greet()
            while True:
                self._take_frame()
        except _Ended as ended:
            counter = ended.counter
        except (wire.Malformed, BadRange):
            counter = "malformed"
        except OSError:
            pass
        finally:
            # Closed only here, after the last placement: the writer reads the connection's end as "nothing more".
            self._connection.close()
            self._receiver.left(self, counter)

    def _greet(self) -> None:
        try:
            fixed = self._take(wire.HELLO_BYTES, _HELLO_LIMIT_S)
            hello = wire.unpack_hello(fixed, self._take(wire.node_bytes_of(fixed), _HELLO_LIMIT_S))
        except wire.Malformed:
            self._answer(16, 0)
            raise
        status = self._receiver.admit(self, hello)
        self._answer(status, 0)
        if status != wire.WELCOME:
            raise _Ended("refused")
        self._receiver.count("admitted")

    def _take_frame(self) -> None:
        receiver = self._receiver
        header = wire.unpack_header(self._take(wire.HEADER_BYTES, None))
        if header.owner_epoch != receiver.epoch:
            raise wire.Malformed("a frame for another life")
        if header.kind == wire.STOP:
            self._refused_write = None
            self._answer(wire.STOPPED, header.write)
            return
        target, nbytes = wire.unpack_ranges(header, self._take(header.ranges * wire.RANGE_BYTES, receiver.stall_s))
        regions = receiver.space.regions_of("target", target, nbytes)
        begins = (target - receiver.space.starts[regions]).tolist()
        memory = receiver.memory
        rows = zip(regions.tolist(), begins, nbytes.tolist(), strict=True)
        views = [memory[region][begin : begin + length] for region, begin, length in rows]
        if self._refused_write == header.write or not self._place(views, header):
            self._throw_away(views)
            self._refused_write = header.write
        if header.flags & wire.LAST:
            revoked = self._refused_write == header.write
            receiver.count("writes_revoked" if revoked else "writes_placed")
            self._refused_write = None
            self._answer(wire.REVOKED if revoked else wire.PLACED, header.write)

    def _place(self, views: list[memoryview], header: wire.Header) -> bool:
        """Receive into these views; False, with ``views`` cut to what is left, once the incarnation is revoked."""
        receive = self._connection.recvmsg_into
        most, first = wire.views_per_call(header.ranges, header.payload), 0
        while first < len(views):
            with self._gate:
                if self._receiver.is_revoked(header.incarnation) or self._ending:
                    del views[:first]
                    return False
                try:
                    got = receive(views[first : first + most])[0]
                except BlockingIOError:
                    got = -1
            if got < 0:
                self._await(self._receiver.stall_s)
                continue
            if got == 0:
                raise _Ended
            while got and got >= len(views[first]):
                got -= len(views[first])
                first += 1
            if got:
                views[first] = views[first][got:]
        return True

    def _throw_away(self, views: list[memoryview]) -> None:
        left = sum(len(view) for view in views)
        self._receiver.count("bytes_thrown", left)
        while left:
            left -= self._receive(self._bin[: min(left, len(self._bin))], self._receiver.stall_s)

    def _take(self, nbytes: int, limit_s: float | None) -> bytes:
        """Exactly so many bytes; the wait for the first of them has no limit when ``limit_s`` is None."""
        buffer = bytearray(nbytes)
        got = 0
        while got < nbytes:
            got += self._receive(memoryview(buffer)[got:], limit_s if limit_s or not got else self._receiver.stall_s)
        return bytes(buffer)

    def _receive(self, into: memoryview, limit_s: float | None) -> int:
        while True:
            try:
                got = self._connection.recv_into(into)
            except BlockingIOError:
                self._await(limit_s)
                continue
            if got == 0:
                raise _Ended
            return got

    def _await(self, limit_s: float | None) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        until_s = None if limit_s is None else time.monotonic() + limit_s
        while not poll.poll(_TICK_MS):
            if self._ending or (until_s is not None and time.monotonic() > until_s):
                raise _Ended
        if self._ending:
            raise _Ended

    def _answer(self, status: int, write: int) -> None:
        # A writer that does not read its answers (16 bytes each) until the buffer is full is not one of ours.
        if self._connection.send(wire.pack_answer(status, write)) != wire.ANSWER_BYTES:
            raise wire.Malformed("the writer does not read its answers")
