"""Decode engines: learning the way to a request's KV, preallocation, the transfer queue, commit."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from kvpoll.sim.engine import Detector, Engine, Request
from kvpoll.sim.group import Collectives, Turns, Waiting
from kvpoll.sim.pools import Pool
from kvpoll.sim.rank import NOTHING_TO_DO, Rank
from kvpoll.sim.routes import Finder
from kvpoll.sim.topology import rank_name
from kvpoll.sim.transport import Destination
from kvpoll.spec.trace import Addressed, Committed, Decided
from kvpoll.spec.vocabulary import Action, Incarnation
from kvpoll.statemachine.agreement import (
    BOOTSTRAPPING,
    Decision,
    Memory,
    Report,
    decide_bootstrap,
    decide_transfer,
    fits,
    merge_by_position,
    merge_by_request,
    tightest,
)
from kvpoll.statemachine.machine import Room
from kvpoll.statemachine.roles import Queued
from kvpoll.statemachine.routes import forgets_on_timeout

if TYPE_CHECKING:
    from kvpoll.sim.cluster import Cluster

GAUGES = {
    "Preallocation": "num_decode_prealloc_queue_reqs",
    "Transfer": "num_decode_transfer_queue_reqs",
    "Running": "num_running_reqs",
}

QUEUED = ("Preallocation", "Transfer")
"""States in which a request waits for something that the ranks must agree on."""


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

    __slots__ = ("aborted", "incarnation", "pages", "rejected", "request", "row", "state")

    def __init__(self, request: Request, epoch: int) -> None:
        self.request = request
        self.incarnation = Incarnation(*request.pair, epoch)
        self.state = Queued()
        self.pages: tuple[int, ...] = ()
        self.row = -1
        self.rejected: str | None = None
        self.aborted: str | None = None


class DecodeRank(Rank):
    """One decode rank: replica ``dp``, tensor index ``tp``."""

    role = "receiver"

    def __init__(self, engine: DecodeEngine, group: Group, node: str, tp: int) -> None:
        profile = engine.world.profile
        names = {"bootstrap": "bootstrap", "admission": "admission", "waiting": "waiting", "drain": "drain"}
        timers = {name: profile.number(f"{rule}_timeout_s") for name, rule in names.items()}
        timers["tombstone"] = profile.number("decode_tombstone_timeout_s")
        super().__init__(engine, node, engine.world.machines.receiver, timers)
        self.decode_engine = engine
        self.group = group
        self.tp = tp
        self.index = tp
        self.collectives = group.collectives
        self.kv = Pool(self.world, node, "kv", engine.shape.kv_pages)
        self.aux = Pool(self.world, node, "aux", engine.shape.rows)
        self.row_owners: list[tuple[int, int] | None] = [None] * engine.shape.rows
        self.peers: dict[tuple[int, ...], tuple[PeerRank, ...]] = {}
        self.by_pair: dict[tuple[int, int], Entry] = {}
        self.waiting: dict[str, Entry] = {}
        self.commands: deque[tuple[Any, ...]] = deque()
        self.finder = Finder(self)
        self.mapping = self.world.topology.mapping(tp)
        self._actions |= {
            "NotifyPrefill": self._notify_prefill,
            "SendMetadata": lambda action, origin: self._send_metadata(action.incarnation),
            "ReleasePages": self._release_pages,
            "QuarantinePages": self._quarantine,
            "RejectRequest": self._reject,
        }
        self.world.env.process(self._run())

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

    def _notify_prefill(self, action: Action, origin: Any) -> None:
        own = action.incarnation
        for peer in self.peers.get(self.key(own), ()):
            theirs = Incarnation(own.room, own.attempt, peer.epoch)
            self.world.network.send(
                self.node, peer.node, "Abort", theirs, self.decode_engine.cluster.abort_at,
                peer.node, theirs, self.tp, self.node, own,
            )  # fmt: skip

    def _release_pages(self, action: Action, origin: Any) -> None:
        self.kv.release(action.incarnation)
        self.aux.release(action.incarnation)
        self.group.wake()

    def _quarantine(self, action: Action, origin: Any) -> None:
        self.world.mark(self.node, "pages_quarantined")
        self.kv.quarantine(action.incarnation)
        self.aux.quarantine(action.incarnation)

    def _reject(self, action: Action, origin: Any) -> None:
        self.world.mark(self.node, "rival_rejected")
        entry = self.by_pair.get(action.incarnation.pair)
        if entry is not None:
            entry.rejected = "room_in_use"
            self.group.wake()

    def _send_metadata(self, own: Incarnation) -> None:
        entry = self.by_pair.get(own.pair)
        if entry is None or not entry.pages:
            return
        world = self.world
        for peer in self.peers.get(self.key(own), ()):
            theirs = Incarnation(own.room, own.attempt, peer.epoch)
            current = world.epochs[peer.node.partition("/")[0]]
            world.emit(Addressed(world.now, self.node, own, peer.node, peer.epoch, current))
            destination = Destination(self, own, self.tp, () if peer.dummy else entry.pages, entry.row)
            world.network.send(
                self.node, peer.node, "Metadata", theirs, self.decode_engine.cluster.metadata_at,
                peer.node, theirs, destination, self.mapping.destinations_required,
            )  # fmt: skip

    def poll_changed(self, room: Room) -> None:
        if room.local.poll not in NOTHING_TO_DO:
            self.group.wake()

    def _deadline(self, incarnation: Incarnation, name: str) -> None:
        if name == "waiting" and forgets_on_timeout(self.world.profile):
            entry = self.by_pair.get(incarnation.pair)
            if entry is not None:
                self.finder.drop(f"P{entry.request.prefill}")
        super()._deadline(incarnation, name)

    # -- the scheduler loop

    def _run(self) -> Waiting:
        world, shape = self.world, self.engine.shape
        while not self.is_over():
            yield from self.group.turns.rest(self.index)
            if self.is_over():
                return
            busy = len(self.entries) > len(self.waiting)
            period = shape.iteration_s if busy else shape.idle_s
            yield world.env.timeout(period * self.engine.pace(self) * (0.5 + self.chance.random()))
            while self.finder.stall is not None and not self.is_over():
                yield self.finder.stall
            if self.is_over():
                return
            yield from self._turn()

    def _turn(self) -> Waiting:
        commands, reports, memory = yield from self._exchange()
        self._obey(commands)
        self._decide(reports)
        self._admit(reports, memory)

    def _exchange(self) -> Waiting:
        """Agree with the other tensor ranks on commands, polls, and what memory the tightest rank has."""
        collectives = self.collectives
        commands = tuple(self.commands) if self.index == 0 else ()
        if self.index == 0:
            self.commands.clear()
        taken = len(self.entries) - sum(entry.state.state == "Preallocation" for entry in self.waiting.values())
        memory = Memory(len(self.kv.free), len(self.aux.free), self.engine.shape.slots - taken)
        mine = {rid: self._own_report(entry) for rid, entry in self.waiting.items()}
        if self.world.profile["agreement"] == "by_request_id":
            if collectives.size == 1:
                return commands, mine, memory
            payloads = yield from collectives.enter(self.index, self.node, "step", "fixed", (commands, mine, memory))
            reports = merge_by_request([payload[1] for payload in payloads])
            return payloads[0][0], reports, tightest(payload[2] for payload in payloads)
        payloads = yield from collectives.enter(self.index, self.node, "requests", "fixed", commands)
        merged: dict[str, Report] = {}
        for kind in ("Preallocation", "Transfer"):
            queue = [rid for rid, entry in self.waiting.items() if entry.state.state == kind and rid in mine]
            if queue:
                vector = [mine[rid].poll for rid in queue]
                vectors = yield from collectives.enter(self.index, self.node, kind.lower(), len(vector), vector)
                for rid, poll in zip(queue, merge_by_position(vectors), strict=False):
                    merged[rid] = Report(poll, mine[rid].cause)
        return payloads[0], merged, memory

    def _own_report(self, entry: Entry) -> Report:
        if entry.rejected is not None:
            return Report(0, entry.rejected)
        return _given_up(entry, self.report(entry.incarnation))

    def _obey(self, commands: tuple[tuple[Any, ...], ...]) -> None:
        for command in commands:
            if command[0] == "open":
                self._open(command[1])
            elif command[0] == "generated":
                self._generated(command[1])
            elif command[1] in self.entries:
                self._abort(self.entries[command[1]], command[2])
            else:
                self.finder.give_up(command[1], command[2])

    def _abort(self, entry: Entry, cause: str) -> None:
        if entry.state.state == "Running":
            self._end_running(entry, "DropAgreed")
        else:
            entry.aborted = entry.aborted or cause
            self.deliver("AbortRequested", entry.incarnation, cause)

    def _open(self, request: Request) -> None:
        entry = Entry(request, self.epoch)
        self.by_pair[request.pair] = entry
        if self.world.profile["decode_enqueue"] == "at_arrival":
            self.enqueue(entry)
        if self.deliver("RequestOpened", entry.incarnation) and entry.rejected is None:
            self.finder.find(entry)

    def enqueue(self, entry: Entry) -> None:
        """The request joins this rank's queue."""
        self.entries[entry.request.rid] = entry
        self._move(entry, "RequestArrived")

    def _move(self, entry: Entry, fact: str) -> None:
        before = entry.state.state
        entry.state, _ = self.world.machines.decode_request.step(entry.state, fact)
        after = entry.state.state
        if before != after:
            if before in GAUGES:
                self.queue(GAUGES[before], entry.request.rid, -1)
            if after in GAUGES:
                self.queue(GAUGES[after], entry.request.rid, 1)
            if after in QUEUED:
                self.waiting[entry.request.rid] = entry
            else:
                self.waiting.pop(entry.request.rid, None)
            if after not in GAUGES:
                self.entries.pop(entry.request.rid, None)
                self.by_pair.pop(entry.request.pair, None)

    def _decide(self, reports: dict[str, Report]) -> None:
        """Apply what the merged polls say: drop what failed, commit what succeeded."""
        decisions: list[Decision] = []
        for rid, entry in self.waiting.items():
            report = reports.get(rid)
            if report is not None or entry.aborted is not None:
                report = _given_up(entry, report)
            if report is None or report.poll == BOOTSTRAPPING:
                continue
            if entry.state.state == "Transfer":
                decision = decide_transfer(rid, report)
            elif entry.state.state == "Preallocation" and report.poll == 0:
                decision = decide_bootstrap(rid, report)
            else:
                continue
            if decision is not None:
                decisions.append(decision)
        for decision in decisions:
            self._tell_decision(decision.rid, decision.outcome)
            entry = self.entries[decision.rid]
            if decision.outcome == "drop":
                self._drop(entry, decision.cause or "failed")
            else:
                self._commit(entry)

    def _tell_decision(self, rid: str, outcome: str) -> None:
        if self.collectives.size > 1:
            self.world.emit(Decided(self.world.now, self.node, self.group.name, rid, outcome))

    def _admit(self, reports: dict[str, Report], memory: Memory) -> None:
        """Grant memory in order of arrival, by the tightest rank; the first that does not fit holds the rest."""
        for rid, entry in list(self.waiting.items()):
            if entry.state.state != "Preallocation":
                continue
            report = reports.get(rid)
            if report is None or decide_bootstrap(rid, report) is None:
                continue
            needed = -(-entry.request.input_tokens // self.world.topology.page_tokens)
            if not fits(needed, memory):
                self.world.mark(self.node, "decode_memory_full")
                break
            memory = memory.less(needed)
            self._tell_decision(rid, "admit")
            self._grant(entry, needed)
            if self.stopped:
                break

    def _grant(self, entry: Entry, needed: int) -> None:
        self._move(entry, "MemoryGranted")
        own = entry.incarnation
        room = self.rooms.get(own.room)
        if room is None or room.local.poll != "WaitingForInput":
            return  # failed since the ranks agreed; the next turn drops it everywhere
        pages, row = self.kv.reserve(own, needed), self.aux.reserve(own, 1)
        if pages is None or row is None:
            self.world.mark(self.node, "allocation_failed")
            self.kv.release(own)
            self.aux.release(own)
            self.deliver("AbortRequested", own, "allocation_failed")
            return
        entry.pages, entry.row = pages, row[0]
        self.row_owners[entry.row] = None
        if self.deliver("PagesReserved", own) and self.deliver("MetadataSent", own):
            self._send_metadata(own)

    def _drop(self, entry: Entry, cause: str) -> None:
        own = entry.incarnation
        self._move(entry, "DropAgreed")
        room = self.rooms.get(own.room)
        if entry.rejected is None and room is not None and self.key(room.incarnation) == self.key(own):
            if room.local.poll not in ("Failed", "Retired"):
                self.deliver("AbortRequested", own, cause)
            self.deliver("Cleared", own)
        self.report_failure(entry.request, cause)

    def report_failure(self, request: Request, cause: str) -> None:
        """The leader tells the router."""
        if self.index == 0:
            self.decode_engine.cluster.router.leg_failed(self, request, "decode", cause)

    def _commit(self, entry: Entry) -> None:
        """The transfer is over: the request starts to decode from its pages."""
        world, own = self.world, entry.incarnation
        contents = tuple([self.kv.contents[page].copy() for page in entry.pages])
        components = tuple(peer.node for peer in self.peers.get(self.key(own), ()) if not peer.dummy)
        row_pair = self.row_owners[entry.row] if entry.row >= 0 else None
        world.emit(Committed(world.now, self.node, own, components, contents, row_pair))
        self._move(entry, "TransferAgreed")
        self.deliver("Cleared", own)
        if self.index == 0:
            step_s = self.engine.shape.iteration_s * self.engine.pace(self)
            world.after(step_s, self._first_token, entry.request)
            world.after(step_s * entry.request.output_tokens, self._last_token, entry.request.rid)

    def _first_token(self, request: Request) -> None:
        if not self.is_over():
            self.decode_engine.cluster.router.first_token(self, request)

    def _last_token(self, rid: str) -> None:
        """The sampled token ends the request in the same iteration on every tensor rank."""
        if self.is_over():
            return
        if self.collectives.size == 1:
            self._generated(rid)
        else:
            self.commands.append(("generated", rid))
            self.group.wake()

    def _generated(self, rid: str) -> None:
        entry = self.entries.get(rid)
        if entry is not None and entry.state.state == "Running":
            self._end_running(entry, "GenerationFinished")

    def _end_running(self, entry: Entry, fact: str) -> None:
        """The pages belong to the request since its commit; they go back with its last token or its abort."""
        self._move(entry, fact)
        self.kv.release(entry.incarnation)
        self.aux.release(entry.incarnation)
        self.group.wake()

    # -- what it believes of prefill engines

    def suspect(self, engine: str) -> None:
        """A prefill engine does not answer: forget its routes, fail what waits for it, keep the memory."""
        self.finder.drop(engine)
        self._tell_rooms(engine, "PeerSuspected")

    def bury(self, engine: str, epoch: int) -> None:
        """A prefill engine's former process is gone, and with it every write it had posted."""
        self.finder.drop(engine)
        for room in list(self.rooms.values()):
            known = self.peers.get(self.key(room.incarnation), ())
            dead = [peer for peer in known if peer.node.partition("/")[0] == engine and peer.epoch != epoch]
            if dead:
                self.deliver("PeerDied", room.incarnation, sum(1 << peer.bit for peer in dead))

    def restored(self, engine: str) -> None:
        """The channel to a prefill engine is back."""
        self._tell_rooms(engine, "LinkRestored")

    def _tell_rooms(self, engine: str, fact: str) -> None:
        for room in list(self.rooms.values()):
            known = self.peers.get(self.key(room.incarnation), ())
            if any(peer.node.partition("/")[0] == engine for peer in known):
                self.deliver(fact, room.incarnation)


def _given_up(entry: Entry, report: Report | None) -> Report:
    """A request that was given up is Failed whatever its room says; the first cause stays."""
    if entry.aborted is None or (report is not None and report.poll == 0):
        assert report is not None
        return report
    return Report(0, entry.aborted)


class Group:
    """The tensor ranks of one decode replica."""

    def __init__(self, engine: DecodeEngine, dp: int) -> None:
        self.name = f"{engine.name}/dp{dp}"
        self.turns = Turns(engine.world, engine.shape.sizes.tp)
        self.collectives = Collectives(engine.world, self.name, engine.shape.sizes.tp)
        self.ranks: list[DecodeRank] = []

    def wake(self) -> None:
        """Every rank takes a turn."""
        self.turns.wake()


class DecodeEngine(Engine):
    """A decode server."""

    side = "D"

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(cluster.world, number, cluster.topology.decode)
        self.cluster = cluster
        self.groups: list[Group] = []

    def build(self) -> None:
        sizes = self.shape.sizes
        self.groups = [Group(self, dp) for dp in range(sizes.dp)]
        for dp, group in enumerate(self.groups):
            for tp in range(sizes.tp):
                group.ranks.append(DecodeRank(self, group, rank_name("D", self.number, sizes, dp, 0, tp), tp))
        self.ranks = {rank.node: rank for group in self.groups for rank in group.ranks}

    def ready(self) -> None:
        by_rank = self.world.profile["liveness_probe"] == "rank_epoch"
        for rank in self.ranks.values():
            for engine in self.cluster.prefill:
                target = engine.name if by_rank else engine.server.name
                suspect, bury = _about(rank, engine.name)
                self.detectors.append(Detector(rank, target, suspect, bury))

    def accept(self, request: Request, command: tuple[Any, ...]) -> None:
        """The controller hands a command to the leader of the request's group."""
        group = self.groups[request.decode_dp]
        group.ranks[0].commands.append(command)
        group.wake()


def _about(rank: DecodeRank, engine: str) -> Any:
    """What a detector tells the rank, whatever it probed: the engine is meant, not its bootstrap server."""
    return (lambda target: rank.suspect(engine)), (lambda target, epoch: rank.bury(engine, epoch))
