"""A decode rank towards prefill: rooms, routes, metadata, aborts. The scheduler comes on top."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpoll.spec.trace import Addressed, Fenced
from kvpoll.spec.vocabulary import Action, Incarnation
from kvpoll.statemachine.agreement import Report, given_up
from kvpoll.statemachine.conduct import fences
from kvpoll.statemachine.mapping import Mapping, map_ranks
from kvpoll.statemachine.ranks.engine import Home, decode_timers
from kvpoll.statemachine.ranks.finder import Finder
from kvpoll.statemachine.ranks.host import Destination, Plan, Request, engine_of, is_of
from kvpoll.statemachine.ranks.pool import Pool
from kvpoll.statemachine.ranks.rank import Rank
from kvpoll.statemachine.roles import Queued
from kvpoll.statemachine.routes import forgets_on_timeout


class PeerRank(NamedTuple):
    """A prefill rank that a room of ours talks to: its bit, its node, its process epoch as we know it.

    A dummy is told of the room so that its poll can finish; it writes nothing and answers nothing (PROTOCOL 7.4).
    """

    bit: int
    node: str
    epoch: int
    dummy: bool


class Entry:
    """A request in a decode rank's scheduler."""

    __slots__ = ("aborted", "engine", "incarnation", "pages", "rejected", "request", "row", "state")

    def __init__(self, request: Request, epoch: int) -> None:
        self.request = request
        self.engine = f"P{request.prefill}"
        self.incarnation = Incarnation(*request.pair, epoch)
        self.state = Queued()
        self.pages: tuple[int, ...] = ()
        self.row = -1
        self.rejected: str | None = None
        self.aborted: str | None = None


WRITERS_MAY_WRITE = ("Draining", "Quarantined")
"""Leases of failed rooms whose pages are still exposed."""


class ReceiverRank(Rank):
    """One decode rank: tensor index ``tp`` of its replica."""

    role = "receiver"

    def __init__(self, engine: Home, node: str, tp: int) -> None:
        super().__init__(engine, node, engine.host.machines.receiver, decode_timers(engine.host.profile))
        self.tp = tp
        self.index = tp
        self.kv = Pool(self.host, node, "kv", engine.shape.kv_pages)
        self.aux = Pool(self.host, node, "aux", engine.shape.rows)
        self.row_owners: list[tuple[int, int] | None] = [None] * engine.shape.rows
        self.peers: dict[tuple[int, ...], tuple[PeerRank, ...]] = {}
        self.by_pair: dict[tuple[int, int], Entry] = {}
        self.finder = Finder(self)
        self._mappings: dict[Plan, Mapping] = {}
        self.mail |= {"Status": self.receive_status, "AbortAck": self.receive_ack}
        self._actions |= {
            "ArmDeadline": self._arm,
            "NotifyPrefill": self._notify_prefill,
            "SendMetadata": lambda action, origin: self._send_metadata(action.incarnation),
            "ReleasePages": self._release_pages,
            "QuarantinePages": self._quarantine,
            "RejectRequest": self._reject,
        }

    # -- messages from prefill

    def receive_status(self, incarnation: Incarnation, index: int, outcome: str) -> None:
        """A prefill rank reported how its part of a room ended."""
        if not self.stopped:
            self.deliver("StatusReceived", incarnation, (index, outcome))

    def receive_ack(self, incarnation: Incarnation, index: int) -> None:
        """A prefill rank has drained."""
        if not self.stopped:
            self.deliver("AbortAcknowledged", incarnation, index)

    def place_row(self, row: int, pair: tuple[int, int]) -> None:
        """The last chunk's write filled an aux row with its owner's id."""
        self.row_owners[row] = pair

    def forget(self, incarnation: Incarnation) -> None:
        self.peers.pop(self.key(incarnation), None)

    # -- actions

    def _arm(self, action: Action, origin: Any) -> None:
        self.timers.arm(action.incarnation, action.detail)
        if action.detail == "drain" and fences(self.host.profile):
            self.host.after(self.host.profile.number("fence_after_s"), self._fence, action.incarnation)

    def _fence(self, own: Incarnation) -> None:
        """The grace is over in which writers could say that they are quiet, and hear why they should be. Where the host
        itself places what comes for the room, it refuses it, and their word is not needed any more.
        """
        room = self.rooms.get(own.room)
        if self.is_over() or room is None or room.incarnation != own or room.local.lease not in WRITERS_MAY_WRITE:
            return
        if self.host.refuse(own):
            self.host.emit(Fenced(self.host.now, self.node, own))
            self.deliver("WritesRefused", own)

    def _notify_prefill(self, action: Action, origin: Any) -> None:
        own = action.incarnation
        for peer in self.peers.get(self.key(own), ()):
            theirs = Incarnation(own.room, own.attempt, peer.epoch)
            self.host.send(self.node, peer.node, "Abort", theirs, self.tp, self.node, own)

    def _release_pages(self, action: Action, origin: Any) -> None:
        self.kv.release(action.incarnation)
        self.aux.release(action.incarnation)
        self.memory_came_back()

    def _quarantine(self, action: Action, origin: Any) -> None:
        self.host.mark(self.node, "pages_quarantined")
        self.kv.quarantine(action.incarnation)
        self.aux.quarantine(action.incarnation)

    def _reject(self, action: Action, origin: Any) -> None:
        self.host.mark(self.node, "rival_rejected")
        entry = self.by_pair.get(action.incarnation.pair)
        if entry is not None:
            entry.rejected = "room_in_use"
            self.refused(entry)

    def _send_metadata(self, own: Incarnation) -> None:
        entry = self.by_pair.get(own.pair)
        if entry is None or not entry.pages:
            return
        host = self.host
        for peer in self.peers.get(self.key(own), ()):
            theirs = Incarnation(own.room, own.attempt, peer.epoch)
            engine = engine_of(peer.node)
            if host.wants(Addressed):
                host.emit(Addressed(host.now, self.node, own, peer.node, peer.epoch, host.true_epoch(engine)))
            destination = Destination(self.node, own, self.tp, () if peer.dummy else entry.pages, entry.row)
            required = self.mapping(engine).destinations_required
            host.send(self.node, peer.node, "Metadata", theirs, destination, required)

    def publish(self, entry: Entry, pages: tuple[int, ...], row: int) -> None:
        """The request has its memory: tell every prefill rank of the room where to write."""
        entry.pages, entry.row = pages, row
        self.row_owners[row] = None
        if self.deliver("PagesReserved", entry.incarnation) and self.deliver("MetadataSent", entry.incarnation):
            self._send_metadata(entry.incarnation)

    def memory_came_back(self) -> None:
        """Pages were released: who waits for memory may look again."""

    def refused(self, entry: Entry) -> None:
        """The machine would not open the room of this request."""

    def join(self, entry: Entry) -> None:
        """The set-up of the receiver has returned."""

    def unqueued_failed(self, entry: Entry, cause: str) -> None:
        """A request was given up before it joined the queue."""

    def mapping(self, engine: str) -> Mapping:
        """Whom this rank contacts of a prefill engine whose topology is known."""
        plan = self.host.plan(engine)
        known = self._mappings.get(plan)
        if known is None:
            known = self._mappings[plan] = map_ranks(plan.sizes, self.engine.shape.sizes, self.tp, 0, plan.mla)
        return known

    def _deadline(self, incarnation: Incarnation, name: str) -> None:
        if name == "waiting" and forgets_on_timeout(self.host.profile):
            entry = self.by_pair.get(incarnation.pair)
            if entry is not None:
                self.finder.drop(entry.engine)
        super()._deadline(incarnation, name)

    def own_report(self, entry: Entry) -> Report:
        """Poll and cause of a request of ours; one that was refused has no room."""
        if entry.rejected is not None:
            return Report(0, entry.rejected)
        report = self.report(entry.incarnation)
        return given_up(entry.aborted, report) or report

    # -- what it believes of prefill engines

    def suspect(self, engine: str) -> None:
        """A prefill engine does not answer: forget its routes, fail what waits for it, keep the memory."""
        self.finder.drop(engine)
        self._tell_rooms(engine, "PeerSuspected")

    def bury(self, name: str, alive_since: int) -> None:
        """Lives of a prefill engine, or of one of its ranks, before this one are over, and with them every write that
        they had posted. That of a rank says nothing of its siblings, where they are processes of their own (S1).
        """
        self.finder.drop(engine_of(name))
        for room in list(self.rooms.values()):
            known = self.peers.get(self.key(room.incarnation), ())
            dead = [peer for peer in known if is_of(peer.node, name) and peer.epoch < alive_since]
            if dead:
                self.deliver("PeerDied", room.incarnation, sum(1 << peer.bit for peer in dead))

    def restored(self, engine: str) -> None:
        """The channel to a prefill engine is back."""
        self._tell_rooms(engine, "LinkRestored")

    def _tell_rooms(self, engine: str, fact: str) -> None:
        for room in list(self.rooms.values()):
            known = self.peers.get(self.key(room.incarnation), ())
            if any(engine_of(peer.node) == engine for peer in known):
                self.deliver(fact, room.incarnation)
