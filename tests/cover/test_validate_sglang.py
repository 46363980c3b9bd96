"""What the judge makes of an instrumented SGLang: happy, unlucky, and spoiled in every way that a line allows."""

from __future__ import annotations

import pytest
from validate_traces import (
    CONTROL,
    LISTENER,
    ROOM,
    SCHEDULER,
    WORKER,
    B,
    Event,
    F,
    S,
    Spoil,
    T,
    W,
    applied,
    called,
    chunk,
    concluded,
    happy,
    heard,
    metadata,
    numbered,
    put,
)  # fmt: skip

from kvpoll.spec.protocol import load
from kvpoll.spec.sglang_trace import Heard, Message, Put, message_of, read_line
from kvpoll.spec.trace import TraceError
from kvpoll.validation import Asked, Trial, Verdict


def verdict(events: list[Event], profile: str | None = None) -> Verdict:
    lines = iter([f"{line}\n".encode() for line in numbered(events)])
    return Trial(load(), Asked(profile=profile), lines, "trace")()


def rules(judged: Verdict) -> dict[str, int]:
    """Each rule that would have to be set otherwise -> the line of the first event that needs it."""
    return {change.rule: each.first.line for changes, each in judged.departures.items() for change in changes}


def test_a_happy_request_is_explained() -> None:
    judged = verdict(happy())
    assert judged.holds and judged.profile == "sglang-0.5.23" and not judged.open
    assert judged.steps == 15  # more than the table shows: routes, pages, two writes and their ends


def test_a_backend_that_stores_transferring_is_explained_too() -> None:
    """nixl stores it before each chunk; Mooncake never does (PROTOCOL 17.8)."""
    events = happy()
    events[5:9] = [
        chunk(False), put("P0", W, T, WORKER), chunk(True), put("P0", T, T, WORKER), concluded(),
        put("P0", T, S, WORKER),
    ]  # fmt: skip
    assert verdict(events).holds


def test_reference_says_where_a_happy_request_departs() -> None:
    judged = verdict(happy(), "reference")
    assert rules(judged) == {"identity": 4, "clear_leaves": 13}
    first = judged.first
    assert first is not None and first.line == 4 and first.invariants == ("S2",)
    assert first.why == "the message carries a room number and no incarnation"
    assert not judged.broken


def test_late_metadata_resurrects_a_cleared_room() -> None:
    """PROTOCOL 3.1: WaitingForInput may create a room, also one that its sender has just cleared (A11)."""
    late = [
        put("P0", None, B), put("D0", None, B), put("D0", B, W),
        called("P0", "record_failure", failure_reason="Aborted by AbortReq."), put("P0", B, F), put("P0", F, None),
        metadata(), put("P0", None, W, CONTROL),
    ]  # fmt: skip
    judged = verdict(late)
    assert judged.first is None and list(judged.broken) == ["S4"]
    broken = judged.broken["S4"]
    assert broken.line == 8 and broken.event == f"P0 room {ROOM}: nothing -> WaitingForInput (by {CONTROL})"
    assert [told.line for told in broken.context] == [1, 5, 6]
    assert judged.open == [("P0", ROOM, W), ("D0", ROOM, W)]

    strict = verdict(late, "reference")
    assert rules(strict) == {"clear_leaves": 6, "identity": 7, "early_destination": 8}
    opened = next(each.first for changes, each in strict.departures.items() if changes[0].rule == "early_destination")
    assert opened.invariants == ("S4",)
    assert opened.allowed[0].startswith("DestinationRegistered: -> Announced/Unreserved [ArmDeadline]")


def test_early_metadata_is_no_resurrection() -> None:
    """The other side of the same door: decode is quicker than prefill's scheduler (P1'')."""
    events = happy()
    del events[0]
    events[2:4] = [metadata(), put("P0", None, W, CONTROL), put("P0", W, W)]
    assert verdict(events).holds


def test_the_same_room_again_is_another_attempt() -> None:
    assert verdict([*happy(), *happy()]).holds


def test_an_abort_of_decode_is_acknowledged() -> None:
    events = [
        *happy()[:5], called("D0", "record_failure", failure_reason="Aborted by AbortReq."), put("D0", W, F),
        heard("P0", "ABORT", ROOM, "127.0.0.1", 5001, 1), put("P0", W, F, CONTROL),
        called("P0", "_send_abort_ack", CONTROL, room=ROOM), heard("D0", "ABORT_ACK", ROOM, 0, 1),
        called("D0", "note_abort_ack", LISTENER, prefill_rank=0), put("P0", F, None), put("D0", F, None),
    ]  # fmt: skip
    assert verdict(events).holds
    without_abort = [event for event in events if event.get("frames", [""])[0] != "ABORT"]
    first = verdict(without_abort).first
    assert first is not None and first.line == 8 and "P0" in first.event


def test_an_abort_after_success_breaks_s3_and_is_explained() -> None:
    events = [*happy()[:12], put("P0", S, F), put("P0", F, None), put("D0", S, None)]
    judged = verdict(events)
    assert judged.first is None and list(judged.broken) == ["S3"] and judged.broken["S3"].line == 13
    assert rules(verdict(events, "reference"))["success_is_final"] == 13


def test_a_failed_transfer_reaches_decode() -> None:
    events = [
        *happy()[:7], concluded("Failed"), put("P0", W, F, WORKER), heard("D0", ROOM, 0, 0), applied(F),
        put("D0", W, F, LISTENER), put("P0", F, None), put("D0", F, None),
    ]  # fmt: skip
    assert verdict(events).holds


def test_a_worker_tells_decode_of_a_failure_that_was_decodes_own() -> None:
    """Decode aborts under a write; the worker ends later, finds the room Failed, and says so; seen on the real classes."""
    events = [
        *happy()[:7], put("D0", W, F), heard("P0", "ABORT", ROOM, "127.0.0.1", 5001, 1), put("P0", W, F, CONTROL),
        concluded(), put("P0", F, F, WORKER), heard("D0", ROOM, 0, 0), applied(F), put("D0", F, F, LISTENER),
        put("P0", F, None), put("D0", F, None),
    ]  # fmt: skip
    assert verdict(events).holds


def test_a_failure_on_record_fails_the_next_attempt() -> None:
    """conclude_transfer looks the room number up in records that clear() leaves behind; seen on the real classes."""
    first = [*happy()[:5], called("P0", "record_failure", failure_reason="Aborted by AbortReq."), put("P0", W, F),
             put("P0", F, None), put("D0", W, F), put("D0", F, None)]  # fmt: skip
    second = [*happy()[:8], put("P0", W, F, WORKER)]
    judged = verdict([*first, *second])
    assert judged.first is None and list(judged.broken) == ["S2"] and judged.broken["S2"].line == 19


def test_a_stale_success_is_another_attempts() -> None:
    """S6 of PROTOCOL 14: a status message carries no attempt, so decode believes one that was meant for the last."""
    second = [put("P0", None, B), put("D0", None, B), put("D0", B, W), metadata(), put("P0", B, W, CONTROL),
              heard("D0", ROOM, 4, 0), applied(), put("D0", W, S, LISTENER)]  # fmt: skip
    judged = verdict([*happy(), *second])
    assert judged.first is None and list(judged.broken) == ["S2"] and judged.broken["S2"].line == 22


def test_success_before_publication_breaks_s5() -> None:
    events = happy()
    del events[3:5]  # prefill never heard of any page of this room
    events[3:3] = [heard("P0", "None", "127.0.0.1"), put("P0", B, W, SCHEDULER)]
    judged = verdict(events)
    assert judged.first is not None and judged.first.line == 5
    assert "S5" in judged.broken


SPOILED: dict[str, tuple[Spoil, int]] = {
    "a put is missing": (lambda events: events.pop(4), 8),
    "metadata is missing": (lambda events: events.__setitem__(3, heard("P0", "None", "127.0.0.1")), 5),
    "success twice": (lambda events: events.insert(9, put("P0", W, S, WORKER)), 10),
    "backwards": (lambda events: events.insert(9, put("P0", S, W, WORKER)), 10),
    "from Failed to Success": (lambda events: events.__setitem__(slice(8, 8), [put("P0", W, F), put("P0", F, S)]), 10),
    "decode before prefill": (lambda events: events.insert(7, events.pop(9)), 8),
    "decode without a report": (lambda events: events.pop(10), 11),
    "success of another rank": (lambda events: events.__setitem__(10, applied(rank=3)), 11),
    "success nobody announced": (lambda events: events.pop(7), 8),
    "announced after the table": (lambda events: events.insert(8, events.pop(7)), 8),
    "no last chunk": (lambda events: events.pop(6), 7),
    "a chunk after the last": (lambda events: events.insert(7, chunk(False)), 8),
    "a chunk after the end": (lambda events: events.insert(9, chunk(False)), 10),
    "metadata before its routes": (lambda events: events.insert(2, events.pop(3)), 3),
    "a put after the clear": (lambda events: events.append(put("D0", None, S)), 15),
    "cleared twice": (lambda events: events.append(put("D0", None, None)), 15),
    "failed by a stray thread": (lambda events: events.insert(5, put("P0", W, F, "Thread-99")), 6),
    "transferring on decode": (lambda events: events.insert(5, put("D0", W, T)), 6),
    "an acknowledgement of nothing": (lambda events: events.insert(5, called("P0", "_send_abort_ack", room=ROOM)), 6),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_trace_is_found_out_where_it_is_spoiled(name: str) -> None:
    spoil, line = SPOILED[name]
    events = happy()
    spoil(events)
    first = verdict(events).first
    assert first is not None and first.line == line, first


HARMLESS: dict[str, Spoil] = {
    "openings change places": (lambda events: events.insert(0, events.pop(1))),
    "clears change places": (lambda events: events.insert(12, events.pop(13))),
    "prefill clears before decode hears": (lambda events: events.insert(9, events.pop(12))),
    "one chunk less": (lambda events: events.pop(5)),
    "metadata repeated": (lambda events: events.insert(4, metadata())),
    "the same value again": (lambda events: events.insert(9, put("P0", S, S, WORKER))),
    "the trace ends early": (lambda events: events.pop()),
    "decode's messages were not recorded": (lambda events: events.pop(9)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_may_happen_is_explained(name: str) -> None:
    events = happy()
    HARMLESS[name](events)
    assert verdict(events).holds


def test_what_the_trace_leaves_open_is_said() -> None:
    cut, silent = happy()[:-1], happy()
    del silent[9]
    assert verdict(cut).open == [("D0", ROOM, S)]
    assert verdict(silent).notes == ["messages received by D0 are not in the trace, and were taken on trust"]


def test_messages_of_the_three_backends() -> None:
    mooncake = ["17", "10.0.0.1", "5001", "10.0.0.1:7", "<80B>", "5", "", "2", "0"]
    assert message_of(mooncake, "P") == Message("metadata", 17, "10.0.0.1:5001 10.0.0.1:7", 2)
    nixl = ["NixlMsgGuard", "17", "10.0.0.1", "5001", "<36B>", "pages", "1", "3", ""]
    assert message_of(nixl, "P") == Message("metadata", 17, "10.0.0.1:5001 <36B>", 3)
    assert message_of(["KV_STATUS", "17", "0", "2", "broken"], "D") == Message("status", 17, "", 2, F)
    assert message_of(["MoriMsgGuard", "17", "4", "2", ""], "D") == Message("status", 17, "", 2, S)
    assert message_of(["ABORT_ACK", "17"], "D") == Message("abort_ack", 17, "", None)
    for frames in ([], ["None", "10.0.0.1"], ["CHUNK_READY", "17", "0"], ["17", "9", "0"], ["17"], ["²", "4", "0"]):
        assert message_of(frames, "D") == message_of(frames, "P") == Message("other")


def test_lines_are_read_or_refused_by_name() -> None:
    line = numbered([put("P0", None, B)])[0]
    assert read_line(line) == Put(0, 100.0, SCHEDULER, "P0", ROOM, None, B)
    assert isinstance(read_line(numbered([metadata()])[0]), Heard)
    for bad, cause in (
        (line[:-5], "not a JSON object"),
        ("[]", "a JSON object was expected"),
        (line.replace('"seq": 0', '"seq": true'), "needs 'seq'"),
        (line.replace('"P0"', '"X0"'), "neither prefill"),
        (line.replace(B, "Bootstraping"), "'to' is 'Bootstraping'"),
        (line.replace(str(ROOM), '"7"'), "a room is a whole number"),
        (line.replace('"frm": null, ', ""), "needs 'frm'"),
        (numbered([applied(rank=-1)])[0], "'prefill_rank' must be"),
        (numbered([applied("Sucess")])[0], "needs a 'status'"),
    ):  # fmt: skip
        with pytest.raises(TraceError, match=r"^trace:7: ") as told:
            read_line(bad, "trace:7")
        assert cause in str(told.value)


def test_a_line_out_of_order_is_bad_input() -> None:
    lines = numbered(happy())
    lines[4:6] = lines[5], lines[4]
    with pytest.raises(TraceError, match="trace:6: seq 4 comes after 5"):
        Trial(load(), Asked(), iter([line.encode() for line in lines]), "trace")()
