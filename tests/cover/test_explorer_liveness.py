"""Liveness under weak fairness: small stories, and every small graph against a judge that tries all sets of states."""

from __future__ import annotations

from collections import deque
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpoll.sim.explorer.liveness import FairGraph, Graph, Lasso, NotALasso, deadlocks, fair_check, leads_to

Edge = tuple[int, int, int]
"""State before, move, state after."""


def graph_of(states: int, edges: list[Edge], fair_class: list[int], initial: tuple[int, ...] = (0,)) -> Graph:
    """A graph from a list of edges."""
    columns = np.array(edges, np.int32).reshape(-1, 3)
    return Graph(
        states,
        np.array(initial, np.int32),
        columns[:, 0],
        columns[:, 2],
        columns[:, 1].astype(np.int16),
        np.array(fair_class, np.int16),
    )


def flags(size: int, *members: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """True for the members."""
    marks = np.zeros(size, np.bool_)
    marks[list(members)] = True
    return marks


def all_but(size: int, *members: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """False for the members."""
    return ~flags(size, *members)


class TestStories:
    def test_a_fair_step_comes_true(self) -> None:
        graph = graph_of(2, [(0, 0, 1)], [0])
        assert leads_to(graph, flags(2, 0), flags(2, 1)) is None

    def test_without_fairness_nothing_need_ever_happen(self) -> None:
        graph = graph_of(2, [(0, 0, 1)], [-1])
        lasso = leads_to(graph, flags(2, 0), flags(2, 1))
        assert lasso == Lasso(prefix=[], cycle=[], start=0, since=0)
        assert fair_check(graph, lasso, flags(2, 0), flags(2, 1))

    def test_a_toggle_that_never_comes_to_the_third_state(self) -> None:
        graph = graph_of(3, [(0, 0, 1), (1, 1, 0)], [0, 1])
        lasso = leads_to(graph, flags(3, 1), flags(3, 2))
        assert lasso is not None
        assert lasso.prefix == [(0, 0, 1)]
        assert lasso.cycle == [(1, 1, 0), (0, 0, 1)]
        assert lasso.since == 1

    def test_a_toggle_does_not_excuse_who_is_enabled_throughout(self) -> None:
        graph = graph_of(3, [(0, 0, 1), (1, 1, 0), (0, 2, 2), (1, 2, 2)], [0, 1, 2])
        assert leads_to(graph, flags(3, 0), flags(3, 2)) is None

    def test_weak_fairness_does_not_help_who_is_enabled_only_now_and_then(self) -> None:
        graph = graph_of(3, [(0, 0, 1), (1, 1, 0), (0, 2, 2)], [0, 1, 2])
        lasso = leads_to(graph, flags(3, 0), flags(3, 2))
        assert lasso is not None
        assert lasso.cycle == [(0, 0, 1), (1, 1, 0)]

    def test_two_processes_that_must_both_get_their_turn(self) -> None:
        """Process 0 circles on its own; process 1 would go to the goal, and cannot be starved in 0 or 1."""
        circle = [(0, 0, 1), (1, 0, 0)]
        starved = graph_of(3, [*circle, (0, 1, 2), (1, 1, 2)], [0, -1])
        assert leads_to(starved, flags(3, 0), flags(3, 2)) is not None
        served = graph_of(3, [*circle, (0, 1, 2), (1, 1, 2)], [0, 1])
        assert leads_to(served, flags(3, 0), flags(3, 2)) is None

    def test_two_moves_of_one_class_stand_for_each_other(self) -> None:
        edges = [(0, 0, 1), (1, 0, 0), (0, 1, 2), (1, 1, 2)]
        lasso = leads_to(graph_of(3, edges, [0, 0]), flags(3, 0), flags(3, 2))
        assert lasso is not None
        assert len(lasso.cycle) == 2

    def test_the_cycle_calls_on_every_class(self) -> None:
        """Three petals: each has a class of its own that is enabled in all states, so all must be flown."""
        petals = [(0, 0, 1), (0, 1, 2), (0, 2, 3)]
        home = [(state, move, 0) for state in (1, 2, 3) for move in (0, 1, 2)]
        graph = graph_of(5, petals + home, [0, 1, 2])
        lasso = leads_to(graph, flags(5, 0), flags(5, 4))
        assert lasso is not None
        assert {move for _, move, _ in lasso.cycle} == {0, 1, 2}
        assert fair_check(graph, lasso)

    def test_a_deadlock_breaks_a_promise_by_stuttering(self) -> None:
        graph = graph_of(4, [(0, 0, 1), (1, 0, 3), (1, 1, 2)], [0, 1])
        lasso = leads_to(graph, flags(4, 0), flags(4, 3))
        assert lasso == Lasso(prefix=[(0, 0, 1), (1, 1, 2)], cycle=[], start=0, since=0)
        assert lasso.knot == 2
        assert deadlocks(graph).tolist() == [2, 3]

    def test_the_goal_counts_when_it_is_there_already(self) -> None:
        graph = graph_of(2, [(0, 0, 1), (1, 0, 0)], [0])
        assert leads_to(graph, flags(2, 1), flags(2, 1)) is None

    def test_the_way_to_the_premise_may_pass_a_goal(self) -> None:
        graph = graph_of(3, [(0, 0, 1), (1, 0, 2)], [0])
        lasso = leads_to(graph, flags(3, 2), flags(3, 0, 1))
        assert lasso == Lasso(prefix=[(0, 0, 1), (1, 0, 2)], cycle=[], start=0, since=2)

    def test_a_premise_that_cannot_be_reached_promises_nothing(self) -> None:
        graph = graph_of(3, [(2, 0, 1)], [-1])
        assert leads_to(graph, flags(3, 2), flags(3)) is None

    def test_the_shortest_prefix_is_chosen_over_all_premise_states(self) -> None:
        """Premise states 1 (near, then a long way) and 3 (farther, and stuck there at once)."""
        graph = graph_of(7, [(0, 0, 1), (1, 0, 4), (4, 0, 5), (5, 0, 6), (0, 1, 2), (2, 1, 3)], [0, 1])
        lasso = leads_to(graph, flags(7, 1, 3), flags(7))
        assert lasso is not None
        assert lasso.prefix == [(0, 1, 2), (2, 1, 3)]
        assert lasso.since == 2


class TestAllowed:
    RESCUE = graph_of(3, [(0, 0, 1), (1, 0, 0), (0, 1, 2), (1, 1, 2)], [0, 1])
    """Move 1 is a deadline that always ends the circle of move 0."""

    def test_the_deadline_saves_the_day_only_if_it_may_fire(self) -> None:
        assert leads_to(self.RESCUE, flags(3, 0), flags(3, 2)) is None
        lasso = leads_to(self.RESCUE, flags(3, 0), flags(3, 2), all_but(2, 1))
        assert lasso is not None
        assert lasso.cycle == [(0, 0, 1), (1, 0, 0)]
        assert fair_check(self.RESCUE, lasso, allowed=all_but(2, 1))
        with pytest.raises(NotALasso, match=r"classes \[1\] stay enabled"):
            fair_check(self.RESCUE, lasso)

    def test_what_is_not_allowed_may_happen_before_the_premise(self) -> None:
        graph = graph_of(4, [(0, 0, 1), (1, 1, 2), (1, 0, 3)], [-1, 1])
        everything = leads_to(graph, flags(4, 1, 2), flags(4, 1))
        assert everything is not None
        assert everything.prefix == [(0, 0, 1), (1, 1, 2)]
        kept = leads_to(graph, flags(4, 1), flags(4, 2), all_but(2, 0))
        assert kept is None, "move 0 leads to 1 before the premise; from 1 only the fair move 1 is left"

    def test_a_fault_that_may_not_happen_closes_a_way_out(self) -> None:
        graph = graph_of(3, [(0, 0, 1), (0, 1, 2)], [0, -1])
        assert leads_to(graph, flags(3, 0), flags(3, 1)) is not None
        assert leads_to(graph, flags(3, 0), flags(3, 1), all_but(2, 1)) is None

    def test_the_cycle_does_not_take_a_forbidden_short_cut(self) -> None:
        graph = graph_of(3, [(0, 0, 1), (1, 1, 0), (1, 0, 2), (2, 0, 0)], [0, -1])
        lasso = leads_to(graph, flags(3, 0), flags(3), all_but(2, 1))
        assert lasso is not None
        assert lasso.cycle == [(0, 0, 1), (1, 0, 2), (2, 0, 0)]

    def test_one_forbidden_move_excuses_its_whole_class(self) -> None:
        graph = graph_of(3, [(0, 0, 1), (0, 1, 2)], [0, 0])
        lasso = leads_to(graph, flags(3, 0), flags(3, 1, 2), all_but(2, 1))
        assert lasso is not None
        assert lasso.cycle == []


class TestManyClasses:
    @pytest.mark.parametrize("number", [0, 63, 64, 65, 127, 128, 200])
    @pytest.mark.parametrize("apart", [1, 32, 64])
    def test_every_bit_of_every_word_obliges_by_itself(self, number: int, apart: int) -> None:
        graph = graph_of(3, [(0, 0, 1), (1, 0, 0), (0, 1, 2), (1, 1, 2)], [number ^ apart, number])
        assert leads_to(graph, flags(3, 0), flags(3, 2)) is None

    def test_a_clique_with_a_class_for_each_edge(self) -> None:
        edges = [(a, a * 12 + b, b) for a in range(12) for b in range(12) if a != b]
        graph = graph_of(13, edges, list(range(144)))
        lasso = leads_to(graph, flags(13, 0), flags(13, 12))
        assert lasso is not None
        assert fair_check(graph, lasso)

    def test_a_graph_with_no_edges_and_one_with_no_fair_moves(self) -> None:
        lasso = leads_to(graph_of(1, [], []), flags(1, 0), flags(1))
        assert lasso == Lasso(prefix=[], cycle=[], start=0, since=0)
        assert deadlocks(graph_of(2, [], [])).tolist() == [0, 1]


class TestTheCheckCanFail:
    """A true lasso, and everything that can be wrong with one."""

    GRAPH = graph_of(4, [(0, 0, 1), (1, 1, 2), (2, 2, 1), (2, 0, 3), (1, 0, 3)], [-1, 1, 2])
    TRUE = Lasso(prefix=[(0, 0, 1)], cycle=[(1, 1, 2), (2, 2, 1)], start=0, since=1)

    def test_it_passes_what_is_true(self) -> None:
        assert leads_to(self.GRAPH, flags(4, 1), flags(4, 3)) == self.TRUE
        assert fair_check(self.GRAPH, self.TRUE, flags(4, 1), flags(4, 3), all_but(3, 0))

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"start": 1, "prefix": [], "since": 0}, "state 1 is not initial"),
            ({"prefix": [(0, 1, 1)]}, "is not an edge"),
            ({"prefix": [(0, 0, 2)]}, "is not an edge"),
            ({"prefix": []}, "does not begin in state 0"),
            ({"cycle": [(1, 1, 2)]}, "does not close"),
            ({"cycle": [(2, 2, 1), (1, 1, 2)]}, "does not begin in state 1"),
            ({"cycle": []}, r"classes \[1\] stay enabled"),
            ({"since": 2}, "has no step 2"),
            ({"since": 0}, "the premise does not hold in state 0"),
        ],
    )
    def test_it_names_what_is_wrong(self, change: dict[str, Any], complaint: str) -> None:
        with pytest.raises(NotALasso, match=complaint):
            fair_check(self.GRAPH, self.TRUE._replace(**change), flags(4, 1), flags(4, 3))

    def test_it_knows_goals_and_forbidden_moves(self) -> None:
        with pytest.raises(NotALasso, match="state 2 is a goal"):
            fair_check(self.GRAPH, self.TRUE, goal=flags(4, 2))
        with pytest.raises(NotALasso, match="move 2 is not allowed"):
            fair_check(self.GRAPH, self.TRUE, allowed=all_but(3, 2))

    def test_an_edge_to_its_own_state_is_refused(self) -> None:
        with pytest.raises(ValueError, match="own state"):
            FairGraph(graph_of(2, [(0, 0, 0)], [0]))


class Question(NamedTuple):
    """A random graph and a random promise about it."""

    graph: Graph
    edges: list[Edge]
    premise: frozenset[int]
    goal: frozenset[int]
    allowed: frozenset[int]


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """Up to seven states and five moves; class numbers on both sides of a word's edge."""
    states = draw(st.integers(1, 7))
    moves = draw(st.integers(1, 5))
    numbers = st.integers(0, states - 1)
    ends = st.tuples(numbers, st.integers(0, moves - 1), numbers).filter(lambda edge: edge[0] != edge[2])
    edges = draw(st.lists(ends, max_size=18)) if states > 1 else []
    fair_class = draw(st.lists(st.sampled_from([-1, 0, 1, 2, 63, 64, 130]), min_size=moves, max_size=moves))
    initial = draw(st.frozensets(numbers, min_size=1, max_size=2))
    return Question(
        graph_of(states, edges, fair_class, tuple(sorted(initial))),
        edges,
        draw(st.frozensets(numbers)),
        draw(st.frozensets(numbers, max_size=2)),
        draw(st.one_of(st.just(frozenset(range(moves))), st.frozensets(st.integers(0, moves - 1)))),
    )


def distances(starts: dict[int, int], edges: list[Edge]) -> dict[int, int]:
    """Steps to each state, from states that are so far away already. Slow: settles one state at a time."""
    known, open_ends = dict(starts), deque(starts)
    while open_ends:
        state = open_ends.popleft()
        for before, _, after in edges:
            if before == state and known.get(after, 1 << 30) > known[state] + 1:
                known[after] = known[state] + 1
                open_ends.append(after)
    return known


def judge(question: Question) -> int | None:
    """Length of the shortest prefix to a set of states that a fair behaviour can visit for ever; None without one.

    Tries every set of states. One serves if each of its states reaches each other one without leaving it.
    """
    classes = question.graph.fair_class.tolist()
    forbidden = {classes[move] for move in range(len(classes)) if move not in question.allowed}
    from_start = distances(dict.fromkeys(question.graph.initial.tolist(), 0), question.edges)
    free = [e for e in question.edges if e[1] in question.allowed and not {e[0], e[2]} & question.goal]
    opened = {state: from_start[state] for state in (question.premise - question.goal) & from_start.keys()}
    near = distances(opened, free)
    enabled = {s: {classes[m] for a, m, _ in question.edges if a == s} for s in near}
    best: list[int] = []
    for size in range(1, len(near) + 1):
        for chosen in map(set, combinations(sorted(near), size)):
            inner = [edge for edge in free if edge[0] in chosen and edge[2] in chosen]
            if any(distances({state: 0}, inner).keys() != chosen for state in chosen):
                continue
            taken = {classes[move] for _, move, _ in inner}
            due = set.intersection(*(enabled[state] for state in chosen)) - taken - forbidden - {-1}
            best += [] if due else [min(near[state] for state in chosen)]
    return min(best, default=None)


@settings(max_examples=400, deadline=None)
@given(questions())
def test_it_agrees_with_a_judge_that_tries_every_set_of_states(question: Question) -> None:
    graph, size = question.graph, question.graph.states
    premise, goal = flags(size, *question.premise), flags(size, *question.goal)
    allowed = flags(len(graph.fair_class), *question.allowed)
    lasso = leads_to(graph, premise, goal, allowed)
    assert (None if lasso is None else len(lasso.prefix)) == judge(question)
    if lasso is not None:
        assert fair_check(graph, lasso, premise, goal, allowed)
    assert set(deadlocks(graph).tolist()) == set(range(size)) - {edge[0] for edge in question.edges}


def test_one_made_ready_graph_answers_as_fresh_ones_do() -> None:
    edges = [(2, 1, 0), (0, 0, 1), (1, 2, 2), (1, 1, 3), (1, 2, 2)]
    graph = graph_of(4, edges, [0, 1, 2])
    ready = FairGraph(graph)
    for goal in range(4):
        for allowed in (None, all_but(3, 1)):
            asked = (flags(4, 0), flags(4, goal), allowed)
            assert ready.leads_to(*asked) == leads_to(graph, *asked)
