"""Judges a cluster while it runs: the traces of all its processes, merged by time, under every invariant.

    python -m kvpoll.soak_judge BOUNDS

Each process writes its trace into a named pipe, so nothing is kept on disk. Orders come as lines of JSON:
``{"watch": PIPE}`` before that process opens it, ``{"origin": [PIPE, S]}`` when it has said to which moment of the
monotonic clock its time counts from, ``{"close": PIPE}`` when it is over, ``{"event": LINE}`` for what only the
coordinator knows (admissions, faults, deaths; its times are the monotonic clock's), ``{"finish": true}``. It answers
every second and after ``finish`` with ``{"judged": N, "behind_s": S, "violated": [...], ...}``.

An event is judged ``LAG_S`` after its time, when whatever happened before it has arrived: a process that was stopped
between reading the clock and writing its line is the longest that a line can be late.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import selectors
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvpoll.soak_process import process_stats, say
from kvpoll.spec.invariants import Bounds, Watch
from kvpoll.spec.trace import (
    EVENTS,
    Addressed,
    Committed,
    Computed,
    Decided,
    Healed,
    HealthReported,
    NodeStarted,
    Requested,
    Resulted,
    Stalled,
    Stream,
    Surveyed,
    TraceError,
    WriteLanded,
    WritePosted,
    WriteSettled,
    decode,
)
from kvpoll.statemachine.ranks.host import engine_of

LAG_S: Final = 6.0
TOLD_S: Final = 1.0
READ_BYTES: Final = 1 << 18
PIPE_BYTES: Final = 1 << 20
WRITES_A_LIFE: Final = 10**9

NEEDS: Final[dict[str, type[Any]]] = {
    "S1": WritePosted, "S5": Committed, "S6": Addressed, "S7": Decided, "S9": Resulted, "S11": Computed, "L4": Healed,
    "L5": Surveyed, "L6": Stalled, "R1": Surveyed, "R3": Requested, "O1": Surveyed, "O2": HealthReported,
}  # fmt: skip
"""Events without which an invariant has nothing to judge. The others judge steps, and what must not be there at all."""


class Source:
    """One life of one process: its pipe, and what of it could not be read yet."""

    def __init__(self, path: str, number: int) -> None:
        # Opened for writing too, so that it does not end before its process has opened it.
        self.file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # a user may have few such pipes; a smaller one is fuller, not wrong
            fcntl.fcntl(self.file, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.number = number
        self.origin: float | None = None
        self.kept = bytearray()
        self.is_closed = False


class Due(NamedTuple):
    """An event that waits for its turn. order: of arrival, for equal times."""

    t: float
    order: int
    event: Any


class Judge:
    """The merged stream and the invariants' monitors on it."""

    def __init__(self, bounds: Bounds) -> None:
        self.stream = Stream()
        self.watch = Watch(self.stream, bounds)
        self.sources: dict[str, Source] = {}
        self.selector = selectors.DefaultSelector()
        self.judged = self.late = 0
        self._seen: set[type[Any]] = set()
        self._unheard = [f'"event":"{name}"'.encode() for name, cls in EVENTS.items() if not self.stream.wants(cls)]
        self._heap: list[Due] = []
        self._order = itertools.count()
        self._lives = itertools.count(1)
        self._engines: dict[str, int] = {}
        self._now = 0.0

    def open(self, path: str) -> None:
        """A process will write its trace here."""
        source = self.sources[path] = Source(path, next(self._lives))
        self.selector.register(source.file, selectors.EVENT_READ, source)

    def close(self, path: str) -> None:
        """Its process is over: read what is left. A line that was cut is no event."""
        source = self.sources.pop(path)
        while self.read(source):
            pass
        self.selector.unregister(source.file)
        os.close(source.file)
        source.is_closed = True
        Path(path).unlink(missing_ok=True)

    def read(self, source: Source) -> bool:
        """Take what is in its pipe. False when that is empty."""
        try:
            data = os.read(source.file, READ_BYTES)
        except BlockingIOError:
            return False
        source.kept += data
        if source.origin is not None:
            self.take(source)
        return True

    def take(self, source: Source) -> None:
        """Decode what has arrived whole."""
        *lines, rest = source.kept.split(b"\n")
        source.kept = bytearray(rest)
        assert source.origin is not None
        for line in lines:
            if line.startswith(b'{"kvpoll_trace"') or any(name in line[:80] for name in self._unheard):
                continue
            try:
                event = decode(line.decode())
            except TraceError:
                continue  # cut by SIGKILL
            self.add(_numbered(event, source))

    def add(self, event: Any) -> None:
        """An event of this time is to be judged."""
        self.late += event.t < self._now
        heapq.heappush(self._heap, Due(max(event.t, self._now), next(self._order), event))

    def advance(self, until_s: float) -> None:
        """Judge everything before this moment."""
        heap, watch, emit = self._heap, self.watch, self.stream.emit
        while heap and heap[0].t < until_s:
            t, _, event = heapq.heappop(heap)
            self._now = t
            if isinstance(event, NodeStarted):
                self._engines[engine_of(event.node)] = event.epoch
            elif isinstance(event, Addressed):
                event = event._replace(current_epoch=self._engines.get(engine_of(event.peer), event.current_epoch))
            watch.advance(t)
            self._seen.add(type(event))
            emit(event)
            self.judged += 1

    def report(self) -> dict[str, Any]:
        """What was found so far."""
        told = [f"{v.invariant} at {v.t:.3f} s, {v.node}, {v.pair}: {v.text}" for v in self.watch.violations[:20]]
        return {
            **process_stats(), "judged": self.judged, "late": self.late, "waiting": len(self._heap),
            "counts": self.watch.counts, "violated": told,
            "idle": sorted(name for name, event_type in NEEDS.items() if event_type not in self._seen),
        }  # fmt: skip

    def finish(self) -> None:
        """Judge what is left, and what is due by the last of it."""
        self.advance(float("inf"))
        self.watch.finish(self._now)


def _numbered(event: Any, source: Source) -> Any:
    """On the common clock, with write numbers that no other life uses."""
    event = event._replace(t=event.t + source.origin)
    if isinstance(event, WritePosted | WriteLanded | WriteSettled):
        return event._replace(write=event.write + source.number * WRITES_A_LIFE)
    return event


def obey(judge: Judge, order: dict[str, Any]) -> bool:
    """Do what the coordinator says. False at the end."""
    if "watch" in order:
        judge.open(order["watch"])
    elif "origin" in order:
        path, origin = order["origin"]
        source = judge.sources[path]
        source.origin = origin
        judge.take(source)
    elif "close" in order:
        judge.close(order["close"])
    elif "event" in order:
        judge.add(decode(order["event"]))
    return "finish" not in order


def main(bounds: str) -> None:
    """Judge until told to finish, or until the input ends."""
    judge = Judge(Bounds(*json.loads(bounds)))
    judge.selector.register(0, selectors.EVENT_READ)
    kept, told_s, goes_on = bytearray(), time.monotonic(), True
    while goes_on:
        for key, _ in judge.selector.select(0.1):
            if key.data is not None:
                if not key.data.is_closed:  # an order of this very turn may have closed it
                    judge.read(key.data)
                continue
            data = os.read(0, READ_BYTES)
            *lines, rest = (kept + data).split(b"\n")
            kept = bytearray(rest)
            goes_on = all(obey(judge, json.loads(line)) for line in lines) and bool(data)
        judge.advance(time.monotonic() - LAG_S)
        if time.monotonic() - told_s > TOLD_S:
            told_s = time.monotonic()
            say(**judge.report())
    judge.finish()
    say(**judge.report(), finished=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
