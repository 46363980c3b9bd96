"""Stories of the machines that are not rooms: registration, registry, peers, queues, collectives, router."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll.spec.protocol import load
from kvpoll.statemachine import STARTS, IllegalFact, Machines
from kvpoll.statemachine.roles import Collective, Peer, Registration, Registry, Resolution, Routed

PROTOCOL = load()
REFERENCE = Machines(PROTOCOL, PROTOCOL.profile("reference"))
SGLANG = Machines(PROTOCOL, PROTOCOL.profile("sglang-0.5.23"))


def spelled(orders: Any) -> str:
    """Orders as one line: ``ArmDeadline(bootstrap) ReleasePages``; details in Python's words."""
    return " ".join(name if detail is None else f"{name}({detail})" for name, detail in orders)


def tell(machines: Machines, role: str, *steps: tuple[str, Any, Any, str]) -> None:
    """A story of a small machine: (fact, detail, the whole state after it, orders); starts at its start."""
    machine, state = machines.small(role), STARTS[role]
    for fact, detail, expected, orders in steps:
        state, ordered = machine.step(state, fact, detail)
        assert (state, spelled(ordered)) == (expected, orders), fact


def refuse(machines: Machines, role: str, state: Any, fact: str, detail: Any = None) -> None:
    with pytest.raises(IllegalFact) as refused:
        machines.small(role).step(state, fact, detail)
    assert str(refused.value) == f"{fact} is illegal for a {role} in {state[0]}"


def failing_registration(last: str, orders: str) -> list[tuple[str, Any, Any, str]]:
    steps: list[tuple[str, Any, Any, str]] = [("Started", None, Registration("Registering", 1), "SendRegistration")]
    for attempt in range(1, 5):
        steps.append(("RegistrationFailed", None, Registration("Registering", attempt), "ArmRetry"))
        steps.append(("RetryDue", None, Registration("Registering", attempt + 1), "SendRegistration"))
    return [*steps, ("RegistrationFailed", None, Registration(last, 5), orders)]


def test_registration_is_tried_five_times_and_then_slowly_for_ever() -> None:
    """sglang#25125: one attempt, made before the bootstrap server listens, left a rank unknown for ever."""
    tell(
        REFERENCE,
        "registration",
        *failing_registration("Exhausted", "ReportUnhealthy ArmRetry"),
        ("RetryDue", None, Registration("Exhausted", 5), "SendRegistration"),
        ("RegistrationFailed", None, Registration("Exhausted", 5), "ArmRetry"),
        ("RegistrationAccepted", None, Registration("Registered", 5), "ReportHealthy"),
        ("ServerRestarted", None, Registration("Registering", 1), "SendRegistration"),
        ("RegistrationAccepted", None, Registration("Registered", 1), ""),
    )
    refuse(REFERENCE, "registration", Registration("Registered", 1), "Started")
    refuse(REFERENCE, "registration", Registration(), "RegistrationAccepted")


def test_sglang_serves_unregistered() -> None:
    tell(
        SGLANG,
        "registration",
        *failing_registration("Exhausted", ""),
        ("RetryDue", None, Registration("Exhausted", 5), ""),
    )
    tell(
        Machines(PROTOCOL, PROTOCOL.profile("before-sglang-25125")),
        "registration",
        ("Started", None, Registration("Registering", 1), "SendRegistration"),
        ("RegistrationFailed", None, Registration("Exhausted", 1), ""),
    )


def test_sglang_does_not_notice_that_the_server_lost_its_memory() -> None:
    tell(
        SGLANG,
        "registration",
        ("Started", None, Registration("Registering", 1), "SendRegistration"),
        ("RegistrationAccepted", None, Registration("Registered", 1), ""),
        ("ServerRestarted", None, Registration("Registered", 1), ""),
    )


REGISTERED: list[tuple[str, Any, Any, str]] = [
    ("Started", None, Registration("Registering", 1), "SendRegistration"),
    ("RegistrationAccepted", None, Registration("Registered", 1), ""),
]
GOODBYE = "ReportUnhealthy SendUnregistration"


@pytest.mark.parametrize("machines", [REFERENCE, SGLANG])
def test_a_rank_that_leaves_says_so_and_is_never_registered_again(machines: Machines) -> None:
    leaving, left = Registration("Leaving", 1), Registration("Left", 1)
    deaf: list[tuple[str, Any, Any, str]] = [
        (fact, None, left, "") for fact in ("RetryDue", "ServerRestarted", "LeaveRequested", "Started")
    ]
    tell(
        machines,
        "registration",
        *REGISTERED,
        ("LeaveRequested", None, leaving, GOODBYE),
        ("ServerRestarted", None, leaving, ""),
        ("LeaveRequested", None, leaving, ""),
        ("UnregistrationAnswered", None, left, ""),
        ("UnregistrationAnswered", None, left, ""),
        *deaf,
    )
    refuse(machines, "registration", Registration("Registered", 1), "UnregistrationAnswered")
    refuse(machines, "registration", leaving, "Started")


@pytest.mark.parametrize("answer", ["RegistrationAccepted", "RegistrationFailed"])
def test_a_put_that_was_under_way_may_list_a_leaving_rank_again(answer: str) -> None:
    """One that timed out may have been applied all the same (C1), so whatever its answer is, the goodbye follows."""
    leaving, left = Registration("Leaving", 1), Registration("Left", 1)
    again: list[tuple[str, Any, Any, str]] = [
        (answer, None, leaving, "SendUnregistration"),
        ("UnregistrationAnswered", None, left, ""),
    ]
    begun = [REGISTERED[0], ("LeaveRequested", None, leaving, GOODBYE)]
    tell(REFERENCE, "registration", *begun, *again, ("RetryDue", None, left, ""))
    tell(REFERENCE, "registration", *begun, ("UnregistrationAnswered", None, left, ""), *again)


def test_a_rank_that_nobody_has_heard_of_leaves_without_a_word() -> None:
    tell(
        REFERENCE,
        "registration",
        ("LeaveRequested", None, Registration("Left"), ""),
        ("Started", None, Registration("Left"), ""),
    )


def test_an_exhausted_rank_leaves_too() -> None:
    tell(
        REFERENCE,
        "registration",
        *failing_registration("Exhausted", "ReportUnhealthy ArmRetry"),
        ("LeaveRequested", None, Registration("Leaving", 5), GOODBYE),
        ("RetryDue", None, Registration("Leaving", 5), ""),
    )


def test_the_registry_is_ready_when_every_rank_is_there() -> None:
    once, both = (("tp0", 0),), (("tp0", 0), ("tp1", 0))
    tell(
        REFERENCE,
        "registry",
        ("RouteRequested", None, Registry(), "AnswerNotReady"),
        ("RankRegistered", ("tp0", 0, 2), Registry("Partial", once, 1), "AnswerRoute"),
        ("RankRegistered", ("tp0", 0, 2), Registry("Partial", once, 2), "AnswerRoute"),  # a repeated PUT
        ("RouteRequested", None, Registry("Partial", once, 2), "AnswerNotReady"),
        ("RankRegistered", ("tp1", 0, 2), Registry("Ready", both, 3), "AnswerRoute"),
        ("RouteRequested", None, Registry("Ready", both, 3), "AnswerRoute"),
        ("RouteRequested", "tp1", Registry("Ready", both, 3), "AnswerRoute"),
        ("RouteRequested", "tp2", Registry("Ready", both, 3), "AnswerUnknownRank"),
        ("RankRegistered", ("tp1", 1, 2), Registry("Ready", (("tp0", 0), ("tp1", 1)), 4), "AnswerRoute"),
    )


def test_a_rank_that_leaves_on_purpose_is_no_longer_listed() -> None:
    one, both, later = (("tp0", 0),), (("tp0", 0), ("tp1", 0)), (("tp0", 0), ("tp1", 1))
    tell(
        REFERENCE,
        "registry",
        ("RankUnregistered", ("tp0", 0), Registry(), "AnswerUnknownRank"),
        ("RankRegistered", ("tp0", 0, 2), Registry("Partial", one, 1), "AnswerRoute"),
        ("RankRegistered", ("tp1", 0, 2), Registry("Ready", both, 2), "AnswerRoute"),
        ("RankUnregistered", ("tp2", 0), Registry("Ready", both, 2), "AnswerUnknownRank"),
        ("RankRegistered", ("tp1", 1, 2), Registry("Ready", later, 3), "AnswerRoute"),
        ("RankUnregistered", ("tp1", 0), Registry("Ready", later, 3), "AnswerStale"),  # its predecessor's goodbye
        ("RankUnregistered", ("tp1", 1), Registry("Partial", one, 2), "AnswerRoute"),
        ("RankUnregistered", ("tp0", 0), Registry(), "AnswerRoute"),
    )


def test_sglang_counts_puts_so_a_repeated_one_makes_the_registry_ready_too_early() -> None:
    """C1: one rank registers twice, the other is answered 404."""
    once = (("tp0", 0),)
    tell(
        SGLANG,
        "registry",
        ("RankRegistered", ("tp0", 0, 2), Registry("Partial", once, 1), "AnswerRoute"),
        ("RankRegistered", ("tp0", 0, 2), Registry("Ready", once, 2), "AnswerRoute"),
        ("RouteRequested", "tp1", Registry("Ready", once, 2), "AnswerUnknownRank"),
    )


def test_an_entry_of_a_dp_rank_expires() -> None:
    known, unknown = STARTS["dp_entry"]._replace(state="Known", rank=1), STARTS["dp_entry"]._replace(rank=1)
    tell(
        REFERENCE,
        "dp_entry",
        ("DpRankRegistered", 1, known, "ArmDeadline(entry)"),
        ("DpRankQueried", None, known, "AnswerRoute"),
    )
    state, orders = REFERENCE.dp_entry.step(known, "EntryExpired")
    assert (state.state, orders) == (unknown.state, ())


def test_a_dp_rank_is_derived_from_the_room_where_prefill_follows_it() -> None:
    tell(REFERENCE, "resolution", ("TopologyLearned", (1, False, 0), Resolution("Resolved", 0), ""))
    tell(REFERENCE, "resolution", ("TopologyLearned", (4, True, 3), Resolution("Resolved", 3), ""))


def test_a_dp_rank_is_asked_for_where_prefill_does_not_follow_the_room() -> None:
    querying = Resolution("Querying")
    asked: list[tuple[str, Any, Any, str]] = [
        ("TopologyLearned", (4, False, 3), querying, "QueryDpRank"),
        ("DpRankAnswered", None, querying, "ArmRetry"),
        ("DpRankAnswered", 2, Resolution("Resolved", 2), ""),
        ("DpRankAnswered", 1, Resolution("Resolved", 2), ""),
    ]
    tell(REFERENCE, "resolution", *asked)
    always = Machines(PROTOCOL, PROTOCOL.profile("reference").with_rules({"dp_lookup": "query"}))
    tell(always, "resolution", ("TopologyLearned", (4, True, 3), querying, "QueryDpRank"), *asked[1:])


def test_a_peer_is_suspected_after_misses_and_dead_when_its_epoch_changes() -> None:
    tell(
        REFERENCE,
        "peer",
        ("ProbeAnswered", 0, Peer("Alive", 0), ""),
        ("ProbeMissed", None, Peer("Suspect", 0, 1), ""),
        ("ProbeMissed", None, Peer("Lost", 0, 2), "DeclareSuspected"),
        ("ProbeMissed", None, Peer("Lost", 0, 2), ""),
        ("ProbeAnswered", 0, Peer("Alive", 0), ""),
        ("ProbeAnswered", 1, Peer("Alive", 1), "DeclareDead"),
    )


def test_sglang_does_not_notice_that_a_peer_was_restarted() -> None:
    tell(SGLANG, "peer", ("ProbeAnswered", 0, Peer("Alive", 0), ""), ("ProbeAnswered", 1, Peer("Alive", 1), ""))


def test_a_request_walks_through_the_queues_of_prefill() -> None:
    queued = STARTS["prefill_request"]._replace
    tell(
        REFERENCE,
        "prefill_request",
        ("RequestArrived", None, queued(state="Bootstrap"), ""),
        ("AdmissionAgreed", None, queued(state="Waiting"), ""),
        ("ForwardFinished", None, queued(state="Inflight"), ""),
        ("TransferAgreed", None, queued(state="Done"), ""),
        ("DropAgreed", None, queued(state="Done"), ""),
    )
    refuse(REFERENCE, "prefill_request", queued(state="Bootstrap"), "TransferAgreed")
    refuse(REFERENCE, "prefill_request", queued(state="Done"), "RequestArrived")


def test_a_request_walks_through_the_queues_of_decode() -> None:
    queued = STARTS["decode_request"]._replace
    tell(
        REFERENCE,
        "decode_request",
        ("RequestArrived", None, queued(state="Preallocation"), ""),
        ("MemoryGranted", None, queued(state="Transfer"), ""),
        ("TransferAgreed", None, queued(state="Running"), ""),
        ("GenerationFinished", None, queued(state="Done"), ""),
    )
    for state in ("Preallocation", "Transfer", "Running"):
        after, orders = REFERENCE.decode_request.step(queued(state=state), "DropAgreed")
        assert (after, orders) == (queued(state="Done"), ())
    refuse(REFERENCE, "decode_request", queued(state="Unqueued"), "MemoryGranted")


def test_a_collective_completes_when_everyone_has_entered() -> None:
    shape = ("min", 3)
    tell(
        REFERENCE,
        "collective",
        ("RankEntered", (1, 2, shape), Collective("Open", 0b10, shape), ""),
        ("RankEntered", (1, 2, shape), Collective("Open", 0b10, shape), ""),
        ("RankEntered", (0, 2, shape), Collective("Complete", 0b11, shape), "DeliverDecision"),
    )
    refuse(REFERENCE, "collective", Collective("Complete", 0b11, shape), "RankEntered", (0, 2, shape))


def test_a_collective_of_different_shapes_blocks_its_ranks() -> None:
    """A14: queues had diverged, so one rank reduced three polls and the other two; gloo hung."""
    state, _ = REFERENCE.collective.step(Collective(), "RankEntered", (0, 2, ("min", 3)))
    state, orders = REFERENCE.collective.step(state, "RankEntered", (1, 2, ("min", 2)))
    assert (state.state, spelled(orders)) == ("Mismatched", "BlockRanks")


def test_the_router_answers_at_the_first_failure() -> None:
    failed = Routed("Answered", "prefill aborted")
    tell(
        REFERENCE,
        "router",
        ("LegFailed", ("prefill", "prefill aborted"), failed, "AnswerClient(failed) CancelLeg(decode)"),
        ("DecodeAnswered", None, failed, ""),
    )
    tell(REFERENCE, "router", ("DecodeAnswered", None, Routed("Answered"), "AnswerClient(ok)"))
    left = Routed("Answered", "client_left")
    tell(REFERENCE, "router", ("ClientLeft", None, left, "AnswerClient(failed) CancelLeg"))


def test_sglang_routers_wait_for_both_legs() -> None:
    """A09: the client of a failed prefill waits until decode times out."""
    half = Routed("HalfFailed", "prefill aborted")
    tell(
        SGLANG,
        "router",
        ("LegFailed", ("prefill", "prefill aborted"), half, ""),
        ("LegFailed", ("decode", "waiting_timeout"), half._replace(state="Answered"), "AnswerClient(failed)"),
    )
