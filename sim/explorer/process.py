"""One rank of a model: a driver of room machines whose whole state is one hashable value.

It carries out what ``statemachine/`` orders and decides nothing itself, like ``sim/rank.py`` in virtual time; what
differs is that nothing here happens by itself. Pages: one a request, numbered from 0; the aux row of a page bears
the same number.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from kvpoll.sim.explorer.system import Outcome, Sorted
from kvpoll.spec.trace import (
    IllegalFactRaised,
    LoopStopped,
    NodeStarted,
    NodeStopped,
    Pair,
    Queued,
    Released,
    Reserved,
    Stepped,
)
from kvpoll.spec.vocabulary import Action, Fact, Incarnation
from kvpoll.statemachine.agreement import Report, report_on
from kvpoll.statemachine.conduct import believes_in_attempts
from kvpoll.statemachine.machine import IllegalFact, Room, RoomMachine
from kvpoll.statemachine.roles import Peer

ETERNAL: Final = "tombstone"
"""The timer that never rings in a model: tombstones outlive the messages that they are for (an assumption)."""


class Entry(NamedTuple):
    """A request in a rank's scheduler: its state (prefill_request or decode_request), why it was given up ("" if it
    was not), and whether its room was refused because another request has it."""

    rid: str
    state: str
    aborted: str = ""
    rejected: bool = False


class Process(NamedTuple):
    """A rank's memory. Everything is Sorted or a frozenset, so that equal states are equal values.

    rooms: what is not Absent. timers: (incarnation, name). held: (pair, page). peers: (node, belief) of its failure
    detector. known: what a driver keeps for a room, (key, ...): destinations and askers on prefill, peers on decode.
    contents: (page, owner's pair) of what was last written. routes: (node, epoch) of cached endpoints.
    """

    epoch: int = 0
    up: bool = True
    stopped: bool = False
    rooms: tuple[Room, ...] = ()
    timers: frozenset[tuple[Incarnation, str]] = frozenset()
    entries: tuple[Entry, ...] = ()
    held: tuple[tuple[Pair, int], ...] = ()
    free: frozenset[int] = frozenset()
    peers: tuple[tuple[str, Peer], ...] = ()
    known: tuple[tuple[Any, ...], ...] = ()
    contents: tuple[tuple[int, Pair], ...] = ()
    routes: tuple[tuple[str, int], ...] = ()


class Pen:
    """Writes the next state of one process: facts in, orders carried out, everything told as events.

    A subclass says what the orders mean on its side of the protocol. One pen makes one outcome.
    """

    role = ""
    pools: tuple[str, ...] = ("kv",)

    def __init__(self, node: str, process: Process, machine: RoomMachine, illegal_stops: bool) -> None:
        self.node = node
        self.process = process
        self.machine = machine
        self.strict = believes_in_attempts(machine.profile)
        self.rooms = {room.incarnation.room: room for room in process.rooms}
        self.timers = set(process.timers)
        self.entries = {entry.rid: entry for entry in process.entries}
        self.held = dict(process.held)
        self.free = set(process.free)
        self.known = {each[0]: each[1:] for each in process.known}
        self.contents = dict(process.contents)
        self.routes = dict(process.routes)
        self.peers = dict(process.peers)
        self.stopped = process.stopped
        self.opening = ""
        self.illegal_stops = illegal_stops
        self.events: list[Any] = []
        self.effects: list[tuple[str, Any]] = []
        self.marks: list[str] = []

    # -- results

    def done(self, label: str, *others: Any, first: tuple[Any, ...] = ()) -> Outcome:
        """The outcome; ``others`` are the new values of the scope's other cells, after the process itself."""
        process = self.process._replace(
            stopped=self.stopped,
            rooms=Sorted(self.rooms[number] for number in sorted(self.rooms)),
            timers=frozenset(self.timers),
            entries=Sorted(self.entries[rid] for rid in sorted(self.entries)),
            held=Sorted(sorted(self.held.items())),
            free=frozenset(self.free),
            peers=Sorted(sorted(self.peers.items())),
            known=Sorted(sorted((key, *rest) for key, rest in self.known.items())),
            contents=Sorted(sorted(self.contents.items())),
            routes=Sorted(sorted(self.routes.items())),
        )
        return Outcome((*first, process, *others), label, tuple(self.effects), tuple(self.events), tuple(self.marks))

    def send(self, to: str, message: Any) -> None:
        """Put a message on the channel to a node."""
        self.effects.append((f"chan {self.node} {to}", message))

    # -- facts

    def deliver(self, kind: str, incarnation: Incarnation, detail: Any = None, origin: Any = None) -> bool:
        """Offer a fact to its room and carry out what the machine orders. False when the fact was illegal."""
        room = self.room_at(incarnation.room)
        try:
            after, actions = self.machine.step_room(room, Fact(kind, incarnation, detail))
        except IllegalFact as error:
            self._illegal(error, incarnation)
            return False
        if after is room and not actions:
            return True
        if after is not room:
            self._store(room, after)
        self._tell(room, after, kind, incarnation, detail, actions)
        for action in actions:
            self._carry_out(action, origin)
        return True

    def room_at(self, number: int) -> Room:
        """What this process knows of a room number."""
        return self.rooms.get(number) or self.machine.absent(Incarnation(number, 0, self.process.epoch))

    def _store(self, room: Room, after: Room) -> None:
        number = after.incarnation.room
        if after.incarnation.attempt != room.incarnation.attempt and room.local.poll != "Absent":
            self.forget(room.incarnation)
        if after.local.poll == "Absent":
            self.rooms.pop(number, None)
            self.forget(after.incarnation)
        else:
            self.rooms[number] = after

    def _tell(self, room: Room, after: Room, kind: str, meant: Incarnation, detail: Any, actions: Any) -> None:
        own = after.incarnation if after.incarnation == meant else room.incarnation
        before, now = room.local, after.local
        self.events.append(Stepped(
            0, self.node, self.role, own, kind, meant, detail, before.poll, now.poll, before.lease, now.lease,
            now.cause, tuple(action.kind for action in actions),
        ))  # fmt: skip

    def _illegal(self, error: IllegalFact, incarnation: Incarnation) -> None:
        self.events.append(IllegalFactRaised(0, self.node, self.role, incarnation, error.fact, error.state))
        if self.illegal_stops:
            self.stopped = True
            self.events.append(LoopStopped(0, self.node, "scheduler", str(error)))
        else:
            self.deliver("AbortRequested", incarnation, "illegal_fact")

    def forget(self, incarnation: Incarnation) -> None:
        """The room is gone; so is what the driver kept for it."""
        self.known.pop(self.key(incarnation), None)

    def key(self, incarnation: Incarnation) -> tuple[int, ...]:
        """What the driver's own tables of a room are keyed by: the identity that the profile believes in."""
        return incarnation[:2] if self.strict else incarnation[:1]

    def report(self, incarnation: Incarnation) -> Report:
        """Poll and cause of a room, as the scheduler sees them."""
        return report_on(self.rooms.get(incarnation.room), incarnation)

    # -- orders

    def _carry_out(self, action: Action, origin: Any) -> None:
        kind, own, detail = action
        if kind == "ArmDeadline":
            if detail != ETERNAL:
                self.timers.add((own, detail))
        elif kind == "CancelDeadline":
            self.timers.discard((own, detail))
        elif kind == "ReleasePages":
            self.release(own)
        elif kind == "QuarantinePages":
            self.marks.append("pages_quarantined")
        elif kind == "RejectRequest":
            self.reject()
        else:
            self.order(kind, own, detail, origin)

    def reject(self) -> None:
        """The room of the request that is being opened is taken."""
        self.marks.append("rival_rejected")
        if self.opening:
            self.entries[self.opening] = self.entries[self.opening]._replace(rejected=True)

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        """Carry out what only this side of the protocol is ever ordered."""
        raise AssertionError(kind)

    # -- pages

    def reserve(self, own: Incarnation) -> int | None:
        """One page for an incarnation, the lowest that is free; None when there is none."""
        if not self.free:
            return None
        page = min(self.free)
        self.free.discard(page)
        self.held[own.pair] = page
        self.events.extend(Reserved(0, self.node, pool, own, (page,)) for pool in self.pools)
        return page

    def release(self, own: Incarnation) -> None:
        """Give back what an incarnation holds; nothing if it holds nothing."""
        page = self.held.pop(own.pair, None)
        if page is not None:
            self.free.add(page)
            self.events.extend(Released(0, self.node, pool, own, (page,), len(self.free)) for pool in self.pools)

    # -- the scheduler's queue

    def queue(self, gauges: dict[str, str], rid: str, before: str, after: str) -> None:
        """A request moved on in this rank's scheduler."""
        for state, delta in ((before, -1), (after, 1)):
            if state in gauges and before != after:
                self.events.append(Queued(0, self.node, gauges[state], rid, delta))
        if after in gauges:
            self.entries[rid] = self.entries.get(rid, Entry(rid, after))._replace(state=after)
        else:
            self.entries.pop(rid, None)


def ring(pen: Pen, incarnation: Incarnation, name: str) -> None:
    """A timer runs out."""
    pen.timers.discard((incarnation, name))
    pen.deliver("DeadlineReached", incarnation, name)


def crashed(node: str, process: Process, t: float) -> tuple[Process, tuple[Any, ...]]:
    """What is left of a process that died, and what the trace says of it."""
    return Process(process.epoch, False), (NodeStopped(t, node, process.epoch),)


def restarted(node: str, process: Process, fresh: Process, t: float) -> tuple[Process, tuple[Any, ...]]:
    """The next life of a process, with empty tables."""
    return fresh._replace(epoch=process.epoch + 1), (NodeStarted(t, node, process.epoch + 1),)
