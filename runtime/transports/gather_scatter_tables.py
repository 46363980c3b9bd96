"""What a copy kernel is told, and the same copy without one: by torch, or by memmove on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from kvpoll.runtime.transports.copy_plan import Plan, split
from kvpoll.runtime.transports.offsets import Integers

if TYPE_CHECKING:
    import torch

UNIT_BYTES: Final = 16
PIECE_BYTES_MAX: Final = 64 << 10
PIECE_BYTES_MIN: Final = 4 << 10
PIECES_WANTED: Final = 2048
"""Enough programs for every processor of a large GPU to have several."""


def tables_of(ranges: Plan, source: int, target: int) -> tuple[Integers, int]:
    """int64 [3, n]: source offset, target offset and length of n pieces, in units of the bytes returned (16 or 1).

    source, target: the addresses from which offsets are counted; those of regions that lie below are negative.
    """
    wanted = ranges.total // PIECES_WANTED // PIECE_BYTES_MIN * PIECE_BYTES_MIN
    pieces = split(ranges, min(PIECE_BYTES_MAX, max(PIECE_BYTES_MIN, wanted)))
    table = np.stack([pieces.source - source, pieces.target - target, pieces.nbytes])
    aligned = not ((table % UNIT_BYTES).any() or source % UNIT_BYTES or target % UNIT_BYTES)
    return (table // UNIT_BYTES, UNIT_BYTES) if aligned else (table, 1)


def copy_by_torch(ranges: Plan, sources: Mapping[int, torch.Tensor], targets: Mapping[int, torch.Tensor]) -> None:
    """The same copies without a kernel of ours: pages of one size by index, anything else range by range.

    sources, targets: uint8 tensors of the regions, by their place.
    """
    pairs = np.unique(np.stack([ranges.source_region, ranges.target_region]), axis=1).T
    for from_region, into_region in pairs.tolist():
        chosen = np.flatnonzero((ranges.source_region == from_region) & (ranges.target_region == into_region))
        part = ranges.pick(chosen)
        source, target = sources[from_region], targets[into_region]
        starts, ends = part.source - source.data_ptr(), part.target - target.data_ptr()
        size = int(part.nbytes[0])
        if len(chosen) > 1 and not ((part.nbytes != size).any() or (starts % size).any() or (ends % size).any()):
            _copy_pages(source, target, starts // size, ends // size, size)
            continue
        for start, end, nbytes in zip(starts.tolist(), ends.tolist(), part.nbytes.tolist(), strict=True):
            target[end : end + nbytes].copy_(source[start : start + nbytes], non_blocking=True)


def _copy_pages(source: torch.Tensor, target: torch.Tensor, starts: Integers, ends: Integers, size: int) -> None:
    import torch

    def pages(side: torch.Tensor) -> torch.Tensor:
        return side[: side.numel() // size * size].view(-1, size)

    def numbers(which: Integers) -> torch.Tensor:
        return torch.from_numpy(which).to(source.device)

    pages(target).index_copy_(0, numbers(ends), pages(source).index_select(0, numbers(starts)))


def copy_by_memmove(ranges: Plan) -> None:
    """The same copies in host memory."""
    for source, target, nbytes in zip(
        ranges.source.tolist(), ranges.target.tolist(), ranges.nbytes.tolist(), strict=True
    ):
        ctypes.memmove(target, source, nbytes)
