"""Does everything promised come true? Liveness under weak fairness, on a graph that was explored completely.

The question is TLA+'s: is there a behaviour that starts in an initial state, comes to a state where the premise
holds, never reaches the goal, and is fair? Fair means, for every fairness class: again and again a step of the class is
taken, or again and again the class is disabled. Nothing obliges a behaviour to move at all: where every class is
disabled it may stutter for ever, and that is how a deadlock breaks a promise.

The states that such a behaviour visits for ever lie in one strongly connected component of the states that are not
goals. Fairness only gets easier with more states and more edges, so each whole component is judged, not its parts:
it holds a fair behaviour if every class is disabled in one of its states or has an edge that stays inside.

All of it works on numpy arrays, a level or a column at a time; no loop of Python runs over states or edges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix  # type: ignore[import-untyped, unused-ignore]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped, unused-ignore]

Ints = npt.NDArray[np.signedinteger]
Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
Step = tuple[int, int, int]
"""State before, number of the move, state after."""

WORD_BITS: Final = 64


class Graph(NamedTuple):
    """Everything that was explored. Edges are real steps: a move that changes nothing is no edge."""

    states: int
    initial: Ints
    source: Ints
    target: Ints
    move: Ints
    fair_class: Ints
    """For each move the class whose weak fairness it serves; -1 for a move that nothing obliges, such as a fault."""


class Lasso(NamedTuple):
    """A behaviour that breaks a promise: ``prefix`` once, then ``cycle`` for ever.

    An empty cycle stutters: the last state of the prefix has no move left that anything obliges.
    """

    prefix: list[Step]
    cycle: list[Step]
    start: int
    """The initial state. An empty prefix could not say which one it is."""
    since: int
    """Steps of the prefix before the premise holds; from there on the goal is never reached."""

    @property
    def knot(self) -> int:
        """The state where the prefix ends and the cycle, if there is one, begins and ends."""
        return self.prefix[-1][2] if self.prefix else self.start


class Tree(NamedTuple):
    """Shortest ways to states. ``depth`` is -1 where there is none; ``edge`` is the last edge, -1 at a root."""

    depth: Ints
    edge: Ints


class Region(NamedTuple):
    """The states where a behaviour that breaks the promise can be, with the edges it may take, and its components."""

    members: Ints
    bounds: Ints
    """Edges of ``members[i]`` lie in ``edges`` from ``bounds[i]`` up to ``bounds[i + 1]``."""
    edges: Ints
    targets: Ints
    """For each of ``edges`` where it leads, as a position in ``members``."""
    labels: Ints
    """For each of ``members`` the number of its strongly connected component."""


class FairGraph:
    """A graph made ready for many properties: edges sorted, enabled classes and shortest ways from the start known."""

    def __init__(self, graph: Graph) -> None:
        source, target, move = (np.asarray(column) for column in (graph.source, graph.target, graph.move))
        if bool((source == target).any()):
            raise ValueError("an edge leads back to its own state; such moves change nothing and must be left out")
        if bool((source[1:] < source[:-1]).any()):
            order = np.argsort(source, kind="stable")
            source, target, move = source[order], target[order], move[order]
        self.graph = graph._replace(source=source, target=target, move=move)
        self.bounds = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=graph.states))])
        self.classes = int(graph.fair_class.max(initial=-1)) + 1
        self.enabled = _classes_by_row(move, self.bounds, self._bits)

    @cached_property
    def _bits(self) -> Words:
        """For each word and move the bit of the move's class; no bit where it has none."""
        bits = np.zeros((self.classes // WORD_BITS + 1, len(self.graph.fair_class)), np.uint64)
        moves = np.flatnonzero(self.graph.fair_class >= 0)
        number = self.graph.fair_class[moves].astype(np.uint64)
        bits[number // WORD_BITS, moves] = np.uint64(1) << (number % WORD_BITS)
        return bits

    @cached_property
    def from_start(self) -> Tree:
        """Shortest ways from the initial states, through everything that was explored."""
        roots = np.unique(self.graph.initial)
        everywhere = np.ones(self.graph.states, np.bool_)
        return self._tree(roots, np.zeros(len(roots), np.int64), everywhere, self._moves_of(None))

    def leads_to(self, premise: Flags, goal: Flags, allowed: Flags | None = None) -> Lasso | None:
        """The shortest found fair behaviour in which the premise once holds and the goal is not reached then or later.

        ``allowed`` says which moves the behaviour may still take once the premise holds. A class that has a move
        which is not allowed obliges nothing, not even its other moves: who forbids a deadline does not want to hear
        that waiting is unfair.
        """
        moves = self._moves_of(allowed)
        outside = ~np.asarray(goal)
        opened = np.flatnonzero((self.from_start.depth >= 0) & premise & outside)
        tree = self._tree(opened, self.from_start.depth[opened], outside, moves)
        region = self._region(tree, moves)
        obliged = self._obliged(allowed)
        fair = self._fair_components(region, obliged)[region.labels]
        if not fair.any():
            return None
        candidates = region.members[fair]
        knot = int(candidates[np.argmin(tree.depth[candidates])])
        component = region.labels[np.searchsorted(region.members, knot)]
        inside = np.zeros(self.graph.states, np.bool_)
        inside[region.members[region.labels == component]] = True
        return self._lasso(knot, tree, _Loop(self, inside, moves).around(knot, obliged))

    def _moves_of(self, allowed: Flags | None) -> Flags:
        return np.ones(len(self.graph.fair_class), np.bool_) if allowed is None else np.asarray(allowed)

    def _obliged(self, allowed: Flags | None) -> Flags:
        """Which classes oblige. The place after the last stands for -1, the moves without a class."""
        obliged = np.ones(self.classes + 1, np.bool_)
        obliged[self.graph.fair_class[~self._moves_of(allowed)]] = False
        obliged[-1] = False
        return obliged

    def edges_of(self, states: Ints) -> tuple[Ints, Ints]:
        """All edges out of these states, in their order, and where those of each begin (and the last end)."""
        first = self.bounds[states]
        count = self.bounds[states + 1] - first
        bounds = np.concatenate([[0], np.cumsum(count)])
        return np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], count), bounds

    def _tree(self, roots: Ints, ready: Ints, inside: Flags, moves: Flags) -> Tree:
        """Shortest ways from roots that may be used only from a certain depth on, inside these states.

        A premise state joins at its distance from the start, so the depths found are lengths of whole prefixes.
        """
        tree = Tree(np.full(self.graph.states, -1, np.int32), np.full(self.graph.states, -1, np.int64))
        order = np.argsort(ready, kind="stable")
        roots, ready = roots[order], ready[order]
        frontier, used, level = roots[:0], 0, 0
        while frontier.size or used < len(roots):
            level = level if frontier.size else int(ready[used])
            until = int(np.searchsorted(ready, level, side="right"))
            joined = roots[used:until]
            joined, used = joined[tree.depth[joined] < 0], until
            tree.depth[joined] = level
            edges, _ = self.edges_of(np.concatenate([frontier, joined]))
            target = self.graph.target[edges]
            new = inside[target] & moves[self.graph.move[edges]] & (tree.depth[target] < 0)
            frontier = _claim(tree.edge, edges[new], target[new])
            level += 1
            tree.depth[frontier] = level
        return tree

    def _region(self, tree: Tree, moves: Flags) -> Region:
        """The part of the graph that a tree reached; its edges to the outside are the ones that end in a goal."""
        members = np.flatnonzero(tree.depth >= 0)
        place = np.full(self.graph.states, -1, np.int32)
        place[members] = np.arange(len(members), dtype=np.int32)
        edges, bounds = self.edges_of(members)
        kept = moves[self.graph.move[edges]] & (place[self.graph.target[edges]] >= 0)
        bounds = np.concatenate([[0], np.cumsum(kept)])[bounds]
        edges = edges[kept]
        targets = place[self.graph.target[edges]]
        return Region(members, bounds, edges, targets, _components(bounds, targets))

    def _fair_components(self, region: Region, obliged: Flags) -> Flags:
        """For each component whether every class that obliges is disabled somewhere in it or has an edge inside."""
        if not region.members.size:
            return np.zeros(0, np.bool_)
        stays = region.labels[region.targets] == np.repeat(region.labels, np.diff(region.bounds))
        bounds = np.concatenate([[0], np.cumsum(stays)])[region.bounds]
        taken = _classes_by_row(self.graph.move[region.edges[stays]], bounds, self._bits)
        order = np.argsort(region.labels, kind="stable")
        first = np.concatenate([[0], np.cumsum(np.bincount(region.labels))[:-1]])
        fair = np.ones(len(first), np.bool_)
        for word, wanted in enumerate(_words(obliged)):
            always = np.bitwise_and.reduceat(self.enabled[word, region.members[order]], first)
            sometimes = np.bitwise_or.reduceat(taken[word, order], first)
            fair &= (always & ~sometimes & wanted) == 0
        return fair

    def _lasso(self, knot: int, tree: Tree, cycle: list[int]) -> Lasso:
        """The shortest way to the knot, over the state where the premise holds, and the cycle there."""
        after = self.way_back(knot, tree.edge)
        opened = int(self.graph.source[after[0]]) if after else knot
        before = self.way_back(opened, self.from_start.edge)
        prefix = self.steps(before + after)
        return Lasso(prefix, self.steps(cycle), prefix[0][0] if prefix else knot, len(before))

    def way_back(self, state: int, last: Ints) -> list[int]:
        """The edges that lead from a root to a state, by the last edge to each."""
        way: list[int] = []
        while (edge := int(last[state])) >= 0:
            way.append(edge)
            state = int(self.graph.source[edge])
        return way[::-1]

    def steps(self, edges: list[int]) -> list[Step]:
        """Edges as a reader wants them."""
        source, target, move = self.graph.source, self.graph.target, self.graph.move
        return [(int(source[edge]), int(move[edge]), int(target[edge])) for edge in edges]


class _Loop:
    """A short fair cycle through one component: each time to the nearest place that settles a class, then home."""

    def __init__(self, ready: FairGraph, inside: Flags, moves: Flags) -> None:
        self.ready = ready
        self.inside = inside
        self.moves = moves

    def around(self, knot: int, obliged: Flags) -> list[int]:
        """The edges of the cycle; none if at the knot itself every class that obliges is disabled."""
        graph = self.ready.graph
        pending = obliged.copy()
        pending[:-1] &= ~self._disabled(knot)
        cycle: list[int] = []
        here = knot
        while pending.any():
            part = self._nearest(here, self._settling(pending))
            for edge in part:
                here = int(graph.target[edge])
                pending[graph.fair_class[graph.move[edge]]] = False
                pending[:-1] &= ~self._disabled(here)
            cycle += part
        return cycle if here == knot else cycle + self._nearest(here, lambda edges: graph.target[edges] == knot)

    def _disabled(self, state: int) -> Flags:
        """Which classes a state has disabled, one flag for each."""
        numbers = np.arange(self.ready.classes, dtype=np.uint64)
        words = self.ready.enabled[numbers // WORD_BITS, state]
        return np.asarray((words >> (numbers % WORD_BITS)) & np.uint64(1) == 0)

    def _settling(self, pending: Flags) -> Callable[[Ints], Flags]:
        """Tells the edges that are steps of a pending class, or lead where one is disabled."""
        graph = self.ready.graph
        wanted = _words(pending)[:, None]

        def settles(edges: Ints) -> Flags:
            disabled = ((~self.ready.enabled[:, graph.target[edges]] & wanted) != 0).any(axis=0)
            return np.asarray(disabled | pending[graph.fair_class[graph.move[edges]]])

        return settles

    def _nearest(self, start: int, wanted: Callable[[Ints], Flags]) -> list[int]:
        """The shortest way inside the component that ends with a wanted edge."""
        graph = self.ready.graph
        last = np.full(graph.states, -1, np.int64)
        seen = np.zeros(graph.states, np.bool_)
        seen[start] = True
        frontier = np.array([start])
        while frontier.size:
            edges, _ = self.ready.edges_of(frontier)
            edges = edges[self.inside[graph.target[edges]] & self.moves[graph.move[edges]]]
            hits = edges[wanted(edges)]
            if hits.size:
                return [*self.ready.way_back(int(graph.source[hits[0]]), last), int(hits[0])]
            edges = edges[~seen[graph.target[edges]]]
            frontier = _claim(last, edges, graph.target[edges])
            seen[frontier] = True
        raise AssertionError("a fair component has a way from each of its states to each of its edges")


def leads_to(graph: Graph, premise: Flags, goal: Flags, allowed: Flags | None = None) -> Lasso | None:
    """``FairGraph.leads_to`` for a single property; for several, build the ``FairGraph`` once."""
    return FairGraph(graph).leads_to(premise, goal, allowed)


def deadlocks(graph: Graph) -> npt.NDArray[np.int64]:
    """The states without successors."""
    return np.flatnonzero(np.bincount(graph.source, minlength=graph.states) == 0)


def _claim(last: Ints, edges: Ints, target: Ints) -> Ints:
    """Note for each target one of the edges that lead to it. The targets, each once."""
    last[target] = edges
    return np.asarray(target[last[target] == edges])


def _components(bounds: Ints, targets: Ints) -> Ints:
    """Numbers of the strongly connected components. The targets are given row by row.

    Two moves with the same effect must count once: on a matrix that names a place twice, scipy 1.17 never returns.
    """
    rows = len(bounds) - 1
    matrix = csr_matrix((np.ones(len(targets)), targets, bounds), shape=(rows, rows), copy=True)
    matrix.sum_duplicates()
    labels: Ints = connected_components(matrix, directed=True, connection="strong")[1]
    return labels


def _classes_by_row(move: Ints, bounds: Ints, bits: Words) -> Words:
    """For each word and each row of edges, the classes that have an edge in it."""
    rows = np.flatnonzero(np.diff(bounds))
    masks = np.zeros((len(bits), len(bounds) - 1), np.uint64)
    if rows.size:
        for word, table in enumerate(bits):
            masks[word, rows] = np.bitwise_or.reduceat(table[move], bounds[rows])
    return masks


def _words(classes: Flags) -> Words:
    """A set of classes, given by a flag for each and one for 'no class' at the end, as bits."""
    words = np.zeros((len(classes) - 1) // WORD_BITS + 1, np.uint64)
    for number in np.flatnonzero(classes[:-1]).tolist():
        words[number // WORD_BITS] |= np.uint64(1 << (number % WORD_BITS))
    return words


class NotALasso(Exception):
    """A behaviour that was said to break a promise does not exist, or is not fair."""


def fair_check(
    graph: Graph,
    lasso: Lasso,
    premise: Flags | None = None,
    goal: Flags | None = None,
    allowed: Flags | None = None,
) -> bool:
    """True if a lasso is real; otherwise ``NotALasso`` says what is wrong with it.

    Shares nothing with the search above, so that a mistake there cannot excuse itself here. Slow: it reads all edges
    once for each state of the lasso. What is not given is not checked.
    """
    end = _follow(graph, [lasso.start, *_states_after(lasso.prefix)], lasso.prefix)
    _demand(lasso.start in graph.initial.tolist(), f"state {lasso.start} is not initial")
    _demand(_follow(graph, [end, *_states_after(lasso.cycle)], lasso.cycle) == end, "the cycle does not close")
    _demand(0 <= lasso.since <= len(lasso.prefix), f"the prefix has no step {lasso.since}")
    later = lasso.prefix[lasso.since :] + lasso.cycle
    opened = [lasso.start, *_states_after(lasso.prefix)][lasso.since]
    _demand(premise is None or bool(premise[opened]), f"the premise does not hold in state {opened}")
    for state in [opened, *_states_after(later)]:
        _demand(goal is None or not goal[state], f"state {state} is a goal")
    for _, move, _ in later:
        _demand(allowed is None or bool(allowed[move]), f"move {move} is not allowed")
    _check_fairness(graph, [end, *_states_after(lasso.cycle)], lasso.cycle, allowed)
    return True


def _demand(holds: bool, complaint: str) -> None:
    if not holds:
        raise NotALasso(complaint)


def _states_after(steps: list[Step]) -> list[int]:
    return [after for _, _, after in steps]


def _follow(graph: Graph, states: list[int], steps: list[Step]) -> int:
    """The last of the states, if each step is an edge that begins where the one before ended."""
    for state, step in zip(states, steps, strict=False):
        _demand(step[0] == state, f"{step} does not begin in state {state}")
        edges = (graph.source == step[0]) & (graph.move == step[1]) & (graph.target == step[2])
        _demand(bool(edges.any()), f"{step} is not an edge")
    return states[-1]


def _check_fairness(graph: Graph, states: list[int], cycle: list[Step], allowed: Flags | None) -> None:
    """Every class that obliges is disabled in one of the cycle's states, or one of its steps is in the cycle."""
    excused = {-1}
    if allowed is not None:
        excused |= {int(graph.fair_class[move]) for move in range(len(graph.fair_class)) if not allowed[move]}
    due = set(graph.fair_class.tolist()) - excused - {int(graph.fair_class[move]) for _, move, _ in cycle}
    for state in set(states):
        due &= set(graph.fair_class[graph.move[graph.source == state]].tolist())
    _demand(not due, f"classes {sorted(due)} stay enabled and are never taken")
