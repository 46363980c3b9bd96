"""What must come true: the invariants with a time bound, judged without a clock.

A timed monitor's debts (``judges.py``) are what it would report if time went by and nothing else happened. A debt
that is open in every state of some fair behaviour from some point on is one that no bound saves: the invariant is
broken, and the behaviour is the counterexample. How much of the protocol a behaviour may leave out is what the bound
says: within seconds (L2, S6) no deadline may be waited for, so there they are taken away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvpoll.sim.explorer.liveness import FairGraph, Graph, Lasso, fair_check
from kvpoll.sim.explorer.search import Search, Taken
from kvpoll.spec.trace import Surveyed

PROMPT: Final = ("L2", "S6")
"""Bounds of seconds: they must hold without any deadline passing, and without another fault."""


RECOVER: Final = "L4"
HEAL: Final = "the faults are over"
"""What models call the move after which no fault comes and every restart is done."""


@dataclass(frozen=True)
class Broken:
    """A promise that is not kept: the path to where it is given up for ever, and what then repeats (or nothing)."""

    invariant: str
    text: str
    prefix: list[Taken]
    cycle: list[Taken]

    @property
    def depth(self) -> int:
        """Moves until nothing can save it."""
        return len(self.prefix)


class Promise(NamedTuple):
    """Something that must not stay open for ever: where it is open, and what to say if it does."""

    invariant: str
    owing: npt.NDArray[np.bool_]
    text: str


def broken_promises(search: Search, only: tuple[str, ...] | None = None) -> dict[str, Broken]:
    """Invariants that some fair behaviour breaks for ever. The search must have kept its whole graph."""
    explored = search.explored
    assert search.keep_graph and explored.complete, "liveness needs the whole graph"
    fair = FairGraph(graph_of(search))
    rows = np.concatenate(search.rows)
    found: dict[str, Broken] = {}
    for promise in (*_debts(search, rows), *_recovery(search, rows), *_holdings(search, rows)):
        if promise.invariant in explored.found or (only is not None and promise.invariant not in only):
            continue
        broken = _break(search, fair, rows, promise)
        if broken is not None and (promise.invariant not in found or broken.depth < found[promise.invariant].depth):
            found[promise.invariant] = broken
    return found


def _debts(search: Search, rows: Any) -> Iterator[Promise]:
    """What the timed monitors would report if time went by."""
    for place, judge in enumerate(search.judges, len(search.system.cells)):
        values = search.values[place].values
        for debt in sorted({debt for value in values for debt in value.debts}, key=repr):
            texts = [value.debts[debt].text if debt in value.debts else None for value in values]
            owing = np.array([text is not None for text in texts], np.bool_)[rows[:, place]]
            yield Promise(judge.invariant, owing, next(text for text in texts if text is not None))


def _recovery(search: Search, rows: Any) -> Iterator[Promise]:
    """L4 judges only what comes after the heal; so the heal must come."""
    if RECOVER not in search.places or not any(move.name == HEAL for move in search.system.moves):
        return
    place = search.places[RECOVER]
    healed = np.array([value.thaw()["_healed"] for value in search.values[place].values], np.bool_)
    yield Promise(RECOVER, ~healed[rows[:, place]], "the faults have stopped, but the restarts are never done")


def _holdings(search: Search, rows: Any) -> Iterator[Promise]:
    """R1 is judged on idle nodes; a node that is never idle and never empty is worse."""
    for place, cell in enumerate(search.system.cells):
        held = [_held(search, cell.name, value) for value in search.values[place].values]
        if any(held):
            text = f"{cell.name} never comes to rest, and holds something for ever"
            yield Promise("R1", np.array([bool(each) for each in held], np.bool_)[rows[:, place]], text)


def _held(search: Search, cell: str, value: Any) -> int:
    """Entries in the tables of a node, as a survey would find them."""
    return sum(
        entries
        for event in search.system.survey(cell, value)
        if isinstance(event, Surveyed)
        for _, entries in event.tables
    )


def _break(search: Search, fair: FairGraph, rows: Any, promise: Promise) -> Broken | None:
    allowed = None
    if promise.invariant in PROMPT:
        allowed = np.array([move.kind == "step" for move in search.system.moves], np.bool_)
    lasso = fair.leads_to(promise.owing, ~promise.owing, allowed)
    if lasso is None:
        return None
    fair_check(fair.graph, lasso, promise.owing, ~promise.owing, allowed)
    steps = (_taken(search, rows, lasso.prefix), _taken(search, rows, lasso.cycle))
    text = promise.text
    if promise.invariant in search.places:
        debts = search.values[search.places[promise.invariant]].values[_end(lasso, rows, search, promise)].debts
        text = next((violated.text for violated in debts.values() if violated.text), text) if debts else text
    return Broken(promise.invariant, text, *steps)


def _end(lasso: Lasso, rows: Any, search: Search, promise: Promise) -> int:
    """The judge's value in the state where the behaviour's end begins."""
    return int(rows[lasso.knot, search.places[promise.invariant]])


def graph_of(search: Search) -> Graph:
    """Everything that the search has explored, as arrays."""
    empty = np.zeros(0, np.int32)
    columns = [np.concatenate([edge[k] for edge in search.edges]) if search.edges else empty for k in range(3)]
    classes = np.full(len(search.system.moves), -1, np.int16)
    for number, move in enumerate(search.system.moves):
        if move.fair:
            classes[number] = number
    return Graph(search.visited.count, np.zeros(1, np.int64), columns[0], columns[1], columns[2], classes)


def _taken(search: Search, rows: Any, steps: list[tuple[int, int, int]]) -> list[Taken]:
    """The outcomes behind the edges of a path."""
    return [search.taken_between(rows[source], move, rows[target], target) for source, move, target in steps]
