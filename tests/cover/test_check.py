"""TLC and the explorer agree on small models, and `kvpoll check` says so only because it is so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kvpoll.commands.verbs import perform
from kvpoll.sim.explorer.checking import CheckerFailed, Compared, Digests, compare, statements
from kvpoll.sim.explorer.model import load_model, names_available
from kvpoll.sim.explorer.tla_values import to_tla
from kvpoll.sim.explorer.tlc import TLA_FOLDER, Checker, Job, check, find_checker
from kvpoll.sim.explorer.transfer_view import constants
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput

PROTOCOL = load()
SGLANG = "sglang-0.5.23"
TINY = """\
[model]
title = "one request, one deadline that passes early or one abort"
kind = "transfer"
prefill = ["P0"]
decode = ["D0"]
pages = 1

[faults]
total = 1
slowness = 1
prefill_abort = 1

[[request]]
rid = "q1"
room = 1001
"""


STUCK = TINY.replace("total = 1", "total = 2").replace(
    "slowness = 1\nprefill_abort = 1", "route_failure = 1\nclock_offset = 1"
)
"""Decode gives up, and the clock of prefill is set back: under the rules of SGLang prefill waits for ever."""


@pytest.fixture(scope="module")
def checker() -> Checker:
    try:
        return find_checker()
    except BadInput as missing:
        pytest.skip(str(missing))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


def compared(checker: Checker, tiny: Path, profile: str, **modules: str) -> Compared:
    model = load_model(str(tiny), PROTOCOL)
    return compare(model, PROTOCOL, PROTOCOL.profile(profile), checker, limit_s=120, modules=modules)


def altered(module: str, before: str, after: str) -> str:
    """The text of a module with one thing changed."""
    text = (TLA_FOLDER / f"{module}.tla").read_text(encoding="utf-8")
    assert text.count(before) == 1, before
    return text.replace(before, after)


def test_both_say_the_same(checker: Checker, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert perform(["check", str(tiny), "--json"]) == 0
    reference, sglang = json.loads(capsys.readouterr().out)["comparisons"]
    for each in (reference, sglang):
        assert each["agree"] and each["differences"] == []
        for name in ("states", "digest", "broken", "kept"):
            assert each["explorer"][name] == each["tlc"][name], name
    assert reference["explorer"]["states"] > 100 and reference["explorer"]["broken"] == {}
    assert reference["tlc"]["kept"] == {"L1": True}
    assert sglang["tlc"]["broken"]["S4"] == 8
    assert sglang["tlc"]["digest"] != reference["tlc"]["digest"]


def test_both_say_that_a_promise_is_broken(checker: Checker, tiny: Path) -> None:
    tiny.write_text(STUCK, encoding="utf-8")
    result = compared(checker, tiny, SGLANG)
    assert result.differences == []
    assert result.ours.promises == result.theirs.promises == {"L1": False}


def test_the_length_is_that_of_the_counterexample_that_tlc_prints(checker: Checker, tiny: Path) -> None:
    content = load_model(str(tiny), PROTOCOL).content
    definitions = {"Rules": f'Profiles["{SGLANG}"]', **constants(content), "Watched": '{"S4"}'}
    answer = check(Job("Transfer", definitions, invariants=("S4",)), checker, limit_s=120)
    assert (answer.verdict, answer.name) == ("invariant", "S4")
    assert len(answer.trace) - 1 == compared(checker, tiny, SGLANG).theirs.broken["S4"]


def test_an_altered_module_is_found_out(
    checker: Checker, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cause is called by another name, S4 always holds, and nobody has to read what the router says."""
    transfer = altered("Transfer", 'GiveUp(Pen(node), rid, "aborted")', 'GiveUp(Pen(node), rid, "given_up")')
    fair = '  /\\ \\A node \\in Nodes : ([]<>~(HasMail("R", node))) \\/ []<><<HearRouter(node)>>_vars\n'
    assert transfer.count(fair) == 1
    modules = {"Transfer": transfer.replace(fair, ""), "Witness": altered("Witness", 'IsUpheld("S4")', "TRUE")}
    result = compared(checker, tiny, SGLANG, **modules)
    states, *rest = result.differences
    assert states.startswith("states: ") and result.ours.digest != result.theirs.digest
    assert "S4: is broken after 8 moves in the explorer, holds in TLC" in rest
    assert "L1: comes true in the explorer, does not come true in TLC" in rest
    assert '"aborted"' in result.examples["explorer"] and '"given_up"' in result.examples["TLC"]
    monkeypatch.setattr("kvpoll.commands.check.compare", lambda *arguments: result)
    assert perform(["check", str(tiny), "--profile", SGLANG]) == 1
    told = capsys.readouterr().out
    assert "1 comparison: 1 of them differ" in told and "a state that only TLC reaches" in told


def test_what_tlc_cannot_read_is_told_in_its_words(checker: Checker, tiny: Path) -> None:
    with pytest.raises(CheckerFailed, match=r"TLC on tiny under reference: (?s:.)*Parse Error"):
        compared(checker, tiny, "reference", Transfer="---- MODULE Transfer ----\nEXTENDS Machine\nx == \n====\n")


def test_a_run_that_takes_too_long_is_told(checker: Checker, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert perform(["check", str(tiny), "--limit", "0.1"]) == 2
    assert "it was stopped after 0.1 s" in capsys.readouterr().err


def test_without_java_there_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_arguments, **_named: None)
    assert perform(["check"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and "needs Java" in told.err


def test_a_jar_that_is_none_is_told(checker: Checker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert perform(["check", "--jar", str(tmp_path / "none.jar")]) == 2
    assert "is no tla2tools.jar" in capsys.readouterr().err


def test_invariants_are_found_in_the_modules_that_are_extended() -> None:
    found = statements("Transfer", {})
    assert found.promises == ("L1",)
    assert {"S1", "S4", "S12", "L2", "R1", "O1"} <= set(found.invariants)
    with pytest.raises(BadInput, match="there is no module Nowhere"):
        statements("Nowhere", {})


def test_digests_tell_variables_and_kinds_of_values_apart() -> None:
    digests = Digests()
    assert digests.of_value("n", True) != digests.of_value("m", True) != digests.of_value("m", 2)
    for value in (1, "text", frozenset({1, 2}), (1, "two")):
        assert digests.of_value("n", value) == digests.of_text("n", f"  {to_tla(value)}\n")
    assert digests.of_text("n", "{2, 1}") == digests.of_text("n", "1..2")


def test_small_models_are_marked() -> None:
    marked = {name for name in names_available() if load_model(name, PROTOCOL).checked}
    assert {"one-room-small", "two-rooms-small", "shared-room-small", "peer-restart-small"} <= marked
