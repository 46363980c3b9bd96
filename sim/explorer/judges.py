"""The invariants of ``spec/`` as cells of the global state: the same monitors, judging every interleaving.

A monitor folds events into a state of its own, so it is one more local state machine: its cell holds what it has
seen, an operation on the cell is one event. What a monitor makes of an event in a given state is computed once and
remembered, like every other local step.

Explored time counts process deaths and nothing else (a death of what began before it excuses it, one of what began
after it does not). A monitor with a time bound therefore never finds a deadline passed. What it would report if time
went by for ever without another event are its *debts*; a behaviour that stays for ever in states with the same debt
breaks the invariant (``properties.py``).
"""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from typing import Any, Final

from kvpoll.sim.explorer.system import Cell, Rename, text_of
from kvpoll.spec.invariants import INVARIANTS, Bounds, Monitor, TimedMonitor
from kvpoll.spec.trace import Violated

NOT_JUDGED: Final = {
    "R3": "a rate needs a clock",
    "L5": "overdue timers need a clock",
    "L7": "which of two timers is longer needs a clock",
}
"""Invariants that an exploration without a clock cannot judge; the simulator does."""

_OWN: Final = ("bounds", "_report", "_wake", "due")


class Judged:
    """What one monitor has seen. Equal if its canonical text is equal.

    violated: what it reported, if it has; then it looks no further. debts: (pair, node) -> the text of what it
    would report if nothing more happened.
    """

    __slots__ = ("_frozen", "_hash", "debts", "key", "violated")

    def __init__(self, state: dict[str, Any], violated: Violated | None, debts: dict[Any, Violated]) -> None:
        self.violated = violated
        self.debts = debts
        self.key = "violated" if violated is not None else text_of(state)
        self._hash = hash(self.key)
        self._frozen = pickle.dumps(state, pickle.HIGHEST_PROTOCOL)

    def thaw(self) -> dict[str, Any]:
        """The monitor's state, to be changed at will."""
        state: dict[str, Any] = pickle.loads(self._frozen)
        return state

    def text_of(self, rename: Rename | None) -> str:
        """Canonical text, with names traded if asked."""
        if rename is None or self.violated is not None:
            return self.key
        return text_of(self.thaw(), rename)

    def __reduce__(self) -> Any:
        return _restored, (self._frozen, self.violated, self.debts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Judged) and self.key == other.key

    def __hash__(self) -> int:
        return self._hash


def _restored(frozen: bytes, violated: Violated | None, debts: dict[Any, Violated]) -> Judged:
    return Judged(pickle.loads(frozen), violated, debts)


class Judge:
    """One invariant's monitor, run on remembered states instead of on one stream."""

    def __init__(self, invariant: str, bounds: Bounds) -> None:
        monitor = INVARIANTS[invariant].monitor
        assert monitor is not None
        self.invariant = invariant
        self.handles = monitor.handles
        self.timed = issubclass(monitor, TimedMonitor)
        self._class: type[Monitor] = monitor
        self._bounds = bounds
        self._memo: dict[tuple[str, Any], Judged] = {}

    def start(self) -> Judged:
        """Before anything has happened."""
        return self._judged(self._class(self._bounds, _ignore, _ignore), [])

    def apply(self, seen: Judged, event: Any) -> Judged:
        """What the monitor knows after one more event."""
        if seen.violated is not None:
            return seen
        try:
            return self._memo[seen.key, event]
        except (KeyError, TypeError):
            found: list[Violated] = []
            monitor = self._revive(seen.thaw(), found)
            getattr(monitor, self.handles[type(event)])(event)
            after = self._judged(monitor, found)
            key = (seen.key, event)
            if _is_hashable(key):
                self._memo[key] = after
            return after

    def _revive(self, state: dict[str, Any], found: list[Violated]) -> Monitor:
        monitor = self._class.__new__(self._class)
        monitor.__dict__.update(state)
        monitor.bounds = self._bounds
        monitor._report = found.append
        monitor._wake = _ignore
        return monitor

    def _judged(self, monitor: Monitor, found: list[Violated]) -> Judged:
        debts = self._debts(monitor) if isinstance(monitor, TimedMonitor) else {}
        state = {name: value for name, value in monitor.__dict__.items() if name not in _OWN}
        _prune(state)
        return Judged(state, found[0] if found else None, debts)

    def _debts(self, monitor: TimedMonitor) -> dict[Any, Violated]:
        """What would be reported if time passed every deadline now. Settled deadlines are dropped."""
        debts: dict[Any, Violated] = {}
        kept = []
        for place, deadline in enumerate(monitor._deadlines):
            found: list[Violated] = []
            trial = self._revive(copy.deepcopy({k: v for k, v in monitor.__dict__.items() if k not in _OWN}), found)
            assert isinstance(trial, TimedMonitor)
            trial.lapse(*trial._deadlines[place])
            if found:
                kept.append(deadline)
                debts |= {(violated.pair, violated.node): violated for violated in found}
        monitor._deadlines.clear()
        for deadline in kept:
            if deadline not in monitor._deadlines:
                monitor._deadlines.append(deadline)
        return debts


def _prune(state: dict[str, Any]) -> None:
    """An empty entry of a defaultdict means the same as none."""
    for value in state.values():
        if isinstance(value, defaultdict):
            for key in [key for key, each in value.items() if isinstance(each, dict | set | list) and not each]:
                del value[key]


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _ignore(anything: Any) -> None:
    """Nobody listens."""


def judges(bounds: Bounds, only: tuple[str, ...] | None = None) -> list[Judge]:
    """A judge for every invariant that can be judged without a clock, or for those named."""
    return [
        Judge(name, bounds)
        for name, invariant in INVARIANTS.items()
        if invariant.monitor is not None and name not in NOT_JUDGED and (only is None or name in only)
    ]


def cell_of(judge: Judge, start: tuple[Any, ...]) -> Cell:
    """The judge as a cell of the global state, having seen how the model starts."""
    seen = judge.start()
    for event in start:
        if type(event) in judge.handles:
            seen = judge.apply(seen, event)
    return Cell(judge.invariant, seen, judge.apply)
