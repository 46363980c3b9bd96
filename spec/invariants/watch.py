"""Watching: the monitors at work on a stream of events, or on a whole trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

from kvpoll.spec.invariants.catalogue import INVARIANTS, Invariant
from kvpoll.spec.invariants.monitor import Bounds, Monitor, TimedMonitor
from kvpoll.spec.source import BadInput, nearest
from kvpoll.spec.trace import Pair, Stream, Violated

RECORDED: Final = 1_000
"""How many violations of one invariant a Watch keeps; it counts the rest."""


class InvariantError(BadInput):
    """An invariant was asked for that does not exist; the message names the nearest one that does."""


class Watch:
    """Monitors at work on a stream.

    violations: in the order in which they were found, the first one of each (invariant, pair, node) and at
    most ``RECORDED`` of an invariant; these are also emitted on the stream when somebody listens. counts: all
    of them, by invariant. first: the first of each invariant.

    Whoever emits events calls ``advance(t)`` before those of time t, and ``finish(t)`` at the end; then
    recorded violations are in order of time, even those found at a deadline.
    """

    def __init__(self, stream: Stream, bounds: Bounds, only: Iterable[str] | None = None) -> None:
        """Subscribe the monitors of all invariants, or of ``only``. Raises InvariantError for a wrong id."""
        self.violations: list[Violated] = []
        self.counts: dict[str, int] = {}
        self.first: dict[str, Violated] = {}
        self.monitors: dict[str, Monitor] = {}
        self._timed: list[Monitor] = []
        self._stream = stream
        self.due = math.inf
        self._known: dict[str, set[tuple[Pair | None, str]]] = {}
        self._held: list[Violated] | None = None
        for invariant in _chosen(only):
            if invariant.monitor is not None:
                self._place(invariant.id, invariant.monitor(bounds, self._take, self._wake))

    def _place(self, invariant_id: str, monitor: Monitor) -> None:
        self.monitors[invariant_id] = monitor
        if isinstance(monitor, TimedMonitor):
            self._timed.append(monitor)
        for event_type, name in monitor.handles.items():
            self._stream.subscribe(event_type, getattr(monitor, name))

    def _wake(self, due: float) -> None:
        if due < self.due:
            self.due = due

    def advance(self, t: float) -> None:
        """Time has come to ``t`` (seconds): judge each bound that it has passed. Cheap when there is none."""
        if t > self.due:
            self._in_order(t, [monitor.advance for monitor in self._timed if monitor.due < t])

    def finish(self, t: float) -> None:
        """The trace is over at ``t``: judge what was due by then. What was due later is not judged."""
        self._in_order(t, [monitor.finish for monitor in self._timed])

    def _in_order(self, t: float, judges: list[Callable[[float], None]]) -> None:
        """Several monitors may find old debts at once: record them as they fell due."""
        self._held = []
        for judge_until in judges:
            judge_until(t)
        held, self._held = self._held, None
        self.due = min([monitor.due for monitor in self._timed], default=math.inf)
        for violated in sorted(held, key=lambda violated: violated.t):
            self._take(violated)

    def _take(self, violated: Violated) -> None:
        if self._held is not None:
            self._held.append(violated)
            return
        invariant = violated.invariant
        self.counts[invariant] = self.counts.get(invariant, 0) + 1
        self.first.setdefault(invariant, violated)
        known = self._known.setdefault(invariant, set())
        key = (violated.pair, violated.node)
        if key in known or len(known) >= RECORDED:
            return
        known.add(key)
        self.violations.append(violated)
        if self._stream.wants(Violated):
            self._stream.emit(violated)


def _chosen(only: Iterable[str] | None) -> list[Invariant]:
    if only is None:
        return list(INVARIANTS.values())
    wanted = set(only)
    for name in sorted(wanted - INVARIANTS.keys()):
        raise InvariantError(f"{name!r} is not an invariant{nearest(name.upper(), INVARIANTS)}")
    return [invariant for invariant in INVARIANTS.values() if invariant.id in wanted]


def judge(events: Iterable[Any], bounds: Bounds, only: Iterable[str] | None = None) -> Watch:
    """Watch a whole trace, its events in order of time. Returns the finished Watch."""
    stream = Stream()
    watch = Watch(stream, bounds, only)
    t = 0.0
    for event in events:
        t = event.t
        watch.advance(t)
        stream.emit(event)
    watch.finish(t)
    return watch
