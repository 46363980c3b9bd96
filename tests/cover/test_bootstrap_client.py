"""The client: typed answers from a good server, and a plain word for everything that a bad one or a network does."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from bootstrap_stage import HURRIED, REFERENCE, SGLANG, WAIT_S, answering, rank, server, until

from kvpoll.runtime.bootstrap import BootstrapClient, Caller, Coordinate, Endpoint, Reply, Topology
from kvpoll.spec.protocol import Profile
from kvpoll.spec.source import BadInput


@contextlib.contextmanager
def client(address: str, profile: Profile = REFERENCE, **options: Any) -> Iterator[BootstrapClient]:
    made = BootstrapClient(address, profile, **options)
    try:
        yield made
    finally:
        made.close()


def ok(body: str, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", "Connection: close", *headers, "", body]
    return "\r\n".join(lines).encode()


# -- a good server


def test_a_rank_registers_is_found_and_leaves() -> None:
    info = rank(0, 1, process_epoch=4, rank_name="P0/tp0", node="host-a", prefill_http_port=30080)
    with server() as target, client(target.address) as mine:
        assert mine.topology() == Reply(503, "Prefill server not fully registered yet (0 workers registered).")
        assert mine.health() == mine.register(info) == Reply(200, target.epoch)
        assert mine.topology() == Reply(
            200,
            Topology(1, 1, 1, 1, 16, "bfloat16", True, prefill_http_port=30080, server_epoch=target.epoch),
        )
        assert mine.endpoint(0, 0, 0, 0) == Reply(200, Endpoint("127.0.0.1", 30000, 4, "P0/tp0", "host-a"))
        assert mine.endpoint(0, 0, 1, 0) == Reply(404, "Bootstrap info not found for dp0/pp0/cp0/tp1")
        place = Coordinate(0, 0, 0, 0)
        assert mine.unregister(place, 3).status == mine.unregister(place).status == 409
        assert mine.unregister(place, 4) == Reply(200, target.epoch)
        assert mine.topology().status == 503


def test_dp_ranks_are_filed_under_the_key_that_the_machines_use() -> None:
    with server() as target, client(target.address) as mine:
        assert mine.register_dp_rank(7, 1, 0) == mine.register_dp_rank(7, 2, 1) == Reply(200, None)
        assert mine.query_dp_ranks([7, 7, 8], [0, 1, 0]) == Reply(200, {(7, 0): 1, (7, 1): 2})
        assert mine.query_dp_ranks([7]) == Reply(200, {})
        assert mine.query_dp_ranks([], []) == Reply(200, {})
        assert mine.query_dp_ranks([7], [0, 1]).status == 400
    with server(SGLANG) as target, client(target.address, SGLANG) as mine:
        mine.register_dp_rank(7, 1, 0)
        mine.register_dp_rank(7, 2, 1)
        assert mine.query_dp_ranks([7], [0]) == Reply(200, {7: 2})


def test_it_carries_the_token_where_it_has_one() -> None:
    with server(token="secret") as target:
        with client(target.address) as stranger:
            assert stranger.register(rank()) == Reply(401, "this server takes writes only with its bearer token")
        with client(target.address, token="secret") as mine:
            assert mine.register(rank()).status == mine.register_dp_rank(1, 0).status == 200


def test_a_given_session_is_used_and_stays_open() -> None:
    with server() as target, requests.Session() as session:
        calls: list[str] = []
        session.hooks["response"].append(lambda response, **rest: calls.append(response.request.path_url))
        with client(target.address, session=session) as mine:
            assert mine.health().status == 200
        assert calls == ["/health"]
        assert session.get(f"http://{target.address}/health", timeout=WAIT_S).ok


def test_threads_do_not_share_a_session() -> None:
    with server() as target, client(target.address) as mine:
        threads = [threading.Thread(target=mine.health) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(mine._sessions) == 3
        mine.close()
        assert mine._sessions == []


def test_a_restarted_server_is_another_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept connection is dead then, and a proxy of the environment is not asked."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server() as target, client(target.address) as mine:
        first = mine.health()
        port = target.port
        target.close()
        assert mine.health() == Reply("refused")
        with server() as target:
            pass
        successor = server()
        successor.port = port
        with successor:
            second = mine.health()
    assert first.status == second.status == 200
    assert second.body > first.body


# -- bad servers and networks


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with client(address) as mine:
        assert {mine.health(), mine.register(rank()), mine.topology()} == {Reply("refused")}
    with client("no-such-host.invalid:8998") as mine:
        assert mine.health() == Reply("refused")


def test_a_server_that_never_answers_is_a_timeout() -> None:
    with answering() as address, client(address, HURRIED) as mine:
        assert mine.topology() == Reply("timeout")


def test_a_server_that_stops_in_its_answer_is_a_timeout() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
    with answering(head, b"}", gap_s=WAIT_S) as address, client(address, HURRIED) as mine:
        assert mine.topology() == Reply("timeout")


def test_an_answer_that_drips_is_a_timeout_of_the_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"
    with answering(head, *[b" "] * 100, gap_s=0.1) as address, client(address, HURRIED) as mine:
        assert mine.topology() == Reply("timeout")


def test_a_server_that_hangs_up_is_refused() -> None:
    with answering(b"") as address, client(address) as mine:
        assert mine.health() == Reply("refused")


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example.org ESMTP\r\n",
        ok("hello"),
        ok("[]"),
        ok('{"attn_tp_size": 0, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1}'),
        ok('{"attn_tp_size": true, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1}'),
        ok('{"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": "16"}'),
        ok("[" * 100_000),
        ok("\x1f\x8b no gzip", "Content-Encoding: gzip"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ok('{"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1}' + " " * (5 << 20)),
    ],
)
def test_what_is_no_answer_of_a_bootstrap_server_is_told(answer: bytes) -> None:
    with answering(answer) as address, client(address) as mine:
        reply = mine.topology()
        assert reply.status in (502, "refused")
        if reply.status == 502:
            assert reply.body.startswith("not an answer of a bootstrap server: ") and len(reply.body) < 400


@pytest.mark.parametrize("body", ["{}", '{"rank_ip": 1, "rank_port": 1}', '{"rank_ip": "a", "rank_port": "1"}', "[1]"])
def test_a_malformed_endpoint_is_told(body: str) -> None:
    with answering(ok(body)) as address, client(address) as mine:
        assert mine.endpoint(0, 0, 0, 0).status == 502


@pytest.mark.parametrize("body", ["[]", '{"x": 1}', '{"1": "2"}', '{"1/x": 2}'])
def test_a_malformed_table_of_dp_ranks_is_told(body: str) -> None:
    with answering(ok(body)) as address, client(address) as mine:
        assert mine.query_dp_ranks([1]).status == 502


def test_a_redirect_is_not_followed() -> None:
    away = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
    with answering(away) as address, client(address) as mine:
        assert mine.health().status == 302


def test_a_server_with_a_nonsense_epoch_of_a_rank_is_told() -> None:
    with answering(ok('{"rank_ip": "a", "rank_port": 1, "process_epoch": "4"}')) as address, client(address) as mine:
        assert mine.endpoint(0, 0, 0, 0) == Reply(502, "not an answer of a bootstrap server: process_epoch is '4'")


def test_fields_of_a_newer_server_are_passed_over() -> None:
    told = '{"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": null, "new": {"a": 1}}'
    with answering(ok(told, "X-Kvpoll-Epoch: nonsense")) as address, client(address) as mine:
        assert mine.topology() == Reply(200, Topology(1, 1, 1, 1, None, None))
        assert mine.health() == Reply(200, None)


@pytest.mark.parametrize(
    "address",
    ["", "8998", ":8998", "host", "host:", "host:0", "host:65536", "host:x", "a b:1", "::1:80", "u@h:1", "h/p:1"],
)
def test_what_is_no_address_is_bad_input(address: str) -> None:
    with pytest.raises(BadInput, match=r"HOST:PORT|brackets"):
        BootstrapClient(address, REFERENCE)


def test_an_address_may_be_written_as_a_url() -> None:
    assert BootstrapClient("http://127.0.0.1:8998/", REFERENCE).address == "127.0.0.1:8998"
    assert BootstrapClient("[::1]:8998", REFERENCE).address == "[::1]:8998"


# -- calls that nobody waits for


class Scheduler:
    """A loop that only takes what was posted to it."""

    def __init__(self) -> None:
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.replies: list[tuple[str, Reply]] = []

    def hear(self, name: str) -> Callable[[Reply], None]:
        return lambda reply: self.replies.append((name, reply))

    def turn(self) -> None:
        self.posted.get(timeout=WAIT_S)()


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@contextlib.contextmanager
def calling(scheduler: Scheduler, **options: Any) -> Iterator[Caller]:
    caller = Caller(scheduler.posted.put, **options)
    try:
        yield caller
    finally:
        caller.close()


def test_the_reply_comes_back_on_the_schedulers_own_turn(scheduler: Scheduler) -> None:
    with server() as target, client(target.address) as mine, calling(scheduler) as caller:
        assert caller.submit(mine.address, mine.health, scheduler.hear("health"))
        until(lambda: not scheduler.posted.empty(), "the reply")
        assert scheduler.replies == []
        scheduler.turn()
        assert scheduler.replies == [("health", Reply(200, target.epoch))]


def test_a_hung_server_delays_only_the_calls_to_itself(scheduler: Scheduler) -> None:
    """A19: six calls wait for a server that takes connections and never answers; its neighbour answers meanwhile."""
    patient = REFERENCE.with_rules({"http_timeout_s": 2 * WAIT_S})
    with (
        answering() as hung, server() as target, client(hung, patient) as stuck, client(target.address) as mine,
        calling(scheduler, threads=3) as caller,
    ):  # fmt: skip
        for _ in range(6):
            assert caller.submit(stuck.address, stuck.topology, scheduler.hear("hung"))
        for name in ("first", "second"):
            assert caller.submit(mine.address, mine.health, scheduler.hear(name))
        scheduler.turn()
        scheduler.turn()
        assert [name for name, _ in scheduler.replies] == ["first", "second"]
        assert len(caller) == 4, "two of three threads are held"


def test_a_full_queue_refuses_at_once(scheduler: Scheduler) -> None:
    release = threading.Event()

    def wait() -> Reply:
        release.wait(WAIT_S)
        return Reply(200)

    with calling(scheduler, threads=1, queue_max=2) as caller:
        assert caller.submit("a", wait, scheduler.hear("0"))
        until(lambda: len(caller) == 0, "a thread that takes the call")
        assert [caller.submit("a", wait, scheduler.hear(str(number))) for number in (1, 2, 3)] == [True, True, False]
        assert caller.refused == 1
        release.set()
        for _ in range(3):
            scheduler.turn()
        assert [name for name, _ in scheduler.replies] == ["0", "1", "2"]


def test_a_closed_caller_calls_nobody(scheduler: Scheduler) -> None:
    release = threading.Event()
    called: list[int] = []

    def wait() -> Reply:
        called.append(1)
        release.wait(WAIT_S)
        return Reply(200)

    caller = Caller(scheduler.posted.put, threads=1)
    for _ in range(2):
        caller.submit("a", wait, scheduler.hear("late"))
    until(lambda: called == [1], "a call in progress")
    began_s = time.monotonic()
    caller.close(0.2)
    assert time.monotonic() - began_s < WAIT_S, "closing does not wait for the call"
    assert not caller.submit("a", wait, scheduler.hear("late"))
    assert len(caller) == 0
    release.set()
    until(lambda: not caller._threads[0].is_alive(), "the end of the thread")
    assert called == [1] and scheduler.posted.empty()


def test_a_call_that_raises_and_a_scheduler_that_is_gone_end_no_thread(scheduler: Scheduler) -> None:
    refuse = threading.Event()

    def post(turn: Callable[[], None]) -> None:
        if refuse.is_set():
            raise RuntimeError("event loop is closed")
        scheduler.posted.put(turn)

    def fail() -> Reply:
        raise KeyError("a defect")

    caller = Caller(post, threads=1)
    caller.submit("a", fail, scheduler.hear("failed"))
    scheduler.turn()
    assert scheduler.replies == [("failed", Reply(502, "KeyError in the call"))]
    refuse.set()
    caller.submit("a", lambda: Reply(200), scheduler.hear("lost"))
    until(lambda: len(caller) == 0 and not caller._busy, "the lost call")
    refuse.clear()
    caller.submit("a", lambda: Reply(200), scheduler.hear("next"))
    scheduler.turn()
    caller.close()
    assert [name for name, _ in scheduler.replies] == ["failed", "next"]
