"""The protocol itself, on every driver that runs it: the simulator, and real processes over each transport.

A story is a scenario under a profile, with what its file expects of it. No story asks which driver plays it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Scenario, find, load_scenario
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import Committed
from kvpoll.staging import Staging

PROTOCOL = load()
SPEED = 20.0
"""Slow enough that a busy machine does not make a rank late for two heartbeats of 2 s."""
ENGINES = {"mooncake": "mooncake", "nixl": "nixl_cu12"}
"""Transports that need a package, and the package."""

Play = Callable[[Scenario, str, list[Any]], Outcome]


def simulated(scenario: Scenario, profile: str, events: list[Any]) -> Outcome:
    return Run(PROTOCOL, scenario, PROTOCOL.profile(profile), collect=events)()


def staged(transport: str) -> Play:
    def play(scenario: Scenario, profile: str, events: list[Any]) -> Outcome:
        chosen = PROTOCOL.profile(profile)
        return Staging(PROTOCOL, scenario, chosen, speed=SPEED, transport=transport, collect=events)()

    return play


@pytest.fixture(params=["simulator", "shm", "tcp", "mooncake", "nixl"])
def play(request: pytest.FixtureRequest) -> Play:
    """A driver of the protocol. An engine that is not installed skips; `kvpoll doctor` says how to get it."""
    name = request.param
    if name in ENGINES and importlib.util.find_spec(ENGINES[name]) is None:
        pytest.skip(f"the transport {name} is not installed: pip install 'kvpoll[{name}]'")
    return simulated if name == "simulator" else staged(name)


def scenario(name: str) -> Scenario:
    """A scenario with one probe, and no longer a quiet time than the tombstones of `reference` need."""
    found = load_scenario(find(name), PROTOCOL)
    return dataclasses.replace(found, timing=dataclasses.replace(found.timing, probes=1, quiet_s=160.0))


STORIES = [
    ("happy", "reference"),
    ("sglang-24772", "before-sglang-24772"),
    ("sglang-24772", "reference"),
]


@pytest.mark.parametrize(("name", "profile"), STORIES)
def test_a_story_ends_as_its_file_says(play: Play, name: str, profile: str) -> None:
    story, events = scenario(name), []
    expected = story.expectation(profile)
    violates, shows, marks = ((), (), ()) if expected is None else (expected.violates, expected.shows, expected.marks)
    outcome = play(story, profile, events)
    assert set(shows) <= set(outcome.violations) <= set(violates)
    assert set(marks) <= set(outcome.marks)
    assert outcome.unfired == []
    committed = [event for event in events if isinstance(event, Committed)]
    assert len(committed) >= outcome.succeeded
    for event in committed:  # what really was in the pages, read back
        assert event.row_pair == event.incarnation.pair
        for part, page in enumerate(event.contents):
            assert {name: (tag.pair, tag.part) for name, tag in page.items()} == dict.fromkeys(
                event.components, (event.incarnation.pair, part)
            )
