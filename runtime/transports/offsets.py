"""The offset space of a process's regions, and copy plans: which bytes go where, in which pieces.

Everything here is arithmetic on whole arrays; a post of 8192 pages costs well under a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import Copies, Offsets

Words = NDArray[np.int64]


class Refused(ValueError):
    """Copies that no transport may perform: the message says which range and why."""


class Space:
    """Regions laid end to end: ``sizes[i]`` bytes each, found at ``addresses[i]`` (zeros when only sizes matter)."""

    def __init__(self, sizes: Sequence[int], addresses: Sequence[int] | None = None) -> None:
        ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.starts: Words = ends - np.asarray(sizes, dtype=np.int64)
        self.ends: Words = ends
        self.sizes = list(sizes)
        self._shift: Words = np.asarray(addresses or [0] * len(sizes), dtype=np.int64) - self.starts

    @property
    def total(self) -> int:
        """Bytes of all regions together."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def regions_of(self, offsets: Offsets, nbytes: Offsets, whose: str) -> Words:
        """Index of the region of each range, int64[n]. Raises Refused for a range outside or across a border."""
        region = np.searchsorted(self.starts, offsets, side="right") - 1
        # offsets <= end - nbytes instead of offsets + nbytes <= end: a hostile sum must not wrap around.
        good = (nbytes > 0) & (offsets >= 0) & (region >= 0) & (offsets <= self.ends[region] - nbytes)
        if not good.all():
            first = int(np.argmin(good))
            raise Refused(
                f"range {first} ({int(nbytes[first])} bytes at offset {int(offsets[first])}) is not within one region "
                f"of the {whose} ({len(self.sizes)} regions, {self.total} bytes)"
            )
        return region

    def addresses_of(self, offsets: Offsets, regions: Words) -> Words:
        """Addresses of offsets that lie in these regions, int64[n]."""
        return offsets + self._shift[regions]


class Plan(NamedTuple):
    """Checked ranges, merged where neighbours continue each other on both sides: four int64 arrays of one length.

    source: addresses in the writer. target: offsets in the owner's space. region: the owner's region of each.
    """

    source: Words
    target: Words
    nbytes: Words
    region: Words

    @property
    def total(self) -> int:
        """Bytes of all ranges together."""
        return int(self.nbytes.sum())

    def pieces(self, bytes_most: int, ranges_most: int) -> Iterator[Plan]:
        """The plan in pieces of at most ``bytes_most`` bytes (longer ranges are cut) and ``ranges_most`` ranges."""
        step = max(1, bytes_most // 4)
        cut = _cut(self, step)
        if not len(cut.nbytes):
            return
        # A piece begins where the running total enters a new slot of three quarters of the limit; the range that
        # sticks out of its slot is at most a quarter long, so no piece is longer than the limit.
        slot = (np.cumsum(cut.nbytes) - cut.nbytes) // max(1, bytes_most - step)
        edges = np.flatnonzero(slot[1:] != slot[:-1]) + 1
        bounds = np.union1d(edges, np.arange(0, len(slot) + ranges_most, ranges_most).clip(max=len(slot)))
        for begin, end in pairwise(bounds.tolist()):
            yield Plan(*(column[begin:end] for column in cut))


def plan_of(copies: Copies, source: Space, target: Space) -> Plan:
    """The checked and merged plan of these copies. Raises Refused, and then nothing of them may be performed."""
    columns = [np.asarray(column) for column in copies]
    if any(column.ndim != 1 or column.dtype.kind not in "iu" for column in columns):
        raise Refused("copies are three one-dimensional integer arrays: source, target, nbytes")
    begin, to, nbytes = (np.ascontiguousarray(column, dtype=np.int64) for column in columns)
    if not len(begin) == len(to) == len(nbytes):
        raise Refused(f"copies have {len(begin)} sources, {len(to)} targets and {len(nbytes)} lengths")
    from_region = source.regions_of(begin, nbytes, "writer")
    to_region = target.regions_of(to, nbytes, "owner")
    address = source.addresses_of(begin, from_region)
    follows = (
        (begin[1:] == begin[:-1] + nbytes[:-1])
        & (to[1:] == to[:-1] + nbytes[:-1])
        & (from_region[1:] == from_region[:-1])
        & (to_region[1:] == to_region[:-1])
    )
    if not follows.any():
        return Plan(address, to, nbytes, to_region)
    heads = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    return Plan(address[heads], to[heads], np.add.reduceat(nbytes, heads), to_region[heads])


def _cut(plan: Plan, step: int) -> Plan:
    """The plan with no range longer than ``step``."""
    counts = -(-plan.nbytes // step)
    if not (counts > 1).any():
        return plan
    first = np.repeat(np.cumsum(counts) - counts, counts)
    shift = (np.arange(int(counts.sum())) - first) * step
    source, target, nbytes, region = (np.repeat(column, counts) for column in plan)
    return Plan(source + shift, target + shift, np.minimum(step, nbytes - shift), region)
