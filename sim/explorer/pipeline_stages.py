"""One stage of a prefill pipeline, as the explorer sees it: its memory, and the turns that its scheduler takes.

The twin of ``sim/prefill.py`` without time: which decisions a stage takes, whose decisions it applies and which batch
it computes is decided in ``statemachine/agreement.py``; here it is only carried out. What the twin leaves out: tensor
ranks (one a stage), chunks (a prompt is one batch), the pool of pages (there is always one more), and turns that
nobody could tell from no turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from kvpoll.sim.explorer.process import Entry, Pen, Process
from kvpoll.sim.explorer.system import Outcome
from kvpoll.spec.protocol import Profile
from kvpoll.spec.trace import CollectiveEntered, Decided, HealthReported
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import (
    BOOTSTRAPPING,
    FAILED,
    WAITING,
    Decision,
    Report,
    Ring,
    decide_transfer,
    follows_batch,
    intersect,
    stage0_decisions,
    stage_decisions,
    uses_ring,
    watched_states,
)
from kvpoll.statemachine.conduct import illegal_fact_stops
from kvpoll.statemachine.health import reports_healthy
from kvpoll.statemachine.machine import Local, Room
from kvpoll.statemachine.ranks.rank import NOTHING_TO_DO
from kvpoll.statemachine.roles import Machines, Queued

ENGINE: Final = "P0"
GROUP: Final = f"{ENGINE}/dp0"
PIPE: Final = f"{GROUP}/pipe0"
GAUGES: Final = {
    "Bootstrap": "num_prefill_bootstrap_queue_reqs",
    "Waiting": "num_queue_reqs",
    "Inflight": "num_prefill_inflight_queue_reqs",
}
UNKNOWN: Final = Report(BOOTSTRAPPING)
LOST: Final = Report(FAILED, "failed")
Command = tuple[str, ...]


class Stage(NamedTuple):
    """What a stage remembers. Only the first stage uses the last four.

    rooms: what is not Absent. entries: its requests in order of arrival. awake: something happened that is worth a
    turn although stage 0 has nothing to decide: a round of the ring, or a step that makes the others look. reports:
    how requests stand on later stages. agreed: the closed round of the ring. batches: how many it has computed, which
    numbers the next.
    """

    rooms: frozenset[Room] = frozenset()
    timers: frozenset[tuple[Incarnation, str]] = frozenset()
    entries: tuple[Entry, ...] = ()
    stopped: bool = False
    awake: bool = False
    reports: frozenset[tuple[int, str, Report]] = frozenset()
    agreed: tuple[str, ...] = ()
    batches: int = 0


class Step(NamedTuple):
    """What one stage hands to the next with each turn: ``number`` is that of its batch."""

    commands: tuple[Command, ...] = ()
    ring: Ring = Ring()
    batch: tuple[str, ...] = ()
    number: int = 0


class Wiring(NamedTuple):
    """What every stage of a model knows from the start.

    owns: each request's identity. cancels: does the router cancel decode's leg as soon as stage 0 has dropped
    prefill's? at_once: do writes end as they are posted?
    """

    machines: Machines
    stages: int
    owns: Mapping[str, Incarnation]
    cancels: bool
    at_once: bool


def stage_name(number: int) -> str:
    """The node of a stage."""
    return f"{ENGINE}/pp{number}"


def _remembered(room: Room) -> Room:
    """A room without what tells equal futures apart: which failure it was, and all but the end of a tombstone.

    Monitors hear of each failure as it happens; no later step asks for more than whether there was one.
    """
    ended = None if room.local.cause is None else LOST.cause
    if room.local.poll == "Retired":
        return room._replace(local=Local(poll="Retired", lease="Released", cause=ended))
    return room if ended == room.local.cause else room._replace(local=room.local._replace(cause=ended))


class StagePen(Pen):
    """Writes the next state of one stage: carries out orders, tells stage 0 and decode what they want to know."""

    role = "sender"

    def __init__(self, number: int, stage: Stage, wiring: Wiring) -> None:
        profile = wiring.machines.profile
        machine, process = wiring.machines.sender, Process(timers=stage.timers)
        super().__init__(stage_name(number), process, machine, illegal_fact_stops(profile))
        self.number, self.stage, self.wiring = number, stage, wiring
        self.profile, self.stages, self.owns = profile, wiring.stages, wiring.owns
        self.rooms = {room.incarnation.room: room for room in stage.rooms}
        self.entries = {entry.rid: entry for entry in stage.entries}
        self.stopped = stage.stopped
        self.reports = {(later, rid): report for later, rid, report in stage.reports}
        self.awake, self.agreed, self.batches = stage.awake, stage.agreed, stage.batches

    def after(self) -> Stage:
        """The stage as it is now."""
        return Stage(
            rooms=frozenset(_remembered(room) for room in self.rooms.values()),
            timers=frozenset(self.timers),
            entries=tuple(self.entries.values()),
            stopped=self.stopped,
            awake=self.awake,
            reports=frozenset((later, rid, report) for (later, rid), report in self.reports.items()),
            agreed=self.agreed,
            batches=self.batches,
        )

    def finished(self, label: str, *others: Any) -> Outcome:
        """The outcome; ``others`` are the new values of the scope's other cells."""
        if self.stopped and not self.stage.stopped:
            healthy = reports_healthy(self.profile, True, True, False)
            self.events.append(HealthReported(0, ENGINE, healthy, False))
        return Outcome((self.after(), *others), label, tuple(self.effects), tuple(self.events), tuple(self.marks))

    # -- orders

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        """Decode hears of an outcome if it has told this stage its pages, or if it has just asked."""
        if kind == "NotifyDecode" and self.room_at(own.room).local.arrived:
            self.effects.append(("R", (self._rid(own), self.number, detail)))
        elif kind == "AnswerDecode":
            self.effects.append(("R", (self._rid(own), self.number, detail[0])))

    def _rid(self, own: Incarnation) -> str:
        return next(rid for rid, each in self.owns.items() if each == own)

    def _store(self, room: Room, after: Room) -> None:
        super()._store(room, after)
        if after.local.poll == room.local.poll or after.local.poll in NOTHING_TO_DO:
            return
        rid = self._rid(after.incarnation)
        if self.number == 0:
            self.wake(False)
        elif rid in self.entries:
            self._replicate(rid)

    def _replicate(self, rid: str) -> None:
        """Tell stage 0 how a request stands here."""
        self.effects.append((stage_name(0), ("Status", self.number, rid, self.own_report(rid))))

    def wake(self, failed_later: bool) -> None:
        """Take a turn even if there is nothing to decide, where that can make a difference on later stages."""
        if uses_ring(self.profile, self.stages) and (self.ready() or (failed_later and acts_alone(self.profile))):
            self.awake = True

    # -- what the scheduler reads

    def report(self, incarnation: Incarnation) -> Report:
        """Poll of a room. Which failure it was is told to the monitors as it happens, and remembered by nobody."""
        poll = super().report(incarnation).poll
        return LOST if poll == FAILED else Report(poll)

    def own_report(self, rid: str) -> Report:
        """How a request stands on this stage."""
        return LOST if self.entries[rid].rejected else self.report(self.owns[rid])

    def report_over_stages(self, rid: str) -> Report:
        """How it stands on all of them, as far as this one has heard."""
        heard = [self.reports.get((later, rid), UNKNOWN) for later in range(1, self.stages)]
        return min([self.own_report(rid), *heard], key=lambda report: report.poll)

    def ready(self) -> tuple[str, ...]:
        """What could be admitted, as far as this stage knows."""
        return tuple(rid for rid in self.in_state("Bootstrap") if self.own_report(rid).poll == WAITING)

    def in_state(self, *states: str) -> list[str]:
        """Requests in these scheduler states, in order of arrival."""
        return [rid for rid, entry in self.entries.items() if entry.state in states]

    # -- what the scheduler does

    def obey(self, commands: Iterable[Command]) -> None:
        """Open and abort what the router says."""
        for kind, rid, *rest in commands:
            if kind == "open":
                self._open(rid)
            elif rid in self.entries:
                self.deliver("AbortRequested", self.owns[rid], rest[0])

    def _open(self, rid: str) -> None:
        self._move(rid, "RequestArrived")
        self.opening = rid
        if self.deliver("RequestOpened", self.owns[rid], 1) and self.number > 0 and self._was_ready(rid):
            self._replicate(rid)

    def _was_ready(self, rid: str) -> bool:
        """Was it ready, or over, before it was opened?"""
        return self.own_report(rid).poll != BOOTSTRAPPING

    def _move(self, rid: str, fact: str) -> None:
        before = self.entries[rid].state if rid in self.entries else "Unqueued"
        state, _ = self.wiring.machines.prefill_request.step(Queued(before), fact)
        self.queue(GAUGES, rid, before, state.state)
        if rid not in self.entries:
            self.reports = {key: report for key, report in self.reports.items() if key[1] != rid}

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Do as was decided, with whatever of it this stage still has."""
        for rid, outcome, cause in decisions:
            if rid not in self.entries:
                continue
            self.events.append(Decided(0, self.node, GROUP, rid, outcome))
            if outcome == "admit":
                self._move(rid, "AdmissionAgreed")
            elif outcome == "drop":
                self._drop(rid, cause)
            else:
                self._move(rid, "TransferAgreed")
                self.deliver("Cleared", self.owns[rid])

    def _drop(self, rid: str, cause: str | None) -> None:
        own, rejected = self.owns[rid], self.entries[rid].rejected
        self._move(rid, "DropAgreed")
        room = self.rooms.get(own.room)
        if not rejected and room is not None:
            if room.local.poll not in ("Failed", "Retired"):
                self.deliver("AbortRequested", own, cause)
            self.deliver("Cleared", own)
        if self.number == 0 and self.wiring.cancels:
            self.effects.append(("R", (rid, 0, "Cancelled")))

    def compute(self, batch: Iterable[str]) -> None:
        """Run a batch through this stage and post its writes; what has failed is computed all the same."""
        for rid in batch:
            own = self.owns[rid]
            if self._is_sendable(own):
                self.deliver("PagesReserved", own)
            if self._is_sendable(own):
                self.deliver("WritePosted", own, True)
                if self.wiring.at_once:
                    self.deliver("WriteCompleted", own)
            self._move(rid, "ForwardFinished")

    def _is_sendable(self, own: Incarnation) -> bool:
        return self.room_at(own.room).local.poll in ("WaitingForInput", "Transferring")

    def enter_pipe(self, number: int, batch: tuple[str, ...]) -> None:
        """Go through the pipe with the others, who must come with the same batch."""
        self.events.append(CollectiveEntered(0, self.node, PIPE, number, "forward", batch))


# -- turns


def acts_alone(profile: Profile) -> bool:
    """Does a later stage decide anything by itself, so that even a step of nothing makes a difference to it?"""
    return bool(stage_decisions(profile, Ring(), ("a request",), {"a request": None}))


def turn(pen: StagePen, commands: tuple[Command, ...]) -> Outcome | None:
    """One turn of stage 0: decide, hand on, compute. None when there is nothing to do or to say."""
    profile, ring = pen.profile, uses_ring(pen.profile, pen.stages)
    queue, ready = pen.in_state("Bootstrap"), pen.ready() if ring else ()
    agreed, pen.agreed = pen.agreed, ()
    reports = {rid: pen.report_over_stages(rid) for rid in pen.entries}
    bootstrap = stage0_decisions(reports, queue, agreed if ring else None)
    watched = pen.in_state(*watched_states(profile, pen.stages))
    transfer = [decision for rid in watched if (decision := decide_transfer(rid, reports[rid])) is not None]
    if not (pen.awake or commands or bootstrap or transfer):
        return None
    pen.awake = False
    pen.obey(commands)
    pen.apply([*bootstrap, *transfer])
    batch = tuple(pen.in_state("Waiting"))
    sent = tuple(transfer if ring else [*bootstrap, *transfer])
    step = Step(commands, Ring(sent, tuple(queue) if sent else (), ready, agreed), batch, pen.batches)
    if step != Step(number=step.number) or acts_alone(profile):
        pen.send(stage_name(1), step)
    if batch:
        pen.enter_pipe(pen.batches, batch)
        pen.batches += 1
        pen.compute(batch)
    return pen.finished(f"{pen.node} takes a turn{_said([*bootstrap, *transfer], batch)}", ())


def follow(pen: StagePen, step: Step, rest: tuple[Step, ...]) -> Outcome:
    """One turn of a later stage: apply what stage 0 decided, compute the same batch."""
    profile, queue = pen.profile, pen.in_state("Bootstrap")
    failed = {rid: report.cause for rid in queue if (report := pen.report(pen.owns[rid])).poll == FAILED}
    decisions = stage_decisions(profile, step.ring, queue, failed)
    if uses_ring(profile, pen.stages):
        decisions += [decision for decision in step.ring.decisions if decision.rid not in queue]
    candidates = intersect(step.ring.candidates, pen.ready())
    pen.obey(step.commands)
    pen.apply(decisions)
    _hand_on(pen, step._replace(ring=step.ring._replace(candidates=candidates)))
    batch = step.batch if follows_batch(profile) else tuple(pen.in_state("Waiting"))
    label = f"{pen.node} follows{_said(decisions, step.batch)}"
    if batch or step.batch:
        pen.enter_pipe(step.number, batch)
    if batch != step.batch or not all(rid in pen.entries for rid in batch):
        pen.marks.append("pipeline_mismatch")
        pen.stopped = True
        return pen.finished(f"{label}; its own batch is {list(batch)}, and the pipeline hangs", rest)
    pen.compute(batch)
    return pen.finished(label, rest)


def _hand_on(pen: StagePen, step: Step) -> None:
    if pen.number + 1 < pen.stages:
        pen.send(stage_name(pen.number + 1), step)
    elif step.ring.candidates:
        pen.effects.append((stage_name(0), ("Agreed", pen.number, step.ring.candidates)))


def _said(decisions: Iterable[Decision], batch: tuple[str, ...]) -> str:
    parts = [f"{decision.outcome} {decision.rid}" for decision in decisions]
    parts += [f"compute {', '.join(batch)}"] if batch else []
    return f": {'; '.join(parts)}" if parts else ""


def hear_stage(pen: StagePen, message: tuple[Any, ...]) -> Stage:
    """Stage 0 learns how a request stands on a later stage, or what the ring has agreed."""
    kind, later, *rest = message
    if pen.stopped:
        return pen.stage
    if kind == "Status":
        rid, report = rest
        if rid in pen.entries:
            pen.reports[later, rid] = report
        pen.wake(report.poll == FAILED)
        return pen.after()
    queue = pen.in_state("Bootstrap")
    fresh = tuple(rid for rid in rest[0] if rid in queue and rid not in pen.agreed)
    pen.agreed += fresh
    pen.awake = pen.awake or bool(fresh)
    return pen.after()
