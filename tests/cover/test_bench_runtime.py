"""`kvpoll bench runtime` and the soak measure what they say, and say so when they cannot.

Speed is measured by the bench itself and never asserted here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpoll import bench, bench_runtime, soak, soak_verdict
from kvpoll.bench_children import Child, ChildFailed, lacks
from kvpoll.bench_handshakes import Drive, HandshakeFailed, Side
from kvpoll.bench_transfers import measured
from kvpoll.cli import main
from kvpoll.soak_judge import Judge
from kvpoll.soak_process import Engine, Request, fate, process_stats
from kvpoll.spec.invariants import judge as judge_trace
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import Committed, Healed, NodeStarted, NodeStopped, Reserved, Surveyed, WritePosted, encode
from kvpoll.spec.vocabulary import Incarnation

LIMIT_S = 30.0


# -- handshakes


@pytest.fixture
def both() -> Iterator[Side]:
    side = Side("both")
    yield side
    side.close()


def test_handshakes_are_complete_on_both_sides_and_leave_nothing(both: Side) -> None:
    answer = Drive(both, first=1, requests=40, window=8).run()
    assert answer["done"] == 40 and len(answer["latency_s"]) == 40
    assert min(answer["latency_s"]) > 0.0
    for endpoint in both.endpoints:
        assert endpoint.drain(LIMIT_S)
        assert not endpoint.transfers


def test_a_handshake_that_fails_is_not_counted_but_told() -> None:
    """The address is that of a server which has gone: decode gives up, and the driver says which room and why."""
    side = Side("both", rules={"bootstrap_timeout_s": 0.5})
    try:
        side.address = "127.0.0.1:1"
        with pytest.raises(HandshakeFailed, match="room 7: "):
            Drive(side, first=7, requests=1, window=1).run()
    finally:
        side.close()


def test_two_processes_speak_the_protocol_of_lines() -> None:
    with Child("-m", "kvpoll.bench_handshakes", "prefill") as prefill:
        address = prefill.hear()["ready"]
        with Child("-m", "kvpoll.bench_handshakes", "decode", address) as decode:
            assert decode.hear() == {"ready": address}
            for child in (prefill, decode):
                child.tell({"first": 1, "requests": 20, "window": 4})
            assert [child.hear()["done"] for child in (prefill, decode)] == [20, 20]


# -- children


def test_a_child_that_ends_is_told_with_its_last_words() -> None:
    with (
        Child("-c", "import sys; sys.exit('no such engine')") as child,
        pytest.raises(ChildFailed, match="no such eng"),
    ):
        child.hear()


def test_what_an_interpreter_lacks_is_one_line() -> None:
    assert lacks(sys.executable, "json") is None
    assert "No module named 'kvpoll_absent'" in (lacks(sys.executable, "kvpoll_absent") or "")
    assert lacks("/no/such/python", "json") == "/no/such/python is no program"


def test_a_transfer_of_a_real_pool_is_measured_beside_memcpy() -> None:
    answer = measured("shm", "16 KiB", 1)
    assert answer["gb_per_s"] and answer["memcpy_gb_per_s"]


# -- the table


def figures(shm: float = 10.0, tcp: float = 4.0, peers: dict[str, float] | None = None, ours: float = 900.0) -> Any:
    speeds = {"shm": shm, "memcpy": 11.0, "shm share of memcpy": shm / 11.0, "tcp": tcp, **(peers or {})}
    answer = {"per_s": ours, "p50_ms": 1.0, "p99_ms": 2.0}
    missing = {kind: f"{kind} is not here" for kind in bench_runtime.ENGINES if kind not in speeds}
    return {
        "transfers": {"64 KiB": speeds},
        "handshakes": {"one process": {"32": {"kvpoll": answer, "sglang": answer | {"per_s": 150.0}}}},
        "costs": {"plain": 1000.0, "monitored": 500.0, "traced": 250.0},
        "cuda": "open: no GPU here", "open": missing, "load": [0.1, 0.2],
    }  # fmt: skip


def shown(found: Any) -> dict[str, tuple[str, ...]]:
    return {row[0]: row for row in bench_runtime.table(found, bench.reached)}


def test_bars_are_reached_or_not_by_the_figures_alone() -> None:
    rows = shown(figures(peers={"mooncake": 1.0, "nixl": 2.0}))
    assert rows["shm, pages of 64 KiB"][2] == "0.8 of memcpy: reached"
    assert rows["tcp, pages of 64 KiB"][2] == "1.5x Mooncake and NIXL: reached"
    assert rows["handshakes, one process, 32 at once"][2] == "5x SGLang: reached"
    assert rows["handshakes, monitored"][3] == "0.50x the speed of plain ones"
    rows = shown(figures(shm=8.0, tcp=2.9, peers={"mooncake": 1.0, "nixl": 2.0}, ours=700.0))
    assert [row[2].rpartition(": ")[2] for row in rows.values() if row[2]] == ["NOT reached"] * 3 + ["open"]


def test_what_has_no_peer_here_stays_open_and_says_why() -> None:
    found = figures(peers={"nixl": 1.0})
    rows = shown(found)
    assert rows["tcp, pages of 64 KiB"][2] == "1.5x Mooncake and NIXL: open"
    assert rows["mooncake over tcp, 64 KiB"][1:] == ("open", "", "mooncake is not here")
    assert rows["cuda_ipc"][1] == "open"
    assert not bench_runtime.is_complete(found)
    slow = shown(figures(tcp=1.0, peers={"nixl": 1.0}))
    assert slow["tcp, pages of 64 KiB"][2] == "1.5x Mooncake and NIXL: NOT reached", "one peer is enough to miss it"


@pytest.mark.parametrize(("peers", "status"), [({"nixl": 1.0}, 2), ({"nixl": 1.0, "mooncake": 1.0}, 0)])
def test_the_exit_status_tells_of_an_absent_peer(
    peers: dict[str, float], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_runtime, "measure", lambda rounds, tell: figures(peers=peers))
    assert bench.main(["runtime"]) == status
    assert "shm, pages of 64 KiB" in capsys.readouterr().out


# -- the soak's judge


def reserved(t: float, room: int, page: int) -> Reserved:
    return Reserved(t, "d", "kv", Incarnation(room, 0, 1), (page,))


@pytest.fixture
def judge() -> Judge:
    return Judge(load().bounds)


def test_the_judge_reads_pipes_on_one_clock_and_sees_a_page_given_twice(judge: Judge, tmp_path: Path) -> None:
    """Two lives write at once; the second began ten seconds later, so its time 1 is the first one's time 11."""
    pipes = [tmp_path / "one", tmp_path / "two"]
    for pipe, events in zip(pipes, ([reserved(10.9, 1, 5)], [reserved(1.0, 2, 5)]), strict=True):
        os.mkfifo(pipe)
        judge.open(str(pipe))
        with pipe.open("wb", buffering=0) as file:
            file.write(b'{"kvpoll_trace": 1}\n' + "".join(f"{encode(event)}\n" for event in events).encode())
            file.write(b'{"t":9,"event":"Reser')  # what SIGKILL leaves of a line
    judge.sources[str(pipes[0])].origin, judge.sources[str(pipes[1])].origin = 100.0, 110.0
    for pipe in pipes:
        judge.close(str(pipe))
    judge.finish()
    assert judge.judged == 2 and judge.watch.counts == {"S8": 1}
    assert judge.watch.violations[0].t == 111.0
    assert not any(pipe.exists() for pipe in pipes) and not judge.sources


def test_what_a_killed_process_held_is_not_held_against_its_successor(judge: Judge) -> None:
    judge.add(NodeStarted(1.0, "d", 1))
    judge.add(reserved(2.0, 1, 5))
    judge.add(reserved(4.0, 2, 5))
    judge.add(NodeStopped(3.0, "d", 1))
    judge.finish()
    assert judge.watch.counts == {}


def test_writes_of_two_lives_have_numbers_of_their_own(judge: Judge, tmp_path: Path) -> None:
    """Both lives call their first write 1. The second one's must not settle, or stand for, the first one's."""
    seen: list[int] = []
    judge.stream.subscribe(WritePosted, lambda event: seen.append(event.write))
    for name in ("one", "two"):
        pipe = tmp_path / name
        os.mkfifo(pipe)
        judge.open(str(pipe))
        posted = WritePosted(1.0, "p", 1, Incarnation(1, 0, 1), "d", 0, True, (1,), (2,), None)
        with pipe.open("wb", buffering=0) as file:
            file.write(f"{encode(posted)}\n".encode())
        judge.sources[str(pipe)].origin = 0.0
        judge.close(str(pipe))
    judge.finish()
    assert len(set(seen)) == 2


def test_the_judge_says_what_had_nothing_to_judge(judge: Judge) -> None:
    judge.add(Healed(1.0, "R"))
    judge.add(Surveyed(2.0, "d", (("rooms", 0),), (("kvpoll_rooms", 0.0),), 0))
    judge.finish()
    idle = judge.report()["idle"]
    assert {"S7", "O2", "L6", "S5", "S9"} <= set(idle) and not {"L4", "L5", "R1", "O1"} & set(idle)


# -- the soak's engine and verdict


def test_a_request_has_the_same_fate_on_both_sides_and_many_have_none() -> None:
    fates = [fate(0, room, 0) for room in range(1, 500)]
    assert fates == [fate(0, room, 0) for room in range(1, 500)]
    assert {each.client for each in fates} == {None, "admitted", "later"}
    assert {each.decode for each in fates} == {None, "admitted", "waiting", "published"}
    assert sum((each.client, each.prefill, each.decode) == (None, None, None) for each in fates) > 350
    assert fates != [fate(1, room, 0) for room in range(1, 500)]


def test_decode_finds_a_wrong_byte_and_a_byte_written_to_free_pages() -> None:
    engine = Engine("decode", {"name": "decode0", "epoch": 1, "rules": {}, "seed": 0})
    try:
        pages = engine.pages
        pages.fill(3, room=7, attempt=0)
        assert all(pages.found(3, 7, 0)) and not any(pages.found(3, 7, 1)) and not any(pages.found(4, 7, 0))
        pages.note(3)
        view = engine.endpoint.pool.page_view(1, "v", 3 * 4 + 3)
        view[255] ^= 1
        assert pages.found(3, 7, 0) == [True, True, True, False]
        heard: list[Committed] = []
        engine.endpoint.host.stream.subscribe(Committed, heard.append)
        request = Request((7, 0), "P0", fate(0, 7, 0))
        request.transfer = SimpleNamespace(aux=lambda: None)
        engine._tell_found(request, pages.found(3, 7, 0))
        (event,) = heard
        assert [sorted(page) for page in event.contents] == [["P0"], ["P0"], ["P0"], []]
        assert event.row_pair is None
        assert [v.text for v in judge_trace([event], load().bounds, ["S5"]).violations] == [
            "page 3, component P0: expected room 7 (attempt 0), found nothing"
        ]
        assert not pages.is_untouched(3)
    finally:
        engine.endpoint.close()


def samples(growth: float) -> list[dict[str, Any]]:
    return [
        {"t_s": float(i), "over": 100 * i, "processes": {"prefill0": [int(1e8 * (1 + growth * i / 60)), 20, 7]},
         "rooms": {"prefill0": 50}, "judge": [int(1e8), i, 0]}
        for i in range(61)
    ]  # fmt: skip


def test_memory_that_grows_is_measured_and_memory_that_does_not_is_flat() -> None:
    flat, grown = (
        soak_verdict.growth(samples(0.0), "prefill0", 6000),
        soak_verdict.growth(samples(0.6), "prefill0", 6000),
    )
    assert flat["growth"] == 0.0 and flat["bytes_a_request"] == 0.0
    assert grown["growth"] > soak_verdict.GROWTH_MAX
    assert grown["bytes_a_request"] == pytest.approx(1e8 * 0.6 / 6000)
    tombstones_s = soak.RULES["tombstone_timeout_s"]
    assert [soak_verdict.is_settled({"traffic_s": factor * tombstones_s}) for factor in (1.9, 2.1)] == [False, True]


def test_open_files_that_pile_up_are_told() -> None:
    """A surge is no leak: what counts is the end against the beginning."""
    surge, leak = samples(0.0), samples(0.0)
    surge[30]["processes"]["prefill0"][1] = 60
    for number, sample in enumerate(leak):
        sample["processes"]["prefill0"][1] += number // 10
    assert soak_verdict.opened(surge, "prefill0") == []
    assert soak_verdict.opened(leak, "prefill0") == [
        "prefill0 has 26 open files, and had 21 at most in the first third"
    ]


QUICK = {
    "bootstrap_timeout_s": 6, "waiting_timeout_s": 6, "admission_timeout_s": 3, "announced_timeout_s": 7,
    "tombstone_timeout_s": 8, "decode_tombstone_timeout_s": 1,
}  # fmt: skip


def test_a_small_soak_loses_a_process_and_comes_to_a_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(soak, "RULES", soak.RULES | QUICK)
    before = process_stats()
    with soak.running(soak.Plan(400, 0, faults=False)) as made:
        made.start()
        victim, is_killed = made.by_name["decode1"], False
        while made.over < 400:
            made.route()
            made.turn()
            if made.over > 100 and not is_killed:
                is_killed = True
                made.kill(victim)
                made.launch(victim)
        made.loaded, made.traffic_s = made.origin, 1.0
        made.heal()
        found = soak_verdict.verdict(made)
    assert process_stats()["fds"] <= before["fds"], "the coordinator itself leaves nothing open"
    soak_verdict.write(found, str(tmp_path / "soak.json"), str(tmp_path / "soak.png"))
    assert found["holds"], found["problems"]
    assert found["lives"]["decode1"] == 2 and found["requests"] == 400
    assert found["judge"]["judged"] > 400 and found["outcomes"]["ok"] > 200
    assert found["probes"] == {"ok": soak.PROBES} and found["judge"]["idle"] == ["L6", "O2", "S7"]
    assert found["told_by_router"].keys() <= {"killed"}
    assert found["line"].endswith("nothing violated, nothing leaked, too short to judge memory")
    assert json.loads((tmp_path / "soak.json").read_text())["line"] == found["line"]
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--requests", "0"], "--requests"),
        (["--out", "/no/such/folder/soak.json"], "there is no folder /no/such/folder"),
        (["--figure", "soak.gif"], "not '.gif'"),
    ],
)
def test_bad_input_to_the_soak_is_one_line_before_anything_starts(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "soak", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def test_the_figures_of_the_runtime_on_the_page_are_those_that_are_committed() -> None:
    """`kvpoll bench runtime --out reports/bench-runtime.json` wrote them; the page repeats them."""
    found = json.loads((PAGE.parents[1] / "reports" / "bench-runtime.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert bench.with_tables(page, found, "docs/benchmarks.md") == page


def test_the_page_has_the_figures_of_the_runtime_once() -> None:
    """With every figure measured, the table of one process had the runtime's rows as well."""
    found = {"rounds": 3, "trace": None, "machine": bench.machine(), "runtime": figures()}
    page = f"{bench.BEGIN}\n{bench.END}\n{bench.RUNTIME_BEGIN}\n{bench.RUNTIME_END}\n"
    alone = bench.with_tables(page, found, "page.md")
    assert alone.count("| handshakes, one process, 32 at once |") == 1
    assert alone.startswith(f"{bench.BEGIN}\n{bench.END}\n"), "no figure of the other table was measured"
    both = bench.with_tables(page, {**found, "idle": {"events_an_hour": 0}}, "page.md")
    assert both.count("| handshakes, one process, 32 at once |") == 1
    assert "an idle hour" in both.partition(bench.END)[0]


def test_the_committed_soak_is_whole_and_the_page_says_what_it_said() -> None:
    found = json.loads((PAGE.parents[1] / "reports" / "soak.json").read_text(encoding="utf-8"))
    assert found["requests"] == found["asked_for"] >= 100_000
    assert found["holds"] and not found["problems"]
    assert found["line"] in PAGE.read_text(encoding="utf-8")
