"""The offset space of a process: its regions laid end to end, and which bytes of them lie where.

The protocol speaks of offsets (``interface.py``); engines and kernels want addresses. Everything here is arithmetic on
whole arrays, without a loop over pages.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import Copies, Offsets, Region

Integers = NDArray[np.int64]


class BadRange(ValueError):
    """A copy that may not be made. The message is one line and names the first such range."""


class Space:
    """Regions of ``sizes[i]`` bytes at ``addresses[i]``, end to end in the order registered.

    Where the memory lies in another process, its offsets stand for addresses: ``addresses`` are then the first offsets.
    """

    def __init__(self, sizes: Sequence[int], addresses: Sequence[int] | None = None) -> None:
        self.sizes: Integers = np.array(sizes, np.int64)
        self.ends: Integers = np.cumsum(self.sizes)
        self.starts: Integers = self.ends - self.sizes
        self.addresses: Integers = self.starts if addresses is None else np.array(addresses, np.int64)
        self._starts: list[int] = self.starts.tolist()
        self._ends: list[int] = self.ends.tolist()
        self._shifts: list[int] = (self.addresses - self.starts).tolist()

    @classmethod
    def of(cls, regions: Sequence[Region]) -> Space:
        """The space of memory that this process has."""
        return cls([region.nbytes for region in regions], [region.address for region in regions])

    @property
    def total(self) -> int:
        """Length of the offset space in bytes."""
        return int(self.sizes.sum())

    def regions_of(self, side: Literal["source", "target"], offsets: Offsets, nbytes: Integers) -> Integers:
        """Place of the region of each range, int64[n]. Raises BadRange for one that no region holds whole."""
        if len(self.sizes) == 0:
            raise BadRange(f"the {side} has registered no memory")
        empty = nbytes <= 0
        if empty.any():
            first = int(np.argmax(empty))
            raise BadRange(f"range {first} has {int(nbytes[first])} bytes; each must have 1 or more")
        region = np.searchsorted(self.starts, offsets, side="right") - 1
        # Compared by subtraction: offset + nbytes could overflow.
        outside = (offsets < 0) | (offsets > self.ends[region] - nbytes)
        if outside.any():
            first = int(np.argmax(outside))
            raise BadRange(
                f"range {first} of the {side} ({int(nbytes[first])} bytes at offset {int(offsets[first])}) is in no "
                f"registered region ({len(self.sizes)} regions, {self.total} bytes)"
            )
        return region

    def moves(self, copies: Copies, target: Space) -> list[tuple[int, int, int]] | None:
        """(target address, source address, bytes) of each range, or None when a region of the two spaces does not hold
        it whole: what ``regions_of`` and ``addresses_of`` say of arrays, of a few ranges.
        """
        found = []
        for source, to, nbytes in zip(*(column.tolist() for column in copies), strict=True):
            here, there = bisect_right(self._starts, source) - 1, bisect_right(target._starts, to) - 1
            if here < 0 or there < 0 or nbytes <= 0:
                return None
            if source + nbytes > self._ends[here] or to + nbytes > target._ends[there]:
                return None
            found.append((to + target._shifts[there], source + self._shifts[here], nbytes))
        return found

    def addresses_of(self, offsets: Offsets, regions: Integers) -> Integers:
        """Addresses of offsets that lie in these regions, int64[n]."""
        return offsets + (self.addresses - self.starts)[regions]
