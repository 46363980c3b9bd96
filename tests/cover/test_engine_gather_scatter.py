"""What a copy kernel is told, and that it copies what the plan says, with and without a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from copied_memory import Memory, disjoint_copies, expected
from hypothesis import given

from kvpoll.runtime.transports.copy_plan import Plan, plan_of
from kvpoll.runtime.transports.gather_scatter_tables import UNIT_BYTES, copy_by_memmove, copy_by_torch, tables_of
from kvpoll.runtime.transports.interface import Copies


def carry_out(table: np.ndarray, unit: int, source: int, target: int) -> None:
    """Program by program, as the kernel does."""
    starts, ends, counts = (table * unit).tolist()
    nowhere = np.zeros(len(starts), np.int64)
    ranges = np.array(starts) + source, np.array(ends) + target, np.array(counts)
    copy_by_memmove(Plan(*ranges, nowhere, nowhere))


@given(disjoint_copies())
def test_a_table_says_the_same_as_its_plan(copies: Copies) -> None:
    source, target = Memory(seed=1), Memory(seed=None)
    ranges = plan_of(copies, source.space, target.space)
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
    ranges = plan_of(copies, source.space, target.space)
    sides = [
        {place: torch.from_numpy(region) for place, region in enumerate(side.regions)} for side in (source, target)
    ]
    copy_by_torch(ranges, *sides)
    assert (target.bytes == expected(source.bytes, copies)).all()


INTERPRETED = """
import numpy as np, torch
from kvpoll.runtime.transports.copy_plan import plan_of
from kvpoll.runtime.transports.gather_scatter_kernel import launch
from kvpoll.runtime.transports.interface import Copies
from kvpoll.runtime.transports.offsets import Space

torch.manual_seed(0)
for unaligned in (0, 5):
    source = [torch.randint(1, 256, (n,), dtype=torch.uint8) for n in (65536, 131072, 4096)]
    target = [torch.zeros(n, dtype=torch.uint8) for n in (131072, 65536)]
    spaces = [Space([t.numel() for t in side], [t.data_ptr() for t in side]) for side in (source, target)]
    ranges = np.array([(0, 131072, 65536), (65536, 16, 48), (196608, 32768 + unaligned, 4096), (4096, 70000, 96)]).T
    copies = Copies(*(np.ascontiguousarray(column) for column in ranges))
    launch(plan_of(copies, *spaces), source[1], target[1])  # offsets of the other regions are relative to these
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
