"""What the explorer keeps in arrays, each beside the plain Python object that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpoll.sim.explorer import tables
from kvpoll.sim.explorer.system import Cell, Move, Outcome, Rename, Sorted, text_of
from kvpoll.sim.explorer.tables import Effects, Group, KeyIndex, Values
from kvpoll.sim.explorer.visited import Visited

# --- canonical texts --------------------------------------------------------------------------------

ATOMS = st.one_of(st.integers(-2, 12), st.booleans(), st.none(), st.text("a',() ", max_size=3))
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
    ),
    max_leaves=6,
)


class Slotted:
    """A plain object, as a monitor may keep one."""

    __slots__ = ("room", "text")

    def __init__(self, room: int, text: str) -> None:
        self.room, self.text = room, text


class Told:
    """Says itself what its text is."""

    def text_of(self, rename: Rename | None) -> str:
        return f"told {'as is' if rename is None else rename['q1']}"


class Room(NamedTuple):
    number: int
    rid: str


@given(VALUES, VALUES)
def test_texts_are_equal_exactly_when_values_are(one: Any, other: Any) -> None:
    assert (text_of(one) == text_of(other)) == (one == other)


def test_a_quote_in_a_name_does_not_end_the_name() -> None:
    """("a','b",) once had the text of ("a", "b")."""
    assert text_of(("a','b",)) != text_of(("a", "b"))


@given(st.permutations(range(6)))
def test_no_order_of_a_set_or_a_dictionary_shows(order: list[int]) -> None:
    assert text_of({f"room {n}": {n, -n} for n in order}) == text_of({f"room {n}": {-n, n} for n in range(6)})
    assert text_of(frozenset(order)) == text_of(set(range(6)))
    assert text_of(Sorted(order)) == text_of(Sorted(range(6)))
    assert (text_of(tuple(order)) == text_of(tuple(range(6)))) == (order == list(range(6)))


def test_a_mirror_image_has_the_text_of_what_it_mirrors() -> None:
    trade: Rename = {1001: 1002, 1002: 1001, "q1": "q2", "q2": "q1"}
    queue = (Sorted([Room(1001, "q1"), Room(1002, "q3")]), {"q1": 1}, frozenset({1001, 5}), True, None)
    image = (Sorted([Room(1001, "q3"), Room(1002, "q2")]), {"q2": 1}, frozenset({1002, 5}), True, None)
    assert text_of(queue, trade) == text_of(image) != text_of(queue)
    assert text_of(image, trade) == text_of(queue)


def test_a_flag_is_no_room_number() -> None:
    assert text_of((True, False)) == text_of((1, 0)) == "(1,0)"
    assert text_of((True, 1), {1: 2, 2: 1}) == "(1,2)"


def test_objects_are_known_by_what_they_hold() -> None:
    assert text_of(Slotted(1001, "a")) == text_of(Slotted(1001, "a")) != text_of(Slotted(1002, "a"))
    assert text_of(Slotted(1001, "q1"), {1001: 1002, "q1": "q2"}) == text_of(Slotted(1002, "q2"))
    assert (text_of(Told()), text_of((Told(),), {"q1": "q2"})) == ("told as is", "(told q2)")
    assert text_of([1, 2.5, None]) == "(1,2.5,None)"


@given(st.lists(VALUES, min_size=1, max_size=6))
def test_a_memo_changes_no_text(values: list[Any]) -> None:
    memo: dict[Any, str] = {}
    rename: Rename = {1: 2, 2: 1}
    assert [text_of(each, rename, memo) for each in values] == [text_of(each, rename) for each in values]
    sorted_memo: dict[Any, str] = {}
    assert text_of(Sorted((2, 1)), None, sorted_memo) != text_of((2, 1), None, sorted_memo)


# --- numbered values --------------------------------------------------------------------------------


def test_a_value_keeps_its_number_and_its_hash_is_that_of_its_mirror_image() -> None:
    trade: Rename = {"A": "B", "B": "A"}
    here, there = Values(Cell("A", 0), [("B", trade)]), Values(Cell("B", 0), [("A", trade)])
    assert [here.number(value) for value in (("A", 1), "x", ("A", 1))] == [0, 1, 0]
    assert there.number(("B", 1)) == 0
    assert here.hashes[1].data[0] == there.hashes[0].data[0] != here.hashes[0].data[0]
    assert there.hashes[1].data[0] == here.hashes[0].data[0]
    for value in range(200):
        here.number(value)
    assert here.hashes[0].size == len(set(here.hashes[0].data[:202].tolist())) == 202


# --- combinations -----------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[list[tuple[int, ...]]]]:
    """Width of the combinations, and lists of them; some numbers are far apart."""
    width = draw(st.integers(1, 4))
    number = st.one_of(st.integers(0, 3), st.sampled_from([15, 16, 17, 255, 256, 4095, 30_000]))
    return width, draw(st.lists(st.lists(st.tuples(*[number] * width), min_size=1, max_size=6), max_size=6))


@pytest.mark.parametrize("limit", [1 << 18, 1 << 12, 0])
@settings(max_examples=50)
@given(given_batches=batches())
def test_an_index_finds_what_a_dictionary_finds(limit: int, given_batches: tuple[int, Any]) -> None:
    """Dense and then sorted, or sorted from the start. Sorted keys of four parts once ran into one another."""
    width, asked = given_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "DENSE_LIMIT", limit)
        index, plain = KeyIndex(width), dict[tuple[int, ...], int]()
        for batch in asked:
            parts = list(np.array(batch, np.int32).T)
            assert index.find(parts).tolist() == [plain.get(each, -1) for each in batch]
            new = sorted(set(batch) - plain.keys())
            index.add(new)
            plain |= {each: len(plain) + place for place, each in enumerate(new)}
            assert index.find(parts).tolist() == [plain[each] for each in batch]
        assert index.known == list(plain)


def test_an_index_takes_combinations_that_nobody_has_asked_for() -> None:
    """A resumed search enters what it knew before it looks anything up; once that was out of bounds."""
    index = KeyIndex(2)
    index.add([(0, 0), (0, 40), (17, 3)])
    assert index.find([np.array([17, 0, 0, 2]), np.array([3, 0, 40, 8])]).tolist() == [2, 0, 1, -1]


def test_more_combinations_than_numbers_are_refused() -> None:
    with pytest.raises(OverflowError, match="combinations of local values in one move"):
        KeyIndex(4).find([np.array([1 << 17])] * 4)


# --- effects and groups -----------------------------------------------------------------------------


def arrays(*lists: list[int]) -> list[Any]:
    return [np.array(each, np.int64) for each in lists]


def test_an_effect_is_worked_out_once_for_each_value() -> None:
    called: list[tuple[Any, Any]] = []

    def add(value: int, more: Any) -> int:
        called.append((value, more))
        return value + (more if isinstance(more, int) else sum(more))

    values = Values(Cell("A", 0, add), [])
    assert values.number(10) == 0
    effects = Effects(values)
    one, two, listed = effects.number((1,)), effects.number((1, 1)), effects.number(([3, 4],))
    assert (one, two, listed) == (1, 2, 3)
    assert effects.number((1, 1)) == 2 and effects.number(([3, 4],)) == 3, "even what cannot be hashed"
    after = effects.apply(*arrays([0, 0, 0, 0], [one, two, listed, one]))
    assert [values.values[n] for n in after] == [11, 12, 17, 11]
    assert called == [(10, 1), (10, 1), (11, 1), (10, [3, 4])]
    effects.apply(*arrays([0, 0], [two, one]))
    assert len(called) == 4


def group_of(act: Any) -> tuple[Group, list[Values]]:
    """Cells A and B; one move of scope A."""
    cells = [Values(Cell("A", 0), []), Values(Cell("B", (), lambda value, each: (*value, each)), [])]
    for values in cells:
        values.number(values.cell.initial)
    group = Group((0,), cells, [Effects(values) for values in cells])
    group.moves.append((7, Move("count", "step", ("A",), act)))
    return group, cells


def test_a_group_learns_a_combination_once_and_keeps_the_order_in_which_it_learned() -> None:
    asked: list[int] = []

    def act(value: int) -> Iterator[Outcome]:
        asked.append(value)
        for more in range(value):
            yield Outcome((value - more,), f"{more} less", (("B", "x"),) if more else (), marks=(f"mark {more}",))

    group, cells = group_of(act)
    for value in (3, 1):
        cells[0].number(value)
    rows = group.find(arrays([1, 0, 1, 2]))
    assert rows.tolist() == [1, 0, 1, 2] and asked == [0, 3, 1]
    assert group.counts.data[:3].tolist() == [0, 3, 1] and group.starts.data[:3].tolist() == [0, 0, 3]
    assert [outcome.label for outcome in group.outcomes] == ["0 less", "1 less", "2 less", "0 less"]
    assert [cells[0].values[n] for n in group.after[0].data[:4]] == [3, 2, 1, 1]
    assert group.operations[1].data[:4].tolist() == [0, 1, 1, 0], "the column was made late and holds no rubbish"
    assert set(group.move.data[:4].tolist()) == {7}

    again, cells = group_of(act)
    for value in (3, 1, 2):
        cells[0].number(value)
    again.learn(group.index.known)
    assert [outcome.label for outcome in again.outcomes] == [outcome.label for outcome in group.outcomes]
    assert again.find(arrays([1, 0, 2])).tolist() == [1, 0, 2]

    group.use(np.array([0, 3]))
    assert np.flatnonzero(group.used).tolist() == [0, 3]


# --- the set of states ------------------------------------------------------------------------------

CLOSE = st.builds(lambda high, low: high << 16 | low, st.integers(0, 30), st.sampled_from([0, 1, 2, 0xFFFF]))
"""Hashes that want few slots of a table of 2**16, so that they get into each other's way."""


class Plain:
    """The same with a dictionary. A hash of zero marks an empty slot and so stands for one."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def add(self, hashes: list[int]) -> tuple[list[int], list[bool]]:
        keys = [each or 1 for each in hashes]
        fresh = [key not in self.numbers for key in keys]
        for key in keys:
            self.numbers.setdefault(key, len(self.numbers))
        return [self.numbers[key] for key in keys], fresh


def both_add(visited: Visited, plain: Plain, hashes: list[int]) -> None:
    numbers, fresh = visited.add(np.array(hashes, np.uint64))
    assert (numbers.tolist(), fresh.tolist()) == plain.add(hashes)
    assert visited.count == len(plain.numbers)


@given(st.lists(st.lists(CLOSE, max_size=12, unique_by=lambda each: each or 1), max_size=8))
def test_visited_is_a_dictionary_in_which_slots_collide(asked: list[list[int]]) -> None:
    visited, plain = Visited(), Plain()
    for hashes in asked:
        both_add(visited, plain, hashes)


def test_visited_grows_and_forgets_nothing() -> None:
    chance = np.random.default_rng(1)
    hashes = chance.integers(0, 1 << 63, 150_000, np.uint64) << np.uint64(1)
    visited, plain = Visited(), Plain()
    before = visited.bytes()
    for end in (10, 40_000, 90_000, 150_000):
        both_add(visited, plain, np.unique(hashes[end // 2 : end]).tolist())
    assert visited.bytes() > 4 * before

    other = Visited()
    other.restore({name: array.copy() for name, array in visited.arrays().items()}, visited.count)
    both_add(other, plain, [5, *hashes[:50].tolist()])


def test_a_hash_of_zero_has_a_place() -> None:
    visited = Visited()
    assert visited.add(np.array([0], np.uint64))[1].tolist() == [True]
    assert visited.add(np.array([0], np.uint64))[1].tolist() == [False]
    assert visited.count == 1
