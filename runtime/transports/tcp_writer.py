"""The writer's side of tcp: one thread a lane sends frames, reads answers, and finds out what became of lost ones.

A write is done or drained by the owner's answer. When a connection is lost without that answer, the thread asks: it
connects again, and the owner ends the lane's older connection before it welcomes the newer one, so a welcome proves
that nothing of the older is placed any more. So does an end or a reset of the connection itself (the owner closes only
after its last placement, and a dead owner's memory is gone) and a refused connect (its listener closes last). A peer
that is merely silent proves nothing, and then its writes stay failed and not drained.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from kvpoll.runtime.transports import tcp_wire as wire
from kvpoll.runtime.transports.copy_plan import Plan, cut
from kvpoll.runtime.transports.forked_children import keep_from_children
from kvpoll.runtime.transports.interface import Region
from kvpoll.runtime.transports.offsets import Space
from kvpoll.runtime.transports.posted import PostedWrites, Write
from kvpoll.runtime.transports.writer_thread import WriterThread

LOG: Final = logging.getLogger(__name__)
FRAME_BYTES: Final = 4 << 20
_CONNECT_LIMIT_S: Final = 5.0
_RETRY_S: Final = (0.1, 2.0)
_LINGER_S: Final = 1.0
_TICK_S: Final = 0.5
_NOTHING: Final = np.empty(0, dtype=np.int64)
_GONE_ERRORS: Final = {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.ECONNABORTED}


class SourceMemory:
    """This process's registered memory as one view, indexed by address."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._keep = list(regions)
        self.low = min(region.address for region in regions)
        span = max(region.address + region.nbytes for region in regions) - self.low
        # Spans whatever lies between the regions too; plans are checked, so only registered bytes are touched.
        self.view = memoryview((ctypes.c_ubyte * span).from_address(self.low)).cast("B")


class Settings:
    """What all lanes of a transport share."""

    def __init__(
        self, node: str, epoch: int, writes: PostedWrites, buffer_bytes: int | None, stall_s: float,
        bytes_per_s: float | None,
    ) -> None:  # fmt: skip
        self.node, self.epoch, self.writes = node, epoch, writes
        self.buffer_bytes, self.stall_s, self.bytes_per_s = buffer_bytes, stall_s, bytes_per_s
        self.memory: SourceMemory | None = None


class _Lost(Exception):
    """The connection is over. ``proof``: nothing that was sent on it will be placed any more."""

    def __init__(self, reason: str, *, proof: bool) -> None:
        super().__init__(reason)
        self.proof = proof


class TcpPeer:
    """One owner as its writer sees it."""

    def __init__(self, owner: wire.Descriptor, settings: Settings, lanes: int) -> None:
        self.space = Space(owner.sizes)
        self.lanes = [Lane(owner, settings, number) for number in range(lanes)]

    def submit(self, write: Write) -> None:
        """Queue the write on the least busy lane."""
        min(self.lanes, key=lambda lane: lane.load).submit(write)

    def end(self, reason: str, linger_s: float | None) -> None:
        """Take no further write; give those under way so long to drain (None: as long as it takes)."""
        for lane in self.lanes:
            lane.end(reason, linger_s)

    def join(self, until_s: float) -> bool:
        """Wait for the lanes' threads; True when all have ended."""
        joined = [lane.join(until_s - time.monotonic()) for lane in self.lanes]
        return all(joined)


class Lane(WriterThread):
    """One connection to an owner, with its thread and its queue."""

    def __init__(self, owner: wire.Descriptor, settings: Settings, number: int) -> None:
        super().__init__(f"kvpoll-tcp-to-{owner.node}", str(owner), settings.writes)
        self._descriptor, self._settings, self._number = owner, settings, number
        self._until_s: float | None = None
        # Only the thread touches what follows.
        self._connection: socket.socket | None = None
        self._current: Write | None = None
        self._frames: Iterator[tuple[Plan, bool]] = iter(())
        self._out: list[Any] = []
        self._views = 1
        self._unanswered: dict[int, Write] = {}
        self._unproven: list[Write] = []
        self._answer = bytearray()
        self._progress_s = self._frame_at_s = self._retry_at_s = 0.0
        self._retry_s = _RETRY_S[0]

    @property
    def load(self) -> int:
        """Writes that this lane has still to send or to hear of."""
        return len(self._queue) + len(self._unanswered) + (self._current is not None)

    def end(self, reason: str, linger_s: float | None) -> None:
        """See TcpPeer.end. Does not wait."""
        self._until_s = None if linger_s is None else time.monotonic() + linger_s
        self._take_no_more(reason)
        self.nudge()

    # --- the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._is_over():
            try:
                if self._connection is not None:
                    self._turn(self._connection)
                elif self._queue or (self._unproven and time.monotonic() >= self._retry_at_s):
                    self._connect()
                else:
                    self._sleep()
            except _Lost as lost:
                self._lose(str(lost), proof=lost.proof)
            except Exception as error:  # whatever it is, no write may stay pending for ever
                LOG.exception("the thread that writes to %s failed", self._owner)
                self._lose(f"the thread that writes to {self._owner} failed: {error}", proof=False)
        self._lose(str(self._gone), proof=False)

    def _is_over(self) -> bool:
        if self._gone is None:
            return False
        while self._queue:
            self._writes.fail(self._queue.popleft(), self._gone, drained=True)
        busy = self._current is not None or self._unanswered or self._unproven
        return not busy or (self._until_s is not None and time.monotonic() >= self._until_s)

    def _sleep(self) -> None:
        """Nothing to send: wait for the bell, or for the next attempt to learn what became of lost writes."""
        limit_s = max(0.0, self._retry_at_s - time.monotonic()) if self._unproven else None
        self._wait(None, 0, limit_s)

    def _turn(self, connection: socket.socket) -> None:
        """Send or receive once, or wait until one of them is possible."""
        if not self._out:
            self._next_frame()
        busy = bool(self._out or self._unanswered or self._current)
        limit_s = min(_TICK_S, max(0.0, self._frame_at_s - time.monotonic()) or _TICK_S) if busy else None
        ready = self._wait(connection, select.POLLIN | (select.POLLOUT if self._out else 0), limit_s)
        try:
            if ready & ~select.POLLOUT:
                self._read_answers(connection)
            if ready & select.POLLOUT and self._out:
                self._send(connection)
        except BlockingIOError:
            pass
        except OSError as error:
            raise _Lost(
                f"the connection to {self._owner} failed: {error.strerror}", proof=error.errno in _GONE_ERRORS
            ) from None
        if not busy or ready:
            self._progress_s = time.monotonic()
        elif (self._out or self._unanswered) and time.monotonic() - self._progress_s > self._settings.stall_s:
            raise _Lost(f"no progress with {self._owner} for {self._settings.stall_s:g} s", proof=False)

    def _next_frame(self) -> None:
        """Prepare what is sent next, if anything may be sent now."""
        while self._current is None and self._queue and self._gone is None:
            write = self._queue.popleft()
            if self._writes.begin(write):
                assert write.plan is not None
                self._current = write
                self._frames = _with_last(cut(write.plan, wire.RANGES_MAX, FRAME_BYTES))
        write_now = self._current
        if write_now is None:
            return
        stop = write_now.aborted or self._gone is not None
        if not stop and time.monotonic() < self._frame_at_s:
            return
        plan, last = (None, True) if stop else next(self._frames)
        self._out = self._frame(write_now, plan, last)
        if stop:
            self._writes.fail(write_now, self._gone or "aborted by its user", drained=False)
        if last:
            self._unanswered[write_now.handle] = write_now
            self._current = None

    def _frame(self, write: Write, plan: Plan | None, last: bool) -> list[Any]:
        kind, flags = (wire.STOP, 0) if plan is None else (wire.DATA, wire.LAST if last else 0)
        count, payload = (0, 0) if plan is None else (len(plan.nbytes), plan.total)
        header = wire.Header(
            kind, flags, self._descriptor.epoch, write.handle, write.tag.incarnation, count, payload
        )  # fmt: skip
        if plan is None:
            return [memoryview(wire.pack_frame(header, _NOTHING, _NOTHING))]
        memory = self._settings.memory
        assert memory is not None
        if self._settings.bytes_per_s is not None:
            self._frame_at_s = max(time.monotonic(), self._frame_at_s) + payload / self._settings.bytes_per_s
        self._views = wire.views_per_call(count, payload)
        view = memory.view
        begins = (plan.source - memory.low).tolist()
        ends = (plan.source - memory.low + plan.nbytes).tolist()
        pages = [view[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return [memoryview(wire.pack_frame(header, plan.target, plan.nbytes)), *pages]

    def _send(self, connection: socket.socket) -> None:
        out, first = self._out, 0
        try:
            while first < len(out):
                sent = connection.sendmsg(out[first : first + self._views])
                while sent and sent >= len(out[first]):
                    sent -= len(out[first])
                    first += 1
                if sent:
                    out[first] = out[first][sent:]
        finally:
            del out[:first]

    def _read_answers(self, connection: socket.socket) -> None:
        while True:
            data = connection.recv(1 << 14)
            if not data:
                raise _Lost(f"{self._owner} has ended the connection", proof=True)
            self._answer += data
            whole = len(self._answer) // wire.ANSWER_BYTES * wire.ANSWER_BYTES
            for at in range(0, whole, wire.ANSWER_BYTES):
                try:
                    self._take_answer(*wire.unpack_answer(self._answer[at : at + wire.ANSWER_BYTES]))
                except wire.Malformed:
                    raise _Lost(f"{self._owner} sent something that is no answer", proof=False) from None
            del self._answer[:whole]

    def _take_answer(self, status: int, handle: int) -> None:
        write = self._unanswered.pop(handle, None)
        if write is None:
            return  # an answer to a write that is not waited for changes nothing
        if status == wire.PLACED:
            self._writes.finish(write)
        else:
            reason = "revoked by its owner" if status == wire.REVOKED else "stopped before its end"
            self._writes.fail(write, reason, drained=True)

    def _lose(self, reason: str, *, proof: bool) -> None:
        """The connection is over: what was under way fails, and drains now if this is a proof."""
        lost = list(self._unanswered.values())
        if self._current is not None:
            lost.append(self._current)
        self._current, self._out = None, []
        self._unanswered.clear()
        self._answer.clear()
        if self._connection is not None:
            if not proof:  # a reset, so that the peer's kernel stops offering what it still holds
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self._connection.close()
            self._connection = None
        for write in lost:
            self._writes.fail(write, reason, drained=proof)
        if not proof:
            self._unproven += lost
            self._retry_at_s, self._retry_s = time.monotonic(), _RETRY_S[0]

    # --- connecting --------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Connect and greet. Whatever is queued fails when that is impossible."""
        try:
            self._connection = self._open()
        except _Lost as lost:
            if lost.proof:
                self._settle_unproven()
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _RETRY_S[1])
            while self._queue:
                write = self._queue.popleft()
                self._writes.fail(write, f"{self._owner} cannot be reached: {lost}", drained=True)
        else:
            self._settle_unproven()
            self._progress_s = time.monotonic()

    def _settle_unproven(self) -> None:
        unproven, self._unproven = self._unproven, []
        for write in unproven:
            self._writes.fail(write, "its connection was lost", drained=True)

    def _open(self) -> socket.socket:
        address, settings = self._descriptor, self._settings
        until_s = time.monotonic() + _CONNECT_LIMIT_S
        connection = keep_from_children(socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET))
        try:
            connection.setblocking(False)
            wire.tune(connection, settings.buffer_bytes, settings.stall_s)
            failed = connection.connect_ex((address.host, address.port))
            if failed == errno.EINPROGRESS:
                self._await(connection, select.POLLOUT, until_s)
                failed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                raise _Lost(os.strerror(failed), proof=failed == errno.ECONNREFUSED)
            hello = wire.Hello(settings.node, settings.epoch, self._number, address.epoch, address.cookie)
            connection.send(wire.pack_hello(hello))
            status = self._hear_welcome(connection, until_s)
            if status != wire.WELCOME:
                # Another life answers here: the one that was asked for has closed its listener, its last act.
                reason = wire.REFUSALS.get(status, f"it refused (status {status})")
                raise _Lost(reason, proof=status in (17, 18))
        except (OSError, wire.Malformed) as error:
            connection.close()
            raise _Lost(str(error), proof=False) from None
        except _Lost:
            connection.close()
            raise
        return connection

    def _hear_welcome(self, connection: socket.socket, until_s: float) -> int:
        answer = b""
        while len(answer) < wire.ANSWER_BYTES:
            self._await(connection, select.POLLIN, until_s)
            data = connection.recv(wire.ANSWER_BYTES - len(answer))
            if not data:
                raise _Lost("it closed the connection", proof=False)
            answer += data
        return wire.unpack_answer(answer)[0]

    def _await(self, connection: socket.socket, events: int, until_s: float) -> None:
        while not self._wait(connection, events, max(0.0, until_s - time.monotonic())):
            if self._gone is not None and not self._unproven:
                raise _Lost(self._gone, proof=False)
            if self._until_s is not None and time.monotonic() >= self._until_s:
                raise _Lost(self._gone or "closing", proof=False)
            if time.monotonic() >= until_s:
                raise _Lost(f"no answer within {_CONNECT_LIMIT_S:g} s", proof=False)

    def _wait(self, connection: socket.socket | None, events: int, limit_s: float | None) -> int:
        """The same, no longer than there is to linger."""
        if self._until_s is not None:
            left_s = max(0.0, self._until_s - time.monotonic())
            limit_s = left_s if limit_s is None else min(limit_s, left_s)
        return super()._wait(connection, events, limit_s)


def _with_last(pieces: Iterator[Plan]) -> Iterator[tuple[Plan, bool]]:
    """Each piece, and whether it is the last."""
    ahead = next(pieces, None)
    while ahead is not None:
        piece, ahead = ahead, next(pieces, None)
        yield piece, ahead is None
