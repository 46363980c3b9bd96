"""SGLang 0.5.23's real clients against our bootstrap server, and our client against SGLang's real server.

Set ``KVPOLL_SGLANG_PYTHON`` to the interpreter of an environment in which sglang 0.5.23 is installed; a CPU build of
torch will do. Without it, or where the classes cannot be imported, everything here skips.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from kvpoll.runtime.bootstrap import BootstrapClient, BootstrapServer, Coordinate, Endpoint, RankInfo, Reply, Topology
from kvpoll.spec.protocol import load

HERE = Path(__file__).parent
SCRIPTS = HERE / "sglang_bootstrap"
LIMIT_S = 120.0
PROTOCOL = load()

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """The scripts find the classes on a CPU as the witnesses beside them do; nothing else of ours is in reach."""
    path = os.pathsep.join((str(SCRIPTS), str(HERE / "sglang_witness")))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def real_servers(sglang_python: str) -> Iterator[dict[str, int]]:
    """Ports of SGLang's own servers, one for each test below, in a process of their own."""
    names = ("client", "reference", "sglang-0.5.23")
    process = subprocess.Popen(
        [sglang_python, str(SCRIPTS / "real_server.py"), str(len(names))], env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("[")), "")
        assert line, "SGLang's servers did not come up"
        yield dict(zip(names, json.loads(line), strict=True))
    finally:
        process.kill()
        process.communicate()


def ours(profile: str = "reference") -> BootstrapServer:
    return BootstrapServer(PROTOCOL, PROTOCOL.profile(profile), port=0)


def rank(tp: int, **fields: Any) -> RankInfo:
    given: dict[str, Any] = {"attn_tp_size": 2, "attn_tp_rank": tp, "page_size": 16, "kv_cache_dtype": "bfloat16"}
    return RankInfo(**{"rank_ip": "127.0.0.1", "rank_port": 30000 + tp, **given, **fields})


@pytest.fixture(scope="module")
def seen(sglang_python: str) -> Any:
    """What SGLang's classes saw of our servers."""
    with ours() as first, ours() as second:
        told = subprocess.run(
            [sglang_python, str(SCRIPTS / "real_clients.py"), str(first.port), str(second.port)],
            env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    assert told.returncode == 0, told.stderr[-4000:]
    return json.loads(told.stdout.splitlines()[-1])


def test_sglangs_decode_learns_the_topology_from_our_server(seen: Any) -> None:
    """All that it was told, and the mapping that it computed from it (PROTOCOL 7.4)."""
    info = seen["info"]
    assert info.pop("prefill_http_port") > 0
    assert info == {
        "attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 1, "kv_cache_dtype": "uint8",
        "follow_bootstrap_room": info["follow_bootstrap_room"], "enable_dsa_cache_layer_split": False,
        "dsv41_spec_layout": None, "kv_layout": None, "decode_allocation_policy": "early",
        "enable_kv_cache_sharding": False, "target_tp_rank": 0, "target_tp_ranks": [0], "target_cp_ranks": [0],
        "target_pp_ranks": [0], "required_dst_info_num": 1, "required_prefill_response_num": 1,
    }  # fmt: skip


def test_a_request_of_sglang_succeeds_through_our_server(seen: Any) -> None:
    endpoint = {"rank_ip": "127.0.0.1", "rank_port": True, "pp_rank": 0, "is_dummy": False}
    assert seen["request"] == {"prefill": "Success", "decode": "Success", "moved": True, "endpoints": [endpoint]}


def test_sglangs_dp_ranks_go_through_our_server(seen: Any) -> None:
    assert seen["dp_ranks"] == {"41": 5}


def test_sglangs_retry_does_not_make_our_server_ready(seen: Any) -> None:
    """The same ranks make SGLang's own server ready one registration too early (candidate C1)."""
    assert seen["two"] == {"ready": [False, False, False, True], "poll": "WaitingForInput", "contacted": 2}


def test_our_client_works_against_sglangs_server(real_servers: dict[str, int]) -> None:
    """And its server shows what ours is for: no life of a rank, no goodbye, no epoch, and a count of PUTs."""
    client = BootstrapClient(f"127.0.0.1:{real_servers['client']}", PROTOCOL.profile("reference"))
    assert client.health() == Reply(200, None)
    assert client.topology() == Reply(503, "Prefill server not fully registered yet (0 workers registered).")
    assert client.register(rank(0, process_epoch=3, rank_name="P0/tp0", prefill_http_port=30080)) == Reply(200, None)
    assert client.register(rank(1, process_epoch=3)) == Reply(200, None)
    assert client.topology() == Reply(200, Topology(2, 1, 1, 1, 16, "bfloat16", True, prefill_http_port=30080))
    assert client.endpoint(0, 0, 1, 0) == Reply(200, Endpoint("127.0.0.1", 30001))
    missing = "Bootstrap info not found for dp_rank=0 cp_rank=0 tp_rank=2 pp_rank=0"
    assert client.endpoint(0, 0, 2, 0) == Reply(404, missing)
    assert client.register_dp_rank(7, 1, attempt=0) == Reply(200, None)
    assert client.query_dp_ranks([7, 8], [0, 0]) == Reply(200, {7: 1}), "it files by room"
    assert client.unregister(Coordinate(0, 0, 1, 0), 3) == Reply(405, "Method not allowed")
    assert client.register(rank(1, process_epoch=2, rank_port=31001)).status == 200, "an older life replaces"
    assert client.endpoint(0, 0, 1, 0) == Reply(200, Endpoint("127.0.0.1", 31001))
    client.close()


PLACE = {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": 0, "target_pp_rank": 0}
ENGINE = dict.fromkeys(PLACE, -1)
CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/health", {}),
    ("PUT", "/route", {"json": rank(0).as_json()}),
    ("PUT", "/route", {"json": rank(1).as_json()}),
    ("GET", "/route", {"params": ENGINE}),
    ("GET", "/route", {"params": PLACE}),
    ("GET", "/route", {"params": {**PLACE, "target_tp_rank": 1}}),
    ("GET", "/route", {"params": {**PLACE, "target_tp_rank": 2}}),
    ("GET", "/route", {"params": {**PLACE, "target_pp_rank": -1}}),
    ("GET", "/route", {"params": {"target_tp_rank": 0}}),
    ("POST", "/route", {}),
    ("HEAD", "/route", {}),
    ("PUT", "/route", {"json": rank(1, decode_allocation_policy="prefill_complete").as_json()}),
    ("PUT", "/route", {"json": rank(1, dsv41_spec_layout={"a": 1}).as_json()}),
    ("POST", "/register_dp_rank", {"json": {"bootstrap_room": 11, "dp_rank": 1}}),
    ("POST", "/register_dp_rank", {"json": {"bootstrap_room": 2**63 - 1, "dp_rank": 0}}),
    ("POST", "/query_dp_ranks", {"json": {"bootstrap_rooms": [11, 12, 2**63 - 1, 11]}}),
    ("POST", "/query_dp_ranks", {"json": {"bootstrap_rooms": []}}),
    ("GET", "/nowhere", {}),
]


def said(port: int) -> list[tuple[int, Any]]:
    """Statuses, with the bodies of those that succeeded."""
    answers = [
        requests.request(method, f"http://127.0.0.1:{port}{path}", timeout=30, **options)
        for method, path, options in CALLS
    ]
    return [(each.status_code, _body(each) if each.ok else None) for each in answers]


def _body(answer: requests.Response) -> Any:
    return answer.json() if answer.headers["Content-Type"].startswith("application/json") else answer.text


@pytest.mark.parametrize("profile", ["reference", "sglang-0.5.23"])
def test_both_servers_answer_the_same_calls_with_the_same_bodies(real_servers: dict[str, int], profile: str) -> None:
    theirs = said(real_servers[profile])
    with ours(profile) as target:
        assert said(target.port) == theirs
    assert [status for status, _ in theirs].count(200) == 10
