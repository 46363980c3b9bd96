"""``kvpoll serve`` as a user meets it: one line when it listens, one line when it cannot, and a clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from bootstrap_stage import WAIT_S, rank, server

from kvpoll.commands import verbs
from kvpoll.commands.status import BAD_INPUT

RUN = "import sys; from kvpoll.commands import verbs; verbs.VERBS['serve'] = 'serve'; sys.exit(verbs.perform(sys.argv[1:]))"
"""The command line with the verb in it, whether or not it is in the list of verbs yet."""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verbs.VERBS, "serve", "serve")


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and the first line that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", RUN, "serve", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_when_told(number: int) -> None:
    with serving() as (process, line):
        found = re.fullmatch(r"bootstrap server at (http://127\.0\.0\.1:\d+), profile reference, epoch \d+\n", line)
        assert found, line
        assert requests.get(f"{found[1]}/health", timeout=WAIT_S).text == "OK"
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT_S)
        assert (process.returncode, out, err) == (0, "", "")


def test_options_reach_the_server(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n", encoding="utf-8")
    options = (
        "--json",
        "--profile",
        "sglang-0.5.23",
        "--token-file",
        str(token),
        "--max-ranks",
        "2",
        "--max-body-bytes",
        "2000",
    )
    with serving(*options) as (_, line):
        told = json.loads(line)
        assert (told["host"], told["profile"]) == ("127.0.0.1", "sglang-0.5.23")
        url = f"http://127.0.0.1:{told['port']}/route"

        def put(tp_size: int, **options: dict[str, str]) -> int:
            return requests.put(url, json=rank(0, tp_size).as_json(), timeout=WAIT_S, **options).status_code

        bearer = {"Authorization": "Bearer secret"}
        assert (put(2), put(3, headers=bearer), put(2, headers=bearer)) == (401, 400, 200)
        big = requests.put(url, json={"x": "x" * 3000}, headers=bearer, timeout=WAIT_S)
        assert (big.status_code, big.headers["X-Kvpoll-Epoch"]) == (413, str(told["epoch"]))


def test_an_open_address_without_a_token_is_warned_of() -> None:
    with serving("--host", "0.0.0.0") as (_, line):
        assert line.endswith("; whoever reaches it may register ranks, as there is no --token-file\n")


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with server() as taken:
        assert verbs.perform(["serve", "--port", str(taken.port)]) == BAD_INPUT
    told = capsys.readouterr()
    assert told.out == ""
    mend = "Address already in use; choose another port, or end the process that holds it"
    assert told.err == f"kvpoll: 127.0.0.1:{taken.port}: cannot be listened on: {mend}\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--host", "192.0.2.1"), "cannot be listened on"),
        (("--host", "no such host"), "is not an address or name of this machine"),
        (("--port", "70000"), "port 70000: is not from 0 to 65535"),
        (("--port", "http"), "must be a whole number"),
        (("--profile", "referense"), "did you mean 'reference'?"),
        (("--max-ranks", "0"), "must be 1 or more"),
        (("--token-file", "gone"), "gone: cannot be read: No such file or directory"),
        (("--token-file", os.devnull), "the token must be printable ASCII"),
        (("--spec", "gone.toml"), "gone.toml: cannot be read"),
    ],
)
def test_bad_input_is_one_line(options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.perform(["serve", *options]) == BAD_INPUT
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and told in said.err


def test_without_its_packages_it_names_the_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for name in [name for name in sys.modules if name.startswith("kvpoll.runtime.bootstrap")]:
        monkeypatch.delitem(sys.modules, name)
    assert verbs.perform(["serve"]) == BAD_INPUT
    assert (
        capsys.readouterr().err
        == "kvpoll: kvpoll serve needs aiohttp, which is not installed: pip install 'kvpoll[runtime]'\n"
    )
