"""Our own traces: every recorded step taken again, and compared.

For each node the judge keeps the rooms that the profile's machine would have now. A Stepped event is explained when
the machine, from the room that the judge holds, does exactly what the trace says: the same poll and lease before
and after, the same first cause, the same actions in the same order, for the same incarnation.

Three cases need more than that:

* **A trace of news only.** A monitored runtime does not write down progress inside a state (one more write, a route
  noted). Then the judge knows of a room what such a trace shows (poll, lease, cause, owner, arrivals) and not the
  rest, so it asks whether *any* rest would do (``possible``). This never calls an explicable event inexplicable; it
  may let one pass that a full trace would betray. The caller says so (``news_only``), a full trace is never judged
  that way.
* **A trace that begins under way.** A room of a node that is not said to have started may be older than the trace.
  It is taken up as its first event describes it, with an unknown rest, and counted in ``taken_up``.
* **After a departure.** The judge goes on from the room that the changed rules explain; where none do, from the room
  that the trace claims, with an unknown rest.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.trace import new_event
from kvpoll.spec.vocabulary import Fact, Incarnation
from kvpoll.statemachine.judge.departure import Change, Departures
from kvpoll.statemachine.judge.finding import Finding, Told
from kvpoll.statemachine.judge.rows import UNFIT, Witness, is_fit, ordered, said_of_fact, state_of, ways_on
from kvpoll.statemachine.machine import ABSENT, IllegalFact, Local, Room, RoomMachine

CONTEXT: Final = 4
"""Earlier events of a room that a finding shows."""

REMEMBERED_ROOMS: Final = 4096
"""Rooms of which the judge remembers those events."""

UNKNOWN: Final = 64
"""More responses than any rank waits for: the rest of a room that still needs some."""

KIND: Final = operator.itemgetter(0)

SIDES: Final = {"sender": "prefill", "receiver": "decode"}


class _Replayed(NamedTuple):
    """What explains an event: the room after it, and the state before it that led there."""

    room: Room
    before: Local


class RoomJudge:
    """Judges the steps of all nodes of one trace. Memory is bounded by the rooms that live at once."""

    def __init__(self, protocol: Protocol, profile: Profile, news_only: bool = False) -> None:
        self.protocol = protocol
        self.profile = profile
        self.departures = Departures(protocol, profile)
        self.steps = 0
        self.taken_up = 0
        self._news_only = news_only
        self._machines = {role: RoomMachine(protocol.roles[role], profile) for role in SIDES}
        self._witnesses: dict[str, Witness] = {}
        self._rooms: dict[str, dict[int, Room]] = {}
        self._epochs: dict[str, int] = {}
        self._started: set[str] = set()
        self._loose: set[tuple[str, int]] = set()
        self._fit: set[Any] = set()
        self._refused: dict[str, str] = {}
        self._told: OrderedDict[tuple[str, int], deque[tuple[int, Any]]] = OrderedDict()

    # -- the life of a node

    def node_started(self, event: Any) -> None:
        """A process began a life: it knows no room."""
        self._started.add(event.node)
        self._epochs[event.node] = event.epoch
        self._drop(event.node)

    def node_stopped(self, event: Any) -> None:
        """A process died, and every room with it."""
        self._drop(event.node)

    def _drop(self, node: str) -> None:
        for number in self._rooms.pop(node, ()):
            self._loose.discard((node, number))

    def live_rooms(self) -> int:
        """How many rooms the judge holds."""
        return sum(map(len, self._rooms.values()))

    # -- steps

    def stepped(self, line: int, event: Any) -> Finding | None:
        """Take the step again. None: the profile explains it."""
        self.steps += 1
        node, detail = event.node, event.detail
        rooms = self._rooms.get(node)
        if rooms is None:
            rooms = self._rooms[node] = {}
            self._epochs.setdefault(node, event.incarnation.epoch)
        number = event.fact_incarnation[0]
        key = (node, number)
        room = rooms.get(number)
        machine = self._machines[event.role]
        if room is None:
            room = machine.absent(Incarnation(number, 0, self._epochs[node]))
        after = finding = None
        if key not in self._loose and ((event.fact, detail) in self._fit or self._fits(event.fact, detail)):
            after = _explained(machine, room, event)
        if after is None:
            after, finding = self._look_closer(line, event, room, number)
        if after[1].poll != "Absent":
            rooms[number] = after
        elif number in rooms:
            del rooms[number]
            self._loose.discard(key)
        told = self._told.get(key)
        if told is None:
            told = self._begin_telling(key)
        told.append((line, event))
        return finding

    def _begin_telling(self, key: tuple[str, int]) -> deque[tuple[int, Any]]:
        if len(self._told) >= REMEMBERED_ROOMS:
            self._told.popitem(last=False)
        told = self._told[key] = deque(maxlen=CONTEXT)
        return told

    def _fits(self, fact: str, detail: Any) -> bool:
        """May the detail be offered to a guard? Keeps what it has seen, so that each is looked at once."""
        if not is_fit(fact, detail):
            return False
        if len(self._fit) > REMEMBERED_ROOMS:
            self._fit.clear()
        self._fit.add((fact, detail))
        return True

    def _look_closer(self, line: int, event: Any, room: Room, number: int) -> tuple[Room, Finding | None]:
        """The room after an event that the machine does not explain at first sight, and what there is to say."""
        node, machine = event.node, self._machines[event.role]
        unfit = not self._fits(event.fact, event.detail)
        known = number in self._rooms[node]
        loose = (node, number) in self._loose or self._news_only
        starts = [room]
        if not known and node not in self._started and event.poll_before != "Absent":
            self.taken_up += 1
            self._loose.add((node, number))
            starts = list(_under_way(room, event))
            room, loose = starts[0], True
        if not unfit:
            if loose:
                starts = [each for start in starts for each in possible(event.role, start, event)]
            for start in starts:
                after = _explained(machine, start, event)
                if after is not None:
                    return after, None
            departure = self.departures.search(event.role, lambda other: _replayed(other, starts, event))
            if departure is not None:
                changes, replayed = departure
                return replayed.room, self._departed(line, event, room, changes, replayed)
        self._loose.add((node, number))
        why = "its detail is none that this fact can have" if unfit else self._contradiction(event, room)
        return _claimed(room, event), self._finding(line, event, room, why)

    # -- what there is to say

    def _departed(self, line: int, event: Any, room: Room, changes: tuple[Change, ...], replayed: _Replayed) -> Finding:
        profile = self.profile.with_rules({change.rule: change.needs for change in changes})
        role = self.protocol.roles[event.role]
        rows = Witness(role, profile).rows_of_step(replayed.before, event.fact, event.detail)
        if self.profile["identity"] != profile["identity"] and event.fact_incarnation != room.incarnation:
            why = f"it was meant for {_whose(event.fact_incarnation)}, the room is {_whose(room.incarnation)}"
        else:
            why = "the profile makes something else of this fact in this state"
        invariants = self.departures.invariants(changes, rows)
        return self._finding(line, event, room, why, changes, invariants)

    def _contradiction(self, event: Any, room: Room) -> str:
        """Why no rule helps."""
        local = room.local
        if (event.poll_before, event.lease_before) != (local.poll, local.lease):
            return (
                f"the trace says that the room was {event.poll_before}/{event.lease_before} before, "
                f"but what came earlier leaves it {local.poll}/{local.lease}"
            )
        return "no choice of rules leads from this state by this fact to what the trace says"

    def _finding(
        self,
        line: int,
        event: Any,
        room: Room,
        why: str,
        changes: tuple[Change, ...] = (),
        invariants: tuple[str, ...] = (),
    ) -> Finding:
        role, local = self.protocol.roles[event.role], room.local
        own = said_of_fact(role, self.profile, local, event.fact, event.detail)
        return Finding(
            line=line,
            t=event.t,
            node=event.node,
            event=said(event),
            room=_whose(event.incarnation),
            before=state_of(local),
            why=why,
            allowed=(own, *ways_on(role, self.profile, local)),
            changes=changes,
            invariants=invariants,
            context=self.context(event.node, event.fact_incarnation[0]),
        )

    def context(self, node: str, number: int) -> tuple[Told, ...]:
        """The latest events of a room on a node, oldest first."""
        return tuple(Told(line, said(event)) for line, event in self._told.get((node, number), ()))

    def told(self, event: Any) -> str:
        """Any event of a trace in one line."""
        kind = type(event).__name__
        return said(event) if kind == "Stepped" else f"{event.node} {kind}"

    # -- facts that were refused, and loops that ended

    def illegal_fact_raised(self, line: int, event: Any) -> Finding | None:
        """A machine refused a fact: does the profile's table forbid it in that state too?"""
        self._refused[event.node] = f"{event.fact} is illegal for a {event.role} in {event.state}"
        role = self.protocol.roles[event.role]
        room = self._rooms.get(event.node, {}).get(event.incarnation.room)
        own = room.incarnation if room is not None else event.incarnation
        local = room.local if room is not None else ABSENT
        tables = [role.table] if role.lease is None else [role.table, role.lease]
        places = (local.poll, local.lease)
        if event.state == local.poll or (event.state == "Absent" and own != event.incarnation):
            if event.state != local.poll:
                places = (ABSENT.poll, ABSENT.lease)
            if any(state in table.illegal.get(event.fact, ()) for table, state in zip(tables, places, strict=False)):
                return None
            why = "the profile does not forbid this fact in this state"
        else:
            why = f"the trace says that the room was {event.state}, but what came earlier leaves it {local.poll}"
        return Finding(
            line, event.t, event.node, self._refused[event.node], _whose(event.incarnation), state_of(local), why,
            ways_on(role, self.profile, local), (), ("S10",), self.context(event.node, event.incarnation.room),
        )  # fmt: skip

    def loop_stopped(self, line: int, event: Any) -> Finding | None:
        """A loop ended: under this profile, may an illegal fact do that?"""
        refused = self._refused.pop(event.node, None)
        if refused != event.cause or self.profile[ILLEGAL_FACT] == STOPS:
            return None
        change = Change(ILLEGAL_FACT, self.profile[ILLEGAL_FACT], STOPS)
        meaning = self.protocol.rules[ILLEGAL_FACT].values[str(change.has)]
        text = f"the {event.loop} loop stopped: {event.cause}"
        return Finding(
            line, event.t, event.node, text, None, None, "an illegal fact ends no loop under this profile",
            (meaning,), (change,), ("S10",),
        )  # fmt: skip


ILLEGAL_FACT: Final = "illegal_fact"
STOPS: Final = "stops_scheduler"


def _explained(machine: RoomMachine, room: Room, event: Any) -> Room | None:
    """The room after the step, if the machine does exactly what the event says."""
    own, before = room
    if before.poll != event.poll_before or before.lease != event.lease_before:
        return None
    meant = event.fact_incarnation
    try:
        after, actions = machine.step_room(room, new_event(Fact, (event.fact, meant, event.detail)))
    except (IllegalFact, *UNFIT):
        return None
    now = after[1]
    if now.poll != event.poll_after or now.lease != event.lease_after or now.cause != event.cause:
        return None
    if event.actions != (tuple(map(KIND, actions)) if actions else ()):
        return None
    if after[0] == meant:
        own = after[0]
    return after if own == event.incarnation else None


def _replayed(machine: RoomMachine, starts: list[Room], event: Any) -> _Replayed | None:
    for start in starts:
        after = _explained(machine, start, event)
        if after is not None:
            return _Replayed(after, start.local)
    return None


def _claimed(room: Room, event: Any, before: bool = False) -> Room:
    """The room as the trace claims it to be before, or after, an event."""
    poll, lease = (event.poll_before, event.lease_before) if before else (event.poll_after, event.lease_after)
    if poll == "Absent":
        return Room(event.incarnation, ABSENT)
    cause = event.cause if poll in ("Failed", "Retired") else None
    return Room(event.incarnation, room.local._replace(poll=poll, lease=lease, cause=cause))


def _under_way(room: Room, event: Any) -> Iterator[Room]:
    """A room that is older than the trace, before its first event there; it may have been an earlier attempt's."""
    claimed = _claimed(room, event, before=True)
    yield claimed
    own = event.incarnation
    if own == event.fact_incarnation and own.attempt > 0 and event.poll_before in ("Retired", "Announced"):
        yield claimed._replace(incarnation=own._replace(attempt=own.attempt - 1))


def possible(role: str, room: Room, event: Any) -> Iterator[Room]:
    """The room with every rest that matters to a guard: what a trace of news does not show, all combinations of it.

    Shown are poll, lease, cause, owner and arrivals. Of masks only "none" and "all", of counts only "none", "one"
    and "more" are told apart by the guards; that keeps the combinations few.
    """
    local = room.local
    if event.cause is not None and event.poll_before in ("Failed", "Retired"):
        local = local._replace(cause=event.cause)
    everyone = (1 << UNKNOWN) - 1
    yield room
    for cleared in (False, True):
        if role == "sender":
            for outstanding in (0, 1, 2):
                for last in (True, False):
                    for asked in {local.asked, local.asked or 1}:
                        rest = local._replace(outstanding=outstanding, last=last, asked=asked, cleared=cleared)
                        yield Room(room.incarnation, rest)
            continue
        for contacted in (everyone, 0):
            for expected in (1, UNKNOWN):
                for drained in (0, everyone, everyone >> 1, everyone - 1):
                    rest = local._replace(contacted=contacted, expected=expected, drained=drained, cleared=cleared)
                    yield Room(room.incarnation, rest)


def said(event: Any) -> str:
    """A Stepped event in one line."""
    detail = "" if event.detail is None else f" {event.detail!r}"
    whose = "" if event.fact_incarnation == event.incarnation else f" meant for {_whose(event.fact_incarnation)}"
    before = f"{event.poll_before}/{event.lease_before}"
    after = f"{event.poll_after}/{event.lease_after}"
    moved = f"stays {before}" if before == after else f"{before} -> {after}"
    return f"{event.node} {event.fact}{detail}{whose}: {moved}{ordered(event.actions)}"


def _whose(incarnation: Incarnation) -> str:
    return f"room {incarnation[0]} (attempt {incarnation[1]}, epoch {incarnation[2]})"
