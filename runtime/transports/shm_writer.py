"""The writer's side of shm: maps a peer's pool and copies into it, one thread a peer; small writes in the caller's.

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
from kvpoll.runtime.transports.copy_plan import Plan, cut
from kvpoll.runtime.transports.forked_children import keep_from_children
from kvpoll.runtime.transports.interface import Copies, Tag, TransportError
from kvpoll.runtime.transports.offsets import Space
from kvpoll.runtime.transports.posted import PostedWrites, Write
from kvpoll.runtime.transports.shm_control import ControlView
from kvpoll.runtime.transports.shm_memory import Mapping
from kvpoll.runtime.transports.shm_wire import Descriptor
from kvpoll.runtime.transports.writer_thread import WriterThread

LOG: Final = logging.getLogger(__name__)
PIECE_BYTES: Final = 8 << 20
PIECE_RANGES: Final = 4096
AT_ONCE_BYTES: Final = 64 << 10
AT_ONCE_RANGES: Final = 256
"""A write of at most so much is placed by the thread that posts it, in some tens of microseconds."""

MOVE: Final = ctypes.PyDLL(None).memmove
"""memmove that keeps the interpreter's lock: for a few KiB, to give it away and take it back costs more."""
MOVE.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
MOVE.restype = ctypes.c_void_p

_ANSWER_LIMIT_S: Final = 5.0


class Unreachable(Exception):
    """The owner cannot be written to; the message says why."""


class _Pool:
    """An open connection to an owner and the mapping of its pool."""

    def __init__(self, connection: socket.socket, owner: Descriptor, files: list[int]) -> None:
        self.connection = connection
        self.mappings: list[Mapping] = []
        self.is_whole = all(owner.shared)
        self.control = ControlView(files[0], owner.epoch)
        self._watch = select.poll()
        self._watch.register(connection, select.POLLIN)
        bases, rest = [], iter(files[1:])
        try:
            for nbytes, shared in zip(owner.sizes, owner.shared, strict=True):
                if shared:
                    self.mappings.append(Mapping(next(rest), nbytes))
                bases.append(self.mappings[-1].address if shared else 0)
        except BaseException:
            self.close()
            raise
        self.space = Space(owner.sizes, bases)

    def has_owner(self) -> bool:
        """Whether the owner's end of the socket is open. For the writer's thread only."""
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


class ShmPeer(WriterThread):
    """One owner as its writer sees it, and the mapping of its pool while there is one."""

    def __init__(
        self, owner: Descriptor, writes: PostedWrites, node: str, epoch: int, bytes_per_s: float | None
    ) -> None:
        super().__init__(f"kvpoll-shm-to-{owner.node}", f"{owner.node} epoch {owner.epoch}", writes)
        self.descriptor = owner
        self.space = Space(owner.sizes)
        self._hello = shm_wire.pack_hello(shm_wire.Hello(node, epoch, owner.secret))
        self._bytes_per_s = bytes_per_s
        self._retired = False
        self._pool: _Pool | None = None
        self._current: Write | None = None
        self._placing = threading.Lock()

    def place_at_once(self, source: Space, copies: Copies, tag: Tag) -> bool:
        """Place a small write that has nobody before it here and now, because to wake the thread takes longer than to
        copy it. False, and nothing is placed, when it is not small, has to wait, or there is a reason not to write it.

        source: of the memory that is copied from.
        """
        if len(copies.nbytes) > AT_ONCE_RANGES or self._bytes_per_s is not None or self._queue or self._current:
            return False
        if copies.total > AT_ONCE_BYTES:
            return False
        with self._placing:  # the thread unmaps under this lock
            pool = self._pool
            if pool is None or not pool.is_whole or self._gone is not None:  # the thread watches the owner's end
                return False
            if pool.control.why_stop(tag.incarnation) is not None:
                return False
            moves = source.moves(copies, pool.space)
            if moves is None:
                return False
            for to, here, nbytes in moves:
                MOVE(to, here, nbytes)
        return True

    def end(self, reason: str, *, retired: bool) -> None:
        """No further write is taken; the one in progress ends with its piece. Does not wait: see ``join``."""
        self._retired = retired
        self._take_no_more(reason)
        self.nudge()

    # --- the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._gone is None:
                self._turn()
        except Exception as error:  # whatever it is, no write may stay pending for ever
            LOG.exception("the thread that writes to %s failed", self._owner)
            self._take_no_more(f"the thread that writes to {self._owner} failed: {error}")
            if self._current is not None:
                self._writes.fail(self._current, str(self._gone), drained=True)
        with self._placing:
            if self._pool:
                self._pool.close(bye=self._retired)
                self._pool = None

    def _turn(self) -> None:
        """Serve the next write, or wait for one while looking at the owner's end."""
        write = self._queue.popleft() if self._queue else None
        if write is None:
            self._wait(self._pool.connection if self._pool else None, select.POLLIN, None)
            if self._pool and not self._pool.has_owner():
                self._take_no_more(f"{self._owner} has ended")
        elif write.is_pending:
            self._current = write
            self._serve(write)
            self._current = None

    def _serve(self, write: Write) -> None:
        if self._pool is None:
            try:
                self._pool = self._open()
            except (Unreachable, TransportError, OSError) as error:
                self._writes.fail(write, f"{self._owner} cannot be reached: {error}", drained=True)
                return
        if self._writes.begin(write):
            assert write.plan is not None
            self._perform(self._pool, write, write.plan)

    def _perform(self, pool: _Pool, write: Write, plan: Plan) -> None:
        reason = self._copy(pool, write, plan)
        if reason is None:
            self._writes.finish(write)
        else:
            # The last piece is placed and nobody places a further one: that is the proof.
            self._writes.fail(write, reason, drained=True)

    def _copy(self, pool: _Pool, write: Write, plan: Plan) -> str | None:
        """Copy piece by piece; returns why it stopped early, or None."""
        if not np.asarray(self.descriptor.shared)[plan.target_region].all():
            return f"a region of {self._owner} is not shared memory: its owner allocates it with shm.allocate"
        into = plan._replace(target=pool.space.addresses_of(plan.target, plan.target_region))
        piece_bytes = PIECE_BYTES
        if self._bytes_per_s is not None:  # at least twenty pieces a second, or an abort would wait for long
            piece_bytes = max(1, min(PIECE_BYTES, int(self._bytes_per_s / 20)))
        begun_s, placed = time.monotonic(), 0
        for piece in cut(into, PIECE_RANGES, piece_bytes):
            reason = "aborted by its user" if write.aborted else self._why_stop(pool, write.tag)
            if reason is not None:
                return reason
            # memmove releases the interpreter's lock; map keeps the loop itself in C.
            columns = (piece.target.tolist(), piece.source.tolist(), piece.nbytes.tolist())
            deque(map(ctypes.memmove, *columns), maxlen=0)
            if self._bytes_per_s is not None:
                placed += piece.total
                self._rest(begun_s + placed / self._bytes_per_s)
        return None

    def _why_stop(self, pool: _Pool, tag: Tag) -> str | None:
        if self._gone is not None:
            return self._gone
        reason = pool.control.why_stop(tag.incarnation)
        if reason is None and not pool.has_owner():
            # Its memory is mapped here only and goes with the mapping: whatever was placed, nobody can see it.
            self._take_no_more(f"{self._owner} has ended")
            return f"{self._owner} has ended"
        return reason

    def _rest(self, until_s: float) -> None:
        while self._gone is None and (left := until_s - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    # --- connecting --------------------------------------------------------------------------------

    def _open(self) -> _Pool:
        connection = keep_from_children(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        files: list[int] = []
        try:
            connection.setblocking(False)
            connection.connect(self.descriptor.path)
            connection.send(self._hello)
            self._await(connection)
            message, files, _, _ = socket.recv_fds(
                connection, shm_wire.MESSAGE_MAX, shm_wire.FILES_MAX + 1, socket.MSG_CMSG_CLOEXEC
            )
            self._check(message, files)
            return _Pool(connection, self.descriptor, files)
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
            if self._wait(connection, select.POLLIN, left):
                return
        raise Unreachable(self._gone or f"no answer within {_ANSWER_LIMIT_S:g} s")

    def _check(self, message: bytes, files: list[int]) -> None:
        answer = shm_wire.unpack_answer(message)
        if answer is None:
            raise Unreachable("it closed the connection" if not message else "its answer was not understood")
        status, count = answer
        if status != shm_wire.WELCOME:
            raise Unreachable(shm_wire.REFUSALS.get(status, f"it refused (status {status})"))
        if len(files) != count or count != 1 + sum(self.descriptor.shared):
            raise Unreachable(f"it sent {len(files)} of {count} files: raise the limit of open files (ulimit -n)")
