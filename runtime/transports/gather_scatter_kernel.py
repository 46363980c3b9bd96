"""One launch that copies any number of ranges between two memories of a GPU.

One program copies one piece: offsets and length come from an int64 table on the device, bytes move in vectors of 16
where everything is aligned to 16, else one by one. Long ranges are divided first, so that programs are alike.
The indexing runs on CPU tensors too, under ``TRITON_INTERPRET=1``; that is how it is tested without a GPU.
"""

# Triton comes without types, and only with CUDA builds of torch.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, misc, unused-ignore"

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped]
import triton.language as tl  # type: ignore[import-not-found,import-untyped]

from kvpoll.runtime.transports.copy_plan import Plan
from kvpoll.runtime.transports.gather_scatter_tables import UNIT_BYTES, tables_of

BLOCK = 2048
"""Elements of one step of a program: 8 KiB as int32, 16 vectors of 16 bytes for each of 32 lanes."""


@triton.jit
def copy_pieces(source, target, tables, pieces, PER_UNIT: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # noqa: N803
    """Program i copies piece i. tables: int64 [3, pieces] of source, target and length, in units.

    source, target: pointers to int32 (PER_UNIT 4, units of 16 bytes) or to uint8 (PER_UNIT 1). That offsets are
    multiplied by a constant here, and not before, is what tells the compiler that vectors are aligned.
    """
    piece = tl.program_id(0)
    first_source = tl.load(tables + piece) * PER_UNIT
    first_target = tl.load(tables + pieces + piece) * PER_UNIT
    count = tl.load(tables + 2 * pieces + piece) * PER_UNIT
    lanes = tl.arange(0, BLOCK_SIZE)
    for first in range(0, count, BLOCK_SIZE):
        at = first + lanes
        inside = at < count
        value = tl.load(source + first_source + at, mask=inside)
        tl.store(target + first_target + at, value, mask=inside)


def launch(ranges: Plan, source: torch.Tensor, target: torch.Tensor) -> Any:
    """Copy ``ranges`` on the current stream. Returns what must stay alive until the copy has ended.

    source, target: uint8 tensors from whose first bytes the offsets are counted; ``ranges`` holds addresses.
    """
    tables, unit = tables_of(ranges, source.data_ptr(), target.data_ptr())
    pieces = tables.shape[1]
    staged = torch.from_numpy(tables)
    if source.is_cuda:
        staged = staged.pin_memory()
    on_device = staged.to(source.device, non_blocking=True)
    if unit == UNIT_BYTES:
        source, target = (side[: side.numel() // 4 * 4].view(torch.int32) for side in (source, target))
    copy_pieces[(pieces,)](source, target, on_device, pieces, PER_UNIT=4 if unit == UNIT_BYTES else 1, BLOCK_SIZE=BLOCK)
    return staged, on_device
