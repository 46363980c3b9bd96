"""A search that was stopped, written down and gone on with ends like one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvpoll.sim.explorer import search
from kvpoll.sim.explorer.checkpoint import resume, save
from kvpoll.sim.explorer.judges import judges
from kvpoll.sim.explorer.model import load_model
from kvpoll.sim.explorer.search import Progress, Search
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput

EXPLORE = (sys.executable, "-P", "-m", "kvpoll", "explore")
PROTOCOL = load()
OF_IT = ("spec", "model", "rules")
NAMES = ("S1", "S3", "S4", "S9", "R1")


def fresh(name: str = "one-room", profile: str = "sglang-0.5.23", names: tuple[str, ...] = NAMES) -> Search:
    system = load_model(name, PROTOCOL).build(PROTOCOL, PROTOCOL.profile(profile))
    return Search(system, judges(PROTOCOL.bounds, names))


def told(one: Search) -> Any:
    """Everything that a search has to say, as JSON would keep it."""
    seen = one.explored
    found = {
        name: [each.depth, each.text, [taken.outcome.label for taken in each.path]] for name, each in seen.found.items()
    }
    return [seen.complete, seen.states, seen.edges, seen.depth, seen.quiet, found, sorted(seen.marks)]


@pytest.fixture(scope="module")
def whole() -> Any:
    """What comes of the search when nobody stops it."""
    one = fresh()
    one.run()
    assert set(one.explored.found) == {"S3", "S4", "S9", "R1"}
    return told(one)


def stop_at(one: Search, states: int) -> Search:
    def stop(progress: Progress) -> None:
        one.stop = progress.states >= states

    one.run(stop)
    assert one.explored.stopped == "interrupted" and one.explored.states >= states
    return one


def kept(one: Search, path: Path) -> Path:
    save(one, path, OF_IT)
    return path


def gone_on_with(path: Path) -> Search:
    one = fresh()
    resume(one, path, OF_IT)
    one.run()
    return one


@pytest.mark.parametrize("states", [1, 4_000, 15_000])
def test_a_search_stopped_in_the_middle_of_a_level_ends_as_if_it_had_not_been(
    states: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early, when the first invariants are broken, and when most are: what an idle look found keeps its last step."""
    monkeypatch.setattr(search, "BLOCK", 400)
    stopped = stop_at(fresh(), states)
    assert states == 1 or 0 < stopped._position < len(stopped._frontier)
    path = kept(stopped, tmp_path / "some.search")
    monkeypatch.undo()
    assert told(gone_on_with(path)) == whole


def test_a_search_stopped_at_a_limit_goes_on_behind_it(whole: Any, tmp_path: Path) -> None:
    one = fresh()
    assert one.run(max_depth=9).stopped == "limit"
    assert {"S4", "R1"} <= set(one.explored.found)
    first = kept(one, tmp_path / "some.search")

    again = fresh()
    resume(again, first, OF_IT)
    assert again.run(max_depth=9).stopped == "limit"
    assert told(again) == told(one)
    again.run(max_states=12_000)
    assert told(gone_on_with(kept(again, tmp_path / "some.search"))) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["some.search"], "nothing half written is left"


ELSEWHERE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_explorer_checkpoint import gone_on_with, told
print(json.dumps(told(gone_on_with(Path(sys.argv[2])))))
"""


def test_another_process_in_which_sets_have_another_order_goes_on_just_so(whole: Any, tmp_path: Path) -> None:
    path = kept(stop_at(fresh(), 4_000), tmp_path / "some.search")
    words = [sys.executable, "-P", "-c", ELSEWHERE, str(Path(__file__).parent), str(path)]
    for hash_seed in ("1", "2"):
        answer = subprocess.run(words, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True)
        assert json.loads(answer.stdout) == json.loads(json.dumps(whole)), answer.stderr


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "digests"),
    [
        (("shared-room",), OF_IT),
        (("one-room", "sglang-0.5.23", ("S1",)), OF_IT),
        ((), ("another spec", "model", "rules")),
        ((), ("spec", "another text of the model", "rules")),
        ((), ("spec", "model", "other rules")),
    ],
)
def test_a_checkpoint_of_another_search_is_refused_and_nothing_moves(
    other: tuple[Any, ...], digests: tuple[str, ...], tmp_path: Path
) -> None:
    one = fresh()
    one.run(max_depth=3)
    path = kept(one, tmp_path / "some.search")
    another = fresh(*other)
    with pytest.raises(BadInput) as refused:
        resume(another, path, digests)
    cause = "is of another model, spec, profile or choice of invariants; remove it to begin anew"
    assert str(refused.value) == f"{path}: {cause}"
    assert (another.visited.count, another.explored.edges) == (1, 0)


def without_values(path: Path) -> bytes:
    """A checkpoint that lacks a part, or has one that is rubbish."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    parts["values.pickle"] = b"cnowhere\nNothing\n."
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return path.read_bytes()


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    one = fresh()
    one.run(max_depth=3)
    path = kept(one, tmp_path / "some.search")
    good = path.read_bytes()
    torn = good.replace(b'"identity"', b'"idendity"', 1)
    for content in (b"", b"rubbish\n", good[: len(good) // 2], good[:-1], torn, without_values(path)):
        path.write_bytes(content)
        with pytest.raises(BadInput) as refused:
            resume(fresh(), path, OF_IT)
        message = str(refused.value)
        assert message.startswith(f"{path}: is not a checkpoint of an exploration (") and "\n" not in message
        assert message.endswith("); remove it to begin anew")


# --- the verb ---------------------------------------------------------------------------------------


def interrupted(words: list[str], path: Path) -> dict[str, Any]:
    """Start an exploration, press Ctrl-C once it is well under way, and return what it said.

    How long Python takes to load is the machine's business, so a Ctrl-C that came too early is tried again later.
    """
    for seconds in (2, 4, 8, 16):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if path.exists():
            assert (process.returncode, err) == (130, "")
            said: dict[str, Any] = json.loads(out)
            return said
    raise AssertionError(f"no checkpoint was written: {err}")


def test_ctrl_c_keeps_the_search_and_the_same_command_goes_on_with_it(tmp_path: Path) -> None:
    path = tmp_path / "two-rooms.search"
    words = [*EXPLORE, "two-rooms", "--json", "--invariant", "S1", "--workers", "1", "--checkpoint", str(path)]
    first = interrupted(words, path)
    assert first["complete"] is False and first["states"] > 1

    shown = subprocess.run([*words, "--max-states", "1"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    second = json.loads(shown.stdout)
    assert second["complete"] is False
    assert {name: second[name] for name in ("states", "edges", "depth")} == {
        name: first[name] for name in ("states", "edges", "depth")
    }

    third = subprocess.run([*words, "--max-depth", str(first["depth"] + 1)], capture_output=True, text=True)
    assert json.loads(third.stdout)["states"] > first["states"]

    refused = subprocess.run([*words, "--profile", "sglang-0.5.23"], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"kvpoll: {path}: is of another model, spec, profile") and path.exists()


def test_a_search_that_comes_to_its_end_removes_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "some.search"
    words = [*EXPLORE, "one-room", "--profile", "sglang-0.5.23", "--invariant", "S3", "--checkpoint", str(path)]
    stopped = subprocess.run([*words, "--max-depth", "4"], capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (0, "") and path.exists()
    assert f"NOT complete (limit): what follows is of that part; `--checkpoint {path}` goes on" in stopped.stdout
    ended = subprocess.run(words, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "") and not path.exists()
    nowhere = [str(tmp_path / "no" / "x") if word == str(path) else word for word in words]
    refused = subprocess.run([*nowhere, "--max-depth", "4"], capture_output=True, text=True)
    assert refused.returncode == 2
    cause = "cannot be written: No such file or directory; choose another place"
    assert refused.stderr == f"kvpoll: {tmp_path / 'no' / 'x'}: {cause}\n"
