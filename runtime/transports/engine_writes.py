"""The writes that an engine carries in parts, and the watch over their deadlines.

An engine's own account of a write is not enough: ``rc != 0``, an exception, a time-out and a cancel all mean "failed,
and bytes may still land" (ENGINES 4). So a write is held by each part that the engine was given and has not finished.
A part that the engine broke off holds its write for ever.

Deadlines are ours, on the monotonic clock: engines have floors (5 s), defaults (30 s) or none at all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from kvpoll.runtime.transports.interface import DONE, Progress, Tag, Wake
from kvpoll.runtime.transports.posted import PostedWrites, Write

if TYPE_CHECKING:
    from kvpoll.runtime.transports.engine_lane import Lane

CLOSING_S: Final = 1.0
"""How long ``close`` waits for threads that an engine may be holding; they are daemons, and stay behind if need be."""


class EngineWrite(Write):
    """A write that goes to an engine in parts. ``due_s``: when it fails, on the monotonic clock."""

    __slots__ = ("begun_all", "due_s", "parts")

    def __init__(self, tag: Tag, parts: Iterable[Any], due_s: float) -> None:
        super().__init__(tag)
        self.parts = iter(parts)
        self.due_s = due_s
        self.begun_all = False


class WriteBook(PostedWrites):
    """All writes of one transport over an engine, and the lanes that carry them."""

    def __init__(self, name: str, wake: Wake, deadline_s: float) -> None:
        super().__init__(wake)
        self.name = name
        self.deadline_s = deadline_s
        self.lanes: list[Lane] = []
        self.closed = False
        self._due: deque[EngineWrite] = deque()
        self._overdue = threading.Condition(self.lock)
        self._watch: threading.Thread | None = None
        self._unsettled = 0

    @property
    def unsettled(self) -> int:
        """Parts that the engine was given and has not finished, those that it broke off included."""
        with self.lock:
            return self._unsettled

    def enter(self, tag: Tag, parts: Iterable[Any]) -> EngineWrite:
        """A new write that is pending. Its deadline runs from now."""
        write = EngineWrite(tag, parts, time.monotonic() + self.deadline_s)
        with self.lock:
            self.add(write)
            self._due.append(write)
            if self._watch is None and not self.closed:
                self._watch = threading.Thread(target=self._watching, name=f"{self.name}-deadlines", daemon=True)
                self._watch.start()
            self._overdue.notify()
        return write

    def take_part(self, write: EngineWrite) -> Any:
        """The next part, counted as begun, or None when none may be begun any more."""
        with self.lock:
            if not write.is_pending or write.begun_all:
                return None
            part = next(write.parts, None)
            if part is None:
                write.begun_all = True
                return None
            write.holds += 1
            self._unsettled += 1
            return part

    def part_over(self, write: EngineWrite, failure: str | None, unsure: bool) -> None:
        """A part that was begun has landed (no failure), was refused, or is lost to the engine (``unsure``)."""
        with self.lock:
            if not unsure:
                write.holds -= 1
                self._unsettled -= 1
            changed = self._settled(write, failure)
        if changed:
            self.tell()

    def all_begun(self, write: EngineWrite) -> None:
        """Its last part was given to the engine; it may already have landed."""
        with self.lock:
            changed = self._settled(write, None)
        if changed:
            self.tell()

    def _settled(self, write: EngineWrite, failure: str | None) -> bool:
        """Whether what is known of its parts has changed how the write stands."""
        if failure is not None:
            return self._changed(write, Progress("failed", write.holds == 0, failure))
        if not write.is_pending or (write.begun_all and write.holds == 0):
            return self._changed(write, DONE)
        return False

    def close(self) -> None:
        """Fail what is pending and end the threads. Returns after ``CLOSING_S`` at most."""
        until = time.monotonic() + CLOSING_S
        with self.lock:
            self.closed = True
            self._overdue.notify()
            lanes = list(self.lanes)
            for lane in lanes:
                lane.changed.notify()
        self.fail_all("the transport is closed")
        for thread in [self._watch, *(lane.thread for lane in lanes)]:
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _watching(self) -> None:
        while True:
            with self.lock:
                if self.closed:
                    return
                while self._due and not self._due[0].is_pending:
                    self._due.popleft()
                left = self._due[0].due_s - time.monotonic() if self._due else None
                if left is None or left > 0:
                    self._overdue.wait(left)
                    continue
                write = self._due.popleft()
            self.fail(write, f"not placed after {self.deadline_s:g} s")
