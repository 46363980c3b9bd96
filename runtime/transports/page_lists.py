"""Pages of one size, numbered through all regions of a space: what an engine that prepares lists of pages wants."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.copy_plan import Plan
from kvpoll.runtime.transports.offsets import Integers, Space


def uniform_bytes(ranges: Plan, source: Space, target: Space) -> int | None:
    """The one length of all ranges, if each also starts at a multiple of it in its region; else None."""
    if len(ranges.nbytes) == 0:
        return None
    size = int(ranges.nbytes[0])
    if (ranges.nbytes != size).any():
        return None
    for space, address, region in (
        (source, ranges.source, ranges.source_region),
        (target, ranges.target, ranges.target_region),
    ):
        if ((address - space.addresses[region]) % size).any():
            return None
    return size


class Grid(NamedTuple):
    """All regions of a space as cells of one size: address of each cell, and each region's first cell. int64."""

    addresses: Integers
    firsts: Integers
    size: int

    def cells(self, space: Space, address: Integers, region: Integers) -> NDArray[np.int32]:
        """Numbers of the cells that ranges of one cell each occupy."""
        return (self.firsts[region] + (address - space.addresses[region]) // self.size).astype(np.int32)


def grid(space: Space, size: int) -> Grid:
    """Cells of ``size`` bytes; what is left at the end of a region belongs to none."""
    counts = space.sizes // size
    firsts = np.cumsum(counts) - counts
    inside = np.arange(int(counts.sum())) - np.repeat(firsts, counts)
    return Grid(np.repeat(space.addresses, counts) + inside * size, firsts, size)
