"""Campaigns: swarm draws in parallel into a store that outlives Ctrl-C, repeats, and says what broke and why."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpoll.cli import main
from kvpoll.commands import campaign as verb
from kvpoll.commands.campaign import identity_of, run_seed
from kvpoll.commands.plan import Plan, Prepared, prepare
from kvpoll.sim import campaign as runner
from kvpoll.sim.campaign import by_fault, play, summarise
from kvpoll.sim.campaign_store import Result, Store
from kvpoll.sim.faults import kinds
from kvpoll.sim.swarm import draw_swarm
from kvpoll.spec.source import BadInput

SHORT = ("--minutes", "0.2")
ONE = ("--workers", "1")
KVPOLL = (sys.executable, "-P", "-m", "kvpoll")
SHIPPED = ("campaign", *SHORT, *ONE, "--profile", "sglang-0.5.23", "--seeds", "8")
SMALL = """\
title = "a small cluster"
[workload]
kind = "poisson"
rate_per_s = 4
input_tokens = 4000
output_tokens = 16
[timing]
hostile_s = 4
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def stored(question: str, path: str = "campaign.sqlite") -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(question).fetchall()
    finally:
        connection.close()


def digest_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------- run, repeat, resume


def test_each_seed_prints_its_draw_and_only_missing_seeds_are_run(tell: Any) -> None:
    told = tell("campaign", "small.toml", *ONE, "--seeds", "3", "--verbose")
    assert (told.status, told.err) == (0, "")
    lines = told.out.splitlines()
    small = prepare(Plan("small.toml")).scenario
    for seed in range(3):
        assert lines[seed].split()[:3] == ["seed", str(seed), "holds"]
        assert lines[seed].endswith(draw_swarm(seed, small).line)
    assert lines[-2] == "every invariant holds in 3 of 3 seeds"
    tail = "--store campaign.sqlite --workers 1"
    assert told.last == f"kvpoll campaign small.toml --profile reference --seed 0 --seeds 3 {tail}"
    before = stored("SELECT * FROM runs ORDER BY seed")

    told = tell("campaign", "small.toml", *ONE, "--seeds", "5", "--verbose")
    assert told.out.splitlines()[0] == "3 seeds already in campaign.sqlite"
    assert [line.split()[1] for line in told.out.splitlines() if line.startswith("seed")] == ["3", "4"]
    assert stored("SELECT * FROM runs ORDER BY seed")[:3] == before
    quiet = tell("campaign", "small.toml", *ONE, "--seed", "2", "--seeds", "2")
    assert "seed " not in quiet.out.partition("fault ")[0].replace("2 seeds already", "")
    assert quiet.out.splitlines()[-2] == "every invariant holds in 2 of 2 seeds"


def test_the_printed_line_repeats_a_seed_byte_for_byte_in_another_process(tell: Any) -> None:
    tell("campaign", *SHORT, "--seed", "5", "--seeds", "3", "--workers", "2")
    rows = stored("SELECT seed, digest, repeat, draw FROM runs ORDER BY seed")
    assert [row[0] for row in rows] == [5, 6, 7]
    for seed, digest, repeat, draw in rows:
        assert repeat == f"kvpoll run main --profile reference --minutes 0.2 --swarm --seed {seed}"
        words = [*KVPOLL, *shlex.split(repeat)[1:], "--record", "again.jsonl"]
        again = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "3"})
        assert again.returncode == 0 and draw in again.stdout.splitlines()
        assert digest_of("again.jsonl") == digest
    assert tell("replay", "again.jsonl").status == 0
    assert tell("replay", repeat, "--json").object["digests"] == [digest, digest]


def test_workers_and_their_number_change_nothing(tell: Any) -> None:
    for workers in ("1", "2"):
        tell("campaign", "small.toml", "--seeds", "4", "--workers", workers, "--store", f"{workers}.sqlite")
    columns = "seed, digest, verdict, counts, draw, faults, fired, causes, events, repeat"
    rows = [stored(f"SELECT {columns} FROM runs ORDER BY seed", f"{workers}.sqlite") for workers in (1, 2)]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on() -> None:
    words = [*KVPOLL, "campaign", *SHORT, "--workers", "2", "--verbose", "--seeds"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([*words, "300"], stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(3)]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    told = [line for line in [*seen, *out.splitlines()] if line.startswith("seed ")]
    done = stored("SELECT * FROM runs ORDER BY seed")
    # A seed is stored, then told: Ctrl-C may come in between.
    assert 3 <= len(told) <= len(done) <= len(told) + 1 and len(done) < 300
    assert f"interrupted: {len(done)} of 300 seeds done; to go on:" in out
    line = f"kvpoll campaign main --profile reference {' '.join(SHORT)} --seed 0 --seeds 300 --store campaign.sqlite"
    assert out.splitlines()[-1] == f"{line} --workers 2"

    wanted = max(row[1] for row in done) + 2
    again = subprocess.run([*words, str(wanted)], capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stdout.splitlines()[0].endswith("already in campaign.sqlite")
    after = {row[1]: row for row in stored("SELECT * FROM runs")}
    assert after.keys() == {*range(wanted)} and all(after[row[1]] == row for row in done)
    whole = stored("SELECT seed, digest FROM runs ORDER BY seed")
    assert [run_seed_digest(seed) for seed, _ in whole[-2:]] == [digest for _, digest in whole[-2:]]


def run_seed_digest(seed: int) -> str | None:
    plan = Plan(minutes=0.2, faults="swarm")
    result = run_seed(plan, identity_of(prepare(plan)).key, seed)
    assert result is not None
    return result.digest


def test_ctrl_c_with_one_worker_is_the_same(monkeypatch: pytest.MonkeyPatch, tell: Any) -> None:
    def interrupted(self: Prepared, seed: int, **more: Any) -> Any:
        run = whole(self, seed, **more)
        if seed == 2:
            run.progress = interrupt
        return run

    def interrupt(done: float, all_of_it: float) -> None:
        raise KeyboardInterrupt

    whole = Prepared.run
    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "run", interrupted)
        told = tell("campaign", "small.toml", *ONE, "--seeds", "4")
    assert (told.status, stored("SELECT seed FROM runs")) == (130, [(0,), (1,)])
    assert "interrupted: 2 of 4 seeds done; to go on:" in told.out
    assert tell("campaign", "small.toml", *ONE, "--seeds", "4").out.startswith("2 seeds already in campaign.sqlite\n")
    assert stored("SELECT seed, verdict FROM runs ORDER BY seed") == [(seed, "holds") for seed in range(4)]


# ------------------------------------------------------------------------------------------------- what is found


def test_a_profile_with_defects_is_grouped_by_invariant_cause_and_fault(tell: Any) -> None:
    told = tell(*SHIPPED)
    assert told.status == 1
    found = tell(*SHIPPED, "--json").object
    singles = [json.loads(tell(*shlex.split(run["repeat"])[1:], "--json").out) for run in found["runs"]]
    broken = [{entry["invariant"]: entry["times"] for entry in run["violations"]} for run in singles]
    assert [run["counts"] for run in found["runs"]] == broken
    assert found["broken"] == sum(bool(each) for each in broken) >= 5

    seeds = {name: [seed for seed, each in enumerate(broken) if name in each] for each in broken for name in each}
    assert {entry["invariant"]: entry["runs"] for entry in found["by_invariant"]} == {
        name: len(those) for name, those in seeds.items()
    }
    for entry in found["by_invariant"]:
        assert entry["first_seed"] == seeds[entry["invariant"]][0]
        assert entry["repeat"] == singles[entry["first_seed"]]["repeat"]
        assert entry["first_in"] == sum(
            run["violations"][0]["invariant"] == entry["invariant"] for run in singles if run["violations"]
        )

    causes: Counter[str] = Counter()
    for run in singles:
        causes.update(run["failed_by_first_cause"])
    assert {entry["cause"]: entry["requests"] for entry in found["by_first_cause"]} == causes
    fired = [{fault["kind"] for fault in run["faults"] if fault["fired"]} for run in singles]
    assert [set(run["fired"]) for run in found["runs"]] == fired
    for entry in found["by_fault"]:
        drawn = {number for number, run in enumerate(singles) if entry["kind"] in {f["kind"] for f in run["faults"]}}
        assert (entry["drawn"], entry["fired"]) == (len(drawn), sum(entry["kind"] in each for each in fired))
        assert entry["broken_with"] == sum(bool(broken[number]) for number in drawn)
        assert entry["broken_with"] + entry["broken_without"] == found["broken"]
    assert any(entry["fired"] for entry in found["by_fault"])
    check_tables(told, found)


def check_tables(told: Told, found: dict[str, Any]) -> None:
    """The same for people: what broke when it broke, with draw and line; then the three tables."""
    lines = told.out.splitlines()
    first = next(run for run in found["runs"] if run["counts"])
    assert f"  {first['draw']}" in lines and f"  {first['repeat']}" in lines
    text = f"{first['node']}: {first['text']}"
    assert any(line.startswith(f"  {first['invariant']} first, at ") and line.endswith(text) for line in lines)
    for heading in ("fault ", "first cause of failure ", "invariant "):
        assert sum(line.startswith(heading) for line in lines) == 1
    for entry in found["by_invariant"]:
        [row] = [line for line in lines if line.startswith(entry["invariant"] + " ")]
        assert row.split()[2] == str(entry["runs"]) and row.endswith(entry["repeat"])
    warning = f"WARNING: drawn, but never did anything: {', '.join(found['never_fired'])}"
    assert (warning in lines) == bool(found["never_fired"])
    assert told.last == first["repeat"]
    assert lines[-2] == f"every invariant holds in {found['hold']} of {found['seeds']} seeds"


def result(seed: int, drawn: list[str], fired: dict[str, int], **counts: int) -> Result:
    invariant = next(iter(counts), None)
    return Result(
        seed, "d", "breaks" if counts else "holds", invariant, "D0", 1.0, "t", counts, "", [{"kind": k} for k in drawn],
        fired, {"left": seed}, 9, 9 - seed, 10, 1.0, 0.5, f"line {seed}",
    )  # fmt: skip


def test_the_summary_counts_runs_and_names_what_never_fired() -> None:
    results = [
        result(1, ["partition", "slow_link", "slow_link"], {"partition": 2}, S2=3, L1=1),
        result(2, ["slow_link"], {}, L1=5),
        result(3, ["partition"], {"partition": 1}),
    ]
    found = summarise(results)
    assert (found["seeds"], found["hold"], found["broken"], found["crashed"]) == (3, 1, 2, 0)
    assert found["by_invariant"] == [
        {"invariant": "L1", "runs": 2, "first_in": 1, "times": 6, "first_seed": 1, "repeat": "line 1"},
        {"invariant": "S2", "runs": 1, "first_in": 1, "times": 3, "first_seed": 1, "repeat": "line 1"},
    ]
    assert found["by_first_cause"] == [{"cause": "left", "requests": 6, "runs": 3}]
    assert [entry for entry in by_fault(results) if entry["drawn"]] == [
        {"kind": "partition", "drawn": 2, "fired": 2, "broken_with": 1, "broken_without": 1},
        {"kind": "slow_link", "drawn": 2, "fired": 0, "broken_with": 2, "broken_without": 0},
    ]
    assert found["never_fired"] == ["slow_link"] and len(found["never_drawn"]) == len(kinds()) - 2


def test_a_seed_that_crashes_the_simulator_is_kept_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tell: Any
) -> None:
    def broken(self: Prepared, seed: int, **more: Any) -> Any:
        if seed == 1:
            raise KeyError("two\nlines")
        return whole(self, seed, **more)

    whole = Prepared.run
    monkeypatch.setattr(Prepared, "run", broken)
    told = tell("campaign", "small.toml", *ONE, "--seeds", "3")
    assert told.status == 3
    assert stored("SELECT seed, verdict FROM runs ORDER BY seed") == [(0, "holds"), (1, "crashed"), (2, "holds")]
    assert "seed 1      crashed  KeyError: 'two\\nlines'" in told.out.splitlines()
    assert "  kvpoll run small.toml --profile reference --swarm --seed 1" in told.out.splitlines()
    assert told.out.splitlines()[-2] == "every invariant holds in 2 of 3 seeds"


# ---------------------------------------------------------------------------------------------------- the store


def test_campaigns_of_other_input_are_kept_apart(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("campaign", "small.toml", *ONE, "--seeds", "1")
    tell(*words)
    tell(*words, "--faults", "none")
    tell(*words, "--set", "dp_lookup=query")
    tell(*words, "--minutes", "0.1")
    Path("small.toml").write_text(SMALL + "# a remark\n")
    tell(*words)
    monkeypatch.setattr(verb, "code_digest", lambda: "changed")
    told = tell(*words)
    assert "already in" not in told.out
    assert stored("SELECT campaign, seed FROM runs ORDER BY campaign") == [(number, 0) for number in range(1, 7)]
    rows = stored("SELECT scenario_digest, code_digest, profile, swarm, minutes FROM campaigns ORDER BY id")
    assert len(set(rows)) == 6 and [row[3] for row in rows] == [1, 0, 1, 1, 1, 1]
    assert "already in" in tell(*words).out


def test_faults_may_be_those_of_run_instead(tell: Any) -> None:
    told = tell("campaign", *SHORT, *ONE, "--seeds", "1", "--faults", "all", "--verbose")
    assert f"kinds {len(kinds())} of {len(kinds())}: bootstrap_late, " in told.out
    line = "kvpoll campaign main --profile reference --minutes 0.2 --seed 0 --faults all --seeds 1"
    assert told.last == f"{line} --store campaign.sqlite --workers 1"
    assert tell(*shlex.split(told.last)[1:]).out.startswith("1 seed already in campaign.sqlite\n")


def test_the_summary_of_a_store_runs_nothing(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tell("campaign", "small.toml", *ONE, "--seeds", "2", "--store", "new/s.sqlite")
    tell(*SHIPPED[:-1], "2", "--store", "new/s.sqlite")
    monkeypatch.setattr(verb, "play", None)
    before = stored("SELECT * FROM runs ORDER BY campaign, seed", "new/s.sqlite")
    told = tell("campaign", "--summary", "--store", "new/s.sqlite")
    assert (told.status, told.last) == (1, "kvpoll campaign --summary --store new/s.sqlite")
    heads = [line for line in told.out.splitlines() if line.startswith("campaign ")]
    assert [head.partition(",")[0] for head in heads] == ["campaign 1: small", "campaign 2: main"]
    assert heads[1].endswith("profile sglang-0.5.23, 0.2 minutes, faults drawn by swarm")
    found = tell("campaign", "--summary", "--store", "new/s.sqlite", "--json").object["campaigns"]
    assert [entry["seeds"] for entry in found] == [2, 2] and found[0]["broken"] == 0 < found[1]["broken"]
    assert found[1]["plan"]["profile"] == "sglang-0.5.23"
    assert stored("SELECT * FROM runs ORDER BY campaign, seed", "new/s.sqlite") == before


def refusals() -> list[tuple[str, str]]:
    return [
        ("text.sqlite", "file is not a database"),
        ("foreign.sqlite", "it is a database of another program"),
        ("newer.sqlite", "another version of kvpoll wrote it"),
        ("folder", "unable to open database file"),
        ("torn.sqlite", "it is damaged"),
        ("small.toml/x", "File exists"),
    ]


@pytest.mark.parametrize(("path", "cause"), refusals())
def test_a_file_that_is_no_store_is_refused_and_left_alone(tell: Any, path: str, cause: str) -> None:
    Path("text.sqlite").write_text("these are the results that I wrote down by hand\n" * 99)
    Path("folder").mkdir()
    with sqlite3.connect("foreign.sqlite") as foreign:
        foreign.execute("CREATE TABLE wages (name, euros)")
    tell("campaign", "small.toml", *ONE, "--seeds", "3", "--store", "newer.sqlite")
    Path("torn.sqlite").write_bytes(Path("newer.sqlite").read_bytes()[:-4096])
    with sqlite3.connect("newer.sqlite") as newer:
        newer.execute("PRAGMA user_version = 99")
    before = Path(path).read_bytes() if Path(path).is_file() else b""
    for more in ((), ("--summary",)) if Path(path).is_file() else ((),):
        told = tell("campaign", "small.toml", *ONE, "--seeds", "1", "--store", path, *more)
        assert (told.status, told.out) == (2, "")
        assert told.err.startswith(f"kvpoll: {path}: cannot be used as a campaign store: ")
        assert cause in told.err or (path == "torn.sqlite" and "malformed" in told.err)
        assert told.err.endswith("; choose another --store\n") and told.err.count("\n") == 1
    assert (Path(path).read_bytes() if Path(path).is_file() else b"") == before


def test_a_summary_of_nothing_is_refused(tell: Any) -> None:
    told = tell("campaign", "--summary")
    message = "campaign.sqlite: there is no campaign store here; run `kvpoll campaign --store campaign.sqlite` first"
    assert (told.status, told.err) == (2, f"kvpoll: {message}\n")
    assert not Path("campaign.sqlite").exists()


def test_two_processes_may_fill_one_store() -> None:
    plan = Plan("small.toml", faults="swarm")
    identity = identity_of(prepare(plan))
    with Store(Path("s.sqlite")) as one, Store(Path("s.sqlite")) as other:
        assert one.campaign(identity) == other.campaign(identity) == 1
        one.add(1, result(4, [], {}))
        other.add(1, result(4, [], {}))  # the same seed, at the same time
        other.add(1, result(5, [], {}, L1=2))
        assert one.seeds(1) == {4, 5} and one.results(1) == other.results(1)
        assert one.results(1)[1] == result(5, [], {}, L1=2)
        [found] = one.campaigns()
        assert found.identity == identity


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 0", "argument --seeds: must be 1 or more, got '0'; see `kvpoll campaign --help`"),
        ("--workers x", "argument --workers: must be a whole number, got 'x'; see `kvpoll campaign --help`"),
        ("--backend rya", "unknown --backend 'rya' (did you mean 'ray'?)"),
        ("--stor x", "kvpoll campaign has no option '--stor' (did you mean '--store'?)"),
        ("hapy", "unknown scenario 'hapy' (did you mean 'happy'?)"),
        ("--swarm --faults all", "--swarm draws the faults; leave --faults away"),
    ],
)
def test_a_bad_command_is_refused_before_a_store_is_made(tell: Any, words: str, message: str) -> None:
    told = tell("campaign", *words.split())
    assert (told.status, told.out, told.err) == (2, "", f"kvpoll: {message}\n")
    assert not Path("campaign.sqlite").exists()


def test_a_worker_that_reads_something_else_refuses() -> None:
    """A scenario edited while the campaign runs, or another kvpoll on another machine: never mixed in."""
    with pytest.raises(BadInput, match="not the same in a worker"):
        run_seed(Plan("small.toml", faults="swarm"), "another key", 0)


def die(seed: int) -> Result | None:
    if seed == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return result(seed, [], {})


def test_a_worker_that_is_killed_is_told_in_one_line() -> None:
    with pytest.raises(BadInput, match="a worker process was killed from outside") as error:
        list(play(die, range(4), 2, "joblib"))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- Ray


def test_ray_says_what_to_install(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    told = tell("campaign", "small.toml", "--backend", "ray")
    message = "--backend ray needs Ray, which is missing: pip install 'kvpoll[ray]'"
    assert (told.status, told.err) == (2, f"kvpoll: {message}\n")


def test_a_ray_cluster_finds_what_joblib_finds(tell: Any) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'kvpoll[ray]'")
    words = ("campaign", "small.toml", "--seeds", "4", "--workers", "2", "--store")
    assert tell(*words, "ray.sqlite", "--backend", "ray").status == tell(*words, "loky.sqlite").status == 0
    columns = "seed, digest, verdict, draw, faults, fired, causes, repeat"
    rows = [stored(f"SELECT {columns} FROM runs ORDER BY seed", f"{name}.sqlite") for name in ("ray", "loky")]
    assert rows[0] == rows[1] and len(rows[0]) == 4
