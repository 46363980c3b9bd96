"""The ranks of a rendezvous: what prefill and decode may do next, as moves on their cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.process import Entry, Pen, Process, ring
from kvpoll.sim.explorer.rendezvous_nodes import (
    DECODE,
    ENGINE,
    GET,
    QUERY,
    REGISTER,
    SERVER,
    Decode,
    DecodePen,
    Desk,
    Find,
    Flight,
    PrefillPen,
    Rendezvous,
    Server,
    status_of,
    told,
)
from kvpoll.sim.explorer.system import Move, Outcome
from kvpoll.spec.trace import Committed, Computed, PageTag, Requested, Stalled
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine import dp_rank
from kvpoll.statemachine.agreement import BOOTSTRAPPING, Report, decide_bootstrap, decide_transfer
from kvpoll.statemachine.conduct import illegal_fact_stops, waits_for_http
from kvpoll.statemachine.roles import Machines, Queued, Resolution
from kvpoll.statemachine.routes import forgets_on_timeout, gives_up_endpoint

GAUGES = {
    "Bootstrap": "num_prefill_bootstrap_queue_reqs",
    "Waiting": "num_queue_reqs",
    "Inflight": "num_prefill_inflight_queue_reqs",
    "Preallocation": "num_decode_prealloc_queue_reqs",
    "Transfer": "num_decode_transfer_queue_reqs",
    "Running": "num_running_reqs",
}
DEADLINES = {
    "prefill": ("bootstrap", "transfer", "announced"),
    "decode": ("bootstrap", "admission", "waiting", "drain"),
}


class Scene:
    """A model under a profile, and the moves that its parts add to it."""

    def __init__(self, model: Rendezvous, machines: Machines) -> None:
        self.model = model
        self.machines = machines
        self.profile = machines.profile
        self.desk = Desk(machines)
        self.asked = {asked.rid: asked for asked in model.asked}
        self.ranks = tuple(f"{ENGINE}/dp{dp}" for dp in range(model.prefill))
        self.illegal_stops = illegal_fact_stops(self.profile)
        self.moves: list[Move] = []

    def step(self, name: str, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        """Something that the protocol does."""
        self.moves.append(Move(name, "step", scope, act))

    def fault(self, name: str, kind: str, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        """Something that the environment does, if the model has a budget for it."""
        if self.model.faults.get(kind, 0):
            self.moves.append(budget.fault(name, kind, scope, act))

    def timer(self, name: str, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        """A deadline, which is patient, and the fault that it passes early."""
        self.moves.append(Move(name, "deadline", scope, act))
        self.fault(f"{name} early", "slowness", scope, act)

    def own(self, rid: str) -> Incarnation:
        """A request's identity, the same on every rank."""
        return Incarnation(*self.asked[rid].pair, 0)

    def home(self, room: int) -> int:
        """The DP rank that a load balancer which follows the room would choose."""
        return room % self.model.prefill


class _Side:
    """What both sides have in common."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.machines = scene.machines
        self.profile = scene.profile
        self.blocking = waits_for_http(scene.profile, "GET /route")

    def _advance(self, pen: Pen, side: str, rid: str, fact: str) -> None:
        machine = self.machines.prefill_request if side == "prefill" else self.machines.decode_request
        before = pen.entries[rid].state if rid in pen.entries else "Unqueued"
        after, _ = machine.step(Queued(before), fact)
        pen.queue(GAUGES, rid, before, after.state)

    def _entry(self, process: Process, rid: str) -> Entry | None:
        if process.stopped:
            return None
        return next((entry for entry in process.entries if entry.rid == rid), None)

    def _report(self, pen: Pen, entry: Entry, own: Incarnation) -> Report:
        if entry.rejected:
            return Report(0, "room_in_use")
        report = pen.report(own)
        return Report(0, entry.aborted) if entry.aborted and report.poll != 0 else report

    def _drop(self, pen: Pen, side: str, rid: str, cause: str | None) -> Outcome:
        entry, own = pen.entries[rid], self.scene.own(rid)
        self._advance(pen, side, rid, "DropAgreed")
        room = pen.rooms.get(own.room)
        if not entry.rejected and room is not None:
            if room.local.poll not in ("Failed", "Retired"):
                pen.deliver("AbortRequested", own, cause)
            pen.deliver("Cleared", own)
        pen.send("R", ("Failed", rid, side, cause or "failed"))
        return pen.done(f"{pen.node} drops {rid}: {cause}")

    def _rings(self, process: Process, name: str) -> list[Incarnation]:
        """Whose timers of this name may ring: not those of requests that came after the last fault."""
        fresh = {asked.pair for asked in self.scene.model.asked if asked.healed}
        running = [own for own, timer in process.timers if timer == name and own.pair not in fresh]
        return [] if process.stopped else sorted(running)


class PrefillSide(_Side):
    """Moves of the prefill ranks."""

    def add_moves(self, node: str) -> None:
        """Everything that one rank may do."""
        self.scene.step(f"{node} hears R", (node, f"chan R {node}"), partial(self._prefill_told, node))
        self.scene.step(f"{node} hears {DECODE}", (node, f"chan {DECODE} {node}"), partial(self._take_in, node))
        for name in DEADLINES["prefill"]:
            self.scene.timer(f"{node}'s {name} deadline passes", (node,), partial(self._prefill_deadline, node, name))
        for asked in self.scene.model.asked:
            self.scene.step(f"{node} runs {asked.rid}", (node,), partial(self._run, node, asked.rid))
            self.scene.step(f"{node} is done with {asked.rid}", (node,), partial(self._conclude, node, asked.rid))

    def _prefill_pen(self, node: str, process: Process) -> PrefillPen:
        return PrefillPen(node, process, self.machines.sender, self.scene.illegal_stops)

    def _prefill_told(self, node: str, process: Process, channel: tuple[Any, ...]) -> Iterator[Outcome]:
        if not channel:
            return
        kind, rid, *rest = channel[0]
        pen, own = self._prefill_pen(node, process), self.scene.own(rid)
        if process.stopped:
            pass
        elif kind == "Open":
            self._open(pen, rid)
        elif rid in pen.entries:
            pen.deliver("AbortRequested", own, rest[0])
        yield pen.done(f"{node} is told: {kind.lower()} {rid}", channel[1:])

    def _open(self, pen: PrefillPen, rid: str) -> None:
        """The request is queued; will decode find it here, and must the server be told where it runs?"""
        own, ranks = self.scene.own(rid), self.scene.model.prefill
        self._advance(pen, "prefill", rid, "RequestArrived")
        pen.opening = rid
        if not pen.deliver("RequestOpened", own, 1):
            return
        rank = dp_rank.known_rank(self.profile, self.scene.ranks.index(pen.node), self.scene.model.dp_attention)
        cause = dp_rank.conflict(self.profile, own.room, ranks, True, rank)
        if cause is not None:
            pen.marks.append("dp_conflict")
            pen.deliver("DpConflictFound", own, cause.partition(":")[0])
        elif dp_rank.must_register(self.profile, ranks, True):
            pen.events.append(Requested(0, pen.node, SERVER, REGISTER, 0))
            pen.effects.append((f"requests {pen.node}", (REGISTER, own.room, rank)))

    def _take_in(self, node: str, process: Process, channel: tuple[Any, ...]) -> Iterator[Outcome]:
        if not channel:
            return
        kind, own = channel[0]
        pen = self._prefill_pen(node, process)
        if not process.stopped:
            if kind == "Metadata":
                pen.deliver("DestinationRegistered", own, (0, 1), DECODE)
            else:
                pen.deliver("PeerAborted", own, 0, DECODE)
        yield pen.done(f"{node} receives {kind} from {DECODE}", channel[1:])

    def _prefill_deadline(self, node: str, name: str, process: Process) -> Iterator[Outcome]:
        for own in self._rings(process, name):
            pen = self._prefill_pen(node, process)
            ring(pen, own, name)
            yield pen.done(f"{node}'s {name} deadline of room {own.room} passes")

    def _run(self, node: str, rid: str, process: Process) -> Iterator[Outcome]:
        """The bootstrap queue: drop, or admit, compute and write, all in one move."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Bootstrap":
            return
        pen, own = self._prefill_pen(node, process), self.scene.own(rid)
        decision = decide_bootstrap(rid, self._report(pen, entry, own))
        if decision is None:
            return
        if decision.outcome == "drop":
            yield self._drop(pen, "prefill", rid, decision.cause)
            return
        self._advance(pen, "prefill", rid, "AdmissionAgreed")
        pen.deliver("PagesReserved", own)
        pen.events.append(Computed(0, node, own, 0))
        pen.deliver("WritePosted", own, True)
        pen.deliver("WriteCompleted", own)
        self._advance(pen, "prefill", rid, "ForwardFinished")
        yield pen.done(f"{node} runs {rid} and writes its pages")

    def _conclude(self, node: str, rid: str, process: Process) -> Iterator[Outcome]:
        """The transfer is over, well or badly."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Inflight":
            return
        pen = self._prefill_pen(node, process)
        decision = decide_transfer(rid, self._report(pen, entry, self.scene.own(rid)))
        if decision is None:
            return
        if decision.outcome == "drop":
            yield self._drop(pen, "prefill", rid, decision.cause)
            return
        self._advance(pen, "prefill", rid, "TransferAgreed")
        pen.deliver("Cleared", self.scene.own(rid))
        yield pen.done(f"{node} is done with {rid}")


class DecodeSide(_Side):
    """Moves of the decode rank."""

    def add_moves(self) -> None:
        """Everything that it may do."""
        self.scene.step(f"{DECODE} hears R", (DECODE, f"chan R {DECODE}"), self._decode_told)
        self.scene.step(f"{DECODE} hears {SERVER}", (DECODE, f"answers {DECODE}"), self._answered)
        for node in self.scene.ranks:
            self.scene.step(f"{DECODE} hears {node}", (DECODE, f"chan {node} {DECODE}"), self._status)
        for name in DEADLINES["decode"]:
            self.scene.timer(f"{DECODE}'s {name} deadline passes", (DECODE,), partial(self._decode_deadline, name))
        for asked in self.scene.model.asked:
            rid = asked.rid
            self.scene.step(f"{DECODE} asks again for {rid}", (DECODE, SERVER), partial(self._ask_again, rid))
            self.scene.timer(f"{DECODE} stops asking for {rid}", (DECODE,), partial(self._stop_asking, rid))
            self.scene.step(f"{DECODE} reserves for {rid}", (DECODE,), partial(self._grant, rid))
            self.scene.step(f"{DECODE} settles {rid}", (DECODE,), partial(self._settle, rid))

    def _decode_pen(self, decode: Decode) -> DecodePen:
        pen = DecodePen(decode, self.machines, self.scene.illegal_stops)
        pen.pairs = {rid: asked.pair for rid, asked in self.scene.asked.items()}
        return pen

    def _is_blocked(self, decode: Decode) -> bool:
        """Under ``http_calls = "blocking"`` the scheduler waits for the answer to a GET and does nothing else."""
        return self.blocking and any(find.asks in ("topology", "endpoint") for find in decode.finds)

    def _decode_told(self, decode: Decode, channel: tuple[Any, ...]) -> Iterator[Outcome]:
        if not channel or self._is_blocked(decode):
            return
        kind, rid, *rest = channel[0]
        pen, own = self._decode_pen(decode), self.scene.own(rid)
        if decode.process.stopped:
            pass
        elif kind == "Open":
            self._advance(pen, "decode", rid, "RequestArrived")
            pen.opening = rid
            if pen.deliver("RequestOpened", own):
                self._find(pen, rid)
        elif rid in pen.entries:
            pen.entries[rid] = pen.entries[rid]._replace(aborted=pen.entries[rid].aborted or rest[0])
            pen.deliver("AbortRequested", own, rest[0])
        yield pen.done(f"{DECODE} is told: {kind.lower()} {rid}", channel[1:])

    def _status(self, decode: Decode, channel: tuple[Any, ...]) -> Iterator[Outcome]:
        if not channel or self._is_blocked(decode):
            return
        kind, own, *rest = channel[0]
        pen = self._decode_pen(decode)
        if decode.process.stopped:
            pass
        elif kind == "Status":
            pen.deliver("StatusReceived", own, (0, rest[0]))
        else:
            pen.deliver("AbortAcknowledged", own, 0)
        yield pen.done(f"{DECODE} receives {' '.join([kind, *rest])} for room {own.room}", channel[1:])

    def _decode_deadline(self, name: str, decode: Decode) -> Iterator[Outcome]:
        if self._is_blocked(decode):
            return
        for own in self._rings(decode.process, name):
            pen = self._decode_pen(decode)
            if name == "waiting" and forgets_on_timeout(self.profile):
                pen.drop_routes()
            ring(pen, own, name)
            yield pen.done(f"{DECODE}'s {name} deadline of room {own.room} passes")

    # -- decode finds its way

    def _find(self, pen: DecodePen, rid: str) -> None:
        if pen.topology:
            self._resolve(pen, rid)
        else:
            pen.finds[rid] = Find(rid, "topology")
            pen.ask(GET, rid, "")

    def _resolve(self, pen: DecodePen, rid: str) -> None:
        """Topology is known: which DP rank?"""
        room, ranks = self.scene.own(rid).room, self.scene.model.prefill
        facts = (ranks, True, self.scene.home(room))
        state, orders = self.machines.resolution.step(Resolution(), "TopologyLearned", facts)
        if orders:
            pen.finds[rid] = Find(rid, "rank", state)
            pen.ask(QUERY, rid, room)
        else:
            self._fetch(pen, rid, state)

    def _fetch(self, pen: DecodePen, rid: str, state: Resolution) -> None:
        """The DP rank is known: where does it listen?"""
        assert state.rank is not None
        node = self.scene.ranks[state.rank]
        if node in pen.endpoints:
            self._finish(pen, rid, node)
        else:
            pen.finds[rid] = Find(rid, "endpoint", state, node)
            pen.ask(GET, rid, node)

    def _finish(self, pen: DecodePen, rid: str, node: str) -> None:
        own = self.scene.own(rid)
        pen.known[pen.key(own)] = (node,)
        pen.deliver("RoutesResolved", own, (1, 1))
        pen.deliver("SetupFinished", own)

    def _fail(self, pen: DecodePen, rid: str, cause: str) -> None:
        pen.marks.append("setup_failed")
        pen.deliver("RouteUnavailable", self.scene.own(rid), cause)
        pen.deliver("SetupFinished", self.scene.own(rid))

    def _answered(self, decode: Decode, answers: Flight) -> Iterator[Outcome]:
        """An answer; nobody may be waiting for it any more."""
        for answer in sorted(answers):
            pen = self._decode_pen(decode)
            pen.events.append(told(DECODE, answer))
            route, rid, *rest = answer
            find = pen.finds.get(rid)
            if route == GET and find is not None and self.blocking and not decode.process.stopped:
                waited_s = self.profile.number("http_timeout_s") if rest[1] == "timeout" else 0.0
                pen.events.append(Stalled(0, DECODE, waited_s, route))
            if find is not None and not decode.process.stopped:
                self._go_on(pen, find, rest)
            yield pen.done(f"{DECODE} hears {status_of(answer)} to {route} for {rid}", answers - {answer})

    def _go_on(self, pen: DecodePen, find: Find, rest: list[Any]) -> None:
        rid = find.rid
        if find.asks == "rank":
            status, rank = rest
            known = rank[0] if status == "200" and rank else None
            state, orders = self.machines.resolution.step(find.resolution, "DpRankAnswered", known)
            if orders:
                pen.finds[rid] = find._replace(asks="rank again", resolution=state)
            else:
                pen.marks.append("dp_rank_queried")
                self._fetch(pen, rid, state)
        elif find.asks == "topology":
            if rest[1] == "200":
                pen.topology = True
                self._resolve(pen, rid)
            else:
                pen.finds[rid] = find._replace(asks="topology again")
        elif rest[1] == "200":
            pen.endpoints.add(find.node)
            self._finish(pen, rid, find.node)
        else:
            pen.drop_routes()
            pen.finds[rid] = find._replace(asks="endpoint again")
            if gives_up_endpoint(self.profile, 0):
                self._fail(pen, rid, "route_unavailable")

    def _ask_again(self, rid: str, decode: Decode, server: Server) -> Iterator[Outcome]:
        """Of all the times that it asks again, the one that gets another answer."""
        find = next((find for find in decode.finds if find.rid == rid), None)
        if find is None or not server.up or decode.process.stopped or self._is_blocked(decode):
            return
        pen, room = self._decode_pen(decode), self.scene.own(rid).room
        if find.asks == "topology again" and server.registry.state == "Ready":
            pen.finds[rid] = find._replace(asks="topology")
            pen.ask(GET, rid, "", repeat=1)
            yield pen.done(f"{DECODE} asks for the topology again for {rid}", server)
        elif find.asks == "endpoint again" and self.scene.desk.lists(server, find.node):
            pen.finds[rid] = find._replace(asks="endpoint")
            pen.ask(GET, rid, find.node, repeat=1)
            yield pen.done(f"{DECODE} asks for the endpoint of {find.node} again for {rid}", server)
        elif find.asks == "rank again" and self.scene.desk.dp_rank(server, room):
            state, _ = self.machines.resolution.step(find.resolution, "RetryDue")
            pen.finds[rid] = find._replace(asks="rank", resolution=state)
            pen.ask(QUERY, rid, room, repeat=1)
            yield pen.done(f"{DECODE} asks for the DP rank of {rid} again", server)

    def _stop_asking(self, rid: str, decode: Decode) -> Iterator[Outcome]:
        """All the times that it may ask for the topology, or for an endpoint, are used up."""
        find = next((find for find in decode.finds if find.rid == rid), None)
        if find is None or decode.process.stopped or self._is_blocked(decode):
            return
        pen, what = self._decode_pen(decode), find.asks.removesuffix(" again")
        room = pen.rooms.get(self.scene.own(rid).room)
        if find.asks not in ("topology again", "endpoint again") or room is None or room.local.poll != "Bootstrapping":
            return
        self._fail(pen, rid, f"{what}_unavailable")
        yield pen.done(f"{DECODE} stops asking for the {what} for {rid}")

    # -- decode's queues

    def _grant(self, rid: str, decode: Decode) -> Iterator[Outcome]:
        """The preallocation queue: give memory and tell prefill, or drop."""
        entry = self._entry(decode.process, rid)
        if entry is None or entry.state != "Preallocation" or self._is_blocked(decode):
            return
        pen, own = self._decode_pen(decode), self.scene.own(rid)
        report = self._report(pen, entry, own)
        decision = decide_bootstrap(rid, report) if report.poll != BOOTSTRAPPING else None
        if decision is None:
            return
        if decision.outcome == "drop":
            yield self._drop(pen, "decode", rid, decision.cause)
            return
        self._advance(pen, "decode", rid, "MemoryGranted")
        if pen.room_at(own.room).local.poll == "WaitingForInput":
            pen.deliver("PagesReserved", own)
            if pen.deliver("MetadataSent", own):
                pen.publish(own)
        yield pen.done(f"{DECODE} reserves for {rid} and tells prefill where")

    def _settle(self, rid: str, decode: Decode) -> Iterator[Outcome]:
        """The transfer queue: start to decode (and be done with it), or drop."""
        entry = self._entry(decode.process, rid)
        if entry is None or entry.state != "Transfer" or self._is_blocked(decode):
            return
        pen, own = self._decode_pen(decode), self.scene.own(rid)
        decision = decide_transfer(rid, self._report(pen, entry, own))
        if decision is None:
            return
        if decision.outcome == "drop":
            yield self._drop(pen, "decode", rid, decision.cause)
            return
        peer = pen.known[pen.key(own)][0]
        tag = PageTag(own.pair, peer, 0, 0)
        pen.events.append(Committed(0, DECODE, own, (peer,), ({peer: tag},), own.pair))
        self._advance(pen, "decode", rid, "TransferAgreed")
        pen.deliver("Cleared", own)
        self._advance(pen, "decode", rid, "GenerationFinished")
        pen.send("R", ("FirstToken", rid))
        yield pen.done(f"{DECODE} decodes {rid}")
