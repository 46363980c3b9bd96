"""Judges a cluster while it runs, from the traces that its processes write: what ``kvpoll up`` shows of violations.

It is early, not final. Events are judged a while after their time, when those of the other processes have come too; a
line that comes later is judged as it comes. The verdict in the end reads all of it again, in order.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from kvpoll.runtime.cluster.merge import Whole
from kvpoll.runtime.cluster.tail import Tail
from kvpoll.spec.invariants import Bounds, Watch
from kvpoll.spec.trace import Stream, Violated

LAG_S: Final = 1.0
"""How old events should be, in seconds of the wall."""


class LiveJudge:
    """The invariants' monitors on traces that grow. watch: what was found. late: how many lines came too late."""

    def __init__(self, bounds: Bounds) -> None:
        self.stream = Stream()
        self.watch = Watch(self.stream, bounds)
        self.late = 0
        self._whole = Whole()
        self._tails: dict[Path, Tail] = {}
        self._waiting: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._now = float("-inf")
        self._told = 0

    def look(self, paths: Iterable[Path], until: float) -> list[Violated]:
        """Read what is new, judge what happened before ``until``, and return what was found by that."""
        for path in paths:
            tail = self._tails.setdefault(path, Tail(path))
            for event in tail.news():
                self.late += event.t < self._now
                entry = (max(event.t, self._now), next(self._order), self._whole.numbered(path, event))
                heapq.heappush(self._waiting, entry)
        while self._waiting and self._waiting[0][0] < until:
            self._now, _, event = heapq.heappop(self._waiting)
            self.watch.advance(self._now)
            self.stream.emit(self._whole.right(event))
        self.watch.advance(until)
        found = self.watch.violations[self._told :]
        self._told = len(self.watch.violations)
        return found
