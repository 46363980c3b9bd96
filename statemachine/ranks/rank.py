"""What prefill and decode ranks share: a table of rooms, timers, and the orders of the machine carried out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Final

from kvpoll.spec.trace import IllegalFactRaised, LoopStopped, Queued, Stepped, new_event
from kvpoll.spec.vocabulary import Action, Fact, Incarnation
from kvpoll.statemachine.agreement import Report, report_on
from kvpoll.statemachine.conduct import believes_in_attempts, illegal_fact_stops
from kvpoll.statemachine.machine import IllegalFact, Room, RoomMachine
from kvpoll.statemachine.ranks.engine import Home
from kvpoll.statemachine.ranks.host import Host


class Timers:
    """The deadlines of one rank: for each name, when the timer of each room is due, in that order. Every timer of a
    name runs equally long, so the order is that in which they were armed.
    """

    def __init__(self, host: Host, durations_s: dict[str, float], fire: Callable[[Incarnation, str], None]) -> None:
        self.host = host
        self.durations_s = durations_s
        self._fire = fire
        self._due: dict[str, OrderedDict[Incarnation, float]] = {name: OrderedDict() for name in durations_s}
        self._rings: dict[str, float] = {}
        self.stopped = False

    def arm(self, incarnation: Incarnation, name: str) -> None:
        """Start, or start again, the named timer of a room."""
        due, duration = self._due[name], self.durations_s[name]
        if incarnation in due:
            del due[incarnation]
        at = self.host.now + duration
        is_late = bool(due) and at < due[next(reversed(due))]
        due[incarnation] = at
        if is_late:  # those armed before the wall clock was set back run longer
            due = self._due[name] = OrderedDict(sorted(due.items(), key=lambda each: each[1]))
        if name not in self._rings or at < self._rings[name]:
            self._ring_after(duration, name)

    def cancel(self, incarnation: Incarnation, name: str) -> None:
        """Stop the named timer of a room, if it runs."""
        self._due[name].pop(incarnation, None)

    def armed(self) -> int:
        """How many timers run."""
        return sum(map(len, self._due.values()))

    def overdue(self) -> int:
        """How many timers should have rung and have not (L5)."""
        now = self.host.now
        return sum(at < now - 1e-6 for due in self._due.values() for at in due.values())

    def jump(self, offset_s: float) -> None:
        """The wall clock moved: timers that run, and compare it, ring early (or late); later ones do not care."""
        for name, due in self._due.items():
            self._due[name] = OrderedDict((incarnation, at - offset_s) for incarnation, at in due.items())
            self._ring(name)

    def _ring_after(self, delay_s: float, name: str) -> None:
        self._rings[name] = self.host.now + delay_s
        self.host.after(delay_s, self._ring, name)

    def _ring(self, name: str) -> None:
        if self.stopped:
            return
        now = self.host.now
        self._rings[name] = now  # what a timer that rings arms anew is seldom the next one to ring
        try:
            while (due := self._due[name]) and due[incarnation := next(iter(due))] <= now + 1e-9:
                del due[incarnation]
                self._fire(incarnation, name)
        finally:
            self._rings.pop(name, None)
            if due := self._due[name]:
                self._ring_after(max(0.0, due[next(iter(due))] - now), name)


NOTHING_TO_DO = frozenset({"Absent", "Announced", "Bootstrapping", "Transferring", "Retired"})
"""Polls on which no scheduler acts; a turn that sees nothing but these changes nothing, so none is taken."""


KEYS: Final[dict[bool, Callable[[Incarnation], tuple[int, ...]]]] = {
    True: itemgetter(slice(0, 2)),
    False: itemgetter(slice(0, 1)),
}
"""What of an incarnation identifies a room, by whether the profile believes in attempts."""


class Rank:
    """What prefill and decode ranks share: the room table, timers, illegal facts, queue gauges.

    key(incarnation): what the driver's own tables of a room are keyed by.
    """

    role = ""

    def __init__(self, engine: Home, node: str, machine: RoomMachine, timers_s: dict[str, float]) -> None:
        self.engine = engine
        self.host = engine.host
        self.node = node
        self.epoch = engine.epoch
        self.key = KEYS[believes_in_attempts(self.host.profile)]
        self.machine = machine
        self.rooms: dict[int, Room] = {}
        self.entries: dict[str, Any] = {}
        self.timers = Timers(self.host, timers_s, self._deadline)
        self.gauges: dict[str, int] = {}
        self.stopped = False
        self.over = False
        self.chance = self.host.chance(f"{node}/{engine.epoch}")
        self.pace = 1.0 + self.chance.uniform(0.0, engine.shape.skew)
        self.mail: dict[str, Callable[..., None]] = {}
        self._actions: dict[str, Callable[[Action, Any], None]] = {
            "ArmDeadline": lambda action, origin: self.timers.arm(action.incarnation, action.detail),
            "CancelDeadline": lambda action, origin: self.timers.cancel(action.incarnation, action.detail),
        }

    # -- facts in, actions out

    def receive(self, message: str, incarnation: Incarnation, *arguments: Any) -> None:
        """A control message arrived from another rank; what comes after the first word is for people to read."""
        self.mail[message.partition(" ")[0]](incarnation, *arguments)

    def deliver(self, kind: str, incarnation: Incarnation, detail: Any = None, origin: Any = None) -> bool:
        """Offer a fact to its room and carry out what the machine orders. False when the fact was illegal."""
        number = incarnation[0]
        room = self.rooms.get(number)
        if room is None:
            room = self.machine.absent(Incarnation(number, 0, self.engine.epoch))
        try:
            after, actions = self.machine.step_room(room, new_event(Fact, (kind, incarnation, detail)))
        except IllegalFact as error:
            self._illegal(error, incarnation)
            return False
        if after is not room:
            if after.incarnation.attempt != room.incarnation.attempt and room.local.poll != "Absent":
                self.forget(room.incarnation)
            if after.local.poll == "Absent":
                self.rooms.pop(number, None)
                self.forget(after.incarnation)
            else:
                self.rooms[number] = after
        if after is not room or actions:
            if self.host.wants(Stepped) and (actions or self._is_news(room, after)):
                self._tell(room, after, kind, incarnation, detail, actions)
            for action in actions:
                self._actions[action.kind](action, origin)
            if after.local.poll != room.local.poll:
                self.poll_changed(after)
        return True

    def _is_news(self, room: Room, after: Room) -> bool:
        """Progress inside a state (one write more, routes noted) concerns no invariant; only a recorder hears it.

        A new owner (R2) and a new identity (S2, S12) do concern one, although neither poll nor lease moves.
        """
        before, now = room.local, after.local
        changed = before.poll is not now.poll or before.lease is not now.lease or before.arrived != now.arrived
        taken = before.owned is not now.owned or room.incarnation != after.incarnation
        return changed or taken or self.host.stream.recording

    def _tell(self, room: Room, after: Room, kind: str, meant_for: Incarnation, detail: Any, actions: Any) -> None:
        before, now = room.local, after.local
        own = after.incarnation
        if own is not meant_for and own != meant_for:
            own = room.incarnation
        host = self.host
        host.emit(new_event(Stepped, (
            host.now, self.node, self.role, own, kind, meant_for, detail, before.poll, now.poll,
            before.lease, now.lease, now.cause, tuple([action[0] for action in actions]),
        )))  # fmt: skip

    def _illegal(self, error: IllegalFact, incarnation: Incarnation) -> None:
        host = self.host
        host.emit(IllegalFactRaised(host.now, self.node, self.role, incarnation, error.fact, error.state))
        if illegal_fact_stops(host.profile):
            self.stop_loop(str(error))
        else:
            self.deliver("AbortRequested", incarnation, "illegal_fact")

    def stop_loop(self, cause: str) -> None:
        """The scheduler loop dies while its process lives."""
        if not self.stopped:
            self.stopped = True
            self.host.emit(LoopStopped(self.host.now, self.node, "scheduler", cause))
            self.engine.report_health()

    def _deadline(self, incarnation: Incarnation, name: str) -> None:
        self.host.mark(self.node, f"deadline_{name}")
        self.deliver("DeadlineReached", incarnation, name)

    def poll_changed(self, room: Room) -> None:
        """A poll moved: the scheduler has something to see."""
        raise AssertionError("a rank of no side")

    def forget(self, incarnation: Incarnation) -> None:
        """The room is gone; so is what the driver kept for it."""

    # -- what the scheduler reads

    def is_over(self) -> bool:
        """Has this life of the process ended, or its loop?"""
        return self.over or self.stopped

    def report(self, incarnation: Incarnation) -> Report:
        """Poll and cause of a room, as the scheduler sees them."""
        return report_on(self.rooms.get(incarnation[0]), incarnation)

    def queue(self, name: str, rid: str, delta: int) -> None:
        """A request entered or left a queue; the gauge follows."""
        self.gauges[name] = self.gauges.get(name, 0) + delta
        host = self.host
        if host.wants(Queued):
            host.emit(new_event(Queued, (host.now, self.node, name, rid, delta)))

    def requeue(self, gauges: dict[str, str], rid: str, before: str, after: str) -> None:
        """A request moved from one scheduler state to another; ``gauges`` names the queue of each that is one."""
        if before in gauges:
            self.queue(gauges[before], rid, -1)
        if after in gauges:
            self.queue(gauges[after], rid, 1)
