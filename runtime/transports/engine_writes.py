"""Writes that threads carry through an engine: one thread per peer, so that a stuck peer delays no other.

An engine's own account of a write is not enough: ``rc != 0``, an exception, a time-out and a cancel all mean "failed,
and bytes may still land" (ENGINES 4). So the record of a write counts the parts that the engine was given and those
that it has finished, and ``drained`` is that sum: every part that was begun is known to have landed, and none will be
begun any more. A part that the engine broke off counts as unsettled for ever.

Deadlines are ours, on the monotonic clock: engines have floors (5 s), defaults (30 s) or none at all.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol

from kvpoll.runtime.transports.interface import DONE, PENDING, Progress, Tag, Wake

PAUSE_MIN_S: Final = 0.00002
PAUSE_MAX_S: Final = 0.005
PAUSE_SHARE: Final = 1 / 16
"""Between two looks at what is in flight: this share of the time that it has taken so far, so that the end is seen
soon after it has come, and never a busy loop: on few cores that starves the engine's own threads."""

PAUSE_LOST_S: Final = 0.1
"""The longest pause when all that is in flight belongs to writes that have failed: only a late drain is awaited."""

CLOSING_S: Final = 1.0
"""How long ``close`` waits for threads that an engine may be holding; they are daemons, and stay behind if need be."""

LOG = logging.getLogger(__name__)


class Refused(Exception):
    """The engine was given nothing of this part. One line: why."""


class Broken(Exception):
    """The engine gave up a part and may still be placing bytes of it. One line: what it said."""


class Carrier(Protocol):
    """What an engine does for one peer. Called by that peer's thread only."""

    def open(self) -> None:
        """Before the first part. Raises Refused when the peer cannot be used at all."""
        ...

    def begin(self, part: Any, tag: Tag) -> Any:
        """Give the engine one part, as ``Lane.put`` was given it, and return its ticket. May block. Raises
        Refused, Broken, or what the engine raises, which counts as Broken."""
        ...

    def landed(self, ticket: Any) -> bool:
        """Is the part placed, every byte, for certain? Does not block. Raises Refused when it is not, but is proven
        to be at rest; whatever else it raises counts as Broken."""
        ...

    def give_up(self, ticket: Any) -> None:
        """The write has failed while the engine holds this part: ask for its end, if that can be asked. Once."""
        ...

    def close(self) -> None:
        """After the last part, and only if every part has landed: an engine must not lose what it still works on."""
        ...


class Write:
    """One posted write. All fields are guarded by the book's lock."""

    __slots__ = ("begun_all", "deadline", "forgotten", "handle", "moving", "parts", "reason", "state", "tag", "unsure")

    def __init__(self, handle: int, tag: Tag, parts: Iterator[Any], deadline: float) -> None:
        self.handle = handle
        self.tag = tag
        self.parts = parts
        self.deadline = deadline
        self.state = "pending"
        self.reason: str | None = None
        self.moving = 0
        self.begun_all = False
        self.unsure = False
        self.forgotten = False

    @property
    def drained(self) -> bool:
        """Nothing of it is with the engine, and nothing will be."""
        return self.state != "pending" and self.moving == 0 and not self.unsure

    def fail(self, reason: str) -> bool:
        """The first cause stays. True if this was it."""
        if self.state != "pending":
            return False
        self.state, self.reason = "failed", reason
        return True

    def progress(self) -> Progress:
        if self.state == "pending":
            return PENDING
        return DONE if self.state == "done" else Progress("failed", self.drained, self.reason)


class WriteBook:
    """All writes of one transport, and the watch over their deadlines."""

    def __init__(self, name: str, wake: Wake, deadline_s: float) -> None:
        self.name = name
        self.deadline_s = deadline_s
        self.lock = threading.RLock()
        self.lanes: list[Lane] = []
        self.closed = False
        self._wake = wake
        self._writes: dict[int, Write] = {}
        self._numbers = itertools.count(1)
        self._due: deque[Write] = deque()
        self._overdue = threading.Condition(self.lock)
        self._watch: threading.Thread | None = None
        self._unsettled = 0

    @property
    def unsettled(self) -> int:
        """Parts that the engine was given and has not finished, those that it broke off included."""
        with self.lock:
            return self._unsettled

    def enter(self, tag: Tag, parts: Iterable[Any]) -> Write:
        """A new write that is pending. Its deadline runs from now."""
        with self.lock:
            write = Write(next(self._numbers), tag, iter(parts), time.monotonic() + self.deadline_s)
            self._writes[write.handle] = write
            self._due.append(write)
            if self._watch is None and not self.closed:
                self._watch = threading.Thread(target=self._watching, name=f"{self.name}-deadlines", daemon=True)
                self._watch.start()
            self._overdue.notify()
        return write

    def settle_at_once(self, tag: Tag, reason: str | None) -> int:
        """A write of which nothing has to be done, or nothing may be: the handle of one that is over."""
        with self.lock:
            write = Write(next(self._numbers), tag, iter(()), 0.0)
            write.state, write.reason = ("failed", reason) if reason else ("done", None)
            self._writes[write.handle] = write
        self.tell()
        return write.handle

    def tell(self) -> None:
        """Call ``wake``. What it raises is logged: it must not end the thread that happened to call it."""
        try:
            self._wake()
        except Exception:
            LOG.exception("the wake function of the transport %s raised", self.name)

    def poll(self, handle: int) -> Progress:
        """How a write stands. Raises KeyError for a handle that was never given or is forgotten."""
        with self.lock:
            return self._writes[handle].progress()

    def fail(self, writes: Iterable[Write], reason: str) -> None:
        """These writes are over; what of them is with the engine stays to be drained."""
        with self.lock:
            changed = [write for write in writes if write.fail(reason)]
        if changed:
            self.tell()

    def find(self, handle: int) -> Write | None:
        with self.lock:
            return self._writes.get(handle)

    def pending(self) -> list[Write]:
        """Writes that are neither done nor failed."""
        with self.lock:
            return [write for write in self._writes.values() if write.state == "pending"]

    def forget(self, handle: int) -> None:
        """The lane keeps what is still in flight; the book does not."""
        with self.lock:
            write = self._writes.pop(handle, None)
            if write is not None:
                write.forgotten = True

    def take_part(self, write: Write) -> Any:
        """The next part, counted as begun, or None when none may be begun any more."""
        with self.lock:
            if write.state != "pending" or write.begun_all:
                return None
            part = next(write.parts, None)
            if part is None:
                write.begun_all = True
                return None
            write.moving += 1
            self._unsettled += 1
            return part

    def part_over(self, write: Write, failure: str | None, unsure: bool) -> None:
        """A part that was begun has landed (no failure), was refused, or is lost to the engine (``unsure``)."""
        with self.lock:
            was = write.progress()
            write.moving -= 1
            write.unsure |= unsure
            self._unsettled -= not unsure
            if failure is not None:
                write.fail(failure)
            elif write.state == "pending" and write.begun_all and write.moving == 0:
                write.state = "done"
            changed = write.progress() != was and not write.forgotten
        if changed:
            self.tell()

    def all_begun(self, write: Write) -> None:
        """Its last part was given to the engine; it may already have landed."""
        with self.lock:
            finished = write.state == "pending" and write.begun_all and write.moving == 0
            if finished:
                write.state = "done"
        if finished:
            self.tell()

    def close(self) -> None:
        """Fail what is pending and end the threads. Returns after ``CLOSING_S`` at most."""
        until = time.monotonic() + CLOSING_S
        with self.lock:
            self.closed = True
            self._overdue.notify()
            for lane in self.lanes:
                lane.changed.notify()
        self.fail(self.pending(), "the transport was closed")
        for thread in [self._watch, *(lane.thread for lane in self.lanes)]:
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _watching(self) -> None:
        while True:
            with self.lock:
                if self.closed:
                    return
                while self._due and self._due[0].state != "pending":
                    self._due.popleft()
                left = self._due[0].deadline - time.monotonic() if self._due else None
                if left is None or left > 0:
                    self._overdue.wait(left)
                    continue
                write = self._due.popleft()
            self.fail([write], f"not placed after {self.deadline_s:g} s")


class _Flight:
    """A part that the engine holds, and since when."""

    __slots__ = ("begun", "given_up", "ticket", "write")

    def __init__(self, write: Write, ticket: Any) -> None:
        self.write = write
        self.ticket = ticket
        self.given_up = False
        self.begun = time.monotonic()


class Lane:
    """The writes to one peer, in the order posted, and the thread that carries them.

    depth: how many parts the engine may hold at once.
    """

    def __init__(self, book: WriteBook, carrier: Carrier, name: str, depth: int) -> None:
        self.book = book
        self.carrier = carrier
        self.depth = depth
        self.changed = threading.Condition(book.lock)
        self.over: str | None = None
        """Why nothing is begun for this peer any more: it was retired, or could not be opened."""
        self._name = name
        self._waiting: deque[Write] = deque()
        self._flying: list[_Flight] = []
        self._lost = False
        """Did the engine break off a part? Then it may still be at work on it, for ever."""
        self.thread: threading.Thread | None = None
        with book.lock:
            book.lanes.append(self)

    def put(self, tag: Tag, parts: Iterable[Any]) -> int:
        """Queue a write; its handle."""
        with self.book.lock:
            reason = self.over or ("the transport is closed" if self.book.closed else None)
            if reason is not None:
                return self.book.settle_at_once(tag, reason)
            write = self.book.enter(tag, parts)
            self._waiting.append(write)
            if self.thread is None:
                self.thread = threading.Thread(target=self._carry, name=self._name, daemon=True)
                self.thread.start()
            self.changed.notify()
        return write.handle

    def retire(self, reason: str) -> None:
        """This peer's life is over: what waits or is half sent fails, what is in flight is watched until it lands."""
        with self.book.lock:
            if self.over is not None:
                return
            self.over = reason
            writes = [*self._waiting, *(flight.write for flight in self._flying)]
            self._waiting.clear()
            self.changed.notify()
        self.book.fail(writes, reason)

    def drop(self, room: Any, reason: str) -> None:
        """Fail the writes of one incarnation that are not over yet."""
        with self.book.lock:
            held = [*self._waiting, *(flight.write for flight in self._flying)]
        self.book.fail([write for write in held if write.tag.incarnation == room], reason)

    def nudge(self) -> None:
        """Something that the carrier was waiting for has come: look now."""
        with self.book.lock:
            self.changed.notify()

    def _carry(self) -> None:
        try:
            self.carrier.open()
        except Exception as error:  # an engine raises what it likes; no peer may end this process
            self.retire(f"the peer cannot be opened: {_line(error)}")
        while self._wait():
            moved = self._begin_next()
            moved |= self._look()
            if not moved:
                self._rest()
        with self.book.lock:
            if not self.book.closed:  # retired: ``close`` has no thread to wait for
                self.book.lanes.remove(self)
        if not self._flying and not self._lost:
            self.carrier.close()

    def _wait(self) -> bool:
        """Until there is something to do. False when the lane ends."""
        with self.book.lock:
            while not self.book.closed:
                if self._flying or (self._waiting and self.over is None):
                    return True
                if self.over is not None:
                    return False
                self.changed.wait()
            return False

    def _rest(self) -> None:
        with self.book.lock:
            if not self._flying or self.book.closed:
                return
            live = any(flight.write.state == "pending" for flight in self._flying)
            age = time.monotonic() - max(flight.begun for flight in self._flying)
            self.changed.wait(max(PAUSE_MIN_S, min(PAUSE_MAX_S if live else PAUSE_LOST_S, age * PAUSE_SHARE)))

    def _begin_next(self) -> bool:
        """Give the engine the next part of the first write that has one, if it may hold one more."""
        with self.book.lock:
            # What a failed write left in flight must not keep the peer's later writes waiting.
            live = sum(1 for flight in self._flying if flight.write.state == "pending")
            if not self._waiting or live >= self.depth:
                return False
            write = self._waiting[0]
            part = self.book.take_part(write)
            if part is None:
                self._waiting.popleft()
        if part is None:
            self.book.all_begun(write)
            return True
        try:
            ticket = self.carrier.begin(part, write.tag)
        except Refused as error:
            self.book.part_over(write, _line(error), unsure=False)
        except Exception as error:
            self._lost = True
            self.book.part_over(write, _line(error), unsure=True)
        else:
            with self.book.lock:
                self._flying.append(_Flight(write, ticket))
        return True

    def _look(self) -> bool:
        """Which parts have landed? True if any is over."""
        still = []
        for flight in self._flying:
            try:
                if flight.write.state == "failed" and not flight.given_up:
                    flight.given_up = True
                    self.carrier.give_up(flight.ticket)
                landed = self.carrier.landed(flight.ticket)
            except Refused as error:
                self.book.part_over(flight.write, _line(error), unsure=False)
            except Exception as error:
                self._lost = True
                self.book.part_over(flight.write, _line(error), unsure=True)
            else:
                if not landed:
                    still.append(flight)
                    continue
                self.book.part_over(flight.write, None, unsure=False)
        moved = len(still) < len(self._flying)
        with self.book.lock:
            self._flying = still
        return moved


def _line(error: Exception) -> str:
    """What an error says, in one line; its kind too where that is all there is, or where it is the engine's own."""
    said = " ".join(str(error).split())
    return said if isinstance(error, Refused | Broken) and said else f"{type(error).__name__}: {said}".rstrip(": ")
