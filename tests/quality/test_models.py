"""Every committed model under `reference`: nothing breaks, every fault is witnessed, and as many states as ever.

The numbers are pinned: when one changes, the protocol, a model or the explorer has changed, and somebody should know why.
"""

from __future__ import annotations

import pytest

from kvpoll.sim.explorer.explore import Limits, explore, replay
from kvpoll.sim.explorer.judges import NOT_JUDGED
from kvpoll.sim.explorer.model import load_model, names_available
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import SPEC_PATH, load, parse
from kvpoll.spec.source import Source

PROTOCOL = load()
STATES: dict[str, int] = {
    "bootstrap-late": 1_360,
    "bootstrap-restart": 113_672,
    "dp-one-astray": 6_469,
    "dp-plain-replicas": 1_672,
    "dp-router-override": 177_375,
    "late-write": 1_557_729,
    "notices": 6_794,
    "one-room": 61_804,
    "one-room-small": 3_890,
    "peer-restart": 11_548,
    "peer-restart-small": 9_175,
    "pipeline": 139_861,
    "pipeline-small": 4_861,
    "shared-room": 169_301,
    "shared-room-small": 1_336,
    "tp-late-mapping": 169_361,
    "tp-one-page": 71_944,
    "tp-small": 2_926,
    "two-rooms": 3_681_541,
    "two-rooms-small": 5_669,
}
UNMODELLED = {"topology_patience", "page_count", "failed_writes"}
"""Whose retries are counted together, whether both sides count the same pages, whether a transport is asked to stop:
models count neither, and their writes end when they end.
"""


def test_every_model_is_pinned() -> None:
    assert sorted(STATES) == names_available()


@pytest.mark.parametrize("name", sorted(STATES, key=lambda name: -STATES[name]))
def test_reference_holds_on_every_model(name: str) -> None:
    model = load_model(name, PROTOCOL)
    report = explore(model, PROTOCOL, PROTOCOL.profile("reference"), limits=Limits(liveness=STATES[name] < 200_000))
    assert report.complete
    assert {found: each.text for found, each in report.broken.items()} == {}
    assert report.unwitnessed == []
    assert report.safety.states == STATES[name]


def test_pages_that_are_never_at_rest_are_a_leak_all_the_same() -> None:
    """Decode that forgets who has drained asks for ever: no node is ever idle, so nobody would look at its tables."""
    text = SPEC_PATH.read_text(encoding="utf-8")
    said = 'fact = "AbortAcknowledged", to = "=", update = ["note_drain"]'
    assert text.count(said) == 1
    deaf = parse(Source("deaf.toml", text.replace(said, said.replace('"note_drain"', ""))))
    report = explore(load_model("one-room-small", deaf), deaf, deaf.profile("reference"), limits=Limits(liveness=True))
    assert report.broken["R1"].cycle
    _, replayed, _ = replay(report, report.broken["R1"], deaf, "test")
    assert "R1" in replayed.violations


def test_together_they_exercise_every_rule_that_a_profile_can_choose() -> None:
    """Rules that count seconds or retries make no difference where neither is counted."""
    exercised = {rule for name in names_available() for rule in load_model(name, PROTOCOL).exercises}
    choices = {name for name, rule in PROTOCOL.rules.items() if rule.kind == "choice"}
    assert choices - exercised == UNMODELLED


def test_every_invariant_is_judged_or_says_why_not() -> None:
    for name, invariant in INVARIANTS.items():
        assert (invariant.monitor is not None) or invariant.waits_for
        assert name not in NOT_JUDGED or NOT_JUDGED[name]
