"""One decode rank of a tensor-parallel group, as the explorer sees it: its scheduler's turn and what it is made of.

The twin of ``sim/decode.py`` without time. What ranks exchange and what they conclude from it is decided in
``statemachine/agreement.py``; here it is only carried out. A turn that would change nothing ends as soon as its
result is known, so that a wake-up for nothing costs no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from kvpoll.sim.explorer.process import Entry, Pen, Process
from kvpoll.sim.explorer.system import Outcome, Rename, text_of
from kvpoll.spec.trace import Addressed, Committed, Decided, HealthReported, PageTag
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import (
    Decision,
    Memory,
    Report,
    agrees_by_request_id,
    decide_bootstrap,
    decide_decode,
    fits,
    given_up,
    merge_by_position,
    merge_by_request,
    tightest,
)
from kvpoll.statemachine.conduct import illegal_fact_stops, queues_at_arrival
from kvpoll.statemachine.health import reports_healthy
from kvpoll.statemachine.machine import IllegalFact
from kvpoll.statemachine.ranks.rank import NOTHING_TO_DO
from kvpoll.statemachine.roles import Machines, Queued

GROUP: Final = "D0"
GAUGES: Final = {
    "Preallocation": "num_decode_prealloc_queue_reqs",
    "Transfer": "num_decode_transfer_queue_reqs",
    "Running": "num_running_reqs",
}
WAITING: Final = ("Preallocation", "Transfer")
"""States in which a request waits for something that the ranks must agree on; under ``by_position`` each has a queue
and a collective of its own, in this order."""

PAGES_OF_ONE: Final = 1
Command = tuple[str, ...]
Reports = frozenset[tuple[str, Report]]


class Turn(NamedTuple):
    """How far a rank has come in the turn that it takes.

    stage: the collective that it entered last. waiting: it is still in there. commands, merged, memory: what the
    ranks agree on, as far as they have. mine: what this rank says of its requests; queue: in which order, in the
    collective at hand (``by_position`` alone needs to remember these two).
    """

    stage: str
    waiting: bool = True
    commands: tuple[Command, ...] = ()
    merged: Reports = frozenset()
    memory: Memory | None = None
    mine: Reports = frozenset()
    queue: tuple[str, ...] = ()


class Rank(NamedTuple):
    """A rank: its process, the order of its waiting queue, commands not yet shared (on the leader), its turn.

    An entry in state Unqueued is a request that was handed to the rank and has not joined its queue yet.
    """

    process: Process
    order: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()
    turn: Turn | None = None

    def text_of(self, rename: Rename | None) -> str:
        """Canonical text: what is sorted by request is a set, so that requests may trade places."""
        process = self.process
        tables = (process.rooms, process.entries, process.held, process.known, process.contents)
        sets = [frozenset(table) for table in tables]
        parts = (process.stopped, process.timers, process.free, *sets, self.order, self.commands, self.turn)
        return text_of(parts, rename)


class Group:
    """What all ranks of a group share and nobody changes: names, machines, requests, size of the pools."""

    def __init__(
        self, machines: Machines, nodes: tuple[str, ...], pairs: dict[str, tuple[int, int]], pages: int
    ) -> None:
        self.machines = machines
        self.profile = machines.profile
        self.nodes = nodes
        self.pairs = pairs
        self.pages = pages
        self.by_request_id = agrees_by_request_id(self.profile)
        self.illegal_stops = illegal_fact_stops(self.profile)

    def own(self, rid: str) -> Incarnation:
        """A request's identity; no process of this model dies."""
        return Incarnation(*self.pairs[rid], 0)

    def health(self, running: bool) -> HealthReported:
        """What the health endpoint says now, and what is true."""
        return HealthReported(0, GROUP, reports_healthy(self.profile, True, True, running), running)


class RankPen(Pen):
    """The orders that a receiver gives, and the turns of its scheduler. ``known``: key -> (prefill rank,)."""

    role = "receiver"
    pools = ("kv", "aux")

    def __init__(self, group: Group, index: int, rank: Rank) -> None:
        super().__init__(group.nodes[index], rank.process, group.machines.receiver, group.illegal_stops)
        self.group = group
        self.index = index
        self.order_of = list(rank.order)
        self.commands = rank.commands
        self.turn = rank.turn
        self.failing = 0

    def done(self, label: str, *others: Any, first: tuple[Any, ...] = ()) -> Outcome:
        outcome = super().done(label, *others, first=first)
        rank = Rank(outcome.after[len(first)], tuple(self.order_of), self.commands, self.turn)
        return outcome._replace(after=(*first, rank, *others))

    def wake(self) -> None:
        """Something changed that the scheduler has to see: one more turn for everybody."""
        self.effects.append((GROUP, "wake"))

    # -- facts and orders

    def deliver(self, kind: str, incarnation: Incarnation, detail: Any = None, origin: Any = None) -> bool:
        before = self.room_at(incarnation.room).local.poll
        accepted = super().deliver(kind, incarnation, detail, origin)
        after = self.room_at(incarnation.room).local.poll
        if after != before and after not in NOTHING_TO_DO:
            self.wake()
        return accepted

    def _illegal(self, error: IllegalFact, incarnation: Incarnation) -> None:
        super()._illegal(error, incarnation)
        if self.stopped:
            self.events.append(self.group.health(False))

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        peer = self.known.get(self.key(own))
        if peer is None:
            return
        if kind == "NotifyPrefill":
            self.effects.append((peer[0], ("Abort", self.rid_of(own))))
        elif kind == "SendMetadata":
            self.publish(own)

    def publish(self, own: Incarnation) -> None:
        """Tell prefill where to write."""
        peer = self.known.get(self.key(own))
        if peer is not None and own.pair in self.held:
            self.events.append(Addressed(0, self.node, own, peer[0], 0, 0))
            self.effects.append((peer[0], ("Metadata", self.rid_of(own))))

    def rid_of(self, own: Incarnation) -> str:
        """The request of an incarnation."""
        return next(rid for rid, pair in self.group.pairs.items() if pair == own.pair)

    def release(self, own: Incarnation) -> None:
        page = self.held.get(own.pair)
        if page is not None:
            self.contents.pop(page, None)  # nobody looks at what is in a page that nobody has
            self.wake()
        super().release(own)

    # -- the scheduler

    def advance(self, rid: str, fact: str) -> None:
        """The request moves on in this rank's scheduler."""
        before = self.entries[rid].state
        after, _ = self.group.machines.decode_request.step(Queued(before), fact)
        self.queue(GAUGES, rid, before, after.state)
        if rid in self.order_of and after.state not in WAITING:
            self.order_of.remove(rid)
        elif after.state in WAITING and rid not in self.order_of:
            self.order_of.append(rid)

    def join(self, rid: str) -> None:
        """The set-up call has returned: the request joins the queue, unless it has long been in it."""
        if self.entries[rid].state == "Unqueued":
            self.advance(rid, "RequestArrived")
            self.wake()

    def obey(self, command: Command) -> None:
        """Carry out what the leader was told."""
        kind, rid, *rest = command
        if kind == "open":
            self._open(rid)
        elif rid not in self.entries:
            return
        elif kind == "generated":
            if self.entries[rid].state == "Running":
                self._end(rid, "GenerationFinished")
                self.answer("FirstToken", rid)
        elif self.entries[rid].state == "Unqueued":
            self._give_up(rid, rest[0])
        else:
            self._abort(rid, rest[0])

    def _open(self, rid: str) -> None:
        self.entries[rid] = Entry(rid, "Unqueued")
        if queues_at_arrival(self.group.profile):
            self.advance(rid, "RequestArrived")
        self.deliver("RequestOpened", self.group.own(rid))

    def _give_up(self, rid: str, cause: str) -> None:
        own = self.group.own(rid)
        self.deliver("AbortRequested", own, cause)
        self.deliver("Cleared", own)
        self.entries.pop(rid)
        self.answer("Failed", rid, cause)

    def _abort(self, rid: str, cause: str) -> None:
        entry = self.entries[rid]
        if entry.state == "Running":
            self._end(rid, "DropAgreed")
        else:
            self.entries[rid] = entry._replace(aborted=entry.aborted or cause)
            self.deliver("AbortRequested", self.group.own(rid), cause)

    def _end(self, rid: str, fact: str) -> None:
        """The pages belong to the request since its commit; they go back with its last token or its abort."""
        self.advance(rid, fact)
        self.release(self.group.own(rid))

    def answer(self, *words: str) -> None:
        """The leader tells the router."""
        if self.index == 0:
            self.send("R", words)

    def carry_out(self, turn: Turn) -> None:
        """The end of a turn: everything that the ranks have agreed on."""
        self.turn = None
        for command in turn.commands:
            self.obey(command)
        merged = dict(turn.merged)
        for decision in decisions(self._waiting(), merged):
            self._tell_decision(decision.rid, decision.outcome)
            if decision.outcome == "drop":
                self._drop(decision.rid, decision.cause or "failed")
            else:
                self._commit(decision.rid)
        assert turn.memory is not None
        for rid in admissions(self._waiting(), merged, turn.memory):
            self._tell_decision(rid, "admit")
            self._grant(rid)
            if self.stopped:
                break

    def _waiting(self) -> list[Entry]:
        return [self.entries[rid] for rid in self.order_of]

    def _tell_decision(self, rid: str, outcome: str) -> None:
        self.events.append(Decided(0, self.node, GROUP, rid, outcome))

    def _grant(self, rid: str) -> None:
        own = self.group.own(rid)
        self.advance(rid, "MemoryGranted")
        if self.room_at(own.room).local.poll != "WaitingForInput":
            return  # failed since the ranks agreed; the next turn drops it everywhere
        self.failing -= 1
        if self.failing == 0 or self.reserve(own) is None:
            self.marks.append("allocation_failed")
            self.deliver("AbortRequested", own, "allocation_failed")
        elif self.deliver("PagesReserved", own) and self.deliver("MetadataSent", own):
            self.publish(own)

    def _drop(self, rid: str, cause: str) -> None:
        own = self.group.own(rid)
        self.advance(rid, "DropAgreed")
        room = self.rooms.get(own.room)
        if room is not None and self.key(room.incarnation) == self.key(own):
            if room.local.poll not in ("Failed", "Retired"):
                self.deliver("AbortRequested", own, cause)
            self.deliver("Cleared", own)
        self.answer("Failed", rid, cause)

    def _commit(self, rid: str) -> None:
        own = self.group.own(rid)
        page, peers = self.held.get(own.pair), self.known.get(self.key(own), ())
        pair = None if page is None else self.contents.get(page)
        tags = {peer: PageTag(pair, peer, 0, 0) for peer in peers} if pair is not None else {}
        contents = () if page is None else (tags,)
        self.events.append(Committed(0, self.node, own, tuple(peers), contents, pair))
        self.advance(rid, "TransferAgreed")
        self.deliver("Cleared", own)


# -- what a rank says, and what it makes of what it hears


def decisions(waiting: Iterable[Entry], merged: dict[str, Report]) -> list[Decision]:
    """What to do with the requests that wait, in the order of this rank's queue."""
    decided = [decide_decode(entry.rid, entry.state, entry.aborted, merged.get(entry.rid)) for entry in waiting]
    return [decision for decision in decided if decision is not None]


def admissions(waiting: Iterable[Entry], merged: dict[str, Report], memory: Memory) -> Iterator[str]:
    """Who is granted memory, in order of arrival; the first that does not fit holds the rest."""
    for entry in list(waiting):
        report = merged.get(entry.rid)
        if entry.state != "Preallocation" or report is None or decide_bootstrap(entry.rid, report) is None:
            continue
        if not fits(PAGES_OF_ONE, memory):
            return
        memory = memory.less(PAGES_OF_ONE)
        yield entry.rid


def own_reports(pen: RankPen) -> Reports:
    """What this rank says of each request in its queue."""
    entries = [pen.entries[rid] for rid in pen.order_of]
    reports = [(entry, pen.report(pen.group.own(entry.rid))) for entry in entries]
    return frozenset((entry.rid, given_up(entry.aborted, report) or report) for entry, report in reports)


def own_memory(pen: RankPen) -> Memory:
    """What this rank has left. Every request of the model fits into its running batch."""
    taken = sum(entry.state not in ("Unqueued", "Preallocation") for entry in pen.entries.values())
    return Memory(len(pen.free), len(pen.free), len(pen.group.pairs) - taken)


def next_collective(group: Group, rank: Rank) -> tuple[str, tuple[str, ...]] | None:
    """The collective that the rank enters next in its turn, and with which queue; None when it has been in all."""
    turn = rank.turn
    if turn is None:
        return ("step" if group.by_request_id else "requests"), ()
    if turn.stage == "step":
        return None
    mine = dict(turn.mine)
    states = {entry.rid: entry.state for entry in rank.process.entries}
    for kind in WAITING[WAITING.index(turn.stage) + 1 :] if turn.stage in WAITING else WAITING:
        queue = tuple(rid for rid in rank.order if states[rid] == kind and rid in mine)
        if queue:
            return kind, queue
    return None


def is_ready(group: Group, rank: Rank) -> bool:
    """Has the rank everything that it needs to end its turn?"""
    turn = rank.turn
    return turn is not None and not turn.waiting and next_collective(group, rank) is None


def take_result(group: Group, rank: Rank, payloads: tuple[Any, ...]) -> Rank:
    """A collective is complete: the rank goes on with what everybody brought, in order of rank."""
    turn = rank.turn
    assert turn is not None
    turn = turn._replace(waiting=False)
    if turn.stage == "step":
        merged = merge_by_request([dict(reports) for _, reports, _ in payloads])
        memory = tightest(memory for _, _, memory in payloads)
        turn = turn._replace(commands=payloads[0][0], merged=frozenset(merged.items()), memory=memory)
    elif turn.stage == "requests":
        turn = turn._replace(commands=payloads[0])
    else:
        mine = dict(turn.mine)
        polls = zip(turn.queue, merge_by_position(payloads), strict=False)
        found = {(rid, Report(poll, mine[rid].cause)) for rid, poll in polls}
        turn = turn._replace(merged=turn.merged | found, queue=())
    after = rank._replace(turn=turn)
    return after._replace(turn=None) if is_ready(group, after) and _changes_nothing(after, turn) else after


def _changes_nothing(rank: Rank, turn: Turn) -> bool:
    entries = {entry.rid: entry for entry in rank.process.entries}
    waiting = [entries[rid] for rid in rank.order]
    assert turn.memory is not None
    merged = dict(turn.merged)
    return not turn.commands and not decisions(waiting, merged) and not any(admissions(waiting, merged, turn.memory))
