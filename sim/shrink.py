"""Making a failure small: tier by tier, and in a tier reduction by reduction, until nothing smaller fails.

This file knows nothing of runs. `shrink` takes any value, tiers of reductions, and a question that says whether a
smaller value still fails; `drop` and `simplify` build reductions. `shrink_case` brings the tiers for simulated runs;
a counterexample of another kind brings its own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

C = TypeVar("C")
P = TypeVar("P")
Question = Callable[[C], bool]

DONE, BUDGET, INTERRUPTED = "done", "budget", "interrupted"
"""How a search ended: nothing smaller fails; its time was up; Ctrl-C. All leave the smallest failure so far."""


@dataclass(frozen=True)
class Reduction(Generic[C]):
    """One way to make a value smaller: from one that fails to another that does, or the same."""

    name: str
    reduce: Callable[[C, Question[C]], C]


@dataclass(frozen=True)
class Tier(Generic[C]):
    """Reductions that serve one aim. An earlier tier's aim comes first; no reduction may undo one."""

    name: str
    reductions: tuple[Reduction[C], ...]


@dataclass(frozen=True)
class Shrunk(Generic[C]):
    """What came of it. tried: how many values were put to the question; crashed: how many of them made it raise."""

    case: C
    tried: int
    crashed: int
    ended: str


Progress = Callable[[str, int, Any], None]
"""Called with (what is being tried, how many values have been, the smallest failure so far)."""


def shrink(
    candidate: C,
    tiers: Sequence[Tier[C]],
    still_fails: Question[C],
    progress: Progress = lambda what, tried, case: None,
    budget_s: float | None = None,
) -> Shrunk[C]:
    """Reduce ``candidate``, which must fail, tier by tier, again and again until no tier changes anything.

    ``still_fails`` may raise KeyboardInterrupt; the search then ends with the best so far. A value that makes it
    raise anything else counts as one that does not fail in the same way. Values must have a telling repr, by which
    none is tried twice.
    """
    search = _Search(candidate, still_fails, progress, budget_s)
    ended = DONE
    try:
        while search.improves(tiers):
            pass
    except _OutOfTime:
        ended = BUDGET
    except KeyboardInterrupt:
        ended = INTERRUPTED
    return Shrunk(search.best, search.tried, search.crashed, ended)


class _OutOfTime(Exception):
    """The budget is spent."""


class _Search(Generic[C]):
    """One search: the best so far, what was refused, how long it may take."""

    def __init__(self, candidate: C, still_fails: Question[C], progress: Progress, budget_s: float | None) -> None:
        self.best = candidate
        self.tried = 0
        self.crashed = 0
        self._still_fails = still_fails
        self._progress = progress
        self._until = None if budget_s is None else time.monotonic() + budget_s
        self._refused: set[bytes] = set()
        self._what = ""

    def improves(self, tiers: Sequence[Tier[C]]) -> bool:
        """One round through all tiers; did it change anything?"""
        before = _key(self.best)
        for tier in tiers:
            for reduction in tier.reductions:
                self._what = f"{tier.name}: {reduction.name}"
                reduction.reduce(self.best, self._ask)
        return _key(self.best) != before

    def _ask(self, case: C) -> bool:
        key = _key(case)
        if key in self._refused:
            return False
        if self._until is not None and time.monotonic() > self._until:
            raise _OutOfTime
        self._progress(self._what, self.tried, self.best)
        self.tried += 1
        try:
            fails = self._still_fails(case)
        except Exception:
            self.crashed += 1
            fails = False
        if fails:
            self.best = case
        else:
            self._refused.add(key)
        return fails


def _key(case: Any) -> bytes:
    return hashlib.sha256(repr(case).encode()).digest()


# ------------------------------------------------------------------------------------------ kinds of reduction


def drop(name: str, take: Callable[[C], Sequence[P]], put: Callable[[C, tuple[P, ...]], C]) -> Reduction[C]:
    """Keep as few parts as possible (``take`` and ``put`` say where they stand in a value)."""

    def reduce(case: C, fails: Question[C]) -> C:
        parts = tuple(take(case))
        return put(case, fewest(parts, lambda kept: fails(put(case, kept)))) if parts else case

    return Reduction(name, reduce)


def simplify(name: str, simpler: Callable[[C], Iterable[C]]) -> Reduction[C]:
    """Take the first of the ``simpler`` values that still fails, and go on from there until none does.

    Every value must be simpler than the one that it comes from in some sense that has an end.
    """

    def reduce(case: C, fails: Question[C]) -> C:
        while True:
            found = next((each for each in simpler(case) if each != case and fails(each)), None)
            if found is None:
                return case
            case = found

    return Reduction(name, reduce)


def fewest(parts: tuple[P, ...], fails: Question[tuple[P, ...]]) -> tuple[P, ...]:
    """A smallest failing selection in the sense of delta debugging (Zeller, Hildebrandt, TSE 2002): ddmin.

    Without any one of its parts it does not fail any more. All ``parts`` together must fail.
    """
    if not parts or fails(()):
        return ()
    pieces = 2
    while len(parts) > 1:
        chunks = _split(parts, pieces)
        smaller = next((chunk for chunk in chunks if fails(chunk)), None)
        if smaller is not None:
            parts, pieces = smaller, 2
            continue
        rests = (_without(chunks, place) for place in range(len(chunks)) if pieces > 2)
        smaller = next((rest for rest in rests if fails(rest)), None)
        if smaller is not None:
            parts, pieces = smaller, max(pieces - 1, 2)
        elif pieces < len(parts):
            pieces = min(2 * pieces, len(parts))
        else:
            break
    return parts


def _split(parts: tuple[P, ...], pieces: int) -> list[tuple[P, ...]]:
    edges = [len(parts) * number // pieces for number in range(pieces + 1)]
    return [parts[start:end] for start, end in pairwise(edges)]


def _without(chunks: Sequence[tuple[P, ...]], place: int) -> tuple[P, ...]:
    return tuple(part for number, chunk in enumerate(chunks) if number != place for part in chunk)
