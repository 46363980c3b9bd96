"""From offsets to addresses: checked, merged, cut, counted in cells, and copied as a kernel is told to.

The reference is a loop over bytes of ordinary arrays; whatever a plan says is carried out by memmove and compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.runtime.transports.gather_scatter import BadRange, Plan, Space, cut, grid, merge, plan, split, uniform_bytes
from kvpoll.runtime.transports.gather_scatter_tables import UNIT_BYTES, copy_by_memmove, copy_by_torch, tables_of
from kvpoll.runtime.transports.interface import Copies

SIZES = (4096, 1024, 3000)
WHOLE = sum(SIZES)


class Memory:
    """Regions of ``SIZES`` in one allocation each, in an order that is not that of their addresses."""

    def __init__(self, seed: int | None) -> None:
        chance = np.random.default_rng(seed)
        self.regions = [
            np.zeros(size, np.uint8) if seed is None else chance.integers(1, 256, size, np.uint8) for size in SIZES
        ]
        self.space = Space([(region.ctypes.data, region.nbytes) for region in self.regions])

    @property
    def bytes(self) -> np.ndarray:
        return np.concatenate(self.regions)


def copies_of(ranges: Iterable[tuple[int, int, int]]) -> Copies:
    columns = np.array(list(ranges), np.int64).reshape(-1, 3).T
    return Copies(*(np.ascontiguousarray(column) for column in columns))


def expected(source: np.ndarray, copies: Copies) -> np.ndarray:
    """The slow, obvious way."""
    target = np.zeros(WHOLE, np.uint8)
    for start, end, nbytes in zip(*copies, strict=True):
        target[end : end + nbytes] = source[start : start + nbytes]
    return target


PLACES = st.integers(0, len(SIZES) - 1)
DRAWN = st.tuples(PLACES, PLACES, st.integers(0, 4096), st.integers(0, 40), st.sampled_from([1, 16, 64, 250, 1024]),
                  st.booleans())  # fmt: skip


@st.composite
def disjoint_copies(draw: st.DrawFn) -> Copies:
    """Ranges that lie within regions on both sides and do not overlap in the target; some continue the one before."""
    ranges: list[tuple[int, int, int]] = []
    starts = np.cumsum((0, *SIZES)).tolist()
    free = starts[:-1]
    for origin, into, start, gap, nbytes, follows in draw(st.lists(DRAWN, max_size=12)):
        at, begin = free[into] + gap * 16, starts[origin] + start % (SIZES[origin] - nbytes + 1)
        if follows and ranges:
            at, begin = ranges[-1][1] + ranges[-1][2], ranges[-1][0] + ranges[-1][2]
            into, origin = (int(np.searchsorted(starts, side, side="right")) - 1 for side in (at, begin))
        inside = max(into, origin) < len(SIZES) and at + nbytes <= starts[into + 1]
        if inside and begin + nbytes <= starts[origin + 1] and at >= free[into]:
            ranges.append((begin, at, nbytes))
            free[into] = at + nbytes
    return copies_of(ranges)


@given(disjoint_copies(), st.booleans(), st.integers(1, 5), st.integers(7, 700))
def test_a_plan_merged_and_cut_in_any_way_copies_the_same_bytes(
    copies: Copies, merged: bool, ranges_max: int, bytes_max: int
) -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    ranges = plan(copies, source.space, target.space, merged)
    assert ranges.total == copies.total
    parts = list(cut(ranges, ranges_max, bytes_max))
    for part in parts:
        assert 1 <= len(part.nbytes) <= ranges_max and part.total <= bytes_max
        copy_by_memmove(part)
    assert (target.bytes == expected(source.bytes, copies)).all()


def test_neighbours_become_one_range_unless_a_border_lies_between() -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    neighbours = copies_of([(100, 600, 50), (0, 500, 100), (150, 650, 10)])
    assert plan(neighbours, source.space, target.space).nbytes.tolist() == [160]
    assert plan(neighbours, source.space, target.space, merged=False).nbytes.tolist() == [50, 100, 10]
    apart_in_target = copies_of([(0, 500, 100), (100, 601, 50)])
    assert plan(apart_in_target, source.space, target.space).nbytes.tolist() == [100, 50]

    # Two regions may be neighbours in memory too; a merged range would belong to neither.
    memory = np.zeros(200, np.uint8)
    halves = Space([(memory.ctypes.data, 100), (memory.ctypes.data + 100, 100)])
    across = plan(copies_of([(50, 50, 50), (100, 100, 50)]), halves, halves)
    assert across.nbytes.tolist() == [50, 50]


def test_an_empty_plan_is_a_plan() -> None:
    space = Memory(seed=None).space
    nothing = plan(copies_of([]), space, space)
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
        plan(copies_of(ranges), space, space)
    assert complaint in str(caught.value)


def test_arrays_of_another_form_are_refused() -> None:
    space = Memory(seed=None).space
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(BadRange, match="differ in length: 1, 2, 1"):
        plan(Copies(one, two, one), space, space)
    with pytest.raises(BadRange, match="int64"):
        plan(Copies(one, one, one.astype(np.float64)), space, space)
    with pytest.raises(BadRange, match="the target has registered no memory"):
        plan(Copies(one, one, one + 1), space, Space([]))


def test_pages_of_one_size_have_numbers_in_a_list_of_whole_regions() -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    pages = plan(copies_of([(512, 0, 512), (4096, 5120, 512)]), source.space, target.space, merged=False)
    assert uniform_bytes(pages, source.space, target.space) == 512
    cells = grid(target.space, 512)  # 8 cells, 2 cells, 5 cells and a rest that is no cell
    assert len(cells.addresses) == 15
    numbers = cells.cells(target.space, pages.target, pages.target_region)
    assert numbers.tolist() == [0, 10]
    assert (cells.addresses[numbers] == pages.target).all()

    for crooked in ([(512, 0, 512), (0, 600, 512)], [(512, 0, 512), (0, 512, 256)]):
        made = plan(copies_of(crooked), source.space, target.space, merged=False)
        assert uniform_bytes(made, source.space, target.space) is None


# --- what a kernel is told --------------------------------------------------------------------------


def carry_out(table: np.ndarray, unit: int, source: int, target: int) -> None:
    """Program by program, as the kernel does."""
    starts, ends, counts = (table * unit).tolist()
    nowhere = np.zeros(len(starts), np.int64)
    ranges = np.array(starts) + source, np.array(ends) + target, np.array(counts)
    copy_by_memmove(Plan(*ranges, nowhere, nowhere))


@given(disjoint_copies())
def test_a_table_says_the_same_as_its_plan(copies: Copies) -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    ranges = plan(copies, source.space, target.space)
    if not len(ranges.nbytes):
        return
    # Offsets count from the second region: those of the others may be negative.
    bases = source.regions[1].ctypes.data, target.regions[1].ctypes.data
    table, unit = tables_of(ranges, *bases)
    assert table.dtype == np.int64 and table.shape[0] == 3
    carry_out(table, unit, *bases)
    assert (target.bytes == expected(source.bytes, copies)).all()


def test_bytes_move_in_vectors_of_16_only_where_everything_is_aligned() -> None:
    nowhere = np.zeros(1, np.int64)

    def unit(source: int, target: int, nbytes: int, base: int = 4096) -> int:
        ranges = Plan(np.array([source]), np.array([target]), np.array([nbytes]), nowhere, nowhere)
        return tables_of(ranges, base, 8192)[1]

    assert unit(4096, 8192 + 160, 4096) == UNIT_BYTES
    assert unit(4096 - 64, 8192, 16) == UNIT_BYTES
    assert [unit(4097, 8192, 16), unit(4096, 8200, 16), unit(4096, 8192, 24), unit(4104, 8192, 16, base=4104)] == [
        1
    ] * 4


def test_a_long_range_becomes_many_programs() -> None:
    nowhere = np.zeros(1, np.int64)
    ranges = Plan(np.array([0]), np.array([0]), np.array([512 << 20]), nowhere, nowhere)
    table, unit = tables_of(ranges, 0, 0)
    assert table.shape[1] == (512 << 20) // (64 << 10)
    assert table[2].sum() * unit == 512 << 20


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@given(disjoint_copies())
def test_torch_copies_the_same_without_a_kernel(copies: Copies) -> None:
    import torch

    source, target = Memory(seed=1), Memory(seed=None)
    ranges = plan(copies, source.space, target.space)
    sides = [
        {place: torch.from_numpy(region) for place, region in enumerate(side.regions)} for side in (source, target)
    ]
    copy_by_torch(ranges, *sides)
    assert (target.bytes == expected(source.bytes, copies)).all()


INTERPRETED = """
import numpy as np, torch
from kvpoll.runtime.transports.gather_scatter import Space, plan
from kvpoll.runtime.transports.gather_scatter_kernel import launch
from kvpoll.runtime.transports.interface import Copies

torch.manual_seed(0)
for unaligned in (0, 5):
    source = [torch.randint(1, 256, (n,), dtype=torch.uint8) for n in (65536, 131072, 4096)]
    target = [torch.zeros(n, dtype=torch.uint8) for n in (131072, 65536)]
    spaces = [Space([(t.data_ptr(), t.numel()) for t in side]) for side in (source, target)]
    ranges = np.array([(0, 131072, 65536), (65536, 16, 48), (196608, 32768 + unaligned, 4096), (4096, 70000, 96)]).T
    copies = Copies(*(np.ascontiguousarray(column) for column in ranges))
    launch(plan(copies, *spaces), source[1], target[1])  # offsets of the other regions are relative to these
    given, wanted = torch.cat(source), torch.zeros(131072 + 65536, dtype=torch.uint8)
    for start, end, nbytes in zip(*copies):
        wanted[end : end + nbytes] = given[start : start + nbytes]
    assert torch.equal(torch.cat(target), wanted), unaligned
print("right")
"""


def test_the_kernel_indexes_rightly_in_tritons_interpreter() -> None:
    """The real kernel on CPU tensors: no GPU executes it here, but its indexing is the one that a GPU would do."""
    python = os.environ.get("KVPOLL_ENGINE_PYTHON") or sys.executable
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": source}
    told = subprocess.run(
        [python, "-P", "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if "ModuleNotFoundError" in told.stderr:
        pytest.skip(f"{python}: {told.stderr.strip().splitlines()[-1]}")
    assert told.stdout == "right\n", told.stderr[-2000:]
