"""The ranks inside an endpoint: ``SenderRank`` and ``ReceiverRank`` with an engine, not a scheduler, around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvpoll.runtime.host import Host
from kvpoll.runtime.pools.aux_row import AuxRow
from kvpoll.runtime.transfer import Key
from kvpoll.spec.trace import Committed, Computed, Released, Reserved
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
from kvpoll.statemachine.routes import MISMATCH

if TYPE_CHECKING:
    from kvpoll.runtime.live_watch import PresumedWrites
    from kvpoll.runtime.settings import Settings

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
        pair = incarnation.pair
        held = self.held.get(pair)
        fresh = pages if held is None else tuple([page for page in pages if page not in held])
        self.held[pair] = fresh if held is None else held + fresh
        self.in_use += len(fresh)
        host = self.host
        if host.wants(Reserved):
            host.emit(Reserved(host.now, self.node, self.kind, incarnation, fresh))

    def release(self, incarnation: Incarnation) -> None:
        """No byte of these pages will be read or written for the room any more."""
        pair = incarnation.pair
        pages = self.held.pop(pair, None)
        if pages is None:
            return
        self.quarantined.discard(pair)
        self.in_use -= len(pages)
        host = self.host
        if host.wants(Released):
            host.emit(Released(host.now, self.node, self.kind, incarnation, pages, self.size - self.in_use))
        self._freed(pair, pages)


class Listener:
    """Whom a rank tells of its transfers. This one does not care."""

    def polled(self, pair: Pair, name: str, cause: str | None) -> None:
        """A room has another poll; ``cause`` where it has failed."""

    def freed(self, pair: Pair, keys: Sequence[Key]) -> None:
        """Memory is the engine's again."""

    def over(self, pair: Pair) -> None:
        """What the engine ordered with ``release`` is done."""


def _request(rid: str, pair: Pair) -> Request:
    """A request as ranks know it; what only a scheduler needs is left at zero."""
    return Request(rid, pair, 0.0, 0, 0, 0, 0, 0, 0)


class Sender(SenderRank):
    """A prefill rank that does what its engine says."""

    nobody = NOBODY
    listener = Listener()

    def __init__(self, engine: EmbeddedEngine, *place: Any) -> None:
        super().__init__(engine, *place)
        self.real = engine.host
        self.pages = EnginePages(self.host, self.node, "kv", self.kv.size, self._freed)  # type: ignore[arg-type]
        self.kv = self.pages
        self.aux_rows: dict[Pair, AuxRow] = {}

    def begin(self, pair: Pair, rid: str, engine: str) -> None:
        """Open a room."""
        entry = SenderEntry(_request(rid, pair), self.epoch)
        self.by_pair[pair] = entry
        self.open(entry)

    def send_chunk(self, pair: Pair, pages: tuple[int, ...], last: bool, row: AuxRow | None = None) -> None:
        """The next pages of a prompt are computed: write them, and with the last of them what ``row`` says."""
        entry = self.by_pair.get(pair)
        if entry is None or self.poll(entry) not in ("WaitingForInput", "Transferring"):
            self._freed(pair, pages)
            return
        own, first = entry.incarnation, len(entry.pages)
        if not self.has_place_for(entry, first + len(pages), last):
            self._freed(pair, pages)
            return
        if row is not None and last:
            self.aux_rows[pair] = row
        self.pages.take(own, pages)
        self.deliver("PagesReserved", own)
        entry.pages += pages
        chunk, entry.chunk = entry.chunk, entry.chunk + 1
        if self.host.wants(Computed):
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
        self.listener.over(pair)

    def register(self, fact: str) -> None:
        before = self.registration.state
        super().register(fact)
        if self.registration.state != before:
            self.real.moment(self.registration.state.lower(), server=self.engine.name)

    def refused(self, entry: SenderEntry) -> None:
        self.listener.polled(entry.request.pair, "Failed", entry.rejected)

    def poll_changed(self, room: Room) -> None:
        pair, poll = room.incarnation.pair, room.local.poll
        self.listener.polled(pair, poll, self.real.why(room) if poll == "Failed" else None)
        super().poll_changed(room)

    def _freed(self, pair: Pair, pages: tuple[int, ...]) -> None:
        self.aux_rows.pop(pair, None)
        self.listener.freed(pair, pages)

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
    listener = Listener()

    def __init__(self, engine: EmbeddedEngine, *place: Any) -> None:
        super().__init__(engine, *place)
        self.real = engine.host
        self.pages = EnginePages(self.host, self.node, "kv", self.kv.size, self._freed)  # type: ignore[arg-type]
        self.kv = self.pages
        self.rows = EnginePages(self.host, self.node, "aux", self.aux.size, self._row_freed)  # type: ignore[arg-type]
        self.aux = self.rows
        self.committed: set[Pair] = set()
        self.presumed: PresumedWrites | None = None

    def begin(self, pair: Pair, rid: str, engine: str) -> None:
        """Open a room, and find the way to its prefill ranks."""
        entry = ReceiverEntry(_request(rid, pair), self.epoch)
        entry.engine = engine
        self.by_pair[pair] = entry
        if self.deliver("RequestOpened", entry.incarnation) and entry.rejected is None:
            self.finder.find(entry)

    def receive_status(self, incarnation: Incarnation, index: int, outcome: str) -> None:
        if self.presumed is not None and outcome == "Success":
            self.presumed.quiet(incarnation, index)
        super().receive_status(incarnation, index, outcome)

    def receive_ack(self, incarnation: Incarnation, index: int) -> None:
        if self.presumed is not None:
            self.presumed.quiet(incarnation, index)
        super().receive_ack(incarnation, index)

    def bury(self, name: str, alive_since: int) -> None:
        if self.presumed is not None:
            self.presumed.ended(name, alive_since)
        super().bury(name, alive_since)

    def publish_to(self, pair: Pair, pages: tuple[int, ...], row: int) -> None:
        """The engine has memory for a request."""
        entry = self.by_pair.get(pair)
        room = self.rooms.get(pair[0])
        if entry is None or room is None or room.incarnation.pair != pair or room.local.poll != "WaitingForInput":
            self._freed(pair, pages)
            self._row_freed(pair, (row,))
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
            if self.host.wants(Committed):
                owner = self.row_owners[entry.row]
                self.host.emit(Committed(self.host.now, self.node, entry.incarnation, (), (), owner))
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
        self.listener.over(pair)

    def leave(self, then: Callable[[], None] = lambda: None) -> None:
        """Nobody lists a decode rank."""
        then()

    def refused(self, entry: ReceiverEntry) -> None:
        self.listener.polled(entry.request.pair, "Failed", entry.rejected)

    def poll_changed(self, room: Room) -> None:
        pair, local = room.incarnation.pair, room.local
        if local.poll != "Failed":
            self.listener.polled(pair, local.poll, None)
            return
        cause, entry = self.real.why(room), self.by_pair.get(pair)
        if entry is not None and cause == f"topology_{MISMATCH}":
            cause = f"{cause}: {self.real.misfits.get(entry.engine)}"
        self.listener.polled(pair, local.poll, cause)

    def _freed(self, pair: Pair, pages: tuple[int, ...]) -> None:
        self.listener.freed(pair, pages)

    def _row_freed(self, pair: Pair, rows: tuple[int, ...]) -> None:
        self.listener.freed(pair, [~row for row in rows])

    def standing(self) -> tuple[bool, str]:
        """Can requests finish on this rank?"""
        return not self.stopped, "serving"

    def quarantined_pages(self) -> int:
        """Pages of failed rooms that a writer may still write to."""
        return sum(
            len(pages) for pair, pages in list(self.pages.held.items())
            if (room := self.rooms.get(pair[0])) is not None and room.local.lease in ("Draining", "Quarantined")
        )  # fmt: skip
