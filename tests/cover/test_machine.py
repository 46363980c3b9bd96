"""Stories of rooms: build, feed facts, assert the whole state and all orders after each one.

Then the smaller machines, in the same manner, and what no sequence of facts may ever do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from kvpoll.spec.protocol import SPEC_PATH, load, parse
from kvpoll.spec.source import BadInput, Source
from kvpoll.spec.vocabulary import POLL_NUMBERS, TERMINAL_POLLS, Action, Fact, Incarnation
from kvpoll.statemachine import ABSENT, STARTS, IllegalFact, Local, Machines, RoomMachine
from kvpoll.statemachine.roles import Collective, Peer, Registration, Registry, Resolution, Routed

PROTOCOL = load()
REFERENCE = Machines(PROTOCOL, PROTOCOL.profile("reference"))
SGLANG = Machines(PROTOCOL, PROTOCOL.profile("sglang-0.5.23"))
FIRST = Incarnation(room=7, attempt=0, epoch=0)
SECOND = FIRST._replace(attempt=1)


def with_rules(**rules: str | int) -> Machines:
    """The reference with some rules chosen otherwise, each a legal value."""
    for rule, value in rules.items():
        assert PROTOCOL.rules[rule].kind == "number" or value in PROTOCOL.rules[rule].values
    return Machines(PROTOCOL, PROTOCOL.profile("reference").with_rules(rules))


def spelled(orders: Any) -> str:
    """Orders as one line: ``ArmDeadline(bootstrap) ReleasePages``; details in Python's words."""
    return " ".join(name if detail is None else f"{name}({detail})" for name, detail in orders)


class Story:
    """A room that hears facts. ``hears`` names what changes; everything else must stay as it was."""

    def __init__(self, machine: RoomMachine, incarnation: Incarnation = FIRST) -> None:
        self.machine = machine
        self.room = machine.absent(incarnation)
        self.expected = ABSENT

    def hears(self, kind: str, detail: Any = None, orders: str = "", **changes: Any) -> None:
        self.hears_for(self.room.incarnation, kind, detail, orders, **changes)

    def hears_for(
        self, whom: Incarnation, kind: str, detail: Any = None, orders: str = "", **changes: Any
    ) -> None:
        """As ``hears``, for a fact that was meant for another incarnation; the actions are returned to nobody."""
        before = self.room
        self.room, actions = self.machine.step_room(before, Fact(kind, whom, detail))
        self.expected = self.expected._replace(**changes)
        assert self.room.local == self.expected
        assert spelled((action.kind, action.detail) for action in actions) == orders
        if not changes and self.room.incarnation == before.incarnation:
            assert self.room is before

    def refuses(self, kind: str, detail: Any = None) -> None:
        before = self.room
        with pytest.raises(IllegalFact) as refused:
            self.machine.step_room(before, Fact(kind, before.incarnation, detail))
        assert (refused.value.role, refused.value.fact) == (self.machine.role.name, kind)
        assert self.room is before and self.room.local == self.expected


# --- prefill senders ------------------------------------------------------------------------------


def opened_sender(machines: Machines = REFERENCE) -> Story:
    """A sender whose scheduler has opened the room and reserved source pages."""
    story = Story(machines.sender)
    story.hears("RequestOpened", 1, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=1)
    story.hears("PagesReserved", lease="Reserved")
    return story


def sending(machines: Machines = REFERENCE, writes: int = 1) -> Story:
    """A sender with that many writes in flight, none of them the last."""
    story = opened_sender(machines)
    timer = " ArmDeadline(transfer)" if machines.profile["prefill_transfer_deadline"] == "armed" else ""
    complete = {"poll": "WaitingForInput", "arrived": 1}
    story.hears("DestinationRegistered", (0, 1), "CancelDeadline(bootstrap)" + timer, **complete)
    for number in range(writes):
        story.hears("WritePosted", False, poll="Transferring", lease="Exposed", outstanding=number + 1)
    return story


STOP_TIMERS = "CancelDeadline(bootstrap) CancelDeadline(transfer)"


def test_a_sender_that_succeeds() -> None:
    story = sending()
    story.hears("WritePosted", True, outstanding=2, last=True)
    story.hears("WriteCompleted", outstanding=1)
    story.hears(
        "WriteCompleted",
        None,
        "CancelDeadline(transfer) NotifyDecode(Success) ReleasePages",
        poll="Success",
        lease="Released",
        outstanding=0,
    )
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
    story.hears("DeadlineReached", "tombstone", **ABSENT._asdict())
    assert story.room == REFERENCE.sender.absent(FIRST)


def test_a_sender_waits_for_every_destination() -> None:
    story = Story(REFERENCE.sender)
    story.hears("RequestOpened", 2, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=2)
    story.hears("DestinationRegistered", (1, 2), arrived=0b10)
    story.hears("DestinationRegistered", (1, 2))  # the same one again
    orders = "CancelDeadline(bootstrap) ArmDeadline(transfer)"
    story.hears("DestinationRegistered", (0, 2), orders, poll="WaitingForInput", arrived=0b11)


def test_destinations_may_come_before_the_request() -> None:
    story = Story(REFERENCE.sender)
    story.hears("DestinationRegistered", (0, 1), "ArmDeadline(announced)", poll="Announced", arrived=1)
    orders = "CancelDeadline(announced) ArmDeadline(transfer)"
    story.hears("RequestOpened", 1, orders, poll="WaitingForInput", owned=True, expected=1)


def test_a_room_that_nobody_opens_becomes_a_tombstone() -> None:
    """Held destinations must not stay for ever (B49), and decode must not wait for its own timeout."""
    story = Story(REFERENCE.sender)
    story.hears("DestinationRegistered", (0, 1), "ArmDeadline(announced)", poll="Announced", arrived=1)
    orders = "NotifyDecode(Failed) ArmDeadline(tombstone)"
    story.hears("DeadlineReached", "announced", orders, poll="Retired", cause="never_opened")


def test_abort_drains_before_release_and_before_the_acknowledgement() -> None:
    """An acknowledgement means that no write runs and none will start (B32): sglang#24527 took Failed for that."""
    story = sending(writes=2)
    story.hears(
        "PeerAborted", 0, STOP_TIMERS, poll="Failed", lease="Draining", asked=1, cause="aborted_by_decode"
    )
    story.hears("WriteCompleted", outstanding=1)
    story.hears("WriteCompleted", None, "ReleasePages AcknowledgeAbort", outstanding=0, lease="Released")
    story.hears("PeerAborted", 0, "AcknowledgeAbort(0)")  # asked again, answered at once


def test_a_failed_write_may_still_be_running() -> None:
    story = sending(writes=2)
    orders = "CancelDeadline(transfer) NotifyDecode(Failed)"
    story.hears("WriteFailed", None, orders, poll="Failed", lease="Draining", cause="transfer_error")
    story.hears("PeerAborted", 0, asked=1)
    story.hears("WriteCompleted", outstanding=1)
    story.hears("Cleared", cleared=True)
    retired = "ReleasePages AcknowledgeAbort ArmDeadline(tombstone)"
    story.hears("WriteSettled", None, retired, poll="Retired", outstanding=0, lease="Released")


def test_an_abort_on_prefill_reaches_decode() -> None:
    story = opened_sender()
    orders = f"{STOP_TIMERS} NotifyDecode(Failed) ReleasePages"
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Released", cause="client_left")
    story.hears("AbortRequested", "once_more")  # the first cause is the one that is told
    story.hears(
        "DestinationRegistered", (0, 1), "AnswerDecode(('Failed', 0))", arrived=1
    )  # a late joiner (A18)


@pytest.mark.parametrize(
    ("timer", "posted", "cause"),
    [("bootstrap", False, "bootstrap_timeout"), ("transfer", True, "transfer_timeout")],
)
def test_a_sender_has_a_bound_in_every_phase(timer: str, posted: bool, cause: str) -> None:
    story = sending() if posted else opened_sender()
    story.hears(
        "DeadlineReached", "bootstrap" if posted else "transfer"
    )  # a timer of another phase, too late
    orders = "NotifyDecode(Failed)" + ("" if posted else " ReleasePages")
    story.hears(
        "DeadlineReached",
        timer,
        orders,
        poll="Failed",
        cause=cause,
        lease="Draining" if posted else "Released",
    )


def test_late_metadata_meets_a_tombstone() -> None:
    """A11: in SGLang the same message makes the room WaitingForInput again, see below."""
    story = opened_sender()
    story.hears(
        "AbortRequested",
        "client_left",
        f"{STOP_TIMERS} NotifyDecode(Failed) ReleasePages",
        poll="Failed",
        lease="Released",
        cause="client_left",
    )
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
    story.hears("DestinationRegistered", (0, 1), "AnswerDecode(('Failed', 0))")


def test_an_early_abort_is_remembered() -> None:
    """C6: decode gave up before prefill had heard of the request."""
    story = Story(REFERENCE.sender)
    story.hears("PeerAborted", 0, "ArmDeadline(announced) AcknowledgeAbort(0)", poll="Announced", asked=1)
    story.hears(
        "RequestOpened",
        1,
        "CancelDeadline(announced) AcknowledgeAbort",
        poll="Failed",
        lease="Released",
        owned=True,
        expected=1,
        cause="aborted_by_decode",
    )


def test_a_second_live_use_of_a_room_is_refused() -> None:
    """A22: routers and parallel sampling hand out one room twice; the first request must not notice."""
    story = sending()
    before = story.room
    room, actions = REFERENCE.sender.step_room(before, Fact("RequestOpened", SECOND, 1))
    assert room is before and actions == (Action("RejectRequest", SECOND),)


def test_a_tombstone_gives_way_to_a_newer_attempt() -> None:
    story = Story(REFERENCE.sender)
    story.hears("DestinationRegistered", (0, 1), "ArmDeadline(announced)", poll="Announced", arrived=1)
    orders = "NotifyDecode(Failed) ArmDeadline(tombstone)"
    story.hears("DeadlineReached", "announced", orders, poll="Retired", cause="never_opened")
    room, actions = REFERENCE.sender.step_room(story.room, Fact("RequestOpened", SECOND, 1))
    assert room == (SECOND, Local(poll="Bootstrapping", owned=True, expected=1))
    assert actions == (Action("ArmDeadline", SECOND, "bootstrap"),)


def test_facts_for_an_older_attempt_are_answered_and_change_nothing() -> None:
    story = Story(REFERENCE.sender, SECOND)
    story.hears("RequestOpened", 1, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=1)
    story.hears_for(FIRST, "PeerAborted", 0, "AcknowledgeAbort(0)")
    story.hears_for(FIRST, "DestinationRegistered", (0, 1), "AnswerDecode(('Failed', 0))")
    for kind, detail in (
        ("WriteCompleted", None),
        ("DeadlineReached", "bootstrap"),
        ("AbortRequested", "late"),
    ):
        story.hears_for(FIRST, kind, detail)


def test_facts_for_a_former_life_of_the_process_change_nothing() -> None:
    reborn = FIRST._replace(epoch=1)
    story = Story(REFERENCE.sender, reborn)
    story.hears_for(FIRST, "DestinationRegistered", (0, 1), "AnswerDecode(('Failed', 0))")
    assert story.room == REFERENCE.sender.absent(reborn)
    story.hears("RequestOpened", 1, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=1)
    story.hears_for(FIRST, "PeerAborted", 0, "AcknowledgeAbort(0)")
    room, actions = story.machine.step_room(story.room, Fact("PeerAborted", FIRST, 0))
    assert room is story.room and actions == (Action("AcknowledgeAbort", FIRST, 0),)


def test_a_dp_conflict_is_told_at_once() -> None:
    story = opened_sender()
    before = story.room
    room, actions = story.machine.step_room(
        before, Fact("DpConflictFound", FIRST, "dp rank 1, decode asks 0")
    )
    assert (room.local.poll, room.local.lease, room.local.cause) == (
        "Failed",
        "Released",
        "dp rank 1, decode asks 0",
    )
    assert (
        Action("ReleasePages", FIRST) in actions and Action("CancelDeadline", FIRST, "bootstrap") in actions
    )


def test_the_outcome_is_sent_again_when_the_link_is_back() -> None:
    """B63: one dropped completion notice hung the receiver for ever."""
    story = sending(writes=0)
    story.hears("WritePosted", True, poll="Transferring", lease="Exposed", outstanding=1, last=True)
    orders = "CancelDeadline(transfer) NotifyDecode(Success) ReleasePages"
    story.hears("WriteCompleted", None, orders, poll="Success", lease="Released", outstanding=0)
    story.hears("LinkRestored", None, "NotifyDecode(Success)")
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
    story.hears("LinkRestored", None, "NotifyDecode(Success)")


@pytest.mark.parametrize("fact", ["PeerSuspected", "PeerDied"])
def test_a_sender_notices_that_decode_is_gone(fact: str) -> None:
    """A20: SGLang's prefill never asks whether decode lives."""
    story = sending()
    notice = f"{STOP_TIMERS} NotifyDecode(Failed)" if fact == "PeerSuspected" else STOP_TIMERS
    story.hears(fact, None, notice, poll="Failed", lease="Draining", cause="decode_lost")
    story.hears("WriteSettled", None, "ReleasePages", lease="Released", outstanding=0)


def test_illegal_facts_move_nothing() -> None:
    story = Story(REFERENCE.sender)
    story.refuses("WritePosted", True)
    story.refuses("PagesReserved")
    story.hears("RequestOpened", 1, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=1)
    for kind, detail in (("WritePosted", True), ("Cleared", None), ("RequestOpened", 1)):
        story.refuses(kind, detail)
    complete = "CancelDeadline(bootstrap) ArmDeadline(transfer)"
    story.hears("DestinationRegistered", (0, 1), complete, poll="WaitingForInput", arrived=1)
    story.refuses(
        "WritePosted", True
    )  # no source pages are in use: the lease says no although the poll says yes
    story.hears("PagesReserved", lease="Reserved")
    story.hears("WritePosted", True, poll="Transferring", lease="Exposed", outstanding=1, last=True)


# --- prefill senders as SGLang has them -----------------------------------------------------------


def cleared_sglang_sender() -> Story:
    story = opened_sender(SGLANG)
    orders = f"{STOP_TIMERS} ReleasePages"  # and decode is told nothing (A02)
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Released", cause="client_left")
    story.hears("Cleared", **ABSENT._asdict())
    return story


def test_sglang_late_metadata_resurrects_a_room() -> None:
    story = cleared_sglang_sender()
    story.hears("DestinationRegistered", (0, 1), poll="WaitingForInput", arrived=1)
    assert not story.room.local.owned


def test_sglang_success_turns_into_failed() -> None:
    story = sending(SGLANG, writes=0)
    story.hears("WritePosted", True, poll="Transferring", lease="Exposed", outstanding=1, last=True)
    orders = "CancelDeadline(transfer) NotifyDecode(Success) ReleasePages"
    story.hears("WriteCompleted", None, orders, poll="Success", lease="Released", outstanding=0)
    story.hears("AbortRequested", "client_left", poll="Failed", cause="client_left")


def test_sglang_source_pages_go_at_once_while_writes_read_them() -> None:
    story = sending(SGLANG)
    orders = f"{STOP_TIMERS} ReleasePages"
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Forsaken", cause="client_left")
    assert story.room.local.outstanding == 1
    story.hears("PeerAborted", 0, asked=1)
    story.hears("WriteCompleted", None, "AcknowledgeAbort", lease="Released", outstanding=0)


def test_sglang_an_early_abort_is_forgotten() -> None:
    story = Story(SGLANG.sender)
    story.hears("PeerAborted", 0, "AcknowledgeAbort(0)")
    story.hears("RequestOpened", 1, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=1)


def test_sglang_facts_hit_whatever_holds_the_room_number() -> None:
    """S2: an abort of the first use of a room number kills the second."""
    story = Story(SGLANG.sender, SECOND)
    story.hears("RequestOpened", 1, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=1)
    orders = f"{STOP_TIMERS} AcknowledgeAbort"
    gone = {"poll": "Failed", "lease": "Released", "asked": 1, "cause": "aborted_by_decode"}
    story.hears_for(FIRST, "PeerAborted", 0, orders, **gone)


def test_sglang_two_requests_share_one_room() -> None:
    story = sending(SGLANG)
    room, actions = SGLANG.sender.step_room(story.room, Fact("RequestOpened", SECOND, 1))
    assert (room.incarnation, room.local, actions) == (SECOND, story.room.local, ())


def test_sglang_a_sender_has_no_bound_once_destinations_are_known() -> None:
    story = sending(SGLANG)
    story.hears("DeadlineReached", "transfer")
    assert story.room.local.poll == "Transferring"


def test_sglang_a_request_adopts_the_ghost_of_its_room() -> None:
    story = cleared_sglang_sender()
    story.hears("DestinationRegistered", (0, 1), poll="WaitingForInput", arrived=1)
    story.hears_for(SECOND, "RequestOpened", 1, owned=True)


# --- decode receivers -----------------------------------------------------------------------------


def waiting_receiver(machines: Machines = REFERENCE, ranks: int = 0b11) -> Story:
    """A receiver that knows its prefill ranks and has not reserved anything."""
    story = Story(machines.receiver)
    armed = machines.profile["decode_bootstrap_deadline"] == "armed"
    count = ranks.bit_count()
    story.hears(
        "RequestOpened", None, "ArmDeadline(bootstrap)" if armed else "", poll="Bootstrapping", owned=True
    )
    story.hears("RoutesResolved", (ranks, count), contacted=ranks, expected=count)
    orders = "CancelDeadline(bootstrap) ArmDeadline(admission)" if armed else ""
    story.hears("SetupFinished", None, orders, poll="WaitingForInput")
    return story


def exposed(machines: Machines = REFERENCE, ranks: int = 0b11) -> Story:
    """A receiver whose page addresses are known to its prefill ranks."""
    story = waiting_receiver(machines, ranks)
    story.hears("PagesReserved", lease="Reserved")
    story.hears("MetadataSent", None, "CancelDeadline(admission) ArmDeadline(waiting)", lease="Exposed")
    return story


STOP_RECEIVING = "CancelDeadline(bootstrap) CancelDeadline(admission) CancelDeadline(waiting)"


def test_a_receiver_that_succeeds() -> None:
    story = exposed()
    story.hears("StatusReceived", (0, "Success"), arrived=0b01)
    story.hears("StatusReceived", (0, "Success"))  # a duplicate does not count (D6)
    done = {"poll": "Success", "lease": "Settled", "arrived": 0b11}
    story.hears("StatusReceived", (1, "Success"), "CancelDeadline(waiting)", **done)
    story.hears("AbortRequested", "client_left")
    story.hears("StatusReceived", (0, "Failed"))
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
    story.hears("StatusReceived", (0, "Success"))
    story.hears("DeadlineReached", "tombstone", **ABSENT._asdict())


def aborted(machines: Machines = REFERENCE, ranks: int = 0b11) -> Story:
    story = exposed(machines, ranks)
    orders = f"{STOP_RECEIVING} NotifyPrefill(Abort) ArmDeadline(drain)"
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Draining", cause="client_left")
    return story


def test_destination_pages_wait_for_every_acknowledgement() -> None:
    """A01: an aborted request's pages were handed to the next one while the old write was still arriving."""
    story = aborted()
    story.hears("Cleared", cleared=True)
    story.hears("AbortAcknowledged", 0, drained=0b01)
    story.hears("AbortAcknowledged", 0)
    orders = "CancelDeadline(drain) ReleasePages ArmDeadline(tombstone)"
    story.hears("AbortAcknowledged", 1, orders, poll="Retired", lease="Released", drained=0b11)


def test_pages_without_proof_are_quarantined_and_asked_for_again() -> None:
    story = aborted(ranks=0b01)
    again = "NotifyPrefill(Abort) ArmDeadline(drain)"
    story.hears("DeadlineReached", "drain", f"QuarantinePages {again}", lease="Quarantined")
    story.hears("DeadlineReached", "drain", again)
    story.hears("Cleared", cleared=True)
    orders = "CancelDeadline(drain) ReleasePages ArmDeadline(tombstone)"
    story.hears("AbortAcknowledged", 0, orders, poll="Retired", lease="Released", drained=0b01)


def test_pages_that_nobody_was_told_of_come_back_at_once() -> None:
    story = waiting_receiver()
    story.hears("PagesReserved", lease="Reserved")
    orders = f"{STOP_RECEIVING} NotifyPrefill(Abort) ReleasePages"
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Released", cause="client_left")


@pytest.mark.parametrize("timer", ["bootstrap", "admission", "waiting"])
def test_a_receiver_has_a_bound_in_every_phase(timer: str) -> None:
    """B40, C8: SGLang's first timer starts with the metadata."""
    if timer == "bootstrap":
        story = Story(REFERENCE.receiver)
        story.hears("RequestOpened", None, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True)
    else:
        story = waiting_receiver() if timer == "admission" else exposed()
    lease = {"lease": "Draining"} if timer == "waiting" else {}
    orders = "NotifyPrefill(Abort)" + (" ArmDeadline(drain)" if lease else "")
    story.hears("DeadlineReached", timer, orders, poll="Failed", cause=f"{timer}_timeout", **lease)


def test_a_failed_set_up_stays_failed() -> None:
    """sglang#24772 is the story below; here the end of set-up finds the failure and leaves it alone."""
    story = Story(REFERENCE.receiver)
    story.hears("RequestOpened", None, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True)
    story.hears("SetupFinished")  # no routes yet: nothing happens
    story.hears(
        "RouteUnavailable", "no_endpoint", "CancelDeadline(bootstrap)", poll="Failed", cause="no_endpoint"
    )
    story.hears("SetupFinished")
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")


def test_a_prefill_failure_ends_the_receiver() -> None:
    story = exposed()
    stop = "CancelDeadline(waiting) CancelDeadline(admission) NotifyPrefill(Abort) ArmDeadline(drain)"
    failed = {"poll": "Failed", "lease": "Draining", "cause": "failed_by_prefill"}
    story.hears("StatusReceived", (1, "Failed"), stop, **failed)


def test_metadata_is_sent_again_when_the_link_is_back() -> None:
    story = exposed()
    story.hears("LinkRestored", None, "SendMetadata")


def test_success_before_publication_is_not_believed() -> None:
    story = waiting_receiver(ranks=0b01)
    story.hears("StatusReceived", (0, "Success"), arrived=0b01)
    assert story.room.local.poll == "WaitingForInput"


def test_a_receiver_refuses_metadata_out_of_turn() -> None:
    story = waiting_receiver()
    story.refuses("MetadataSent")  # nothing is reserved yet
    story.refuses("Cleared")
    story.refuses("RequestOpened")


# --- decode receivers as SGLang has them ----------------------------------------------------------


def test_sglang_pages_come_back_after_a_timeout_without_proof() -> None:
    """C9: thirty seconds prove nothing about a write that is on its way."""
    story = aborted(SGLANG)
    assert SGLANG.profile.number("drain_timeout_s") == 30
    story.hears("DeadlineReached", "drain", "ReleasePages", lease="Released")
    assert story.room.local.drained == 0


def test_sglang_success_turns_into_failed_on_decode() -> None:
    story = exposed(SGLANG, ranks=0b01)
    done = {"poll": "Success", "lease": "Settled", "arrived": 1}
    story.hears("StatusReceived", (0, "Success"), "CancelDeadline(waiting)", **done)
    story.hears("AbortRequested", "late", "ReleasePages", poll="Failed", lease="Released", cause="late")


def test_sglang_success_before_publication_is_believed() -> None:
    story = waiting_receiver(SGLANG, ranks=0b01)
    done = {"poll": "Success", "lease": "Settled", "arrived": 1}
    story.hears("StatusReceived", (0, "Success"), "CancelDeadline(waiting)", **done)


def test_sglang_cleared_waits_for_the_pages_and_leaves_nothing() -> None:
    story = aborted(SGLANG, ranks=0b01)
    story.hears("Cleared", cleared=True)
    forgotten = ABSENT._asdict()
    story.hears("AbortAcknowledged", 0, "CancelDeadline(drain) ReleasePages", **forgotten)


def test_before_24772_the_end_of_set_up_overwrites_a_failure() -> None:
    """sglang#24772: bootstrap_infos was None, the status WaitingForInput, and an attribute error stopped the loop."""
    machines = Machines(PROTOCOL, PROTOCOL.profile("before-sglang-24772"))
    story = Story(machines.receiver)
    story.hears("RequestOpened", poll="Bootstrapping", owned=True)
    story.hears(
        "RouteUnavailable", "no_endpoint", "CancelDeadline(bootstrap)", poll="Failed", cause="no_endpoint"
    )
    story.hears("SetupFinished", poll="WaitingForInput")
    story.hears("PagesReserved", lease="Reserved")
    story.refuses("MetadataSent")


# --- one rule at a time ---------------------------------------------------------------------------


def test_pages_may_come_back_as_soon_as_a_request_fails() -> None:
    story = exposed(with_rules(release_requires_quiescence="never"))
    orders = f"{STOP_RECEIVING} NotifyPrefill(Abort) ReleasePages"
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Released", cause="client_left")


def test_prefill_may_keep_its_aborts_to_itself() -> None:
    story = opened_sender(with_rules(prefill_failure_notice="transfer_errors_only"))
    orders = f"{STOP_TIMERS} ReleasePages"
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Released", cause="client_left")


def test_outcomes_may_be_sent_only_once() -> None:
    story = exposed(with_rules(resend_on_reconnect="no"))
    story.hears("LinkRestored")


# --- how a room is stepped ------------------------------------------------------------------------


def test_a_step_that_changes_nothing_returns_the_very_same_room() -> None:
    story = sending()
    for kind, detail in (
        ("DestinationRegistered", (0, 1)),
        ("DeadlineReached", "bootstrap"),
        ("LinkRestored", None),
    ):
        for _ in range(2):
            room, actions = story.machine.step_room(story.room, Fact(kind, Incarnation(7, 0, 0), detail))
            assert room is story.room and actions == ()


def test_orders_alone_do_not_make_a_new_room() -> None:
    story = exposed()
    room, actions = story.machine.step_room(story.room, Fact("LinkRestored", FIRST))
    assert room is story.room and actions == (Action("SendMetadata", FIRST),)


def test_an_absent_room_takes_the_identity_of_its_first_fact() -> None:
    room, actions = REFERENCE.sender.step_room(
        REFERENCE.sender.absent(FIRST), Fact("RequestOpened", SECOND, 1)
    )
    assert room.incarnation == SECOND and room.local.poll == "Bootstrapping"
    assert actions == (Action("ArmDeadline", SECOND, "bootstrap"),)


def test_rooms_share_what_they_know() -> None:
    """Ten thousand rooms in the same phase hold one Local between them."""
    machine = REFERENCE.sender
    rooms = [
        machine.step_room(machine.absent(whom), Fact("RequestOpened", whom, 1))[0]
        for whom in (Incarnation(number, 0, 0) for number in range(100))
    ]
    assert len({id(room.local) for room in rooms}) == 1 and len({room.incarnation for room in rooms}) == 100


def test_memory_of_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll.statemachine.machine.MEMO_LIMIT", 3)
    machine = RoomMachine(PROTOCOL.roles["sender"], PROTOCOL.profile("reference"))
    for number in range(50):
        whom = Incarnation(number, 0, 0)
        room, _ = machine.step_room(machine.absent(whom), Fact("RequestOpened", whom, 1))
        room, _ = machine.step_room(room, Fact("AbortRequested", whom, f"cause {number}"))
        assert (room.local.poll, room.local.cause) == ("Failed", f"cause {number}")
        assert sum(map(len, machine._memo.values())) <= 4


def test_joint_rows_that_chase_each_other_are_reported() -> None:
    chase = '  { poll = ["Failed"], lease = ["Released"], to_lease = "Reserved" },\n'
    first = '  { poll = ["Success"], lease = ["Exposed"], to_lease = "Released"'
    protocol = parse(Source("kvpoll.toml", TEXT.replace(first, chase + first, 1)))
    machine = RoomMachine(protocol.roles["sender"], protocol.profile("reference"))
    room, _ = machine.step_room(machine.absent(FIRST), Fact("RequestOpened", FIRST, 1))
    with pytest.raises(BadInput) as refused:
        machine.step_room(room, Fact("AbortRequested", FIRST, "client_left"))
    assert str(refused.value).startswith("role 'sender': joint rows never come to rest from Failed/")


TEXT = SPEC_PATH.read_text(encoding="utf-8")


# --- the smaller machines -------------------------------------------------------------------------


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
    steps: list[tuple[str, Any, Any, str]] = [
        ("Started", None, Registration("Registering", 1), "SendRegistration")
    ]
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
    always = with_rules(dp_lookup="query")
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
    tell(
        SGLANG, "peer", ("ProbeAnswered", 0, Peer("Alive", 0), ""), ("ProbeAnswered", 1, Peer("Alive", 1), "")
    )


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


# --- what no sequence of facts may do -------------------------------------------------------------


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
    """The undisturbed course up to some point, then any facts, the rest of the course running through them."""
    details = DETAILS[role]
    facts = [
        (fact, detail) for fact in PROTOCOL.roles[role].table.facts for detail in details.get(fact, [None])
    ]
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


@pytest.mark.parametrize(
    ("role", "holds"), PROPERTIES, ids=[f"{role}-{held.__name__}" for role, held in PROPERTIES]
)
def test_under_the_reference_no_sequence_of_facts_breaks_it(role: str, holds: Property) -> None:
    machine: RoomMachine = getattr(REFERENCE, role)

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(courses(role))
    def check(course: list[tuple[str, Any]]) -> None:
        assert holds(list(run(machine, course)))

    check()


def counterexample(machine: RoomMachine, holds: Property) -> list[tuple[str, Any]]:
    """The shortest sequence that breaks the property, as facts. Raises NoSuchExample."""
    found = find(
        courses(machine.role.name),
        lambda course: not holds(list(run(machine, course))),
        settings=settings(max_examples=5_000, database=None, derandomize=True),
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
    found = counterexample(with_rules(release_requires_quiescence="never").receiver, quiet_destination)
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
        counterexample(REFERENCE.sender, sticky)
