"""The ranks inside an endpoint: ``SenderRank`` and ``ReceiverRank`` with an engine, not a scheduler, around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvpoll.runtime.host import Host
from kvpoll.spec.trace import Computed, Released, Reserved
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import FAILED, SUCCESS
from kvpoll.statemachine.machine import Room
from kvpoll.statemachine.ranks.engine import EngineShape
from kvpoll.statemachine.ranks.host import Request
from kvpoll.statemachine.ranks.pool import Pool
from kvpoll.statemachine.ranks.receiver import Entry as ReceiverEntry
from kvpoll.statemachine.ranks.receiver import ReceiverRank
from kvpoll.statemachine.ranks.sender import Entry as SenderEntry
from kvpoll.statemachine.ranks.sender import SenderRank

if TYPE_CHECKING:
    from kvpoll.runtime.endpoint import Settings

Pair = tuple[int, int]
NOBODY: Final = Incarnation(0, 0, 0)


class EmbeddedEngine:
    """The engine around an endpoint, as its rank knows it (``PrefillHome``)."""

    def __init__(self, host: Host, name: str, epoch: int, settings: Settings) -> None:
        self.host = host
        self.name = name
        self.epoch = epoch
        self.shape = EngineShape(1, settings.sizes, settings.layout.pages, settings.layout.rows, skew=0.0)
        self.destinations_required = settings.destinations
        self.follows_room = settings.follows_room
        self.dp_attention = False
        self.dp_ranks = settings.sizes.dp
        self.rank_count = settings.sizes.dp * settings.sizes.pp * settings.sizes.tp * settings.sizes.cp

    def pace(self, rank: Any) -> float:
        """The engine keeps its own pace."""
        return 1.0

    def report_health(self) -> None:
        """``Endpoint.health`` looks when it is asked."""


class EnginePages(Pool):
    """Pages that the engine allocates: this pool only knows which of them a room holds, and says when they are free."""

    def __init__(
        self, host: Host, node: str, kind: str, size: int, freed: Callable[[Pair, tuple[int, ...]], None]
    ) -> None:
        super().__init__(host, node, kind, size)
        self._freed = freed
        self.in_use = 0

    def take(self, incarnation: Incarnation, pages: tuple[int, ...]) -> None:
        """The engine has given these pages to a room."""
        held = self.held.get(incarnation.pair, ())
        fresh = tuple(page for page in pages if page not in held)
        self.held[incarnation.pair] = held + fresh
        self.in_use += len(fresh)
        host = self.host
        host.emit(Reserved(host.now, self.node, self.kind, incarnation, fresh))

    def release(self, incarnation: Incarnation) -> None:
        """No byte of these pages will be read or written for the room any more."""
        pages = self.held.pop(incarnation.pair, None)
        if pages is None:
            return
        self.quarantined.discard(incarnation.pair)
        self.in_use -= len(pages)
        host = self.host
        host.emit(Released(host.now, self.node, self.kind, incarnation, pages, self.size - self.in_use))
        self._freed(incarnation.pair, pages)


def _ignore(pair: Pair, what: str, detail: Any) -> None:
    """Nobody listens yet."""


def _request(rid: str, pair: Pair) -> Request:
    """A request as ranks know it; what only a scheduler needs is left at zero."""
    return Request(rid, pair, 0.0, 0, 0, 0, 0, 0, 0)


class Sender(SenderRank):
    """A prefill rank that does what its engine says."""

    nobody = NOBODY
    told: Callable[[Pair, str, Any], None] = staticmethod(_ignore)

    def __init__(self, engine: EmbeddedEngine, *place: Any) -> None:
        super().__init__(engine, *place)
        self.real = engine.host
        self.pages = EnginePages(self.host, self.node, "kv", self.kv.size, self._freed)  # type: ignore[arg-type]
        self.kv = self.pages

    def begin(self, pair: Pair, rid: str, engine: str) -> None:
        """Open a room."""
        entry = SenderEntry(_request(rid, pair), self.epoch)
        self.by_pair[pair] = entry
        self.open(entry)

    def send_chunk(self, pair: Pair, pages: tuple[int, ...], last: bool) -> None:
        """The next pages of a prompt are computed: write them."""
        entry = self.by_pair.get(pair)
        if entry is None or self.poll(entry) not in ("WaitingForInput", "Transferring"):
            self._freed(pair, pages)
            return
        own, first = entry.incarnation, len(entry.pages)
        self.pages.take(own, pages)
        self.deliver("PagesReserved", own)
        entry.pages += pages
        chunk, entry.chunk = entry.chunk, entry.chunk + 1
        self.host.emit(Computed(self.host.now, self.node, own, chunk))
        self.post(entry, chunk, first, pages, last)

    def give_up(self, pair: Pair, cause: str) -> None:
        """The engine aborts."""
        entry = self.by_pair.get(pair)
        if entry is not None and entry.rejected is None and self.poll(entry) != "Retired":
            self.deliver("AbortRequested", entry.incarnation, cause)

    def finish(self, pair: Pair) -> None:
        """The engine is done with a request."""
        entry = self.by_pair.pop(pair, None)
        if entry is None:
            return
        if entry.rejected is None:
            if self.poll(entry) not in ("Failed", "Success", "Retired", "Absent"):
                self.deliver("AbortRequested", entry.incarnation, "released")
            self.deliver("Cleared", entry.incarnation)
        self.told(pair, "over", None)

    def leave(self) -> None:
        """Take this rank out of the bootstrap server's table; requests that are here go on."""
        self.real.unregister(self.engine.name)

    def refused(self, entry: SenderEntry) -> None:
        self.told(entry.request.pair, "poll", ("Failed", entry.rejected))

    def poll_changed(self, room: Room) -> None:
        self.told(room.incarnation.pair, "poll", (room.local.poll, self.real.why(room)))

    def _freed(self, pair: Pair, pages: tuple[int, ...]) -> None:
        self.told(pair, "free", pages)

    def standing(self) -> tuple[bool, str]:
        """Can requests reach this rank, and how it is registered."""
        state = self.registration.state
        return state == "Registered" and not self.stopped, state.lower()

    def quarantined_pages(self) -> int:
        """Source pages of rooms that have failed and whose writes are not proven to be over."""
        return sum(
            len(pages) for pair, pages in list(self.pages.held.items())
            if (room := self.rooms.get(pair[0])) is not None and room.local.lease == "Draining"
        )  # fmt: skip


class Receiver(ReceiverRank):
    """A decode rank that does what its engine says."""

    nobody = NOBODY
    told: Callable[[Pair, str, Any], None] = staticmethod(_ignore)

    def __init__(self, engine: EmbeddedEngine, *place: Any) -> None:
        super().__init__(engine, *place)
        self.real = engine.host
        self.pages = EnginePages(self.host, self.node, "kv", self.kv.size, self._freed)  # type: ignore[arg-type]
        self.kv = self.pages
        self.rows = EnginePages(self.host, self.node, "aux", self.aux.size, lambda pair, rows: None)  # type: ignore[arg-type]
        self.aux = self.rows
        self.committed: set[Pair] = set()

    def begin(self, pair: Pair, rid: str, engine: str) -> None:
        """Open a room, and find the way to its prefill ranks."""
        entry = ReceiverEntry(_request(rid, pair), self.epoch)
        entry.engine = engine
        self.by_pair[pair] = entry
        if self.deliver("RequestOpened", entry.incarnation) and entry.rejected is None:
            self.finder.find(entry)

    def publish_to(self, pair: Pair, pages: tuple[int, ...], row: int) -> None:
        """The engine has memory for a request."""
        entry = self.by_pair.get(pair)
        room = self.rooms.get(pair[0])
        if entry is None or room is None or room.incarnation.pair != pair or room.local.poll != "WaitingForInput":
            self._freed(pair, pages)
            return
        self.pages.take(entry.incarnation, pages)
        self.rows.take(entry.incarnation, (row,))
        self.publish(entry, pages, row)

    def give_up(self, pair: Pair, cause: str) -> None:
        """The engine aborts."""
        entry = self.by_pair.get(pair)
        if entry is not None and entry.rejected is None and pair not in self.committed:
            self.deliver("AbortRequested", entry.incarnation, cause)

    def commit(self, pair: Pair) -> None:
        """The engine decodes from the pages now: the room is over, the pages are the engine's until ``finish``."""
        entry = self.by_pair.get(pair)
        if entry is not None and entry.rejected is None and self.report(entry.incarnation).poll == SUCCESS:
            self.committed.add(pair)
            self.deliver("Cleared", entry.incarnation)

    def finish(self, pair: Pair) -> None:
        """The engine is done with a request and, if it was committed, with its pages."""
        self.commit(pair)
        entry = self.by_pair.pop(pair, None)
        if entry is None:
            return
        own = entry.incarnation
        if pair in self.committed:
            self.committed.discard(pair)
            self.pages.release(own)
            self.rows.release(own)
        elif entry.rejected is None:
            if self.report(own).poll != FAILED:
                self.deliver("AbortRequested", own, "released")
            self.deliver("Cleared", own)
        self.told(pair, "over", None)

    def leave(self) -> None:
        """Nobody lists a decode rank."""

    def refused(self, entry: ReceiverEntry) -> None:
        self.told(entry.request.pair, "poll", ("Failed", entry.rejected))

    def poll_changed(self, room: Room) -> None:
        self.told(room.incarnation.pair, "poll", (room.local.poll, self.real.why(room)))

    def _freed(self, pair: Pair, pages: tuple[int, ...]) -> None:
        self.told(pair, "free", pages)

    def standing(self) -> tuple[bool, str]:
        """Can requests finish on this rank?"""
        return not self.stopped, "serving"

    def quarantined_pages(self) -> int:
        """Pages of failed rooms that a writer may still write to."""
        return sum(
            len(pages) for pair, pages in list(self.pages.held.items())
            if (room := self.rooms.get(pair[0])) is not None and room.local.lease in ("Draining", "Quarantined")
        )  # fmt: skip
