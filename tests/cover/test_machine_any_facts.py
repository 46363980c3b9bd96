"""What no sequence of facts may do to a room; and that the search finds who does it all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from kvpoll.spec.protocol import SPEC_PATH, load, parse
from kvpoll.spec.source import Source
from kvpoll.spec.vocabulary import POLL_NUMBERS, TERMINAL_POLLS, Fact, Incarnation
from kvpoll.statemachine import IllegalFact, Local, Machines, RoomMachine

PROTOCOL = load()
REFERENCE = Machines(PROTOCOL, PROTOCOL.profile("reference"))
SGLANG = Machines(PROTOCOL, PROTOCOL.profile("sglang-0.5.23"))
FIRST = Incarnation(room=7, attempt=0, epoch=0)
TEXT = SPEC_PATH.read_text(encoding="utf-8")


class Heard(NamedTuple):
    """One step of a run: the fact, the room's state before and after, and what was ordered."""

    fact: str
    before: Local
    after: Local
    orders: tuple[str, ...]


ADVANCE = ("advance", None)
"""Stands for the next fact of the undisturbed course, so that runs get anywhere at all."""

COURSE: dict[str, list[tuple[str, Any]]] = {
    "sender": [
        ("RequestOpened", 1),
        ("PagesReserved", None),
        ("DestinationRegistered", (0, 1)),
        ("WritePosted", True),
        ("WriteCompleted", None),
        ("Cleared", None),
    ],
    "receiver": [
        ("RequestOpened", None),
        ("RoutesResolved", (0b01, 1)),
        ("SetupFinished", None),
        ("PagesReserved", None),
        ("MetadataSent", None),
        ("StatusReceived", (0, "Success")),
        ("Cleared", None),
    ],
}

DETAILS: dict[str, dict[str, list[Any]]] = {
    "sender": {
        "RequestOpened": [1, 2, 0],
        "DestinationRegistered": [(0, 1), (0, 2), (1, 2)],
        "WritePosted": [True, False],
        "AbortRequested": ["client_left"],
        "PeerAborted": [0, 1],
        "DpConflictFound": ["dp_conflict"],
        "DeadlineReached": ["bootstrap", "transfer", "announced", "tombstone"],
    },
    "receiver": {
        "RoutesResolved": [(0b01, 1), (0b11, 2)],
        "RouteUnavailable": ["no_topology"],
        "StatusReceived": [(0, "Success"), (1, "Success"), (0, "Failed")],
        "AbortRequested": ["client_left"],
        "AbortAcknowledged": [0, 1],
        "PeerDied": [0, 1],
        "DeadlineReached": ["drain", "bootstrap", "admission", "waiting", "tombstone"],
    },
}


def courses(role: str) -> st.SearchStrategy[list[tuple[str, Any]]]:
    """The undisturbed course up to some point, then any facts, with the rest of the course among them."""
    details = DETAILS[role]
    facts = [(fact, detail) for fact in PROTOCOL.roles[role].table.facts for detail in details.get(fact, [None])]
    begun = st.integers(0, len(COURSE[role])).map(lambda length: [ADVANCE] * length)
    disturbed = st.lists(st.sampled_from([ADVANCE, *facts]), max_size=12)
    return st.tuples(begun, disturbed).map(lambda parts: [*parts[0], *parts[1]])


def run(machine: RoomMachine, course: list[tuple[str, Any]]) -> Iterator[Heard]:
    """Feed one incarnation until it is forgotten. Whatever is not IllegalFact escapes, and fails the test."""
    room, undisturbed = machine.absent(FIRST), iter(COURSE[machine.role.name])
    for chosen in course:
        fact, detail = next(undisturbed, ADVANCE) if chosen == ADVANCE else chosen
        if fact == "advance":
            return
        before = room
        try:
            room, actions = machine.step_room(before, Fact(fact, FIRST, detail))
        except IllegalFact:
            continue
        yield Heard(fact, before.local, room.local, tuple(action.kind for action in actions))
        if room.local.poll == "Absent" and before.local.poll != "Absent":
            return


Property = Callable[[list[Heard]], bool]


def sticky(heard: list[Heard]) -> bool:
    """S3: a terminal poll moves to no other numbered poll."""
    moves = [(step.before.poll, step.after.poll) for step in heard]
    return not any(old in TERMINAL_POLLS and new in POLL_NUMBERS and new != old for old, new in moves)


def released_once(heard: list[Heard]) -> bool:
    """S8: what was reserved is released at most once, and nothing else is."""
    released = sum(step.orders.count("ReleasePages") for step in heard)
    reserved = sum(step.fact == "PagesReserved" and step.before.lease != step.after.lease for step in heard)
    return released <= min(1, reserved)


def quiet_source(heard: list[Heard]) -> bool:
    """S1 on prefill: no source page is released while a write may read it."""
    return not any("ReleasePages" in step.orders and step.after.outstanding for step in heard)


def quiet_destination(heard: list[Heard]) -> bool:
    """S1 on decode: no page that a prefill rank knows of is released before that rank has drained."""
    known = {"Exposed", "Draining", "Quarantined"}
    return not any(
        "ReleasePages" in step.orders
        and step.before.lease in known
        and step.after.poll != "Absent"
        and step.after.contacted & ~step.after.drained
        for step in heard
    )


PROPERTIES: list[tuple[str, Property]] = [
    ("sender", sticky),
    ("sender", released_once),
    ("sender", quiet_source),
    ("receiver", sticky),
    ("receiver", released_once),
    ("receiver", quiet_destination),
]


@pytest.mark.parametrize(("role", "holds"), PROPERTIES, ids=[f"{role}-{held.__name__}" for role, held in PROPERTIES])
def test_under_the_reference_no_sequence_of_facts_breaks_it(role: str, holds: Property) -> None:
    machine: RoomMachine = getattr(REFERENCE, role)

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(courses(role))
    def check(course: list[tuple[str, Any]]) -> None:
        assert holds(list(run(machine, course)))

    check()


def counterexample(machine: RoomMachine, holds: Property, examples: int = 5_000) -> list[tuple[str, str]]:
    """The shortest sequence that breaks the property, as (fact, poll after it). Raises NoSuchExample."""
    found = find(
        courses(machine.role.name),
        lambda course: not holds(list(run(machine, course))),
        settings=settings(max_examples=examples, database=None, derandomize=True),
    )
    return [(step.fact, step.after.poll) for step in run(machine, found)]


def test_success_is_not_final_in_sglang_and_the_search_says_so() -> None:
    assert counterexample(SGLANG.sender, sticky)[-2:] == [
        ("WriteCompleted", "Success"),
        ("AbortRequested", "Failed"),
    ]
    assert counterexample(SGLANG.receiver, sticky)[-2:] == [
        ("StatusReceived", "Success"),
        ("AbortRequested", "Failed"),
    ]


def test_failed_is_not_final_before_24772_and_the_search_says_so() -> None:
    profile = PROTOCOL.profile("before-sglang-24772").with_rules({"success_is_final": "yes"})
    found = counterexample(Machines(PROTOCOL, profile).receiver, sticky)
    assert found[-1] == ("SetupFinished", "WaitingForInput") and len(found) == 3


def test_source_pages_are_not_quiet_in_sglang_and_the_search_says_so() -> None:
    found = counterexample(SGLANG.sender, quiet_source)
    assert [fact for fact, _ in found[:-1]] == [fact for fact, _ in COURSE["sender"][:4]]
    assert found[-1][1] == "Failed"


def test_destination_pages_are_not_quiet_in_sglang_and_the_search_says_so() -> None:
    found = counterexample(SGLANG.receiver, quiet_destination)
    assert found[-1] == ("DeadlineReached", "Failed") and len(found) == 7


def test_destination_pages_are_not_quiet_without_the_rule_and_the_search_says_so() -> None:
    profile = PROTOCOL.profile("reference").with_rules({"release_requires_quiescence": "never"})
    found = counterexample(Machines(PROTOCOL, profile).receiver, quiet_destination)
    assert found[-1][1] == "Failed" and len(found) == 6


def test_a_mutant_that_releases_twice_is_found() -> None:
    """No profile does this; the judge must all the same be able to say no."""
    assert TEXT.count('"QuarantinePages"') == 1
    mutant = parse(Source("kvpoll.toml", TEXT.replace('"QuarantinePages"', '"ReleasePages"')))
    machine = RoomMachine(mutant.roles["receiver"], mutant.profile("reference"))
    found = counterexample(machine, released_once)
    assert [fact for fact, _ in found[:5]] == [fact for fact, _ in COURSE["receiver"][:5]] and len(found) == 8


def test_the_search_finds_nothing_in_the_reference() -> None:
    with pytest.raises(NoSuchExample):
        counterexample(REFERENCE.sender, sticky, examples=200)
