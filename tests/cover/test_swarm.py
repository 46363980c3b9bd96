"""Swarm draws: which kinds of fault exist, how many, how strong; always the same for a seed, always in range."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_stage import Stage, scenario, shape

from kvpoll.cli import main
from kvpoll.commands.plan import Plan, draw_digest, prepare
from kvpoll.sim import swarm
from kvpoll.sim.faults import Fault, Injector, kinds
from kvpoll.sim.swarm import MOMENTS, NUMBERS, STRENGTHS, Pick, Swarm, draw_swarm
from kvpoll.sim.topology import Topology, rank_names

WIDE = """
[topology.prefill]
count = 2
dp = 2
pp = 3
tp = 2
[topology.decode]
count = 2
tp = 4
[workload]
kind = "synthetic"
[timing]
hostile_s = 100
"""
SCENARIO = scenario(WIDE)
NODES = {"R", "P0", "P1", "D0", "D1", "B0", "B1"}
NODES |= {*rank_names("P", SCENARIO.topology.prefill), *rank_names("D", SCENARIO.topology.decode)}
DRAWS = [draw_swarm(seed, SCENARIO) for seed in range(400)]


def of_kind(draw: Swarm, kind: str) -> list[Fault]:
    return [fault for fault in draw.faults if fault.kind.name == kind]


# ---------------------------------------------------------------------------------------------- which kinds


def test_a_seed_always_draws_the_same_and_another_seed_something_else() -> None:
    assert draw_swarm(7, SCENARIO) == DRAWS[7] != DRAWS[8]
    assert draw_swarm(-7, SCENARIO) != draw_swarm(7, SCENARIO)


def test_some_seeds_have_few_kinds_and_some_have_many() -> None:
    sizes = [len(draw.picks) for draw in DRAWS]
    assert min(sizes) >= 1
    few, many = sum(size <= 5 for size in sizes), sum(size >= 20 for size in sizes)
    assert few > 40 and many > 40


def test_every_kind_is_in_about_as_often_as_it_is_out() -> None:
    present = Counter(pick.kind for draw in DRAWS for pick in draw.picks)
    assert present.keys() == kinds().keys()
    assert all(120 < number < 280 for number in present.values())


def test_two_kinds_are_often_seen_without_each_other() -> None:
    """The point of it: what one kind hides shows where it is missing."""
    for one, other in (("rank_crash", "write_late"), ("partition", "room_reuse")):
        seen = Counter(tuple(bool(of_kind(draw, kind)) for kind in (one, other)) for draw in DRAWS)
        assert min(seen[pair] for pair in ((True, False), (False, True), (True, True), (False, False))) > 20


def test_a_kind_that_leaves_the_vocabulary_changes_no_draw_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {name: kind for name, kind in kinds().items() if name != "abort_storm"}
    monkeypatch.setattr(swarm, "kinds", lambda: rest)
    for seed in range(50):
        if len(DRAWS[seed].picks) > 1:
            faults = tuple(fault for fault in DRAWS[seed].faults if fault.kind.name != "abort_storm")
            assert draw_swarm(seed, SCENARIO).faults == faults


# ------------------------------------------------------------------------------------- how many, how strong


def test_each_pick_is_that_many_faults_with_names_of_their_own() -> None:
    for draw in DRAWS:
        assert Counter(fault.kind.name for fault in draw.faults) == {pick.kind: pick.number for pick in draw.picks}
        assert len({fault.id for fault in draw.faults}) == len(draw.faults)
        assert all(fault.kind is kinds()[fault.kind.name] for fault in draw.faults)
    numbers = Counter(pick.number for draw in DRAWS for pick in draw.picks)
    assert numbers.keys() == set(NUMBERS) and numbers[1] > numbers[2] > numbers[3] > 100
    assert {pick.number for draw in DRAWS for pick in draw.picks if pick.kind == "bootstrap_late"} == {1}


@given(st.integers())
def test_every_value_is_in_the_range_that_its_kind_declares(seed: int) -> None:
    for fault in draw_swarm(seed, SCENARIO).faults:
        assert fault.target in NODES and 0.0 <= fault.at_s <= 95.0
        assert "required" not in fault.parameters.values()
        assert 0 <= fault.parameters.get("stage", 0) < 3
        for name, value in fault.kind.draw.items():
            if isinstance(value, list):
                drawn = fault.for_s if name == "for_s" else fault.parameters[name]
                assert value[0] <= drawn <= value[1] and type(drawn) is type(value[0])


def test_a_strength_is_a_third_of_each_range() -> None:
    seen: dict[tuple[str, str], list[Any]] = {}
    for draw in DRAWS:
        for pick in draw.picks:
            faults = of_kind(draw, pick.kind)
            values = {"abort_storm": "share", "allocation_failure": "count", "clock_offset": "offset_s"}
            if pick.kind in values:
                named = [fault.parameters[values[pick.kind]] for fault in faults]
                seen.setdefault((pick.kind, pick.strength), []).extend(named)
    bounds = {
        ("abort_storm", "weak"): (0.5, 0.65), ("abort_storm", "middling"): (0.65, 0.8),
        ("abort_storm", "strong"): (0.8, 0.95), ("allocation_failure", "weak"): (1, 2),
        ("allocation_failure", "middling"): (2, 3), ("allocation_failure", "strong"): (3, 4),
    }  # fmt: skip
    for key, (low, high) in bounds.items():
        assert low <= min(seen[key]) and max(seen[key]) <= high
    for strength, (low, high) in zip(STRENGTHS, ((0, 134), (133, 267), (266, 401)), strict=True):
        ahead = [value for value in seen["clock_offset", strength] if value > 0]
        behind = [-value for value in seen["clock_offset", strength] if value < 0]
        assert min(len(ahead), len(behind)) > 10
        assert low <= min(ahead) and max(ahead) <= high
        assert low * 0.3 - 1 <= min(behind) and max(behind) <= high * 0.3 + 1


def test_moments_are_drawn_from_their_whole_range() -> None:
    weak = [of_kind(draw, "client_abort") for draw in DRAWS if Pick("client_abort", 1, "weak") in draw.picks]
    after = [fault.parameters["after_s"] for faults in weak for fault in faults]
    assert min(after) < 0.2 and max(after) > 0.8 and "after_s" in MOMENTS


def test_the_line_says_what_was_drawn() -> None:
    picks = (Pick("abort_storm", 2, "strong"), Pick("slow_link", 1, "weak"))
    assert Swarm(picks, (), 26).line == "kinds 2 of 26: abort_storm x2 strong, slow_link weak"


# ------------------------------------------------------------------------ several faults of one kind at a time


def overlapping(injector: Injector, kind: str, **parameters: Any) -> list[Fault]:
    target = "B0" if kind == "bootstrap_error" else "R"
    given = {**kinds()[kind].parameters, **parameters}
    return [Fault(f"{kind}-{count}", kinds()[kind], target, 0.0, 1e9, given) for count in (1, 2)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_of_a_kind_may_end_in_any_order(order: tuple[int, int]) -> None:
    """The one that began first once came back when the other ended, and stayed for ever."""
    cluster = Stage(Topology(prefill=shape(dp=2))).cluster()
    injector = Injector(cluster, [])
    server, router = cluster.servers[0], cluster.router
    request = router.submit("r", 600, 4)
    kept = {
        "room_reuse": lambda: router.reuse_room() is not None,
        "dp_override": lambda: router.override is not None and router.override(request) != request.prefill_dp,
        "bootstrap_error": lambda: server.error_share == 1.0,
    }
    for kind, acts in kept.items():
        faults = overlapping(injector, kind, share=1.0)
        for fault in faults:
            injector.begin(fault)
        router.submit(f"r-{kind}", 600, 4)  # a room that can be used again
        assert acts()
        injector.end(faults[order[0]])
        assert acts()
        injector.end(faults[order[1]])
        assert not acts()


def test_a_run_with_swarm_shows_the_draw(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "happy", "--swarm", "--seed", "3"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    happy = scenario('[workload]\nkind = "synthetic"\n[timing]\nhostile_s = 30\n')
    drawn = draw_swarm(3, happy).line.partition(":")[0]
    assert lines[2].startswith(drawn) and lines[-1] == "kvpoll run happy --profile reference --swarm --seed 3"
    assert main(["replay", lines[-1]]) == 0
    assert main([*words, "--faults", "none"]) == 2
    assert capsys.readouterr().err.endswith("kvpoll: --swarm draws the faults; leave --faults away\n")


@pytest.mark.parametrize(("seed", "digest"), [(0, "1071414c"), (7, "f6ea9d18"), (41, "5b3a6812")])
def test_the_draw_of_a_run_without_swarm_is_what_it_was(seed: int, digest: str) -> None:
    """What was recorded before there was swarm still repeats byte for byte."""
    assert draw_digest(prepare(Plan(minutes=0.5)).faults(seed)) == digest
