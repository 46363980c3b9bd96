"""The writes to one peer, and the thread that carries them through an engine.

Each peer has a thread of its own, so that a stuck peer delays no other. An engine that blocks holds this thread and
nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, Protocol

from kvpoll.runtime.transports.engine_writes import EngineWrite, WriteBook
from kvpoll.runtime.transports.interface import Tag

PAUSE_MIN_S: Final = 0.00002
PAUSE_MAX_S: Final = 0.005
PAUSE_SHARE: Final = 1 / 16
"""Between two looks at what is in flight: this share of the time that it has taken so far, so that the end is seen
soon after it has come, and never a busy loop: on few cores that starves the engine's own threads."""

PAUSE_LOST_S: Final = 0.1
"""The longest pause when all that is in flight belongs to writes that have failed: only a late drain is awaited."""


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


class _Flight:
    """A part that the engine holds, and since when."""

    __slots__ = ("begun", "given_up", "ticket", "write")

    def __init__(self, write: EngineWrite, ticket: Any) -> None:
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
        self._waiting: deque[EngineWrite] = deque()
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
            if reason is None:
                write = self.book.enter(tag, parts)
                self._waiting.append(write)
                if self.thread is None:
                    self.thread = threading.Thread(target=self._carry, name=self._name, daemon=True)
                    self.thread.start()
                self.changed.notify()
                return write.handle
        return self.book.add_ended(tag, reason)

    def retire(self, reason: str) -> None:
        """This peer's life is over: what waits or is half sent fails, what is in flight is watched until it lands."""
        with self.book.lock:
            if self.over is not None:
                return
            self.over = reason
            writes = [*self._waiting, *(flight.write for flight in self._flying)]
            self._waiting.clear()
            self.changed.notify()
            if self.thread is None:
                self.book.lanes.remove(self)
        self.book.fail_each(writes, reason)

    def drop(self, room: Any, reason: str) -> None:
        """Fail the writes of one incarnation that are not over yet."""
        with self.book.lock:
            held = [*self._waiting, *(flight.write for flight in self._flying)]
        self.book.fail_each([write for write in held if write.tag.incarnation == room], reason)

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
            live = any(flight.write.is_pending for flight in self._flying)
            age = time.monotonic() - max(flight.begun for flight in self._flying)
            self.changed.wait(max(PAUSE_MIN_S, min(PAUSE_MAX_S if live else PAUSE_LOST_S, age * PAUSE_SHARE)))

    def _begin_next(self) -> bool:
        """Give the engine the next part of the first write that has one, if it may hold one more."""
        with self.book.lock:
            # What a failed write left in flight must not keep the peer's later writes waiting.
            live = sum(1 for flight in self._flying if flight.write.is_pending)
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
                if not flight.write.is_pending and not flight.given_up:
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
