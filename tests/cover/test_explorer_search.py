"""The search in blocks beside a plain breadth-first search that keeps states in a dictionary."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpoll.sim.explorer import budget, search
from kvpoll.sim.explorer.explore import Limits, explore
from kvpoll.sim.explorer.judges import Judge, judges
from kvpoll.sim.explorer.model import ModelFile, load_model
from kvpoll.sim.explorer.search import SURVEY, Explored, Search, TooLarge, _mirrored
from kvpoll.sim.explorer.system import Cell, Move, Outcome, System, refuse, send, text_of
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import NodeStarted, Surveyed

PROTOCOL = load()
SGLANG = PROTOCOL.profile("sglang-0.5.23")

PAIR = """\
[model]
title = "two requests that nobody can tell apart"
kind = "transfer"
prefill = ["P0"]
decode = ["D0"]
pages = 1

[faults]
total = 1
client_abort = 1

[[request]]
rid = "q1"
room = 1001

[[request]]
rid = "q2"
room = 1002
"""

ONE = PAIR.partition('[[request]]\nrid = "q2"')[0].replace("client_abort = 1", "slowness = 1\ndecode_abort = 1")


def model_of(folder: Path, text: str) -> ModelFile:
    path = folder / "small.toml"
    path.write_text(text)
    return load_model(str(path), PROTOCOL)


# --- a plain search ---------------------------------------------------------------------------------

State = tuple[Any, ...]


@dataclass
class Plain:
    """States by depth, edges as (state, move, state), states in which nothing is owed, first states that break."""

    depths: dict[State, int] = field(default_factory=dict)
    edges: Counter[tuple[State, int, State]] = field(default_factory=Counter)
    quiet: int = 0
    found: dict[str, int] = field(default_factory=dict)


def plain(system: System, watched: Iterable[Judge] = ()) -> Plain:
    """One state at a time, each as a tuple of values; the monitors' states stand behind those of the cells."""
    watched = list(watched)
    places = {cell.name: place for place, cell in enumerate(system.cells)}
    known: dict[tuple[int, State], list[Outcome]] = {}

    def outcomes(number: int, state: State) -> list[Outcome]:
        scope = tuple(state[places[cell]] for cell in system.moves[number].scope)
        if (number, scope) not in known:
            known[number, scope] = list(system.moves[number].act(*scope))
        return known[number, scope]

    def after(number: int, state: State, outcome: Outcome) -> State:
        values = list(state)
        for cell, value in zip(system.moves[number].scope, outcome.after, strict=True):
            values[places[cell]] = value
        for cell, operation in outcome.effects:
            values[places[cell]] = system.cells[places[cell]].apply(values[places[cell]], operation)  # type: ignore[misc]
        for place, judge in enumerate(watched, len(system.cells)):
            for event in outcome.events:
                if type(event) in judge.handles:
                    values[place] = judge.apply(values[place], event)
        return tuple(values)

    def taken(kind: str, state: State) -> list[tuple[int, State]]:
        moves = [
            number for number, move in enumerate(system.moves) if (move.kind == "deadline") == (kind == "deadline")
        ]
        steps = [(number, after(number, state, outcome)) for number in moves for outcome in outcomes(number, state)]
        return [(number, other) for number, other in steps if other != state]

    seen = Plain()
    first = (*(cell.initial for cell in system.cells), *(_begun(judge, system) for judge in watched))
    seen.depths[first] = 0
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        steps = taken("prompt", state)
        if not any(system.moves[number].fair for number, _ in steps):
            steps += taken("deadline", state)
            seen.quiet += not any(system.moves[number].fair for number, _ in steps)
        for number, other in steps:
            seen.edges[state, number, other] += 1
            if other not in seen.depths:
                seen.depths[other] = seen.depths[state] + 1
                waiting.append(other)
                for judge, value in zip(watched, other[len(system.cells) :], strict=True):
                    if value.violated is not None:
                        seen.found.setdefault(judge.invariant, seen.depths[other])
    return seen


def _begun(judge: Judge, system: System) -> Any:
    value = judge.start()
    for event in system.start:
        if type(event) in judge.handles:
            value = judge.apply(value, event)
    return value


def numbers_of(explored: Explored) -> tuple[int, int, int, int, bool]:
    return explored.states, explored.edges, explored.depth, explored.quiet, explored.complete


def assert_equal(system: System, workers: int = 1) -> None:
    """Counts, and with the graph kept: every state, every edge, and how far each state is away."""
    slow = plain(system)
    wanted = (len(slow.depths), slow.edges.total(), 1 + max(slow.depths.values()), slow.quiet, True)
    assert numbers_of(Search(system, workers=workers).run()) == wanted

    kept = Search(system, keep_graph=True, workers=workers)
    assert numbers_of(kept.run()) == wanted
    rows = np.concatenate(kept.rows)
    states = [tuple(kept.cells_of(row).values()) for row in rows]
    assert {state: len(kept.path_to(number)) for number, state in enumerate(states)} == slow.depths
    edges = Counter[tuple[State, int, State]]()
    for sources, targets, moves in kept.edges:
        edges.update((states[s], int(m), states[t]) for s, t, m in zip(sources, targets, moves, strict=True))
    assert edges == slow.edges


# --- a small cluster, by hand -----------------------------------------------------------------------


def workshop() -> System:
    """A maker counts to 2 and sends each number; a taker takes them. One message can be lost, then the taker waits
    in vain and gives up, for which it is patient. A lamp may be switched for ever, and nobody is owed that."""

    def make(made: int) -> Iterator[Outcome]:
        if made < 2:
            yield Outcome((made + 1,), f"made {made + 1}", (("chan maker taker", (made + 1,)),))

    def take(taken: Any, channel: tuple[int, ...]) -> Iterator[Outcome]:
        if channel:
            yield Outcome((taken if taken == "gave up" else channel[0], channel[1:]), f"takes {channel[0]}")

    def lose(channel: tuple[int, ...]) -> Iterator[Outcome]:
        if channel:
            yield Outcome((channel[1:],), f"{channel[0]} is lost")

    def give_up(taken: Any) -> Iterator[Outcome]:
        if taken != 2:
            yield Outcome(("gave up",), "gives up")

    cells = [Cell("maker", 0), Cell("taker", 0), Cell("chan maker taker", (), send), Cell("lamp", 0)]
    moves = [
        Move("make", "step", ("maker",), make),
        Move("take", "step", ("taker", "chan maker taker"), take),
        budget.fault("lose", "drop", ("chan maker taker",), lose),
        Move("give up", "deadline", ("taker",), give_up),
        Move("switch", "step", ("lamp",), lambda lamp: [Outcome((1 - lamp,), "click")], optional=True),
        Move("stay", "step", ("lamp",), lambda lamp: [Outcome((lamp,), "nothing")]),
    ]
    return System("workshop", [*cells, Cell(budget.CELL, budget.budget({"drop": 1}), refuse)], moves)


def test_a_small_cluster_has_the_states_that_a_plain_search_finds() -> None:
    assert_equal(workshop())


def test_the_numbers_of_the_small_cluster_are_these() -> None:
    explored = Search(workshop()).run()
    assert numbers_of(explored) == (22, 46, 7, 6, True)
    assert explored.marks == {"fault drop"}


def test_the_deadline_is_patient_and_the_lamp_keeps_nobody_waiting() -> None:
    slow = plain(workshop())
    gave_up = {state for state, move, other in slow.edges if move == 3}
    assert gave_up == {(2, 1, (), lamp, (("drop", 0), ("total", 0))) for lamp in (0, 1)}
    assert 5 not in {move for _, move, _ in slow.edges}, "what changes nothing is no step"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_blocks_and_threads_change_nothing(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 2)
    assert_equal(workshop(), workers)


# --- any small cluster ------------------------------------------------------------------------------


def _turn(size: int, value: int, more: int) -> int:
    return (value + more) % size


def any_system(seed: int) -> System:
    """A few cells of a few values; moves with the outcomes that chance gave them, effects and all."""
    chance = random.Random(seed)
    sizes = [chance.randint(2, 4) for _ in range(chance.randint(1, 4))]
    cells = [Cell(f"c{place}", 0, partial(_turn, size)) for place, size in enumerate(sizes)]

    def outcome(scope: tuple[int, ...]) -> Outcome:
        after = tuple(chance.randrange(sizes[place]) for place in scope)
        others = [place for place in range(len(sizes)) if place not in scope and chance.random() < 0.4]
        return Outcome(after, "", tuple((f"c{place}", chance.randint(0, 2)) for place in others))

    moves = []
    for number in range(chance.randint(1, 6)):
        scope = tuple(chance.sample(range(len(sizes)), min(len(sizes), chance.randint(1, 2))))
        table = {
            values: tuple(outcome(scope) for _ in range(chance.choice([0, 0, 1, 1, 2])))
            for values in np.ndindex(*[sizes[place] for place in scope])
        }
        kind = chance.choice(["step", "step", "deadline", "fault"])
        names = tuple(f"c{place}" for place in scope)
        optional = kind == "step" and chance.random() < 0.3
        moves.append(Move(f"m{number}", kind, names, lambda *values, table=table: table[values], optional))  # type: ignore[arg-type]
    return System("any", cells, moves)


@settings(max_examples=80)
@given(st.integers(0, 1 << 32))
def test_any_small_cluster_has_the_states_that_a_plain_search_finds(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BLOCK", 1 + seed % 5)
        assert_equal(any_system(seed))


# --- symmetry ---------------------------------------------------------------------------------------


def twins(values: int) -> System:
    """Two counters with a door for one: who is in counts, and rests at the top."""

    def count(mine: int, door: str, name: str) -> Iterator[Outcome]:
        if door in ("", name) and mine < values:
            yield Outcome((mine + 1, name), "up")
        if door == name:
            yield Outcome((mine, ""), "leaves")

    moves = [
        Move(f"{name} counts", "step", (name, "door"), lambda mine, door, name=name: count(mine, door, name))
        for name in ("A", "B")
    ]
    cells = [Cell("A", 0), Cell("B", 0), Cell("door", "")]
    return System("twins", cells, moves, renames=({"A": "B", "B": "A"},))


def orbits(system: System) -> tuple[int, int, int]:
    """(states, orbits of them, states that are their own mirror image), each state looked at by itself."""
    full = Search(system, keep_graph=True)
    full.run()
    [rename] = system.renames
    names = [cell.name for cell in system.cells]
    least, own = set(), 0
    texts = [[text_of(value) for value in values.values] for values in full.values]
    images = [[text_of(value, rename) for value in values.values] for values in full.values]
    place = {_mirrored(cell, rename): number for number, cell in enumerate(system.cells)}
    for row in np.concatenate(full.rows).tolist():
        here = tuple(texts[number][value] for number, value in enumerate(row))
        there = tuple(images[place[name]][row[place[name]]] for name in names)
        least.add(min(here, there))
        own += here == there
    return full.explored.states, len(least), own


def test_of_two_mirror_images_one_is_kept() -> None:
    system = twins(3)
    assert numbers_of(Search(system, symmetry=False).run())[0] == len(plain(system).depths)
    states, kept, own = orbits(system)
    assert Search(system).run().states == kept
    assert Search(system, symmetry=False).run().states == states == 2 * kept - own


def test_two_requests_that_nobody_can_tell_apart_have_half_the_states(tmp_path: Path) -> None:
    system = model_of(tmp_path, PAIR).build(PROTOCOL, SGLANG)
    states, kept, own = orbits(system)
    assert Search(system).run().states == kept == 13_739
    assert states == 2 * kept - own == 27_475


def test_symmetry_changes_no_verdict(tmp_path: Path) -> None:
    model = model_of(tmp_path, PAIR)
    reports = [
        explore(model, PROTOCOL, SGLANG, only=("S1", "S3", "S4"), limits=Limits(symmetry=symmetry, depth=18))
        for symmetry in (True, False)
    ]
    broken = [{name: found.depth for name, found in report.broken.items()} for report in reports]
    assert broken[0] == broken[1] == {"S4": 9, "S3": 11, "S1": 18}
    assert reports[0].safety.states < reports[1].safety.states <= 2 * reports[0].safety.states


# --- threads ----------------------------------------------------------------------------------------


def test_two_threads_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 256)
    system = load_model("one-room", PROTOCOL).build(PROTOCOL, SGLANG)
    seen = []
    for workers in (1, 2):
        watched = [judge for judge in judges(PROTOCOL.bounds) if not judge.timed]
        explored = Search(system, watched, workers=workers).run(max_depth=11)
        assert explored.stopped == "limit"
        seen.append(
            (
                *numbers_of(explored),
                {name: (found.depth, found.text) for name, found in explored.found.items()},
                explored.marks,
            )
        )
    assert seen[0] == seen[1]
    assert set(seen[0][-2]) == {"S3", "S4", "R1", "O1"}


# --- limits -----------------------------------------------------------------------------------------


def test_a_search_stops_at_a_limit_and_goes_on_from_there() -> None:
    whole = Search(workshop()).run()
    one = Search(workshop())
    explored = one.run(max_depth=2)
    assert (explored.stopped, explored.depth, explored.complete) == ("limit", 2, False)
    explored = one.run(max_states=explored.states + 1)
    assert (explored.stopped, explored.depth, explored.complete) == ("limit", 3, False)
    assert numbers_of(one.run()) == numbers_of(whole)
    assert one.explored.stopped == ""


def test_a_search_that_is_stopped_between_two_blocks_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 2)
    whole, one, pieces = Search(workshop()).run(), Search(workshop()), 0

    def stop(progress: search.Progress) -> None:
        one.stop = True

    while not one.run(stop).complete:
        assert one.explored.stopped == "interrupted"
        one.stop = False
        pieces += 1
    assert pieces > whole.depth
    assert numbers_of(one.explored) == numbers_of(whole)


def test_a_search_of_small_levels_can_be_stopped_too() -> None:
    """A level of one block used to be finished without a look at `stop`, and so was the next."""
    one = Search(workshop())
    one.stop = True
    explored = one.run()
    assert (explored.stopped, explored.depth, explored.complete) == ("interrupted", 1, False)


def test_too_large_a_model_says_how_far_it_came_and_what_to_do() -> None:
    with pytest.raises(TooLarge) as refused:
        Search(workshop(), memory_bytes=1 << 19).run()
    assert str(refused.value) == (
        "model 'workshop' needs more than its 0.000488281 GiB: 3 states seen, 2 still to expand at depth 0; "
        "give it more --memory, or lower a budget under [faults] or the number of requests in the model"
    )


def test_progress_tells_what_is_left() -> None:
    told: list[search.Progress] = []
    explored = Search(workshop()).run(told.append)
    assert [each.depth for each in told] == list(range(explored.depth))
    assert told[-1].states == explored.states and told[-1].frontier == 0
    assert all(each.bytes > 0 and each.frontier > 0 for each in told[:-1])


# --- what breaks ------------------------------------------------------------------------------------


def test_what_is_found_is_found_at_its_shortest(tmp_path: Path) -> None:
    system = model_of(tmp_path, ONE).build(PROTOCOL, SGLANG)
    names = ("S3", "S4", "S9")
    slow = {name: plain(system, judges(PROTOCOL.bounds, (name,))).found.get(name) for name in names}
    explored = Search(system, judges(PROTOCOL.bounds, names)).run()
    assert {name: found.depth for name, found in explored.found.items()} == {k: v for k, v in slow.items() if v}
    assert len(explored.found) > 1
    for found in explored.found.values():
        assert len(found.path) == found.depth and found.path[-1].outcome.events


def test_a_broken_invariant_is_closed_and_the_others_are_judged_on(tmp_path: Path) -> None:
    system = model_of(tmp_path, ONE).build(PROTOCOL, SGLANG)
    together = Search(system, judges(PROTOCOL.bounds, ("S3", "S4", "S9")))
    first = together.run(until_found=True)
    assert (first.stopped, set(first.found)) == ("found", {"S4"})
    assert {together.judges[place - len(system.cells)].invariant for place in together.closed} == {"S4"}
    whole = together.run()
    assert whole.complete and set(whole.found) > {"S4"}
    for name in set(whole.found) - {"S4"}:
        alone = Search(system, judges(PROTOCOL.bounds, (name,))).run()
        assert alone.found[name].depth == whole.found[name].depth


def forgetful(rest: int) -> System:
    """A node that ends with so many rooms in its tables, and is looked at when it is idle (R1)."""
    moves = [
        Move("step", "step", ("N0",), lambda left: [Outcome((left - 1,), "one less")] if left > rest else []),
        Move("trouble", "fault", ("N0",), lambda left: [Outcome((3,), "trouble")] if left == 0 else []),
    ]
    return System(
        "forgetful",
        [Cell("N0", 2)],
        moves,
        start=(NodeStarted(0, "N0", 0),),
        survey=lambda cell, value: [Surveyed(0, cell, (("rooms", value),), (), 0)],
    )


@pytest.mark.parametrize(("rest", "depth"), [(0, None), (1, 1), (2, 0)])
def test_an_idle_node_is_looked_at(rest: int, depth: int | None) -> None:
    explored = Search(forgetful(rest), judges(PROTOCOL.bounds, ("R1",))).run()
    assert explored.complete and explored.quiet == 1
    if depth is None:
        assert explored.found == {}
        return
    [found] = explored.found.values()
    assert [taken.outcome.label for taken in found.path] == ["one less"] * depth + ["N0 is idle and is looked at"]
    assert found.path[-1].move is SURVEY and found.depth == depth + 1
    assert found.text == f"left on an idle node: {rest} in rooms"


def test_more_than_256_moves_are_told_apart() -> None:
    """The group of a step was once remembered in eight bits."""
    cells = [Cell(f"c{number}", 0) for number in range(300)]
    moves = [
        Move(f"m{number}", "step", (f"c{number}", f"c{(number + 1) % 300}"), lambda mine, next_one, n=number: (
            [Outcome((1, next_one), f"m{n}")] if mine == 0 and n >= 298 else []
        ))
        for number in range(300)
    ]  # fmt: skip
    one = Search(System("wide", cells, moves))
    assert one.run().states == 4
    assert sorted(taken.move.name for taken in one.path_to(3)) == ["m298", "m299"]
