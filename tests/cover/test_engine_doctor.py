"""``kvpoll doctor``: everything is tried in a child, and what goes wrong there is a finding."""

from __future__ import annotations

import json
import sys
import time

import pytest

from kvpoll.commands import verbs
from kvpoll.commands.status import BAD_INPUT, HOLDS, VIOLATED
from kvpoll.runtime.transports import doctor as examination
from kvpoll.runtime.transports.doctor import Finding, examine, healthy, try_one

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verbs.VERBS, "doctor", "doctor")


def child(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def as_probed_by(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let every probe run this script instead."""
    monkeypatch.setattr(examination, "_command", lambda name: (child(script), {}, ""))


def test_the_default_transports_are_really_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.perform(["doctor", "--json", "memory", "shm", "tcp", "numpy"]) == HOLDS
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is True
    assert [(found["name"], found["usable"]) for found in told["findings"]] == [
        ("memory", True), ("shm", True), ("tcp", True), ("numpy", True),
    ]  # fmt: skip
    assert told["findings"][3]["installed"]


def test_what_is_missing_is_told_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = '{"stage": "failed", "note": "nixl_cu12 is not installed; pip install nixl"}'
    as_probed_by(monkeypatch, f"print({said!r})")
    monkeypatch.setattr(examination, "_version", lambda name: None)
    assert verbs.perform(["doctor", "nixl"]) == HOLDS  # an extra may be missing
    lines = capsys.readouterr().out.splitlines()
    assert "nixl  -          no          -       nixl_cu12 is not installed; pip install nixl" in lines
    assert lines[-2:] == ["not usable here: nixl", "kvpoll doctor nixl"]


def test_a_default_transport_that_fails_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_probed_by(monkeypatch, """print('{"stage": "failed", "note": "no memfd here"}')""")
    assert verbs.perform(["doctor", "shm"]) == VIOLATED
    assert "a default transport does not work; not usable here: shm" in capsys.readouterr().out


def test_an_engine_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    as_probed_by(monkeypatch, dies)
    at_import = try_one("nixl", LIMIT_S)
    assert (at_import.importable, at_import.usable) == (False, None)
    assert at_import.note == "the process that tried it was killed by SIGSEGV"
    as_probed_by(monkeypatch, """print('{"stage": "imported", "note": ""}', flush=True); """ + dies)
    in_use = try_one("nixl", LIMIT_S)
    assert (in_use.importable, in_use.usable) == (True, False)
    as_probed_by(monkeypatch, "import sys; sys.exit('first line\\nthe last line')")
    assert try_one("mooncake", LIMIT_S).note == "the process that tried it ended with status 1: the last line"


def test_an_engine_that_hangs_is_a_finding_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own children go with it: the pipe that they hold would keep the doctor waiting otherwise."""
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    as_probed_by(monkeypatch, hangs)
    began = time.monotonic()
    found = try_one("nixl", 1.0)
    assert time.monotonic() - began < 30
    assert (found.importable, found.usable) == (False, None)
    assert found.note.startswith("it was not finished after 1 s; try ")


def test_findings_come_in_the_order_asked_for_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    as_probed_by(monkeypatch, """print('{"stage": "imported", "note": ""}\\n{"stage": "used", "note": "well"}')""")
    counted: list[int] = []
    findings = examine(["nixl", "tcp", "numpy"], LIMIT_S, counted.append)
    assert [finding.name for finding in findings] == ["nixl", "tcp", "numpy"]
    assert counted == [1, 2, 3]
    assert all(finding.usable and finding.note == "well" for finding in findings)
    assert healthy(findings)
    assert not healthy([Finding("tcp", "transport", "1", True, False)])
    assert healthy([Finding("nixl", "transport", "1", True, False)])


def test_java_is_asked_for_its_version() -> None:
    found = try_one("Java", LIMIT_S)
    assert found.kind == "dependency"
    assert bool(found.usable) == (found.installed is not None)
    assert found.usable or "TLC" in found.note or "java" in found.note


def test_java_that_is_not_there_is_told_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = try_one("Java", LIMIT_S)
    assert (found.installed, found.usable) == (None, None)
    assert "apt-get install default-jre-headless" in found.note


def test_an_unknown_name_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.perform(["doctor", "mooncak"]) == BAD_INPUT
    assert capsys.readouterr().err == "kvpoll: doctor does not know 'mooncak' (did you mean 'mooncake'?)\n"
