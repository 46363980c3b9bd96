"""Prefill engines: scheduler queues, tensor-parallel agreement, the pipeline, chunked prefill, KV writes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from kvpoll.sim.engine import Detector, Engine, Request
from kvpoll.sim.group import Collectives, Turns, Waiting
from kvpoll.sim.pools import Pool
from kvpoll.sim.rank import NOTHING_TO_DO, Rank
from kvpoll.sim.topology import rank_name
from kvpoll.sim.transport import Destination
from kvpoll.spec.trace import CollectiveEntered, Computed, Decided, new_event
from kvpoll.spec.vocabulary import Action, Incarnation
from kvpoll.statemachine import dp_rank
from kvpoll.statemachine.agreement import (
    BOOTSTRAPPING,
    WAITING,
    Decision,
    Report,
    Ring,
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
from kvpoll.statemachine.retry import register_delay_s
from kvpoll.statemachine.roles import Queued, Registration

if TYPE_CHECKING:
    from kvpoll.sim.cluster import Cluster

GAUGES = {
    "Bootstrap": "num_prefill_bootstrap_queue_reqs",
    "Waiting": "num_queue_reqs",
    "Inflight": "num_prefill_inflight_queue_reqs",
}
UNKNOWN = Report(BOOTSTRAPPING)


class Entry:
    """A request in a prefill rank's scheduler: where it stands and how much of it is computed."""

    __slots__ = ("chunk", "computed", "incarnation", "pages", "rejected", "request", "state")

    def __init__(self, request: Request, epoch: int) -> None:
        self.request = request
        self.incarnation = Incarnation(*request.pair, epoch)
        self.state = Queued()
        self.computed = 0
        self.chunk = 0
        self.pages: tuple[int, ...] = ()
        self.rejected: str | None = None


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


class PrefillRank(Rank):
    """One prefill rank: stage ``pp`` of replica ``dp``, tensor index ``tp``, context index ``cp``."""

    role = "sender"

    def __init__(self, engine: PrefillEngine, replica: Replica, node: str, pp: int, tp: int, cp: int) -> None:
        profile = engine.world.profile
        timers = {name: profile.number(f"{name}_timeout_s") for name in ("bootstrap", "announced", "tombstone")}
        timers["transfer"] = profile.number("waiting_timeout_s")
        super().__init__(engine, node, engine.world.machines.sender, timers)
        self.prefill_engine = engine
        self.replica = replica
        self.pp, self.tp, self.cp = pp, tp, cp
        self.component = node
        self.collectives = replica.collectives[pp]
        self.index = cp * engine.shape.sizes.tp + tp
        self.turns = replica.turns if pp == 0 else Turns(self.world)
        self.kv = Pool(self.world, node, "kv", engine.shape.kv_pages)
        self.destinations: dict[tuple[int, ...], dict[int, Destination]] = {}
        self.askers: dict[tuple[int, ...], dict[int, tuple[str, Incarnation]]] = {}
        self.by_pair: dict[tuple[int, int], Entry] = {}
        self.commands: deque[tuple[Any, ...]] = deque()
        self.steps: deque[Step] = deque()
        self.stage_reports: list[dict[str, Report]] = [{} for _ in range(engine.shape.sizes.pp)]
        self.agreed: tuple[str, ...] = ()
        self.step_number = 0
        self.registration = Registration()
        self._actions |= {
            "NotifyDecode": self._notify_decode,
            "AnswerDecode": self._answer_decode,
            "AcknowledgeAbort": self._acknowledge_abort,
            "ReleasePages": lambda action, origin: self.kv.release(action.incarnation),
            "RejectRequest": self._reject,
        }
        self.world.env.process(self._run())

    # -- messages from decode

    def receive_metadata(self, incarnation: Incarnation, destination: Destination, required: int) -> None:
        """A decode rank published its pages for a room of ours."""
        if self.stopped:
            return
        key = self.key(incarnation)
        self.destinations.setdefault(key, {})[destination.bit] = destination
        self.deliver("DestinationRegistered", incarnation, (destination.bit, required), destination)
        room = self.rooms.get(incarnation.room)
        if room is None or self.key(room.incarnation) != key:
            self.destinations.pop(key, None)

    def receive_abort(self, incarnation: Incarnation, index: int, node: str, theirs: Incarnation) -> None:
        """A decode rank gave up; ``theirs`` is the incarnation to acknowledge."""
        if self.stopped:
            return
        key = self.key(incarnation)
        self.askers.setdefault(key, {})[index] = (node, theirs)
        self.deliver("PeerAborted", incarnation, index, (node, theirs))
        room = self.rooms.get(incarnation.room)
        if room is None or self.key(room.incarnation) != key:
            self.askers.pop(key, None)

    def forget(self, incarnation: Incarnation) -> None:
        key = self.key(incarnation)
        self.destinations.pop(key, None)
        self.askers.pop(key, None)

    # -- actions

    def _send_status(self, destination: Destination, outcome: str) -> None:
        if not destination.pages:
            return
        node = destination.rank.node
        self.world.network.send(
            self.node, node, f"Status {outcome}", destination.incarnation, self.prefill_engine.cluster.status_at,
            node, destination.incarnation, self.unique_index, outcome,
        )  # fmt: skip

    @property
    def unique_index(self) -> int:
        """The bit by which decode ranks count this rank."""
        sizes = self.engine.shape.sizes
        return self.tp * sizes.pp * sizes.cp + self.pp * sizes.cp + self.cp

    def _notify_decode(self, action: Action, origin: Any) -> None:
        for destination in self.destinations.get(self.key(action.incarnation), {}).values():
            self._send_status(destination, action.detail)

    def _answer_decode(self, action: Action, origin: Any) -> None:
        if isinstance(origin, Destination):
            self._send_status(origin, action.detail[0])

    def _acknowledge_abort(self, action: Action, origin: Any) -> None:
        askers = self.askers.get(self.key(action.incarnation), {})
        chosen = askers.values() if action.detail is None else [origin]
        for node, theirs in chosen:
            self.world.network.send(
                self.node,
                node,
                "AbortAck",
                theirs,
                self.prefill_engine.cluster.ack_at,
                node,
                theirs,
                self.unique_index,
            )

    def _reject(self, action: Action, origin: Any) -> None:
        self.world.mark(self.node, "rival_rejected")
        entry = self.by_pair.get(action.incarnation.pair)
        if entry is not None:
            entry.rejected = "room_in_use"
            if self.pp == 0:
                self.replica.wake()

    def poll_changed(self, room: Room) -> None:
        if self.pp == 0:
            if room.local.poll not in NOTHING_TO_DO:
                self.replica.wake()
            return
        entry = self.by_pair.get(room.incarnation.pair)
        if entry is not None:
            self._replicate(entry)

    def _own_report(self, entry: Entry) -> Report:
        return self.report(entry.incarnation) if entry.rejected is None else Report(0, entry.rejected)

    def _replicate(self, entry: Entry) -> None:
        """Tell stage 0 how a request stands on this stage."""
        leader = self.replica.leader_of(self)
        self.world.network.send(
            self.node, leader.node, "StageStatus", entry.incarnation,
            leader.receive_stage_status, self.pp, entry.request.rid, self._own_report(entry),
        )  # fmt: skip

    def receive_stage_status(self, stage: int, rid: str, report: Report) -> None:
        """A later stage's poll, replicated to stage 0."""
        if rid in self.entries:
            self.stage_reports[stage][rid] = report
            self.replica.wake()

    # -- the scheduler loop

    def _run(self) -> Waiting:
        world, shape = self.world, self.engine.shape
        while not self.is_over():
            if self.pp == 0 or not self.steps:
                yield from self.turns.rest(self.index if self.pp == 0 else 0)
            if self.is_over():
                return
            yield world.env.timeout(shape.idle_s * self.engine.pace(self) * (0.5 + self.chance.random()))
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
        ring = uses_ring(self.world.profile, self.replica.stages)
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
        world, collectives = self.world, self.collectives
        commands = tuple(self.commands) if self.index == 0 else ()
        if self.index == 0:
            self.commands.clear()
        mine = {rid: self._report_over_stages(rid) for rid in self.entries}
        if world.profile["agreement"] == "by_request_id":
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
        own = self._own_report(self.entries[rid])
        if self.replica.stages == 1:
            return own
        reports = [own, *(stage.get(rid, UNKNOWN) for stage in self.stage_reports[1:])]
        return min(reports, key=lambda report: report.poll)

    def _in_state(self, state: str) -> list[str]:
        return [rid for rid, entry in self.entries.items() if entry.state.state == state]

    def _watched(self) -> list[str]:
        """Requests past the bootstrap queue whose polls this profile still looks at."""
        states = watched_states(self.world.profile, self.replica.stages)
        return [rid for rid, entry in self.entries.items() if entry.state.state in states]

    def _hand_on(self, step: Step) -> None:
        successor = self.replica.successor_of(self)
        if successor is not None:
            message = f"Step {step.number}"
            self.world.network.send(self.node, successor.node, message, NOBODY, successor.receive_step, step)
        elif self.pp > 0 and uses_ring(self.world.profile, self.replica.stages):
            leader = self.replica.leader_of(self)
            self.world.network.send(
                self.node, leader.node, "Agreed", NOBODY, leader.receive_agreed, step.ring.candidates
            )

    def receive_step(self, step: Step) -> None:
        """The stage before has taken a turn."""
        self.steps.append(step)
        self.turns.wake()

    def receive_agreed(self, candidates: tuple[str, ...]) -> None:
        """The ring is closed: these requests are ready on every stage."""
        fresh = tuple(rid for rid in candidates if rid in self.entries and self.entries[rid].state.state == "Bootstrap")
        if fresh:
            self.agreed += tuple(rid for rid in fresh if rid not in self.agreed)
            self.replica.wake()

    def _follow(self, step: Step) -> Waiting:
        """One turn of a later stage: apply what stage 0 decided, compute the same batch."""
        profile = self.world.profile
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
        self.world.emit(CollectiveEntered(self.world.now, self.node, group, number, "forward", shape))

    def _pipeline_agrees(self, step: Step, batch: tuple[Work, ...]) -> bool:
        """Stage-to-stage receives match by order alone: a stage with another batch waits for ever."""
        world = self.world
        shape = tuple([work.rid for work in batch])
        if shape or step.batch:
            self._enter_pipe(step.number, shape)
        if shape == tuple(work.rid for work in step.batch) and all(work.rid in self.entries for work in step.batch):
            return True
        world.mark(self.node, "pipeline_mismatch")
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
        world, engine = self.world, self.prefill_engine
        entry = Entry(request, self.epoch)
        self.entries[request.rid] = entry
        self.by_pair[request.pair] = entry
        self._move(entry, "RequestArrived")
        required = 0 if self.cp else engine.destinations_required
        if not self.deliver("RequestOpened", entry.incarnation, required):
            return
        if self.pp > 0 and self._own_report(entry).poll != BOOTSTRAPPING:
            self._replicate(entry)  # it was ready, or over, before it was opened
        dp_size, follows = engine.dp_ranks, world.topology.follows_room
        rank = dp_rank.known_rank(world.profile, self.replica.dp, world.topology.dp_attention)
        cause = dp_rank.conflict(world.profile, request.pair[0], dp_size, follows, rank)
        if cause is not None:
            world.mark(self.node, "dp_conflict")
            self.deliver("DpConflictFound", entry.incarnation, cause)
        elif dp_rank.must_register(world.profile, dp_size, follows) and self.pp == 0 and self.index == 0:
            key = dp_rank.entry_key(world.profile, request.pair)
            engine.server.request(self.node, "POST /register_dp_rank", (key, rank), 0, lambda status, body: None)

    def _move(self, entry: Entry, fact: str) -> None:
        """Step a request's queue machine and keep the gauges."""
        before = entry.state.state
        entry.state, _ = self.world.machines.prefill_request.step(entry.state, fact)
        after = entry.state.state
        if before != after:
            if before in GAUGES:
                self.queue(GAUGES[before], entry.request.rid, -1)
            if after in GAUGES:
                self.queue(GAUGES[after], entry.request.rid, 1)
            else:
                self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        rid = entry.request.rid
        del self.entries[rid]
        self.by_pair.pop(entry.request.pair, None)
        for reports in self.stage_reports:
            reports.pop(rid, None)

    def _apply(self, decisions: list[Decision]) -> None:
        world = self.world
        for rid, outcome, cause in decisions:
            entry = self.entries.get(rid)
            if entry is None:
                continue
            if self.replica.size > 1:
                world.emit(Decided(world.now, self.node, self.replica.name, rid, outcome))
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
            self.prefill_engine.cluster.router.leg_failed(self, entry.request, "prefill", cause)

    # -- computing and sending

    def _pick(self, free_pages: int) -> tuple[Work, ...]:
        """The next batch: first come, first served, up to chunk_tokens, as far as pages reach.

        The first request that finds no pages holds back those that have not begun; one that has begun goes on, because
        its pages are what the others wait for.
        """
        budget, batch, has_room = self.world.topology.chunk_tokens, [], True
        page_tokens = self.world.topology.page_tokens
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
        yield self.world.env.timeout(tokens / self.engine.shape.tokens_per_s * self.engine.pace(self))
        if self.is_over():
            return
        for work in batch:
            entry = self.entries.get(work.rid)
            if entry is not None:
                self._send_chunk(entry, work)

    def _reserve(self, entry: Entry) -> None:
        """Source pages for the whole prompt; a rank that cannot have them fails the request, the group follows."""
        if self._poll(entry) not in ("WaitingForInput", "Transferring"):
            return
        needed = -(-entry.request.input_tokens // self.world.topology.page_tokens)
        pages = self.kv.reserve(entry.incarnation, needed)
        if pages is None:
            self.world.mark(self.node, "allocation_failed")
            self.deliver("AbortRequested", entry.incarnation, "allocation_failed")
        else:
            entry.pages = pages
            self.deliver("PagesReserved", entry.incarnation)

    def _poll(self, entry: Entry) -> str:
        room = self.rooms.get(entry.incarnation.room)
        if room is None or self.key(room.incarnation) != self.key(entry.incarnation):
            return "Absent"
        return room.local.poll

    def _send_chunk(self, entry: Entry, work: Work) -> None:
        world, page_tokens = self.world, self.world.topology.page_tokens
        entry.computed = work.first + work.tokens
        chunk, entry.chunk = entry.chunk, entry.chunk + 1
        world.emit(new_event(Computed, (world.now, self.node, entry.incarnation, chunk)))
        if self._poll(entry) in ("WaitingForInput", "Transferring") and entry.pages:
            first = work.first // page_tokens
            pages = entry.pages[first : -(-entry.computed // page_tokens)]
            self._post(entry, chunk, first, pages, work.last)
        if work.last:
            self._move(entry, "ForwardFinished")

    def _post(self, entry: Entry, chunk: int, first: int, pages: tuple[int, ...], last: bool) -> None:
        """One write per destination; the request's final write is the last chunk's to the last destination."""
        incarnation = entry.incarnation
        known = self.destinations.get(self.key(incarnation), {}).values()
        targets = [destination for destination in known if destination.pages]
        if not targets:
            self.deliver("WritePosted", incarnation, last)
            self.deliver("WriteCompleted", incarnation)
        for position, destination in enumerate(targets):
            final = last and position == len(targets) - 1
            if self._poll(entry) not in ("WaitingForInput", "Transferring"):
                return
            if self.deliver("WritePosted", incarnation, final):
                self.prefill_engine.cluster.transport.post(
                    self,
                    destination,
                    chunk,
                    first,
                    pages,
                    last,
                    lambda outcome: self._write_ended(incarnation, outcome),
                )

    def _write_ended(self, incarnation: Incarnation, outcome: str) -> None:
        fact = {"completed": "WriteCompleted", "failed": "WriteFailed", "settled": "WriteSettled"}[outcome]
        self.deliver(fact, incarnation)

    # -- registration

    def register(self, fact: str) -> None:
        """Step this rank's registration and do what it orders."""
        if self.is_over():
            return
        profile = self.world.profile
        before = self.registration.state
        self.registration, orders = self.world.machines.registration.step(self.registration, fact)
        for order, _ in orders:
            if order == "SendRegistration":
                detail = (self.node, self.epoch, self.prefill_engine.rank_count)
                repeat = self.registration.attempt - 1
                self.prefill_engine.server.request(self.node, "PUT /route", detail, repeat, self._registered)
            elif order == "ArmRetry":
                self.world.mark(self.node, "registration_retried")
                exhausted = self.registration.state == "Exhausted"
                delay = register_delay_s(profile, self.registration.attempt, exhausted, self.chance.random())
                self.world.after(delay, self.register, "RetryDue")
        if before != self.registration.state and "Exhausted" in (before, self.registration.state):
            self.engine.report_health()

    def _registered(self, status: int | str, body: Any) -> None:
        self.register("RegistrationAccepted" if status == 200 else "RegistrationFailed")

    # -- what it believes of decode engines

    def suspect(self, engine: str) -> None:
        """A decode engine does not answer: every room that writes to it fails; its memory may still be written."""
        self._tell_rooms(engine, "PeerSuspected", None)

    def bury(self, engine: str, epoch: int) -> None:
        """A decode engine's former process is gone."""
        self._tell_rooms(engine, "PeerDied", epoch)

    def restored(self, engine: str) -> None:
        """The channel to a decode engine is back."""
        self._tell_rooms(engine, "LinkRestored", None)

    def _tell_rooms(self, engine: str, fact: str, epoch: int | None) -> None:
        for room in list(self.rooms.values()):
            known = self.destinations.get(self.key(room.incarnation), {}).values()
            if any(d.rank.engine.name == engine and d.incarnation.epoch != epoch for d in known):
                self.deliver(fact, room.incarnation)


NOBODY = Incarnation(0, 0, 0)


class Replica:
    """One data-parallel replica: its pipeline stages, each a tensor x context group."""

    def __init__(self, engine: PrefillEngine, dp: int) -> None:
        sizes = engine.shape.sizes
        self.engine = engine
        self.dp = dp
        self.stages = sizes.pp
        self.name = f"{engine.name}/dp{dp}"
        group = sizes.tp * sizes.cp
        self.size = group * sizes.pp
        self.turns = Turns(engine.world, group)
        self.collectives = [Collectives(engine.world, f"{self.name}/pp{pp}", group) for pp in range(sizes.pp)]
        self.ranks: list[list[PrefillRank]] = []

    def build(self) -> None:
        """Make the ranks, stage by stage."""
        sizes = self.engine.shape.sizes
        for pp in range(sizes.pp):
            self.ranks.append([])
            for cp in range(sizes.cp):
                for tp in range(sizes.tp):
                    node = rank_name("P", self.engine.number, sizes, self.dp, pp, tp, cp)
                    self.ranks[pp].append(PrefillRank(self.engine, self, node, pp, tp, cp))

    def wake(self) -> None:
        """Every rank of stage 0 takes a turn; the later stages follow."""
        self.turns.wake()

    def block(self) -> None:
        """The pipeline hangs."""
        for collectives in self.collectives:
            collectives.blocked = True

    def leader_of(self, rank: PrefillRank) -> PrefillRank:
        """The stage-0 rank of the same column."""
        return self.ranks[0][rank.index]

    def successor_of(self, rank: PrefillRank) -> PrefillRank | None:
        """The same column's rank in the next stage."""
        return self.ranks[rank.pp + 1][rank.index] if rank.pp + 1 < self.stages else None


class PrefillEngine(Engine):
    """A prefill server with its bootstrap server and DP controller."""

    side = "P"

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(cluster.world, number, cluster.topology.prefill)
        self.cluster = cluster
        self.server = cluster.servers[number]
        self.replicas: list[Replica] = []
        self.load: list[int] = [0] * self.shape.sizes.dp

    def build(self) -> None:
        self.replicas = [Replica(self, dp) for dp in range(self.shape.sizes.dp)]
        for replica in self.replicas:
            replica.build()
        self.ranks = {rank.node: rank for rep in self.replicas for stage in rep.ranks for rank in stage}

    def ready(self) -> None:
        profile = self.world.profile
        for rank in self.ranks.values():
            self.world.after(rank.chance.random() * 0.01, rank.register, "Started")
            if profile["registration_watch"] == "epoch":
                self.detectors.append(Detector(rank, self.server.name, lambda _: None, _server_restarted(rank)))
            if profile["liveness_probe"] == "rank_epoch":
                for engine in self.cluster.decode:
                    self.detectors.append(Detector(rank, engine.name, rank.suspect, rank.bury))

    @property
    def rank_count(self) -> int:
        """How many ranks the bootstrap server must expect."""
        sizes = self.shape.sizes
        return sizes.dp * sizes.pp * sizes.tp * sizes.cp

    @property
    def dp_ranks(self) -> int:
        """Data-parallel replicas."""
        return self.shape.sizes.dp

    @property
    def destinations_required(self) -> int:
        """Decode ranks that write metadata for a room to each rank."""
        return self.world.topology.mapping(0).destinations_required

    def is_registered(self) -> bool:
        return all(rank.registration.state == "Registered" for rank in self.ranks.values())

    def accept(self, request: Request, command: tuple[Any, ...]) -> None:
        """The controller hands a command to the leader of the request's replica."""
        leader = self.replicas[request.prefill_dp].ranks[0][0]
        leader.commands.append(command)
        self.replicas[request.prefill_dp].wake()


def _server_restarted(rank: PrefillRank) -> Any:
    def tell(name: str, epoch: int) -> None:
        rank.register("ServerRestarted")

    return tell
