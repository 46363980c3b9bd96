"""The bootstrap server over real HTTP: SGLang's answers, and what it knows beyond SGLang's."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from bootstrap_stage import PROTOCOL, REFERENCE, SGLANG, Clock, ask, gauges, leave, put, rank, route, server, until

from kvpoll.runtime.bootstrap import BootstrapServer, Coordinate, Limits
from kvpoll.runtime.bootstrap.reading import Refused
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import HealthReported, NodeStarted, NodeStopped

ROOM = 7


def enter(target: BootstrapServer, room: int, dp_rank: int, **more: int) -> int:
    body = {"bootstrap_room": room, "dp_rank": dp_rank, **more}
    return ask(target, "POST", "/register_dp_rank", json=body).status_code


def query(target: BootstrapServer, *rooms: int, **more: Any) -> Any:
    return ask(target, "POST", "/query_dp_ranks", json={"bootstrap_rooms": list(rooms), **more}).json()


# -- as SGLang


def test_the_answers_of_sglang_field_by_field() -> None:
    """Fields and null fields as recorded from SGLang 0.5.23; one field more and its client could not read them."""
    with server() as target:
        assert ask(target, "GET", "/health").text == "OK"
        assert route(target).status_code == 503
        assert "Prefill server not fully registered yet (0 workers registered)." in route(target).text
        for tp in (0, 1):
            answer = put(target, rank(tp, prefill_http_port=30080, load_balance_method="round_robin"))
            assert (answer.status_code, answer.text) == (200, "OK")
        assert route(target).json() == {
            "attn_tp_size": 2, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16,
            "kv_cache_dtype": "bfloat16", "follow_bootstrap_room": False, "enable_dsa_cache_layer_split": False,
            "decode_allocation_policy": "early", "enable_kv_cache_sharding": False, "prefill_http_port": 30080,
            "target_tp_rank": None, "target_tp_ranks": None, "target_cp_ranks": None, "target_pp_ranks": None,
            "required_dst_info_num": None, "required_prefill_response_num": None,
        }  # fmt: skip
        assert route(target, 1).json() == {"rank_ip": "127.0.0.1", "rank_port": 30001}
        assert route(target, 2).status_code == 404
        assert ask(target, "POST", "/route").status_code == ask(target, "HEAD", "/route").status_code == 405
        assert ask(target, "GET", "/route", params={"target_tp_rank": 0}).status_code == 400


def test_layouts_are_told_only_where_they_are_set() -> None:
    layout = {"num_draft_tokens": 4, "compression_ratios": [1, 2], "state_item_lens": [[1], [2, 3]]}
    with server() as target:
        put(target, rank(0, kv_layout="packed", dsv41_spec_layout=layout))
        put(target, rank(1, kv_layout=None, dsv41_spec_layout=layout))
        answer = route(target).json()
        assert (answer["kv_layout"], answer["dsv41_spec_layout"]) == ("packed", layout)


@pytest.mark.parametrize(
    ("fields", "dp", "dp_size"),
    [
        ({"attn_dp_size": 2, "attn_dp_rank": 1}, 1, 2),
        ({"system_dp_size": 3, "system_dp_rank": 2}, 2, 3),
        ({"system_dp_size": 3, "system_dp_rank": 2, "attn_dp_size": 2, "attn_dp_rank": 1}, 2, 3),
    ],
)
def test_a_rank_stands_in_its_replica_or_else_in_its_attention_dp_group(
    fields: dict[str, int], dp: int, dp_size: int
) -> None:
    info = rank(0, 1, **fields)
    assert (info.coordinate.dp, info.topology.dp_size) == (dp, dp_size)


def test_dp_ranks_are_told_to_whom_asks_and_not_consumed() -> None:
    with server() as target:
        assert query(target, 1, 2) == {}
        assert enter(target, 1, 3) == 200
        assert query(target, 1, 2) == query(target, 2, 1) == {"1": 3}
        assert enter(target, 1, 0) == 200
        assert query(target, 1) == {"1": 0}


# -- ready is a set of ranks


def test_a_repeated_put_makes_nothing_ready() -> None:
    """C1: SGLang counts PUTs; the retry after a lost answer made the engine ready with a rank missing."""
    with server() as target:
        assert put(target, rank(0)).status_code == put(target, rank(0)).status_code == 200
        assert route(target).status_code == route(target, 0).status_code == 503
        ready = ask(target, "GET", "/ready")
        answer = ready.json()
        assert (ready.status_code, answer["ready"], answer["missing"]) == (503, False, ["dp0/pp0/cp0/tp1"])
        assert (answer["registered"], answer["expected"]) == (1, 2)
        put(target, rank(1))
        assert route(target).status_code == 200
        assert ask(target, "GET", "/ready").status_code == 200


def test_under_sglangs_rule_it_is_ready_too_early_and_ready_still_tells_the_truth() -> None:
    with server(SGLANG) as target:
        put(target, rank(0))
        put(target, rank(0))
        assert route(target).status_code == route(target, 0).status_code == 200
        assert route(target, 1).status_code == 404
        assert ask(target, "GET", "/ready").json()["missing"] == ["dp0/pp0/cp0/tp1"]
        assert gauges(target)["kvpoll_bootstrap_ready"] == 0


def test_all_dimensions_must_be_there() -> None:
    places = [(dp, cp, tp, pp) for dp in (0, 1) for cp in (0, 1) for tp in (0, 1) for pp in (0, 1)]
    with server() as target:
        assert ask(target, "GET", "/ready").json()["expected"] is None
        for dp, cp, tp, pp in places:
            assert route(target).status_code == 503
            fields = {"attn_cp_size": 2, "attn_cp_rank": cp, "pp_size": 2, "pp_rank": pp}
            put(target, rank(tp, **fields, attn_dp_size=2, attn_dp_rank=dp))
        assert route(target).json()["dp_size"] == 2
        found = route(target, 1, prefill_dp_rank=1, prefill_cp_rank=0, target_pp_rank=1)
        assert found.json()["rank_port"] == 30001


# -- lives of ranks


def test_a_newer_life_retires_the_endpoint_of_its_predecessor() -> None:
    """A21: with the epoch in the answer, decode sees that the rank behind the address is another process."""
    with server() as target:
        put(target, rank(0, 1, process_epoch=1, rank_name="P0/tp0", node="host-a"))
        assert route(target, 0).json() == {
            "rank_ip": "127.0.0.1", "rank_port": 30000, "process_epoch": 1, "rank_name": "P0/tp0", "node": "host-a",
        }  # fmt: skip
        assert put(target, rank(0, 1, process_epoch=2, rank_port=31000)).status_code == 200
        assert route(target, 0).json() == {"rank_ip": "127.0.0.1", "rank_port": 31000, "process_epoch": 2}


def test_an_older_life_is_refused_and_changes_nothing() -> None:
    with server() as target:
        put(target, rank(0, process_epoch=5))
        late = put(target, rank(0, process_epoch=4, rank_port=31000))
        assert late.status_code == 409
        assert late.json() == {"error": "epoch 4 of dp0/pp0/cp0/tp0 is over: epoch 5 has registered"}
        put(target, rank(1, process_epoch=0))
        assert route(target, 0).json() == {"rank_ip": "127.0.0.1", "rank_port": 30000, "process_epoch": 5}
        assert gauges(target)['kvpoll_bootstrap_refused_total{reason="stale_epoch"}'] == 1


def test_a_rank_without_an_epoch_always_replaces() -> None:
    """SGLang's ranks send none; what came last is where the rank listens."""
    with server() as target:
        put(target, rank(0, 1, process_epoch=5))
        assert put(target, rank(0, 1, rank_port=31000)).status_code == 200
        assert route(target, 0).json() == {"rank_ip": "127.0.0.1", "rank_port": 31000}
        assert put(target, rank(0, 1, process_epoch=4)).status_code == 409
        assert put(target, rank(0, 1, process_epoch=5)).status_code == 200


def test_two_processes_cannot_be_the_same_life_of_a_rank() -> None:
    with server() as target:
        put(target, rank(0, 1, process_epoch=5, rank_name="P0/tp0"))
        other = put(target, rank(0, 1, process_epoch=5, rank_name="P9/tp0", rank_port=31000))
        assert other.status_code == 409
        assert "P9/tp0 at 127.0.0.1:31000 and P0/tp0 at 127.0.0.1:30000" in other.json()["error"]
        assert route(target, 0).json()["rank_port"] == 30000


def test_a_rank_that_leaves_takes_readiness_with_it() -> None:
    with server() as target:
        put(target, rank(0, process_epoch=3))
        put(target, rank(1, process_epoch=3))
        assert leave(target, 1, 2).status_code == 409, "the goodbye of a life that is over"
        assert leave(target, 1).status_code == 409, "which life leaves must be said"
        assert route(target).status_code == 200
        assert leave(target, 1, 3).status_code == 200
        assert route(target).status_code == route(target, 0).status_code == 503
        assert leave(target, 1, 3).status_code == 404
        assert put(target, rank(1, process_epoch=4)).status_code == 200
        assert route(target).status_code == 200


def test_when_all_have_left_another_engine_may_come() -> None:
    with server() as target:
        put(target, rank(0))
        assert put(target, rank(0, 4)).status_code == 200, "alone, it may come back with other sizes"
        assert ask(target, "GET", "/ready").json()["expected"] == 4
        put(target, rank(1, 4))
        assert put(target, rank(0, 1, page_size=64)).status_code == 409
        assert leave(target, 0).status_code == leave(target, 1).status_code == 200
        assert ask(target, "GET", "/ready").json()["expected"] is None
        assert put(target, rank(0, 1, page_size=64)).status_code == 200
        assert route(target).json()["page_size"] == 64


def test_a_lone_rank_with_other_sizes_is_still_bound_by_its_epoch() -> None:
    with server() as target:
        put(target, rank(0, 1, process_epoch=5))
        assert put(target, rank(0, 2, process_epoch=4)).status_code == 409
        assert ask(target, "GET", "/ready").json()["expected"] == 1
        assert put(target, rank(0, 2, process_epoch=6)).status_code == 200
        assert route(target).status_code == 503


# -- two engines, one server


@pytest.mark.parametrize(
    ("field", "value", "status", "told"),
    [
        ("page_size", 64, 409, "page_size is 64 on P1 at"),
        ("kv_cache_dtype", "fp8_e5m2", 409, "kv_cache_dtype is 'fp8_e5m2' on P1 at"),
        ("attn_tp_size", 4, 409, "attn_tp_size is 4 on P1 at"),
        ("pp_size", 2, 409, "pp_size is 2 on P1 at"),
        ("system_dp_size", 2, 409, "dp_size is 2 on P1 at"),
        ("kv_layout", "other", 409, "kv_layout is 'other' on P1 at"),
        ("load_balance_method", "round_robin", 409, "follow_bootstrap_room is False on P1 at"),
        ("enable_kv_cache_sharding", True, 409, "enable_kv_cache_sharding is True on P1 at"),
        ("dsv41_spec_layout", {"a": 1}, 400, "DeepSeek-V4.1 DSpark PD layout differs across prefill ranks: P1 at"),
        ("decode_allocation_policy", "prefill_complete", 400, "Inconsistent prefill allocation policies: P1 at"),
    ],
)
def test_a_rank_of_another_engine_is_refused_and_both_are_named(field: str, value: Any, status: int, told: str) -> None:
    with server() as target:
        put(target, rank(0, rank_name="P0", kv_layout="packed"))
        refusal = put(target, rank(1, **{field: value, "rank_name": "P1"}))
        assert refusal.status_code == status
        assert told in refusal.json()["error"] and "P0 at 127.0.0.1:30000" in refusal.json()["error"]
        assert route(target).status_code == 503
        assert put(target, rank(1)).status_code == 200
        assert route(target).status_code == 200


# -- attempts, expiry, bounds


def test_an_attempt_is_filed_beside_the_attempt_before_it() -> None:
    """S6: under the bare room a reused room would find the DP rank of the request before it."""
    with server() as target:
        assert enter(target, ROOM, 1, attempt=0) == enter(target, ROOM, 2, attempt=1) == 200
        assert query(target, ROOM, ROOM, 8, attempts=[0, 1, 0]) == {"7/0": 1, "7/1": 2}
        assert query(target, ROOM) == {}
        assert enter(target, ROOM, 3) == 200
        assert query(target, ROOM) == {"7": 3}
        assert query(target, ROOM, attempts=[2]) == {}


def test_where_the_room_is_the_identity_attempts_make_no_difference() -> None:
    with server(SGLANG) as target:
        enter(target, ROOM, 1, attempt=0)
        enter(target, ROOM, 2, attempt=1)
        assert query(target, ROOM) == {"7": 2}
        assert query(target, ROOM, ROOM, attempts=[0, 1]) == {"7/0": 2, "7/1": 2}


def test_entries_expire_by_the_profiles_time() -> None:
    clock = Clock()
    with server(clock=clock) as target:
        enter(target, 1, 0)
        clock.now_s += REFERENCE.number("dp_entry_timeout_s") - 1
        enter(target, 2, 0)
        assert query(target, 1, 2) == {"1": 0, "2": 0}
        clock.now_s += 1
        assert query(target, 1, 2) == {"2": 0}
        assert gauges(target)["kvpoll_bootstrap_dp_entries"] == 1


def test_an_entry_filed_again_lives_anew() -> None:
    clock = Clock()
    with server(clock=clock) as target:
        enter(target, 1, 0)
        enter(target, 2, 0)
        clock.now_s += 200
        enter(target, 1, 0)
        clock.now_s += 200
        assert query(target, 1, 2) == {"1": 0}
        assert gauges(target)["kvpoll_bootstrap_dp_entries"] == 1


def test_a_full_table_refuses_the_newcomer_and_keeps_what_it_has() -> None:
    clock = Clock()
    with server(clock=clock, limits=Limits(dp_entries=2)) as target:
        assert [enter(target, room, 0) for room in (1, 2, 3)] == [200, 200, 503]
        assert enter(target, 2, 1) == 200, "what is on file may change"
        assert query(target, 1, 2, 3) == {"1": 0, "2": 1}
        assert gauges(target)['kvpoll_bootstrap_refused_total{reason="entries_full"}'] == 1
        clock.now_s += REFERENCE.number("dp_entry_timeout_s")
        assert enter(target, 3, 0) == 200
        assert query(target, 1, 2, 3) == {"3": 0}


def test_the_machine_forgets_its_steps_and_the_table_does_not() -> None:
    with server() as target:
        put(target, rank(0))
        put(target, rank(1))
        for number in range(300):  # each is a step that the machine has not taken before
            with pytest.raises(Refused, match="Bootstrap info not found"):
                target.table.endpoint(Coordinate(0, 0, 2 + number, 0))
        assert len(target.table._machine._taken) < 256
        assert route(target).status_code == 200


# -- tokens, epochs, metrics


def test_writes_need_the_token_and_reads_do_not() -> None:
    bearer = {"Authorization": "Bearer secret-1"}
    with server(token="secret-1") as target:
        wrong: list[dict[str, str]] = [
            {}, {"Authorization": "Bearer secret-2"}, {"Authorization": "Bearer secret-1x"},
            {"Authorization": "Basic secret-1"}, {"Authorization": "secret-1"},
        ]  # fmt: skip
        for headers in wrong:
            answer = ask(target, "PUT", "/route", json=rank(0, 1).as_json(), headers=headers)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert leave(target, 0).status_code == enter(target, 1, 0) == 401
        assert route(target).status_code == 503 and query(target, 1) == {}
        assert ask(target, "PUT", "/route", json=rank(0, 1).as_json(), headers=bearer).status_code == 200
        assert route(target).status_code == 200
        assert gauges(target)['kvpoll_bootstrap_refused_total{reason="unauthorized"}'] == 7


def test_every_answer_carries_the_servers_epoch_and_a_restart_has_a_larger_one() -> None:
    """C5: a rank that sees another epoch knows that the server has forgotten it."""
    epochs = []
    for _ in range(2):
        with server() as target:
            put(target, rank(0, 1))
            answers = [ask(target, "GET", path) for path in ("/health", "/ready", "/metrics", "/route", "/nowhere")]
            assert {answer.headers["X-Kvpoll-Epoch"] for answer in answers} == {str(target.epoch)}
            assert ask(target, "GET", "/ready").json()["server_epoch"] == target.epoch
            assert route(target, server_epoch=1).json()["server_epoch"] == target.epoch
            epochs.append(target.epoch)
    assert epochs[0] < epochs[1] < 2**53


def test_metrics_count_by_route_and_code_and_not_by_what_a_stranger_wrote() -> None:
    with server() as target:
        put(target, rank(0, 1))
        route(target)
        for path in ("/nowhere", "/wp-admin"):
            ask(target, "GET", path)
        seen = gauges(target)
    assert seen['kvpoll_bootstrap_requests_total{code="200",route="/route"}'] == 2
    assert seen['kvpoll_bootstrap_requests_total{code="404",route="other"}'] == 2
    assert not any("nowhere" in name for name in seen)
    names = ("ranks_registered", "ranks_expected", "ready", "dp_entries")
    assert [seen[f"kvpoll_bootstrap_{name}"] for name in names] == [1, 1, 1, 0]


def test_the_trace_hears_of_its_life_and_of_its_readiness() -> None:
    events: list[Any] = []
    with server(SGLANG, epoch=3, emit=events.append, now=lambda: 1.5, node="B0") as target:
        put(target, rank(0))
        put(target, rank(0))
    ready = HealthReported(1.5, "B0", True, False)
    assert events == [NodeStarted(1.5, "B0", 3), ready, NodeStopped(1.5, "B0", 3)]


# -- life


def test_a_taken_port_and_a_foreign_address_are_one_line_and_leave_nothing() -> None:
    threads = threading.active_count()
    with server() as target:
        taken = BootstrapServer(PROTOCOL, REFERENCE, port=target.port)
        with pytest.raises(
            BadInput, match=rf"^127.0.0.1:{target.port}: cannot be listened on: .*; choose another port"
        ):
            taken.start()
    for host in ("192.0.2.1", "no such host", "", "a" * 300):
        with pytest.raises(BadInput, match=r"cannot be listened on|is not an address or name of this machine"):
            BootstrapServer(PROTOCOL, REFERENCE, host, 0).start()
    with pytest.raises(BadInput, match="is not from 0 to 65535"):
        BootstrapServer(PROTOCOL, REFERENCE, port=65536)
    for token in ("", "two words", "schlüssel"):
        with pytest.raises(BadInput, match="the token must be"):
            BootstrapServer(PROTOCOL, REFERENCE, token=token)
    assert threading.active_count() == threads


def test_it_is_closed_once_and_for_all() -> None:
    target = server()
    target.start()
    port = target.port
    with pytest.raises(RuntimeError, match="has been started before"):
        target.start()
    target.close()
    target.close()
    with BootstrapServer(PROTOCOL, REFERENCE, port=port) as successor:
        assert route(successor).status_code == 503


def test_a_server_that_cannot_start_says_so_and_lets_go_of_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(runner: Any) -> None:
        raise OSError("no more threads")

    target = server()
    with monkeypatch.context() as broken:
        broken.setattr("aiohttp.web.AppRunner.setup", fail)
        with pytest.raises(RuntimeError, match="did not start"):
            target.start()
    with BootstrapServer(PROTOCOL, REFERENCE, port=target.port) as successor:
        assert route(successor).status_code == 503


def test_a_defect_is_one_500_and_neither_it_nor_a_listener_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("a defect")

    with server(emit=fail) as target:
        assert put(target, rank(0, 1)).status_code == 200
        with monkeypatch.context() as broken:
            broken.setattr(target.table, "endpoint", fail)
            answer = route(target, 0)
        assert (answer.status_code, answer.json()) == (500, {"error": "a defect of the bootstrap server; see its log"})
        assert route(target, 0).status_code == 200


def test_entries_that_nobody_asks_for_are_dropped_too() -> None:
    """The server looks every second at most; the clock of the entries is the test's."""
    clock = Clock()
    with server(REFERENCE.with_rules({"dp_entry_timeout_s": 8}), clock=clock) as target:
        enter(target, 1, 0)
        clock.now_s += 8
        until(lambda: not target.entries._filed, "the expiry of an entry")
        assert query(target, 1) == {}


def test_a_name_for_several_addresses_means_that_of_ipv4() -> None:
    with BootstrapServer(PROTOCOL, REFERENCE, "localhost", 0) as target:
        assert ask(target, "GET", "/health").text == "OK"
        target.host = "127.0.0.1"
        assert ask(target, "GET", "/health").text == "OK"


def test_it_runs_in_a_loop_of_the_embedding_program() -> None:
    async def embed() -> tuple[int, str]:
        target, stop, listening = server(), asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(target.run(stop, listening.set))
        await asyncio.wait_for(listening.wait(), 20)
        answer = await asyncio.to_thread(ask, target, "GET", "/health")
        stop.set()
        await asyncio.wait_for(task, 20)
        return answer.status_code, answer.text

    assert asyncio.run(embed()) == (200, "OK")
