"""The TLA+ step and the Python step are the same function: thousands of samples, compared by TLC itself.

Samples are (state, fact, detail) that random steps through Python's machines come across, together with what Python
makes of them. They become one TLA+ module whose assumption is that Machine.tla makes the same of each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvpoll.sim.explorer.tla_values import canonical, of_action, of_detail, of_orders, of_room, of_state, to_tla
from kvpoll.sim.explorer.tlc import Answer, Checker, Job, check, find_checker
from kvpoll.spec.protocol import Profile, Row, load
from kvpoll.spec.source import BadInput
from kvpoll.spec.tables_tla import rules_record
from kvpoll.spec.vocabulary import Fact, Incarnation
from kvpoll.statemachine import STARTS, IllegalFact, Local, Machines, Room, RoomMachine
from kvpoll.statemachine import machine as machine_module

PROTOCOL = load()
SWITCHED = {"identity": "incarnation", "duplicate_room": "shared", "release_requires_quiescence": "never"}
PROFILES = [
    PROTOCOL.profile("reference"),
    PROTOCOL.profile("sglang-0.5.23"),
    PROTOCOL.profile("before-sglang-24772"),
    PROTOCOL.profile("reference").with_rules({"identity": "room", "clear_leaves": "nothing"}),
    PROTOCOL.profile("before-sglang-25125").with_rules(SWITCHED),
]
ROOM_SAMPLES = 1800
SMALL_SAMPLES = 120

FIRST = Incarnation(1001, 0, 0)
OTHERS = [Incarnation(1001, 1, 0), Incarnation(1001, 2, 0), Incarnation(1001, 0, 1), Incarnation(1001, 1, 1)]

DETAILS: dict[str, dict[str, list[Any]]] = {
    "sender": {
        "RequestOpened": [0, 1, 2],
        "RivalOpened": [1],
        "DestinationRegistered": [(0, 1), (0, 2), (1, 2)],
        "WritePosted": [True, False],
        "AbortRequested": ["client_left", None],
        "PeerAborted": [0, 1],
        "DpConflictFound": ["dp_conflict"],
        "DeadlineReached": ["bootstrap", "transfer", "announced", "tombstone"],
    },
    "receiver": {
        "RoutesResolved": [(0b01, 1), (0b11, 2), (0b10, 1)],
        "RouteUnavailable": ["no_topology"],
        "StatusReceived": [(0, "Success"), (1, "Success"), (0, "Failed")],
        "AbortRequested": ["client_left", None],
        "AbortAcknowledged": [0, 1],
        "PeerDied": [0b01, 0b11],
        "DeadlineReached": ["drain", "bootstrap", "admission", "waiting", "tombstone"],
    },
    "registry": {
        "RankRegistered": [("tp0", 0, 2), ("tp1", 0, 2), ("tp1", 1, 2), ("tp0", 2, 3)],
        "RouteRequested": [None, "tp0", "tp2"],
        "RankUnregistered": [("tp0", 0), ("tp1", 1)],
    },
    "dp_entry": {"DpRankRegistered": [0, 1]},
    "resolution": {
        "TopologyLearned": [(1, True, 0), (2, True, 1), (2, False, 1)],
        "DpRankAnswered": [None, 0, 1],
    },
    "peer": {"ProbeAnswered": [0, 1, 2]},
    "collective": {"RankEntered": [(0, 2, "poll"), (1, 2, "poll"), (1, 2, "queue"), (0, 1, "poll")]},
    "router": {"LegFailed": [("prefill", "aborted"), ("decode", "timeout")]},
}

COURSE: dict[str, list[tuple[str, Any]]] = {
    "sender": [
        ("RequestOpened", 1),
        ("PagesReserved", None),
        ("DestinationRegistered", (0, 1)),
        ("WritePosted", True),
        ("WriteCompleted", None),
        ("Cleared", None),
        ("LinkRestored", None),
    ],
    "receiver": [
        ("RequestOpened", None),
        ("RoutesResolved", (0b11, 2)),
        ("SetupFinished", None),
        ("PagesReserved", None),
        ("MetadataSent", None),
        ("StatusReceived", (0, "Success")),
        ("StatusReceived", (1, "Success")),
        ("Cleared", None),
    ],
    "registration": [
        ("Started", None),
        ("ServerRestarted", None),
        *[("RegistrationFailed", None), ("RetryDue", None)] * 7,
        ("ServerRestarted", None),
        *[("RegistrationAccepted", None)] * 2,
        ("LeaveRequested", None),
        *[("RegistrationAccepted", None), ("UnregistrationAnswered", None)],
    ],
}
"""The undisturbed course comes first: few random steps would find the way to a write and past it."""

Sample = tuple[Any, ...]
"""(role, state, fact, incarnation or (), detail, state after it, what was ordered, illegal?), in canonical form."""


def facts_of(role: str) -> list[tuple[str, Any]]:
    details = DETAILS.get(role, {})
    return [(fact, each) for fact in PROTOCOL.roles[role].table.facts for each in details.get(fact, [None])]


class Known:
    """What a walk has come across, by kind of state, so that rare kinds are gone on from as often as common ones."""

    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        self._found: dict[Any, list[Any]] = {}

    def add(self, kind: Any, state: Any) -> None:
        self._found.setdefault(kind, []).append(state)

    def any(self) -> Any:
        return self._random.choice(self._found[self._random.choice(list(self._found))])


def room_samples(machine: RoomMachine, random_: random.Random) -> Iterator[Sample]:
    """Steps of rooms; now and then a fact is meant for another incarnation."""
    role, known = machine.role.name, Known(random_)
    course, after = COURSE[role], machine.absent(FIRST)
    known.add(kind_of(after.local), after)
    facts = facts_of(role)
    for place in range(ROOM_SAMPLES):
        is_begun = place < len(course)
        room = after if is_begun else known.any()
        kind, detail = course[place] if is_begun else random_.choice(facts)
        incarnation = FIRST if is_begun else random_.choice([room.incarnation] * 8 + [FIRST, *OTHERS])
        after, ordered, illegal = taken(machine, room, Fact(kind, incarnation, detail))
        told = of_detail(kind, detail)
        yield role, of_room(room), kind, canonical(incarnation), told, of_room(after), ordered, illegal
        known.add(kind_of(after.local), after)


def kind_of(local: Local) -> Any:
    """States of one kind take the same rows, or nearly so."""
    bits = (local.contacted != 0, local.asked != 0, local.cause is None, min(local.outstanding, 2))
    return local.poll, local.lease, local.cleared, local.owned, *bits


def taken(machine: RoomMachine, room: Room, fact: Fact) -> tuple[Room, tuple[Any, ...], bool]:
    try:
        after, actions = machine.step_room(room, fact)
    except IllegalFact:
        return room, (), True
    return after, tuple(of_action(action) for action in actions), False


def small_samples(machines: Machines, role: str, random_: random.Random) -> Iterator[Sample]:
    machine, known = machines.small(role), Known(random_)
    known.add(STARTS[role][:2], STARTS[role])
    course, after = COURSE.get(role, []), STARTS[role]
    for place in range(SMALL_SAMPLES):
        state = after if place < len(course) else known.any()
        kind, detail = course[place] if place < len(course) else random_.choice(facts_of(role))
        try:
            after, orders = machine.step(state, kind, detail)
            illegal = False
        except IllegalFact:
            after, orders, illegal = state, (), True
        told = of_detail(kind, detail)
        yield role, of_state(state), kind, (), told, of_state(after), of_orders(orders), illegal
        known.add(after[:2], after)


def samples(profile: Profile) -> list[Sample]:
    """All distinct samples of one profile, the same ones each time."""
    machines = Machines(PROTOCOL, profile)
    random_ = random.Random(profile.name)
    found = [*room_samples(machines.sender, random_), *room_samples(machines.receiver, random_)]
    for role in STARTS:
        found += small_samples(machines, role, random_)
    return list(dict.fromkeys(found))


# -- the module that TLC judges

HEAD = """\
---- MODULE Samples ----
EXTENDS Tables
"""

PROFILE = """\
P{n} == INSTANCE Machine WITH Rules <- {rules}
States{n} == <<
{states}
>>
Samples{n} == <<
{samples}
>>
Made{n}(s) ==
  IF s[4] = <<>> THEN LET r == P{n}!Step(s[1], States{n}[s[2]], s[3], s[5]) IN <<r.state, r.orders, r.illegal>>
  ELSE LET r == P{n}!StepRoom(s[1], States{n}[s[2]], s[3], s[4], s[5]) IN <<r.room, r.actions, r.illegal>>
Differs{n}(s) == LET made == Made{n}(s)
  IN made # <<States{n}[s[6]], s[7], s[8]>> /\\ PrintT(<<"differs", s, States{n}[s[2]], made>>)
ASSUME \\A i \\in DOMAIN Samples{n} : ~Differs{n}(Samples{n}[i])
ASSUME PrintT(<<"compared", Len(Samples{n})>>)
"""

Found = list[tuple[Profile, list[Sample]]]


def module_of(found: Found) -> str:
    """States are written once and referred to by their place, because TLC's parser is slower than TLC."""
    parts = [HEAD]
    for n, (profile, each) in enumerate(found):
        places: dict[Any, int] = {}
        lines = []
        for sample in each:
            before, after = (places.setdefault(sample[at], len(places) + 1) for at in (1, 5))
            lines.append(to_tla((sample[0], before, *sample[2:5], after, *sample[6:])))
        states = ",\n".join(map(to_tla, places))
        parts.append(
            PROFILE.format(n=n, rules=rules_record(PROTOCOL, profile), states=states, samples=",\n".join(lines))
        )
    return "\n".join([*parts, "====\n"])


def judged(found: Found, checker: Checker) -> Answer:
    job = Job("Samples", specification=None, modules={"Samples": module_of(found)})
    return check(job, checker, limit_s=300)


@pytest.fixture(scope="module")
def checker() -> Checker:
    try:
        return find_checker()
    except BadInput as missing:
        pytest.skip(str(missing))


def test_tla_and_python_take_the_same_step(checker: Checker) -> None:
    found = [(profile, samples(profile)) for profile in PROFILES]
    assert sum(len(each) for _, each in found) > 8_000
    answer = judged(found, checker)
    assert answer.verdict == "ok", "\n".join([answer.message, *answer.said[:20]])
    assert answer.said == tuple(f'<<"compared", {len(each)}>>' for _, each in found)


def all_rows() -> Iterator[Row]:
    for role in PROTOCOL.roles.values():
        yield from role.table.rows
        yield from role.lease.rows if role.lease is not None else ()
        yield from (joint.row for joint in role.joint)


def test_the_samples_take_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise equality would say little of the rows that were never taken."""
    taken_rows: set[int] = set()
    apply = machine_module._apply

    def noted(row: Row, *rest: Any) -> Any:
        taken_rows.add(row.line)
        return apply(row, *rest)

    monkeypatch.setattr(machine_module, "_apply", noted)
    seen = [sample for profile in PROFILES for sample in samples(profile)]
    assert [f"{row.line}: {row.fact}" for row in all_rows() if row.line not in taken_rows] == []
    assert {sample[0] for sample in seen} == set(PROTOCOL.roles) and any(sample[7] for sample in seen)


def test_a_wrong_sample_is_found(checker: Checker) -> None:
    reference = PROFILES[0]
    machines = Machines(PROTOCOL, reference)
    [first, *_] = room_samples(machines.sender, random.Random(1))
    right = (*first[:7], first[7])
    wrong = (*first[:7], not first[7])
    assert judged([(reference, [right])], checker).verdict == "ok"
    answer = judged([(reference, [wrong])], checker)
    assert answer.verdict == "assumption" and "is false" in answer.message
    assert '"differs"' in "".join(answer.said)
