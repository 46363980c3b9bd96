"""Page pools that really run out, and whose pages say what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpoll.spec.trace import PageTag, Pair, Released, Reserved, new_event
from kvpoll.spec.vocabulary import Incarnation


class Pool:
    """Pages of one kind ("kv" or "aux") on one rank. LIFO, so that a freed page is soon someone else's.

    ``contents`` keeps what was last placed in a page, per component (source rank), across owners: that is how a
    stale or foreign write is seen as data. Quarantined pages stay held; ``quarantined`` counts them.
    """

    def __init__(self, host: Any, node: str, kind: str, size: int) -> None:
        self.host = host
        self.node = node
        self.kind = kind
        self.size = size
        self.free: list[int] = list(range(size))
        self.held: dict[Pair, tuple[int, ...]] = {}
        self.quarantined: set[Pair] = set()
        self.contents: list[dict[str, PageTag]] = [{} for _ in range(size)]
        self.fail_next = 0
        self.on_failure: Callable[[], None] = lambda: None

    def reserve(self, incarnation: Incarnation, count: int) -> tuple[int, ...] | None:
        """``count`` pages for this incarnation, or None when there are not enough (or a fault says so)."""
        if self.fail_next > 0:
            self.fail_next -= 1
            self.on_failure()
            return None
        if count > len(self.free):
            return None
        cut = len(self.free) - count
        pages = tuple(self.free[cut:])
        del self.free[cut:]
        self.held[incarnation.pair] = pages
        host = self.host
        host.emit(new_event(Reserved, (host.now, self.node, self.kind, incarnation, pages)))
        return pages

    def release(self, incarnation: Incarnation) -> None:
        """Give back what this incarnation holds; nothing if it holds nothing."""
        pages = self.held.pop((incarnation.room, incarnation.attempt), None)
        if pages is None:
            return
        self.quarantined.discard(incarnation.pair)
        self.free.extend(pages)
        host = self.host
        host.emit(new_event(Released, (host.now, self.node, self.kind, incarnation, pages, len(self.free))))

    def quarantine(self, incarnation: Incarnation) -> None:
        """Keep the pages out of use until the writer is proven quiet."""
        if incarnation.pair in self.held:
            self.quarantined.add(incarnation.pair)

    def read(self, page: int, components: tuple[str, ...]) -> dict[str, PageTag]:
        """What a page holds of each component (prefill rank) that should have filled its share."""
        return self.contents[page].copy()

    def computed(
        self, incarnation: Incarnation, component: str, chunk: int, first: int, pages: tuple[int, ...]
    ) -> None:
        """The forward pass has filled these source pages; a pool with real memory has something to do then."""
