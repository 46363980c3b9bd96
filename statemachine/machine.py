"""How the protocol moves: pure steps over the tables of ``spec/kvpoll.toml``.

Theory of operation
-------------------
A *machine* is one role's table compiled for one profile. A *step* takes a state and a fact and returns the next
state and the actions it orders; it reads no clock, draws no number, sends nothing. Drivers (explorer, simulator,
runtime) decide which fact comes next and carry the actions out. All of them call the same step, so what was
verified is what runs.

A prefill or decode rank holds one *room* per incarnation. A room is two machines side by side:

* the **poll** says what the rank reports (Failed 0, Bootstrapping 1, WaitingForInput 2, Transferring 3,
  Success 4), plus three states nobody polls: Absent, Announced (the peer spoke first), Retired (a tombstone);
* the **lease** says who may still touch the room's pages. It can be Draining long after the poll said Failed.

A step offers the fact to the poll table, then to the lease table if that one hears it, then takes *joint* rows,
which are triggered by the pair of states alone, until none applies. Taking Failed for "the memory is free" is the
most expensive mistake of this field (sglang#24527), so only joint rows may say ReleasePages.

Identity comes first. A fact carries the (room, attempt, epoch) it was meant for. If that is not the room's own,
the fact is a newcomer's or a latecomer's, and `RoomMachine.step` settles it before any table is asked.

An illegal fact raises `IllegalFact` and moves nothing. What a driver does about it is a rule (``illegal_fact``).

What this file will not do: no timers (it orders ArmDeadline and later hears DeadlineReached), no retries, no
queues. Known wart: steps are memoised in the machine, so a machine is not safe to share between threads that
step different rooms without the interpreter lock; the results are pure all the same.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from kvpoll.spec.protocol import SAME, Joint, Profile, Role, Row, Table
from kvpoll.spec.source import BadInput, nearest
from kvpoll.spec.vocabulary import Action, Fact, Incarnation
from kvpoll.statemachine.conduct import believes_in_attempts
from kvpoll.statemachine.guards import GUARDS
from kvpoll.statemachine.updates import UPDATES

Orders = tuple[tuple[str, Any], ...]
NO_ACTIONS: Final[tuple[Action, ...]] = ()
MEMO_LIMIT: Final = 200_000
JOINT_LIMIT: Final = 8
_new: Final[Any] = tuple.__new__  # building a NamedTuple this way halves the cost of a step


class IllegalFact(Exception):
    """A machine was offered a fact that its table declares illegal in this state. Nothing moved."""

    def __init__(self, role: str, state: str, fact: str) -> None:
        super().__init__(role, state, fact)
        self.role = role
        self.state = state
        self.fact = fact

    def __str__(self) -> str:
        return f"{self.fact} is illegal for a {self.role} in {self.state}"


class Local(NamedTuple):
    """What a room knows apart from its identity. Drawn from a small set, hence shared between rooms.

    Masks have bit i set for the peer rank with index i. ``expected``: destinations a sender needs, or responses a
    receiver needs. ``arrived``: which have come. ``contacted``: peers that may write (receiver). ``drained``:
    those proven quiet. ``outstanding``: writes posted and not settled (sender). ``last``: the final write is
    posted. ``owned``: a scheduler opened the room. ``asked``: peers whose abort awaits acknowledgement.
    ``cause``: first failure cause.
    """

    poll: str = "Absent"
    lease: str = "Unreserved"
    expected: int = 0
    arrived: int = 0
    contacted: int = 0
    drained: int = 0
    outstanding: int = 0
    last: bool = False
    owned: bool = False
    cleared: bool = False
    asked: int = 0
    cause: str | None = None


class Room(NamedTuple):
    """One room of one rank: whose it is, and what is known. 184 bytes with its incarnation."""

    incarnation: Incarnation
    local: Local


ABSENT: Final = Local()


class Machine:
    """One role's table under one profile. States are NamedTuples whose first field is the state's name."""

    def __init__(self, role: Role, profile: Profile) -> None:
        self.role = role
        self.profile = profile
        self._poll = _compile(role.table, profile)
        self._lease = _compile(role.lease, profile) if role.lease is not None else {}
        self._joint = [joint for joint in role.joint if joint.row.exists_in(profile)]
        self._taken: dict[tuple[Any, str, Any], tuple[Any, Orders]] = {}
        _check_names(role)

    def step(self, state: Any, fact: str, detail: Any = None) -> tuple[Any, Orders]:
        """Next state and orders, each order being (action name, detail). Raises IllegalFact; then nothing moved."""
        try:
            return self._taken[state, fact, detail]
        except KeyError:
            if len(self._taken) >= MEMO_LIMIT:
                self._taken.clear()
            result = self._taken[state, fact, detail] = self._step(state, fact, detail)
            return result

    def _step(self, state: Any, fact: str, detail: Any) -> tuple[Any, Orders]:
        after, orders = self._take(self._poll, state, fact, detail, 0)
        if self._lease:
            if (state[1], fact) in self._lease:
                after, more = self._take(self._lease, after, fact, detail, 1)
                orders += more
            after, orders = self._settle(after, fact, detail, orders)
        return after, orders

    def _take(self, table: _Cells, state: Any, fact: str, detail: Any, place: int) -> tuple[Any, Orders]:
        cell = table.get((state[place], fact))
        if cell is None:
            raise IllegalFact(self.role.name, str(state[0]), fact)
        for row in cell.rows:
            if all(GUARDS[guard](state, detail, self.profile) for guard in row.guards):
                return _apply(row, state, fact, detail, place, row.to)
        if cell.illegal:
            raise IllegalFact(self.role.name, str(state[0]), fact)
        return state, ()

    def _settle(self, state: Any, fact: str, detail: Any, orders: Orders) -> tuple[Any, Orders]:
        for _ in range(JOINT_LIMIT):
            joint = self._triggered(state, detail)
            if joint is None:
                return state, orders
            state, more = _apply(joint.row, state, fact, detail, 1, joint.to_lease)
            if joint.to_poll != SAME:
                state = state._replace(poll=joint.to_poll)
            orders += more
        raise BadInput(f"role {self.role.name!r}: joint rows never come to rest from {state[0]}/{state[1]}")

    def _triggered(self, state: Any, detail: Any) -> Joint | None:
        for joint in self._joint:
            if state[0] in joint.polls and state[1] in joint.leases:
                if joint.to_poll in (SAME, state[0]) and joint.to_lease in (SAME, state[1]):
                    continue
                if all(GUARDS[guard](state, detail, self.profile) for guard in joint.row.guards):
                    return joint
        return None


class RoomMachine(Machine):
    """A machine whose states are rooms: settles identity first, and remembers every step it has taken once."""

    def __init__(self, role: Role, profile: Profile) -> None:
        super().__init__(role, profile)
        self._strict = believes_in_attempts(profile)
        self._interned: dict[Local, Local] = {}
        self._memo: dict[int, dict[tuple[str, Any], tuple[Local, Orders | None]]] = {}
        self._size = 0

    def absent(self, incarnation: Incarnation) -> Room:
        """The room before anything is known of it, in a process of the incarnation's epoch."""
        return Room(incarnation, ABSENT)

    def step_room(self, room: Room, fact: Fact) -> tuple[Room, tuple[Action, ...]]:
        """Next room and ordered actions. The same object comes back when nothing changed.

        Raises IllegalFact when the table forbids the fact in this state; the room is then as it was.
        """
        kind, incarnation, detail = fact
        own, local = room
        if incarnation is not own and incarnation != own:
            if local.poll != "Absent" or (self._strict and incarnation.epoch != own.epoch):
                return self._step_foreign(room, fact)
            own = incarnation
        try:
            after, orders = self._memo[id(local)][kind, detail]
        except KeyError:
            after, orders = self._learn(local, kind, detail)
        if orders is None:
            raise IllegalFact(self.role.name, local.poll, kind)
        if after is not local:
            room = _new(Room, (own, after))
        if not orders:
            return room, NO_ACTIONS
        if len(orders) == 1:
            name, argument = orders[0]
            return room, (_new(Action, (name, own, argument)),)
        return room, tuple([_new(Action, (name, own, argument)) for name, argument in orders])

    def is_ahead(self, room: Room, incarnation: Incarnation) -> bool:
        """Is this a later attempt at a room that is not over? A step can only drop what is said of it; a rank keeps it.

        Decode may be quicker with the next attempt than prefill is with clearing the last one. Were it dropped, both
        sides would wait for their timers.
        """
        own, local = room
        is_later = incarnation.epoch == own.epoch and incarnation.attempt > own.attempt
        return self._strict and is_later and local.poll not in ("Retired", "Announced")

    def _step_foreign(self, room: Room, fact: Fact) -> tuple[Room, tuple[Action, ...]]:
        """The fact was meant for another incarnation of this room number."""
        kind, incarnation, detail = fact
        is_opening = kind == "RequestOpened"
        if not self._strict:
            if is_opening and room.local.owned:
                after, actions = self.step_room(room, Fact("RivalOpened", room.incarnation, detail))
                if any(action.kind == "RejectRequest" for action in actions):
                    return room, _meant_for(incarnation, actions)
                return Room(incarnation, after.local), actions
            return self.step_room(room, Fact(kind, room.incarnation, detail))
        if incarnation.epoch == room.incarnation.epoch and incarnation.attempt > room.incarnation.attempt:
            if room.local.poll in ("Retired", "Announced"):
                after, actions = self.step_room(self.absent(incarnation), fact)
                return (room if after.local.poll == "Absent" else after), actions
            if is_opening:
                _, actions = self.step_room(room, Fact("RivalOpened", room.incarnation, detail))
                return room, _meant_for(incarnation, actions)
            return room, NO_ACTIONS
        answers = self.role.stale.get(kind, ())
        return room, tuple(
            [Action(name, incarnation, _argue(name, argument, kind, detail)) for name, argument in answers]
        )

    def _learn(self, local: Local, kind: str, detail: Any) -> tuple[Local, Orders | None]:
        """Take a step for the first time and remember it: the tables are pure, so once is enough."""
        if self._size >= MEMO_LIMIT:
            self._memo.clear()
            self._interned.clear()
            self._size = 0
        local = self._interned.setdefault(local, local)
        try:
            after, orders = self._step(local, kind, detail)
            result: tuple[Local, Orders | None] = (self._interned.setdefault(after, after), orders)
        except IllegalFact:
            result = (local, None)
        self._memo.setdefault(id(local), {})[kind, detail] = result
        self._size += 1
        return result


def _meant_for(incarnation: Incarnation, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    return tuple([action._replace(incarnation=incarnation) for action in actions])


class _Cell(NamedTuple):
    rows: tuple[Row, ...]
    illegal: bool


_Cells = dict[tuple[str, str], _Cell]


def _compile(table: Table, profile: Profile) -> _Cells:
    """One cell per (state, fact): the rows that the profile's rules choose, and what happens when none is taken."""
    return {
        (state, fact): _Cell(tuple(table.cell(state, fact, profile)), state in table.illegal.get(fact, ()))
        for state in table.states
        for fact in table.facts
    }


def _apply(row: Row, state: Any, fact: str, detail: Any, place: int, to: str) -> tuple[Any, Orders]:
    """Take a row: bookkeeping, first cause, next state. ``place`` is the field that holds the state's name."""
    for name in row.update:
        state = UPDATES[name](state, detail)
    if row.cause is not None and state.cause is None:
        state = state._replace(cause=_cause(row.cause, fact, detail))
    if to not in (SAME, state[place]):
        state = state._replace(**{state._fields[place]: to})
    return state, tuple([(name, _argue(name, argument, fact, detail)) for name, argument in row.actions])


def _cause(written: str, fact: str, detail: Any) -> str:
    if written != "detail":
        return written
    if isinstance(detail, tuple):
        detail = detail[-1]
    return str(detail) if detail is not None else fact


def _argue(name: str, argument: str | None, fact: str, detail: Any) -> Any:
    """What an action is about: its argument in the table, and whom to answer when the fact named a peer."""
    if name == "AnswerDecode":
        return (argument, detail[0])
    if name == "AcknowledgeAbort":
        return detail if fact == "PeerAborted" else None
    if name == "CancelLeg" and isinstance(detail, tuple):
        return "decode" if detail[0] == "prefill" else "prefill"
    return argument


def _check_names(role: Role) -> None:
    rows = [*role.table.rows, *(role.lease.rows if role.lease else ()), *(joint.row for joint in role.joint)]
    for row in rows:
        for kind, names, known in (("guard", row.guards, GUARDS), ("update", row.update, UPDATES)):
            for name in names:
                if name not in known:
                    raise BadInput(f"kvpoll.toml:{row.line}: unknown {kind} {name!r}{nearest(name, known)}")
