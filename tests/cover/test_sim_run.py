"""One run from end to end: every topology serves, a trace says all that was judged, an interrupt ends it early."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from sim_stage import PROTOCOL, Played, scenario

from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import chosen_profile, find, load_scenario
from kvpoll.sim.workload import Arrival
from kvpoll.spec import trace
from kvpoll.spec.invariants import judge
from kvpoll.spec.trace import read_trace

REFERENCE = PROTOCOL.profile("reference")
HAPPY = load_scenario(find("happy"), PROTOCOL)

SHAPES = [
    (prefill_tp, decode_tp, pp, cp, mla)
    for (prefill_tp, decode_tp), (pp, cp), mla in itertools.product(
        [(1, 1), (2, 2), (2, 1), (1, 2), (4, 2)], [(1, 1), (3, 1), (1, 2), (2, 2)], [False, True]
    )
]


@pytest.mark.parametrize("prefill_tp, decode_tp, pp, cp, mla", SHAPES)
def test_every_topology_serves(prefill_tp: int, decode_tp: int, pp: int, cp: int, mla: bool) -> None:
    """Chunks, destinations, answers and dummies fit together whatever the sizes: nothing fails without a fault."""
    run = Played(f"""
[topology]
mla = {str(mla).lower()}
[topology.prefill]
count = 2
dp = 2
pp = {pp}
tp = {prefill_tp}
cp = {cp}
[topology.decode]
dp = 2
tp = {decode_tp}
[workload]
kind = "poisson"
rate_per_s = 4
input_tokens = 9000
output_tokens = 16
until_s = 3
[timing]
hostile_s = 5
grace_s = 1
quiet_s = 200
""")
    assert run.outcome.violations == {}
    assert run.outcome.succeeded == run.outcome.requests > 10
    writers = {event.components for event in run.of(trace.Committed)}
    (sizes,) = {len(components) for components in writers}
    assert sizes == pp * max(1, (1 if mla else prefill_tp // decode_tp))


RACES = ["sglang-24772", "sglang-26912", "sglang-34572", "sglang-22901", "sglang-25125", "sglang-21299"]


def recorded(name: str, label: str) -> tuple[Outcome, io.StringIO]:
    file = io.StringIO()
    read = load_scenario(find(name), PROTOCOL)
    said = read.expectation(label)
    assert said is not None
    run = Run(PROTOCOL, read, chosen_profile(PROTOCOL, said), line="kvpoll run it", trace=file)
    outcome = run()
    file.seek(0)
    return outcome, file


@pytest.mark.parametrize("name", RACES)
def test_a_trace_holds_all_that_was_judged(name: str) -> None:
    """Whoever reads the trace later finds what the run found: the same invariants, first broken at the same time."""
    label = next(said.label for said in load_scenario(find(name), PROTOCOL).expectations if said.violates)
    outcome, file = recorded(name, label)
    header, events = read_trace(file, "trace")
    found = [event for event in events if type(event) is trace.Violated]
    file.seek(0)
    again = judge(
        (event for event in read_trace(file, "trace")[1] if type(event) is not trace.Violated), PROTOCOL.bounds
    )
    assert {event.invariant for event in found} == outcome.violations.keys() != set()
    assert {name: (v.t, v.node, v.pair) for name, v in again.first.items()} == {
        name: (v.t, v.node, v.pair) for name, v in outcome.violations.items()
    }
    assert header["kvpoll_trace"] == 1
    assert (header["scenario"], header["seed"], header["repeat"]) == (name, 0, "kvpoll run it")


def test_the_digest_is_that_of_the_lines() -> None:
    with_file, file = recorded("happy", "reference")
    without = Run(PROTOCOL, HAPPY, REFERENCE, line="kvpoll run it", record=True)()
    other = Run(PROTOCOL, HAPPY, REFERENCE, line="kvpoll run another", record=True)()
    assert with_file.digest == without.digest != other.digest
    assert Run(PROTOCOL, HAPPY, REFERENCE)().digest is None
    times = [event.t for event in read_trace(file, "trace")[1]]
    assert times == sorted(times) and len(times) > 300


def test_progress_is_told_in_slices_and_changes_nothing() -> None:
    told: list[tuple[float, float]] = []
    outcome = Run(PROTOCOL, HAPPY, REFERENCE, progress=lambda done, whole: told.append((done, whole)))()
    plain = Run(PROTOCOL, HAPPY, REFERENCE)()
    whole = 5 + 1 + 4 * 0.25 + 450
    assert told[0] == (5.0, whole)
    assert told[-1] == (whole, whole)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    for name in ("violations", "requests", "succeeded", "ttft_s", "marks", "simulated_s"):
        assert getattr(outcome, name) == getattr(plain, name)


def test_an_interrupt_ends_a_run_early_and_keeps_what_there_is() -> None:
    file = io.StringIO()

    def interrupt(done: float, whole: float) -> None:
        if done > 100:
            raise KeyboardInterrupt

    outcome = Run(PROTOCOL, HAPPY, REFERENCE, progress=interrupt, trace=file)()
    assert outcome.interrupted
    assert 100 < outcome.simulated_s < 120
    assert outcome.succeeded == 8
    file.seek(0)
    assert len(list(read_trace(file, "trace")[1])) > 300


def test_arrivals_and_faults_can_be_given_instead_of_the_files_own() -> None:
    read = load_scenario(find("sglang-24772"), PROTOCOL)
    outcome = Run(PROTOCOL, read, REFERENCE, arrivals=[Arrival(0.5, 100, 1), Arrival(0.5, 200, 2)], faults=())()
    assert (outcome.requests, outcome.succeeded, outcome.faults) == (2 + read.timing.probes, 6, [])


def test_a_seed_may_be_any_text() -> None:
    """Whoever reports a run may name it."""
    outcomes = [Run(PROTOCOL, HAPPY, REFERENCE, seed, record=True)() for seed in ("friday", "friday", 5)]
    assert outcomes[0].digest == outcomes[1].digest != outcomes[2].digest


def test_without_checks_a_run_judges_nothing_and_is_the_same_otherwise() -> None:
    read = load_scenario(find("sglang-22901"), PROTOCOL)
    profile = PROTOCOL.profile("before-sglang-22901")
    checked, unchecked = Run(PROTOCOL, read, profile)(), Run(PROTOCOL, read, profile, check=False)()
    assert checked.violations != {} and unchecked.violations == {}
    for name in ("events", "causes", "ttft_s"):
        assert getattr(checked, name) == getattr(unchecked, name)


def test_the_idle_cluster_is_surveyed_once_and_completely() -> None:
    run = Played("""
[topology.prefill]
tp = 2
[topology.decode]
count = 2
[workload]
kind = "requests"
requests = [{ at_s = 1.0, input_tokens = 4000, output_tokens = 16 }]
""")
    surveyed: dict[str, Any] = {event.node: dict(event.tables) for event in run.of(trace.Surveyed)}
    assert surveyed.keys() == {"P0/tp0", "P0/tp1", "D0", "D1", "B0"}
    assert {"rooms", "requests", "timers", "kv_pages", "destinations", "askers", "by_pair"} <= surveyed["P0/tp0"].keys()
    assert {"rooms", "requests", "timers", "kv_pages", "peers", "by_pair", "aux_rows"} <= surveyed["D0"].keys()
    assert all(count == 0 for tables in surveyed.values() for count in tables.values())
    assert {event.t for event in run.of(trace.Surveyed)} == {run.outcome.simulated_s}
    assert scenario('[workload]\nkind = "synthetic"\n').timing.quiet_s == 450.0


def test_a_half_computed_prompt_goes_on_although_an_earlier_one_waits_for_its_pages() -> None:
    """Found by the stateful test: a prompt that found no pages held back the one that had them, and both waited."""
    played = Played(
        """
        [topology.prefill]
        kv_pages = 64
        skew = 0.0
        [topology.decode]
        count = 2
        [workload]
        kind = "requests"
        requests = [
          { at_s = 0.06, input_tokens = 512, output_tokens = 1 },
          { at_s = 0.08, input_tokens = 22854, output_tokens = 1 },
          { at_s = 0.1, input_tokens = 11024, output_tokens = 1 },
        ]
        [timing]
        hostile_s = 0.78125
        probes = 1
        [[fault]]
        kind = "bootstrap_late"
        target = "B0"
        at_s = 0
        for_s = 0.1
        """.replace("\n        ", "\n")
    )
    assert played.outcome.holds
    assert played.outcome.succeeded == 4
