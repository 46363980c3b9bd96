"""Copy plans: the ranges of a write, checked, merged and cut, without a loop over pages.

Every range is checked against the regions that were registered, because not every engine does: Mooncake over tcp
accepts a local address that nobody registered and sends whatever lies there (ENGINES 4). A plan of 8192 pages costs
well under a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvpoll.runtime.transports.interface import Copies
from kvpoll.runtime.transports.offsets import BadRange, Integers, Space


class Plan(NamedTuple):
    """Ranges at addresses: five int64 arrays of one length n.

    source, target: addresses of the first byte, as the two spaces say (``Space``: offsets may stand for them). nbytes:
    lengths, above 0. source_region, target_region: places of the regions, in the order in which each side registered
    them; no range leaves its region.
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


def plan_of(copies: Copies, source: Space, target: Space, merged: bool = True) -> Plan:
    """The ranges of a write, adjacent ones ``merged`` into one. Raises BadRange: then none may be copied."""
    columns = [np.asarray(column) for column in copies]
    if any(column.ndim != 1 or column.dtype.kind not in "iu" for column in columns):
        raise BadRange("source, target and nbytes must be integer arrays of one dimension")
    starts, ends, nbytes = (np.ascontiguousarray(column, np.int64) for column in columns)
    if not len(starts) == len(ends) == len(nbytes):
        raise BadRange(f"source, target and nbytes differ in length: {len(starts)}, {len(ends)}, {len(nbytes)}")
    if len(nbytes) == 0:
        return Plan(starts, ends, nbytes, nbytes, nbytes)
    source_region = source.regions_of("source", starts, nbytes)
    target_region = target.regions_of("target", ends, nbytes)
    made = Plan(
        source.addresses_of(starts, source_region), target.addresses_of(ends, target_region), nbytes,
        source_region, target_region,
    )  # fmt: skip
    return merge(made) if merged and len(nbytes) > 1 else made


def merge(ranges: Plan) -> Plan:
    """Ranges that follow each other in both memories become one, in order of source addresses.

    Where no two follow each other, all keep the order in which they were posted.
    """
    order = np.argsort(ranges.source)
    source, target, nbytes = ranges.source[order], ranges.target[order], ranges.nbytes[order]
    follows = (source[:-1] + nbytes[:-1] == source[1:]) & (target[:-1] + nbytes[:-1] == target[1:])
    if not follows.any():  # scattered pages: nothing more to do
        return ranges
    ordered = ranges.pick(order)
    for region in (ordered.source_region, ordered.target_region):
        follows &= region[:-1] == region[1:]
    firsts = np.flatnonzero(np.concatenate(([True], ~follows)))
    return ordered.pick(firsts)._replace(nbytes=np.add.reduceat(nbytes, firsts))


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
    """Parts of at most ``ranges_max`` ranges and ``bytes_max`` bytes, long ranges divided. No part is empty."""
    pieces = split(ranges, bytes_max)
    ends = np.cumsum(pieces.nbytes)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        fits = int(np.searchsorted(ends, before + bytes_max, side="right"))
        last = max(first + 1, min(first + ranges_max, fits))
        yield pieces.pick(slice(first, last))
        first = last
