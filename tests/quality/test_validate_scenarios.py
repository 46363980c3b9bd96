"""The judge and the simulator agree: every recorded run is explained by its own profile, and no other's departs alone.

For every scenario and every profile that it speaks of: the recorded trace, read back line by line, is explained by
the profile that it was recorded under, and the invariants that break in it are those that broke while it ran. Under
`reference` the historical defect is named: the rule, the event, the invariant.
"""

from __future__ import annotations

import functools
import io

import pytest

from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Scenario, chosen_profile, find, load_scenario, names_available
from kvpoll.spec.protocol import load
from kvpoll.validation import Asked, Trial, Verdict

PROTOCOL = load()
SCENARIOS = {name: load_scenario(find(name), PROTOCOL) for name in names_available()}
DRAWN = "main"
"""The scenario whose faults are drawn by seed; it is ten minutes long."""

SAID = [(name, said.label) for name, scenario in SCENARIOS.items() if name != DRAWN for said in scenario.expectations]

DEFECTS = {
    "sglang-24772": ("before-sglang-24772", "setup_failure", "overwritten", "S3"),
    "sglang-34572": ("after-sglang-27028", "success_is_final", "no", "S3"),
}
"""Scenario -> profile, the rule that `reference` would have to set otherwise, its value, and what the row breaks."""


@functools.cache
def recorded(name: str, label: str) -> tuple[Outcome, tuple[bytes, ...]]:
    """A run of seed 0, and the lines of its trace."""
    scenario: Scenario = SCENARIOS[name]
    said = next(said for said in scenario.expectations if said.label == label)
    file = io.StringIO()
    outcome = Run(PROTOCOL, scenario, chosen_profile(PROTOCOL, said), 0, trace=file)()
    return outcome, tuple(line.encode() for line in file.getvalue().splitlines(keepends=True))


def verdict(lines: tuple[bytes, ...], profile: str | None = None) -> Verdict:
    return Trial(PROTOCOL, Asked(profile=profile), iter(lines), "trace")()


@pytest.mark.parametrize(("name", "label"), SAID, ids=lambda value: value)
def test_a_run_is_explained_by_its_own_profile(name: str, label: str) -> None:
    outcome, lines = recorded(name, label)
    judged = verdict(lines)
    assert judged.first is None, judged.first
    assert judged.profile == outcome.profile and judged.lines == len(lines)
    assert judged.counts == outcome.counts
    assert {name: broken.violated.t for name, broken in judged.broken.items()} == {
        name: violated.t for name, violated in outcome.violations.items()
    }


@pytest.mark.parametrize("name", DEFECTS)
def test_reference_names_the_historical_defect(name: str) -> None:
    label, rule, value, invariant = DEFECTS[name]
    _, lines = recorded(name, label)
    judged = verdict(lines, "reference")
    found = {change: each.first for changes, each in judged.departures.items() for change in changes}
    departure = next(first for change, first in found.items() if change.rule == rule)
    (change,) = departure.changes
    assert (change.needs, invariant in departure.invariants) == (value, True)
    assert () not in judged.departures, "every departure has a rule"


@pytest.mark.parametrize(("name", "label"), SAID, ids=lambda value: value)
def test_every_departure_from_reference_has_a_rule(name: str, label: str) -> None:
    outcome, lines = recorded(name, label)
    judged = verdict(lines, "reference")
    assert () not in judged.departures, judged.departures[()].first
    assert (judged.first is None) == outcome.profile.startswith("reference"), "dp_lookup is no rule of a room"
