"""Every known race is found, looks as its report said, and does not happen under the reference.

The first test runs each scenario under each profile that it speaks of and compares all that its file says. The
stories after it assert what an engineer would have *seen*: who addressed whom, which gauge stood still, what the
client was told. One sentence of history each; `sim/scenarios/` tells them at length.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from kvpoll.sim.faults import draw_faults
from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Expectation, Scenario, chosen_profile, find, load_scenario, names_available
from kvpoll.sim.workload import Arrival
from kvpoll.spec import trace
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import Pair

PROTOCOL = load()
SCENARIOS = {name: load_scenario(find(name), PROTOCOL) for name in names_available()}
DRAWN = "main"
"""The scenario whose faults are drawn by seed; it is ten minutes long and has tests of its own."""

SAID = [(name, said) for name, scenario in SCENARIOS.items() if name != DRAWN for said in scenario.expectations]


class Played(NamedTuple):
    """A run that was watched: what came of it, and every event in order."""

    outcome: Outcome
    events: list[Any]

    def of(self, event_type: type[Any], /, **fields: Any) -> list[Any]:
        """Events of one type whose fields have these values."""
        return [
            event
            for event in self.events
            if type(event) is event_type and all(getattr(event, name) == value for name, value in fields.items())
        ]

    def admitted(self, rid: str) -> trace.Admitted:
        admitted: trace.Admitted
        (admitted,) = self.of(trace.Admitted, rid=rid)
        return admitted

    def resulted(self, rid: str) -> trace.Resulted:
        resulted: trace.Resulted
        (resulted,) = self.of(trace.Resulted, rid=rid)
        return resulted

    def ttft_s(self, rid: str) -> float:
        ttft_s = self.resulted(rid).ttft_s
        assert ttft_s is not None, f"{rid} failed"
        return ttft_s

    def of_pair(self, event_type: type[Any], pair: Pair, /, **fields: Any) -> list[Any]:
        """Events of one type about the incarnations of one request."""
        return [event for event in self.of(event_type, **fields) if event.incarnation.pair == pair]

    def polls(self, node: str, pair: Pair) -> list[str]:
        """The polls that a node went through for one request, from Absent on."""
        steps = self.of_pair(trace.Stepped, pair, node=node)
        return ["Absent", *(step.poll_after for step in steps if step.poll_after != step.poll_before)]

    def left(self) -> dict[str, dict[str, int]]:
        """What the survey of the idle cluster found, by node; empty tables are left out."""
        found = {event.node: {name: n for name, n in event.tables if n} for event in self.of(trace.Surveyed)}
        return {node: tables for node, tables in found.items() if tables}

    def length(self, node: str, queue: str, until_s: float) -> int:
        """How many requests stood in a queue at a time."""
        return sum(event.delta for event in self.of(trace.Queued, node=node, queue=queue) if event.t <= until_s)

    def gauge(self, queue: str) -> dict[str, int]:
        """What a queue gauge says at the end, by node, counted from what entered and left."""
        counts: Counter[str] = Counter()
        for event in self.of(trace.Queued, queue=queue):
            counts[event.node] += event.delta
        return dict(counts)


def expectation(name: str, label: str) -> Expectation:
    (said,) = [said for said in SCENARIOS[name].expectations if said.label == label]
    return said


@functools.cache
def play(name: str, label: str) -> Played:
    """One scenario under one of its profiles, at seed 0."""
    return play_changed(SCENARIOS[name], expectation(name, label))


def play_changed(scenario: Scenario, said: Expectation, **fields: Any) -> Played:
    """A scenario with something changed; ``fields`` are further fields of Run."""
    events: list[Any] = []
    return Played(Run(PROTOCOL, scenario, chosen_profile(PROTOCOL, said), collect=events, **fields)(), events)


# ------------------------------------------------------------------------------- what the scenario files say


@pytest.mark.parametrize("name, said", SAID, ids=[f"{name}: {said.label}" for name, said in SAID])
def test_a_race_is_exactly_what_its_file_says(name: str, said: Expectation) -> None:
    outcome, events = play(name, said.label)
    assert sorted(outcome.violations) == sorted(said.violates)
    assert set(said.shows) <= set(outcome.violations)
    assert [mark for mark in said.marks if not outcome.marks.get(mark)] == []
    assert [cause for cause in said.causes if not outcome.causes.get(cause)] == []
    assert outcome.unfired == []
    assert not outcome.interrupted
    assert outcome.requests == len([event for event in events if type(event) is trace.Admitted]) > 0


def test_every_race_breaks_somewhere_and_the_reference_holds_everywhere() -> None:
    """Otherwise the test above could pass because every file expects nothing."""
    broken = {name for name, said in SAID if said.violates}
    assert broken == {name for name in SCENARIOS if SCENARIOS[name].race is not None}
    assert {said.violates for name, said in SAID if said.profile == "reference"} == {()}
    assert {name for name, said in SAID if said.profile == "reference"} == SCENARIOS.keys() - {DRAWN}


# ----------------------------------------------------------------------------------------------------- #24772


def test_24772_before_the_receiver_is_revived_without_a_route() -> None:
    """sglang#24772: the set-up call returned early with bootstrap_infos = None and WaitingForInput stored."""
    run = play("sglang-24772", "before-sglang-24772")
    pair = run.admitted("r0").pair
    assert run.polls("D0", pair) == ["Absent", "Bootstrapping", "Failed", "WaitingForInput"]
    (revival,) = run.of_pair(trace.Stepped, pair, node="D0", fact="SetupFinished")
    assert (revival.poll_before, revival.poll_after, revival.cause) == ("Failed", "WaitingForInput", "route_refused")
    assert run.outcome.violations["S3"].t == revival.t
    (illegal,) = run.of(trace.IllegalFactRaised)
    assert (illegal.node, illegal.fact, illegal.state) == ("D0", "MetadataSent", "WaitingForInput")
    assert illegal.incarnation.pair == pair
    assert illegal.t > revival.t
    (stopped,) = run.of(trace.LoopStopped)
    assert (stopped.node, stopped.loop, stopped.t) == ("D0", "scheduler", illegal.t)
    assert run.of_pair(trace.Addressed, pair) == []
    assert run.left() == {"D0": {"rooms": 1, "requests": 1, "kv_pages": 8, "by_pair": 1, "aux_rows": 1}}
    assert run.of(trace.Resulted) == []  # the client of r0 and every later one waits


def test_24772_after_the_receiver_stays_failed_and_nothing_is_left() -> None:
    """sglang#24772 as merged: a set-up that failed returns before WaitingForInput is stored."""
    run = play("sglang-24772", "after-sglang-24772")
    pair = run.admitted("r0").pair
    assert run.polls("D0", pair) == ["Absent", "Bootstrapping", "Failed", "Absent"]
    causes = {step.cause for step in run.of_pair(trace.Stepped, pair, node="D0") if step.poll_after == "Failed"}
    assert causes == {"route_refused"}
    assert run.of_pair(trace.Addressed, pair) == []
    assert run.of_pair(trace.Reserved, pair) == []
    assert run.of(trace.IllegalFactRaised) == []
    assert run.of(trace.LoopStopped) == []
    assert run.left() == {}
    assert run.outcome.succeeded == SCENARIOS["sglang-24772"].timing.probes


def test_24772_reference_tells_the_client_at_once() -> None:
    """The router sees the crash for itself and cancels decode's leg before its set-up is over."""
    run = play("sglang-24772", "reference")
    pair = run.admitted("r0").pair
    assert run.polls("D0", pair)[:3] == ["Absent", "Bootstrapping", "Failed"]
    assert "WaitingForInput" not in run.polls("D0", pair)
    assert run.of_pair(trace.Addressed, pair) == []
    assert run.left() == {}
    assert not run.resulted("r0").ok
    assert run.resulted("r0").t - run.admitted("r0").t < 0.1


# ------------------------------------------------------------------------------------------ #26912 and #34572

BOOTSTRAP_QUEUE = "num_prefill_bootstrap_queue_reqs"
STAGES = [f"P0/pp{stage}" for stage in range(4)]


def test_26912_before_the_gauge_of_later_stages_never_comes_back() -> None:
    """sglang#26912: three aborted requests stood in num_prefill_bootstrap_queue_reqs of PP1 to PP3 until restart."""
    run = play("sglang-26912", "before-sglang-27028")
    assert run.gauge(BOOTSTRAP_QUEUE) == {"P0/pp0": 0, "P0/pp1": 3, "P0/pp2": 3, "P0/pp3": 3}
    last = max(event.t for event in run.of(trace.Queued))
    (survey, *_) = run.of(trace.Surveyed)
    assert survey.t - last > 400  # no traffic for minutes, and still there
    assert run.outcome.causes == {"client_left": 3}
    reported = {event.node: dict(event.gauges)[BOOTSTRAP_QUEUE] for event in run.of(trace.Surveyed) if event.gauges
                and event.node in STAGES}  # fmt: skip
    assert reported == {"P0/pp0": 0.0, "P0/pp1": 3.0, "P0/pp2": 3.0, "P0/pp3": 3.0}


@pytest.mark.parametrize("label", ["after-sglang-27028", "reference"])
def test_26912_after_every_stage_is_back_at_zero(label: str) -> None:
    """sglang#27028: every stage drops what has failed locally (now: what stage 0 says has failed)."""
    run = play("sglang-26912", label)
    assert run.gauge(BOOTSTRAP_QUEUE) == dict.fromkeys(STAGES, 0)
    assert run.outcome.causes == {"client_left": 3}
    assert run.left() == {}


def test_34572_after_the_pipeline_splits_before_anything_hangs() -> None:
    """sglang#31030, #34572: the drain of #27028 lets a stage drop what stage 0 goes on to compute (A03)."""
    run = play("sglang-34572", "after-sglang-27028")
    first = {name: violated.t for name, violated in run.outcome.violations.items()}
    assert "L1" in first
    assert first["S7"] < min(t for name, t in first.items() if name not in ("S3", "S7"))  # S3: another wart of today
    mismatch = run.of(trace.Marked, mark="pipeline_mismatch")[0]
    here = run.of(trace.CollectiveEntered, kind="forward", node=mismatch.node)[-1]
    assert here.t == mismatch.t
    rids = {event.pair: event.rid for event in run.of(trace.Admitted)}
    missed = next(rids[c.incarnation.pair] for c in run.of(trace.Computed, node="P0/pp0") if c.t > mismatch.t)
    assert missed not in here.shape
    (dropped,) = run.of(trace.Decided, node=mismatch.node, rid=missed)
    assert dropped.outcome == "drop"  # what stage 0 has admitted and computes
    assert dropped.t <= mismatch.t
    assert run.of(trace.Decided, node="P0/pp0", rid=missed)[0].outcome == "admit"
    later = [event for event in run.of(trace.Resulted) if event.t > mismatch.t + 1]
    assert later != []
    assert not any(event.ok for event in later)


def test_34572_reference_satisfies_both_at_once() -> None:
    """R1 and O1 pull one way, S7 the other: the reference has to hold all three in both scenarios."""
    storm, aborts = play("sglang-34572", "reference"), play("sglang-26912", "reference")
    for run in (storm, aborts):
        assert run.outcome.violations == {}
        assert run.gauge(BOOTSTRAP_QUEUE) == dict.fromkeys(STAGES, 0)
        assert run.left() == {}
    assert "pipeline_mismatch" not in storm.outcome.marks
    assert storm.outcome.marks["fault:abort_storm"] > 20  # it really was a storm
    assert storm.outcome.succeeded > 50


# ----------------------------------------------------------------------------------------------------- #22901


def test_22901_before_decode_addresses_a_rank_that_has_no_request() -> None:
    """sglang#22901: the router had chosen DP 2, decode derived room mod 4; both sides hung to their timeouts."""
    run = play("sglang-22901", "before-sglang-22901")
    admitted = run.admitted("r1")
    (pair, (right,)) = admitted.pair, admitted.prefill
    (addressed,) = run.of_pair(trace.Addressed, pair)
    assert addressed.peer == f"P0/dp{pair[0] % 4}" != right
    ends = [
        (step.node, step.fact, step.detail, round(step.t - admitted.t, 1))
        for step in run.of_pair(trace.Stepped, pair)
        if step.poll_after == "Failed" != step.poll_before
    ]
    assert ends == [  # the right rank's own timeout; the router then cancels decode, and decode the wrong rank
        (right, "DeadlineReached", "bootstrap", 300.0),
        ("D0", "AbortRequested", "bootstrap_timeout", 300.0),
        (addressed.peer, "PeerAborted", 0, 300.0),
    ]
    assert not run.resulted("r1").ok
    assert run.resulted("r1").t - admitted.t > 300
    assert run.left() == {addressed.peer: {"rooms": 1, "destinations": 1, "askers": 1}}


@pytest.mark.parametrize("label", ["after-sglang-22901", "reference"])
def test_22901_after_the_client_is_told_both_ranks_and_the_switch(label: str) -> None:
    """sglang#22901 as merged: the rank that decode will not find says so, and names the environment switch."""
    run = play("sglang-22901", label)
    admitted, resulted = run.admitted("r1"), run.resulted("r1")
    assert not resulted.ok
    assert resulted.t - admitted.t < 0.1
    ran, derived = admitted.prefill[0].removeprefix("P0/dp"), admitted.pair[0] % 4
    assert resulted.cause == (
        f"dp_conflict: runs on dp {ran}, decode will look on dp {derived}; route by room or set dp_lookup = query"
    )
    assert run.resulted("r0").ok
    assert run.resulted("r2").ok
    assert run.left() == {}


@pytest.mark.parametrize("label", ["after-sglang-22901 (query)", "reference (query)"])
def test_22901_query_pays_a_round_trip_and_succeeds(label: str) -> None:
    """The switch of sglang#22901: decode asks the bootstrap server, at the price of the added HTTP round trip."""
    name, alone = "sglang-22901", [Arrival(1.0, 4000, 16)]  # alone: nobody else's decode step hides the trip
    asking = play_changed(SCENARIOS[name], expectation(name, label), arrivals=alone)
    deriving = play_changed(SCENARIOS[name], expectation(name, "reference"), arrivals=alone, faults=())
    (addressed,) = asking.of_pair(trace.Addressed, asking.admitted("r0").pair)
    assert (addressed.peer,) == asking.admitted("r0").prefill
    assert asking.admitted("r0").prefill != deriving.admitted("r0").prefill  # the router overrode the room
    http_s = SCENARIOS[name].topology.http_latency_s
    assert http_s <= asking.ttft_s("r0") - deriving.ttft_s("r0") < 0.05
    assert deriving.of(trace.Requested, route="POST /query_dp_ranks") == []
    assert asking.of(trace.Requested, route="POST /query_dp_ranks") != []
    assert play(name, label).outcome.succeeded == play(name, label).outcome.requests


def test_29725_plain_replicas_were_refused_although_decode_finds_them() -> None:
    """sglang#29725 (B41): the check of #22901 compared room mod dp with the attention-DP rank, always 0 here."""
    run = play("sglang-29725", "sglang-0.5.23")
    refused = {event.rid for event in run.of(trace.Resulted) if not event.ok}
    assert refused == {event.rid for event in run.of(trace.Admitted) if event.prefill == ("P0/dp1",)}
    assert len(refused) == 4
    for rid in refused:
        told = run.resulted(rid).cause
        assert str(told).startswith("dp_conflict: runs on dp 0, decode will look on dp 1;")
        assert {step.peer for step in run.of_pair(trace.Addressed, run.admitted(rid).pair)} == {"P0/dp1"}


def test_29725_the_switch_that_the_error_names_makes_it_worse() -> None:
    """B41: with the query switch every replica registers as rank 0, and decode is sent to the wrong one."""
    run = play("sglang-29725", "sglang-0.5.23 (query)")
    misled = [event for event in run.of(trace.Admitted) if event.prefill == ("P0/dp1",)]
    assert len(misled) == 4
    for admitted in misled:
        assert {step.peer for step in run.of_pair(trace.Addressed, admitted.pair)} == {"P0/dp0"}
        assert run.resulted(admitted.rid).cause == "bootstrap_timeout"


@pytest.mark.parametrize("label", ["reference", "reference (query)"])
def test_29725_reference_has_one_notion_of_rank(label: str) -> None:
    """One definition for check, registration and lookup: every request finds its replica."""
    run = play("sglang-29725", label)
    assert run.outcome.succeeded == run.outcome.requests
    for admitted in run.of(trace.Admitted):
        assert {step.peer for step in run.of_pair(trace.Addressed, admitted.pair)} == set(admitted.prefill)


# ------------------------------------------------------------------------------------------ #25125 and C1


def late(label: str, lateness_s: float) -> Played:
    """sglang-25125 with a server that listens after ``lateness_s``; two requests long after that."""
    scenario = SCENARIOS["sglang-25125"]
    (fault,) = scenario.faults
    scenario = dataclasses.replace(
        scenario,
        faults=(dataclasses.replace(fault, for_s=lateness_s),),
        timing=dataclasses.replace(scenario.timing, hostile_s=lateness_s + 90.0),
        workload=lambda chance, until_s: [],
    )
    return play_changed(scenario, expectation("sglang-25125", label))


def registrations(run: Played, node: str) -> list[float]:
    return [event.t for event in run.of(trace.Requested, node=node, route="PUT /route")]


@pytest.mark.parametrize("lateness_s", [0.1, 3.0, 8.0, 60.0])
def test_25125_before_one_refusal_is_for_ever(lateness_s: float) -> None:
    """sglang#25125: a rank that was refused once never registered, the server said 503, and health said OK."""
    run = late("before-sglang-25125", lateness_s)
    assert {"L1", "L4", "O2"} <= run.outcome.violations.keys()
    assert [len(registrations(run, f"P0/tp{tp}")) for tp in (0, 1)] == [1, 1]
    assert {event.status for event in run.of(trace.Answered, route="GET /route")} == {503}
    assert run.outcome.succeeded == 0
    assert {event.healthy for event in run.of(trace.HealthReported, node="P0")} == {True}


@pytest.mark.parametrize("label", ["after-sglang-25125", "reference"])
@pytest.mark.parametrize("lateness_s", [0.1, 3.0, 8.0, 11.0])
def test_25125_after_a_late_server_is_met_by_the_back_off(label: str, lateness_s: float) -> None:
    """sglang#25125 as merged: five attempts, one, two, four and eight seconds apart, less a jitter of a quarter."""
    run = late(label, lateness_s)
    assert run.outcome.violations == {}
    assert run.outcome.succeeded == run.outcome.requests == 4
    for node in ("P0/tp0", "P0/tp1"):
        times = registrations(run, node)
        assert times[-2] < lateness_s <= times[-1]
        refused_s = 0.0015  # the answer that starts the wait takes this long at most
        waits = [later - earlier for earlier, later in pairwise(times)]
        for wait, nominal in zip(waits, (1.0, 2.0, 4.0, 8.0), strict=False):
            assert 0.75 * nominal <= wait <= nominal + refused_s


def test_25125_after_five_refusals_it_serves_unregistered() -> None:
    """What the merged retry leaves open: exhausted, the rank logs an error and serves nobody (O2, L4)."""
    run = late("after-sglang-25125", 60.0)
    assert {"L1", "L4", "O2"} <= run.outcome.violations.keys()
    assert [len(registrations(run, f"P0/tp{tp}")) for tp in (0, 1)] == [5, 5]
    assert {event.healthy for event in run.of(trace.HealthReported, node="P0")} == {True}
    assert run.outcome.succeeded == 0


def test_25125_reference_says_so_and_recovers() -> None:
    """Exhausted is not the end: report unhealthy, try every thirty seconds, and be healthy again when registered."""
    run = late("reference", 60.0)
    assert run.outcome.violations == {}
    assert run.outcome.succeeded == 4
    said = [(event.healthy, event.able) for event in run.of(trace.HealthReported, node="P0")]
    assert said[0] == (False, False)
    assert said[-1] == (True, True)
    recovered = next(event.t for event in run.of(trace.HealthReported, node="P0") if event.healthy)
    assert 60.0 < recovered <= 60.0 + 30.1
    for node in ("P0/tp0", "P0/tp1"):
        times = registrations(run, node)
        assert [round(later - earlier) for earlier, later in pairwise(times[5:])] == [30]


def test_c1_a_repeated_put_is_counted_twice() -> None:
    """C1, the neighbour of sglang#25125: readiness counted PUTs, so a retry made the server ready without tp1."""
    run = play("bootstrap-double-put", "sglang-0.5.23")
    (said,) = run.of(trace.HealthReported, node="B0")
    assert (said.healthy, said.able) == (True, False)
    assert run.of(trace.Answered, node="P0/tp1", status=200)[0].t > said.t  # it registers only later
    asked = run.of(trace.Answered, route="GET /route")
    assert {event.node for event in asked if event.status == 404} == {"D0/tp1"}
    assert not run.resulted("r0").ok


def test_c1_reference_is_ready_when_every_rank_is_there() -> None:
    """Ready is a set of ranks: decode waits on 503 until tp1 is in it, and the request succeeds."""
    run = play("bootstrap-double-put", "reference")
    (said,) = run.of(trace.HealthReported, node="B0")
    assert (said.healthy, said.able) == (True, True)
    statuses = {event.status for event in run.of(trace.Answered, route="GET /route")}
    assert statuses == {200, 503}
    assert run.resulted("r0").ok


# ----------------------------------------------------------------------------------------------------- #21299


PREALLOCATION, TRANSFER = "num_decode_prealloc_queue_reqs", "num_decode_transfer_queue_reqs"
DECODE_RANKS = [f"D0/tp{tp}" for tp in range(4)]


def shapes(run: Played, group: str) -> dict[int, set[tuple[str, Any]]]:
    """What the ranks of a group brought to each of their collectives."""
    brought: dict[int, set[tuple[str, Any]]] = {}
    for event in run.of(trace.CollectiveEntered, group=group):
        brought.setdefault(event.sequence, set()).add((event.kind, event.shape))
    return brought


def test_21299_before_the_queues_of_the_ranks_differ_and_the_group_hangs() -> None:
    """sglang#21299 (#21297, #21680): each rank queued a request when it had itself learned the DP rank."""
    run = play("sglang-21299", "before-sglang-21299")
    (mismatch,) = run.of(trace.Marked, mark="collective_mismatch")
    assert run.outcome.violations["S7"].t == mismatch.t
    brought = shapes(run, "D0/dp0")
    differing = [sequence for sequence, seen in brought.items() if len(seen) > 1]
    assert differing == [max(brought)]  # no collective of the group completes after it
    last = run.of(trace.CollectiveEntered, group="D0/dp0", sequence=max(brought) - 1)
    assert {event.node for event in last} == set(DECODE_RANKS)
    lengths = {event.node: run.length(event.node, PREALLOCATION, event.t) for event in last}
    assert len(set(lengths.values())) > 1
    assert not any(event.ok for event in run.of(trace.Resulted) if event.t > mismatch.t + 1)
    assert run.outcome.violations["L1"].t > mismatch.t


@pytest.mark.parametrize("label", ["after-sglang-21299", "reference"])
def test_21299_after_every_rank_queues_the_same_requests_in_the_same_order(label: str) -> None:
    """sglang#21299 as merged: queued at once on every rank, set up later, so that queues move in step."""
    run = play("sglang-21299", label)
    assert all(len(seen) == 1 for seen in shapes(run, "D0/dp0").values())
    moves = {
        node: [(event.queue, event.rid, event.delta) for event in run.of(trace.Queued, node=node)]
        for node in DECODE_RANKS
    }
    assert len(moves["D0/tp0"]) >= 6 * run.outcome.requests
    first, *others = ([move for move in moves[node] if move[0] in (PREALLOCATION, TRANSFER)] for node in DECODE_RANKS)
    assert others == [first] * 3
    resolved = [len(run.of(trace.Stepped, node=node, fact="SetupFinished")) for node in DECODE_RANKS]
    assert resolved == [run.outcome.requests] * 4
    assert run.outcome.succeeded == run.outcome.requests == 40


# --------------------------------------------------------------------------------- faults drawn by a seed


@functools.cache
def minute(profile: str, seed: int) -> Outcome:
    """A minute of `main` with one fault of every kind."""
    scenario = SCENARIOS[DRAWN]
    scenario = dataclasses.replace(scenario, timing=dataclasses.replace(scenario.timing, hostile_s=60.0))
    faults = tuple(draw_faults(random.Random(f"{seed}/draw"), scenario.topology, 60.0))
    return Run(PROTOCOL, scenario, PROTOCOL.profile(profile), seed, faults=faults)()


@pytest.mark.parametrize("seed", [0, 1])
def test_reference_holds_under_one_fault_of_every_kind(seed: int) -> None:
    outcome = minute("reference", seed)
    assert outcome.violations == {}
    assert outcome.requests > 100
    assert outcome.succeeded > 20
    assert len(outcome.faults) - len(outcome.unfired) >= 20


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_faults_break_what_sglang_ships(seed: int) -> None:
    """The invariants are not blind: on the same seeds they see safety violations of today's protocol."""
    outcome = minute("sglang-0.5.23", seed)
    assert [name for name in outcome.violations if name.startswith("S")] != []
    assert "L1" in outcome.violations


# ------------------------------------------------------------------------------------------- determinism

REPEATED: Sequence[tuple[str, str]] = [
    ("sglang-34572", "after-sglang-27028"),
    ("sglang-21299", "reference"),
    ("sglang-25125", "reference"),
]

IN_A_FRESH_PROCESS = """
import sys
sys.path[:0] = {path!r}
from test_races import digest
print(digest({name!r}, {label!r}))
"""


def digest(name: str, label: str, seed: int = 0) -> str:
    """sha256 of every byte of a run's trace."""
    profile = chosen_profile(PROTOCOL, expectation(name, label))
    found = Run(PROTOCOL, SCENARIOS[name], profile, seed, record=True)().digest
    assert found is not None
    return found


@pytest.mark.parametrize("name, said", SAID, ids=[f"{name}: {said.label}" for name, said in SAID])
def test_watching_a_run_changes_nothing(name: str, said: Expectation) -> None:
    """What nobody records is left out of the stream; what an invariant needs may not be (S12, R2)."""
    alone = Run(PROTOCOL, SCENARIOS[name], chosen_profile(PROTOCOL, said))()
    watched = play(name, said.label).outcome
    for seen in ("violations", "counts", "marks", "causes", "ttft_s", "events"):
        assert getattr(alone, seen) == getattr(watched, seen), seen


@pytest.mark.parametrize("name, label", REPEATED)
def test_a_repeat_is_byte_identical(name: str, label: str) -> None:
    assert digest(name, label) == digest(name, label)
    assert digest(name, label, seed=1) != digest(name, label)


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_a_fresh_process_with_other_hashes_writes_the_same_bytes(hash_seed: str) -> None:
    name, label = REPEATED[0]
    code = IN_A_FRESH_PROCESS.format(path=[os.path.dirname(__file__)], name=name, label=label)  # noqa: PTH120
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(name, label)
