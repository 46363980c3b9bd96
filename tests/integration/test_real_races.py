"""The founding races on real processes: SIGKILL, real sockets and real pages give the verdicts of the simulator."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import pytest
from real_cluster import protocol

from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Expectation, Scenario, find, load_scenario
from kvpoll.staging import Staging

RACES: Final = ["sglang-24772", "sglang-26912", "sglang-34572", "sglang-22901", "sglang-25125", "sglang-21299"]

BROKEN_SPEED: Final = 40.0
MENDED_SPEED: Final = 12.0
MENDED_RULES: Final = {"register_backoff_first_s": 3, "heartbeat_interval_s": 6}
"""Under old rules a run ends with minutes of waiting for deadlines. Under mended ones nothing may go wrong, not even
because a process had to wait for a core: time runs slower, and a server that starts and a peer that answers are given a
second of the wall. One HTTP call has that under any rules.
"""

ANYWAY: Final = {
    # Metadata meets a room that has just been cleared (A11).
    ("sglang-34572", "after-sglang-27028"): {"S4"},
    # Each stage drops what has failed with itself, in the order in which the aborts have reached it (S7, A03).
    ("sglang-26912", "after-sglang-27028"): {"S7"},
    # Decode has published to the rank that it derived before it hears that another one refused the request: the
    # metadata opens a room there that nobody owns, and nobody clears (A11, B49).
    ("sglang-22901", "after-sglang-22901"): {"R1", "R2"},
}
"""What rules of SGLang 0.5.23 may break besides in these races. The simulator orders the messages concerned one way,
since its scenarios give every message the same time; between real processes either order happens.
"""


@pytest.mark.parametrize("race", RACES)
def test_a_race_has_the_verdicts_of_the_simulator_on_real_processes(race: str) -> None:
    """All rules of one race at once: old ones break what the scenario says, mended ones and reference nothing."""
    scenario = load_scenario(find(race), protocol())
    with ThreadPoolExecutor(len(scenario.expectations)) as pool:
        outcomes = list(pool.map(lambda expectation: stage(scenario, expectation), scenario.expectations))
    for expectation, real in zip(scenario.expectations, outcomes, strict=True):
        simulated = simulate(scenario, expectation)
        seen = {name: violated.text for name, violated in real.violations.items()}
        where = f"{race} under {expectation.label}: {seen}"
        assert real.unfired == [], where
        assert set(expectation.shows) <= simulated.violations.keys()
        assert set(expectation.shows) <= seen.keys(), where
        assert seen.keys() <= {*expectation.violates, *ANYWAY.get((race, expectation.label), ())}, where
        assert simulated.violations.keys() <= set(expectation.violates)
        assert set(expectation.causes) <= real.causes.keys(), real.causes


def stage(scenario: Scenario, expectation: Expectation) -> Outcome:
    """The race on real processes under these rules."""
    is_broken = expectation.profile.startswith("before")
    speed = BROKEN_SPEED if is_broken else MENDED_SPEED
    if scenario.name == "sglang-22901" and not is_broken:
        speed *= 2  # rooms that nobody clears keep the cluster from its rest
    if scenario.name == "sglang-34572" and expectation.violates:
        # Here the race is between messages and a computation, so their ratio must be near that of a real engine; and
        # it is over when the storm is.
        scenario = replace(scenario, timing=replace(scenario.timing, grace_s=2.0, probes=1, quiet_s=10.0))
        speed = scenario.timing.real_speed
    rules = {**expectation.rules, "http_timeout_s": max(5.0, speed), **({} if is_broken else MENDED_RULES)}
    profile = protocol().profile(expectation.profile).with_rules(rules)
    return Staging(protocol(), scenario, profile, speed=speed, rules=rules, base=expectation.profile)()


def simulate(scenario: Scenario, expectation: Expectation) -> Outcome:
    """The same in virtual time."""
    profile = protocol().profile(expectation.profile).with_rules(dict(expectation.rules))
    return Run(protocol(), scenario, profile)()
