"""Memory in several regions, random copies between them, and the slow, obvious way to carry them out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from hypothesis import strategies as st

from kvpoll.runtime.transports.interface import Copies
from kvpoll.runtime.transports.offsets import Space

SIZES = (4096, 1024, 3000)
WHOLE = sum(SIZES)


class Memory:
    """Regions of ``SIZES`` in one allocation each, in an order that is not that of their addresses."""

    def __init__(self, seed: int | None) -> None:
        chance = np.random.default_rng(seed)
        self.regions = [
            np.zeros(size, np.uint8) if seed is None else chance.integers(1, 256, size, np.uint8) for size in SIZES
        ]
        self.space = Space(SIZES, [region.ctypes.data for region in self.regions])

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
