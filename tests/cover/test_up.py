"""`kvpoll up` and `kvpoll run --real` before anything runs: what they understand, refuse, draw and export."""

from __future__ import annotations

import argparse
import io
import os
import resource
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvpoll.cli import main
from kvpoll.commands import up, verbs
from kvpoll.commands.plan import Plan, prepare
from kvpoll.commands.real import origin_of, staged
from kvpoll.live_cluster import Deed, Line, Snapshot
from kvpoll.live_metrics import ClusterMetrics
from kvpoll.live_table import PICTURE_COLUMNS, draw, plain, render
from kvpoll.runtime.loop import Loop
from kvpoll.spec.source import BadInput


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever these tests give, no process may be started."""

    def refuse(*given: Any, **more: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr("kvpoll.runtime.cluster.launcher.Nursery", refuse)


def wanted(*words: str) -> up.Wanted:
    """What these options ask for."""
    return up.wanted_of(verbs.read(["up", *words]))


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that bad input gets."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kvpoll: ") and err.count("\n") == 1, (out, err)
    return err.removeprefix("kvpoll: ").strip()


# ---------------------------------------------------------------------------------------------- what is asked for


def test_by_default_two_engines_of_one_rank_on_each_side_share_the_load() -> None:
    asked = wanted()
    prefill, decode = asked.topology.prefill, asked.topology.decode
    assert (prefill.count, prefill.sizes.tp, decode.count, decode.sizes.tp) == (2, 1, 2, 1)
    assert asked.load_s == 20.0 and asked.deeds == [] and 40 <= len(asked.arrivals) <= 130
    assert all(arrival.t < 20.0 for arrival in asked.arrivals)
    assert asked.profile.name == "reference" and asked.line == "kvpoll up --profile reference --seed 0"
    assert wanted().arrivals == asked.arrivals and wanted("--seed", "1").arrivals != asked.arrivals


def test_the_time_after_a_deed_is_the_time_of_that_deed() -> None:
    words = "--kill decode0 --at 3 --for 1 --kill D1 --stop bootstrap1 --at 7 --for 2 --restart prefill0"
    asked = wanted(*words.split())
    assert asked.deeds == [
        Deed("kill", "D0", 3.0, 1.0),
        Deed("kill", "D1", 5.0, 2.0),
        Deed("stop", "B1", 7.0, 2.0),
        Deed("restart", "P0", 5.0, 0.0),
    ]
    assert wanted(*asked.line.split()[2:]).deeds == asked.deeds


def test_a_rank_is_named_as_the_table_names_it_or_in_full() -> None:
    asked = wanted("--tp-decode", "2", "--tp-prefill", "2", "--kill", "decode1/tp0", "--kill", "P0/tp1", "--kill", "B0")
    assert [deed.target for deed in asked.deeds] == ["D1/tp0", "P0/tp1", "B0"]


def test_so_many_requests_take_as_long_as_they_take_and_a_deed_is_waited_for() -> None:
    asked = wanted("--requests", "7")
    assert len(asked.arrivals) == 7 and asked.load_s == asked.arrivals[-1].t + 0.5
    assert wanted("--requests", "7", "--kill", "decode0", "--at", "30").load_s == 32.5
    assert len(wanted("--requests", "7", "--minutes", "0.5").arrivals) == 7


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--kill decode7", "nothing here is called 'decode7' (did you mean 'decode1'?)"),
        ("--kill decode0 --at 50", "--kill D0 --at 50: the load ends at 20 s"),
        ("--at 3", "belongs after --kill, --stop or --restart"),
        ("--kill D0 --at 3 --at 4", "--kill D0 has a --at already"),
        ("--stop D0 --for 0", "must be a number above 0"),
        ("--kill D0 --at -1", "must be a number and not negative"),
        ("--prefill 100", "at most 32 on one machine"),
        ("--tp-prefill 3 --tp-decode 2", "one must divide the other"),
        ("--pages 50", "give --pages 806 or more"),
        ("--pages 900000000", "give fewer --pages, or fewer ranks"),
        ("--rate 1e9", "at most 500 requests a second"),
        ("--minutes 1e6", "at most 1,000,000 in one run"),
        ("--abort-share 1.5", "must be between 0 and 1"),
        ("--metrics 99999", "is no port"),
        ("--profile nobody", "unknown profile 'nobody'"),
        ("--set lease=x", "unknown rule 'lease'"),
        ("--transport carrier-pigeon", "unknown --transport 'carrier-pigeon'"),
        ("--record /proc/nowhere/trace", "cannot be written"),
        ("--picture /proc/nowhere.svg", "cannot be written"),
        ("--kil D0", "kvpoll up has no option '--kil' (did you mean '--kill'?)"),
    ],
)
def test_bad_input_is_one_line_and_nothing_starts(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in complaint(capsys, "up", *words.split())


def test_a_port_that_somebody_has_is_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--metrics {port}: cannot be listened on" in complaint(capsys, "up", "--metrics", port)


@pytest.mark.parametrize(
    ("limit", "most", "told"),
    [
        (resource.RLIMIT_FSIZE, 2**20, "the limit on the size of a file (ulimit -f) is 1 MiB"),
        (resource.RLIMIT_AS, 2**29, "the limit on the address space (ulimit -v) is 512 MiB"),
        (resource.RLIMIT_NOFILE, 100, "4 ranks need 128 open files and the limit is 100"),
    ],
)
def test_a_limit_that_pools_or_files_would_exceed_is_told_at_start(
    limit: int, most: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda which: (most, most) if which == limit else real(which))
    with pytest.raises(BadInput) as raised:
        wanted()
    assert told in str(raised.value)


def test_memory_that_the_machine_does_not_have_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    available = up.available_bytes()
    assert available is not None and 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(up, "available_bytes", lambda: 2**30)
    with pytest.raises(BadInput, match=r"need 1\.4 GiB and 1\.0 GiB are available; give fewer --pages"):
        wanted()
    assert wanted("--pages", "1024").bytes_needed < 2**30


# ---------------------------------------------------------------------------------------------- what is shown


def line(node: str, **changed: Any) -> Line:
    """A row of the table."""
    given: dict[str, Any] = {
        "node": node, "pid": 4711, "life": 0, "state": "up", "queues": {}, "polls": {}, "sent": 0, "verified": 0,
        "sent_per_s": 0.0, "verified_per_s": 0.0, "free": 0, "held": 0, "quarantined": 0, "size": 0,
    }  # fmt: skip
    return Line(**{**given, **changed})


SHOT = Snapshot(
    7.25, "load", 20.0, 40, 30, 5, {"engine_crashed": 3, "connection_refused": 2},
    [
        line("B0"),
        line("P0", queues={"num_prefill_inflight_queue_reqs": 6}, sent=3_000_000_000, sent_per_s=1.5e9, free=8, size=8),
        line("D0", pid=None, life=1, state="down", verified=2_000_000),
        line("D1", polls={"Transferring": 4, "Failed": 1}, queues={"num_running_reqs": 9}, free=1, held=2,
             quarantined=5, size=8),
    ],
    [(6.0, "D0 killed (SIGKILL), back after 2 s")], {},
)  # fmt: skip


def drawn(width: int) -> list[str]:
    """The table as lines of text."""
    console = Console(width=width, file=io.StringIO())
    console.print(render(SHOT, "reference", width))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def test_the_table_fits_a_usual_terminal_and_hides_nothing() -> None:
    lines = drawn(PICTURE_COLUMNS)
    rows = {row.split()[0]: row.split()[1:] for row in lines if row[:2] in ("B0", "P0", "D0", "D1")}
    assert rows["B0"] == ["4711", "0", "up", "(server)"]
    dot = "\u00b7"
    assert rows["P0"] == ["4711", "0", "up", dot, dot, "6", *[dot] * 5, "1.50", "3.00", "GB", "8", "0", "0"]
    assert rows["D0"] == ["-", "1", "down", *[dot] * 8, "0.000", "2", "MB", "-", "-", "-"]
    assert rows["D1"] == ["4711", "0", "up", dot, dot, "9", dot, dot, "4", dot, "1", "0.000", "0", "MB", "1", "2", "5"]
    assert not any("\u2026" in row for row in lines)
    text = "\n".join(lines)
    assert "40 requests: 30 ok, 5 failed, 5 under way" in text and "D0 killed (SIGKILL)" in text
    assert "first causes of failure: engine_crashed 3, connection_refused 2" in text


def test_what_is_violated_is_shown_as_soon_as_it_is_seen() -> None:
    assert not any("violated" in row for row in drawn(PICTURE_COLUMNS)) and "violated" not in plain(SHOT)
    shot = SHOT._replace(violated={"S1": 3, "L2": 1200})
    console = Console(width=PICTURE_COLUMNS, file=io.StringIO())
    console.print(render(shot, "reference", PICTURE_COLUMNS))
    assert isinstance(console.file, io.StringIO)
    assert "violated so far: L2 1,200, S1 3" in console.file.getvalue()
    assert plain(shot).endswith("violated so far: L2 1,200, S1 3")


def test_a_narrow_terminal_gets_fewer_columns_and_whole_ones() -> None:
    lines = drawn(80)
    assert max(map(len, lines[3:])) <= 80
    row = next(row for row in lines if row.startswith("D1"))
    assert row.split() == ["D1", "4711", "up", "\u00b7", "\u00b7", "9", "0.000", "1", "2", "5"]


def test_without_a_terminal_a_line_says_it(tmp_path: Path) -> None:
    told = plain(SHOT)
    assert told.strip().startswith("7.2 s  load")
    assert "40 requests, 30 ok, 5 failed, 5 under way" in told and "3/4 up" in told
    assert "P0:0/0/6 D0:0/0/0 D1:0/0/9" in told and told.endswith("quarantined 5")
    draw(SHOT, "reference", tmp_path / "deep" / "up.svg")
    picture = (tmp_path / "deep" / "up.svg").read_text()
    assert picture.startswith("<svg") and "inflight" in picture and "font-face" not in picture


def test_prometheus_reads_sglangs_names_on_loopback() -> None:
    metrics = ClusterMetrics(0)
    try:
        address = f"http://127.0.0.1:{metrics.port}/metrics"
        with urllib.request.urlopen(address, timeout=30) as before:
            assert b"sglang" not in before.read()
        metrics.show(SHOT)
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
    finally:
        metrics.close()
    for said in (
        'sglang:num_prefill_inflight_queue_reqs{node="P0",side="prefill"} 6.0',
        'sglang:num_running_reqs{node="D1",side="decode"} 9.0',
        'sglang:kv_transfer_speed_gb_s{node="P0",side="prefill"} 1.5',
        'kvpoll_kv_pages_quarantined{node="D1",side="decode"} 5.0',
        'kvpoll_kv_bytes_sent_total{node="P0",side="prefill"} 3e+09',
        'kvpoll_requests_total{cause="engine_crashed"} 3.0',
        'kvpoll_requests_total{cause="ok"} 30.0',
        'kvpoll_process_up{node="D0"} 0.0',
    ):
        assert said in text, text
    assert not any(thread.name.startswith("Thread") and thread is metrics._thread for thread in threading.enumerate())
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", metrics.port)) != 0


# ---------------------------------------------------------------------------------------------- time and staging


class _Plane:
    """A control plane that nobody waits for."""

    node = "R"

    def wake(self) -> None:
        """Nobody sleeps."""

    def wait(self, seconds: float) -> None:
        """Nothing comes."""


def test_time_that_changes_its_speed_does_not_jump_and_agrees_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("kvpoll.runtime.loop.time.monotonic", lambda: clock[0])
    early, late = (Loop(_Plane(), 100.0, 2.0) for _ in range(2))  # type: ignore[arg-type]
    clock[0] = 110.0
    assert early.now == late.now == 20.0
    early.change_speed(110.0, 40.0)
    assert early.now == 20.0 and early.speed == 40.0
    clock[0] = 111.0
    assert (early.now, late.now) == (60.0, 22.0)
    late.change_speed(110.0, 40.0)
    assert late.now == pytest.approx(60.0) and late.origin == pytest.approx(early.origin)


def real(*words: str) -> Any:
    """The staging that these options of `kvpoll run` ask for."""
    arguments: argparse.Namespace = verbs.read(["run", *words])
    from kvpoll.commands.run import plan_of

    return staged(prepare(plan_of(arguments)), arguments)


def test_a_real_run_is_told_its_profile_by_name_and_changed_rules() -> None:
    staging = real("sglang-26912", "--real", "--profile", "sglang-0.5.23", "--set", "waiting_timeout_s=77")
    assert staging.base == "sglang-0.5.23" and staging.rules == {"waiting_timeout_s": 77}
    assert staging.line == (
        "kvpoll run sglang-26912 --profile sglang-0.5.23 --set waiting_timeout_s=77 --seed 0 --real --speed 20"
    )
    again = real(*staging.line.split()[2:])
    assert (again.base, again.rules, again.speed, again.seed) == (staging.base, staging.rules, 20.0, 0)
    labelled = prepare(
        Plan("bootstrap-double-put", prepare(Plan("bootstrap-double-put")).scenario.expectations[0].label)
    )
    base, rules = origin_of(labelled)
    assert labelled.protocol.profile(base).with_rules(rules).rules == labelled.profile.rules


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("main --real", "cannot be staged on real processes; give --faults none"),
        ("happy --real --seeds 3", "--seeds is for simulations"),
        ("happy --real --jobs 3", "--jobs is for simulations"),
        ("happy --real --speed 1000", "--speed 1000: at most 200"),
        ("happy --speed 3", "--speed is for real processes; add --real"),
        ("happy --transport tcp", "--transport is for real processes; add --real"),
        ("happy --real --out /proc/nowhere", "--out /proc/nowhere: cannot be made"),
        ("happy --real --speed 0", "must be a number above 0"),
    ],
)
def test_what_cannot_be_staged_is_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in complaint(capsys, "run", *words.split())
