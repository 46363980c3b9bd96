"""``kvpoll explore`` as a user meets it: what it prints, what it returns, and what it says of bad models."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpoll.cli import main
from kvpoll.commands import explore as verb
from kvpoll.spec.invariants import INVARIANTS

HOUSE = Path(__file__).resolve().parents[2]
KVPOLL = (sys.executable, "-P", "-m", "kvpoll")
SGLANG = ("--profile", "sglang-0.5.23")

SMALL = """\
[model]
title = "one request and one fault"
story = "Small enough to be explored while you wait."
kind = "transfer"
prefill = ["P0"]
decode = ["D0"]
pages = 1
exercises = ["early_abort"]
sometimes = []

[faults]
total = 1
slowness = 1
decode_abort = 1

[[request]]
rid = "q1"
room = 1001
when = "start"
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names in messages are those of this folder; the small model lies in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "KVPOLL_DEBUG", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    Path("small.toml").write_text(SMALL)


class Told(SimpleNamespace):
    """Exit status and both outputs of one command."""

    status: int
    out: str
    err: str

    @property
    def object(self) -> dict[str, Any]:
        [line] = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Any:
    def told(*words: str) -> Told:
        status = main(("explore", *words))
        out, err = capsys.readouterr()
        return Told(status=status, out=out, err=err)

    return told


def assert_refused(told: Told, message: str) -> None:
    assert (told.status, told.out, told.err) == (2, "", f"kvpoll: {message}\n")


# --- what is told -----------------------------------------------------------------------------------


def test_reference_holds_and_the_last_line_repeats_it(tell: Any) -> None:
    told = tell("small.toml")
    assert (told.status, told.err) == (0, "")
    lines = told.out.splitlines()
    assert lines[0] == "small: one request and one fault"
    assert lines[1].startswith("profile reference: ") and " states, " in lines[1] and "symmetry" not in lines[1]
    assert lines[2].startswith("what must come true: judged on ") and lines[2].endswith(" states and their moves")
    assert lines[3].startswith("holds: S1, ") and "L1" in lines[3] and "R3" not in lines[3]
    assert lines[4:] == ["kvpoll explore small.toml --profile reference"]


def test_what_breaks_is_shown_with_its_shortest_path_and_exits_with_1(tell: Any) -> None:
    told = tell("small.toml", *SGLANG)
    assert (told.status, told.err) == (1, "")
    lines = told.out.splitlines()
    assert lines[3].split() == ["broken", "name", "moves", "replays", "what", "was", "seen"]
    start = next(number for number, line in enumerate(lines) if "shortest counterexample" in line)
    rows = [line.split() for line in lines[4:start]]
    assert [int(row[2]) for row in rows] == sorted(int(row[2]) for row in rows)
    assert {row[3] for row in rows} == {"yes"} and {row[0] for row in rows} > {"S4", "L2"}
    assert lines[start] == f"{rows[0][0]}, shortest counterexample ({rows[0][2]} moves):"
    assert lines[start + 1] == "    1   the router sends both legs of q1"
    assert lines[start + 3] == "    3 ! D0 gives q1 up"
    assert lines[-2] == "and nothing that is owed can happen any more"
    assert lines[-1] == "kvpoll explore small.toml --profile sglang-0.5.23"


def test_one_counterexample_can_be_asked_for(tell: Any) -> None:
    told = tell("small.toml", *SGLANG, "--show", "S4", "--no-liveness")
    lines = told.out.splitlines()
    assert "S4, shortest counterexample (8 moves):" in lines
    assert "what must come true was not judged (the graph is large; --liveness judges it all the same)" in lines
    assert not any(line.startswith("L2") for line in lines)
    idle = tell("small.toml", *SGLANG, "--invariant", "R1", "--no-liveness")
    assert idle.out.splitlines()[-2] == "and every node is idle"


def test_json_is_one_object_and_its_line_repeats_it(tell: Any) -> None:
    told = tell("small.toml", *SGLANG, "--json", "--invariant", "S4", "--invariant", "L2")
    found = told.object
    assert told.status == 1
    broken = [(each["invariant"], each["length"], each["cycle"]) for each in found["broken"]]
    assert broken == [("L2", 6, 0), ("S4", 8, 0)]
    assert found["broken"][1]["moves"][-1] == "P0 receives Metadata from D0"
    assert (found["model"], found["profile"], found["verdict"]) == ("small", "sglang-0.5.23", "breaks")
    assert found["complete"] is True and found["states"] > 100 and found["liveness_states"] > 100
    assert found["marks"] == ["fault decode_abort", "fault slowness"]
    assert found["exercised"] == ["L2", "S4"]
    line = "kvpoll explore small.toml --profile sglang-0.5.23 --invariant S4 --invariant L2"
    assert found["repeat"] == line

    again = tell(*shlex.split(line)[2:], "--json").object
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_only_what_is_named_is_judged(tell: Any) -> None:
    found = tell("small.toml", *SGLANG, "--json", "--invariant", "S1").object
    assert (found["verdict"], found["exercised"], found["liveness_states"]) == ("holds", ["S1"], None)


def test_a_rule_can_be_changed_and_stays_in_the_line(tell: Any) -> None:
    told = tell("small.toml", "--set", "clear_leaves=nothing", "--json")
    found = told.object
    assert (told.status, found["verdict"]) == (1, "breaks")
    assert found["profile"] == "reference+clear_leaves=nothing"
    assert found["repeat"] == "kvpoll explore small.toml --profile reference --set clear_leaves=nothing"
    same = tell("small.toml", "--set", "clear_leaves=tombstone", "--json", "--no-liveness").object
    assert (same["profile"], same["verdict"]) == ("reference", "holds")


def test_a_rule_that_is_set_to_what_it_is_changes_no_profile(tell: Any) -> None:
    """The scenario of such a counterexample once named the profile's base in its place."""
    words = ("--profile", "before-sglang-24772", "--set", "setup_failure=overwritten", "--invariant", "S3", "--first")
    assert tell("one-room", *words, "--out", "out").status == 1
    text = Path("out/one-room-before-sglang-24772-S3.toml").read_text()
    assert 'profile = "before-sglang-24772"' in text and "rules" not in text


# --- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [("--max-states", "50"), ("--max-depth", "4")])
def test_a_limit_says_that_this_is_no_proof(tell: Any, limit: tuple[str, str]) -> None:
    told = tell("small.toml", *SGLANG, *limit)
    assert told.status == 0
    assert "NOT complete (limit): what follows is of that part" in told.out.splitlines()
    assert told.out.splitlines()[-1] == f"kvpoll explore small.toml --profile sglang-0.5.23 {' '.join(limit)}"
    found = tell("small.toml", *SGLANG, *limit, "--json").object
    assert (found["complete"], found["verdict"], found["liveness_states"]) == (False, "holds", None)


def test_first_stops_at_the_first_level_that_breaks_anything(tell: Any) -> None:
    told = tell("small.toml", *SGLANG, "--first")
    assert told.status == 1 and "NOT complete (found): what follows is of that part" in told.out
    found = tell("small.toml", *SGLANG, "--first", "--json").object
    assert [(each["invariant"], each["length"]) for each in found["broken"]] == [("S4", 8)] and found["depth"] == 8


def test_symmetry_is_told_and_can_be_left_out(tell: Any) -> None:
    Path("two.toml").write_text(f'{SMALL}\n[[request]]\nrid = "q2"\nroom = 1002\n')
    limit = ("--max-depth", "8", "--invariant", "S1")
    with_it = tell("two.toml", *limit)
    assert "; symmetry 2" in with_it.out
    without = tell("two.toml", *limit, "--no-symmetry")
    assert "symmetry 2" not in without.out and without.out.splitlines()[-1].endswith(" --no-symmetry")
    counts = [int(told.out.splitlines()[1].split()[2].replace(",", "")) for told in (with_it, without)]
    assert counts[0] < counts[1] <= 2 * counts[0]


def test_too_large_a_model_is_one_line(tell: Any) -> None:
    told = tell("small.toml", "--memory", "0.00048828125")
    assert told.status == 2 and told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("kvpoll: model 'small' needs more than its 0.000488281 GiB: ")


def test_reference_that_has_not_seen_a_fault_does_not_hold(tell: Any) -> None:
    Path("vain.toml").write_text(SMALL.replace("sometimes = []", 'sometimes = ["never_seen"]'))
    told = tell("vain.toml", "--no-liveness")
    assert told.status == 1 and "NOT witnessed: never_seen" in told.out.splitlines()
    found = tell("vain.toml", *SGLANG, "--json", "--invariant", "S1").object
    assert found["not_witnessed"] == ["never_seen"] and found["verdict"] == "holds"


def test_several_models_end_with_the_worst(tell: Any) -> None:
    Path("other.toml").write_text(SMALL)
    told = tell("small.toml", "other.toml", *SGLANG, "--invariant", "S4", "--json")
    assert told.status == 1
    assert [json.loads(line)["model"] for line in told.out.splitlines()] == ["small", "other"]


# --- files ------------------------------------------------------------------------------------------


def test_out_writes_scenario_trace_and_picture(tell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    told = tell("small.toml", *SGLANG, "--invariant", "S4", "--out", "my races")
    name = "small-sglang-0.5.23-S4"
    assert sorted(path.name for path in Path("my races").iterdir()) == [f"{name}.jsonl", f"{name}.png", f"{name}.toml"]
    assert Path("my races", f"{name}.png").read_bytes().startswith(b"\x89PNG")
    line = f"kvpoll run 'my races/{name}.toml' --profile sglang-0.5.23 --seed 0"
    assert told.out.splitlines()[-2:] == [line, "kvpoll explore small.toml --profile sglang-0.5.23 --invariant S4"]
    assert main(shlex.split(line)[1:]) == 1
    assert f"exactly as {name} expects" in capsys.readouterr().out
    assert main(("replay", f"my races/{name}.jsonl")) == 0
    assert "Found by: kvpoll explore small.toml" in Path("my races", f"{name}.toml").read_text()


def test_another_spec_stays_in_the_lines(tell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other-spec.toml").write_text((HOUSE / "spec" / "kvpoll.toml").read_text())
    words = ("small.toml", *SGLANG, "--invariant", "S4", "--spec", "other-spec.toml", "--out", "out")
    told = tell(*words)
    assert told.out.splitlines()[-1].endswith(" --spec other-spec.toml")
    assert " --spec other-spec.toml " in told.out.splitlines()[-2]
    assert main(("replay", "out/small-sglang-0.5.23-S4.jsonl")) == 0
    assert capsys.readouterr().out.startswith("identical: ")


def test_an_out_that_cannot_be_written_is_one_line(tell: Any) -> None:
    told = tell("small.toml", *SGLANG, "--invariant", "S4", "--out", "small.toml")
    assert told.status == 2
    assert told.err == (
        "kvpoll: small.toml/small-sglang-0.5.23-S4.jsonl: cannot be written: File exists; choose another place\n"
    )


# --- ctrl-c -----------------------------------------------------------------------------------------


def test_ctrl_c_shows_what_was_seen_so_far() -> None:
    words = [*KVPOLL, "explore", "two-rooms", "--invariant", "S1", "--workers", "1"]
    for seconds in (2, 4, 8, 16):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if out:
            break
    assert (process.returncode, err) == (130, "")
    assert "NOT complete (interrupted): what follows is of that part" in out.splitlines()
    assert out.splitlines()[-1] == "kvpoll explore two-rooms --profile reference --invariant S1"


def test_ctrl_c_between_two_searches_ends_the_command(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While what must come true was judged, the first Ctrl-C used to go to the search that had ended."""
    seen: list[Any] = []

    def progressing(model: Any, screen: Any) -> Any:
        def tell_phase(phase: str, progress: Any) -> None:
            seen.append(phase)
            if phase == "behaviours":
                signal.raise_signal(signal.SIGINT)

        return nullcontext(tell_phase)

    monkeypatch.setattr(verb, "_progress", progressing)
    before = signal.getsignal(signal.SIGINT)
    told = tell("small.toml")
    assert (told.status, told.out, told.err) == (130, "", "kvpoll: interrupted\n")
    assert seen.count("behaviours") == 1 and signal.getsignal(signal.SIGINT) is before


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("one-rom", "unknown model 'one-rom' (did you mean 'one-room'?)"),
        ("nowhere.toml", "nowhere.toml: cannot be read: No such file or directory; check the path"),
        ("small.toml --profile refrence", "unknown profile 'refrence' (did you mean 'reference'?)"),
        ("small.toml --invariant S44", "'S44' is not an invariant (did you mean 'S4'?)"),
        ("small.toml --invariant s4", "'s4' is not an invariant (did you mean 'S4'?)"),
        ("small.toml --show X", None),
        ("small.toml --set early_abort", "--set early_abort: write rule=value; `kvpoll list rules` shows both"),
        (
            "small.toml --set early_abort=later",
            "--set early_abort=later: rule 'early_abort' has no value 'later' (valid: forgotten, remembered)",
        ),
        ("small.toml --max-states 0", "argument --max-states: must be 1 or more, got '0'; see `kvpoll explore --help`"),
        (
            "small.toml --max-depth x",
            "argument --max-depth: must be a whole number, got 'x'; see `kvpoll explore --help`",
        ),
        ("small.toml --memory 0", "argument --memory: must be a number above 0, got '0'; see `kvpoll explore --help`"),
        ("one-room small.toml --checkpoint f", "--checkpoint is for one model; name it"),
        (
            "small.toml --checkpoint small.toml",
            "small.toml: is not a checkpoint of an exploration (File is not a zip file); remove it to begin anew",
        ),
        ("small.toml --frist", "kvpoll explore has no option '--frist' (did you mean '--first'?)"),
    ],
)
def test_a_bad_command_is_refused(tell: Any, words: str, message: str | None) -> None:
    if message is None:
        told = tell(*words.split())
        assert told.status == 2 and told.err.startswith("kvpoll: 'X' is not an invariant (")
        assert told.err.count("\n") == 1 and "X" not in INVARIANTS
        return
    assert_refused(tell(*words.split()), message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[model]", "[modell]", "1: a model file begins with a [model] section"),
        ('kind = "transfer"', 'kind = "transfr"', "4: unknown kind 'transfr' (did you mean 'transfer'?)"),
        ('kind = "transfer"', "", "1: a model lacks `kind`"),
        ('title = "one request and one fault"', "", "1: a model lacks `title`"),
        ('title = "one request and one fault"', "title = 3", "2: `title` must be text, got 3"),
        ("exercises", "exercise", "8: unknown key 'exercise' (did you mean 'exercises'?)"),
        ('"early_abort"', '"erly_abort"', "8: unknown rule 'erly_abort' (did you mean 'early_abort'?)"),
        ("exercises = [", "checked = 1\nexercises = [", "8: `checked` must be true or false, got 1"),
        ('prefill = ["P0"]', "", "1: a transfer model lacks `prefill`"),
        ('decode = ["D0"]', 'decode = "D0"', "6: `decode` must be a list of names, got 'D0'"),
        ("pages = 1", "pages = 0", "7: `pages` must be from 1 to 8, got 0"),
        ("pages = 1", 'pages = "1"', "7: `pages` must be a number, got '1'"),
        ("[faults]", "[fault]", "11: unknown section 'fault' (did you mean 'faults'?)"),
        ("slowness", "slownes", "13: unknown fault 'slownes' (did you mean 'slowness'?)"),
        ("slowness = 1", "slowness = 10", "13: `slowness` must be a whole number from 0 to 9, got 10"),
        ("slowness = 1", "slowness = true", "13: `slowness` must be a whole number from 0 to 9, got True"),
        ("total = 1", "total = -1", "12: `total` must be a whole number from 0 to 9, got -1"),
        ("room = 1001", "room = 1000", "18: room numbers of models are above 1000, got 1000"),
        ("room = 1001", "", "16: a request lacks `room`"),
        ("room = 1001", 'room = "1001"', "18: `room` must be a number, got '1001'"),
        ('"start"', '"later"', """19: `when` must be "start" or "healed", got 'later'"""),
        ('when = "start"', 'decode = "D1"', "19: unknown decode engine 'D1' (did you mean 'D0'?)"),
        ('when = "start"', "attempts = 2", "19: unknown key 'attempts' (did you mean 'attempt'?)"),
        (
            'when = "start"\n',
            '\n[[request]]\nrid = "q1"\nroom = 1002\n',
            "16: each request needs a rid, and a (room, attempt), of its own",
        ),
        (SMALL[SMALL.index("[[request]]") :], "", "1: a model needs at least one [[request]]"),
        ("pages = 1", "pages =", "7: not valid TOML: Invalid value (at line 7, column 8)"),
    ],
)
def test_a_bad_model_is_refused(tell: Any, old: str, new: str, message: str) -> None:
    assert old in SMALL
    Path("bad.toml").write_text(SMALL.replace(old, new, 1))
    assert_refused(tell("bad.toml"), f"bad.toml:{message}")


def test_what_was_too_large_is_kept_and_goes_on_with_more_memory(tell: Any, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    told = tell("shared-room-small", "--memory", "0.0005", "--checkpoint", str(kept))
    assert told.status == 2
    assert f"it is kept in {kept}, and the same command goes on" in told.err
    whole = tell("shared-room-small", "--checkpoint", str(kept), "--no-liveness", "--json")
    assert (whole.status, whole.object["complete"]) == (0, True)
    assert whole.object["states"] == tell("shared-room-small", "--no-liveness", "--json").object["states"]
    assert not kept.exists()
