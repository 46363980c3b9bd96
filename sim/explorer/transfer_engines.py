"""The moves of the engines in a transfer model: what prefill and decode do, and what can happen to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.process import Entry, Pen, Process, crashed, restarted, ring
from kvpoll.sim.explorer.system import Move, Outcome, Sorted
from kvpoll.sim.explorer.transfer_cells import (
    DEADLINES,
    GAUGES,
    LINK_RESTORED,
    Asked,
    DecodePen,
    Life,
    PrefillPen,
    Transfer,
    Wire,
    Write,
    wire_name,
    without,
    write_number,
)
from kvpoll.spec.trace import (
    Committed,
    Computed,
    PageTag,
    WriteLanded,
    WritePosted,
    WriteSettled,
)
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import Report, decide_bootstrap, decide_transfer
from kvpoll.statemachine.conduct import follows_wall_clock, illegal_fact_stops, probes_ranks
from kvpoll.statemachine.machine import Local
from kvpoll.statemachine.roles import Machines, Peer, Queued
from kvpoll.statemachine.routes import forgets_on_timeout, may_use, still_looks

NOT_HERE: Any = (None, None, None)


class Engines:
    """The moves of engines and of what joins them; ``moves`` collects them."""

    def __init__(self, model: Transfer, machines: Machines) -> None:
        self.model = model
        self.machines = machines
        self.profile = machines.profile
        self.asked = {asked.rid: asked for asked in model.asked}
        self.illegal_stops = illegal_fact_stops(self.profile)
        self.moves: list[Move] = []

    def fresh(self, node: str) -> Process:
        others = self.model.decode if node in self.model.prefill else self.model.prefill
        watches = node in self.model.decode or probes_ranks(self.profile)
        peers = tuple((other, Peer("Alive", 0)) for other in sorted(others)) if watches else ()
        return Process(free=frozenset(range(self.model.pages)), peers=peers)

    def move(
        self, name: str, kind: Any, scope: tuple[str, ...], act: Callable[..., Any], optional: bool = False
    ) -> None:
        self.moves.append(Move(name, kind, scope, act, optional))

    def fault(self, name: str, kind: str, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
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

    # -- what both sides have in common

    def common_moves(self, node: str, side: str, others: tuple[str, ...]) -> None:
        self.move(
            f"{node} hears R",
            "step",
            (node, f"chan R {node}"),
            lambda process, channel: self._hear_router(node, side, process, channel),
        )
        for other in others:
            self.move(
                f"{node} hears {other}",
                "step",
                (node, f"chan {other} {node}"),
                lambda process, channel, other=other: self._hear(node, other, process, channel, 1),
            )
            self.fault(
                f"{node} hears {other} twice",
                "message_duplicate",
                (node, f"chan {other} {node}"),
                lambda process, channel, other=other: self._hear(node, other, process, channel, 0),
            )
            self.move(
                f"{node} probes {other}",
                "step",
                (node, f"life {other}"),
                lambda process, life, other=other: self._probe(node, other, process, life),
            )
        for name in DEADLINES[side]:
            act = partial(self._deadlines, node, name)
            self.move(f"{node}'s {name} deadline passes", "deadline", (node,), act)
            self.fault(f"{node}'s {name} deadline passes early", "slowness", (node,), act)
        for asked in self.served(node):
            self.fault(
                f"{node} gives {asked.rid} up",
                f"{side}_abort",
                (node,),
                lambda process, rid=asked.rid: self._abort(node, process, rid),
            )
        self.fault(f"{node} dies", f"{side}_crash", (node,), lambda process: self._crash(node, side, others, process))
        if self.model.faults.get(f"{side}_crash", 0):
            self.move(f"{node} restarts", "step", (node,), lambda process: self._restart(node, side, others, process))
            self.move(f"{node} registers", "step", (f"life {node}",), lambda life: self._register(node, life))
        self.fault(
            f"the clock of {node} is set back", "clock_offset", (node,), lambda process: self._set_back(node, process)
        )

    def served(self, node: str) -> list[Asked]:
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
        effects.append(("R", tuple((node, asked.rid) for asked in self.served(node))))
        operation = "writer gone" if side == "prefill" else "target gone"
        effects += [(wire_name(node, other, side), (operation,)) for other in others]
        yield Outcome((after,), f"the process of {node} dies", tuple(effects), events)

    def _restart(self, node: str, side: str, others: tuple[str, ...], process: Process) -> Iterator[Outcome]:
        if process.up:
            return
        after, events = restarted(node, process, self.fresh(node), 0)
        effects: list[tuple[str, Any]] = [(f"life {node}", "up")]
        if side == "decode":
            effects += [(wire_name(node, other, side), ("target up",)) for other in others]
        yield Outcome((after,), f"{node} starts again at the same address", tuple(effects), events)

    def _register(self, node: str, life: Life) -> Iterator[Outcome]:
        if life.up and life.listed != life.epoch:
            yield Outcome((life._replace(listed=life.epoch),), f"{node} registers its new life")

    def _set_back(self, node: str, process: Process) -> Iterator[Outcome]:
        """Timers that compare the wall clock do not ring in any time that matters when it is set far back."""
        if not process.timers:
            return
        wall = follows_wall_clock(self.profile)
        after = process._replace(timers=frozenset()) if wall else process
        yield Outcome((after,), f"the wall clock of {node} is set back")

    # -- prefill

    def prefill_moves(self, node: str) -> None:
        self.common_moves(node, "prefill", self.model.decode)
        for asked in self.served(node):
            for verb, act in (("admits", self._admit), ("sends", self._send), ("is done with", self._conclude)):
                self.move(
                    f"{node} {verb} {asked.rid}",
                    "step",
                    (node,),
                    lambda process, act=act, rid=asked.rid: act(node, process, rid),
                )

    def _entry(self, process: Process, rid: str) -> Entry | None:
        if not process.up or process.stopped:
            return None
        return next((entry for entry in process.entries if entry.rid == rid), None)

    def _report(self, pen: Pen, entry: Entry, own: Incarnation) -> Report:
        if entry.rejected:
            return Report(0, "room_in_use")
        report = pen.report(own)
        return Report(0, entry.aborted) if entry.aborted and report.poll != 0 else report

    def _decided(self, node: str, process: Process, rid: str, state: str, decide: Callable[..., Any]) -> Any:
        """(pen, own identity, decision) about a request that stands so in the scheduler; None if it does not."""
        entry = self._entry(process, rid)
        if entry is None or entry.state != state:
            return None
        pen, own = self.pen(node, process), self.own(rid, process)
        return pen, own, decide(rid, self._report(pen, entry, own))

    def _admit(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        """The bootstrap queue: admit and take pages, or drop."""
        pen, own, decision = self._decided(node, process, rid, "Bootstrap", decide_bootstrap) or NOT_HERE
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
        pen, own, decision = self._decided(node, process, rid, "Waiting", decide_transfer) or NOT_HERE
        if pen is None:
            return
        if decision is not None and decision.outcome == "drop":
            yield self._drop(pen, "prefill", rid, own, decision.cause)
            return
        pen.events.append(Computed(0, node, own, 0))
        destination, page = pen.known.get(pen.key(own), (None, None))[0], pen.held.get(own.pair)
        if destination is not None and page is not None and pen.deliver("WritePosted", own, True):
            other, theirs, target = destination
            number = write_number(own, theirs)
            pen.events.append(WritePosted(0, node, number, theirs, other, 0, True, (page,), (target,), target))
            pen.effects.append((f"wire {node} {other}", ("post", Write(own, theirs, page, target))))
        self._advance(pen, "prefill", rid, "ForwardFinished")
        yield pen.done(f"{node} posts the write of {rid}")

    def _conclude(self, node: str, process: Process, rid: str) -> Iterator[Outcome]:
        """The transfer is over, well or badly."""
        pen, own, decision = self._decided(node, process, rid, "Inflight", decide_transfer) or NOT_HERE
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

    def decode_moves(self, node: str) -> None:
        self.common_moves(node, "decode", self.model.prefill)
        for asked in self.served(node):
            rid, peer = asked.rid, asked.prefill
            self.move(
                f"{node} finds {peer} for {rid}",
                "step",
                (node, f"life {peer}"),
                lambda process, life, rid=rid: self._find(node, process, life, rid),
            )
            self.fault(
                f"{node} cannot find {peer} for {rid}",
                "route_failure",
                (node,),
                lambda process, rid=rid: self._lose_way(node, process, rid),
            )
            for verb, act in (("reserves for", self._grant), ("settles", self._settle), ("ends", self._end)):
                self.move(
                    f"{node} {verb} {rid}", "step", (node,), lambda process, act=act, rid=rid: act(node, process, rid)
                )
            self.fault(
                f"{node} has no memory for {rid}",
                "allocation_failure",
                (node,),
                lambda process, rid=rid: self._grant(node, process, rid, False),
            )

    def _seeking(self, process: Process, rid: str) -> bool:
        """Is its prefill rank still looked for, to set it up or to tell it of a failure?"""
        room = self._room(process, rid)
        return room is not None and still_looks(self.profile, room)

    def _setting_up(self, process: Process, rid: str) -> bool:
        room = self._room(process, rid)
        return room is not None and room.poll == "Bootstrapping"

    def _room(self, process: Process, rid: str) -> Local | None:
        if not process.up or process.stopped:
            return None
        own = self.own(rid, process)
        room = next((room for room in process.rooms if room.incarnation.room == own.room), None)
        return room.local if room is not None and room.incarnation.pair == own.pair else None

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
        if not self._setting_up(process, rid):
            return
        pen, own = self.pen(node, process), self.own(rid, process)
        pen.routes.pop(self.asked[rid].prefill, None)
        pen.deliver("RouteUnavailable", own, "route_404")
        pen.deliver("SetupFinished", own)
        yield pen.done(f"{node} cannot find {self.asked[rid].prefill} for {rid}")

    def _grant(self, node: str, process: Process, rid: str, enough: bool = True) -> Iterator[Outcome]:
        """The preallocation queue: give memory and tell prefill, or drop."""
        pen, own, decision = self._decided(node, process, rid, "Preallocation", decide_bootstrap) or NOT_HERE
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
        pen, own, decision = self._decided(node, process, rid, "Transfer", decide_transfer) or NOT_HERE
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

    def wire_moves(self, left: str, right: str) -> None:
        wire = f"wire {left} {right}"
        self.move(
            f"{left} writes to {right}",
            "step",
            (left, wire),
            lambda process, wire: self._complete(left, right, process, wire),
        )
        self.move(
            f"{left} loses {right}",
            "step",
            (left, wire),
            lambda process, wire: self._fail(left, right, process, wire, "cut"),
        )
        self.move(
            f"{left}'s failed write to {right} is over",
            "step",
            (left, wire),
            lambda process, wire: self._over(left, right, process, wire),
        )
        self.move(
            f"{left}'s failed write lands on {right}",
            "step",
            (wire,),
            lambda wire: self._land_late(left, right, wire),
            optional=True,
        )
        self.fault(
            f"{left}'s write to {right} fails",
            "write_fail",
            (left, wire),
            lambda process, wire: self._fail(left, right, process, wire, "posted"),
        )

    def _complete(self, left: str, right: str, process: Process, wire: Wire) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state != "posted":
                continue
            pen = self.pen(left, process)
            number = write_number(write.own, write.theirs)
            pen.events.append(WriteLanded(0, right, number, write.theirs, (write.target,)))
            pen.events.append(WriteSettled(0, left, number, True))
            pen.effects.append((right, (write.target, write.theirs)))
            if not process.stopped:
                pen.deliver("WriteCompleted", write.own)
            yield pen.done(f"{left} has written room {write.own.room} to {right}", without(wire, write))

    def _fail(self, left: str, right: str, process: Process, wire: Wire, state: str) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state != state:
                continue
            pen = self.pen(left, process)
            after = write._replace(state="failed" if state == "posted" else "dead")
            if not process.stopped:
                pen.deliver("WriteFailed", write.own)
            rest = without(wire, write)
            yield pen.done(
                f"the write of room {write.own.room} from {left} to {right} fails",
                rest._replace(writes=Sorted(sorted((*rest.writes, after)))),
            )

    def _over(self, left: str, right: str, process: Process, wire: Wire) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state not in ("failed", "dead"):
                continue
            pen = self.pen(left, process)
            pen.events.append(WriteSettled(0, left, write_number(write.own, write.theirs), False))
            if not process.stopped:
                pen.deliver("WriteSettled", write.own)
            yield pen.done(f"the failed write of room {write.own.room} moves no more bytes", without(wire, write))

    def _land_late(self, left: str, right: str, wire: Wire) -> Iterator[Outcome]:
        for write in wire.writes:
            if write.state == "failed":
                landed = WriteLanded(0, right, write_number(write.own, write.theirs), write.theirs, (write.target,))
                after = without(wire, write)._replace
                kept = write._replace(state="dead")
                yield Outcome(
                    (after(writes=Sorted(sorted((*without(wire, write).writes, kept)))),),
                    f"bytes of the failed write of room {write.own.room} land on {right} after all",
                    ((right, (write.target, write.theirs)),),
                    (landed,),
                    ("late_landing",),
                )

    def link_moves(self, left: str, right: str) -> None:
        there, back = f"chan {left} {right}", f"chan {right} {left}"
        self.fault(f"the link {left} {right} breaks", "disconnect", (there, back), self._disconnect)

    def _disconnect(self, there: tuple[Any, ...], back: tuple[Any, ...]) -> Iterator[Outcome]:
        if there or back:
            yield Outcome(((LINK_RESTORED,), (LINK_RESTORED,)), "the link breaks, loses what is on it, and is back")
