"""Models of kind "transfer": whole requests between one-rank engines, from dispatch to the last page's release.

Cells: the router "R", every engine ("P0", "D0"), its life ("life P0"), the ordered control channels
("chan D0 P0"), the writes on each wire ("wire P0 D0") and what is left of the fault budget. Each move is one fact of
the protocol, or one thing that the environment does. ``spec/tla/Transfer.tla`` says the same in TLA+.

Assumptions: channels keep order and lose nothing but on a disconnect, of which both ends learn; a deadline passes
when nothing else is left to happen, or early, which costs a fault ("slowness": whatever it waited for took longer);
tombstones outlive every message; one page a request; one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.model import HEAD, read_faults
from kvpoll.sim.explorer.process import Entry, Pen, Process, crashed, restarted, ring
from kvpoll.sim.explorer.system import ROOMS_FROM, Cell, Move, Outcome, System, refuse, send
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import Source
from kvpoll.spec.trace import (
    Addressed,
    Admitted,
    Committed,
    Computed,
    Healed,
    NodeStarted,
    PageTag,
    Pair,
    Resulted,
    Surveyed,
    WriteLanded,
    WritePosted,
    WriteSettled,
)
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import BOOTSTRAPPING, Report, decide_bootstrap, decide_transfer
from kvpoll.statemachine.roles import Machines, Peer, Queued, Routed
from kvpoll.statemachine.routes import forgets_on_timeout, may_use

GAUGES = {
    "Bootstrap": "num_prefill_bootstrap_queue_reqs",
    "Waiting": "num_queue_reqs",
    "Inflight": "num_prefill_inflight_queue_reqs",
    "Preallocation": "num_decode_prealloc_queue_reqs",
    "Transfer": "num_decode_transfer_queue_reqs",
    "Running": "num_running_reqs",
}
LINK_RESTORED = ("LinkRestored",)
DEADLINES = {
    "prefill": ("bootstrap", "transfer", "announced"),
    "decode": ("bootstrap", "admission", "waiting", "drain"),
}


class Asked(NamedTuple):
    """A request of the model: who serves it. healed: dispatched only after the last fault; its timers never ring."""

    rid: str
    pair: Pair
    prefill: str
    decode: str
    healed: bool = False


class Life(NamedTuple):
    """What others can find out about a process: does it live, in which life, and which life is listed for it."""

    up: bool = True
    epoch: int = 0
    listed: int = 0


class Write(NamedTuple):
    """A posted write: whose it is on prefill, whose pages it fills on decode, from and to which page.

    state: "posted"; "failed" (the writer knows, bytes may still land); "cut" (its target's process is gone).
    """

    own: Incarnation
    theirs: Incarnation
    source: int
    target: int
    state: str = "posted"


class Wire(NamedTuple):
    """Writes between two engines, and the life of the target that they can reach."""

    up: bool = True
    epoch: int = 0
    writes: tuple[Write, ...] = ()


class Routing(NamedTuple):
    """The router: (rid, state) of what it has dispatched, how many processes have died so far, and the (node, rid)
    whose connections were reset by a death and that it has not looked at yet."""

    deaths: int = 0
    healed: bool = False
    requests: tuple[tuple[str, Routed], ...] = ()
    resets: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Transfer:
    """What a model file of this kind says."""

    name: str
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    pages: int
    asked: tuple[Asked, ...]
    faults: dict[str, int]


FAULTS = (
    "slowness", "client_abort", "prefill_abort", "decode_abort", "prefill_crash", "decode_crash", "message_duplicate",
    "disconnect", "write_fail", "route_failure", "allocation_failure", "clock_offset",
)  # fmt: skip
_MODEL = {**HEAD, "prefill": list, "decode": list, "pages": int}
_REQUEST = {"rid": str, "room": int, "attempt": int, "prefill": str, "decode": str, "when": str}


def read(name: str, source: Source) -> Transfer:
    """Read the parts of a model file that this kind has. Raises BadInput at the offending line."""
    source.require_known((), source.data, ("model", "faults", "request"), "section")
    head = source.data["model"]
    source.require_known(("model",), head, _MODEL, "key")
    source.require_all(("model",), head, ("prefill", "decode", "pages"), "a transfer model")
    for key in ("prefill", "decode", "pages"):
        source.require_form(("model", key), key, head[key], _MODEL[key])
    if not 1 <= head["pages"] <= 8:
        raise source.error(("model", "pages"), f"`pages` must be from 1 to 8, got {head['pages']}")
    asked = tuple(_request(source, place, entry, head) for place, entry in enumerate(source.data.get("request", ())))
    if not asked:
        raise source.error((), "a model needs at least one [[request]]")
    if len({each.rid for each in asked}) < len(asked) or len({each.pair for each in asked}) < len(asked):
        raise source.error(("request", 0), "each request needs a rid, and a (room, attempt), of its own")
    prefill, decode = tuple(head["prefill"]), tuple(head["decode"])
    return Transfer(name, prefill, decode, head["pages"], asked, read_faults(source, FAULTS))


def _request(source: Source, place: int, entry: Any, head: dict[str, Any]) -> Asked:
    path = ("request", place)
    source.require_forms(path, entry, _REQUEST)
    source.require_all(path, entry, ("rid", "room"), "a request")
    if entry["room"] <= ROOMS_FROM:
        raise source.error((*path, "room"), f"room numbers of models are above {ROOMS_FROM}, got {entry['room']}")
    when = entry.get("when", "start")
    if when not in ("start", "healed"):
        raise source.error((*path, "when"), f'`when` must be "start" or "healed", got {when!r}')
    served = {}
    for side in ("prefill", "decode"):
        served[side] = entry.get(side, head[side][0])
        source.require_known((*path, side), [served[side]], head[side], f"{side} engine")
    pair = (entry["room"], entry.get("attempt", 0))
    return Asked(entry["rid"], pair, served["prefill"], served["decode"], when == "healed")


def build(model: Transfer, protocol: Protocol, profile: Profile) -> System:
    """The model under one profile, ready to be explored."""
    return _Builder(model, Machines(protocol, profile)).system()


def _apply_wire(wire: Wire, operation: tuple[Any, ...]) -> Wire:
    kind, *rest = operation
    if kind == "post":
        reachable = wire.up and wire.epoch == rest[0].theirs.epoch
        write = rest[0] if reachable else rest[0]._replace(state="cut")
        return wire._replace(writes=tuple(sorted((*wire.writes, write))))
    if kind == "writer gone":
        return wire._replace(writes=())
    if kind == "target gone":
        cut = tuple(sorted(write._replace(state="cut") for write in wire.writes))
        return Wire(False, wire.epoch, cut)
    return Wire(True, wire.epoch + 1, wire.writes)


def _apply_life(life: Life, operation: str) -> Life:
    if operation == "down":
        return life._replace(up=False)
    return life._replace(up=True, epoch=life.epoch + 1)


def _apply_channel(channel: tuple[Any, ...], message: Any) -> tuple[Any, ...]:
    return () if message is None else send(channel, (message,))


def _apply_router(router: Routing, resets: tuple[tuple[str, str], ...]) -> Routing:
    """A process died: the connections of these (node, rid) break, as far as there are any."""
    open_now = {rid for rid, state in router.requests if state.state != "Answered"}
    broken = {(node, rid) for node, rid in resets if rid in open_now}
    return router._replace(deaths=router.deaths + 1, resets=router.resets | broken)


def _apply_decode(process: Process, operation: tuple[Any, ...]) -> Process:
    """Bytes arrive: the page holds what was written last, whoever owns it now."""
    page, theirs = operation
    if not process.up or process.epoch != theirs.epoch:
        return process
    return process._replace(contents=tuple(sorted({**dict(process.contents), page: theirs.pair}.items())))


class PrefillPen(Pen):
    """The orders that a sender gives. ``known``: key -> (destination or None, asker or None)."""

    role = "sender"

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        destination, asker = self.known.get(self.key(own), (None, None))
        if kind == "NotifyDecode" and destination is not None:
            self.send(destination[0], ("Status", destination[1], 0, detail))
        elif kind == "AnswerDecode" and origin is not None:
            self.send(origin[0], ("Status", origin[1], 0, detail[0]))
        elif kind == "AcknowledgeAbort":
            chosen = asker if detail is None else origin
            if chosen is not None:
                self.send(chosen[0], ("Acknowledged", chosen[1], 0))

    def note(self, incarnation: Incarnation, destination: Any = None, asker: Any = None) -> None:
        """Remember where to write and whom to acknowledge, for as long as there is a room."""
        before = self.known.get(self.key(incarnation), (None, None))
        self.known[self.key(incarnation)] = (destination or before[0], asker or before[1])

    def tidy(self, incarnation: Incarnation) -> None:
        """No room, nothing to remember for it."""
        room = self.rooms.get(incarnation.room)
        if room is None or self.key(room.incarnation) != self.key(incarnation):
            self.known.pop(self.key(incarnation), None)


class DecodePen(Pen):
    """The orders that a receiver gives. ``known``: key -> (prefill node, its epoch as known)."""

    role = "receiver"
    pools = ("kv", "aux")

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        peer = self.known.get(self.key(own))
        if kind == "NotifyPrefill" and peer is not None:
            self.send(peer[0], ("Abort", Incarnation(own.room, own.attempt, peer[1]), own))
        elif kind == "SendMetadata":
            self.publish(own)

    def publish(self, own: Incarnation) -> None:
        """Tell prefill where to write."""
        peer, page = self.known.get(self.key(own)), self.held.get(own.pair)
        if peer is None or page is None:
            return
        node, epoch = peer
        self.events.append(Addressed(0, self.node, own, node, epoch, epoch))
        self.send(node, ("Metadata", Incarnation(own.room, own.attempt, epoch), own, page))


class _Builder:
    """Puts the cells and moves of one model together."""

    def __init__(self, model: Transfer, machines: Machines) -> None:
        self.model = model
        self.machines = machines
        self.profile = machines.profile
        self.asked = {asked.rid: asked for asked in model.asked}
        self.illegal_stops = self.profile["illegal_fact"] == "stops_scheduler"
        self.moves: list[Move] = []

    def system(self) -> System:
        model = self.model
        cells = [Cell("R", Routing(), _apply_router), Cell(budget.CELL, budget.budget(model.faults), refuse)]
        for node in (*model.prefill, *model.decode):
            cells.append(Cell(node, self._fresh(node), _apply_decode if node in model.decode else refuse))
            cells.append(Cell(f"life {node}", Life(), _apply_life))
            cells += [Cell(f"chan R {node}", (), _apply_channel), Cell(f"chan {node} R", (), _apply_channel)]
        for left in model.prefill:
            for right in model.decode:
                cells += [Cell(f"chan {left} {right}", (), _apply_channel), Cell(f"chan {right} {left}", (), _apply_channel)]
                cells.append(Cell(f"wire {left} {right}", Wire(), _apply_wire))
        self._router_moves()
        for node in model.prefill:
            self._prefill_moves(node)
        for node in model.decode:
            self._decode_moves(node)
        for left in model.prefill:
            for right in model.decode:
                self._wire_moves(left, right)
                self._link_moves(left, right)
        start = tuple(NodeStarted(0, node, 0) for node in (*model.prefill, *model.decode))
        return System(
            model.name, cells, self.moves, start, self._survey, self._renames(), header={"profile": self.profile.name}
        )

    def _fresh(self, node: str) -> Process:
        others = self.model.decode if node in self.model.prefill else self.model.prefill
        watches = node in self.model.decode or self.profile["liveness_probe"] == "rank_epoch"
        peers = tuple((other, Peer("Alive", 0)) for other in sorted(others)) if watches else ()
        return Process(free=frozenset(range(self.model.pages)), peers=peers)

    def _move(self, name: str, kind: Any, scope: tuple[str, ...], act: Callable[..., Any], optional: bool = False) -> None:
        self.moves.append(Move(name, kind, scope, act, optional))

    def _fault(self, name: str, kind: str, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        if self.model.faults.get(kind, 0):
            self.moves.append(budget.fault(name, kind, scope, act))

    def pen(self, node: str, process: Process) -> Any:
        """A pen for this node's side."""
        if node in self.model.prefill:
            return PrefillPen(node, process, self.machines.sender, self.illegal_stops)
        return DecodePen(node, process, self.machines.receiver, self.illegal_stops)

    def own(self, rid: str, process: Process) -> Incarnation:
        """A request's identity in this life of a process."""
        return Incarnation(*self.asked[rid].pair, process.epoch)

    # -- the router

    def _router_moves(self) -> None:
        for asked in self.model.asked:
            self._move(f"R dispatches {asked.rid}", "step", ("R",), lambda router, asked=asked: self._dispatch(router, asked))
            self._fault(f"the client of {asked.rid} leaves", "client_abort", ("R",), lambda router, asked=asked: self._leave(router, asked))
        for node in (*self.model.prefill, *self.model.decode):
            self._move(f"R hears {node}", "step", ("R", f"chan {node} R"), lambda router, channel, node=node: self._answer(router, channel, node))
            if self.model.faults.get("prefill_crash", 0) + self.model.faults.get("decode_crash", 0):
                self._move(f"R is cut off from {node}", "step", ("R",), partial(self._reset, node=node))
        if any(asked.healed for asked in self.model.asked):
            self._move("the faults are over", "step", ("R", budget.CELL, *(f"life {node}" for node in (*self.model.prefill, *self.model.decode))), self._heal)

    def _dispatch(self, router: Routing, asked: Asked) -> Iterator[Outcome]:
        if asked.rid in dict(router.requests) or (asked.healed and not router.healed):
            return
        after = router._replace(requests=tuple(sorted((*router.requests, (asked.rid, Routed())))))
        admitted = Admitted(router.deaths, "R", asked.rid, asked.pair, (asked.prefill,), (asked.decode,))
        effects = tuple((f"chan R {node}", ("Open", asked.rid)) for node in (asked.prefill, asked.decode))
        yield Outcome((after,), f"the router sends both legs of {asked.rid}", effects, (admitted,))

    def _heal(self, router: Routing, left: budget.Budget, *lives: Life) -> Iterator[Outcome]:
        if router.healed or not all(life.up and life.listed == life.epoch for life in lives):
            return
        none = tuple((kind, 0) for kind, _ in left)
        yield Outcome((router._replace(healed=True), none, *lives), "the last fault is over", (), (Healed(0, "R"),))

    def _leave(self, router: Routing, asked: Asked) -> Iterator[Outcome]:
        yield from self._route(router, asked.rid, "ClientLeft", None, f"the client of {asked.rid} leaves", ())

    def _answer(self, router: Routing, channel: tuple[Any, ...], node: str) -> Iterator[Outcome]:
        if not channel:
            return
        kind, *rest = channel[0]
        if kind == "FirstToken":
            yield from self._route(router, rest[0], "DecodeAnswered", None, f"the first token of {rest[0]}", (channel[1:],))
            return
        rid, side, cause = rest
        label = f"the {side} leg of {rid} failed"
        yield from self._route(router, rid, "LegFailed", (side, cause), label, (channel[1:],))

    def _reset(self, router: Routing, node: str) -> Iterator[Outcome]:
        side = "prefill" if node in self.model.prefill else "decode"
        for where, rid in sorted(router.resets):
            if where == node:
                after = router._replace(resets=router.resets - {(where, rid)})
                label = f"the connection of {rid} to {node} is reset"
                yield from self._route(after, rid, "LegFailed", (side, "engine_crashed"), label, ())

    def _route(self, router: Routing, rid: str, fact: str, detail: Any, label: str, rest: tuple[Any, ...]) -> Iterator[Outcome]:
        """Step the router's view of a request. ``rest``: what remains on the channel, if one was read."""
        requests = dict(router.requests)
        if rid not in requests:
            return
        asked, before = self.asked[rid], requests[rid]
        requests[rid], orders = self.machines.router.step(before, fact, detail)
        effects, events = [], []
        for order, argument in orders:
            if order == "AnswerClient":
                ok = argument == "ok"
                events.append(Resulted(0, "R", rid, asked.pair, ok, requests[rid].cause, 0.0 if ok else None))
            elif order == "CancelLeg":
                legs = {"prefill": (asked.prefill,), "decode": (asked.decode,)}.get(argument, (asked.prefill, asked.decode))
                cause = requests[rid].cause or "cancelled"
                effects += [(f"chan R {node}", ("Cancel", rid, cause)) for node in legs]
        after = router._replace(requests=tuple(sorted(requests.items())))
        yield Outcome((after, *rest), label, tuple(effects), tuple(events))

    # -- what both sides have in common

    def _common_moves(self, node: str, side: str, others: tuple[str, ...]) -> None:
        self._move(f"{node} hears R", "step", (node, f"chan R {node}"), lambda process, channel: self._hear_router(node, side, process, channel))
        for other in others:
            self._move(f"{node} hears {other}", "step", (node, f"chan {other} {node}"), lambda process, channel, other=other: self._hear(node, other, process, channel, 1))
            self._fault(f"{node} hears {other} twice", "message_duplicate", (node, f"chan {other} {node}"), lambda process, channel, other=other: self._hear(node, other, process, channel, 0))
            self._move(f"{node} probes {other}", "step", (node, f"life {other}"), lambda process, life, other=other: self._probe(node, other, process, life))
        for name in DEADLINES[side]:
            act = partial(self._deadlines, node, name)
            self._move(f"{node}'s {name} deadline passes", "deadline", (node,), act)
            self._fault(f"{node}'s {name} deadline passes early", "slowness", (node,), act)
        for asked in self._served(node):
            self._fault(f"{node} gives {asked.rid} up", f"{side}_abort", (node,), lambda process, rid=asked.rid: self._abort(node, process, rid))
        self._fault(f"{node} dies", f"{side}_crash", (node,), lambda process: self._crash(node, side, others, process))
        if self.model.faults.get(f"{side}_crash", 0):
            self._move(f"{node} restarts", "step", (node,), lambda process: self._restart(node, side, others, process))
            self._move(f"{node} registers", "step", (f"life {node}",), lambda life: self._register(node, life))
        self._fault(f"the clock of {node} is set back", "clock_offset", (node,), lambda process: self._set_back(node, process))

    def _served(self, node: str) -> list[Asked]:
        return [asked for asked in self.model.asked if node in (asked.prefill, asked.decode)]

    def _hear_router(self, node: str, side: str, process: Process, channel: tuple[Any, ...]) -> Iterator[Outcome]:
        if not channel:
            return
        kind, rid, *rest = channel[0]
        pen = self.pen(node, process)
        if not process.up:
            if kind == "Open":
                pen.send("R", ("Failed", rid, side, "connection_refused"))
            yield pen.done(f"{node} is down and refuses {rid}", channel[1:])
            return
        own = self.own(rid, process)
        if process.stopped:
            pass
        elif kind == "Open":
            self._open(pen, side, rid, own)
        elif rid in pen.entries:
            self._give_up(pen, side, rid, own, rest[0])
        yield pen.done(f"{node} is told: {kind.lower()} {rid}", channel[1:])

    def _open(self, pen: Pen, side: str, rid: str, own: Incarnation) -> None:
        first = {"prefill": "Bootstrap", "decode": "Preallocation"}[side]
        machine = self.machines.prefill_request if side == "prefill" else self.machines.decode_request
        state, _ = machine.step(Queued(), "RequestArrived")
        assert state.state == first
        pen.queue(GAUGES, rid, "Unqueued", first)
        pen.opening = rid
        pen.deliver("RequestOpened", own, 1 if side == "prefill" else None)

    def _give_up(self, pen: Pen, side: str, rid: str, own: Incarnation, cause: str) -> None:
        if side == "decode":
            entry = pen.entries[rid]
            if entry.state == "Running":
                pen.release(own)
                self._advance(pen, side, rid, "DropAgreed")
                return
            pen.entries[rid] = entry._replace(aborted=entry.aborted or cause)
        pen.deliver("AbortRequested", own, cause)

    def _advance(self, pen: Pen, side: str, rid: str, fact: str) -> None:
        machine = self.machines.prefill_request if side == "prefill" else self.machines.decode_request
        before = pen.entries[rid].state
        after, _ = machine.step(Queued(before), fact)
        pen.queue(GAUGES, rid, before, after.state)

    def _hear(self, node: str, other: str, process: Process, channel: tuple[Any, ...], taken: int) -> Iterator[Outcome]:
        if not channel:
            return
        pen = self.pen(node, process)
        if not process.up:
            if taken:
                yield pen.done(f"{channel[0][0]} is lost: {node} is down", channel[1:])
            return
        if not process.stopped:
            self._take_in(pen, other, channel[0])
        yield pen.done(f"{node} receives {channel[0][0]} from {other}", channel[taken:])

    def _take_in(self, pen: Any, other: str, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "Status":
            pen.deliver("StatusReceived", rest[0], (rest[1], rest[2]))
        elif kind == "Acknowledged":
            pen.deliver("AbortAcknowledged", rest[0], rest[1])
        elif kind == "Metadata":
            meant, theirs, page = rest
            destination = (other, theirs, page)
            pen.note(meant, destination=destination)
            pen.deliver("DestinationRegistered", meant, (0, 1), destination)
            pen.tidy(meant)
        elif kind == "Abort":
            meant, theirs = rest
            pen.note(meant, asker=(other, theirs))
            pen.deliver("PeerAborted", meant, 0, (other, theirs))
            pen.tidy(meant)
        else:
            self._tell_rooms(pen, other, "LinkRestored", None)

    def _tell_rooms(self, pen: Any, other: str, fact: str, epoch: int | None) -> None:
        """Tell every room that has to do with another engine; with ``epoch``, only those of another life of it."""
        for room in list(pen.rooms.values()):
            known = pen.known.get(pen.key(room.incarnation))
            if known is None:
                continue
            if pen.role == "receiver":
                if known[0] == other and known[1] != epoch:
                    pen.deliver(fact, room.incarnation, 1 if fact == "PeerDied" else None)
            elif known[0] is not None and known[0][0] == other and known[0][1].epoch != epoch:
                pen.deliver(fact, room.incarnation)

    def _probe(self, node: str, other: str, process: Process, life: Life) -> Iterator[Outcome]:
        belief = dict(process.peers).get(other)
        if belief is None or not process.up or process.stopped:
            return
        if life.up and belief.state == "Alive" and belief.epoch == life.epoch:
            return
        fact, detail = ("ProbeAnswered", life.epoch) if life.up else ("ProbeMissed", None)
        pen = self.pen(node, process)
        pen.peers[other], orders = self.machines.peer.step(belief, fact, detail)
        for order, _ in orders:
            if pen.role == "receiver":
                pen.routes.pop(other, None)
            if order == "DeclareSuspected":
                self._tell_rooms(pen, other, "PeerSuspected", None)
            else:
                self._tell_rooms(pen, other, "PeerDied", life.epoch)
        yield pen.done(f"{node} probes {other}: {'an answer' if life.up else 'silence'}", life)

    def _deadlines(self, node: str, name: str, process: Process) -> Iterator[Outcome]:
        if process.stopped:
            return
        fresh = {asked.pair for asked in self.model.asked if asked.healed}
        for incarnation, timer in sorted(process.timers):
            if timer != name or incarnation.pair in fresh:
                continue
            pen = self.pen(node, process)
            if name == "waiting" and forgets_on_timeout(self.profile):
                peer = pen.known.get(pen.key(incarnation))
                if peer is not None:
                    pen.routes.pop(peer[0], None)
            ring(pen, incarnation, name)
            yield pen.done(f"{node}'s {name} deadline of room {incarnation.room} passes")

    def _abort(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        pen = self.pen(node, process)
        if rid not in pen.entries or process.stopped:
            return
        side = "prefill" if node in self.model.prefill else "decode"
        self._give_up(pen, side, rid, self.own(rid, process), "aborted")
        yield pen.done(f"{node} gives {rid} up")

    # -- lives

    def _crash(self, node: str, side: str, others: tuple[str, ...], process: Process) -> Iterator[Outcome]:
        if not process.up:
            return
        after, events = crashed(node, process, 0.5)
        effects: list[tuple[str, Any]] = [(f"life {node}", "down"), (f"chan R {node}", None)]
        effects += [(f"chan {other} {node}", None) for other in others]
        effects.append(("R", tuple((node, asked.rid) for asked in self._served(node))))
        operation = "writer gone" if side == "prefill" else "target gone"
        effects += [(_wire(node, other, side), (operation,)) for other in others]
        yield Outcome((after,), f"the process of {node} dies", tuple(effects), events)

    def _restart(self, node: str, side: str, others: tuple[str, ...], process: Process) -> Iterator[Outcome]:
        if process.up:
            return
        after, events = restarted(node, process, self._fresh(node), 0)
        effects: list[tuple[str, Any]] = [(f"life {node}", "up")]
        if side == "decode":
            effects += [(_wire(node, other, side), ("target up",)) for other in others]
        yield Outcome((after,), f"{node} starts again at the same address", tuple(effects), events)

    def _register(self, node: str, life: Life) -> Iterator[Outcome]:
        if life.up and life.listed != life.epoch:
            yield Outcome((life._replace(listed=life.epoch),), f"{node} registers its new life")

    def _set_back(self, node: str, process: Process) -> Iterator[Outcome]:
        """Timers that compare the wall clock do not ring in any time that matters when it is set far back."""
        if not process.timers:
            return
        wall = self.profile["deadline_clock"] == "wall"
        after = process._replace(timers=frozenset()) if wall else process
        yield Outcome((after,), f"the wall clock of {node} is set back")

    # -- prefill

    def _prefill_moves(self, node: str) -> None:
        self._common_moves(node, "prefill", self.model.decode)
        for asked in self._served(node):
            for verb, act in (("admits", self._admit), ("sends", self._send), ("is done with", self._conclude)):
                self._move(f"{node} {verb} {asked.rid}", "step", (node,), lambda process, act=act, rid=asked.rid: act(node, process, rid))

    def _entry(self, process: Process, rid: str) -> Entry | None:
        if not process.up or process.stopped:
            return None
        return next((entry for entry in process.entries if entry.rid == rid), None)

    def _report(self, pen: Pen, entry: Entry, own: Incarnation) -> Report:
        if entry.rejected:
            return Report(0, "room_in_use")
        report = pen.report(own)
        return Report(0, entry.aborted) if entry.aborted and report.poll != 0 else report

    def _admit(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        """The bootstrap queue: admit and take pages, or drop."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Bootstrap":
            return
        pen, own = self.pen(node, process), self.own(rid, process)
        decision = decide_bootstrap(rid, self._report(pen, entry, own))
        if decision is None or (decision.outcome == "admit" and not pen.free):
            return
        if decision.outcome == "drop":
            yield self._drop(pen, "prefill", rid, own, decision.cause)
            return
        self._advance(pen, "prefill", rid, "AdmissionAgreed")
        pen.reserve(own)
        pen.deliver("PagesReserved", own)
        yield pen.done(f"{node} admits {rid}")

    def _send(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        """The forward pass is over: post the write."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Waiting":
            return
        pen, own = self.pen(node, process), self.own(rid, process)
        decision = decide_transfer(rid, self._report(pen, entry, own))
        if decision is not None and decision.outcome == "drop":
            yield self._drop(pen, "prefill", rid, own, decision.cause)
            return
        pen.events.append(Computed(0, node, own, 0))
        destination, page = pen.known.get(pen.key(own), (None, None))[0], pen.held.get(own.pair)
        if destination is not None and page is not None and pen.deliver("WritePosted", own, True):
            other, theirs, target = destination
            number = _write_number(own, theirs)
            pen.events.append(WritePosted(0, node, number, theirs, other, 0, True, (page,), (target,), target))
            pen.effects.append((f"wire {node} {other}", ("post", Write(own, theirs, page, target))))
        self._advance(pen, "prefill", rid, "ForwardFinished")
        yield pen.done(f"{node} posts the write of {rid}")

    def _conclude(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        """The transfer is over, well or badly."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Inflight":
            return
        pen, own = self.pen(node, process), self.own(rid, process)
        decision = decide_transfer(rid, self._report(pen, entry, own))
        if decision is None:
            return
        if decision.outcome == "drop":
            yield self._drop(pen, "prefill", rid, own, decision.cause)
            return
        self._advance(pen, "prefill", rid, "TransferAgreed")
        pen.deliver("Cleared", own)
        yield pen.done(f"{node} is done with {rid}")

    def _drop(self, pen: Pen, side: str, rid: str, own: Incarnation, cause: str | None) -> Outcome:
        entry = pen.entries[rid]
        self._advance(pen, side, rid, "DropAgreed")
        room = pen.rooms.get(own.room)
        if not entry.rejected and room is not None and pen.key(room.incarnation) == pen.key(own):
            if room.local.poll not in ("Failed", "Retired"):
                pen.deliver("AbortRequested", own, cause)
            pen.deliver("Cleared", own)
        pen.send("R", ("Failed", rid, side, cause or "failed"))
        return pen.done(f"{pen.node} drops {rid}: {cause}")

    # -- decode

    def _decode_moves(self, node: str) -> None:
        self._common_moves(node, "decode", self.model.prefill)
        for asked in self._served(node):
            rid, peer = asked.rid, asked.prefill
            self._move(f"{node} finds {peer} for {rid}", "step", (node, f"life {peer}"), lambda process, life, rid=rid: self._find(node, process, life, rid))
            self._fault(f"{node} cannot find {peer} for {rid}", "route_failure", (node,), lambda process, rid=rid: self._lose_way(node, process, rid))
            for verb, act in (("reserves for", self._grant), ("settles", self._settle), ("ends", self._end)):
                self._move(f"{node} {verb} {rid}", "step", (node,), lambda process, act=act, rid=rid: act(node, process, rid))
            self._fault(f"{node} has no memory for {rid}", "allocation_failure", (node,), lambda process, rid=rid: self._grant(node, process, rid, False))

    def _seeking(self, process: Process, rid: str) -> bool:
        """Does the room of this request still want routes?"""
        if self._entry(process, rid) is None:
            return False
        own = self.own(rid, process)
        room = next((room for room in process.rooms if room.incarnation.room == own.room), None)
        return room is not None and room.incarnation.pair == own.pair and room.local.poll == "Bootstrapping"

    def _find(self, node: str, process: Process, life: Life, rid: str) -> Iterator[Outcome]:
        """GET /route, or the cache; then the set-up call returns."""
        if not self._seeking(process, rid):
            return
        pen, own, peer = self.pen(node, process), self.own(rid, process), self.asked[rid].prefill
        epoch = pen.routes.get(peer)
        if epoch is None:
            believed = pen.peers[peer].epoch if peer in pen.peers else None
            if not life.up or not may_use(self.profile, life.listed, believed):
                return
            epoch = life.listed
        pen.routes[peer] = epoch
        pen.known[pen.key(own)] = (peer, epoch)
        pen.deliver("RoutesResolved", own, (1, 1))
        pen.deliver("SetupFinished", own)
        yield pen.done(f"{node} finds {peer} for {rid}", life)

    def _lose_way(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        if not self._seeking(process, rid):
            return
        pen, own = self.pen(node, process), self.own(rid, process)
        pen.routes.pop(self.asked[rid].prefill, None)
        pen.deliver("RouteUnavailable", own, "route_404")
        pen.deliver("SetupFinished", own)
        yield pen.done(f"{node} cannot find {self.asked[rid].prefill} for {rid}")

    def _grant(self, node: str, process: Process, rid: str, enough: bool = True) -> Iterator[Outcome]:
        """The preallocation queue: give memory and tell prefill, or drop."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Preallocation":
            return
        pen, own = self.pen(node, process), self.own(rid, process)
        report = self._report(pen, entry, own)
        decision = decide_bootstrap(rid, report) if report.poll != BOOTSTRAPPING else None
        if decision is None or (decision.outcome == "admit" and not pen.free):
            return
        if decision.outcome == "drop":
            if enough:
                yield self._drop(pen, "decode", rid, own, decision.cause)
            return
        self._advance(pen, "decode", rid, "MemoryGranted")
        if not enough:
            pen.deliver("AbortRequested", own, "allocation_failed")
            yield pen.done(f"{node} finds no memory for {rid}")
            return
        if pen.room_at(own.room).local.poll == "WaitingForInput":
            pen.reserve(own)
            if pen.deliver("PagesReserved", own) and pen.deliver("MetadataSent", own):
                pen.publish(own)
        yield pen.done(f"{node} reserves for {rid} and tells prefill where")

    def _settle(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        """The transfer queue: start to decode, or drop."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Transfer":
            return
        pen, own = self.pen(node, process), self.own(rid, process)
        decision = decide_transfer(rid, self._report(pen, entry, own))
        if decision is None:
            return
        if decision.outcome == "drop":
            yield self._drop(pen, "decode", rid, own, decision.cause)
            return
        pen.events.append(self._committed(pen, node, own, self.asked[rid].prefill))
        self._advance(pen, "decode", rid, "TransferAgreed")
        pen.deliver("Cleared", own)
        pen.send("R", ("FirstToken", rid))
        yield pen.done(f"{node} starts to decode {rid}")

    def _committed(self, pen: Pen, node: str, own: Incarnation, peer: str) -> Committed:
        page = pen.held.get(own.pair)
        pair = None if page is None else pen.contents.get(page)
        contents = () if page is None else ({} if pair is None else {peer: PageTag(pair, peer, 0, 0)},)
        return Committed(0, node, own, (peer,), contents or ({},), pair)

    def _end(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        entry = self._entry(process, rid)
        if entry is None or entry.state != "Running":
            return
        pen = self.pen(node, process)
        pen.release(self.own(rid, process))
        self._advance(pen, "decode", rid, "GenerationFinished")
        yield pen.done(f"{node} has decoded {rid}")

    # -- writes and links

    def _wire_moves(self, left: str, right: str) -> None:
        wire = f"wire {left} {right}"
        self._move(f"{left} writes to {right}", "step", (left, wire), lambda process, wire: self._complete(left, right, process, wire))
        self._move(f"{left} loses {right}", "step", (left, wire), lambda process, wire: self._fail(left, right, process, wire, "cut"))
        self._move(f"{left}'s failed write to {right} is over", "step", (left, wire), lambda process, wire: self._over(left, right, process, wire))
        self._move(f"{left}'s failed write lands on {right}", "step", (wire,), lambda wire: self._land_late(left, right, wire), optional=True)
        self._fault(f"{left}'s write to {right} fails", "write_fail", (left, wire), lambda process, wire: self._fail(left, right, process, wire, "posted"))

    def _complete(self, left: str, right: str, process: Process, wire: Wire) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state != "posted":
                continue
            pen = self.pen(left, process)
            number = _write_number(write.own, write.theirs)
            pen.events.append(WriteLanded(0, right, number, write.theirs, (write.target,)))
            pen.events.append(WriteSettled(0, left, number, True))
            pen.effects.append((right, (write.target, write.theirs)))
            if not process.stopped:
                pen.deliver("WriteCompleted", write.own)
            yield pen.done(f"{left} has written room {write.own.room} to {right}", _without(wire, write))

    def _fail(self, left: str, right: str, process: Process, wire: Wire, state: str) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state != state:
                continue
            pen = self.pen(left, process)
            after = write._replace(state="failed" if state == "posted" else "dead")
            if not process.stopped:
                pen.deliver("WriteFailed", write.own)
            rest = _without(wire, write)
            yield pen.done(
                f"the write of room {write.own.room} from {left} to {right} fails",
                rest._replace(writes=tuple(sorted((*rest.writes, after)))),
            )

    def _over(self, left: str, right: str, process: Process, wire: Wire) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state not in ("failed", "dead"):
                continue
            pen = self.pen(left, process)
            pen.events.append(WriteSettled(0, left, _write_number(write.own, write.theirs), False))
            if not process.stopped:
                pen.deliver("WriteSettled", write.own)
            yield pen.done(f"the failed write of room {write.own.room} moves no more bytes", _without(wire, write))

    def _land_late(self, left: str, right: str, wire: Wire) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state == "failed":
                landed = WriteLanded(0, right, _write_number(write.own, write.theirs), write.theirs, (write.target,))
                after = _without(wire, write)._replace
                kept = write._replace(state="dead")
                yield Outcome(
                    (after(writes=tuple(sorted((*_without(wire, write).writes, kept)))),),
                    f"bytes of the failed write of room {write.own.room} land on {right} after all",
                    ((right, (write.target, write.theirs)),),
                    (landed,),
                    ("late_landing",),
                )

    def _link_moves(self, left: str, right: str) -> None:
        there, back = f"chan {left} {right}", f"chan {right} {left}"
        self._fault(f"the link {left} {right} breaks", "disconnect", (there, back), self._disconnect)

    def _disconnect(self, there: tuple[Any, ...], back: tuple[Any, ...]) -> Iterator[Outcome]:
        if there or back:
            yield Outcome(((LINK_RESTORED,), (LINK_RESTORED,)), "the link breaks, loses what is on it, and is back")

    # -- nodes at rest

    def _survey(self, cell: str, value: Any) -> Iterator[Any]:
        if not isinstance(value, Process) or not value.up:
            return
        tables = (
            ("rooms", sum(room.local.poll != "Retired" for room in value.rooms)),
            ("requests", len(value.entries)),
            ("timers", len(value.timers)),
            ("pages", len(value.held)),
        )
        gauges: dict[str, float] = {}
        for entry in value.entries:
            gauges[GAUGES[entry.state]] = gauges.get(GAUGES[entry.state], 0) + 1
        yield Surveyed(0, cell, tables, tuple(sorted(gauges.items())), 0)

    def _renames(self) -> tuple[dict[Any, Any], ...]:
        """Requests with the same engines, different rooms and the same attempt may trade places."""
        renames = []
        for place, one in enumerate(self.model.asked):
            for other in self.model.asked[place + 1 :]:
                same = one._replace(rid="", pair=(0, one.pair[1])) == other._replace(rid="", pair=(0, other.pair[1]))
                alone = sum(asked.pair[0] in (one.pair[0], other.pair[0]) for asked in self.model.asked) == 2
                if same and alone:
                    rename = {one.rid: other.rid, other.rid: one.rid, one.pair[0]: other.pair[0], other.pair[0]: one.pair[0]}
                    renames.append(rename)
        return tuple(renames)


def _wire(node: str, other: str, side: str) -> str:
    return f"wire {node} {other}" if side == "prefill" else f"wire {other} {node}"


def _without(wire: Wire, write: Write) -> Wire:
    return wire._replace(writes=tuple(each for each in wire.writes if each != write))


def _write_number(own: Incarnation, theirs: Incarnation) -> int:
    """A write's name in the trace: made of whom it belongs to, so that equal histories have equal names."""
    return ((own.room * 16 + own.attempt) * 16 + own.epoch) * 16 + theirs.epoch
