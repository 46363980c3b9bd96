"""A behaviour of a model as a scenario file: written, read, played in virtual time, and what is told of messages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpoll.cli import main
from kvpoll.sim.explorer.explore import Limits, Report, explore, replay
from kvpoll.sim.explorer.model import load_model
from kvpoll.sim.explorer.schedule import Post, ScheduledRun, Stepper
from kvpoll.sim.explorer.schedule_text import Schedule, read_schedule, write_schedule
from kvpoll.sim.explorer.system import Cell, Move, Outcome, System, send
from kvpoll.sim.scenario import parse_scenario
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput, Source
from kvpoll.spec.trace import Delivered, FaultBegan, FaultEnded, Lost, Sent

PROTOCOL = load()
SGLANG = PROTOCOL.profile("sglang-0.5.23")
REFERENCE = PROTOCOL.profile("reference")
TO_DESTINATION = (
    "R dispatches q1",
    "P0 hears R",
    "D0 hears R",
    "D0 finds P0 for q1",
    "D0 reserves for q1",
)
"""Decode has told prefill where to write."""


def one_room() -> Stepper:
    return Stepper(load_model("one-room", PROTOCOL).build(PROTOCOL, REFERENCE))


def events_of(model: str, *moves: str, ends: str = "here") -> list[Any]:
    """Everything that happens in a schedule under reference."""
    text = write_schedule("a story", "", Schedule(model, moves, (), ends), "reference", {}, ())
    scenario = parse_scenario(Source("story.toml", text), PROTOCOL, "story")
    events: list[Any] = []
    assert ScheduledRun(PROTOCOL, scenario, REFERENCE, collect=events)().holds
    return events


def told(events: list[Any], *kinds: type) -> list[tuple[str, ...]]:
    """(kind, node, other node, message) of the messages among events."""
    chosen: list[Any] = [event for event in events if isinstance(event, kinds or (Sent, Delivered, Lost))]
    return [(type(event).__name__, event.node, event[2], event.message) for event in chosen]


# --- counterexamples --------------------------------------------------------------------------------


def counterexample(model: str, invariant: str) -> Report:
    limits = Limits(until_found=True, liveness=invariant.startswith("L"))
    return explore(load_model(model, PROTOCOL), PROTOCOL, SGLANG, only=(invariant,), limits=limits)


@pytest.mark.parametrize(
    ("model", "invariant", "ends", "breaks"),
    [
        ("one-room", "S4", "here", {"S4"}),
        ("one-room", "R1", "idle", {"R1", "O1"}),
        ("one-room", "L2", "for ever", {"L1", "L2", "R1", "O1"}),
        ("shared-room", "S12", "here", {"S12"}),
    ],
)
def test_a_counterexample_runs_as_a_scenario_and_its_trace_repeats(
    model: str,
    invariant: str,
    ends: str,
    breaks: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    report = counterexample(model, invariant)
    text, result, _ = replay(report, report.broken[invariant], PROTOCOL, "a test")
    assert set(result.violations) == breaks
    schedule = read_schedule(Source("found.toml", text))
    assert (schedule.model, schedule.ends, len(schedule.moves)) == (model, ends, report.broken[invariant].depth)

    Path("found.toml").write_text(text)
    words = ("found.toml", "--profile", "sglang-0.5.23")
    assert main(("run", *words, "--record", "found.jsonl")) == 1
    out = capsys.readouterr().out.splitlines()
    assert f"breaks: {len(breaks)} invariant{'s' * (len(breaks) > 1)}" in out
    assert out[-2:] == ["exactly as found expects", f"kvpoll run {' '.join(words)} --seed 0"]
    assert main(("replay", "found.jsonl")) == 0
    assert capsys.readouterr().out.startswith("identical: ")


def test_a_counterexample_under_changed_rules_names_them_and_a_folder_may_have_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = REFERENCE.with_rules({"clear_leaves": "nothing"})
    limits = Limits(until_found=True)
    report = explore(load_model("one-room", PROTOCOL), PROTOCOL, profile, {"clear_leaves": "nothing"}, ("S4",), limits)
    place = Path("my races", "found.toml")
    place.parent.mkdir()
    with place.with_suffix(".jsonl").open("w") as trace:
        text, result, _ = replay(report, report.broken["S4"], PROTOCOL, "a test", str(place), trace)
    assert 'profile = "reference"\nrules = { clear_leaves = "nothing" }' in text
    assert result.line == "kvpoll run 'my races/found.toml' --profile reference --seed 0"
    place.write_text(text)
    assert main(("run", str(place), "--profile", "reference")) == 1
    assert "exactly as found expects" in capsys.readouterr().out
    assert main(("replay", str(place.with_suffix(".jsonl")))) == 0


# --- moves that are not possible --------------------------------------------------------------------


def test_an_impossible_move_is_answered_with_those_that_are_possible() -> None:
    stepper = one_room()
    with pytest.raises(BadInput) as refused:
        stepper.take("D0 hears R")
    assert str(refused.value) == "'D0 hears R' is not possible here; possible are: R dispatches q1"
    with pytest.raises(BadInput) as refused:
        stepper.take("R dispatch q1")
    cause = "'R dispatch q1' is not a move of model 'one-room' (did you mean 'R dispatches q1'?)"
    assert str(refused.value) == cause
    assert stepper.state == stepper.system.initial()
    stepper.take("R dispatches q1")
    before = dict(stepper.state)
    with pytest.raises(
        BadInput, match=r"'D0 hears R \| another label' is not possible here; possible are: .*D0 hears R"
    ):
        stepper.take("D0 hears R | another label")
    assert stepper.state == before


def test_a_deadline_waits_until_nothing_else_can_happen() -> None:
    stepper = one_room()
    for move in ("R dispatches q1", "P0 hears R"):
        stepper.take(move)
    with pytest.raises(BadInput) as refused:
        stepper.take("P0's bootstrap deadline passes")
    cause = "'P0's bootstrap deadline passes' is not possible here: deadlines wait until nothing else can happen"
    assert str(refused.value).replace('"', "'") == cause
    stepper.take("P0's bootstrap deadline passes early")


def repeater() -> Stepper:
    """A step that only says again what is already on its way, and a deadline."""
    moves = [
        Move("say", "step", ("A",), lambda mine: [Outcome((mine,), "says x", (("chan A B", ("x",)),))]),
        Move("give up", "deadline", ("A",), lambda mine: [Outcome((1,), "gives up")] if mine == 0 else []),
    ]
    return Stepper(System("repeater", [Cell("A", 0), Cell("chan A B", (), send)], moves))


def test_a_step_that_would_change_nothing_keeps_no_deadline_waiting() -> None:
    """A message that is on its way already stands for its repeat, so to send it once more is no step."""
    stepper = repeater()
    with pytest.raises(BadInput, match="deadlines wait"):
        stepper.take("give up")
    stepper.take("say")
    assert stepper.take("give up").label == "gives up"


def test_outcomes_with_the_same_label_are_told_apart() -> None:
    """Two timers of two attempts at one room ring with the same words."""
    outcomes = [Outcome((1,), "rings"), Outcome((2,), "rings"), Outcome((3,), "rings not")]
    system = System("bells", [Cell("A", 0)], [Move("ring", "step", ("A",), lambda mine: outcomes if mine == 0 else [])])
    written = [Stepper(system).written(system.moves[0], outcome) for outcome in outcomes]
    assert written == ["ring | rings", "ring | rings #2", "ring | rings not"]
    for line, outcome in zip(written, outcomes, strict=True):
        stepper = Stepper(system)
        assert stepper.take(line) == outcome and stepper.state == {"A": outcome.after[0]}
    assert Stepper(system).take("ring") == outcomes[0]


# --- messages ---------------------------------------------------------------------------------------


def test_messages_are_told_when_they_leave_and_when_they_arrive() -> None:
    events = events_of("one-room", *TO_DESTINATION, "P0 hears D0")
    assert told(events) == [
        ("Sent", "R", "P0", "Open"),
        ("Sent", "R", "D0", "Open"),
        ("Delivered", "P0", "R", "Open"),
        ("Delivered", "D0", "R", "Open"),
        ("Sent", "D0", "P0", "Metadata"),
        ("Delivered", "P0", "D0", "Metadata"),
    ]
    serials = [(event.serial, type(event)) for event in events if isinstance(event, Sent | Delivered)]
    assert sorted(serials, key=repr) == sorted([(n, kind) for n in (1, 2, 3) for kind in (Sent, Delivered)], key=repr)


def test_a_broken_link_loses_what_is_on_it() -> None:
    """A single message on a link that broke was once told as delivered."""
    events = events_of("one-room", *TO_DESTINATION, "the link P0 D0 breaks", "P0 hears D0")
    assert told(events)[-4:] == [
        ("Lost", "P0", "D0", "Metadata"),
        ("Sent", "P0", "D0", "LinkRestored"),
        ("Sent", "D0", "P0", "LinkRestored"),
        ("Delivered", "P0", "D0", "LinkRestored"),
    ]
    [began] = [event for event in events if isinstance(event, FaultBegan)]
    [ended] = [event for event in events if isinstance(event, FaultEnded)]
    assert began[2:4] == ended[2:4] == ("the link P0 D0 breaks", "disconnect") and began.t == ended.t


def test_a_process_that_dies_loses_what_was_meant_for_it() -> None:
    died = events_of("peer-restart", "R dispatches q1", "D0 dies")
    assert told(died, Delivered, Lost) == [("Lost", "D0", "R", "Open")]
    down = events_of("peer-restart", "D0 dies", "R dispatches q1", "D0 hears R")
    assert told(down, Delivered, Lost) == [("Lost", "D0", "R", "Open")]
    assert told(down, Sent)[-1] == ("Sent", "D0", "R", "Failed")


def test_a_duplicate_leaves_the_message_on_its_way() -> None:
    events = events_of("one-room", *TO_DESTINATION, "P0 hears D0 twice")
    assert told(events, Delivered, Lost)[-1] == ("Delivered", "D0", "R", "Open")


@settings(max_examples=30)
@given(st.integers(0, 1 << 32))
def test_in_any_behaviour_a_message_is_sent_once_and_ends_at_most_once(seed: int) -> None:
    chance, stepper = random.Random(seed), one_room()
    post, sent, ended = Post(stepper.state), dict[int, str](), dict[int, str]()
    for written in walk(stepper, chance):
        before = {name: list(value) for name, value in stepper.state.items() if name.startswith("chan ")}
        stepper.take(written)
        for event in post.tell(stepper.move(written), stepper.state, 0.0):
            book = sent if isinstance(event, Sent) else ended
            assert event.serial not in book
            book[event.serial] = event.message
        left = sum(len(stepper.state[name]) for name in before)
        assert len(sent) - len(ended) == left
    assert ended.items() <= sent.items()


def walk(stepper: Stepper, chance: random.Random) -> Iterator[str]:
    """Up to twenty moves, each possible where it is taken."""
    for _ in range(20):
        moves = [move for move in stepper.system.moves if move.kind != "deadline" and stepper.outcomes(move)]
        if not moves:
            return
        move = chance.choice(moves)
        yield stepper.written(move, chance.choice(stepper.outcomes(move)))


# --- how it ends ------------------------------------------------------------------------------------


def test_a_schedule_ends_here_or_idle_or_for_ever() -> None:
    moves = ("R dispatches q1", "P0 hears R", "D0 hears R")
    here = events_of("one-room", *moves)
    scenario = parse_scenario(
        Source("s.toml", write_schedule("t", "", Schedule("one-room", moves, (), "idle"), "reference", {}, ())),
        PROTOCOL,
        "s",
    )
    events: list[Any] = []
    result = ScheduledRun(PROTOCOL, scenario, REFERENCE, collect=events)()
    looked = [event for event in events if type(event).__name__ == "Surveyed"]
    assert [(event.node, dict(event.tables)["requests"]) for event in looked] == [("P0", 1), ("D0", 1)]
    assert "R1" in result.violations and result.simulated_s == pytest.approx(0.004)
    assert [type(event) for event in events[: len(here)]] == [type(event) for event in here]


# --- its text ---------------------------------------------------------------------------------------


def test_a_schedule_is_read_as_it_was_written() -> None:
    schedule = Schedule('a "model"', ("one | two", "three\\four"), ("round", "and round"), "for ever")
    text = write_schedule('a "title"', "two\nlines", schedule, "reference", {"clear_leaves": "nothing"}, ("S4", "S3"))
    source = Source("s.toml", text)
    assert read_schedule(source) == schedule
    assert (source.data["title"], source.data["story"]) == ('a "title"', "two\nlines")
    [said] = source.data["expect"]
    assert said == {"profile": "reference", "rules": {"clear_leaves": "nothing"}, "shows": ["S4"], "follows": ["S3"]}
    assert 'rules = { register_attempts = 3 }\nshows = ["L1"]\n' in write_schedule(
        "t", "", schedule, "reference", {"register_attempts": 3}, ("L1",)
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"here"', '"her"', "6: unknown end 'her' (did you mean 'here'?)"),
        ("ends", "end", "6: unknown key 'end' (did you mean 'ends'?)"),
        ('model = "one-room"', "", "4: a schedule lacks `model`"),
        ('"one-room"', "1", "5: `model` must be text, got 1"),
    ],
)
def test_a_bad_schedule_is_refused(old: str, new: str, message: str) -> None:
    text = write_schedule("t", "s", Schedule("one-room", ("R dispatches q1",)), "reference", {}, ())
    assert old in text
    with pytest.raises(BadInput) as refused:
        read_schedule(Source("bad.toml", text.replace(old, new, 1)))
    assert str(refused.value) == f"bad.toml:{message}"


def test_a_schedule_that_cannot_be_played_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text(write_schedule("t", "", Schedule("one-room", ("D0 hears R",)), "reference", {}, ()))
    assert main(("run", "bad.toml")) == 2
    line = "kvpoll: 'D0 hears R' is not possible here; possible are: R dispatches q1\n"
    assert capsys.readouterr() == ("", line)
    Path("bad.toml").write_text(write_schedule("t", "", Schedule("one-rom", ("x",)), "reference", {}, ()))
    assert main(("run", "bad.toml")) == 2
    assert capsys.readouterr().err == "kvpoll: unknown model 'one-rom' (did you mean 'one-room'?)\n"
