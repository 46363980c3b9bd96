"""A prefill rank's scheduler: queues, tensor-parallel agreement, the pipeline, chunked prefill."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from kvpoll.spec.trace import CollectiveEntered, Computed, Decided, new_event
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import (
    BOOTSTRAPPING,
    WAITING,
    Decision,
    Report,
    Ring,
    agrees_by_request_id,
    decide_transfer,
    follows_batch,
    intersect,
    merge_by_position,
    merge_by_request,
    stage0_decisions,
    stage_decisions,
    uses_ring,
    watched_states,
)
from kvpoll.statemachine.machine import Room
from kvpoll.statemachine.ranks.engine import PrefillGroup, PrefillHome
from kvpoll.statemachine.ranks.host import Request, Waiting
from kvpoll.statemachine.ranks.rank import NOTHING_TO_DO
from kvpoll.statemachine.ranks.sender import Entry, SenderRank

GAUGES = {
    "Bootstrap": "num_prefill_bootstrap_queue_reqs",
    "Waiting": "num_queue_reqs",
    "Inflight": "num_prefill_inflight_queue_reqs",
}
UNKNOWN = Report(BOOTSTRAPPING)
NOBODY = Incarnation(0, 0, 0)


class Work(NamedTuple):
    """A piece of a batch: this many tokens of a request, starting here."""

    rid: str
    first: int
    tokens: int
    last: bool


class Step(NamedTuple):
    """What one stage hands to the next with each turn of the pipeline."""

    number: int
    commands: tuple[tuple[Any, ...], ...]
    ring: Ring
    batch: tuple[Work, ...]


class PrefillRank(SenderRank):
    """A sender with the scheduler of SGLang's prefill server around it."""

    def __init__(self, engine: PrefillHome, replica: PrefillGroup, node: str, pp: int, tp: int, cp: int) -> None:
        super().__init__(engine, node, replica.dp, pp, tp, cp)
        self.replica = replica
        self.collectives = replica.stage_collectives(pp)
        self.turns = replica.turns if pp == 0 else replica.stage_turns()
        self.commands: deque[tuple[Any, ...]] = deque()
        self.steps: deque[Step] = deque()
        self.stage_reports: list[dict[str, Report]] = [{} for _ in range(engine.shape.sizes.pp)]
        self.agreed: tuple[str, ...] = ()
        self.step_number = 0
        self.mail |= {
            "StageStatus": self.receive_stage_status,
            "Step": self.receive_step,
            "Agreed": self.receive_agreed,
        }
        self.host.spawn(self._run())

    def refused(self, entry: Entry) -> None:
        if self.pp == 0:
            self.replica.wake()

    def poll_changed(self, room: Room) -> None:
        super().poll_changed(room)
        if self.pp == 0:
            if room.local.poll not in NOTHING_TO_DO:
                self.replica.wake()
            return
        entry = self.by_pair.get(room.incarnation.pair)
        if entry is not None:
            self._replicate(entry)

    def _replicate(self, entry: Entry) -> None:
        """Tell stage 0 how a request stands on this stage."""
        leader, rid = self.replica.leader_of(self), entry.request.rid
        self.host.send(self.node, leader, "StageStatus", entry.incarnation, self.pp, rid, self.own_report(entry))

    def receive_stage_status(self, incarnation: Incarnation, stage: int, rid: str, report: Report) -> None:
        """A later stage's poll, replicated to stage 0."""
        if rid in self.entries:
            self.stage_reports[stage][rid] = report
            self.replica.wake()

    # -- the scheduler loop

    def _run(self) -> Waiting:
        host, shape = self.host, self.engine.shape
        while not self.is_over():
            if self.pp == 0 or not self.steps:
                yield from self.turns.rest(self.index if self.pp == 0 else 0)
            if self.is_over():
                return
            yield host.sleep(shape.idle_s * self.engine.pace(self) * (0.5 + self.chance.random()))
            if self.is_over():
                return
            if self.pp == 0:
                yield from self._turn()
            elif self.steps:
                yield from self._follow(self.steps.popleft())

    def _turn(self) -> Waiting:
        """One turn of stage 0: exchange, decide, hand on, compute."""
        commands, reports, free = yield from self._exchange()
        queue = self._in_state("Bootstrap")
        ring = uses_ring(self.host.profile, self.replica.stages)
        agreed, self.agreed = self.agreed, ()
        bootstrap = stage0_decisions(reports, queue, agreed if ring else None)
        transfer = [d for rid in self._watched() if (d := decide_transfer(rid, reports.get(rid, UNKNOWN))) is not None]
        ready = tuple(rid for rid in queue if self.report(self.entries[rid].incarnation).poll == WAITING)
        self._obey(commands)
        self._apply([*bootstrap, *transfer])
        batch = self._pick(free)
        sent = transfer if ring else [*bootstrap, *transfer]
        self._hand_on(Step(self.step_number, commands, Ring(tuple(sent), tuple(queue), ready, agreed), batch))
        self.step_number += 1
        if batch:
            if self.replica.stages > 1:
                self._enter_pipe(self.step_number - 1, tuple([work.rid for work in batch]))
            yield from self._compute(batch)
        if self._in_state("Waiting"):
            self.turns.again(self.index)

    def _exchange(self) -> Waiting:
        """Agree with the other tensor ranks on commands, polls and free pages."""
        host, collectives = self.host, self.collectives
        commands = tuple(self.commands) if self.index == 0 else ()
        if self.index == 0:
            self.commands.clear()
        mine = {rid: self._report_over_stages(rid) for rid in self.entries}
        if agrees_by_request_id(host.profile):
            if collectives.size == 1:
                return commands, mine, len(self.kv.free)
            payloads = yield from collectives.enter(
                self.index, self.node, "step", "fixed", (commands, mine, len(self.kv.free))
            )
            reports = merge_by_request([payload[1] for payload in payloads])
            return payloads[0][0], reports, min(payload[2] for payload in payloads)
        payloads = yield from collectives.enter(self.index, self.node, "requests", "fixed", commands)
        merged: dict[str, Report] = {}
        for kind, queue in (("bootstrap", self._in_state("Bootstrap")), ("transfer", self._watched())):
            if queue:
                vector = [mine[rid].poll for rid in queue]
                vectors = yield from collectives.enter(self.index, self.node, kind, len(vector), vector)
                for rid, poll in zip(queue, merge_by_position(vectors), strict=False):
                    merged[rid] = Report(poll, mine[rid].cause)
        return payloads[0], merged, len(self.kv.free)

    def _report_over_stages(self, rid: str) -> Report:
        own = self.own_report(self.entries[rid])
        if self.replica.stages == 1:
            return own
        reports = [own, *(stage.get(rid, UNKNOWN) for stage in self.stage_reports[1:])]
        return min(reports, key=lambda report: report.poll)

    def _in_state(self, state: str) -> list[str]:
        return [rid for rid, entry in self.entries.items() if entry.state.state == state]

    def _watched(self) -> list[str]:
        """Requests past the bootstrap queue whose polls this profile still looks at."""
        states = watched_states(self.host.profile, self.replica.stages)
        return [rid for rid, entry in self.entries.items() if entry.state.state in states]

    def _hand_on(self, step: Step) -> None:
        successor = self.replica.successor_of(self)
        if successor is not None:
            message = f"Step {step.number}"
            self.host.send(self.node, successor, message, NOBODY, step)
        elif self.pp > 0 and uses_ring(self.host.profile, self.replica.stages):
            leader = self.replica.leader_of(self)
            self.host.send(self.node, leader, "Agreed", NOBODY, step.ring.candidates)

    def receive_step(self, incarnation: Incarnation, step: Step) -> None:
        """The stage before has taken a turn."""
        self.steps.append(step)
        self.turns.wake()

    def receive_agreed(self, incarnation: Incarnation, candidates: tuple[str, ...]) -> None:
        """The ring is closed: these requests are ready on every stage."""
        fresh = tuple(rid for rid in candidates if rid in self.entries and self.entries[rid].state.state == "Bootstrap")
        if fresh:
            self.agreed += tuple(rid for rid in fresh if rid not in self.agreed)
            self.replica.wake()

    def _follow(self, step: Step) -> Waiting:
        """One turn of a later stage: apply what stage 0 decided, compute the same batch."""
        profile = self.host.profile
        queue = self._in_state("Bootstrap")
        polls = {rid: self.report(self.entries[rid].incarnation) for rid in queue}
        failed = {rid: report.cause for rid, report in polls.items() if report.poll == 0}
        decisions = stage_decisions(profile, step.ring, queue, failed)
        if uses_ring(profile, self.replica.stages):
            decisions += [decision for decision in step.ring.decisions if decision.rid not in queue]
        ready = [rid for rid, report in polls.items() if report.poll == WAITING]
        self._obey(step.commands)
        self._apply(decisions)
        ring = step.ring._replace(candidates=intersect(step.ring.candidates, ready))
        batch = step.batch
        if not follows_batch(profile):
            batch = self._pick(len(self.kv.free))
        self._hand_on(step._replace(ring=ring))
        if self._pipeline_agrees(step, batch) and step.batch:
            yield from self._compute(step.batch)

    def _enter_pipe(self, number: int, shape: tuple[str, ...]) -> None:
        group = f"{self.replica.name}/pipe{self.index}"
        self.host.emit(CollectiveEntered(self.host.now, self.node, group, number, "forward", shape))

    def _pipeline_agrees(self, step: Step, batch: tuple[Work, ...]) -> bool:
        """Stage-to-stage receives match by order alone: a stage with another batch waits for ever."""
        host = self.host
        shape = tuple([work.rid for work in batch])
        if shape or step.batch:
            self._enter_pipe(step.number, shape)
        if shape == tuple(work.rid for work in step.batch) and all(work.rid in self.entries for work in step.batch):
            return True
        host.mark(self.node, "pipeline_mismatch")
        self.replica.block()
        self.stopped = True
        self.engine.report_health()
        return False

    # -- queues

    def _obey(self, commands: tuple[tuple[Any, ...], ...]) -> None:
        for command in commands:
            if command[0] == "open":
                self._open(command[1])
            else:
                entry = self.entries.get(command[1])
                if entry is not None:
                    self.deliver("AbortRequested", entry.incarnation, command[2])

    def _open(self, request: Request) -> None:
        entry = Entry(request, self.epoch)
        self.entries[request.rid] = entry
        self.by_pair[request.pair] = entry
        self._move(entry, "RequestArrived")
        self.open(entry)

    def opened(self, entry: Entry) -> None:
        if self.pp > 0 and self.own_report(entry).poll != BOOTSTRAPPING:
            self._replicate(entry)  # it was ready, or over, before it was opened

    def _move(self, entry: Entry, fact: str) -> None:
        """Step a request's queue machine and keep the gauges."""
        before = entry.state.state
        entry.state, _ = self.host.machines.prefill_request.step(entry.state, fact)
        after = entry.state.state
        if before != after:
            self.requeue(GAUGES, entry.request.rid, before, after)
            if after not in GAUGES:
                self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        rid = entry.request.rid
        del self.entries[rid]
        self.by_pair.pop(entry.request.pair, None)
        for reports in self.stage_reports:
            reports.pop(rid, None)

    def _apply(self, decisions: list[Decision]) -> None:
        host = self.host
        for rid, outcome, cause in decisions:
            entry = self.entries.get(rid)
            if entry is None:
                continue
            if self.replica.size > 1:
                host.emit(Decided(host.now, self.node, self.replica.name, rid, outcome))
            if outcome == "admit":
                self._move(entry, "AdmissionAgreed")
            elif outcome == "drop":
                self._drop(entry, cause or "failed")
            else:
                self._move(entry, "TransferAgreed")
                self.deliver("Cleared", entry.incarnation)

    def _drop(self, entry: Entry, cause: str) -> None:
        self._move(entry, "DropAgreed")
        room = self.rooms.get(entry.incarnation.room)
        if entry.rejected is None and room is not None and self.key(room.incarnation) == self.key(entry.incarnation):
            if room.local.poll not in ("Failed", "Retired"):
                self.deliver("AbortRequested", entry.incarnation, cause)
            self.deliver("Cleared", entry.incarnation)
        if self.pp == 0 and self.index == 0:
            self.host.leg_failed(self, entry.request, "prefill", cause)

    # -- computing and sending

    def _pick(self, free_pages: int) -> tuple[Work, ...]:
        """The next batch: first come, first served, up to chunk_tokens, as far as pages reach.

        The first request that finds no pages holds back those that have not begun; one that has begun goes on, because
        its pages are what the others wait for.
        """
        budget, batch, has_room = self.host.topology.chunk_tokens, [], True
        page_tokens = self.host.topology.page_tokens
        for rid, entry in self.entries.items():
            if entry.state.state != "Waiting":
                continue
            if budget < page_tokens:
                break
            if entry.computed == 0:
                needed = -(-entry.request.input_tokens // page_tokens)
                has_room = has_room and needed <= free_pages
                if not has_room:
                    continue
                free_pages -= needed
            remaining = entry.request.input_tokens - entry.computed
            tokens = remaining if remaining <= budget else budget - budget % page_tokens
            batch.append(Work(rid, entry.computed, tokens, tokens == remaining))
            budget -= tokens
        return tuple(batch)

    def _compute(self, batch: tuple[Work, ...]) -> Waiting:
        for work in batch:
            entry = self.entries[work.rid]
            if work.first == 0:
                self._reserve(entry)
        tokens = sum(work.tokens for work in batch)
        yield self.host.sleep(tokens / self.engine.shape.tokens_per_s * self.engine.pace(self))
        if self.is_over():
            return
        for work in batch:
            entry = self.entries.get(work.rid)
            if entry is not None:
                self._send_chunk(entry, work)

    def _reserve(self, entry: Entry) -> None:
        """Source pages for the whole prompt; a rank that cannot have them fails the request, the group follows."""
        if self.poll(entry) not in ("WaitingForInput", "Transferring"):
            return
        needed = -(-entry.request.input_tokens // self.host.topology.page_tokens)
        pages = self.kv.reserve(entry.incarnation, needed)
        if pages is None:
            self.host.mark(self.node, "allocation_failed")
            self.deliver("AbortRequested", entry.incarnation, "allocation_failed")
        else:
            entry.pages = pages
            self.deliver("PagesReserved", entry.incarnation)

    def _send_chunk(self, entry: Entry, work: Work) -> None:
        host, page_tokens = self.host, self.host.topology.page_tokens
        entry.computed = work.first + work.tokens
        chunk, entry.chunk = entry.chunk, entry.chunk + 1
        first = work.first // page_tokens
        pages = entry.pages[first : -(-entry.computed // page_tokens)]
        self.kv.computed(entry.incarnation, self.component, chunk, first, pages)
        host.emit(new_event(Computed, (host.now, self.node, entry.incarnation, chunk)))
        is_open = self.poll(entry) in ("WaitingForInput", "Transferring")
        if pages and is_open and self.has_place_for(entry, first + len(pages), work.last):
            self.post(entry, chunk, first, pages, work.last)
        if work.last:
            self._move(entry, "ForwardFinished")
