"""The set of states that were seen, by 64-bit hash, with a number for each.

Two states with the same hash would be taken for one. With n states the chance of that is about n^2 / 2^65: one in
three hundred thousand for ten million states. ``kvpoll check`` compares the whole set with TLC's on smaller models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]


class Visited:
    """An open-addressed hash table in two numpy arrays, filled many states at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._keys: Hashes = np.zeros(1 << 16, np.uint64)
        self._numbers: npt.NDArray[np.int32] = np.zeros(1 << 16, np.int32)

    def bytes(self) -> int:
        """Memory it holds."""
        return int(self._keys.nbytes + self._numbers.nbytes)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What it holds, for a checkpoint."""
        return {"visited_keys": self._keys, "visited_numbers": self._numbers}

    def restore(self, arrays: dict[str, npt.NDArray[Any]], count: int) -> None:
        """Hold what a checkpoint held."""
        self._keys, self._numbers, self.count = arrays["visited_keys"], arrays["visited_numbers"], count

    def add(self, hashes: Hashes) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Numbers of these distinct hashes, and which of them are new. New ones are numbered in their order."""
        self._make_room(len(hashes))
        hashes = np.where(hashes == 0, np.uint64(1), hashes)
        slots, fresh = self._claim(hashes)
        news = np.flatnonzero(fresh)
        self._numbers[slots[news]] = np.arange(self.count, self.count + len(news), dtype=np.int32)
        self.count += len(news)
        return self._numbers[slots], fresh

    def _claim(self, hashes: Hashes) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """The slot of each hash; an empty one is taken by the first that finds it."""
        mask = np.uint64(len(self._keys) - 1)
        slots = (hashes & mask).astype(np.int64)
        fresh = np.zeros(len(hashes), np.bool_)
        pending = np.arange(len(hashes))
        while pending.size:
            slot, key = slots[pending], hashes[pending]
            found = self._keys[slot]
            empty = found == 0
            self._keys[slot[empty]] = key[empty]
            won = self._keys[slot] == key
            fresh[pending[won & empty]] = True
            pending = pending[~won]
            slots[pending] = (slots[pending] + 1) & int(mask)
        return slots, fresh

    def _make_room(self, more: int) -> None:
        """Keep the table at most half full."""
        wanted = len(self._keys)
        while (self.count + more) * 2 > wanted:
            wanted *= 2
        if wanted == len(self._keys):
            return
        taken = self._keys != 0
        keys, numbers = self._keys[taken], self._numbers[taken]
        self._keys, self._numbers = np.zeros(wanted, np.uint64), np.zeros(wanted, np.int32)
        slots, _ = self._claim(keys)
        self._numbers[slots] = numbers
