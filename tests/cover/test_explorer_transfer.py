"""Transfer models explored to the end: how many states, what breaks and after how many moves, and which rules matter."""

from __future__ import annotations

from functools import cache

import pytest

from kvpoll.sim.explorer.explore import Counterexample, Limits, Report, explore
from kvpoll.sim.explorer.model import load_model
from kvpoll.sim.explorer.search import Search
from kvpoll.spec.protocol import Profile, load

PROTOCOL = load()
REFERENCE = PROTOCOL.profile("reference")
SGLANG = PROTOCOL.profile("sglang-0.5.23")


def explored(name: str, profile: Profile, liveness: bool | None = None) -> Report:
    return explore(load_model(name, PROTOCOL), PROTOCOL, profile, limits=Limits(liveness=liveness))


def depths(report: Report) -> dict[str, int]:
    return {name: found.depth for name, found in report.broken.items()}


def numbers(report: Report) -> tuple[int, int, int]:
    assert report.complete
    return report.safety.states, report.safety.edges, report.safety.depth


def shortest(name: str, invariant: str, liveness: bool = False) -> Counterexample:
    """The shortest counterexample under sglang-0.5.23 to one invariant, judged alone."""
    limits = Limits(until_found=True, liveness=liveness)
    return explore(load_model(name, PROTOCOL), PROTOCOL, SGLANG, only=(invariant,), limits=limits).broken[invariant]


def labels(found: Counterexample) -> list[str]:
    return [taken.outcome.label for taken in found.path]


# --- whole models -----------------------------------------------------------------------------------


def test_one_room_holds_under_reference_whatever_two_faults_there_are() -> None:
    report = explored("one-room", REFERENCE)
    assert (depths(report), report.unwitnessed) == ({}, [])
    assert report.safety.marks >= report.model.marks > {"late_landing", "pages_quarantined"}
    assert numbers(report) == (61_804, 162_807, 24)
    assert report.liveness is not None and report.liveness.states == 57_603
    assert report.exercised >= {"S1", "S3", "S4", "S5", "S6", "S9", "L1", "R1", "R2", "O1"}


def test_one_room_under_sglang_breaks_these() -> None:
    report = explored("one-room", SGLANG)
    assert numbers(report) == (22_011, 62_662, 22)
    assert depths(report) == {"L2": 6, "L1": 7, "R1": 7, "O1": 7, "S4": 8, "S3": 10, "R2": 10, "S9": 13}
    ends = {name: found.ends for name, found in report.broken.items()}
    assert ends == {
        "S3": "here", "S4": "here", "S9": "here", "R1": "idle", "O1": "idle",
        "L1": "for ever", "L2": "for ever", "R2": "for ever",
    }  # fmt: skip


def test_a_shared_room_holds_under_reference() -> None:
    report = explored("shared-room", REFERENCE, liveness=False)
    assert (depths(report), report.unwitnessed) == ({}, [])
    assert numbers(report) == (169_301, 536_868, 34)


def test_a_shared_room_under_sglang_breaks_nearly_everything() -> None:
    report = explored("shared-room", SGLANG, liveness=False)
    assert numbers(report) == (563_975, 1_871_864, 34)
    assert depths(report) == {
        "S12": 4, "S2": 5, "S4": 8, "S10": 9, "S9": 10, "S11": 10, "S3": 11, "S5": 14, "R1": 15, "O1": 15, "S1": 18,
    }  # fmt: skip


# --- races by name ----------------------------------------------------------------------------------


def test_a11_a_destination_that_comes_after_the_end_opens_the_room_again() -> None:
    """Prefill drops a request and clears its room; decode's addresses arrive and make a room that nobody owns."""
    found = shortest("one-room", "S4")
    assert found.text == "DestinationRegistered brought a cleared room back as WaitingForInput"
    assert found.depth == 8 and labels(found)[-1] == "P0 receives Metadata from D0"


def test_c6_a_failed_rank_leaves_the_other_waiting() -> None:
    """Decode fails before it has written to anybody, and nothing tells prefill."""
    found = shortest("one-room", "L2", liveness=True)
    assert found.text == "still live 2 s after it could know that D0 failed"
    assert (found.depth, found.cycle, found.ends) == (6, [], "for ever")


def test_a22_a23_two_live_requests_with_one_room_number_meet_in_the_first_scheduler() -> None:
    found = shortest("shared-room", "S12")
    assert found.text == "room 1001 (attempt 1) was opened while attempt 0 of the room was live"
    assert found.depth == 4
    assert labels(found)[-1].partition(": ")[2] in ("open q1", "open q2")


def test_c9_a01_a_page_is_given_away_while_a_failed_write_may_still_land_in_it() -> None:
    """The pool is small: the page soon belongs to another request, which then decodes what the old write left."""
    limits = Limits(liveness=False, depth=24)
    report = explore(load_model("late-write", PROTOCOL), PROTOCOL, SGLANG, only=("S1", "S5"), limits=limits)
    assert depths(report) == {"S1": 15, "S5": 24}
    assert "was not settled" in report.broken["S1"].text
    assert "expected room 1002 (attempt 0), found page 0 of room 1001" in report.broken["S5"].text
    assert any("land on D0 after all" in label for label in labels(report.broken["S5"]))


def test_a20_a_restarted_engine_hears_what_was_meant_for_its_former_life() -> None:
    found = shortest("peer-restart", "S2")
    assert found.depth == 8 and any("starts again" in label for label in labels(found))


# --- rules that matter ------------------------------------------------------------------------------


@cache
def reached(model: str, profile: str, rule: str, value: str, depth: int) -> tuple[int, int]:
    """States and moves of a model up to a depth, with one rule set otherwise (or none)."""
    chosen = PROTOCOL.profile(profile).with_rules({rule: value} if rule else {})
    seen = Search(load_model(model, PROTOCOL).build(PROTOCOL, chosen)).run(max_depth=depth)
    return seen.states, seen.edges


MATTERS = [
    ("one-room", "success_is_final", "yes", "sglang-0.5.23", 12),
    ("one-room", "setup_failure", "overwritten", "reference", 4),
    ("one-room", "early_abort", "forgotten", "reference", 6),
    ("one-room", "source_release", "proof", "sglang-0.5.23", 10),
    ("one-room", "release_requires_quiescence", "never", "reference", 6),
    ("one-room", "resend_on_reconnect", "no", "reference", 6),
    ("one-room", "deadline_clock", "wall", "reference", 4),
    ("one-room", "prefill_failure_notice", "transfer_errors_only", "reference", 7),
    ("one-room", "decode_failure_notice", "known_ranks", "reference", 4),
    ("one-room", "router_join", "waits_for_both", "reference", 8),
    ("shared-room", "duplicate_room", "rejected", "sglang-0.5.23", 5),
    ("shared-room", "identity", "room", "reference", 6),
    ("shared-room", "clear_leaves", "nothing", "reference", 5),
    ("shared-room", "illegal_fact", "fails_request", "sglang-0.5.23", 10),
    ("peer-restart", "liveness_probe", "server_health", "reference", 2),
    ("peer-restart", "route_cache", "by_address", "reference", 6),
    ("peer-restart", "identity", "room", "reference", 8),
    ("late-write", "release_requires_quiescence", "never", "reference", 10),
    ("late-write", "source_release", "proof", "sglang-0.5.23", 10),
    ("two-rooms", "clear_leaves", "nothing", "reference", 5),
    ("two-rooms", "early_destination", "opens_room", "reference", 6),
    ("two-rooms", "prefill_failure_notice", "transfer_errors_only", "reference", 7),
    ("two-rooms", "decode_bootstrap_deadline", "none", "reference", 3),
    ("two-rooms", "prefill_transfer_deadline", "none", "reference", 7),
    ("two-rooms", "router_join", "waits_for_both", "reference", 6),
]
"""(model, rule, another value, profile, the depth at which that is first seen)"""


@pytest.mark.parametrize(("model", "rule", "value", "profile", "depth"), MATTERS)
def test_every_rule_that_a_model_exercises_changes_what_can_happen(
    model: str, rule: str, value: str, profile: str, depth: int
) -> None:
    assert PROTOCOL.profile(profile)[rule] != value
    assert reached(model, profile, rule, value, depth - 1) == reached(model, profile, "", "", depth - 1)
    assert reached(model, profile, rule, value, depth) != reached(model, profile, "", "", depth)


def test_no_exercised_rule_is_left_out_above() -> None:
    models = {row[0] for row in MATTERS}
    listed = {(name, rule) for name in models for rule in load_model(name, PROTOCOL).exercises}
    assert {row[:2] for row in MATTERS} == listed
