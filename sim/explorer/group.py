"""Models of kind "group": the tensor ranks of one decode replica, which must decide alike.

Cells: the router "R", each decode rank ("D0/tp0", which leads, and "D0/tp1"), what they share ("D0": is a turn
wanted, and the collective at hand), the prefill rank that each of them talks to ("P0/tp0", "P0/tp1"), what the leader
answers ("chan D0/tp0 R") and what is left of the fault budget. ``spec/tla/Group.tla`` says the same in TLA+.

Prefill is abstract: it answers each rank's destination with Success or Failed at any time, and acknowledges an abort.
Which DP rank of prefill runs a request is learned late, by each decode rank for itself: that is where the ranks drift
apart (sglang#21299).

Assumptions: commands and answers are neither lost nor delayed for ever; a deadline passes when nothing else is left to
happen, or early, which costs a fault; the forward pass of a request needs all ranks, so its first token (which is its
last) follows the turn in which they committed it; tombstones outlive every message; one page a request.

The ranks take a turn when something has changed for one of them, or when the other already waits in a collective; it
is the same as turning for ever, because a turn that sees nothing new changes nothing. Collectives would be numbered
without end; here one bears the number of its kind and shape, which is enough to see that two ranks do not agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.group_rank import (
    GAUGES,
    GROUP,
    WAITING,
    Command,
    Group,
    Rank,
    RankPen,
    Turn,
    is_ready,
    next_collective,
    own_memory,
    own_reports,
    take_result,
)
from kvpoll.sim.explorer.group_view import view
from kvpoll.sim.explorer.model import HEAD, read_faults
from kvpoll.sim.explorer.process import Process, ring
from kvpoll.sim.explorer.system import ROOMS_FROM, Cell, Move, Outcome, Rename, System, refuse, send
from kvpoll.sim.explorer.tla_values import to_tla
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import Source
from kvpoll.spec.trace import Admitted, CollectiveEntered, NodeStarted, Pair, Resulted, Surveyed
from kvpoll.statemachine.roles import Collective, Machines, Routed

DECODE: Final = ("D0/tp0", "D0/tp1")
PREFILL: Final = ("P0/tp0", "P0/tp1")
LEADER: Final = DECODE[0]
ANSWERS: Final = f"chan {LEADER} R"
DEADLINES: Final = ("bootstrap", "admission", "waiting", "drain")
FAULTS: Final = ("client_abort", "prefill_abort", "allocation_failure", "route_failure", "slowness")
KINDS: Final = ("step", "requests", *WAITING)
"""Kinds of collective."""


class Meeting(NamedTuple):
    """What the ranks share. woken: one more turn is wanted. collective: the one at hand; payload: what the rank that
    stands in it has brought."""

    woken: bool = False
    collective: Collective = Collective()
    payload: Any = None


class Sending(NamedTuple):
    """A request on an abstract prefill rank.

    state: "waiting" (for its destination), "writing", "failed" (has nobody to tell), "failing" (has to tell), "over".
    asked: decode has aborted it and awaits an acknowledgement.
    """

    state: str = "waiting"
    asked: bool = False


Table = frozenset[tuple[str, Any]]
"""By request: the router's view of it (Routed), or prefill's (Sending). A set, so that requests may trade places."""


@dataclass(frozen=True)
class GroupModel:
    """What a model file of this kind says. asked: rid -> (room, attempt)."""

    name: str
    pages: int
    asked: dict[str, Pair]
    faults: dict[str, int]


def read(name: str, source: Source) -> GroupModel:
    """Read the parts of a model file that this kind has. Raises BadInput at the offending line."""
    source.require_known((), source.data, ("model", "faults", "request"), "section")
    head = source.data["model"]
    source.require_known(("model",), head, {**HEAD, "pages": int}, "key")
    source.require_all(("model",), head, ("pages",), "a group model")
    if type(head["pages"]) is not int or not 1 <= head["pages"] <= 8:
        raise source.error(("model", "pages"), f"`pages` must be a whole number from 1 to 8, got {head['pages']!r}")
    asked: dict[str, Pair] = {}
    for place, entry in enumerate(source.data.get("request", ())):
        rid, pair = _request(source, place, entry)
        if rid in asked or pair in asked.values():
            raise source.error(("request", place), "each request needs a rid and a room of its own")
        asked[rid] = pair
    if not asked:
        raise source.error((), "a model needs at least one [[request]]")
    return GroupModel(name, head["pages"], asked, read_faults(source, FAULTS))


def _request(source: Source, place: int, entry: Any) -> tuple[str, Pair]:
    path = ("request", place)
    source.require_forms(path, entry, {"rid": str, "room": int})
    source.require_all(path, entry, ("rid", "room"), "a request")
    if entry["room"] <= ROOMS_FROM:
        raise source.error((*path, "room"), f"room numbers of models are above {ROOMS_FROM}, got {entry['room']}")
    return entry["rid"], (entry["room"], 0)


def build(model: GroupModel, protocol: Protocol, profile: Profile) -> System:
    """The model under one profile, ready to be explored."""
    return _Builder(model, Group(Machines(protocol, profile), DECODE, model.asked, model.pages)).system()


# -- effects on cells


def _apply_meeting(meeting: Meeting, operation: str) -> Meeting:
    return meeting._replace(woken=True)


def _apply_answers(answers: tuple[Command, ...], message: Command) -> tuple[Command, ...]:
    return send(answers, (message,))


def _apply_sending(table: Table, operation: tuple[str, str]) -> Table:
    """A message from the decode rank, or the router's leg, arrives at prefill."""
    kind, rid = operation
    if kind == "Open":
        return _with(table, rid, Sending())
    before: Sending = dict(table)[rid]
    if kind == "Abort":
        return _with(table, rid, before._replace(asked=True))
    told = {"waiting": "writing", "failed": "failing"}
    return _with(table, rid, before._replace(state=told.get(before.state, before.state)))


def _with(table: Table, rid: str, value: Any) -> Table:
    return frozenset({**dict(table), rid: value}.items())


class _Builder:
    """Puts the cells and moves of one model together."""

    def __init__(self, model: GroupModel, group: Group) -> None:
        self.model = model
        self.group = group
        self.machines = group.machines
        self.moves: list[Move] = []

    def system(self) -> System:
        fresh = Rank(Process(free=frozenset(range(self.model.pages))))
        nothing: Table = frozenset()
        cells = [
            Cell("R", nothing, refuse),
            Cell(ANSWERS, (), _apply_answers),
            Cell(GROUP, Meeting(), _apply_meeting),
            *(Cell(node, fresh, self._apply_rank) for node in DECODE),
            *(Cell(node, nothing, _apply_sending) for node in PREFILL),
            Cell(budget.CELL, budget.budget(self.model.faults), refuse),
        ]
        self._router_moves()
        for index in range(len(DECODE)):
            self._prefill_moves(index)
            self._rank_moves(index)
        start = tuple(NodeStarted(0, node, 0) for node in DECODE)
        return System(self.model.name, cells, self.moves, start, self._survey, tuple(self._renames()), self._view, True)

    def _view(self, cells: dict[str, Any]) -> dict[str, Any]:
        return view(self.group, PREFILL, ANSWERS, cells)

    def _renames(self) -> Iterator[Rename]:
        """Any two requests may trade places."""
        asked = sorted(self.model.asked.items())
        for place, (rid, pair) in enumerate(asked):
            for other, theirs in asked[place + 1 :]:
                yield {rid: other, other: rid, pair[0]: theirs[0], theirs[0]: pair[0]}

    def _apply_rank(self, rank: Rank, operation: tuple[Any, ...]) -> Rank:
        kind, argument = operation
        if kind == "result":
            return take_result(self.group, rank, argument)
        return rank._replace(commands=send(rank.commands, (argument,)))

    def _move(self, name: str, kind: Any, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        self.moves.append(Move(name, kind, scope, act))

    def _fault(self, name: str, kind: str, scope: tuple[str, ...], act: Callable[..., Any]) -> None:
        if self.model.faults.get(kind, 0):
            self.moves.append(budget.fault(name, kind, scope, act))

    # -- the router

    def _router_moves(self) -> None:
        self._move("R hears the leader", "step", ("R", ANSWERS), self._hear)
        for rid in self.model.asked:
            self._move(f"R dispatches {rid}", "step", ("R",), partial(self._dispatch, rid))
            self._move(f"the prefill leg of {rid} fails too", "step", ("R",), partial(self._lose_prefill, rid))
            self._fault(f"the client of {rid} leaves", "client_abort", ("R",), partial(self._leave, rid))
            self._fault(f"prefill fails {rid}", "prefill_abort", PREFILL, partial(self._fail, rid))

    def _dispatch(self, rid: str, table: Table) -> Iterator[Outcome]:
        if rid in dict(table):
            return
        admitted = Admitted(0, "R", rid, self.model.asked[rid], (), DECODE)
        effects = [*self._command("open", rid), *((node, ("Open", rid)) for node in PREFILL)]
        after = _with(table, rid, Routed())
        yield Outcome((after,), f"the router sends both legs of {rid}", tuple(effects), (admitted,))

    def _command(self, *words: str) -> list[tuple[str, Any]]:
        """The controller hands a command to the leader."""
        return [(LEADER, ("command", words)), (GROUP, "wake")]

    def _hear(self, table: Table, answers: tuple[Command, ...]) -> Iterator[Outcome]:
        if not answers:
            return
        (kind, rid, *cause), rest = answers[0], answers[1:]
        if kind == "FirstToken":
            yield from self._route(table, rid, "DecodeAnswered", None, f"the router hears the token of {rid}", rest)
        else:
            fact = ("decode", cause[0])
            yield from self._route(table, rid, "LegFailed", fact, f"the router hears that {rid} failed", rest)

    def _lose_prefill(self, rid: str, table: Table) -> Iterator[Outcome]:
        """Prefill's own leg ends some time after decode's; a router that waits for both hears of it then."""
        if dict(table).get(rid, Routed()).state == "HalfFailed":
            fact = ("prefill", "aborted_by_decode")
            yield from self._route(table, rid, "LegFailed", fact, f"the prefill leg of {rid} fails too")

    def _leave(self, rid: str, table: Table) -> Iterator[Outcome]:
        if dict(table).get(rid, Routed("Answered")).state != "Answered":
            yield from self._route(table, rid, "ClientLeft", None, f"the client of {rid} leaves")

    def _route(self, table: Table, rid: str, fact: str, detail: Any, label: str, *rest: Any) -> Iterator[Outcome]:
        """Step the router's view of a request. ``rest``: what remains on the channel, if one was read."""
        state, orders = self.machines.router.step(dict(table)[rid], fact, detail)
        effects: list[tuple[str, Any]] = []
        events = []
        for order, argument in orders:
            if order == "AnswerClient":
                ok, pair = argument == "ok", self.model.asked[rid]
                events.append(Resulted(0, "R", rid, pair, ok, state.cause, 0.0 if ok else None))
            elif order == "CancelLeg" and argument != "prefill":
                effects += self._command("abort", rid, state.cause or "cancelled")
        yield Outcome((_with(table, rid, state), *rest), label, tuple(effects), tuple(events))

    # -- the abstract prefill

    def _fail(self, rid: str, *tables: Table) -> Iterator[Outcome]:
        """Prefill gives a request up on every rank that has not written it yet."""
        failed = {"waiting": "failed", "writing": "failing"}
        after = []
        for table in tables:
            sending = dict(table).get(rid, Sending("over"))
            state = failed.get(sending.state, sending.state)
            after.append(_with(table, rid, sending._replace(state=state)) if state != sending.state else table)
        if tuple(after) != tables:
            yield Outcome(tuple(after), f"prefill fails {rid}")

    def _prefill_moves(self, index: int) -> None:
        for rid in self.model.asked:
            scope = (DECODE[index], PREFILL[index])
            for verb, act in (("answers", self._answer), ("acknowledges the abort of", self._acknowledge)):
                self._move(f"{PREFILL[index]} {verb} {rid}", "step", scope, partial(act, index, rid))

    def _answer(self, index: int, rid: str, rank: Rank, table: Table) -> Iterator[Outcome]:
        """Prefill has written the pages, or has failed, and says so."""
        sending, own = dict(table).get(rid, Sending()), self.group.own(rid)
        if sending.asked or sending.state not in ("writing", "failing"):
            return
        pen = RankPen(self.group, index, rank)
        outcome = "Success" if sending.state == "writing" else "Failed"
        page = pen.held.get(own.pair)
        if outcome == "Success" and page is not None:
            pen.contents[page] = own.pair
        if not pen.stopped:
            pen.deliver("StatusReceived", own, (0, outcome))
        yield self._said(pen, f"answers {rid}: {outcome}", _with(table, rid, Sending("over")))

    def _acknowledge(self, index: int, rid: str, rank: Rank, table: Table) -> Iterator[Outcome]:
        """Prefill writes nothing more. What it had to say is overtaken by the abort."""
        if not dict(table).get(rid, Sending()).asked:
            return
        pen = RankPen(self.group, index, rank)
        if not pen.stopped:
            pen.deliver("AbortAcknowledged", self.group.own(rid), 0)
        yield self._said(pen, f"acknowledges the abort of {rid}", _with(table, rid, Sending("over")))

    def _said(self, pen: RankPen, what: str, table: Table) -> Outcome:
        """What decode orders in return reaches this prefill rank within the same move."""
        node = PREFILL[pen.index]
        for cell, operation in pen.effects:
            if cell == node:
                table = _apply_sending(table, operation)
        pen.effects = [effect for effect in pen.effects if effect[0] != node]
        return pen.done(f"{node} {what}", table)

    # -- decode

    def _rank_moves(self, index: int) -> None:
        node = DECODE[index]
        self._move(f"{node} enters a collective", "step", (node, GROUP), partial(self._enter, index))
        self._move(f"{node} carries out its turn", "step", (node,), partial(self._carry_out, index, 0))
        self._fault(f"{node} finds no memory", "allocation_failure", (node,), partial(self._carry_out, index, 1))
        for rid in self.model.asked:
            self._move(f"{node} learns the way to {rid}", "step", (node,), partial(self._learn, index, rid, True))
            self._fault(
                f"{node} finds no way to {rid}", "route_failure", (node,), partial(self._learn, index, rid, False)
            )
            if index == 0:
                self._move(f"{rid} has its token", "step", (node,), partial(self._generate, rid))
        for name in DEADLINES:
            act = partial(self._pass_deadline, index, name)
            self._move(f"{node}'s {name} deadline passes", "deadline", (node,), act)
            self._fault(f"{node}'s {name} deadline passes early", "slowness", (node,), act)

    def _enter(self, index: int, rank: Rank, meeting: Meeting) -> Iterator[Outcome]:
        """Begin a turn, or go on in it: enter the next collective and wait, unless the other is already there."""
        is_new = rank.turn is None
        if rank.process.stopped or not (is_new or is_between(rank)) or meeting.collective.state != "Open":
            return
        if is_new and not meeting.woken and not meeting.collective.entered:
            return
        found = next_collective(self.group, rank)
        if found is None:
            return
        kind, queue = found
        pen = RankPen(self.group, index, rank)
        payload, shape = self._bring(pen, kind, queue)
        if is_new and not meeting.collective.entered:
            meeting = meeting._replace(woken=False)
        yield self._meet(pen, index, meeting, (kind, shape), payload)

    def _bring(self, pen: RankPen, kind: str, queue: tuple[str, ...]) -> tuple[Any, Any]:
        """What the rank brings to the collective, and its shape. Its turn notes what it will need afterwards."""
        if kind in WAITING:
            assert pen.turn is not None
            pen.turn = pen.turn._replace(stage=kind, waiting=True, queue=queue)
            mine = dict(pen.turn.mine)
            return tuple(mine[rid].poll for rid in queue), len(queue)
        commands, pen.commands = pen.commands, ()
        reports, memory = own_reports(pen), own_memory(pen)
        if kind == "step":
            pen.turn = Turn(kind)
            return (commands, reports, memory), "fixed"
        pen.turn = Turn(kind, memory=memory, mine=reports)
        return commands, "fixed"

    def _meet(self, pen: RankPen, index: int, meeting: Meeting, form: tuple[str, Any], payload: Any) -> Outcome:
        node, other = DECODE[index], DECODE[1 - index]
        before = meeting.collective
        after, orders = self.machines.collective.step(before, "RankEntered", (index, len(DECODE), form))
        label = f"{node} enters {form[0].lower()} ({form[1]})"
        if not orders:
            return pen.done(label, meeting._replace(collective=after, payload=payload))
        forms = (form, before.shape) if index == 0 else (before.shape, form)
        number = _number(*forms[0])
        for each, (kind, shape) in zip(DECODE, forms, strict=True):
            pen.events.append(CollectiveEntered(0, each, GROUP, number, kind.lower(), shape))
        if orders[0][0] == "BlockRanks":
            pen.marks.append("collective_mismatch")
            pen.events.append(self.group.health(False))
            return pen.done(f"{label}, where the other waits in another", Meeting(meeting.woken, after))
        payloads = (payload, meeting.payload) if index == 0 else (meeting.payload, payload)
        pen.effects.append((other, ("result", payloads)))
        outcome = pen.done(f"{label}, and all have", Meeting(meeting.woken))
        return outcome._replace(after=(take_result(self.group, outcome.after[0], payloads), *outcome.after[1:]))

    def _carry_out(self, index: int, failing: int, rank: Rank) -> Iterator[Outcome]:
        if rank.process.stopped or not is_ready(self.group, rank):
            return
        assert rank.turn is not None
        pen = RankPen(self.group, index, rank)
        pen.failing = failing
        pen.carry_out(rank.turn)
        if not failing or "allocation_failed" in pen.marks:
            yield pen.done(f"{pen.node} carries out its turn{' without memory' if failing else ''}")

    def _learn(self, index: int, rid: str, known: bool, rank: Rank) -> Iterator[Outcome]:
        """The server has told this rank who runs the request; or it could not. Then the set-up call returns."""
        own = self.group.own(rid)
        pen = RankPen(self.group, index, rank)
        room = pen.rooms.get(own.room)
        if pen.stopped or rid not in pen.entries or room is None or room.local.poll != "Bootstrapping":
            return
        if known:
            pen.known[pen.key(own)] = (PREFILL[index],)
            pen.deliver("RoutesResolved", own, (1, 1))
        else:
            pen.deliver("RouteUnavailable", own, "route_404")
        pen.deliver("SetupFinished", own)
        pen.join(rid)
        yield pen.done(f"{pen.node} {'learns the' if known else 'finds no'} way to {rid}")

    def _generate(self, rid: str, rank: Rank) -> Iterator[Outcome]:
        """The forward pass of a running request is over; the leader shares that in its next turn."""
        command = ("generated", rid)
        running = any(entry.rid == rid and entry.state == "Running" for entry in rank.process.entries)
        if running and rank.turn is None and command not in rank.commands and not rank.process.stopped:
            after = rank._replace(commands=(*rank.commands, command))
            yield Outcome((after,), f"{rid} has its token", ((GROUP, "wake"),))

    def _pass_deadline(self, index: int, name: str, rank: Rank) -> Iterator[Outcome]:
        if rank.process.stopped:
            return
        for incarnation, timer in sorted(rank.process.timers):
            if timer == name:
                pen = RankPen(self.group, index, rank)
                ring(pen, incarnation, name)
                yield pen.done(f"{pen.node}'s {name} deadline of room {incarnation.room} passes")

    # -- ranks at rest

    def _survey(self, cell: str, value: Any) -> Iterator[Any]:
        if not isinstance(value, Rank):
            return
        process = value.process
        tables = (
            ("rooms", sum(room.local.poll != "Retired" for room in process.rooms)),
            ("requests", len(process.entries)),
            ("timers", len(process.timers)),
            ("pages", len(process.held)),
        )
        yield Surveyed(0, cell, tables, gauges_of(value), 0)


def is_between(rank: Rank) -> bool:
    """Is the rank between two collectives of its turn?"""
    return rank.turn is not None and not rank.turn.waiting


def gauges_of(rank: Rank) -> tuple[tuple[str, float], ...]:
    """What a rank's metrics say."""
    counts: dict[str, float] = {}
    for entry in rank.process.entries:
        if entry.state in GAUGES:
            counts[GAUGES[entry.state]] = counts.get(GAUGES[entry.state], 0) + 1
    return tuple(sorted(counts.items()))


def _number(kind: str, shape: Any) -> int:
    return KINDS.index(kind) * 16 + (shape if isinstance(shape, int) else 0)


def constants(model: GroupModel) -> dict[str, str]:
    """The constants of ``spec/tla/Group.tla``, but for Rules, as TLA+ expressions."""
    return {
        "Requests": to_tla(frozenset(model.asked)),
        "RoomOf": to_tla({rid: pair[0] for rid, pair in model.asked.items()}),
        "Pages": str(model.pages),
        "Faults": to_tla(dict(budget.budget(model.faults))),
    }
