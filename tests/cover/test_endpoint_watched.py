"""What an operator sees of an endpoint: JSON logs, metrics, and the invariants that are judged live."""

from __future__ import annotations

import io
import json
import logging
import random
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint_stage import LAYOUT, LIMIT_S, SOON, Stage, over, until

from kvpoll.runtime import KVPoll, TransferError, logs
from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.transports.memory import Fabric
from kvpoll.spec.trace import read_trace
from kvpoll.spec.vocabulary import Incarnation

# -- logs


@pytest.fixture
def lines() -> Iterator[Any]:
    """The log, read as JSON; a call returns the lines so far."""
    stream = io.StringIO()
    handler = logs.to_json(stream, logging.DEBUG)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logs.stop(handler)


def said(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


def test_the_life_of_a_request_in_the_log(lines: Any) -> None:
    with Stage(moving=False) as stage:
        source, target = stage.ready(room=5)
        source.send([0], last=False)
        until(lambda: source.poll() == KVPoll.Transferring, "the write being posted")
        stage.one_range()
        target.abort("client left")
        assert source.wait(timeout_s=LIMIT_S) == target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        stage.moving = True
        over(source, target)
        stage.served(room=6)
        prefill, decode = stage.prefill, stage.decode
    told = lines()
    assert all({"time", "level", "event"} <= line.keys() for line in told)
    assert [line["server"] for line in said(told, "registered")] == [stage.address]
    who = {"node": prefill.node, "epoch": prefill.epoch}
    failed = {line["node"]: line for line in said(told, "failed") if line["room"] == 5}
    assert (
        failed[prefill.node].items()
        >= {**who, "level": "warning", "attempt": 0, "rid": "5/0", "cause": "aborted_by_decode"}.items()
    )
    assert failed[decode.node]["cause"] == "client left"
    for event in ("quarantined", "released"):
        kept = {line["node"]: line for line in said(told, event) if line["room"] == 5}
        assert kept[prefill.node]["pages"] == 1 and kept[decode.node]["pages"] == 2
    assert {line["room"] for line in said(told, "admitted")} == {5, 6}
    assert [line["level"] for line in said(told, "succeeded")] == ["debug", "debug"]
    assert {line["node"] for line in said(told, "closed")} == {prefill.node, decode.node}
    assert said(told, "peer_left")[0]["peer"] == prefill.node


def test_nothing_is_said_unless_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    with Stage() as stage:
        source, _ = stage.admit()
        source.abort()
        assert source.wait(timeout_s=LIMIT_S) == KVPoll.Failed
    assert capfd.readouterr() == ("", "")


def test_a_log_in_a_file_with_what_went_wrong(tmp_path: Path) -> None:
    path = tmp_path / "kvpoll.jsonl"
    handler = logs.to_json(path)
    try:
        with Stage() as stage:
            stage.prefill.do(lambda: 1 // 0)
            until(lambda: stage.prefill.host.loop.failed, "the defect")
    finally:
        logs.stop(handler)
    told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["level"], line["error"]) for line in said(told, "note")] == [
        ("error", "ZeroDivisionError: integer division or modulo by zero")
    ]
    assert not said(told, "succeeded"), "DEBUG was not asked for"


def test_a_suspected_peer_and_dropped_messages_are_said(lines: Any) -> None:
    with Stage(rules=SOON) as stage:
        stage.served()
        held, go = threading.Event(), threading.Event()
        stage.decode.do(lambda: (held.set(), go.wait(LIMIT_S)))
        assert held.wait(LIMIT_S)
        until(lambda: said(lines(), "peer_suspected"), "suspicion")
        go.set()
        until(lambda: said(lines(), "link_restored"), "its end")
        stage.decode.do(lambda: stage.decode.host.tell(stage.prefill.node, wire.Ping(1), "Ping", Incarnation(0, 0, 0)))
        node = stage.prefill.node
        channel = stage.decode.host.directory[node].endpoint
        stage.decode.do(lambda: stage.decode.host.plane._channels[channel].socket.send(b"garbage"))
        until(lambda: said(lines(), "messages_dropped"), "the drop")
        dropped = said(lines(), "messages_dropped")[0]
        assert (dropped["node"], dropped["count"]) == (node, 1) and dropped["reason"] in stage.prefill.dropped
        assert said(lines(), "peer_suspected")[0]["peer"] == stage.decode.node


# -- metrics


def numbers(text: bytes) -> dict[str, float]:
    """Samples by name, their labels put aside."""
    rows = [line.rpartition(" ") for line in text.decode().splitlines() if line[:1] != "#"]
    return {
        name.replace('node="', "").split("{")[0] + _cause(name): float(value)
        for name, _, value in rows
        if "_bucket" not in name
    }


def _cause(name: str) -> str:
    return " " + name.partition('cause="')[2].rstrip('"}').partition('"')[0] if 'cause="' in name else ""


def test_metrics_under_sglangs_names_and_over_http() -> None:
    with Stage(moving=False) as stage:
        stage.moving = True
        stage.served()
        stage.moving = False
        early = stage.prefill.admit(700)
        early.abort("whatever: the engine says")
        source, target = stage.ready()
        source.send([0, 1], last=True)
        until(lambda: source.poll() == KVPoll.Transferring, "the write being posted")
        stage.one_range()
        target.abort()
        assert source.wait(timeout_s=LIMIT_S) == early.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        port = stage.prefill.serve_metrics(0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as answer:
            seen = numbers(answer.read())
        assert seen["sglang:kv_transfer_latency_ms_count"] == 1 == seen["sglang:kv_transfer_bootstrap_ms_count"] - 1
        one = "sglang:kv_transfer_latency_ms_count"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics?name[]={one}", timeout=LIMIT_S) as answer:
            assert numbers(answer.read()) == {one: 1}
        assert seen["sglang:num_bootstrap_failed_reqs_total"] == 1
        assert seen["sglang:num_transfer_failed_reqs_total"] == 1
        assert seen["kvpoll_transfers_total ok"] == seen["kvpoll_transfers_total aborted"] == 1
        assert seen["kvpoll_transfers_total aborted_by_decode"] == 1
        assert seen["kvpoll_pages_quarantined"] == 2 and seen["kvpoll_writes_unsettled"] == 1
        assert seen["kvpoll_transfers_live"] == 2 and seen["kvpoll_healthy"] == 1
        stage.moving = True
        over(source, target, early)
        after = numbers(stage.prefill.metrics.text())
        assert (
            after["kvpoll_pages_quarantined"] == after["kvpoll_writes_unsettled"] == after["kvpoll_transfers_live"] == 0
        )
        assert after["kvpoll_bytes_written"] > 0


# -- live invariants


def test_an_hour_of_trouble_raises_no_false_alarm(tmp_path: Path) -> None:
    """2000 requests in a small pool: aborts on both sides at every moment, stalled writes, releases at any time, rooms
    used again, and three new lives of prefill. Monitors of both ranks are silent, and in the end nothing is held.
    """
    chance = random.Random(7)
    with Stage(monitored=True, rules={"decode_tombstone_timeout_s": 0.05, "tombstone_timeout_s": 0.1}) as stage:
        window: list[Any] = []
        for number in range(2000):
            if number in (500, 1000, 1500):
                assert stage.prefill.violations == [] and stage.prefill.health()["defects"] == []
                stage.restart_prefill()
                over(*(target for _, target in window))
                window.clear()
            if chance.random() < 0.01:
                stage.moving = not stage.moving
            page = number % 16
            while len(window) > 6:
                stage.moving = True
                over(*window.pop(0))
            source, target = stage.admit(room=1 + number % 400, attempt=number // 400)
            window.append((source, target))
            _live(chance, source, target, page)
        stage.moving = True
        for pair in window:
            over(*pair)
        assert stage.prefill.violations == stage.decode.violations == []
        assert stage.prefill.health()["defects"] == stage.decode.health()["defects"] == []
        for endpoint in (stage.prefill, stage.decode):
            assert not endpoint.transfers and not endpoint._claims and endpoint.health()["quarantined_pages"] == 0
        stage.served(room=5000)


def _live(chance: random.Random, source: Any, target: Any, page: int) -> None:
    """One request, given up by somebody at some moment or not at all. Memory may be refused: then it is given up."""
    moment = chance.choice(["never", "never", "never", "opened", "found", "published", "sent", "success"])
    who = chance.choice([source, target])
    if moment == "opened":
        who.abort("opened")
    if target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.Failed:
        source.abort("other side")
        return
    if moment == "found":
        who.abort("found")
    try:
        target.publish([page, page + 16], row=page % 8)
    except TransferError:
        target.abort("no memory")
    if moment == "published":
        who.abort("published")
    if source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.Failed:
        return
    try:
        source.send([page])
        if moment == "sent":
            who.abort("sent")
        source.send([page + 16], last=True)
    except TransferError:
        source.abort("no memory")
    if moment == "success" and chance.random() < 0.5:
        who.release()


def test_pages_that_are_let_go_under_a_running_write_are_seen_live(lines: Any) -> None:
    """The oldest defect of all (A01): with release_requires_quiescence = never decode gives pages to the next request
    while the writer of the last one is paused. Nothing has landed yet; the monitor says so before it does.
    """
    with Stage(moving=False, monitored=True, decode={"rules": {"release_requires_quiescence": "never"}}) as stage:
        source, target = stage.ready((3, 4), row=1)
        source.send([3, 4], last=True)
        until(lambda: source.poll() == KVPoll.Transferring, "the write being posted")
        stage.one_range()
        target.abort("client left")
        assert target.wait_pages_free(LIMIT_S), "so says the rule"
        assert stage.decode.violations == [], "nobody has the pages yet"
        _, heir = stage.admit()
        assert heir.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        heir.publish([4], 2)
        until(lambda: stage.decode.violations, "the violation")
        violated = stage.decode.violations[0]
        assert (violated.invariant, violated.pair) == ("S1", heir.pair)
        assert "kv page 4 went to" in violated.text and "was not settled" in violated.text
        assert (
            said(lines(), "violated")[0].items() >= {"invariant": "S1", "level": "error", "room": heir.pair[0]}.items()
        )
        assert numbers(stage.decode.metrics.text())["kvpoll_violations"] == 1
        assert stage.prefill.violations == []


def test_the_same_story_under_the_reference_rules_is_clean() -> None:
    with Stage(moving=False, monitored=True) as stage:
        source, target = stage.ready((3, 4), row=1)
        source.send([3, 4], last=True)
        until(lambda: source.poll() == KVPoll.Transferring, "the write being posted")
        stage.one_range()
        target.abort("client left")
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        _, heir = stage.admit()
        assert heir.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        with pytest.raises(TransferError, match="page 4 is still held"):
            heir.publish([4], 2)
        stage.moving = True
        assert target.wait_pages_free(LIMIT_S)
        heir.publish([4], 2)
        over(heir, source, target)
        assert stage.decode.violations == stage.prefill.violations == []


def test_who_refuses_the_bytes_of_a_paused_writer_has_the_pages_back_and_no_alarm() -> None:
    """The fence: decode's own process places what comes. The next request has the pages while the writer is paused."""
    fabric = Fabric()
    fenced = {"transport": "memory", "options": {"fabric": fabric, "one_sided": False}}
    with Stage(moving=False, monitored=True, **fenced) as stage:
        stage.fabric = fabric
        stage.prefill.do(stage._pump)
        source, target = stage.ready((3, 4), row=1)
        source.send([3, 4], last=True)
        until(lambda: source.poll() == KVPoll.Transferring, "the write being posted")
        stage.one_range()
        stage.prefill.do(setattr, stage.prefill.rank, "stopped", True)
        until(lambda: stage.prefill.rank.stopped, "prefill being deaf")
        target.abort("client left")
        assert target.wait_pages_free(LIMIT_S), "and prefill has not said a word"
        assert source.poll() == KVPoll.Transferring
        _, heir = stage.admit()
        assert heir.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        heir.publish([3, 4], 1)
        before = [stage.decode.pool.get(*plane, page).tobytes() for plane in LAYOUT.planes for page in (3, 4)]
        stage.moving = True
        until(lambda: not fabric.under_way, "the end of the write")
        assert [stage.decode.pool.get(*plane, page).tobytes() for plane in LAYOUT.planes for page in (3, 4)] == before
        assert stage.decode.violations == []
        heir.abort("over")
        over(target, heir)


def test_a_row_of_another_request_is_seen_at_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """S5: something has overwritten the aux row; ``aux`` says None and the monitor whose row it is."""
    with Stage(monitored=True) as stage:
        source, target = stage.ready((0, 1), row=0)
        source.send([0, 1], last=True)
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
        stage.decode.pool.put_row(0, b"")
        assert target.aux() is None
        target.commit()
        until(lambda: stage.decode.violations, "the violation")
        assert stage.decode.violations[0].invariant == "S5"
        over(source, target)


def test_a_trace_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "decode.jsonl"
    with Stage(decode={"trace": path}) as stage:
        stage.served()
    with path.open(encoding="utf-8") as file:
        header, events = read_trace(file, "decode.jsonl")
        kinds = [type(event).__name__ for event in events]
    assert header["node"] == "D" and kinds[0] == "NodeStarted"
    assert {"Stepped", "Reserved", "Released", "Committed", "Addressed"} <= set(kinds)
