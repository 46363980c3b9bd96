"""`kvpoll up` and `kvpoll run --real` as a user runs them: real processes, really killed; nothing is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("zmq")

from kvpoll.cli import main
from kvpoll.commands.plan import Plan, prepare

KVPOLL = (sys.executable, "-P", "-m", "kvpoll")
LIMIT_S = 120.0
SMALL = ("--pages", "1024")
"""A quarter of a GiB less for each rank than by default; no prompt of these loads needs more."""


def descendants(pid: int) -> set[int]:
    """Pids of every process below this one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, frontier = set[int](), {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def lives(pid: int) -> bool:
    """Is there such a process, and is it no zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that must come."""
    end_s = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end_s, f"waited in vain for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def started(*words: str, stdout: int | IO[bytes] = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """A command that is running; it is killed if the test leaves it behind."""
    process = subprocess.Popen([*KVPOLL, *words], stdout=stdout, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Its output, when it is over."""
    out, err = process.communicate(timeout=LIMIT_S)
    return (out or b"").decode(), err.decode()


def read_until(process: subprocess.Popen[bytes], wanted: str) -> str:
    """What it says until a line with this has come."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line.decode()
        if wanted in said:
            return said
    raise AssertionError(f"ended without {wanted!r}: {said}")


def test_decode0_is_killed_and_the_cluster_keeps_its_word(tmp_path: Path) -> None:
    trace = tmp_path / "up.jsonl"
    words = ("--kill", "decode0", "--at", "1", "--for", "1", "--rate", "8", "--requests", "18")
    with started("up", *SMALL, *words, "--record", str(trace), "--json") as process:
        out, err = ended(process)
    assert process.returncode == 0, (out, err)
    told = json.loads(out)
    assert told["verdict"] == "holds" and told["violations"] == [] and told["defects"] == []
    assert told["lives"] == {"B0": 1, "B1": 1, "P0": 1, "P1": 1, "D0": 2, "D1": 1}
    assert set(told["failed_by_first_cause"]) <= {"connection_refused", "engine_crashed"}
    assert told["succeeded"] + sum(told["failed_by_first_cause"].values()) == told["requests"] == 20
    assert told["failed_by_first_cause"] and told["succeeded"] >= 5 and told["unanswered"] == 0
    assert 0 < told["bytes_verified"] <= told["bytes_moved"] and told["gb_per_s_of_a_write"] > 0
    assert told["bytes_verified"] == told["pages_verified"] * 128 * 1024
    assert told["left"] == {} and told["ranks_surveyed"] == 4
    stopped = [json.loads(line) for line in trace.read_text().splitlines() if '"NodeStopped"' in line]
    assert [event["epoch"] for event in stopped if event["node"] == "D0"] == [0]
    assert main(["validate", str(trace)]) == 0


def test_the_same_kill_under_sglangs_rules_leaves_requests_that_never_end() -> None:
    words = ("--kill", "decode0", "--at", "1", "--for", "1", "--rate", "8", "--requests", "18")
    with started("up", *SMALL, *words, "--profile", "sglang-0.5.23", "--json") as process:
        out, err = ended(process)
    assert process.returncode == 1, (out, err)
    told = json.loads(out)
    assert told["verdict"] == "breaks" and told["defects"] == []
    assert "L1" in {violation["invariant"] for violation in told["violations"]}


def test_ctrl_c_ends_the_load_and_the_verdict_still_comes() -> None:
    with started("up", "--minutes", "5", "--metrics", "0", "--rate", "6") as process:
        said = read_until(process, "load")
        port = re.search(r"metrics at http://127\.0\.0\.1:(\d+)/metrics", said)
        assert port is not None

        def moved() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics", timeout=30) as answer:
                text = answer.read().decode()
            found = re.search(r'kvpoll_requests_total\{cause="ok"\} ([\d.]+)', text)
            queued = 'sglang:num_prefill_bootstrap_queue_reqs{node="P0",side="prefill"}' in text
            return queued and found is not None and float(found[1]) >= 4

        until(moved, "requests that the metrics count")
        below = descendants(process.pid)
        assert len(below) == 7  # one that forks, two servers, four ranks
        process.send_signal(signal.SIGINT)
        out, err = ended(process)
    assert process.returncode == 0, (out, err)
    assert "(ended by Ctrl-C)" in out and "holds: no invariant broke" in out
    assert "nothing is left on 4 ranks" in out
    assert out.splitlines()[-1] == "kvpoll up --profile reference --rate 6 --minutes 5 --seed 0"
    assert not any(map(lives, below))


def test_the_second_ctrl_c_ends_everything_at_once_even_what_is_stopped(tmp_path: Path) -> None:
    trace = str(tmp_path / "trace")
    words = ("--minutes", "5", "--stop", "decode0", "--at", "0.5", "--for", "500", "--record", trace)
    with started("up", *words) as process:
        read_until(process, "5/6 up")
        below = descendants(process.pid)
        assert len(below) == 7
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)  # two signals that are pending together are one
        process.send_signal(signal.SIGINT)
        _, err = ended(process)
    assert process.returncode == 130 and "ended at once; nothing was judged" in err
    until(lambda: not any(map(lives, below)), "the end of every process")


def test_on_a_terminal_a_pid_can_be_read_and_killed_and_its_rank_is_back() -> None:
    ours, theirs = pty.openpty()
    shown = b""
    with started("up", *SMALL, "--rate", "8", "--requests", "24", stdout=theirs) as process:  # type: ignore[arg-type]
        os.close(theirs)
        killed = False
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the terminal's other side is closed: the command is over
                break
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
            row = re.search(r"D1 +(\d+) +up ", text)
            if row is not None and not killed and re.search(r"[1-9]\d* ok", text):
                os.kill(int(row[1]), signal.SIGKILL)
                killed = True
        os.close(ours)
        process.wait(LIMIT_S)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    assert killed and process.returncode == 0, text[-3000:]
    assert re.search(r"D1 +- +down|D1 ended with status -9", text) and "D1 is back: life 1" in text
    assert "holds: no invariant broke" in text
    assert "under load" in text and "quiet, time runs faster" in text


def test_a_race_is_reproduced_for_real_beside_its_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    """sglang#27028: later pipeline stages kept aborted requests for ever; so do real processes under those rules."""
    words = ["reproduce", "sglang-26912", "--profile", "before-sglang-27028", "--real", "--speed", "60"]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["race", "profile", "simulated", "for", "real", "expected", "seed", "line"]
    assert out[1].split()[:9] == ["sglang#26912", "before-sglang-27028", *["O1", "R1", "S7"] * 2, "yes"]
    assert out[-2:] == ["all 1 row exactly as expected", f"kvpoll {' '.join(words[:4])} --real --speed 60 --seed 0"]


def test_a_scenario_is_staged_for_real_with_the_verdict_of_the_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, folder = tmp_path / "real.jsonl", tmp_path / "traces"
    words = ["run", "happy", "--real", "--speed", "100", "--json", "--record", str(trace), "--out", str(folder)]
    assert main(words) == 0
    real = json.loads(capsys.readouterr().out)
    simulated = prepare(Plan("happy")).run(0)()
    assert simulated.holds and real["verdict"] == "holds" and real["as_expected"]
    assert (real["requests"], real["succeeded"]) == (simulated.requests, simulated.succeeded)
    assert real["real"] == {
        "processes": {"bootstrap_servers": 1, "prefill_ranks": 1, "decode_ranks": 1}, "speed": 100.0, "transport": "shm",
    }  # fmt: skip
    assert real["repeat"] == "kvpoll run happy --profile reference --seed 0 --real --speed 100"
    assert {path.name for path in folder.iterdir()} >= {"B0.0.jsonl", "P0.0.jsonl", "D0.0.jsonl", "R.0.jsonl"}
    assert json.loads(trace.read_text().splitlines()[0])["real"] is True
    assert main(["validate", str(trace)]) == 0
