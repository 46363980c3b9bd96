"""From copies in offset spaces to ranges at addresses: checked, merged and cut, without a loop over pages.

Engines and kernels want addresses; the protocol speaks of offsets (``interface.py``). Here every range is checked
against the regions that were registered, because not every engine does: Mooncake over tcp accepts a local address
that nobody registered and sends whatever lies there (ENGINES 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import Copies

Integers = NDArray[np.int64]


class BadRange(ValueError):
    """A copy that may not be made. The message is one line and names the first such range."""


class Plan(NamedTuple):
    """Ranges at addresses: five int64 arrays of one length n.

    source, target: addresses of the first byte. nbytes: lengths, above 0. source_region, target_region: places of the
    regions, in the order in which each side registered them; no range leaves its region.
    """

    source: Integers
    target: Integers
    nbytes: Integers
    source_region: Integers
    target_region: Integers

    @property
    def total(self) -> int:
        """Bytes of all ranges together."""
        return int(self.nbytes.sum())

    def pick(self, which: slice | Integers) -> Plan:
        """These ranges only, in this order."""
        return Plan(*(column[which] for column in self))


class Space:
    """The offset space of one process: its regions as (address, nbytes), end to end in the order registered."""

    def __init__(self, regions: Sequence[tuple[int, int]]) -> None:
        self.addresses = np.array([address for address, _ in regions], np.int64)
        self.sizes = np.array([nbytes for _, nbytes in regions], np.int64)
        self.ends = np.cumsum(self.sizes)
        self.starts = self.ends - self.sizes

    @property
    def total(self) -> int:
        """Length of the offset space in bytes."""
        return int(self.sizes.sum())

    def locate(self, side: str, offsets: Integers, nbytes: Integers) -> tuple[Integers, Integers]:
        """Region and address of each range. Raises BadRange for one that no region holds whole."""
        if len(self.sizes) == 0:
            raise BadRange(f"the {side} has registered no memory")
        region = np.searchsorted(self.ends, offsets, side="right")
        known = np.minimum(region, len(self.sizes) - 1)
        # Compared by subtraction: offset + nbytes could overflow.
        outside = (offsets < 0) | (region != known) | (nbytes > self.ends[known] - offsets)
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            raise BadRange(
                f"range {first} of the {side} ({int(nbytes[first])} bytes at offset {int(offsets[first])}) is in no "
                f"registered region ({len(self.sizes)} regions, {self.total} bytes)"
            )
        return known.astype(np.int64), self.addresses[known] + offsets - self.starts[known]


def plan(copies: Copies, source: Space, target: Space, merged: bool = True) -> Plan:
    """The ranges of a write, adjacent ones ``merged`` into one. Raises BadRange; checks everything before."""
    given = [np.asarray(column) for column in copies]
    if any(column.ndim != 1 or column.dtype != np.int64 for column in given):
        raise BadRange("source, target and nbytes must be int64 arrays of one dimension")
    starts, ends, nbytes = given
    if not len(starts) == len(ends) == len(nbytes):
        raise BadRange(f"source, target and nbytes differ in length: {len(starts)}, {len(ends)}, {len(nbytes)}")
    if len(nbytes) == 0:
        empty = np.empty(0, np.int64)
        return Plan(empty, empty, empty, empty, empty)
    if nbytes.min() <= 0:
        first = int(np.flatnonzero(nbytes <= 0)[0])
        raise BadRange(f"range {first} has {int(nbytes[first])} bytes; each must have 1 or more")
    source_region, source_address = source.locate("source", starts, nbytes)
    target_region, target_address = target.locate("target", ends, nbytes)
    made = Plan(source_address, target_address, nbytes, source_region, target_region)
    return merge(made) if merged else made


def merge(ranges: Plan) -> Plan:
    """Ranges that follow each other in both memories become one; sorted by source address."""
    if len(ranges.nbytes) < 2:
        return ranges
    ordered = ranges.pick(np.argsort(ranges.source, kind="stable"))
    joined = np.ones(len(ordered.nbytes) - 1, bool)
    for address, region in (
        (ordered.source, ordered.source_region),
        (ordered.target, ordered.target_region),
    ):
        joined &= (address[:-1] + ordered.nbytes[:-1] == address[1:]) & (region[:-1] == region[1:])
    firsts = np.flatnonzero(np.concatenate(([True], ~joined)))
    return ordered.pick(firsts)._replace(nbytes=np.add.reduceat(ordered.nbytes, firsts))


def split(ranges: Plan, bytes_max: int) -> Plan:
    """No range longer than ``bytes_max``: longer ones are divided."""
    pieces = -(-ranges.nbytes // bytes_max)
    if len(pieces) == 0 or pieces.max() == 1:
        return ranges
    repeated = ranges.pick(np.repeat(np.arange(len(pieces)), pieces))
    number = np.arange(len(repeated.nbytes)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    skipped = number * bytes_max
    return repeated._replace(
        source=repeated.source + skipped,
        target=repeated.target + skipped,
        nbytes=np.minimum(repeated.nbytes - skipped, bytes_max),
    )


def cut(ranges: Plan, ranges_max: int, bytes_max: int) -> Iterator[Plan]:
    """Parts of at most ``ranges_max`` ranges and ``bytes_max`` bytes, long ranges divided."""
    pieces = split(ranges, bytes_max)
    ends = np.cumsum(pieces.nbytes)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        fits = int(np.searchsorted(ends, before + bytes_max, side="right"))
        last = max(first + 1, min(first + ranges_max, fits))
        yield pieces.pick(slice(first, last))
        first = last


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
