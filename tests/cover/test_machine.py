"""Stories of rooms: build, feed facts, assert the whole state and all orders after each one.

The smaller machines have theirs in test_machine_roles.py; what no sequence of facts may do is in
test_machine_any_facts.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll.spec.protocol import SPEC_PATH, load, parse
from kvpoll.spec.source import BadInput, Source
from kvpoll.spec.vocabulary import Action, Fact, Incarnation
from kvpoll.statemachine import ABSENT, IllegalFact, Local, Machines, RoomMachine

PROTOCOL = load()
REFERENCE = Machines(PROTOCOL, PROTOCOL.profile("reference"))
SGLANG = Machines(PROTOCOL, PROTOCOL.profile("sglang-0.5.23"))
FIRST = Incarnation(room=7, attempt=0, epoch=0)
SECOND = FIRST._replace(attempt=1)
TEXT = SPEC_PATH.read_text(encoding="utf-8")


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

    def hears(
        self, kind: str, detail: Any = None, orders: str = "", whom: Incarnation | None = None, **changes: Any
    ) -> None:
        """Take one step. whom: the incarnation that the fact was meant for, if not the room's own."""
        before = self.room
        self.room, actions = self.machine.step_room(before, Fact(kind, whom or before.incarnation, detail))
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
    """An acknowledgement means that no write runs and none will start (B32, sglang#24527)."""
    story = sending(writes=2)
    story.hears("PeerAborted", 0, STOP_TIMERS, poll="Failed", lease="Draining", asked=1, cause="aborted_by_decode")
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
    story.hears("DestinationRegistered", (0, 1), "AnswerDecode(('Failed', 0))", arrived=1)  # a late joiner (A18)


@pytest.mark.parametrize(
    ("timer", "posted", "cause"),
    [("bootstrap", False, "bootstrap_timeout"), ("transfer", True, "transfer_timeout")],
)
def test_a_sender_has_a_bound_in_every_phase(timer: str, posted: bool, cause: str) -> None:
    story = sending() if posted else opened_sender()
    story.hears("DeadlineReached", "bootstrap" if posted else "transfer")  # a timer of another phase, too late
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
    story.hears("PeerAborted", 0, "AcknowledgeAbort(0)", whom=FIRST)
    story.hears("DestinationRegistered", (0, 1), "AnswerDecode(('Failed', 0))", whom=FIRST)
    for kind, detail in (
        ("WriteCompleted", None),
        ("DeadlineReached", "bootstrap"),
        ("AbortRequested", "late"),
    ):
        story.hears(kind, detail, whom=FIRST)


def test_facts_for_a_former_life_of_the_process_change_nothing() -> None:
    reborn = FIRST._replace(epoch=1)
    story = Story(REFERENCE.sender, reborn)
    story.hears("DestinationRegistered", (0, 1), "AnswerDecode(('Failed', 0))", whom=FIRST)
    assert story.room == REFERENCE.sender.absent(reborn)
    story.hears("RequestOpened", 1, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True, expected=1)
    story.hears("PeerAborted", 0, "AcknowledgeAbort(0)", whom=FIRST)
    room, actions = story.machine.step_room(story.room, Fact("PeerAborted", FIRST, 0))
    assert room is story.room and actions == (Action("AcknowledgeAbort", FIRST, 0),)


def test_a_dp_conflict_is_told_at_once() -> None:
    story = opened_sender()
    before = story.room
    room, actions = story.machine.step_room(before, Fact("DpConflictFound", FIRST, "dp rank 1, decode asks 0"))
    assert (room.local.poll, room.local.lease, room.local.cause) == (
        "Failed",
        "Released",
        "dp rank 1, decode asks 0",
    )
    assert Action("ReleasePages", FIRST) in actions and Action("CancelDeadline", FIRST, "bootstrap") in actions


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
    story.refuses("WritePosted", True)  # no source pages are in use: the lease says no although the poll says yes
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
    orders = f"{STOP_TIMERS} AcknowledgeAbort(0)"
    gone = {"poll": "Failed", "lease": "Released", "asked": 1, "cause": "aborted_by_decode"}
    story.hears("PeerAborted", 0, orders, whom=FIRST, **gone)


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
    story.hears("RequestOpened", 1, owned=True, whom=SECOND)


# --- decode receivers -----------------------------------------------------------------------------


def waiting_receiver(machines: Machines = REFERENCE, ranks: int = 0b11) -> Story:
    """A receiver that knows its prefill ranks and has not reserved anything."""
    story = Story(machines.receiver)
    armed = machines.profile["decode_bootstrap_deadline"] == "armed"
    count = ranks.bit_count()
    story.hears("RequestOpened", None, "ArmDeadline(bootstrap)" if armed else "", poll="Bootstrapping", owned=True)
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
    story.hears("StatusReceived", (0, "Failed"))
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
    story.hears("StatusReceived", (0, "Success"))
    story.hears("DeadlineReached", "tombstone", **ABSENT._asdict())


def test_given_up_after_success_the_pages_come_back_and_the_success_stays() -> None:
    """Every write is known to be over, so nothing has to drain; S3 forbids to call it Failed."""
    story = exposed(ranks=0b01)
    done = {"poll": "Success", "lease": "Settled", "arrived": 1}
    story.hears("StatusReceived", (0, "Success"), "CancelDeadline(waiting)", **done)
    story.hears("AbortRequested", "client_left", "ReleasePages", lease="Released")
    story.hears("AbortRequested", "client_left")
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")


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


@pytest.mark.parametrize("is_quarantined", [False, True])
def test_whose_bytes_are_refused_needs_no_acknowledgement(is_quarantined: bool) -> None:
    """The fence: decode's own process places what arrives, and refuses it (tcp)."""
    story = aborted()
    story.hears("AbortAcknowledged", 1, drained=0b10)
    if is_quarantined:
        orders = "QuarantinePages NotifyPrefill(Abort) ArmDeadline(drain)"
        story.hears("DeadlineReached", "drain", orders, lease="Quarantined")
    orders = "CancelDeadline(drain) ReleasePages"
    story.hears("WritesRefused", None, orders, lease="Released", drained=0b11)
    story.hears("AbortAcknowledged", 0)
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
    story.hears("WritesRefused")


def test_nobody_refuses_the_writes_of_a_request_that_lives() -> None:
    story = exposed()
    story.refuses("WritesRefused")


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


def test_the_siblings_of_a_dead_prefill_rank_hear_of_it_at_once() -> None:
    """They used to hear of it when the drain timer asked them for their pages, or by their own timer (L2)."""
    story = exposed(ranks=0b11)
    orders = f"{STOP_RECEIVING} NotifyPrefill(Abort) ArmDeadline(drain)"
    story.hears("PeerDied", 0b01, orders, poll="Failed", lease="Draining", cause="prefill_lost", drained=0b01)
    orders = "CancelDeadline(drain) ReleasePages"
    story.hears("PeerDied", 0b10, orders, lease="Released", drained=0b11)
    early = waiting_receiver(ranks=0b11)
    orders = f"{STOP_RECEIVING} NotifyPrefill(Abort)"
    early.hears("PeerDied", 0b10, orders, poll="Failed", cause="prefill_lost", drained=0b10)


def test_where_all_are_dead_nobody_is_told() -> None:
    story = exposed(ranks=0b11)
    orders = f"{STOP_RECEIVING} CancelDeadline(drain) ReleasePages"
    story.hears("PeerDied", 0b11, orders, poll="Failed", lease="Released", cause="prefill_lost", drained=0b11)


def test_a_failed_set_up_stays_failed() -> None:
    """sglang#24772 is the story below; here the end of set-up finds the failure and leaves it alone."""
    story = Story(REFERENCE.receiver)
    story.hears("RequestOpened", None, "ArmDeadline(bootstrap)", poll="Bootstrapping", owned=True)
    story.hears("SetupFinished")  # no routes yet: nothing happens
    story.hears("RouteUnavailable", "no_endpoint", "CancelDeadline(bootstrap)", poll="Failed", cause="no_endpoint")
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
    story.hears("StatusReceived", (0, "Success"), **done)


def test_sglang_cleared_waits_for_the_pages_and_leaves_nothing() -> None:
    story = aborted(SGLANG, ranks=0b01)
    story.hears("Cleared", cleared=True)
    forgotten = ABSENT._asdict()
    story.hears("AbortAcknowledged", 0, "CancelDeadline(drain) ReleasePages", **forgotten)


def test_before_24772_the_end_of_set_up_overwrites_a_failure() -> None:
    """sglang#24772: no routes, WaitingForInput all the same, then an attribute error in the loop."""
    machines = Machines(PROTOCOL, PROTOCOL.profile("before-sglang-24772"))
    story = Story(machines.receiver)
    story.hears("RequestOpened", poll="Bootstrapping", owned=True)
    story.hears("RouteUnavailable", "no_endpoint", "CancelDeadline(bootstrap)", poll="Failed", cause="no_endpoint")
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
    """Lost is lost, whether the request is under way, over, or a tombstone."""
    machines = with_rules(resend_on_reconnect="no")
    story = exposed(machines)
    story.hears("LinkRestored")
    orders = f"{STOP_RECEIVING} NotifyPrefill(Abort) ArmDeadline(drain)"
    story.hears("AbortRequested", "client_left", orders, poll="Failed", lease="Draining", cause="client_left")
    story.hears("LinkRestored")
    early = waiting_receiver(machines)
    orders = f"{STOP_RECEIVING} NotifyPrefill(Abort)"
    early.hears("AbortRequested", "client_left", orders, poll="Failed", cause="client_left")
    early.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
    early.hears("LinkRestored")


@pytest.mark.parametrize("is_good", [True, False])
def test_a_sender_may_say_its_outcome_only_once(is_good: bool) -> None:
    story = sending(with_rules(resend_on_reconnect="no"), writes=0)
    if is_good:
        story.hears("WritePosted", True, poll="Transferring", lease="Exposed", outstanding=1, last=True)
        orders = "CancelDeadline(transfer) NotifyDecode(Success) ReleasePages"
        story.hears("WriteCompleted", None, orders, poll="Success", lease="Released", outstanding=0)
    else:
        orders = f"{STOP_TIMERS} NotifyDecode(Failed) ReleasePages"
        story.hears("AbortRequested", "x", orders, poll="Failed", lease="Released", cause="x")
    story.hears("LinkRestored")
    story.hears("Cleared", None, "ArmDeadline(tombstone)", poll="Retired")
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
    room, actions = REFERENCE.sender.step_room(REFERENCE.sender.absent(FIRST), Fact("RequestOpened", SECOND, 1))
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
