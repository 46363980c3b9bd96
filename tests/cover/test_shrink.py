"""Shrinking: the search by itself, cases and their text, and the command as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_stage import PROTOCOL, Stage

from kvpoll.cli import main
from kvpoll.sim.faults import draw_fault, kinds
from kvpoll.sim.run import Run
from kvpoll.sim.scenario import Scenario, chosen_profile, find, load_scenario, parse_scenario
from kvpoll.sim.scenario_text import Ask, Case, case_of, write_case
from kvpoll.sim.shrink import BUDGET, DONE, INTERRUPTED, Tier, drop, fewest, shrink, simplify
from kvpoll.sim.shrink_case import Judge, expectation_of, look, size_of, tiers
from kvpoll.sim.topology import Topology
from kvpoll.spec.source import Source
from kvpoll.spec.trace import Delivered
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape

# ------------------------------------------------------------------------------------------------- the search


def dropping(name: str = "parts") -> Tier[tuple[int, ...]]:
    return Tier(name, (drop(name, lambda case: case, lambda case, kept: kept),))


@given(st.lists(st.integers(0, 40), unique=True), st.data())
def test_what_is_needed_is_found_exactly(parts: list[int], data: st.DataObject) -> None:
    needed = set(data.draw(st.lists(st.sampled_from(parts), unique=True) if parts else st.just([])))
    assert set(fewest(tuple(parts), lambda kept: needed <= set(kept))) == needed


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 7))
def test_without_any_one_part_it_does_not_fail_any_more(parts: set[int], modulus: int) -> None:
    """Also where more is not worse: a question that is not monotone still leaves a 1-minimal answer."""

    def fails(kept: Sequence[int]) -> bool:
        return sum(kept) % modulus == sum(parts) % modulus and bool(kept)

    found = fewest(tuple(sorted(parts)), fails)
    assert fails(found)
    assert not any(fails(found[:place] + found[place + 1 :]) for place in range(len(found)))


def test_an_earlier_tier_comes_first_and_rounds_go_on_until_nothing_changes() -> None:
    """Here 7 can go only after 1 has, which is in a later tier: a second round finds it."""
    first = Tier("seven", (simplify("seven", lambda case: [case - {7}]),))
    second = Tier("one", (simplify("one", lambda case: [case - {1}]),))
    said: list[str] = []

    def fails(case: frozenset[int]) -> bool:
        return 7 in case or 1 not in case

    found = shrink(frozenset({1, 7, 9}), (first, second), fails, lambda what, tried, best: said.append(what))
    assert (found.case, found.ended, found.crashed) == ({9}, DONE, 0)
    assert said[:2] == ["seven: seven", "one: one"]


def test_a_value_is_tried_once_and_one_that_crashes_does_not_count() -> None:
    tried: list[tuple[int, ...]] = []

    def fails(case: tuple[int, ...]) -> bool:
        tried.append(case)
        if case == ():
            raise ZeroDivisionError
        return 3 in case and 5 in case

    found = shrink(tuple(range(8)), (dropping(),), fails)
    assert (found.case, found.crashed, found.tried) == ((3, 5), 1, len(tried))
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("budget_s, ended", [(None, INTERRUPTED), (0.0, BUDGET)])
def test_whatever_ends_it_the_best_so_far_is_kept(budget_s: float | None, ended: str) -> None:
    asked: list[tuple[int, ...]] = []

    def fails(case: tuple[int, ...]) -> bool:
        asked.append(case)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return 0 in case

    found = shrink(tuple(range(64)), (dropping(),), fails, budget_s=budget_s)
    assert found.ended == ended
    assert len(found.case) == (64 if ended == BUDGET else 32)


# ------------------------------------------------------------------------------------------- cases and their text

SHAPES = st.builds(
    EngineShape,
    count=st.integers(1, 2),
    sizes=st.sampled_from([Sizes(), Sizes(dp=2), Sizes(dp=2, tp=2), Sizes(tp=2)]),
    kv_pages=st.integers(1, 5000),
    skew=st.floats(0, 1),
)
TOPOLOGIES = st.builds(
    Topology,
    prefill=SHAPES,
    decode=SHAPES,
    jitter=st.floats(0, 3),
    latency_s=st.floats(0, 0.1),
    dp_attention=st.booleans(),
    load_balance=st.sampled_from(["follow_bootstrap_room", "total_tokens"]),
).filter(lambda topology: topology.check() is None)
ASKS = st.lists(
    st.tuples(st.floats(0, 20), st.integers(1, 9000), st.integers(1, 99), st.none() | st.floats(0, 9)), max_size=9
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    topology = draw(TOPOLOGIES)
    seed = draw(st.integers(0, 99))
    names = draw(st.lists(st.sampled_from(sorted(kinds())), max_size=5))
    faults = tuple(
        dataclasses.replace(draw_fault(random.Random(f"{seed}/{n}"), kinds()[name], topology, 20.0), id=f"{name}-{n}")
        for n, name in enumerate(names)
    )
    asks = sorted(
        (Ask(t, i, o, None if stay is None else t + stay) for t, i, o, stay in draw(ASKS)), key=lambda a: a.at_s
    )
    rules = draw(st.sampled_from([{}, {"dp_lookup": "query"}, {"register_attempts": 3}]))
    return Case(topology, draw(TIMINGS), tuple(asks), faults, "sglang-0.5.23", rules, seed)


TIMINGS = st.builds(
    type(load_scenario(find("happy"), PROTOCOL).timing), hostile_s=st.floats(0.1, 99), probes=st.integers(0, 9)
)


def read(text: str) -> Scenario:
    return parse_scenario(Source("case.toml", text), PROTOCOL, "case")


@settings(deadline=None, max_examples=60)
@given(cases(), st.text(max_size=300), st.text(max_size=40))
def test_the_text_of_a_case_read_again_is_the_case(case: Case, story: str, title: str) -> None:
    story = "".join(letter for letter in story if letter.isprintable() or letter in " \n\t")
    scenario = read(write_case(case, title, story, remarks=["where it comes from " * 20, "  a line to paste"]))
    again = case_of(scenario, scenario.faults, case.profile, case.rules, 0)
    assert again == case
    assert (scenario.title, scenario.story.split()) == (title, story.split())


def test_a_case_runs_as_the_scenario_that_it_was_made_from_and_as_its_text() -> None:
    scenario = load_scenario(find("sglang-21299"), PROTOCOL)
    said = scenario.expectations[0]
    profile = chosen_profile(PROTOCOL, said)
    case = case_of(scenario, scenario.faults, said.profile, said.rules, 3)
    expected = expectation_of(case, PROTOCOL, "S7")
    written = read(write_case(case, "x", "y", [expected]))
    runs = [
        Run(PROTOCOL, scenario, profile, 3),
        Run(PROTOCOL, case.scenario(), profile),
        Run(PROTOCOL, written, profile),
        Run(PROTOCOL, dataclasses.replace(written, seed=1), profile, 2),
    ]
    first, *others = [_shown(run) for run in runs]
    assert others == [first] * 3
    [read_again] = written.expectations
    assert read_again.violates[0] == "S7"
    assert set(read_again.violates) == set(first[0])


def _shown(run: Run) -> tuple[Any, ...]:
    outcome = run()
    return outcome.violations, outcome.counts, outcome.marks, outcome.events, outcome.ttft_s


LEAVING = """\
title = "a client leaves"
[workload]
kind = "requests"
requests = [
  { at_s = 1.0, input_tokens = 4000, output_tokens = 900, leaves_at_s = 1.05 },
  { at_s = 0.5, input_tokens = 4000, output_tokens = 900 },
  { at_s = 1.0, input_tokens = 100, output_tokens = 1, leaves_at_s = 400 },
]
[timing]
hostile_s = 60
"""


def test_the_client_that_the_file_names_leaves_and_no_other() -> None:
    scenario = read(LEAVING)
    assert scenario.leaves == {"r1": 1.05, "r2": 400.0}
    outcome = Run(PROTOCOL, scenario, PROTOCOL.profile("reference"))()
    assert (outcome.causes, outcome.succeeded, outcome.violations) == ({"client_left": 1}, 6, {})


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("leaves_at_s = 1.05", "leaves_at_s = 0.5", "case.toml:5: leaves_at_s must not be before at_s"),
        ("leaves_at_s = 1.05", 'leaves_at_s = "x"', "case.toml:5: leaves_at_s must be a number, got 'x'"),
        ("[workload]", "seed = 1.5\n[workload]", "case.toml:2: seed must be a whole number, got 1.5"),
        ("[workload]", "seed = -1\n[workload]", "case.toml:2: seed must not be negative, got -1"),
    ],
)
def test_what_is_wrong_with_the_new_keys_is_said(old: str, new: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        read(LEAVING.replace(old, new))
    assert str(error.value) == told


# ------------------------------------------------------------------------------------------- order on a channel


def test_a_message_never_overtakes_another_of_its_channel_not_even_by_the_last_bit() -> None:
    """A stateful test found it: messages that wait for one moment were ordered by how their delays were rounded."""
    stage = Stage()
    network, world = stage.world.network, stage.world
    world.env.run(until=0.1)
    network.delays.append(("P0", 0.3, True))
    events: list[Any] = []
    world.stream.subscribe(Delivered, events.append)

    def talk() -> Iterator[Any]:
        for number in range(400):
            network.send("P0", "D0", "Step", Incarnation(number, 0, 0), lambda: None)
            yield world.env.timeout(0.0007)

    world.env.process(talk())
    world.env.run(until=2.0)
    sent = [event.incarnation.room for event in events if event.message == "Step"]
    assert sent == list(range(400))


# ------------------------------------------------------------------------------------------------ runs made small


RACES = [
    ("sglang-21299", "before-sglang-21299", "S7", 8, 1),
    ("sglang-22901", "before-sglang-22901", "S6", 8, 0),
    ("sglang-24772", "before-sglang-24772", "S3", 6, 0),
    ("sglang-24772", "before-sglang-24772", "S10", 6, 0),
    ("sglang-25125", "before-sglang-25125", "L4", 6, 0),
    ("sglang-26912", "before-sglang-27028", "R1", 10, 0),
    ("sglang-29725", "sglang-0.5.23", "L1", 10, 0),
]
"""Race, profile, invariant, how many facts of the violating request are enough to tell it, and how many departures
from in-order delivery are left: the queues of sglang#21299 diverge because answers come at different moments.
"""


@pytest.mark.parametrize(
    "name, label, invariant, story, departures", RACES, ids=[f"{race[0]} {race[2]}" for race in RACES]
)
def test_a_known_race_is_told_in_few_steps(name: str, label: str, invariant: str, story: int, departures: int) -> None:
    scenario = load_scenario(find(name), PROTOCOL)
    said = scenario.expectation(label)
    assert said is not None
    case = case_of(scenario, scenario.faults, said.profile, said.rules, 0)
    seen = look(case, PROTOCOL, invariant, first=False)
    assert seen is not None
    judge = Judge(PROTOCOL, seen, first=False)
    found = shrink(case, tiers(judge), judge)
    assert (found.ended, found.crashed) == (DONE, 0)
    size = size_of(found.case, judge)
    assert size.story <= story
    assert (size.faults <= 1, size.departures, size.requests <= 2) == (True, departures, True)


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)

    def told(*words: str) -> tuple[int, str, str]:
        status = main(words)
        return status, *capsys.readouterr()

    return told


BEFORE = ("sglang-24772", "--profile", "before-sglang-24772", "--seed", "3")


def test_the_written_scenario_replays_as_it_expects(tell: Any) -> None:
    status, out, _ = tell("shrink", *BEFORE)
    lines = out.splitlines()
    path = Path("shrunk-sglang-24772-seed3-S3.toml")
    assert status == 0
    assert lines[0].startswith("S3 sticky-terminal, at 1.00")
    assert lines[1].startswith("faults 1 -> 1, departures 0 -> 0, requests 1 -> 1, ranks 2 -> 2, steps 4 -> 4, ")
    assert lines[-1] == f"kvpoll run ./{path} --profile before-sglang-24772 --seed 0"
    assert path.read_text().startswith("# Written by `kvpoll shrink`, from\n#   kvpoll run sglang-24772 --profile")
    status, out, _ = tell(*shlex.split(lines[-1])[1:])
    assert (status, f"exactly as {path.stem} expects" in out) == (1, True)
    status, out, _ = tell("reproduce", str(path))
    assert (status, "all 2 rows exactly as expected" in out) == (0, True)


def test_a_line_and_a_trace_are_shrunk_like_the_run_itself(tell: Any) -> None:
    line = shlex.join(["kvpoll", "run", *BEFORE])
    tell("run", *BEFORE, "--record", "trace.jsonl")
    found = []
    for what in (BEFORE, (line,), ("trace.jsonl",)):
        status, out, _ = tell("shrink", *what, "--invariant", "S10", "--out", "x.toml", "--json")
        assert status == 0
        found.append((json.loads(out), Path("x.toml").read_text()))
    assert found[1:] == found[:1] * 2
    said = found[0][0]
    assert (said["invariant"], said["ended"], said["reference_holds"], said["deviations"]) == ("S10", "done", True, [])
    assert said["after"]["story"] == 5


def test_rules_that_were_set_are_kept_under_a_label(tell: Any) -> None:
    run = ("sglang-29725", "--profile", "sglang-0.5.23", "--set", "dp_lookup=query")
    status, out, _ = tell("shrink", *run, "--out", "x.toml")
    line = out.splitlines()[-1]
    assert (status, line) == (0, "kvpoll run ./x.toml --profile 'sglang-0.5.23 (dp_lookup=query)' --seed 0")
    assert tell(*shlex.split(line)[1:])[0] == 1


def test_faults_that_a_seed_drew_become_faults_of_the_file(tell: Any) -> None:
    status, out, _ = tell("shrink", "--minutes", "0.3", "--profile", "sglang-0.5.23", "--budget", "4", "--json")
    said = json.loads(out)
    assert status == 0
    assert said["before"]["faults"] == 26
    assert said["after"]["faults"] < 8
    assert Path(said["scenario"]).read_text().count("[[fault]]") == said["after"]["faults"]
    assert tell(*shlex.split(said["repeat"])[1:])[0] == 1


def test_an_interrupt_writes_the_best_so_far(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def judged(self: Judge, case: Case) -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return look(case, self.protocol, self.wanted) is not None

    monkeypatch.setattr(Judge, "__call__", judged)
    status, out, _ = tell("shrink", *BEFORE, "--out", "x.toml")
    assert (status, out.splitlines()[0]) == (130, "interrupted: this is the best so far")
    assert tell("run", "./x.toml", "--profile", "before-sglang-24772")[0] == 1


HOLDS = "`kvpoll run happy --profile reference --seed 0`; give a run that breaks it (`kvpoll campaign` finds some)"
WRONG = [
    (["happy"], f"nothing to shrink: every invariant holds in {HOLDS}"),
    (["happy", "--invariant", "S3"], f"nothing to shrink: S3 holds in {HOLDS}"),
    (["happy", "--invariant", "s3"], "--invariant: unknown invariant 's3' (did you mean 'S3'?)"),
    (["kvpoll run happy", "--seed", "3"], "--seed: a line or a trace says all of its run; leave --seed away"),
    (["kvpoll run happy --sed 3"], "shrink: cannot repeat 'kvpoll run happy --sed 3'"),
    (["t.jsonl"], "t.jsonl:1: the header has no line to repeat; only what kvpoll recorded can be shrunk"),
    (["u.jsonl"], 'u.jsonl:1: a kvpoll trace starts with a header line {"kvpoll_trace": 1, ...}'),
    ([*BEFORE, "--out", "x.txt"], "--out x.txt: give another file, with a name that ends in .toml"),
    ([*BEFORE, "--out", "t.jsonl/x.toml"], "t.jsonl/x.toml: cannot be written: "),
    ([*BEFORE, "--budget", "0"], "argument --budget: must be a number above 0, got '0'"),
]


@pytest.mark.parametrize("words, told", WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_what_cannot_be_shrunk_is_one_line_and_status_2(tell: Any, words: list[str], told: str) -> None:
    Path("t.jsonl").write_text('{"kvpoll_trace": 1}\n')
    Path("u.jsonl").write_text("{}\n")
    status, out, err = tell("shrink", *words)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"kvpoll: {told}")


def test_a_schedule_loses_the_moves_that_do_not_matter(tmp_path: Path) -> None:
    """A longer way to A11 than the explorer's: a second request comes and goes meanwhile."""
    moves = [
        "R dispatches q2", "R dispatches q1", "D0 hears R | D0 is told: open q2", "D0 hears R", "D0 finds P0 for q1",
        "D0 reserves for q1", "P0 hears R", "P0 hears R", "P0's bootstrap deadline passes early | P0's bootstrap "
        "deadline of room 1001 passes", "P0 admits q1", "P0 hears D0",
    ]  # fmt: skip
    listed = ", ".join(f'"{move}"' for move in moves)
    long = tmp_path / "long.toml"
    long.write_text(
        f'title = "long"\n[schedule]\nmodel = "two-rooms"\nmoves = [{listed}]\n'
        '[[expect]]\nprofile = "sglang-0.5.23"\nshows = ["S4"]\n'
    )
    out = tmp_path / "short.toml"
    assert main(["shrink", str(long), "--profile", "sglang-0.5.23", "--out", str(out)]) == 0
    short = load_scenario(out, PROTOCOL).schedule
    assert short is not None and len(short.moves) == 8
    assert main(["run", str(out), "--profile", "sglang-0.5.23"]) == 1
