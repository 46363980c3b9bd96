"""The command line as a user meets it: what it prints, what it returns, and what it says of bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvpoll
from kvpoll.cli import main
from kvpoll.commands import demo, listing
from kvpoll.commands.plan import Plan
from kvpoll.commands.verdict import percentile
from kvpoll.sim.faults import kinds
from kvpoll.spec.invariants import INVARIANTS

HOUSE = Path(__file__).resolve().parents[2]
KVPOLL = (sys.executable, "-P", "-m", "kvpoll")
SHORT = ("--minutes", "0.2")

SMALL = """\
title = "a small cluster"

[topology.prefill]
dp = 2

[workload]
kind = "requests"
requests = [{ at_s = 0.5, input_tokens = 4000, output_tokens = 16 }]

[timing]
hostile_s = 5

[[fault]]
kind = "dp_override"
at_s = 0.2

[[expect]]
profile = "reference"
marks = ["fault:dp_override"]
"""

REQUEST = '{{"timestamp": {}, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}}\n'
WALL = ("wall_s", "events_per_s", "simulated_per_real")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names in messages are those of this folder; the small scenario lies in it."""
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
    def last(self) -> str:
        return str(self.out.splitlines()[-1])

    @property
    def object(self) -> dict[str, Any]:
        [line] = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Any:
    def told(*words: str) -> Told:
        status = main(words)
        out, err = capsys.readouterr()
        return Told(status=status, out=out, err=err)

    return told


def without_wall(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in WALL}


# --- the face ---------------------------------------------------------------------------------------


def test_the_version_is_the_one_in_pyproject(capsys: pytest.CaptureFixture[str]) -> None:
    declared = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"kvpoll {declared}\n")
    assert kvpoll.__version__ == declared


def test_every_public_name_is_there() -> None:
    assert {name for name in kvpoll.__all__ if not hasattr(kvpoll, name)} == set()
    assert kvpoll.load().profile("reference").name == "reference"
    with pytest.raises(AttributeError, match="has no attribute 'Machine'"):
        _ = kvpoll.Machine


def test_embedding_the_machine_costs_no_simulator_and_no_command_line() -> None:
    code = "import sys, kvpoll; kvpoll.Machines; print({'simpy', 'rich', 'argparse'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_python_m_kvpoll_is_the_command() -> None:
    told = subprocess.run([*KVPOLL, "run", "happy"], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.splitlines()[-1] == "kvpoll run happy --profile reference --seed 0"


# --- list and diagram -------------------------------------------------------------------------------


def test_list_names_everything(tell: Any) -> None:
    told = tell("list")
    assert told.status == 0
    headings = [line for line in told.out.splitlines() if line.isupper()]
    assert headings == ["SCENARIOS", "MODELS", "PROFILES", "INVARIANTS", "FAULTS", "RULES"]
    assert told.last == "kvpoll list --profile reference"
    found = tell("list", "--json").object
    assert [entry["id"] for entry in found["invariants"]] == list(INVARIANTS)
    assert [entry["kind"] for entry in found["faults"]] == list(kinds())
    assert {entry["name"] for entry in found["scenarios"]} >= {"main", "happy", "sglang-24772"}


def test_list_rules_shows_the_values_of_a_profile(tell: Any) -> None:
    [before] = [
        entry for entry in tell("list", "rules", "--profile", "before-sglang-25125", "--json").object["rules"]
        if entry["rule"] == "register_attempts"
    ]  # fmt: skip
    assert before["before-sglang-25125"] == 1


def test_diagram_prints_mermaid_under_a_comment_that_repeats_it(tell: Any) -> None:
    told = tell("diagram", "router", "--profile", "sglang-0.5.23")
    assert told.out.splitlines()[:2] == ["%% kvpoll diagram router --profile sglang-0.5.23", "stateDiagram-v2"]
    assert list(tell("diagram", "--json").object) == list(kvpoll.load().roles)


# --- reproduce --------------------------------------------------------------------------------------


def test_reproduce_prints_one_table_of_the_races(tell: Any) -> None:
    told = tell("reproduce")
    assert (told.status, told.err) == (0, "")
    lines = told.out.splitlines()
    assert lines[0].split("  ")[0] == "race" and lines[0].endswith("seed line")
    for race in ("sglang#24772", "sglang#26912", "sglang#22901", "sglang#25125", "sglang#21299"):
        rows = [cells for line in lines if (cells := re.split(r"\s{2,}", line))[0] == race]
        verdicts = {cells[1]: cells[2] for cells in rows}
        assert next(iter(verdicts)).startswith("before-") and next(iter(verdicts.values())) == "breaks"
        assert verdicts["reference"] == "holds"
    assert lines[-2].endswith("rows exactly as expected") and told.last == "kvpoll reproduce --seed 0"


def test_reproduce_one_race_under_one_profile_and_record_it(tell: Any) -> None:
    words = ("sglang-24772", "--profile", "before-sglang-24772")
    told = tell("reproduce", *words, "--trace-dir", "traces")
    assert told.status == 0
    row = told.out.splitlines()[1]
    assert "breaks   S3 S10 (+" in row and row.endswith(f"kvpoll run {' '.join(words)} --seed 0")
    [trace] = Path("traces").iterdir()
    assert trace.name == "sglang-24772.before-sglang-24772.seed0.jsonl"
    assert tell("replay", str(trace)).status == 0
    [row] = tell("reproduce", *words, "--json").object["rows"]
    assert (row["label"], row["verdict"], row["as_expected"]) == ("before-sglang-24772", "breaks", True)
    assert {found["invariant"] for found in row["violations"]} >= {"S3", "S10"}


def test_reproduce_says_everything_that_is_not_as_expected(tell: Any) -> None:
    text = SMALL.replace('marks = ["fault', 'shows = ["S1"]\ncauses = ["sunspots"]\nmarks = ["never", "fault')
    Path("wrong.toml").write_text(text.replace("at_s = 0.2", "at_s = 0.2\nshare = 0"))
    told = tell("reproduce", "wrong.toml")
    assert told.status == 1
    assert told.out.splitlines()[1].split()[2:6] == ["holds", "-", "-", "NO"]
    assert told.out.splitlines()[3:] == [
        "wrong under reference: S1 was expected to break and did not; mark 'never' was never seen; "
        "mark 'fault:dp_override' was never seen; no request failed with cause 'sunspots'; "
        "fault 'dp_override' never did anything",
        "1 of 1 row not as expected",
        "kvpoll reproduce wrong.toml --seed 0",
    ]


# --- run --------------------------------------------------------------------------------------------


def test_run_tells_what_happened_and_how_to_repeat_it(tell: Any) -> None:
    told = tell("run", "small.toml", "--seed", "3")
    assert (told.status, told.err) == (0, "")
    lines = told.out.splitlines()
    assert lines[:2] == ["small: a small cluster", "profile reference, seed 3, 5 s of requests and faults"]
    assert lines[4].split()[:4] == ["dp_override", "R", "0.2", "s"] and lines[4].endswith("yes")
    assert lines[-3:] == [
        "holds: no invariant broke",
        "exactly as small expects",
        "kvpoll run small.toml --profile reference --seed 3",
    ]


def test_run_shows_each_violation_and_exits_with_1(tell: Any) -> None:
    told = tell("run", "sglang-24772", "--profile", "before-sglang-24772")
    assert told.status == 1
    assert "breaks: 7 invariants" in told.out
    assert "D0: SetupFinished moved the room from Failed back to WaitingForInput" in told.out
    assert told.out.splitlines()[-2] == "exactly as sglang-24772 expects"


def test_a_label_or_its_rules_name_the_same_run(tell: Any) -> None:
    label = tell("run", "sglang-22901", "--profile", "reference (query)", "--json").object
    rules = tell("run", "sglang-22901", "--set", "dp_lookup=query", "--json").object
    assert label["as_expected"] and rules["as_expected"]
    assert label["repeat"] == "kvpoll run sglang-22901 --profile 'reference (query)' --seed 0"
    assert rules["repeat"] == "kvpoll run sglang-22901 --profile reference --set dp_lookup=query --seed 0"
    label["repeat"] = rules["repeat"]
    assert without_wall(label) == without_wall(rules)


def test_main_draws_a_fault_of_every_kind(tell: Any) -> None:
    found = tell("run", *SHORT, "--json").object
    assert sorted(fault["kind"] for fault in found["faults"]) == sorted(kinds())
    assert found["verdict"] == "holds" and "as_expected" not in found
    assert found["repeat"] == "kvpoll run main --profile reference --minutes 0.2 --seed 0"
    other = tell("run", *SHORT, "--json", "--seed", "1").object
    assert other["faults"] != found["faults"]
    none = tell("run", *SHORT, "--json", "--faults", "none").object
    assert none["faults"] == [] and none["failed_by_first_cause"] == {}
    assert none["repeat"] == "kvpoll run main --profile reference --minutes 0.2 --faults none --seed 0"


def test_run_replays_a_recorded_workload(tell: Any) -> None:
    Path("hour.jsonl").write_text("".join(REQUEST.format(1000 * number) for number in range(60)))
    found = tell("run", "--trace", "hour.jsonl", *SHORT, "--faults", "none", "--json").object
    assert found["requests"] == found["succeeded"] == 12 + 8  # 12 s of the trace, and the probes of main
    assert set(found["ttft_s"]) == {"p50", "p90", "p99"} and 0 < found["ttft_s"]["p50"] < 1


def test_the_last_line_repeats_the_run(tell: Any) -> None:
    first = tell("run", *SHORT, "--set", "dp_lookup=query", "--seed", "5", "--json").object
    again = tell(*shlex.split(first["repeat"])[1:], "--json").object
    assert without_wall(first) == without_wall(again)


def test_a_seed_repeats_byte_for_byte_in_another_process() -> None:
    for hash_seed in ("1", "2"):
        words = [*KVPOLL, "run", *SHORT, "--seed", "7", "--record", f"{hash_seed}.jsonl"]
        subprocess.run(words, env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True, capture_output=True)
    first, second = Path("1.jsonl").read_bytes(), Path("2.jsonl").read_bytes()
    assert first.count(b"\n") > 1000 and first == second


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.5, 0.9, 0.99)] == [2.0, 4.0, 4.0]
    assert percentile([], 0.5) is None


# --- replay -----------------------------------------------------------------------------------------


def test_replay_compares_with_the_recording(tell: Any) -> None:
    told = tell("run", "small.toml", "--record", "new/small.jsonl")
    digest = told.out.partition("digest ")[2].partition(";")[0]
    lines = len(Path("new/small.jsonl").read_text().splitlines())
    told = tell("replay", "new/small.jsonl")
    repeat = "kvpoll run small.toml --profile reference --seed 0"
    assert (told.status, told.out) == (0, f"identical: {lines} lines, digest {digest}\n{repeat}\n")
    found = tell("replay", "new/small.jsonl", "--json").object
    assert found == {"identical": True, "difference": None, "digest": digest, "repeat": repeat}


def test_replay_shows_the_first_line_that_differs(tell: Any) -> None:
    tell("run", "small.toml", "--record", "small.jsonl")
    lines = Path("small.jsonl").read_text().splitlines()
    tampered = lines[20].replace('"t":', '"t":1')
    Path("small.jsonl").write_text("\n".join([*lines[:20], tampered, *lines[21:]]) + "\n")
    told = tell("replay", "small.jsonl")
    assert told.status == 1
    assert told.out.splitlines()[:3] == [
        "small.jsonl:21: differs",
        f"  recorded: {tampered}"[:312] + (" ..." if len(tampered) > 300 else ""),
        f"  repeated: {lines[20]}"[:312] + (" ..." if len(lines[20]) > 300 else ""),
    ]


def test_replay_sees_that_a_recording_was_cut_or_goes_on(tell: Any) -> None:
    tell("run", "small.toml", "--record", "small.jsonl")
    text = Path("small.jsonl").read_text()
    number = len(text.splitlines())
    Path("small.jsonl").write_text(text[: text.rindex("\n", 0, -1) + 1])
    told = tell("replay", "small.jsonl")
    assert told.status == 1 and told.out.startswith(f"small.jsonl:{number}: differs\n  recorded: (has ended)\n")
    Path("small.jsonl").write_text(text + "{}\n")
    told = tell("replay", "small.jsonl")
    assert told.status == 1
    assert told.out.startswith(f"small.jsonl:{number + 1}: differs\n  recorded: {{}}\n  repeated: (has ended)\n")


def test_replay_says_that_the_scenario_has_changed(tell: Any) -> None:
    tell("run", "small.toml", "--record", "small.jsonl")
    Path("small.toml").write_text(SMALL + "# a remark\n")
    told = tell("replay", "small.jsonl")
    assert told.status == 1
    assert "small.jsonl:1: differs" in told.out
    assert "since the recording: the scenario file has changed" in told.out


def test_replay_runs_a_line_twice(tell: Any) -> None:
    line = "kvpoll run small.toml --profile reference --seed 4"
    told = tell("replay", line)
    assert told.status == 0 and told.last == line
    assert told.out.startswith("identical: digest ")
    assert tell("replay", line, "--json").object["identical"] is True


# --- many seeds -------------------------------------------------------------------------------------


def results(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def test_seeds_get_a_line_each_and_a_rerun_skips_what_is_done(tell: Any) -> None:
    told = tell("run", "small.toml", "--seeds", "3", "--jobs", "2", "--out", "out")
    assert (told.status, told.err) == (0, "")
    lines = told.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["seed", "0"], ["seed", "1"], ["seed", "2"]]
    assert all(" holds " in line for line in lines[:3])
    assert lines[-2] == "every invariant holds in 3 of 3 seeds"
    assert told.last == "kvpoll run small.toml --profile reference --seed 0 --seeds 3 --out out"
    before = results("out")
    assert {record["seed"]: record["holds"] for record in before} == {0: True, 1: True, 2: True}

    torn = Path("out/results.jsonl")
    torn.write_text(torn.read_text() + '{"seed": 3, "hol')  # as a crash in the middle of a line would leave it
    told = tell("run", "small.toml", "--seed", "1", "--seeds", "3", "--out", "out", "--json")
    assert told.object["seeds"] == told.object["hold"] == 3
    assert results("out")[:3] == before and [record["seed"] for record in results("out")[3:]] == [3]


def test_seeds_that_break_are_listed_and_the_first_can_be_repeated(tell: Any) -> None:
    told = tell("run", "sglang-24772", "--profile", "before-sglang-24772", "--seeds", "2")
    assert told.status == 1
    assert "S3 broke in 2 seeds: 0, 1" in told.out.splitlines()
    assert told.out.splitlines()[-2] == "every invariant holds in 0 of 2 seeds"
    assert told.last == "kvpoll run sglang-24772 --profile before-sglang-24772 --seed 0"


def test_results_of_another_run_are_not_mixed_in(tell: Any) -> None:
    tell("run", "small.toml", "--seeds", "1", "--out", "out")
    told = tell("run", "small.toml", "--seeds", "1", "--out", "out", "--faults", "none")
    cause = (
        "this result is of another run (kvpoll run small.toml --profile reference --seed 0), or spec or "
        "scenario have changed since; choose another --out"
    )
    assert (told.status, told.err) == (2, f"kvpoll: out/results.jsonl:1: {cause}\n")
    Path("out/results.jsonl").write_text("hello\n")
    told = tell("run", "small.toml", "--seeds", "1", "--out", "out")
    cause = "not a result of `kvpoll run --seeds`; choose another --out"
    assert (told.status, told.err) == (2, f"kvpoll: out/results.jsonl:1: {cause}\n")


def test_ctrl_c_leaves_the_finished_seeds_and_a_rerun_goes_on() -> None:
    words = [*KVPOLL, "run", *SHORT, "--out", "out", "--seeds"]
    process = subprocess.Popen([*words, "50"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = Path("out/results.jsonl")
    wait_until(lambda: path.exists() and path.read_text().count("\n") >= 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    done = results("out")
    assert 2 <= len(done) < 50
    assert f"interrupted: {len(done)} of 50 seeds done" in out
    assert (
        out.splitlines()[-1] == f"kvpoll run main --profile reference {' '.join(SHORT)} --seed 0 --seeds 50 --out out"
    )

    wanted = str(len(done) + 1)
    again = subprocess.run([*words, wanted], capture_output=True, text=True)
    assert again.stdout.splitlines()[0].endswith("already in out/results.jsonl")
    assert results("out")[: len(done)] == done
    assert {record["seed"] for record in results("out")} >= set(range(int(wanted)))


def test_ctrl_c_in_one_run_leaves_a_readable_trace() -> None:
    words = [*KVPOLL, "run", "--record", "main.jsonl"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = Path("main.jsonl")
    wait_until(lambda: path.exists() and path.stat().st_size > 100_000, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert "interrupted after " in out and out.splitlines()[-1] == "kvpoll run main --profile reference --seed 0"
    with path.open() as file:
        header, events = kvpoll.read_trace(file, "main.jsonl")
        assert header["seed"] == 0 and sum(1 for _ in events) > 100


def test_ctrl_c_while_the_simulator_is_still_loading_is_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'simpy': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from kvpoll.cli import main\n"
        "sys.exit(main(['list']))\n"
    )
    told = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr) == (130, "", "kvpoll: interrupted\n")


def wait_until(true: Any, process: subprocess.Popen[str]) -> None:
    for _ in range(1500):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    pytest.fail("nothing was written in 30 s")


# --- bad input: one line with place, cause and mend, status 2 ---------------------------------------


def assert_refused(told: Told, message: str) -> None:
    assert (told.status, told.out, told.err) == (2, "", f"kvpoll: {message}\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hostile_s", "hostil_s", "11: unknown key 'hostil_s' (did you mean 'hostile_s'?)"),
        ("hostile_s = 5", "hostile_s = -5", "11: hostile_s must not be negative, got -5"),
        ("dp_override", "dp_overide", "14: unknown fault 'dp_overide' (did you mean 'dp_override'?)"),
        ("at_s = 0.2", "at_s = -0.2", "15: at_s must not be negative, got -0.2"),
        ("at_s = 0.2", 'target = "P7"', "15: no node 'P7' in this cluster (did you mean 'P0'?)"),
        ("at_s = 0.5", "at_s = -0.5", "8: at_s must not be negative, got -0.5"),
        ("dp = 2", "dp = 0", "4: this cluster cannot exist: prefill dp is 0"),
        ('"requests"', '"request"', "7: unknown workload 'request' (did you mean 'requests'?)"),
        ('"reference"', '"refrence"', "18: unknown profile 'refrence' (did you mean 'reference'?)"),
        ("marks", "rules = { dp_lokup = 1 }\nmarks", "19: unknown rule 'dp_lokup' (did you mean 'dp_lookup'?)"),
        ("marks", 'shows = ["L77"]\nmarks', "19: unknown invariant 'L77' (did you mean 'L7'?)"),
        ("dp = 2", "dp =", "4: not valid TOML: Invalid value (at line 4, column 5)"),
    ],
)
def test_a_bad_scenario_is_refused(tell: Any, old: str, new: str, message: str) -> None:
    assert old in SMALL
    Path("bad.toml").write_text(SMALL.replace(old, new, 1))
    assert_refused(tell("run", "bad.toml"), f"bad.toml:{message}")
    assert_refused(tell("reproduce", "bad.toml", "--json"), f"bad.toml:{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            REQUEST.format(0) + REQUEST.format(2000)[:40],
            "2: not a whole JSON object (is the line truncated?); fetch the trace again or delete the line",
        ),
        (
            REQUEST.format(2000) + REQUEST.format(1000),
            "2: timestamp 1000 is before 2000 of the line above; sort by timestamp",
        ),
        (REQUEST.format(-1), "1: timestamp is -1; give an integer from 0 to 9007199254740992"),
        ("", "1: the file is empty; give a trace with one request a line"),
    ],
)
def test_a_bad_workload_is_refused(tell: Any, text: str, message: str) -> None:
    Path("bad.jsonl").write_text(text)
    assert_refused(tell("run", "--trace", "bad.jsonl"), f"bad.jsonl:{message}")
    assert_refused(tell("run", "--trace", "bad.jsonl", "--seeds", "2"), f"bad.jsonl:{message}")


def test_a_bad_spec_is_refused(tell: Any) -> None:
    spec = (HOUSE / "spec" / "kvpoll.toml").read_text()
    lines = spec.splitlines()
    number = next(number for number, line in enumerate(lines) if 'to = "Bootstrapping"' in line)
    lines[number] = lines[number].replace('to = "Bootstrapping"', 'to = "Bootstraping"')
    Path("bad.toml").write_text("\n".join(lines))
    message = f"bad.toml:{number + 1}: unknown state 'Bootstraping' (did you mean 'Bootstrapping'?)"
    assert_refused(tell("run", "happy", "--spec", "bad.toml"), message)
    Path("same.toml").write_text(spec)
    told = tell("run", "happy", "--spec", "same.toml")
    assert (told.status, told.last) == (0, "kvpoll run happy --profile reference --spec same.toml --seed 0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runn", "unknown verb 'runn' (did you mean 'run'?)"),
        ("run hapy", "unknown scenario 'hapy' (did you mean 'happy'?)"),
        ("run nowhere.toml", "nowhere.toml: cannot be read: No such file or directory; check the path"),
        ("run --profile refrence", "--profile: unknown profile 'refrence' (did you mean 'reference'?)"),
        ("run --sed 3", "kvpoll run has no option '--sed' (did you mean '--seed'?)"),
        ("run --sed=3", "kvpoll run has no option '--sed' (did you mean '--seed'?)"),
        ("run happy sad", "kvpoll run does not know what to do with 'sad'; see `kvpoll run --help`"),
        ("run --seed x", "argument --seed: must be a whole number, got 'x'; see `kvpoll run --help`"),
        ("run --seeds 0", "argument --seeds: must be 1 or more, got '0'; see `kvpoll run --help`"),
        ("run --minutes -3", "argument --minutes: must be a number above 0, got '-3'; see `kvpoll run --help`"),
        ("run --minutes ten", "argument --minutes: must be a number above 0, got 'ten'; see `kvpoll run --help`"),
        ("run --faults som", "unknown --faults 'som' (valid: all, none, scenario)"),
        ("run --set dp_lookup", "--set dp_lookup: write rule=value; `kvpoll list rules` shows both"),
        ("run --set dp_lokup=1", "--set dp_lokup=1: unknown rule 'dp_lokup' (did you mean 'dp_lookup'?)"),
        (
            "run --set dp_lookup=ask",
            "--set dp_lookup=ask: rule 'dp_lookup' has no value 'ask' (valid: derive, query)",
        ),
        (
            "run --set register_attempts=-1",
            "--set register_attempts=-1: rule 'register_attempts' is a number of attempts and not negative, got '-1'",
        ),
        ("run --seeds 2 --record x", "--record writes one trace; leave --seeds away"),
        ("run --out x", "--out is for many seeds; add --seeds N"),
        ("run --jobs 2", "--jobs is for many seeds; add --seeds N"),
        (
            "run happy --record small.toml/x",
            "small.toml/x: cannot be written: File exists; choose another place",
        ),
        (
            "run happy --seeds 1 --out small.toml",
            "small.toml/results.jsonl: cannot be used for results: File exists; choose another --out",
        ),
        ("reproduce hapy", "unknown scenario 'hapy' (did you mean 'happy'?)"),
        (
            "reproduce happy --profile refrence",
            "--profile: none of these scenarios speaks of 'refrence' (did you mean 'reference'?)",
        ),
        ("list fault", "there is no list of 'fault' (did you mean 'faults'?)"),
        ("list rules --profile refrence", "unknown profile 'refrence' (did you mean 'reference'?)"),
        ("diagram sendr", "unknown role 'sendr' (did you mean 'sender'?)"),
        (
            "replay nowhere.jsonl",
            "nowhere.jsonl: cannot be read: No such file or directory; give a recorded trace or a quoted line",
        ),
        (
            "replay small.toml",
            'small.toml:1: a kvpoll trace starts with a header line {"kvpoll_trace": 1, ...}',
        ),
    ],
)
def test_a_bad_command_is_refused(tell: Any, words: str, message: str) -> None:
    assert_refused(tell(*words.split()), message)


def test_a_trace_that_cannot_be_repeated_is_refused(tell: Any) -> None:
    Path("other.jsonl").write_text('{"kvpoll_trace": 1}\n')
    message = "other.jsonl:1: the header has no line to repeat; only what kvpoll recorded can be replayed"
    assert_refused(tell("replay", "other.jsonl"), message)
    Path("other.jsonl").write_text('{"kvpoll_trace": 1, "repeat": "rm -r x"}\n')
    message = "other.jsonl:1: cannot repeat 'rm -r x': it does not begin with `kvpoll run`"
    assert_refused(tell("replay", "other.jsonl"), message)
    Path("other.jsonl").write_bytes(b"\xff\xfe")
    assert_refused(tell("replay", "other.jsonl"), "other.jsonl:1: is not text; a kvpoll trace was expected")


def test_a_scenario_without_expectations_cannot_be_reproduced(tell: Any) -> None:
    Path("mute.toml").write_text(SMALL.partition("[[expect]]")[0])
    message = "mute.toml: says of no profile what must come of it; add [[expect]], or use `kvpoll run`"
    assert_refused(tell("reproduce", "mute.toml"), message)
    assert tell("run", "mute.toml").status == 0


def test_no_verb_shows_the_verbs(tell: Any) -> None:
    told = tell()
    assert told.status == 2 and "reproduce" in told.err and told.out == ""


# --- defects, pipes, terminals ----------------------------------------------------------------------


def test_a_defect_is_one_line_and_its_details_wait_for_kvpoll_debug(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str | None) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(listing, "read_spec", broken)
    told = tell("list")
    line = "kvpoll: a defect of kvpoll: RuntimeError: two lines; please report it, with what KVPOLL_DEBUG=1 prints\n"
    assert (told.status, told.err) == (3, line)
    monkeypatch.setenv("KVPOLL_DEBUG", "1")
    told = tell("list")
    assert told.err.startswith("Traceback ") and told.err.endswith(line)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    words = " ".join(shlex.quote(word) for word in KVPOLL)
    told = subprocess.run(f"{words} list | head -1", shell=True, capture_output=True, text=True)
    assert (told.stdout, told.stderr) == ("SCENARIOS\n", "")


def test_a_narrow_terminal_gets_the_seed_lines_below_the_table(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "90")
    line = "kvpoll run sglang-24772 --profile before-sglang-24772 --seed 0"
    narrow = tell("reproduce", "sglang-24772").out.splitlines()
    assert f"  {line}" in narrow
    assert any("\x1b[31mbreaks" in row and line not in row for row in narrow)
    monkeypatch.setenv("COLUMNS", "200")
    wide = tell("reproduce", "sglang-24772")
    assert any("\x1b[31mbreaks" in row and line in row for row in wide.out.splitlines())
    assert "3 of 3" in wide.err or "2 of 3" in wide.err


def test_seed_lines_stay_whole_beside_a_progress_bar(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    told = tell("run", "small.toml", "--seeds", "1")
    [line] = [row for row in told.err.splitlines() if "draw" in row]
    assert line.rstrip().endswith(" s") and "TTFT p50" in line


# --- verbs that hand over ---------------------------------------------------------------------------


def test_demo_shows_the_fit_the_races_and_a_run(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Plan", lambda: Plan(minutes=0.2))
    told = tell("demo")
    assert (told.status, told.err) == (0, "")
    assert "fitted to 12,031 requests in 3540 s" in told.out
    [rate] = [line.split() for line in told.out.splitlines() if line.startswith("requests/s ")]
    assert rate[1] == "3.3986" and abs(float(rate[2]) - 3.4) < 0.2
    assert "rows exactly as expected" in told.out and "holds: no invariant broke" in told.out
    assert told.last == "kvpoll demo --seed 0"
    found = tell("demo", "--json").object
    assert list(found) == ["workload", "reproduce", "run"] and found["run"]["verdict"] == "holds"


def test_report_draws_into_a_folder(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw_all(out: Path, progress: Any) -> list[Path]:
        progress("one race")
        return [out / "race.png"]

    monkeypatch.setitem(sys.modules, "kvpoll.reports.races", SimpleNamespace(draw_all=draw_all))
    assert tell("report", "--out", "figures").out == "figures/race.png\nkvpoll report --out figures\n"
    found = tell("report", "--json").object
    assert found == {"figures": ["reports/figures/race.png"], "repeat": "kvpoll report --out reports/figures"}


@pytest.mark.parametrize("verb", ["report", "diagram"])
def test_without_matplotlib_figures_say_what_to_install(verb: str) -> None:
    code = f"import sys; sys.modules['matplotlib'] = None; from kvpoll.cli import main; sys.exit(main(['{verb}']))"
    told = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    message = "kvpoll: figures need matplotlib, which is missing: pip install 'kvpoll[reports]'\n"
    assert (told.returncode, told.stderr) == (2, message)


def test_bench_gets_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "kvpoll.bench", SimpleNamespace(main=given.append))
    assert main(["bench", "--only", "step"]) == 0
    assert given == [["--only", "step"]]
