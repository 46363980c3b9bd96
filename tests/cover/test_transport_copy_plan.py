"""Copy plans: what is refused, what is merged, and that parts copy the same bytes as the whole.

The reference is a loop over bytes of ordinary arrays; whatever a plan says is carried out by memmove and compared.
"""

from __future__ import annotations

import numpy as np
import pytest
from copied_memory import WHOLE, Memory, copies_of, disjoint_copies, expected
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.runtime.transports.copy_plan import cut, merge, plan_of, split
from kvpoll.runtime.transports.gather_scatter_tables import copy_by_memmove
from kvpoll.runtime.transports.interface import Copies
from kvpoll.runtime.transports.offsets import BadRange, Space
from kvpoll.runtime.transports.page_lists import grid, uniform_bytes


@given(disjoint_copies(), st.booleans(), st.integers(1, 5), st.integers(7, 700))
def test_a_plan_merged_and_cut_in_any_way_copies_the_same_bytes(
    copies: Copies, merged: bool, ranges_max: int, bytes_max: int
) -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    ranges = plan_of(copies, source.space, target.space, merged)
    assert ranges.total == copies.total
    parts = list(cut(ranges, ranges_max, bytes_max))
    for part in parts:
        assert 1 <= len(part.nbytes) <= ranges_max and part.total <= bytes_max
        copy_by_memmove(part)
    assert (target.bytes == expected(source.bytes, copies)).all()


@given(disjoint_copies())
def test_moves_say_of_a_few_ranges_what_a_plan_says(copies: Copies) -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    plan = plan_of(copies, source.space, target.space, merged=False)
    said = source.space.moves(copies, target.space)
    assert said == list(zip(plan.target.tolist(), plan.source.tolist(), plan.nbytes.tolist(), strict=True))


def test_neighbours_become_one_range_unless_a_border_lies_between() -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    neighbours = copies_of([(100, 600, 50), (0, 500, 100), (150, 650, 10)])
    assert plan_of(neighbours, source.space, target.space).nbytes.tolist() == [160]
    assert plan_of(neighbours, source.space, target.space, merged=False).nbytes.tolist() == [50, 100, 10]
    apart_in_target = copies_of([(0, 500, 100), (100, 601, 50)])
    assert plan_of(apart_in_target, source.space, target.space).nbytes.tolist() == [100, 50]

    # Two regions may be neighbours in memory too; a merged range would belong to neither.
    memory = np.zeros(200, np.uint8)
    halves = Space([100, 100], [memory.ctypes.data, memory.ctypes.data + 100])
    across = plan_of(copies_of([(50, 50, 50), (100, 100, 50)]), halves, halves)
    assert across.nbytes.tolist() == [50, 50]


def test_an_empty_plan_is_a_plan() -> None:
    space = Memory(seed=None).space
    nothing = plan_of(copies_of([]), space, space)
    assert nothing.total == 0
    assert list(cut(nothing, 1, 1)) == []
    assert uniform_bytes(nothing, space, space) is None
    assert len(merge(nothing).nbytes) == len(split(nothing, 5).nbytes) == 0


@pytest.mark.parametrize(
    ("ranges", "complaint"),
    [
        ([(0, 0, 10), (WHOLE, 0, 1)], "range 1 of the source (1 bytes at offset 8120) is in no registered region"),
        ([(0, WHOLE - 9, 10)], "range 0 of the target (10 bytes at offset 8111)"),
        ([(-1, 0, 10)], "range 0 of the source (10 bytes at offset -1)"),
        ([(4090, 0, 10)], "range 0 of the source (10 bytes at offset 4090)"),  # crosses a border
        ([(0, 0, 1 << 62)], "(3 regions, 8120 bytes)"),
        ([(1 << 62, 0, 1 << 62)], "range 0 of the source"),  # a sum would overflow
        ([(0, 0, 10), (0, 0, 0)], "range 1 has 0 bytes"),
        ([(0, 0, -5)], "range 0 has -5 bytes"),
    ],
)
def test_a_bad_range_is_named(ranges: list[tuple[int, int, int]], complaint: str) -> None:
    space = Memory(seed=None).space
    with pytest.raises(BadRange) as caught:
        plan_of(copies_of(ranges), space, space)
    assert complaint in str(caught.value)
    assert space.moves(copies_of(ranges), space) is None


def test_arrays_of_another_form_are_refused() -> None:
    space = Memory(seed=None).space
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(BadRange, match="differ in length: 1, 2, 1"):
        plan_of(Copies(one, two, one), space, space)
    with pytest.raises(BadRange, match="integer arrays"):
        plan_of(Copies(one, one, one.astype(np.float64)), space, space)
    with pytest.raises(BadRange, match="the target has registered no memory"):
        plan_of(Copies(one, one, one + 1), space, Space([]))


def test_pages_of_one_size_have_numbers_in_a_list_of_whole_regions() -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    pages = plan_of(copies_of([(512, 0, 512), (4096, 5120, 512)]), source.space, target.space, merged=False)
    assert uniform_bytes(pages, source.space, target.space) == 512
    cells = grid(target.space, 512)  # 8 cells, 2 cells, 5 cells and a rest that is no cell
    assert len(cells.addresses) == 15
    numbers = cells.cells(target.space, pages.target, pages.target_region)
    assert numbers.tolist() == [0, 10]
    assert (cells.addresses[numbers] == pages.target).all()

    for crooked in ([(512, 0, 512), (0, 600, 512)], [(512, 0, 512), (0, 512, 256)]):
        made = plan_of(copies_of(crooked), source.space, target.space, merged=False)
        assert uniform_bytes(made, source.space, target.space) is None


def test_without_addresses_offsets_stand_for_them_and_the_order_posted_is_kept() -> None:
    """Where an owner's memory lies is not known before a connection is made; ranges that do not join stay in order."""
    target = Space([40, 40])
    made = plan_of(copies_of([(30, 50, 10), (0, 0, 10)]), Space([100], [1000]), target)
    assert made.source.tolist() == [1030, 1000]
    assert made.target.tolist() == [50, 0] and made.target_region.tolist() == [1, 0]
    assert Space([40, 40], [500, 900]).addresses_of(made.target, made.target_region).tolist() == [910, 500]


def test_a_range_longer_than_a_part_is_divided() -> None:
    made = plan_of(copies_of([(0, 0, 1000)]), Space([1000]), Space([1000]))
    assert [part.total for part in cut(made, 4096, 128)] == [128] * 7 + [104]
