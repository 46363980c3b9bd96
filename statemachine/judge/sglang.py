"""Traces of an instrumented SGLang: which facts of a profile's machine explain what its status table shows?

The recorder (``spec/sglang_trace.py``) shows the table of every rank, the messages that ranks receive and some calls.
For each value that is put into the table the judge looks for facts that the trace gives evidence of and that lead the
profile's machine from the room that it holds to that value (``sglang_rooms``). The first that do are taken; where
none do, the profile does not explain the event. What the relation leaves open, because SGLang does (PROTOCOL 17.8):

* Transferring may be missing (Mooncake never stores it), and a value may be stored again.
* Success may turn Failed before the room is cleared, if the profile has such a row.
* A prefill rank's room may begin as WaitingForInput, by the metadata that comes before its scheduler opens it.
* A decode rank's table forgets a room while its memory is still held for a drain.
* Which prefill ranks a decode rank waits for is not in the trace; as many as had answered when it believed it.

What the trace does not show is not judged: pages, timers, the queues, the orders of a step except the acknowledgement
of an abort. A message names a room number only, so a profile whose facts carry incarnations (``identity``) departs
at the first message that acts on a room.

Attempts are counted by openings: the n-th time that a rank's scheduler opens a room number. A message belongs to the
attempt of the decode rank that sent it, as far as the trace shows one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.sglang_trace import Called, Heard, Message, Put, SglangEvent
from kvpoll.spec.trace import Stepped, Violated
from kvpoll.spec.vocabulary import TERMINAL_POLLS, Action, Fact, Incarnation
from kvpoll.statemachine.judge.departure import IDENTITY, Change, Departures
from kvpoll.statemachine.judge.finding import Finding, Told
from kvpoll.statemachine.judge.rows import UNFIT, Witness, said_of_fact, state_of, ways_on
from kvpoll.statemachine.judge.sglang_rooms import (
    REPORTS_MAX,
    Entry,
    Node,
    Offer,
    Pairing,
    Pairings,
    Pending,
    fits,
    receiver_ways,
    sender_ways,
)
from kvpoll.statemachine.machine import ABSENT, IllegalFact, Local, Room, RoomMachine

CONTEXT: Final = 4
"""Earlier values of a room that a finding shows."""

REMEMBERED_ROOMS: Final = 4096
"""Rooms of which the judge remembers those values."""

BY_ROWS: Final = ("S5",)
"""Invariants whose monitors need events that this format lacks (pages, commits); a row that breaks one says so."""


class Step(NamedTuple):
    """One fact that was taken: the room before and after it, and what it ordered."""

    before: Room
    fact: Fact
    after: Room
    actions: tuple[Action, ...]


class Way(NamedTuple):
    """What explains a put: the steps, and whether a pending message was among them."""

    steps: tuple[Step, ...]
    used_pending: bool


class SglangJudge:
    """Judges one trace of an instrumented SGLang, event by event.

    emit: receives the steps that explain the trace, as Stepped events for the invariants, and a Violated where a
    row breaks an invariant that this format has no events for. Times are seconds since the first event.
    missing: events that gaps in ``seq`` betray. trusting: which evidence the trace does not hold at all.
    """

    def __init__(self, protocol: Protocol, profile: Profile, emit: Callable[[Any], None]) -> None:
        self.protocol = protocol
        self.profile = profile
        self.departures = Departures(protocol, profile)
        self.steps = 0
        self.missing = 0
        self.trusting: set[str] = set()
        self._emit = emit
        self._nodes: dict[str, Node] = {}
        self._pairings = Pairings()
        self._witnesses: dict[tuple[str, tuple[Change, ...]], Witness] = {}
        self._told: OrderedDict[tuple[str, int], deque[Told]] = OrderedDict()
        self._late: deque[tuple[Node, int]] = deque()
        self._begin: float | None = None
        self._seq: int | None = None
        self._t = 0.0

    def offer(self, line: int, event: SglangEvent) -> list[Finding]:
        """Judge one event; the events come in order of ``seq``. Empty: the profile explains it."""
        if self._begin is None:
            self._begin = event.t
        if self._seq is not None:
            self.missing += max(0, event.seq - self._seq - 1)
        self._seq, self._t = event.seq, max(0.0, event.t - self._begin)
        node = self._nodes.get(event.node)
        if node is None:
            node = self._nodes[event.node] = Node(event.node)
        if isinstance(event, Put):
            found = self._put(line, node, event)
        elif isinstance(event, Heard):
            found = self._heard(line, node, event)
        else:
            found = self._called(line, node, event)
        return [finding for finding in found if finding is not None]

    @property
    def seconds(self) -> float:
        """Time of the latest event, since the first one."""
        return self._t

    def live_rooms(self) -> int:
        """How many rooms the judge holds."""
        return sum(len(node.entries) for node in self._nodes.values())

    def left_open(self) -> list[tuple[str, int, str]]:
        """(node, room, poll) of what the table still shows; a trace may end before its rooms do."""
        return [
            (node.name, number, entry.shown)
            for node in self._nodes.values()
            for number, entry in node.entries.items()
            if entry.shown is not None
        ]

    # -- messages

    def _heard(self, line: int, node: Node, event: Heard) -> list[Finding | None]:
        node.hears = True
        message = event.message
        if message.room is None:
            return []
        found: list[Finding | None] = [self._has_no_incarnation(line, event, message)]
        if node.role == "receiver":
            entry = node.entries.get(message.room)
            if entry is not None and message.kind == "status":
                found.append(self._status_heard(line, entry, event, message))
            elif entry is not None and message.kind == "abort_ack":
                entry.ack_frames.add(message.number)
            return found
        pairing = self._pairings.of(message.room)
        if message.kind == "metadata":
            found.append(self._unsent(line, event, message))
            bit = pairing.bit_of(message.sender) if len(pairing.senders) < REPORTS_MAX else 0
            offer = Offer("DestinationRegistered", (bit, min(message.number or 1, REPORTS_MAX)))
        else:
            ends = [sender.partition(" ")[0] == message.sender for sender in pairing.senders]
            offer = Offer("PeerAborted", ends.index(True) if True in ends else 0)
        self._take_message(node, pairing, event, message.room, offer)
        return found

    def _status_heard(self, line: int, entry: Entry, event: Heard, message: Message) -> Finding | None:
        """A prefill rank stores its outcome before it tells decode."""
        rank, outcome, number = message.number or 0, str(message.outcome), message.room or 0
        if len(entry.frames) < REPORTS_MAX:
            entry.frames.append((rank, outcome))
        pairing, why = self._pairings.of(number), None
        if f"{outcome} of {rank}" in entry.trusted:
            why = "it was applied before it was received"
        elif pairing.held and outcome in TERMINAL_POLLS and not any(told == outcome for _, told in pairing.ended):
            why = "no prefill rank of this trace has ended the room so"
        text = f"{event.node} received {outcome} of prefill rank {rank} for room {number}"
        return None if why is None else self._plain(line, event, number, text, why)

    def _take_message(self, node: Node, pairing: Pairing, event: Heard, number: int, offer: Offer) -> None:
        """Keep what a message says until the table shows what came of it; an unknown room shows nothing."""
        entry = node.entries.get(number)
        attempt = pairing.attempt
        if attempt is None:
            attempt = entry.room.incarnation.attempt if entry is not None else pairing.opened.get(node.name, 0)
        offer = offer._replace(meant_for=Incarnation(number, attempt, 0))
        if entry is None:
            entry = Entry(Room(Incarnation(number, attempt, 0), ABSENT))
            self._may_come_to_nothing(node, number)
        else:
            self._flush(node, number, entry)
        node.entries[number] = entry
        entry.pending = Pending(event.thread, offer)
        if offer.kind == "PeerAborted" and entry.shown is None:
            self._flush(node, number, entry)

    def _flush(self, node: Node, number: int, entry: Entry) -> None:
        """A pending message has shown nothing: let it be taken as the profile takes it, if that shows nothing."""
        pending, entry.pending = entry.pending, None
        if pending is not None:
            steps = _run(self.departures.machine(node.role), entry.room, [pending.offer])
            if steps and fits(steps[-1].after.local, entry.shown):
                self._follow(node, entry, steps)
        if entry.shown is None and entry.room.local.poll == "Absent":
            node.entries.pop(number, None)

    def _has_no_incarnation(self, line: int, event: Heard, message: Message) -> Finding | None:
        """Under `identity = "incarnation"` a message must say which use of the room number it means."""
        if self.profile[IDENTITY] != "incarnation":
            return None
        rule = self.protocol.rules[IDENTITY]
        change = Change(IDENTITY, self.profile[IDENTITY], "room")
        return Finding(
            line, self._t, event.node, f"{event.node} received {message.kind} of room {message.room}",
            f"room {message.room}", None, "the message carries a room number and no incarnation",
            (rule.values[str(change.has)],), (change,), ("S2",), self.context(event.node, message.room or 0),
        )  # fmt: skip

    def _unsent(self, line: int, event: Heard, message: Message) -> Finding | None:
        """Metadata that comes after its effect, or that no decode rank of the trace can have sent."""
        holders = [
            node.entries[message.room]
            for node in self._nodes.values()
            if node.role == "receiver" and message.room in node.entries
        ]
        own = self._nodes[event.node].entries.get(message.room or 0)
        if own is not None and "metadata" in own.trusted:
            why = "the table showed its effect before it was received"
        elif holders and all(entry.shown == "Bootstrapping" for entry in holders):
            why = "no decode rank can have sent it: those that hold the room are still in Bootstrapping"
        else:
            return None
        text = f"{event.node} received metadata of room {message.room}"
        return self._plain(line, event, message.room or 0, text, why)

    # -- calls

    def _called(self, line: int, node: Node, event: Called) -> list[Finding | None]:
        node.calls = True
        if event.method == "_handle_node_failure":
            node.loses = event.thread
        if event.room is None:
            return []
        if event.method == "_send_abort_ack":
            return [self._acknowledges(line, node, event, event.room)]
        entry = node.entries.get(event.room)
        if entry is None:
            return []
        if event.method == "record_failure":
            entry.failure = str(event.arguments.get("failure_reason") or "") or None
            self._pairings.of(event.room).recorded.setdefault(node.name, entry.room.incarnation.attempt)
        elif event.method == "add_transfer_request":
            return [self._hands_over(line, entry, event, event.room)]
        elif event.method == "conclude_transfer":
            return [self._concludes(line, entry, event, event.room)]
        elif event.method == "apply_prefill_status":
            return [self._reports(line, node, entry, event, event.room)]
        elif event.method == "note_abort_ack":
            return [self._hears_ack(line, node, entry, event, event.room)]
        return []

    def _hands_over(self, line: int, entry: Entry, event: Called, number: int) -> Finding | None:
        """A scheduler hands a chunk to the transfer workers. One that comes after a failure is dropped by SGLang."""
        why = None
        if entry.shown == "Success":
            why = "the room has ended with Success, and a chunk of it is handed over only now"
        elif entry.last and entry.shown != "Failed":
            why = "a chunk follows the one that was the last"
        elif "chunks" in entry.trusted:
            why = "the table showed its write before it was handed over"
        elif entry.shown != "Failed":
            entry.chunks += 1
            entry.last = event.arguments.get("is_last_chunk") is True
        text = f"{event.node} add_transfer_request for room {number}"
        return None if why is None else self._plain(line, event, number, text, why, ("S5",))

    def _concludes(self, line: int, entry: Entry, event: Called, number: int) -> Finding | None:
        """A worker announces how a transfer has ended, and tells decode: Failed, if a failure is on record."""
        entry.concluded, why = str(event.arguments.get("status")), None
        pairing = self._pairings.of(number)
        if entry.concluded == "Failed" or entry.shown == "Failed" or event.node in pairing.recorded:
            pairing.ended.setdefault((entry.room.incarnation.attempt, "Failed"), set()).add(event.node)
        if entry.concluded == "Success":
            is_dummy = entry.room.local.owned and entry.room.local.expected == 0
            if "conclusion" in entry.trusted:
                why = "the table showed Success before it was announced"
            elif entry.shown in ("WaitingForInput", "Transferring") and not entry.last and not is_dummy:
                why = "its last chunk was never handed over"
        text = f"{event.node} conclude_transfer {entry.concluded} for room {number}"
        return None if why is None else self._plain(line, event, number, text, why, ("S5",))

    def _reports(self, line: int, node: Node, entry: Entry, event: Called, number: int) -> Finding | None:
        """A decode rank applies what a prefill rank has reported: was it told so, and by whom?"""
        rank, outcome = int(event.arguments.get("prefill_rank", 0)), str(event.arguments.get("status"))
        text = f"{node.name} apply_prefill_status {outcome} of prefill rank {rank} for room {number}"
        why = None
        if node.hears:
            if (rank, outcome) in entry.frames:
                entry.frames.remove((rank, outcome))
            else:
                why = "no status message of that rank with that outcome was received"
        else:
            self.trusting.add(f"messages received by {node.name}")
            entry.trusted.add(f"{outcome} of {rank}")
        pairing = self._pairings.of(number)
        meant = entry.room.incarnation
        if why is None and pairing.held and outcome in TERMINAL_POLLS:
            told = len(pairing.ended.get((meant.attempt, outcome), ()))
            ranks = {report[0] for report in entry.reports if report[1] == outcome} | {rank}
            if len(ranks) > told:
                earlier = [attempt for attempt, ended in pairing.ended if ended == outcome and attempt < meant.attempt]
                if earlier:
                    meant = meant._replace(attempt=max(earlier))
                else:
                    why = f"{told or 'no'} prefill rank of this trace has ended the room so, and {len(ranks)} report it"
        if len(entry.reports) < REPORTS_MAX:
            entry.reports.append((rank, outcome, meant))
        return None if why is None else self._plain(line, event, number, text, why)

    def _hears_ack(self, line: int, node: Node, entry: Entry, event: Called, number: int) -> Finding | None:
        rank = int(event.arguments.get("prefill_rank", 0))
        pairing, why = self._pairings.of(number), None
        if node.hears and rank not in entry.ack_frames:
            why = "no acknowledgement of that rank was received"
        elif pairing.held and not pairing.sent:
            why = "no prefill rank of this trace has sent one"
        steps = _run(self.departures.machine(node.role), entry.room, [Offer("AbortAcknowledged", rank)])
        self._follow(node, entry, steps or ())
        text = f"{node.name} notes an acknowledgement of prefill rank {rank} for room {number}"
        return None if why is None else self._plain(line, event, number, text, why)

    def _acknowledges(self, line: int, node: Node, event: Called, number: int) -> Finding | None:
        """A prefill rank tells decode that it is quiet: has an abort come, and may every write be over?"""
        pairing, entry = self._pairings.of(number), node.entries.get(number)
        pairing.sent += 1
        if entry is not None:
            self._flush(node, number, entry)
            settled = [Offer("WriteSettled")] * entry.room.local.outstanding
            if not pairing.acks.get(node.name) and entry.room.local.poll == "Failed":
                self._follow(node, entry, _run(self.departures.machine(node.role), entry.room, settled) or ())
        if pairing.acks.get(node.name):
            pairing.acks[node.name] -= 1
            return None
        text = f"{node.name} acknowledges an abort of room {number}"
        return self._plain(line, event, number, text, "no abort that it has heard of is waiting for one", ("S1",))

    # -- puts

    def _put(self, line: int, node: Node, put: Put) -> list[Finding | None]:
        pairing = self._pairings.of(put.room)
        entry = node.entries.get(put.room)
        own = self._identity(node, pairing, entry, put)
        if entry is None:
            entry = node.entries[put.room] = Entry(Room(own, ABSENT))
        finding: Finding | None = None
        if put.before != entry.shown:
            earlier = f" since line {entry.line}" if entry.line else ""
            why = f"the table held {_value(entry.shown)}{earlier}, and the trace says that it held {_value(put.before)}"
            finding = self._unexplained(line, node, entry, put, why)
        else:
            way = self._way(self.departures.machine(node.role), node, pairing, entry, put, own)
            if way is None:
                finding, way = self._departs(line, node, pairing, entry, put, own)
            if way is not None:
                self._accept(node, pairing, entry, put, way)
        if finding is not None and not finding.changes:
            self._adopt(node, entry, put)
        self._show(line, node, entry, put)
        return [finding]

    def _identity(self, node: Node, pairing: Pairing, entry: Entry | None, put: Put) -> Incarnation:
        """Whose the room is that a put opens: an owner's opening is another attempt."""
        by_message = put.after == "WaitingForInput" and entry is not None and entry.pending is not None
        if put.before is None and put.after is not None and not by_message:
            holders = [
                other.entries[put.room].room.incarnation.attempt
                for other in self._nodes.values()
                if other.role != node.role and put.room in other.entries and other.entries[put.room].shown is not None
            ]
            own = Incarnation(put.room, pairing.open(node, max(holders, default=0)), 0)
            if entry is not None and entry.pending is not None and entry.pending.offer.meant_for != own:
                entry.pending = None  # it has shown nothing before its room was cleared, so it did nothing
            return own
        return entry.room.incarnation if entry is not None else Incarnation(put.room, 0, 0)

    def _way(
        self, machine: RoomMachine, node: Node, pairing: Pairing, entry: Entry, put: Put, own: Incarnation
    ) -> Way | None:
        """The first way to the value that the machine can go, and the trace gives evidence of."""
        start = entry.room
        if node.role == "sender":
            ways = sender_ways(node, entry, put, own, pairing.recorded.get(node.name))
        else:
            heard = any(other.hears for other in self._nodes.values() if other.role == "sender")
            published = put.before == "WaitingForInput" and (not heard or pairing.has_published(node.name))
            ways = receiver_ways(node, entry, put, own, published)
            if put.after == "Success":
                answered = {report[0] for report in entry.reports if report[1] == "Success"}
                start = _needing(start, len(answered))
        pending = entry.pending
        for way in ways:
            leads = [[]] if pending is None else [[pending.offer]]
            if pending is not None and pending.thread != put.thread:
                leads = [[], [pending.offer]]
            for lead in leads:
                steps = _run(machine, start, [*lead, *way])
                if steps is not None and fits(steps[-1].after.local if steps else start.local, put.after):
                    return Way(steps, bool(lead))
        return None

    def _departs(
        self, line: int, node: Node, pairing: Pairing, entry: Entry, put: Put, own: Incarnation
    ) -> tuple[Finding, Way | None]:
        """No way under the profile: is there one under other rules?"""
        found = self.departures.search(node.role, lambda machine: self._way(machine, node, pairing, entry, put, own))
        if found is None:
            why = "nothing that the trace shows before leads to this value, under no choice of rules"
            return self._unexplained(line, node, entry, put, why), None
        changes, way = found
        rows = [
            row
            for step in way.steps
            for row in self._witness(node.role, changes).rows_of_step(
                step.before.local, step.fact.kind, step.fact.detail
            )
        ]
        invariants = self.departures.invariants(changes, rows)
        facts = ", ".join(step.fact.kind for step in way.steps)
        why = f"the profile makes something else of {facts}" if facts else "the profile keeps the room otherwise"
        return self._unexplained(line, node, entry, put, why, changes, invariants, way), way

    def _witness(self, role: str, changes: tuple[Change, ...] = ()) -> Witness:
        witness = self._witnesses.get((role, changes))
        if witness is None:
            profile = self.profile.with_rules({change.rule: change.needs for change in changes})
            witness = self._witnesses[role, changes] = Witness(self.protocol.roles[role], profile)
        return witness

    def _accept(self, node: Node, pairing: Pairing, entry: Entry, put: Put, way: Way) -> None:
        if put.before is None and put.after is not None and node.role == "sender":
            pairing.held.add(node.name)
        if put.before is None and put.after == "Bootstrapping":
            node.schedulers.add(put.thread)
        if way.used_pending:
            entry.pending = None
        attempt = way.steps[-1].after.incarnation.attempt if way.steps else 0
        pairing.opened[node.name] = max(pairing.opened.get(node.name, -1), attempt)
        kinds = {step.fact.kind for step in way.steps}
        if node.role == "sender" and not node.calls and "WritePosted" in kinds:
            entry.trusted |= {"chunks", "conclusion"} if put.after == "Success" else {"chunks"}
            self.trusting.add(f"calls on {node.name}")
        if node.role == "sender" and not node.hears and "DestinationRegistered" in kinds:
            entry.trusted.add("metadata")
            self.trusting.add(f"messages received by {node.name}")
        entry.chunks = max(0, entry.chunks - sum(step.fact.kind == "WritePosted" for step in way.steps))
        self._follow(node, entry, way.steps)

    def _follow(self, node: Node, entry: Entry, steps: tuple[Step, ...]) -> None:
        """Go on from where the steps lead, and tell the invariants of each."""
        for step in steps:
            entry.room = step.after
            number = step.after.incarnation.room
            names = tuple(action.kind for action in step.actions)
            pairing = self._pairings.of(number)
            pairing.acks[node.name] = pairing.acks.get(node.name, 0) + names.count("AcknowledgeAbort")
            for action in step.actions:
                if action.kind in ("NotifyDecode", "AnswerDecode"):
                    outcome = action.detail if action.kind == "NotifyDecode" else action.detail[0]
                    pairing.ended.setdefault((step.after.incarnation.attempt, str(outcome)), set()).add(node.name)
            if step.after is step.before and not names:
                continue
            self.steps += 1
            self._tell(node, step, names)

    def _tell(self, node: Node, step: Step, names: tuple[str, ...]) -> None:
        before, after = step.before.local, step.after.local
        meant = step.fact.incarnation
        own = step.after.incarnation if step.after.incarnation == meant else step.before.incarnation
        self._emit(Stepped(
            self._t, node.name, node.role, own, step.fact.kind, meant, step.fact.detail, before.poll, after.poll,
            before.lease, after.lease, after.cause, names,
        ))  # fmt: skip
        for row in self._witness(node.role).rows_of_step(before, step.fact.kind, step.fact.detail):
            for invariant in row.defect:
                if invariant in BY_ROWS:
                    text = f"{step.fact.kind} leads to {after.poll}: {row.source}"
                    self._emit(Violated(self._t, node.name, invariant, own.pair, text))

    def _adopt(self, node: Node, entry: Entry, put: Put) -> None:
        """Nothing explains the put: believe it, so that what follows can be judged, and tell the invariants."""
        before = entry.room
        poll = put.after or "Absent"
        after = Room(
            before.incarnation, ABSENT if put.after is None else before.local._replace(poll=poll, cleared=False)
        )
        if put.after != "Failed":
            after = after._replace(local=after.local._replace(cause=None))
        entry.pending = None
        step = Step(before, Fact("Unexplained", before.incarnation), after, ())
        entry.room = after
        if before.local.poll != poll:
            self._tell(node, step, ())

    def _show(self, line: int, node: Node, entry: Entry, put: Put) -> None:
        """The table shows the value from now on."""
        entry.shown, entry.line = put.after, line
        key = (node.name, put.room)
        if key not in self._told and len(self._told) >= REMEMBERED_ROOMS:
            self._told.popitem(last=False)
        self._told.setdefault(key, deque(maxlen=CONTEXT)).append(Told(line, _said(put)))
        entry.used()
        if put.after == "Success" or put.after is None:
            entry.chunks, entry.last = 0, False
        if put.after is None and entry.pending is not None:
            self._may_come_to_nothing(node, put.room)  # its thread may still act on the room, now that it is gone
        elif put.after is None and entry.room.local.poll != "Announced":
            node.entries.pop(put.room, None)

    def _may_come_to_nothing(self, node: Node, number: int) -> None:
        """Keep an entry that the table does not show for a while: a message is under way that may make it show."""
        self._late.append((node, number))
        if len(self._late) > REMEMBERED_ROOMS:
            other, old = self._late.popleft()
            entry = other.entries.get(old)
            if entry is not None and entry.shown is None:
                del other.entries[old]

    # -- what there is to say

    def _unexplained(
        self,
        line: int,
        node: Node,
        entry: Entry,
        put: Put,
        why: str,
        changes: tuple[Change, ...] = (),
        invariants: tuple[str, ...] = (),
        way: Way | None = None,
    ) -> Finding:
        role = self.protocol.roles[node.role]
        local = entry.room.local
        own = []
        for step in way.steps if way is not None else ():
            own.append(said_of_fact(role, self.profile, step.before.local, step.fact.kind, step.fact.detail))
        return Finding(
            line, self._t, node.name, _said(put), f"room {put.room} (attempt {entry.room.incarnation.attempt})",
            state_of(local), why, (*own, *ways_on(role, self.profile, local)), changes, invariants,
            self.context(node.name, put.room),
        )  # fmt: skip

    def _plain(
        self, line: int, event: SglangEvent, number: int, text: str, why: str, invariants: tuple[str, ...] = ()
    ) -> Finding:
        entry = self._nodes[event.node].entries.get(number)
        before = None if entry is None else state_of(entry.room.local)
        context = self.context(event.node, number)
        return Finding(line, self._t, event.node, text, f"room {number}", before, why, (), (), invariants, context)

    def told(self, event: SglangEvent) -> str:
        """Any event of a trace in one line."""
        if isinstance(event, Put):
            return _said(event)
        if isinstance(event, Heard):
            return f"{event.node} received {event.message.kind} of room {event.message.room}"
        return f"{event.node} {event.method} of room {event.room}"

    def context(self, node: str, number: int) -> tuple[Told, ...]:
        """The latest values that the table has shown for a room, oldest first."""
        return tuple(self._told.get((node, number), ()))


def _run(machine: RoomMachine, room: Room, offers: list[Offer]) -> tuple[Step, ...] | None:
    """The steps that these facts make, or None when one of them is illegal."""
    steps = []
    for offer in offers:
        fact = Fact(offer.kind, offer.meant_for or room.incarnation, offer.detail)
        try:
            after, actions = machine.step_room(room, fact)
        except (IllegalFact, *UNFIT):
            return None
        steps.append(Step(room, fact, after, actions))
        room = after
    return tuple(steps)


def _needing(room: Room, ranks: int) -> Room:
    """The room as it is when so many more prefill ranks were all that it waited for."""
    local: Local = room.local
    return room._replace(local=local._replace(expected=local.arrived.bit_count() + ranks))


def _value(shown: str | None) -> str:
    return "nothing" if shown is None else shown


def _said(put: Put) -> str:
    return f"{put.node} room {put.room}: {_value(put.before)} -> {_value(put.after)} (by {put.thread})"
