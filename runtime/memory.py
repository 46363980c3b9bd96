"""The pages of one rank: who holds them (``Pool``), and what really is in them.

What a page holds is read from its bytes. The simulator's pool remembers what was placed in a page; this one looks, so
that S5 judges memory and not book-keeping. It can because pages are filled with a pattern that says whose they are
(``pools.pattern``), as ``kvpoll run --real`` and ``kvpoll up`` do.
"""

from __future__ import annotations

from typing import Any

from kvpoll.runtime.pools import aux_row, pattern
from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.spec.trace import PageTag, Pair
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.ranks.pool import Pool


class PatternPool(Pool):
    """A pool of pages that are filled with a pattern when they are computed, and read when they are committed.

    sources: layouts of the prefill ranks, by the part of their names that follows the replica ("pp0/tp1").
    bytes_verified: bytes of the pages that were read so far and whose every byte is what some rank wrote.
    """

    def __init__(self, host: Any, node: str, memory: KVPool, sources: dict[str, Layout]) -> None:
        super().__init__(host, node, "kv", memory.layout.pages)
        self.memory = memory
        self.sources = sources
        self.bytes_verified = 0
        self._page_bytes = memory.layout.page_bytes * len(memory.layout.planes)

    def computed(
        self, incarnation: Incarnation, component: str, chunk: int, first: int, pages: tuple[int, ...]
    ) -> None:
        """The forward pass has filled these pages, the prompt's from ``first`` on."""
        for part, page in enumerate(pages, first):
            pattern.fill(self.memory, page, PageTag(incarnation.pair, component, part, chunk))

    def read(self, page: int, components: tuple[str, ...]) -> dict[str, PageTag]:
        """What the page's bytes say of each component's share."""
        found = pattern.read(self.memory, page, {name: self.sources[place(name)] for name in components})
        if found and not any(map(pattern.is_corrupt, found.values())):
            self.bytes_verified += self._page_bytes
        return found


def place(node: str) -> str:
    """Where a rank stands in its replica: "pp0/tp1" for ``P0/dp1/pp0/tp1``, "" for ``P0``."""
    return "/".join(part for part in node.split("/")[1:] if not part.startswith("dp"))


class RowOwners:
    """Aux row number -> (room, attempt) that its bytes name, or None. Setting None clears the row."""

    def __init__(self, memory: KVPool) -> None:
        self._memory = memory

    def __getitem__(self, row: int) -> Pair | None:
        found = aux_row.unpack(self._memory.get_row(row))
        return found.pair if found is not None else None

    def __setitem__(self, row: int, owner: None) -> None:
        self._memory.put_row(row, bytes(self._memory.layout.row_bytes))
