"""Ranks in lockstep: collectives that really block, turns taken together, and schedulers that sleep for nothing."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from sim_stage import PROTOCOL, Played, Stage

from kvpoll.sim.group import Collectives, Turns, Waiting
from kvpoll.sim.run import Run
from kvpoll.sim.scenario import find, load_scenario
from kvpoll.spec.trace import CollectiveEntered

HAPPY = load_scenario(find("happy"), PROTOCOL)


class Ranks:
    """Ranks of one group that enter collectives one after the other, as told."""

    def __init__(self, stage: Stage, size: int) -> None:
        self.stage = stage
        self.collectives = Collectives(stage.world, "G", size)
        self.returned: list[tuple[float, int, Any]] = []

    def enter(self, index: int, after_s: float, *calls: tuple[str, Any, Any]) -> None:
        self.stage.world.env.process(self._enter(index, after_s, calls))

    def _enter(self, index: int, after_s: float, calls: tuple[tuple[str, Any, Any], ...]) -> Waiting:
        yield self.stage.world.env.timeout(after_s)
        for kind, shape, payload in calls:
            result = yield from self.collectives.enter(index, f"G/tp{index}", kind, shape, payload)
            self.returned.append((self.stage.world.now, index, result))


def test_a_collective_completes_when_the_last_rank_has_entered() -> None:
    ranks = Ranks(Stage(), 3)
    for index, after_s in ((0, 3.0), (1, 1.0), (2, 2.0)):
        ranks.enter(index, after_s, ("step", "fixed", f"from {index}"))
    ranks.stage.until(10)
    payloads = ["from 0", "from 1", "from 2"]
    assert sorted(ranks.returned) == [(3.0, index, payloads) for index in range(3)]
    entered = ranks.stage.of(CollectiveEntered)
    assert [(event.t, event.node, event.sequence) for event in entered] == [
        (1.0, "G/tp1", 0), (2.0, "G/tp2", 0), (3.0, "G/tp0", 0),
    ]  # fmt: skip
    assert not ranks.collectives.blocked


def test_the_kth_entry_of_a_rank_meets_the_kth_of_every_other() -> None:
    ranks = Ranks(Stage(), 2)
    ranks.enter(0, 0.0, ("step", 1, "a0"), ("step", 2, "a1"), ("poll", 3, "a2"))
    ranks.enter(1, 5.0, ("step", 1, "b0"), ("step", 2, "b1"), ("poll", 3, "b2"))
    ranks.stage.until(10)
    assert [result for _, index, result in ranks.returned if index == 0] == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]


@pytest.mark.parametrize("other", [("poll", 4, None), ("poll", 2, None), ("requests", 3, None)])
def test_ranks_that_disagree_hang_for_ever(other: tuple[str, Any, Any]) -> None:
    """A14: gloo and NCCL hang when kinds or shapes differ, and so does everything that comes after."""
    ranks = Ranks(Stage(), 3)
    ranks.enter(0, 1.0, ("poll", 3, None), ("step", "fixed", None))
    ranks.enter(1, 2.0, other, ("step", "fixed", None))
    ranks.enter(2, 3.0, ("poll", 3, None), ("step", "fixed", None))
    ranks.stage.until(1000)
    assert ranks.returned == []
    assert ranks.collectives.blocked
    assert ranks.stage.world.marks == {"collective_mismatch": 1}
    assert ranks.stage.world.watch.first["S7"].node == "G/tp1"


def test_a_rank_that_never_comes_holds_the_others_up_without_a_mismatch() -> None:
    ranks = Ranks(Stage(), 2)
    ranks.enter(0, 1.0, ("step", "fixed", None))
    ranks.stage.until(1000)
    assert ranks.returned == []
    assert not ranks.collectives.blocked


# ------------------------------------------------------------------------------------------------------- turns


class Takers:
    """Ranks that take turns, each at its own pace, until their turns are over."""

    def __init__(self, size: int, pace_s: list[float]) -> None:
        self.stage = Stage()
        self.turns = Turns(self.stage.world, size)
        self.taken: list[list[float]] = [[] for _ in range(size)]
        for index in range(size):
            self.stage.world.env.process(self._run(index, pace_s[index]))

    def _run(self, index: int, pace_s: float) -> Waiting:
        while True:
            yield from self.turns.rest(index)
            yield self.stage.world.env.timeout(pace_s)
            self.taken[index].append(self.stage.world.now)

    def wake_at(self, t: float) -> None:
        self.stage.world.after(t, self.turns.wake)


def test_nobody_moves_until_somebody_wakes_the_group() -> None:
    takers = Takers(2, [0.1, 0.2])
    takers.stage.until(50)
    assert takers.taken == [[], []]
    takers.turns.wake()
    takers.stage.until(100)
    assert takers.taken == [[50.1], [50.2]]


def test_a_wake_during_a_turn_is_one_more_turn_for_everybody() -> None:
    """What changed while a rank was in its turn may have been missed by it."""
    takers = Takers(2, [1.0, 1.5])
    takers.wake_at(0.0)
    takers.wake_at(0.5)
    takers.wake_at(0.7)  # the same further turn
    takers.stage.until(100)
    assert takers.taken == [[1.0, 2.0], [1.5, 3.0]]


def test_wakes_before_anybody_began_are_one_turn() -> None:
    takers = Takers(2, [1.0, 1.0])
    takers.turns.wake()
    takers.turns.wake()
    takers.stage.until(100)
    assert takers.taken == [[1.0], [1.0]]


def test_again_asks_for_a_turn_after_the_one_just_taken() -> None:
    takers = Takers(2, [1.0, 1.0])
    takers.turns.wake()
    takers.stage.until(10)
    takers.turns.again(1)
    takers.turns.again(0)
    takers.stage.until(20)
    assert takers.taken == [[1.0, 11.0], [1.0, 11.0]]


def test_ranks_take_equal_numbers_of_turns_whatever_their_pace() -> None:
    chance = random.Random(3)
    takers = Takers(4, [0.01, 0.5, 0.02, 0.3])
    for _ in range(200):
        takers.wake_at(chance.uniform(0.0, 60.0))
    takers.stage.until(1000)
    counts = {len(taken) for taken in takers.taken}
    assert len(counts) == 1
    assert 40 < counts.pop() <= 200


# -------------------------------------------------------------------------------------- in a running cluster


@pytest.mark.parametrize("profile", ["reference", "sglang-0.5.23"])
def test_an_idle_cluster_costs_no_events(profile: str) -> None:
    """Nobody ticks: three hours without traffic cost exactly what twenty minutes do."""
    events = []
    for quiet_s in (1_000.0, 10_000.0):
        timing = dataclasses.replace(HAPPY.timing, quiet_s=quiet_s)
        scenario = dataclasses.replace(HAPPY, timing=timing)
        outcome = Run(PROTOCOL, scenario, PROTOCOL.profile(profile))()
        assert outcome.succeeded == outcome.requests == 8
        assert outcome.simulated_s > quiet_s
        events.append(outcome.events)
    assert events[0] == events[1] < 500


def test_tensor_ranks_drift_apart_and_meet_in_their_collectives() -> None:
    """Their loop boundaries differ, which is what lets queues differ; the collective makes them wait."""
    run = Played("""
[topology.prefill]
tp = 2
skew = 0.5
[topology.decode]
tp = 2
[workload]
kind = "poisson"
rate_per_s = 5
input_tokens = 4000
output_tokens = 16
[timing]
hostile_s = 10
""")
    for group, left, right in (("P0/dp0/pp0", "P0/tp0", "P0/tp1"), ("D0/dp0", "D0/tp0", "D0/tp1")):
        times = {node: [e.t for e in run.of(CollectiveEntered, group=group, node=node)] for node in (left, right)}
        assert len(times[left]) == len(times[right]) > 50
        apart = [abs(one - other) for one, other in zip(times[left], times[right], strict=True)]
        assert max(apart) > 1e-4
        assert sum(gap > 0 for gap in apart) > 40
    assert run.outcome.violations == {}
