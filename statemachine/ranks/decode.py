"""A decode rank's scheduler: preallocation, the transfer queue, agreement of tensor ranks, commit."""

from __future__ import annotations

from collections import deque
from typing import Any

from kvpoll.spec.trace import Committed, Decided
from kvpoll.statemachine.agreement import (
    Memory,
    Report,
    agrees_by_request_id,
    decide_bootstrap,
    decide_decode,
    fits,
    merge_by_position,
    merge_by_request,
    tightest,
)
from kvpoll.statemachine.conduct import queues_at_arrival
from kvpoll.statemachine.machine import Room
from kvpoll.statemachine.ranks.engine import DecodeGroup, Home
from kvpoll.statemachine.ranks.host import Request, Waiting
from kvpoll.statemachine.ranks.rank import NOTHING_TO_DO
from kvpoll.statemachine.ranks.receiver import Entry, ReceiverRank

GAUGES = {
    "Preallocation": "num_decode_prealloc_queue_reqs",
    "Transfer": "num_decode_transfer_queue_reqs",
    "Running": "num_running_reqs",
}

QUEUED = ("Preallocation", "Transfer")
"""States in which a request waits for something that the ranks must agree on."""


class DecodeRank(ReceiverRank):
    """A receiver with the scheduler of SGLang's decode server around it."""

    def __init__(self, engine: Home, group: DecodeGroup, node: str, tp: int) -> None:
        super().__init__(engine, node, tp)
        self.group = group
        self.collectives = group.collectives
        self.waiting: dict[str, Entry] = {}
        self.commands: deque[tuple[Any, ...]] = deque()
        self.host.spawn(self._run())

    def memory_came_back(self) -> None:
        self.group.wake()

    def refused(self, entry: Entry) -> None:
        self.group.wake()

    def join(self, entry: Entry) -> None:
        if entry.request.rid not in self.entries and self.by_pair.get(entry.request.pair) is entry:
            self.enqueue(entry)
            self.group.wake()

    def unqueued_failed(self, entry: Entry, cause: str) -> None:
        self.report_failure(entry.request, cause)

    def poll_changed(self, room: Room) -> None:
        if room.local.poll not in NOTHING_TO_DO:
            self.group.wake()

    # -- the scheduler loop

    def _run(self) -> Waiting:
        host, shape = self.host, self.engine.shape
        while not self.is_over():
            yield from self.group.turns.rest(self.index)
            if self.is_over():
                return
            busy = len(self.entries) > len(self.waiting)
            period = shape.iteration_s if busy else shape.idle_s
            yield host.sleep(period * self.engine.pace(self) * (0.5 + self.chance.random()))
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
        mine = {rid: self.own_report(entry) for rid, entry in self.waiting.items()}
        if agrees_by_request_id(self.host.profile):
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

    def _obey(self, commands: tuple[tuple[Any, ...], ...]) -> None:
        for command in commands:
            if command[0] == "open":
                self._open(command[1])
            elif command[0] == "generated":
                self._generated(command[1])
            elif command[0] == "sampled":
                self._sampled(command[1])
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
        if queues_at_arrival(self.host.profile):
            self.enqueue(entry)
        if self.deliver("RequestOpened", entry.incarnation) and entry.rejected is None:
            self.finder.find(entry)

    def enqueue(self, entry: Entry) -> None:
        """The request joins this rank's queue."""
        self.entries[entry.request.rid] = entry
        self._move(entry, "RequestArrived")

    def _move(self, entry: Entry, fact: str) -> None:
        before = entry.state.state
        entry.state, _ = self.host.machines.decode_request.step(entry.state, fact)
        after = entry.state.state
        if before != after:
            self.requeue(GAUGES, entry.request.rid, before, after)
            if after in QUEUED:
                self.waiting[entry.request.rid] = entry
            else:
                self.waiting.pop(entry.request.rid, None)
            if after not in GAUGES:
                self.entries.pop(entry.request.rid, None)
                self.by_pair.pop(entry.request.pair, None)

    def _decide(self, reports: dict[str, Report]) -> None:
        """Apply what the merged polls say: drop what failed, commit what succeeded."""
        decided = [
            decide_decode(rid, entry.state.state, entry.aborted, reports.get(rid))
            for rid, entry in self.waiting.items()
        ]
        decisions = [decision for decision in decided if decision is not None]
        for decision in decisions:
            self._tell_decision(decision.rid, decision.outcome)
            entry = self.entries[decision.rid]
            if decision.outcome == "drop":
                self._drop(entry, decision.cause or "failed")
            else:
                self._commit(entry)

    def _tell_decision(self, rid: str, outcome: str) -> None:
        if self.collectives.size > 1:
            self.host.emit(Decided(self.host.now, self.node, self.group.name, rid, outcome))

    def _admit(self, reports: dict[str, Report], memory: Memory) -> None:
        """Grant memory in order of arrival, by the tightest rank; the first that does not fit holds the rest."""
        for rid, entry in list(self.waiting.items()):
            if entry.state.state != "Preallocation":
                continue
            report = reports.get(rid)
            if report is None or decide_bootstrap(rid, report) is None:
                continue
            needed = -(-entry.request.input_tokens // self.host.topology.page_tokens)
            if not fits(needed, memory):
                self.host.mark(self.node, "decode_memory_full")
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
            self.host.mark(self.node, "allocation_failed")
            self.kv.release(own)
            self.aux.release(own)
            self.deliver("AbortRequested", own, "allocation_failed")
            return
        self.publish(entry, pages, row[0])

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
            self.host.leg_failed(self, request, "decode", cause)

    def _commit(self, entry: Entry) -> None:
        """The transfer is over: the request starts to decode from its pages."""
        host, own = self.host, entry.incarnation
        components = tuple(peer.node for peer in self.peers.get(self.key(own), ()) if not peer.dummy)
        contents = tuple([self.kv.read(page, components) for page in entry.pages])
        row_pair = self.row_owners[entry.row] if entry.row >= 0 else None
        host.emit(Committed(host.now, self.node, own, components, contents, row_pair))
        self._move(entry, "TransferAgreed")
        self.deliver("Cleared", own)
        if self.index == 0:
            step_s = self.engine.shape.iteration_s * self.engine.pace(self)
            host.after(step_s, self._first_token, entry.request)
            host.after(step_s * entry.request.output_tokens, self._last_token, entry.request.rid)

    def _first_token(self, request: Request) -> None:
        """The first forward pass is over on the leader; it is a collective, so every rank has begun by then."""
        if self.is_over():
            return
        if self.collectives.size == 1:
            self.host.first_token(self, request)
        else:
            self.commands.append(("sampled", request.rid))
            self.group.wake()

    def _sampled(self, rid: str) -> None:
        entry = self.entries.get(rid)
        if self.index == 0 and entry is not None and entry.state.state == "Running":
            self.host.first_token(self, entry.request)

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
