"""What must come true: the invariants with a time bound, judged without a clock.

A timed monitor's debts (``judges.py``) are what it would report if time went by and nothing else happened. A debt
that is open in every state of some fair behaviour from some point on is one that no bound saves: the invariant is
broken, and the behaviour is the counterexample. How much of the protocol a behaviour may leave out is what the bound
says: within seconds (L2, S6) no deadline may be waited for, so there they are taken away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvpoll.sim.explorer.liveness import FairGraph, Graph, Lasso, fair_check
from kvpoll.sim.explorer.search import Search, Taken

PROMPT: Final = ("L2", "S6")
"""Bounds of seconds: they must hold without any deadline passing, and without another fault."""


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


def broken_promises(search: Search) -> dict[str, Broken]:
    """Invariants with a time bound that some fair behaviour breaks. The search must have kept its whole graph."""
    explored = search.explored
    assert search.keep_graph and explored.complete, "liveness needs the whole graph"
    fair = FairGraph(graph_of(search))
    rows = np.concatenate(search.rows)
    found: dict[str, Broken] = {}
    for place, judge in enumerate(search.judges, len(search.system.cells)):
        if not judge.timed or judge.invariant in explored.found:
            continue
        shortest = _shortest(search, fair, rows[:, place], place, judge.invariant)
        if shortest is not None:
            found[judge.invariant] = shortest
    return found


def _shortest(search: Search, fair: FairGraph, column: Any, place: int, invariant: str) -> Broken | None:
    """The debt that can be left open for ever after the fewest moves."""
    values = search.values[place].values
    allowed = None
    if invariant in PROMPT:
        allowed = np.array([move.kind == "step" for move in search.system.moves], np.bool_)
    best: tuple[Lasso, str] | None = None
    for debt in sorted({debt for value in values for debt in value.debts}, key=repr):
        owing = np.array([debt in value.debts for value in values], np.bool_)[column]
        lasso = fair.leads_to(owing, ~owing, allowed)
        if lasso is not None and (best is None or len(lasso.prefix) < len(best[0].prefix)):
            fair_check(fair.graph, lasso, owing, ~owing, allowed)
            text = next(value.debts[debt].text for value in values if debt in value.debts)
            best = lasso, text
    if best is None:
        return None
    lasso, text = best
    return Broken(invariant, text, _taken(search, lasso.prefix), _taken(search, lasso.cycle))


def graph_of(search: Search) -> Graph:
    """Everything that the search has explored, as arrays."""
    empty = np.zeros(0, np.int32)
    columns = [np.concatenate([edge[k] for edge in search.edges]) if search.edges else empty for k in range(3)]
    classes = np.full(len(search.system.moves), -1, np.int16)
    for number, move in enumerate(search.system.moves):
        if move.fair:
            classes[number] = number
    return Graph(search.visited.count, np.zeros(1, np.int64), columns[0], columns[1], columns[2], classes)


def _taken(search: Search, steps: list[tuple[int, int, int]]) -> list[Taken]:
    """The outcomes behind the edges of a path."""
    rows = np.concatenate(search.rows)
    return [search.taken_between(rows[source], move, rows[target], target) for source, move, target in steps]
