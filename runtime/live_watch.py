"""Monitored mode of an endpoint: the invariants that can be judged from what one rank sees alone, as it happens.

Most invariants speak of one rank, or of what it hears: those are judged. The rest compare both sides of a request
(L2, L7 of prefill), follow a request from the router's admission to its answer (L1, L4, S6, S9), or a group (S7): one
rank cannot know, so they are left to ``kvpoll validate`` and a merged trace, instead of being guessed.

S1 is the one that matters most, and decode does not see the writes to its pages. So it presumes them: a prefill rank
that was told an address may write there from then on, until it has said that its last write is complete, has
acknowledged the abort, its process is proven to be over, or its bytes are refused (tcp). That is judged from messages
alone, not from what the room machine makes of them, so a rule (or a defect) that lets go of pages too early is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvpoll.spec.invariants import Watch
from kvpoll.spec.trace import Addressed, Fenced, Released, Violated, WritePosted, WriteSettled
from kvpoll.spec.vocabulary import Incarnation

if TYPE_CHECKING:
    from kvpoll.runtime.embedded import Receiver
    from kvpoll.runtime.host import Host

JUDGED: Final = ("S1", "S2", "S3", "S4", "S5", "S8", "S10", "S11", "S12", "L6", "L7", "R2", "R3")
TICK_S: Final = 0.5
"""How often deadlines of invariants are looked at where nothing else happens."""


class LiveWatch:
    """Monitors at work on one rank's events. Belongs to the loop's thread."""

    def __init__(self, host: Host, violated: Callable[[Violated], None]) -> None:
        self.host = host
        self.watch = Watch(host.stream, host.protocol.bounds, JUDGED)
        host.stream.subscribe(Violated, violated)
        host.watch_due = self.watch
        self._tick()

    def _tick(self) -> None:
        self.watch.advance(self.host.now)
        self.host.after(TICK_S, self._tick)


class PresumedWrites:
    """What prefill ranks may be writing into one decode rank's pages, for its monitor of S1."""

    def __init__(self, rank: Receiver, watch: Watch) -> None:
        self.rank = rank
        self._monitor: Any = watch.monitors["S1"]
        self._serial = 0
        self._open: dict[Incarnation, dict[int, tuple[int, str, int]]] = {}
        self._told: dict[Incarnation, set[int]] = {}
        rank.host.stream.subscribe(Addressed, self._addressed)
        rank.host.stream.subscribe(Released, self._released)
        rank.host.stream.subscribe(Fenced, self._fenced)

    def __len__(self) -> int:
        """Writes that are presumed to be under way."""
        return sum(map(len, self._open.values()))

    def _addressed(self, event: Addressed) -> None:
        """A prefill rank is about to learn where to write. What it is told again (B63) begins no second write."""
        rank, own = self.rank, event.incarnation
        entry = rank.by_pair.get(own.pair)
        peer = next((each for each in rank.peers.get(rank.key(own), ()) if each.node == event.peer), None)
        told = self._told.setdefault(own, set())
        if entry is None or peer is None or peer.dummy or peer.bit in told:
            return
        told.add(peer.bit)
        self._serial += 1
        self._open.setdefault(own, {})[peer.bit] = (self._serial, peer.node, peer.epoch)
        pages, row = entry.pages, entry.row
        posted = WritePosted(event.t, peer.node, self._serial, own, rank.node, 0, True, (), pages, row)
        self._monitor.on_write_posted(posted)

    def _released(self, event: Released) -> None:
        self._told.pop(event.incarnation, None)

    def _fenced(self, event: Fenced) -> None:
        """This rank itself places nothing any more of what comes for the room."""
        for bit in list(self._open.get(event.incarnation, ())):
            self._settle(event.incarnation, bit)

    def quiet(self, own: Incarnation, bit: int) -> None:
        """A prefill rank says that nothing of its writes is under way."""
        presumed = self._open.get(own, {})
        if bit in presumed:
            self._settle(own, bit)

    def ended(self, rank: str, alive_since: int) -> None:
        """Every life of a prefill rank before this one is over, and with it what it had posted."""
        for own, presumed in list(self._open.items()):
            for bit, (_, node, life) in list(presumed.items()):
                if node == rank and life < alive_since:
                    self._settle(own, bit)

    def _settle(self, own: Incarnation, bit: int) -> None:
        serial, node, _ = self._open[own].pop(bit)
        if not self._open[own]:
            del self._open[own]
        self._monitor.on_write_settled(WriteSettled(self.rank.host.now, node, serial, True))
