"""Models of kind "pipeline": prefill with pipeline stages, whose requests are given up at one stage or at all.

Cells: the other side "R" (the router and the decode engine, as far as prefill can tell them apart), every stage
("P0/pp0"), commands for the first stage ("chan R P0/pp0"), steps from stage to stage ("chan P0/pp0 P0/pp1"), what
decode tells each ("chan D0 P0/pp1"), and what is left of the fault budget. ``spec/tla/Pipeline.tla`` says the same in
TLA+.

Assumptions: channels keep order and lose nothing; what a later stage tells stage 0 is there at once (stage 0 reads it
in its turns alone, and a turn comes when it likes, so a report under way is as good as a change yet to come); decode
publishes its pages as soon as a request is dispatched, and gives up what it was told has failed; a deadline passes when
nothing else is left to happen, or early, which costs a fault ("slowness"); tombstones outlive every message; pages
never run out; a turn is one step, in which a batch is computed; its writes end later, or at once if the model says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.model import HEAD, read_faults
from kvpoll.sim.explorer.pipeline_stages import (
    GAUGES,
    Stage,
    StagePen,
    Step,
    Wiring,
    follow,
    hear_stage,
    stage_name,
    turn,
)
from kvpoll.sim.explorer.process import ring
from kvpoll.sim.explorer.system import ROOMS_FROM, Cell, Move, Outcome, Rename, System, refuse, send
from kvpoll.sim.explorer.tla_values import canonical, of_room, to_tla
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import Source
from kvpoll.spec.trace import Admitted, NodeStarted, Pair, Resulted, Stepped, Surveyed
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.machine import ABSENT, Room
from kvpoll.statemachine.roles import Machines, Routed

FAULTS: Final = ("slowness", "pp_abort", "prefill_abort", "decode_abort")
DEADLINES: Final = ("bootstrap", "transfer", "announced")
WRITES: Final = ("later", "at once")
COMMANDS: Final = f"chan R {stage_name(0)}"


class Asked(NamedTuple):
    """A request of the model."""

    rid: str
    pair: Pair


@dataclass(frozen=True)
class Pipeline:
    """What a model file of this kind says."""

    name: str
    stages: int
    writes: str
    asked: tuple[Asked, ...]
    faults: dict[str, int]


class Leg(NamedTuple):
    """A dispatched request as decode knows it.

    state: "open" until decode has all of it ("done") or gives it up ("failed"). arrived: stages that have sent their
    part. told: has decode been told that prefill failed, or to give up?
    """

    rid: str
    state: str = "open"
    arrived: frozenset[int] = frozenset()
    told: bool = False


_MODEL = {**HEAD, "stages": int, "writes": str}
_REQUEST = {"rid": str, "room": int, "attempt": int}


def read(name: str, source: Source) -> Pipeline:
    """Read the parts of a model file that this kind has. Raises BadInput at the offending line."""
    source.require_known((), source.data, ("model", "faults", "request"), "section")
    head = source.data["model"]
    source.require_known(("model",), head, _MODEL, "key")
    source.require_all(("model",), head, ("stages",), "a pipeline model")
    source.require_form(("model", "stages"), "stages", head["stages"], int)
    if not 2 <= head["stages"] <= 8:
        raise source.error(("model", "stages"), f"`stages` must be from 2 to 8, got {head['stages']}")
    if "writes" in head:
        source.require_form(("model", "writes"), "writes", head["writes"], str)
        source.require_known(("model", "writes"), [head["writes"]], WRITES, "way to write")
    asked = tuple(_request(source, place, entry) for place, entry in enumerate(source.data.get("request", ())))
    if not asked:
        raise source.error((), "a model needs at least one [[request]]")
    if len({each.rid for each in asked}) < len(asked) or len({each.pair[0] for each in asked}) < len(asked):
        raise source.error(("request", 0), "each request of a pipeline needs a rid, and a room, of its own")
    return Pipeline(name, head["stages"], head.get("writes", WRITES[0]), asked, read_faults(source, FAULTS))


def _request(source: Source, place: int, entry: Any) -> Asked:
    path = ("request", place)
    source.require_forms(path, entry, _REQUEST)
    source.require_all(path, entry, ("rid", "room"), "a request")
    if entry["room"] <= ROOMS_FROM:
        raise source.error((*path, "room"), f"room numbers of models are above {ROOMS_FROM}, got {entry['room']}")
    return Asked(entry["rid"], (entry["room"], entry.get("attempt", 0)))


def build(model: Pipeline, protocol: Protocol, profile: Profile) -> System:
    """The model under one profile, ready to be explored."""
    return _Builder(model, Machines(protocol, profile)).system()


# -- the other side

Legs = frozenset[Leg]


def _leg(legs: Legs, rid: str) -> Leg | None:
    return next((leg for leg in legs if leg.rid == rid), None)


def _with(legs: Legs, leg: Leg) -> Legs:
    """Legs with this one in the place of the former of its request."""
    return frozenset({*(each for each in legs if each.rid != leg.rid), leg})


def _apply_legs(legs: Legs, told: tuple[Any, ...]) -> Legs:
    """A stage says how its part of a transfer ended, or the router cancels decode's leg ("Cancelled")."""
    rid, stage, outcome = told
    leg = _leg(legs, rid)
    assert leg is not None
    if leg.state != "open" or leg.told:
        return legs
    if outcome == "Success":
        return _with(legs, leg._replace(arrived=leg.arrived | {stage}))
    return _with(legs, leg._replace(told=True, arrived=frozenset()))


def _apply_channel(channel: tuple[Any, ...], message: Any) -> tuple[Any, ...]:
    return send(channel, (message,))


class _Builder:
    """Puts the cells and moves of one model together."""

    def __init__(self, model: Pipeline, machines: Machines) -> None:
        self.model = model
        self.machines = machines
        self.nodes = [stage_name(number) for number in range(model.stages)]
        self.owns = {asked.rid: Incarnation(*asked.pair, 0) for asked in model.asked}
        _, orders = machines.router.step(Routed(), "LegFailed", ("prefill", "failed"))
        cancels = any(order == "CancelLeg" for order, _ in orders)
        self.wiring = Wiring(machines, model.stages, self.owns, cancels, model.writes == "at once")
        self.moves: list[Move] = []

    def system(self) -> System:
        model, nodes = self.model, self.nodes
        cells = [Cell("R", frozenset(), _apply_legs), Cell(budget.CELL, budget.budget(model.faults), refuse)]
        cells.append(Cell(COMMANDS, (), _apply_channel))
        for number, node in enumerate(nodes):
            cells += [
                Cell(node, Stage(), refuse if number else self._hear_stage),
                Cell(f"chan D0 {node}", (), _apply_channel),
            ]
            if number:
                cells.append(Cell(f"chan {nodes[number - 1]} {node}", (), _apply_channel))
        for asked in model.asked:
            self._outer_moves(asked.rid)
        self._first_moves()
        for number in range(1, model.stages):
            self._later_moves(number)
        for number in range(model.stages):
            self._common_moves(number)
        start = tuple(NodeStarted(0, node, 0) for node in nodes)
        return System(
            model.name,
            cells,
            self.moves,
            start,
            self._survey,
            self._renames(),
            self._view,
        )

    def _move(self, name: str, kind: Any, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        self.moves.append(Move(name, kind, scope, act))

    def _fault(self, name: str, kind: str, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        if self.model.faults.get(kind, 0):
            self.moves.append(budget.fault(name, kind, scope, act))

    def pen(self, number: int, stage: Stage) -> StagePen:
        """A pen for this stage."""
        return StagePen(number, stage, self.wiring)

    # -- the other side

    def _outer_moves(self, rid: str) -> None:
        self._move(f"R dispatches {rid}", "step", ("R",), lambda legs: self._dispatch(legs, rid))
        self._move(f"D0 starts to decode {rid}", "step", ("R",), lambda legs: self._decode(legs, rid))
        self._move(f"D0 hears that {rid} failed", "step", ("R",), lambda legs: self._hear_failure(legs, rid))
        self._move(
            f"D0's waiting deadline of {rid} passes",
            "deadline",
            ("R",),
            lambda legs: self._lose(legs, rid, "waiting_timeout"),
        )
        self._fault(f"D0 gives {rid} up", "decode_abort", ("R",), lambda legs: self._lose(legs, rid, "aborted"))
        self._fault(f"prefill gives {rid} up", "prefill_abort", ("R",), lambda legs: self._abort(legs, rid))

    def _dispatch(self, legs: Legs, rid: str) -> Iterator[Outcome]:
        if _leg(legs, rid) is not None:
            return
        effects: list[tuple[str, Any]] = [(COMMANDS, ("open", rid))]
        effects += [(f"chan D0 {node}", ("Metadata", rid)) for node in self.nodes]
        admitted = Admitted(0, "R", rid, self.owns[rid].pair, tuple(self.nodes), ())
        label = f"the router sends both legs of {rid}, and decode its pages"
        opened = self._decode_steps(rid, "RequestOpened", "Absent", "WaitingForInput", None)
        yield Outcome((_with(legs, Leg(rid)),), label, tuple(effects), (admitted, opened))

    def _decode(self, legs: Legs, rid: str) -> Iterator[Outcome]:
        leg = _leg(legs, rid)
        if leg is None or len(leg.arrived) < self.model.stages:
            return
        ended = self._decode_steps(rid, "StatusReceived", "WaitingForInput", "Success", None)
        resulted = Resulted(0, "R", rid, self.owns[rid].pair, True, None, 0.0)
        yield Outcome((_with(legs, Leg(rid, "done")),), f"decode has all of {rid}", (), (ended, resulted))

    def _hear_failure(self, legs: Legs, rid: str) -> Iterator[Outcome]:
        leg = _leg(legs, rid)
        if leg is not None and leg.told:
            yield self._lost(legs, rid, "failed_by_prefill")

    def _lose(self, legs: Legs, rid: str, cause: str) -> Iterator[Outcome]:
        leg = _leg(legs, rid)
        if leg is not None and leg.state == "open" and not leg.told:
            yield self._lost(legs, rid, cause)

    def _lost(self, legs: Legs, rid: str, cause: str) -> Outcome:
        """Decode gives up and tells every stage; the client hears why."""
        aborts = tuple((f"chan D0 {node}", ("Abort", rid)) for node in self.nodes)
        ended = self._decode_steps(rid, "AbortRequested", "WaitingForInput", "Failed", cause)
        resulted = Resulted(0, "R", rid, self.owns[rid].pair, False, cause, None)
        return Outcome((_with(legs, Leg(rid, "failed")),), f"decode gives {rid} up: {cause}", aborts, (ended, resulted))

    def _decode_steps(self, rid: str, fact: str, before: str, after: str, cause: str | None) -> Stepped:
        """Decode is no machine here, but what it would say of itself concerns the monitors."""
        own, lease = self.owns[rid], "Unreserved"
        return Stepped(0, "D0", "receiver", own, fact, own, None, before, after, lease, lease, cause, ())

    def _abort(self, legs: Legs, rid: str) -> Iterator[Outcome]:
        leg = _leg(legs, rid)
        if leg is not None and leg.state == "open":
            yield Outcome((legs,), f"prefill is told to give {rid} up", ((COMMANDS, ("abort", rid, "aborted")),))

    # -- the stages

    def _first_moves(self) -> None:
        first = self.nodes[0]
        self._move(f"{first} takes a turn", "step", (first, COMMANDS), self._turn)

    def _hear_stage(self, stage: Stage, message: Any) -> Stage:
        return hear_stage(self.pen(0, stage), message)

    def _turn(self, stage: Stage, commands: tuple[Any, ...]) -> Iterator[Outcome]:
        if not stage.stopped:
            outcome = turn(self.pen(0, stage), commands)
            if outcome is not None:
                yield outcome

    def _later_moves(self, number: int) -> None:
        node = self.nodes[number]
        scope = (node, f"chan {self.nodes[number - 1]} {node}")
        self._move(
            f"{node} follows", "step", scope, lambda stage, steps, number=number: self._follow(stage, steps, number)
        )

    def _follow(self, stage: Stage, steps: tuple[Step, ...], number: int) -> Iterator[Outcome]:
        if steps and not stage.stopped:
            yield follow(self.pen(number, stage), steps[0], steps[1:])

    def _common_moves(self, number: int) -> None:
        node = self.nodes[number]
        inbox = (node, f"chan D0 {node}")
        self._move(f"{node} hears D0", "step", inbox, lambda stage, channel: self._hear(stage, channel, number))
        for asked in self.model.asked:
            rid = asked.rid
            self._move(
                f"{node} has written {rid}", "step", (node,), lambda stage, rid=rid: self._written(stage, number, rid)
            )
            self._fault(
                f"{node} alone gives {rid} up",
                "pp_abort",
                (node,),
                lambda stage, rid=rid: self._fail(stage, number, rid),
            )
        for name in DEADLINES:

            def act(stage: Stage, name: str = name) -> Iterator[Outcome]:
                return self._deadlines(stage, number, name)

            self._move(f"{node}'s {name} deadline passes", "deadline", (node,), act)
            self._fault(f"{node}'s {name} deadline passes early", "slowness", (node,), act)

    def _hear(self, stage: Stage, channel: tuple[Any, ...], number: int) -> Iterator[Outcome]:
        if not channel or stage.stopped:
            return
        (kind, rid), pen = channel[0], self.pen(number, stage)
        if kind == "Metadata":
            pen.deliver("DestinationRegistered", self.owns[rid], (0, 1), rid)
        else:
            pen.deliver("PeerAborted", self.owns[rid], 0, rid)
        yield pen.finished(f"{pen.node} receives {kind} of {rid} from decode", channel[1:])

    def _written(self, stage: Stage, number: int, rid: str) -> Iterator[Outcome]:
        pen = self.pen(number, stage)
        if not stage.stopped and pen.room_at(self.owns[rid].room).local.outstanding:
            pen.deliver("WriteCompleted", self.owns[rid])
            yield pen.finished(f"{pen.node} has written its part of {rid}")

    def _fail(self, stage: Stage, number: int, rid: str) -> Iterator[Outcome]:
        pen = self.pen(number, stage)
        if not stage.stopped and rid in pen.entries:
            pen.deliver("AbortRequested", self.owns[rid], "aborted")
            yield pen.finished(f"{pen.node} gives {rid} up, and tells no other stage to")

    def _deadlines(self, stage: Stage, number: int, name: str) -> Iterator[Outcome]:
        if stage.stopped:
            return
        for incarnation, timer in sorted(stage.timers):
            if timer == name:
                pen = self.pen(number, stage)
                ring(pen, incarnation, name)
                yield pen.finished(f"{pen.node}'s {name} deadline of room {incarnation.room} passes")

    # -- at rest, symmetry, and the same in TLA+

    def _survey(self, cell: str, value: Any) -> Iterator[Any]:
        if not isinstance(value, Stage):
            return
        tables = (
            ("rooms", sum(room.local.poll != "Retired" for room in value.rooms)),
            ("requests", len(value.entries)),
            ("timers", len(value.timers)),
        )
        gauges: dict[str, float] = {}
        for entry in value.entries:
            gauges[GAUGES[entry.state]] = gauges.get(GAUGES[entry.state], 0) + 1
        yield Surveyed(0, cell, tables, tuple(sorted(gauges.items())), 0)

    def _renames(self) -> tuple[Rename, ...]:
        """Requests of the same attempt may trade places."""
        renames: list[Rename] = []
        for place, one in enumerate(self.model.asked):
            for other in self.model.asked[place + 1 :]:
                if one.pair[1] == other.pair[1]:
                    mirrored = [(one.rid, other.rid), (one.pair[0], other.pair[0])]
                    renames.append(dict([*mirrored, *((there, here) for here, there in mirrored)]))
        return tuple(renames)

    def _view(self, cells: dict[str, Any]) -> dict[str, Any]:
        """The variables of ``spec/tla/Pipeline.tla``."""
        nodes, rids = self.nodes, list(self.owns)
        legs = {leg.rid: leg for leg in cells["R"]}
        pipe = [[_step_view(step) for step in cells[f"chan {before} {node}"]] for before, node in pairwise(nodes)]
        return {
            "legs": canonical({rid: _leg_view(legs.get(rid)) for rid in rids}),
            "stage": canonical({number: self._stage_view(cells[node]) for number, node in enumerate(nodes)}),
            "commands": canonical(cells[COMMANDS]),
            "pipe": canonical(pipe),
            "inbox": canonical({number: cells[f"chan D0 {node}"] for number, node in enumerate(nodes)}),
            "faults": canonical(dict(cells[budget.CELL])),
        }

    def _stage_view(self, stage: Stage) -> dict[str, Any]:
        rooms: dict[Incarnation, Room] = {room.incarnation: room for room in stage.rooms}
        rids = {own: rid for rid, own in self.owns.items()}
        return {
            "rooms": {rid: of_room(rooms.get(own, Room(own, ABSENT))) for rid, own in self.owns.items()},
            "timers": frozenset((rids[own], name) for own, name in stage.timers),
            "entries": [(entry.rid, entry.state, entry.rejected) for entry in stage.entries],
            "stopped": stage.stopped,
            "awake": stage.awake,
            "reports": frozenset((later, rid, report.poll) for later, rid, report in stage.reports),
            "agreed": stage.agreed,
            "batches": stage.batches,
        }


def _leg_view(leg: Leg | None) -> dict[str, Any]:
    if leg is None:
        return {"state": "new", "arrived": frozenset(), "told": False}
    return {"state": leg.state, "arrived": leg.arrived, "told": leg.told}


def _step_view(step: Step) -> dict[str, Any]:
    return {
        "commands": list(step.commands),
        "decisions": [(decision.rid, decision.outcome) for decision in step.ring.decisions],
        "queue": step.ring.queue,
        "candidates": step.ring.candidates,
        "agreed": step.ring.agreed,
        "batch": step.batch,
        "number": step.number,
    }


def constants(model: Pipeline) -> dict[str, str]:
    """The constants of ``spec/tla/Pipeline.tla``, but for Rules, as TLA+ expressions."""
    return {
        "Requests": to_tla({asked.rid for asked in model.asked}),
        "RoomOf": to_tla({asked.rid: asked.pair[0] for asked in model.asked}),
        "LastStage": str(model.stages - 1),
        "WritesLater": to_tla(model.writes == "later"),
        "Faults": to_tla(dict(budget.budget(model.faults))),
    }
