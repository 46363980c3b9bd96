"""The view through the library ``transitions`` and the table are the same machine: a walk says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from kvpoll.spec.protocol import Profile, Role, load
from kvpoll.spec.source import BadInput
from kvpoll.statemachine import ABSENT, STARTS, IllegalFact, Machine
from kvpoll.statemachine.view import View, as_transitions

PROTOCOL = load()
REFERENCE = PROTOCOL.profile("reference")
SGLANG = PROTOCOL.profile("sglang-0.5.23")
SENDER = PROTOCOL.roles["sender"]

# fact -> example details; a fact that is not here carries none.
DETAILS: dict[str, dict[str, list[Any]]] = {
    "sender": {
        "RequestOpened": [0, 1, 2],
        "DestinationRegistered": [(0, 1), (0, 2), (1, 2)],
        "WritePosted": [False, True],
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
        "DeadlineReached": ["bootstrap", "admission", "waiting", "drain", "tombstone"],
        "PeerDied": [0, 1],
    },
    "registry": {
        "RankRegistered": [("tp0", 0, 2), ("tp0", 1, 2), ("tp1", 0, 2)],
        "RouteRequested": [None, "tp0", "tp1"],
        "RankUnregistered": [("tp0", 0), ("tp1", 0)],
    },
    "dp_entry": {"DpRankRegistered": [0, 1]},
    "resolution": {
        "TopologyLearned": [(1, False, 0), (2, True, 1), (2, False, 1)],
        "DpRankAnswered": [None, 1],
    },
    "peer": {"ProbeAnswered": [0, 1]},
    "collective": {"RankEntered": [(0, 2, "min"), (1, 2, "min"), (1, 2, "max")]},
    "router": {"LegFailed": [("prefill", "boom"), ("decode", "boom")]},
}

LIMITS = {"outstanding": 2, "attempt": 6, "puts": 3}
"""Counters that grow without end are walked up to here."""


def start(role: Role) -> Any:
    return ABSENT if role.lease is not None else STARTS[role.name]


def examples(role: Role) -> list[tuple[str, Any]]:
    details = DETAILS.get(role.name, {})
    return [(fact, detail) for fact in role.table.facts for detail in details.get(fact, [None])]


def outcome(machine: Machine, state: Any, fact: str, detail: Any) -> tuple[Any, Any]:
    try:
        return machine.step(state, fact, detail)
    except IllegalFact as error:
        return state, str(error)


def outcome_in_view(view: View, state: Any, fact: str, detail: Any) -> tuple[Any, Any]:
    view.restore(state)
    try:
        actions = view.offer(fact, detail)
    except IllegalFact as error:
        return view.local, str(error)
    return view.local, actions


def reachable(machine: Machine) -> list[Any]:
    """Every state that the examples lead to, breadth first."""
    found = [start(machine.role)]
    known = set(found)
    for state in found:
        for fact, detail in examples(machine.role):
            after, _ = outcome(machine, state, fact, detail)
            if after not in known and all(getattr(after, name, 0) <= most for name, most in LIMITS.items()):
                known.add(after)
                found.append(after)
    return found


def walks() -> Iterator[Any]:
    """Each role under each profile; profiles that choose the same rows and limits are walked once."""
    for role in PROTOCOL.roles.values():
        same: dict[tuple[Any, ...], list[Profile]] = {}
        for profile in PROTOCOL.profiles.values():
            rows = tuple(row.line for row in all_rows(role) if row.exists_in(profile))
            read_by_guards = (
                profile["ready_means"],
                profile["register_attempts"],
                profile["heartbeat_max_failure"],
            )
            same.setdefault((rows, read_by_guards), []).append(profile)
        for profiles in same.values():
            others = f"+{len(profiles) - 1}" if len(profiles) > 1 else ""
            yield pytest.param(role, profiles[0], id=f"{role.name}-{profiles[0].name}{others}")


def all_rows(role: Role) -> list[Any]:
    lease = role.lease.rows if role.lease is not None else ()
    return [*role.table.rows, *lease, *(joint.row for joint in role.joint)]


@pytest.mark.parametrize(("role", "profile"), list(walks()))
def test_view_and_table_agree_on_every_state_and_fact(role: Role, profile: Profile) -> None:
    machine, view = Machine(role, profile), as_transitions(role, profile)
    states = reachable(machine)
    for state in states:
        for fact, detail in examples(role):
            expected = outcome(machine, state, fact, detail)
            assert outcome_in_view(view, state, fact, detail) == expected, (state, fact, detail)
            assert view.state == expected[0][0], (state, fact, detail)
    seen = {state[0] for state in states}
    assert {role.table.initial} < seen <= set(role.table.states)


def test_a_view_tells_poll_lease_and_actions() -> None:
    view = as_transitions(SENDER, REFERENCE)
    assert (view.state, view.lease, view.actions) == ("Absent", "Unreserved", ())
    assert view.offer("RequestOpened", 1) == (("ArmDeadline", "bootstrap"),)
    view.model.PagesReserved()
    assert (view.state, view.lease, view.actions) == ("Bootstrapping", "Reserved", ())
    view.model.AbortRequested(detail="client_left")
    assert (view.state, view.lease, view.local.cause) == ("Failed", "Released", "client_left")
    assert view.actions[-1] == ("ReleasePages", None)


def test_an_illegal_fact_raises_the_same_error_and_moves_nothing() -> None:
    seen: list[str] = []
    view = as_transitions(SENDER, REFERENCE, after_state_change=lambda event: seen.append(event.event.name))
    view.offer("RequestOpened", 1)
    before = view.local
    for illegal in (lambda: view.offer("WritePosted", True), lambda: view.model.WritePosted(True)):
        with pytest.raises(IllegalFact, match=r"^WritePosted is illegal for a sender in Bootstrapping$"):
            illegal()
        assert (view.state, view.local, view.actions) == ("Bootstrapping", before, ())
    view.offer("DestinationRegistered", (0, 1))
    with pytest.raises(IllegalFact, match=r"^WritePosted is illegal for a sender in Transferring$"):
        view.offer("WritePosted", True)  # the poll would allow it, the lease does not
    assert view.state == view.local.poll == "WaitingForInput"
    assert seen == ["RequestOpened", "DestinationRegistered"]


def test_callbacks_see_what_was_decided() -> None:
    seen: list[Any] = []
    view = as_transitions(
        SENDER,
        REFERENCE,
        on_enter_Failed=lambda event: seen.append(
            (event.model.state, event.model.view.lease, event.model.view.actions)
        ),
        on_exit_Absent=lambda event: seen.append("opened"),
        before_state_change=lambda event: seen.append(event.event.name),
    )
    view.offer("RequestOpened", 1)
    view.offer("AbortRequested", "client_left")
    orders = (("CancelDeadline", "bootstrap"), ("CancelDeadline", "transfer"), ("NotifyDecode", "Failed"))
    assert seen == ["RequestOpened", "opened", "AbortRequested", ("Failed", "Released", orders)]


def test_the_users_object_becomes_the_model() -> None:
    class Request:
        def __init__(self) -> None:
            self.entered: list[str] = []

        def on_enter_Retired(self, event: Any) -> None:  # noqa: N802
            self.entered.append(event.event.name)

    request: Any = Request()
    view = as_transitions(SENDER, REFERENCE, request)
    assert view.model is request and request.view is view
    for fact, detail in [
        ("RequestOpened", 1),
        ("PagesReserved", None),
        ("DestinationRegistered", (0, 1)),
        ("WritePosted", True),
        ("AbortRequested", "client_left"),
        ("Cleared", None),
    ]:
        view.offer(fact, detail)
    assert (request.state, view.lease, request.entered) == ("Failed", "Draining", [])
    request.WriteSettled()  # the lease is quiet, so a joint row retires the cleared room
    assert (request.state, view.lease, request.entered) == ("Retired", "Released", ["Settled"])
    assert view.actions == (("ReleasePages", None), ("ArmDeadline", "tombstone"))


def test_a_fact_offered_by_a_callback_waits_its_turn() -> None:
    view = as_transitions(
        SENDER,
        REFERENCE,
        on_enter_WaitingForInput=lambda event: event.model.AbortRequested("changed_its_mind"),
    )
    view.offer("RequestOpened", 1)
    view.offer("DestinationRegistered", (0, 1))
    assert (view.state, view.local.arrived, view.local.cause) == ("Failed", 1, "changed_its_mind")


def test_a_callback_that_raises_undoes_its_step() -> None:
    def refuse(event: Any) -> None:
        raise RuntimeError(f"not {event.transition.dest}")

    view = as_transitions(SENDER, REFERENCE, on_enter_WaitingForInput=refuse)
    view.offer("RequestOpened", 1)
    before = view.local
    with pytest.raises(RuntimeError, match=r"^not WaitingForInput$"):
        view.offer("DestinationRegistered", (0, 1))
    assert (view.state, view.local) == ("Bootstrapping", before)
    view.offer("AbortRequested", "client_left")
    assert view.state == "Failed"


def test_an_ignored_fact_orders_nothing() -> None:
    view = as_transitions(SENDER, REFERENCE)
    view.offer("RequestOpened", 1)
    before = view.local
    assert view.offer("DeadlineReached", "transfer") == ()  # heard in this state, but no guard holds
    assert view.offer("WriteCompleted") == ()  # no row in this state
    assert (view.state, view.local) == ("Bootstrapping", before)


def test_a_fact_without_rows_under_this_profile_is_known_all_the_same() -> None:
    view = as_transitions(SENDER, SGLANG)
    view.offer("RequestOpened", 1)
    assert view.offer("PeerSuspected") == ()
    assert view.state == "Bootstrapping"


def test_wrong_names_are_named() -> None:
    with pytest.raises(BadInput) as wrong:
        as_transitions(SENDER, REFERENCE, on_enter_Fialed=print)
    assert str(wrong.value) == "role 'sender' has no callback 'on_enter_Fialed' (did you mean 'on_enter_Failed'?)"
    with pytest.raises(BadInput) as wrong:
        as_transitions(SENDER, REFERENCE).offer("WritePost")
    assert str(wrong.value) == "role 'sender' has no fact 'WritePost' (did you mean 'WritePosted'?)"


def test_without_the_library_the_error_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transitions", None)
    with pytest.raises(ImportError, match=r"pip install 'kvpoll\[transitions\]'"):
        as_transitions(SENDER, REFERENCE)


def test_the_librarys_own_diagrams_work() -> None:
    from transitions.extensions import GraphMachine

    mermaid = partial(GraphMachine, graph_engine="mermaid", show_conditions=True)
    view = as_transitions(SENDER, REFERENCE, machine_class=mermaid)
    drawn = view.machine.get_graph().draw(None)
    assert "Bootstrapping --> WaitingForInput: DestinationRegistered [arrival_completes]" in drawn
    assert "Success --> Retired: Cleared [memory_is_back] | Settled" in drawn
