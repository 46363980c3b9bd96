"""What strangers send to the bootstrap server: every mistake is a 4xx with its reason, and changes nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from bootstrap_stage import HURRIED, WAIT_S, ask, gauges, put, rank, route, server
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpoll.runtime.bootstrap import BootstrapServer, Limits
from kvpoll.runtime.bootstrap.reading import Refused, read_object, read_rank

LIMITS = Limits(ranks=64, dp_entries=100, body_bytes=4096, query_rooms=10)
JSON = {"Content-Type": "application/json"}
GOOD = rank(0).as_json()
ROOM = {"bootstrap_room": 1, "dp_rank": 0}


@pytest.fixture(scope="module")
def target() -> Iterator[BootstrapServer]:
    """A server with one rank of two and one room on file."""
    with server(limits=LIMITS) as made:
        put(made, rank(0))
        ask(made, "POST", "/register_dp_rank", json=ROOM)
        yield made


def state(target: BootstrapServer) -> Any:
    """Everything that the server shows, but for the counters of what it was asked."""
    counters = ("requests", "refused")
    shown = {name: value for name, value in gauges(target).items() if not any(each in name for each in counters)}
    rooms = ask(target, "POST", "/query_dp_ranks", json={"bootstrap_rooms": [0, 1, 2]}).json()
    answers = [route(target), route(target, 0), route(target, 1), ask(target, "GET", "/ready")]
    return shown, rooms, [(answer.status_code, answer.json()) for answer in answers]


def refused(target: BootstrapServer, method: str, path: str, **options: Any) -> requests.Response:
    """Send something bad: one line of JSON, and nothing has changed."""
    before = state(target)
    answer = ask(target, method, path, **options)
    assert 400 <= answer.status_code < 500, answer.text
    reason = answer.json()["error"]
    assert list(answer.json()) == ["error"] and reason and "\n" not in reason and len(reason) < 400
    assert state(target) == before
    return answer


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


REQUIRED = [
    "attn_tp_size", "attn_tp_rank", "attn_cp_size", "attn_cp_rank", "attn_dp_size", "attn_dp_rank", "pp_size",
    "pp_rank", "system_dp_size", "system_dp_rank", "rank_ip", "rank_port", "page_size", "kv_cache_dtype",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(target: BootstrapServer, name: str) -> None:
    answer = refused(target, "PUT", "/route", json=without(name))
    assert (answer.status_code, answer.json()["error"]) == (400, f"{name} is missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_tp_size", True), ("attn_tp_size", 2.0), ("attn_tp_size", "2"), ("attn_tp_size", None),
        ("attn_tp_size", 0), ("attn_tp_size", 65), ("attn_tp_size", 10**300), ("attn_tp_size", [2]),
        ("attn_tp_rank", 2), ("attn_tp_rank", -1), ("attn_tp_rank", True), ("pp_rank", 1), ("attn_dp_rank", 1),
        ("rank_ip", ""), ("rank_ip", 7), ("rank_ip", None), ("rank_ip", "a b"), ("rank_ip", "h\r\nX: y"),
        ("rank_ip", "x" * 256), ("rank_ip", "\u00fc"), ("rank_port", 0), ("rank_port", 65536), ("rank_port", "30000"),
        ("page_size", 0), ("page_size", None), ("page_size", 2**31), ("kv_cache_dtype", 16), ("kv_cache_dtype", ""),
        ("kv_cache_dtype", "x" * 129), ("kv_layout", {}), ("kv_layout", "\x00"), ("dsv41_spec_layout", []),
        ("dsv41_spec_layout", "x"), ("load_balance_method", 1), ("enable_kv_cache_sharding", 1),
        ("enable_dsa_cache_layer_split", "true"), ("prefill_http_port", -1), ("decode_allocation_policy", False),
        ("process_epoch", -1), ("process_epoch", 2**63), ("process_epoch", 1.5), ("process_epoch", False),
        ("rank_name", "a\nb"), ("node", ["a"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(target: BootstrapServer, name: str, value: Any) -> None:
    answer = refused(target, "PUT", "/route", json={**GOOD, name: value})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(name)


def test_sizes_that_multiply_to_too_much_are_refused(target: BootstrapServer) -> None:
    answer = refused(target, "PUT", "/route", json={**GOOD, "attn_tp_size": 64, "pp_size": 64})
    assert answer.json()["error"] == "an engine of 4096 ranks is more than the 64 that this server takes"


@pytest.mark.parametrize("path", ["/route", "/register_dp_rank", "/query_dp_ranks"])
@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON"),
        (b"\xff\xfe{", "the body is not valid JSON"),
        (b'{"a": "\xff"}', "the body is not valid JSON"),
        (b"[]", "the body must be a JSON object, got a list"),
        (b"3", "the body must be a JSON object, got 3"),
        (b'{"page_size": NaN}', "NaN is not a number"),
        (b'{"page_size": -Infinity}', "-Infinity is not a number"),
        (b'{"page_size": 1e999}', "1e999 is too large"),
        (b'{"page_size": 1, "page_size": 2}', "a key is given twice"),
        (b'{"a": ' + b"[" * 2000, "the body is not valid JSON"),
        (b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}", "the body is not valid JSON: nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused(target: BootstrapServer, path: str, body: bytes, told: str) -> None:
    answer = refused(target, "PUT" if path == "/route" else "POST", path, data=body, headers=JSON)
    assert answer.status_code == 400
    assert told in answer.json()["error"]


def test_a_number_of_thousands_of_digits_is_refused(target: BootstrapServer) -> None:
    """Python itself reads no more than 4300 digits; below that the bounds refuse."""
    for digits, told in ((3000, "process_epoch must be a whole number"), (4500, "the body is not valid JSON")):
        body = f'{json.dumps(GOOD)[:-1]}, "process_epoch": {"9" * digits}}}'
        with pytest.raises(Refused, match=told):
            read_rank(read_object(body.encode()), 64)
    body = f'{json.dumps(GOOD)[:-1]}, "process_epoch": {"9" * 3000}}}'
    assert (
        "a number of more than 40 digits" in refused(target, "PUT", "/route", data=body, headers=JSON).json()["error"]
    )


def test_a_deep_layout_is_refused(target: BootstrapServer) -> None:
    deep: Any = 1
    for _ in range(20):
        deep = {"a": deep}
    answer = refused(target, "PUT", "/route", json={**GOOD, "dsv41_spec_layout": deep})
    assert answer.json()["error"] == "dsv41_spec_layout is nested more than 8 deep"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_another_content_type_is_refused(target: BootstrapServer, kind: str) -> None:
    answer = refused(target, "PUT", "/route", data=json.dumps(GOOD), headers={"Content-Type": kind})
    assert answer.status_code == 415


def test_a_large_body_is_refused_however_it_is_announced(target: BootstrapServer) -> None:
    body = json.dumps({**GOOD, "padding": "x" * 5000}).encode()
    pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    for data in (body, iter(pieces)):
        answer = refused(target, "PUT", "/route", data=data, headers=JSON)
        assert answer.status_code == 413


def test_a_compressed_body_is_not_unpacked(target: BootstrapServer) -> None:
    answer = refused(
        target, "PUT", "/route", data=b"\x1f\x8b" + b"\x00" * 50, headers={**JSON, "Content-Encoding": "gzip"}
    )
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"dp_rank": 0}, "bootstrap_room is missing"),
        ({"bootstrap_room": 1}, "dp_rank is missing"),
        ({**ROOM, "bootstrap_room": -1}, "bootstrap_room must be"),
        ({**ROOM, "bootstrap_room": 2**63}, "bootstrap_room must be"),
        ({**ROOM, "bootstrap_room": "1"}, "bootstrap_room must be"),
        ({**ROOM, "bootstrap_room": True}, "bootstrap_room must be"),
        ({**ROOM, "dp_rank": 64}, "dp_rank must be"),
        ({**ROOM, "dp_rank": None}, "dp_rank must be"),
        ({**ROOM, "attempt": -1}, "attempt must be"),
    ],
)
def test_a_wrong_room_is_named(target: BootstrapServer, body: Any, told: str) -> None:
    assert refused(target, "POST", "/register_dp_rank", json=body).json()["error"].startswith(told)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({}, 400, "bootstrap_rooms is missing"),
        ({"bootstrap_rooms": 1}, 400, "bootstrap_rooms must be a list"),
        ({"bootstrap_rooms": {"1": 1}}, 400, "bootstrap_rooms must be a list"),
        ({"bootstrap_rooms": [1, "2"]}, 400, "bootstrap_rooms must hold"),
        ({"bootstrap_rooms": [True]}, 400, "bootstrap_rooms must hold"),
        ({"bootstrap_rooms": [2**63]}, 400, "bootstrap_rooms must hold"),
        ({"bootstrap_rooms": list(range(11))}, 413, "bootstrap_rooms has 11 numbers"),
        ({"bootstrap_rooms": [1], "attempts": []}, 400, "attempts has 0 numbers for 1"),
        ({"bootstrap_rooms": [1], "attempts": [None]}, 400, "attempts must hold"),
    ],
)
def test_a_wrong_query_is_named(target: BootstrapServer, body: Any, status: int, told: str) -> None:
    answer = refused(target, "POST", "/query_dp_ranks", json=body)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(told)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("text", ["", "x", "1.0", "0x1", "1_0", " 1", "-2", "9" * 30, "\u0663"])
def test_a_wrong_place_is_named(target: BootstrapServer, method: str, text: str) -> None:
    names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    answer = refused(target, method, "/route", params={**dict.fromkeys(names, "0"), "target_tp_rank": text})
    assert answer.status_code == 400
    assert "target_tp_rank" in answer.json()["error"]


def test_other_methods_and_paths_are_refused(target: BootstrapServer) -> None:
    pairs = [("POST", "/route"), ("PATCH", "/route"), ("GET", "/register_dp_rank"), ("PUT", "/health"), ("GET", "/x")]
    found = [refused(target, method, path).status_code for method, path in pairs]
    assert found == [405, 405, 405, 405, 404]


def test_a_body_that_does_not_come_is_not_awaited() -> None:
    """A client that announces more than it sends keeps one connection, for as long as it would itself have waited."""
    with server(HURRIED) as target, socket.create_connection((target.host, target.port), WAIT_S) as slow:
        lines = ["PUT /route HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 100", "", "{"]
        slow.sendall("\r\n".join(lines).encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        assert put(target, rank(0, 1)).status_code == 200


def test_what_is_no_http_does_no_harm(target: BootstrapServer) -> None:
    before = state(target)
    for sent in (
        b"\x00" * 100,
        b"GET",
        b"\x16\x03\x01\x02\x00",
        b"PUT /route HTTP/9.9\r\n\r\n",
        b"A" * 20000 + b"\r\n\r\n",
    ):
        with socket.create_connection((target.host, target.port), WAIT_S) as peer:
            peer.sendall(sent)
    time.sleep(0.05)
    assert state(target) == before


# -- garbage, drawn

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [*GOOD, "process_epoch", "rank_name", "node", "bootstrap_room", "dp_rank", "attempt", "bootstrap_rooms", "attempts"]
)
CHANGES = st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3)
BODIES = (
    st.binary(max_size=200)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | CHANGES.map(lambda changes: json.dumps({**GOOD, **changes}).encode())
    | CHANGES.map(lambda changes: json.dumps({**ROOM, "bootstrap_rooms": [1], **changes}).encode())
)
ROUTES = st.sampled_from(
    [
        ("PUT", "/route"),
        ("POST", "/register_dp_rank"),
        ("POST", "/query_dp_ranks"),
        ("DELETE", "/route"),
        ("GET", "/route"),
    ]
)
QUERIES = st.dictionaries(
    st.sampled_from(["prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank", "process_epoch"]),
    st.text(st.characters(codec="utf-8"), max_size=6) | st.integers(-3, 3).map(str),
)


@settings(max_examples=150)
@given(asked=ROUTES, body=BODIES, query=QUERIES)
def test_garbage_is_refused_and_changes_nothing(
    target: BootstrapServer, asked: tuple[str, str], body: bytes, query: dict[str, str]
) -> None:
    """Drawn bodies may happen to be valid; what is not accepted leaves the server as it was, and never a 5xx."""
    before = state(target)
    answer = ask(target, *asked, data=body, params=query, headers=JSON)
    assert (
        answer.status_code == 200
        or 400 <= answer.status_code < 500
        or (asked, answer.status_code) == (("GET", "/route"), 503)
    )
    if answer.status_code != 200:
        assert answer.json()["error"]
        assert state(target) == before
    assert ask(target, "GET", "/health").text == "OK"
