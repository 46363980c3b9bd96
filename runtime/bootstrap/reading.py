"""Reads what a stranger sent. Whatever is wrong with it becomes one ``Refused`` that names the field and the cause.

SGLang's server indexes the parsed body, so that any mistake is a 500 with half of it stored (PROTOCOL 6). Here a body
is read completely before anything is changed: an object of known forms within known bounds, or a 4xx.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

from kvpoll.runtime.bootstrap.rows import Coordinate, RankInfo

ROOM_LIMIT: Final = 2**63
"""Room numbers, attempts and epochs are non-negative and below this."""
TEXT_LENGTH_MAX: Final = 128
LAYOUT_DEPTH_MAX: Final = 8
PAGE_SIZE_MAX: Final = 2**31 - 1
_REQUIRED: Final = object()
_HOST: Final = re.compile(r"[A-Za-z0-9._:%\[\]-]{1,255}")
_WHOLE: Final = re.compile(r"-?[0-9]{1,19}")
_PRINTABLE: Final = re.compile(r"[\x20-\x7e]*")


class Refused(Exception):
    """A request that is answered with an error and changes nothing.

    status: HTTP status. reason: one word for the metrics. The message is one line for the client.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


def malformed(message: str) -> Refused:
    """400: the request cannot be understood, or says something impossible."""
    return Refused(400, "malformed", message)


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused; NaN, infinities and a key given twice are not JSON here."""
    try:
        data = json.loads(body, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise malformed(f"the body is not valid JSON: {cause[:200]}") from None
    if not isinstance(data, dict):
        raise malformed(f"the body must be a JSON object, got {_shown(data)}")
    return data


def whole(data: dict[str, Any], name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
    """A whole number from ``low`` up to and including ``high``; true and 1.0 are none. ``default`` stands for null."""
    value = _given(data, name, default)
    if value is not default and (type(value) is not int or not low <= value <= high):
        raise malformed(f"{name} must be a whole number from {low} to {high}, got {_shown(value)}")
    return value


def read_rank(data: dict[str, Any], ranks_max: int) -> RankInfo:
    """The body of ``PUT /route``. Raises Refused; fields that nobody knows are passed over, as by SGLang."""
    numbers: dict[str, int] = {}
    for kind in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp"):
        size = numbers[f"{kind}_size"] = whole(data, f"{kind}_size", 1, ranks_max)
        numbers[f"{kind}_rank"] = whole(data, f"{kind}_rank", 0, size - 1)
    info = RankInfo(
        **numbers,
        rank_ip=_host(data),
        rank_port=whole(data, "rank_port", 1, 65535),
        page_size=whole(data, "page_size", 1, PAGE_SIZE_MAX),
        kv_cache_dtype=_nullable_text(data, "kv_cache_dtype"),
        kv_layout=_text(data, "kv_layout", None),
        dsv41_spec_layout=_layout(data),
        load_balance_method=_text(data, "load_balance_method", None)
        if "load_balance_method" in data
        else "follow_bootstrap_room",
        enable_dsa_cache_layer_split=_flag(data, "enable_dsa_cache_layer_split"),
        enable_kv_cache_sharding=_flag(data, "enable_kv_cache_sharding"),
        prefill_http_port=whole(data, "prefill_http_port", 1, 65535, None),
        decode_allocation_policy=_text(data, "decode_allocation_policy", "early"),
        process_epoch=whole(data, "process_epoch", 0, ROOM_LIMIT - 1, None),
        rank_name=_text(data, "rank_name", None),
        node=_text(data, "node", None),
    )
    count = info.topology.rank_count
    if count > ranks_max:
        raise malformed(f"an engine of {count} ranks is more than the {ranks_max} that this server takes")
    return info


def read_dp_rank(data: dict[str, Any], ranks_max: int) -> tuple[int, int | None, int]:
    """The body of ``POST /register_dp_rank``: room, attempt or None, DP rank. Raises Refused."""
    room = whole(data, "bootstrap_room", 0, ROOM_LIMIT - 1)
    attempt = whole(data, "attempt", 0, ROOM_LIMIT - 1, None)
    return room, attempt, whole(data, "dp_rank", 0, ranks_max - 1)


def read_query(data: dict[str, Any], rooms_max: int) -> list[tuple[int, int | None]]:
    """The body of ``POST /query_dp_ranks``: (room, attempt or None) in the order given. Raises Refused."""
    rooms = _numbers(data, "bootstrap_rooms", rooms_max)
    if data.get("attempts") is None:
        return [(room, None) for room in rooms]
    attempts = _numbers(data, "attempts", rooms_max)
    if len(attempts) != len(rooms):
        raise malformed(f"attempts has {len(attempts)} numbers for {len(rooms)} bootstrap_rooms; it needs one for each")
    return list(zip(rooms, attempts, strict=True))


def read_coordinate(query: Any) -> Coordinate:
    """The rank that a query string asks for, or TOPOLOGY when all four are -1. Raises Refused."""
    names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    if not all(query.get(name) for name in names):
        raise malformed(f"Missing inputs for bootstrap server: {', '.join(names)} are needed")
    return Coordinate(*(read_number(query[name], name, -1) for name in names))


def read_number(text: str, name: str, low: int) -> int:
    """A whole number in a query string. Raises Refused."""
    if not _WHOLE.fullmatch(text) or not low <= int(text) < ROOM_LIMIT:
        raise malformed(f"{name} must be a whole number of at least {low}, got {_shown(text)}")
    return int(text)


def _given(data: dict[str, Any], name: str, default: Any) -> Any:
    if default is _REQUIRED and name not in data:
        raise Refused(400, "missing_field", f"{name} is missing")
    return default if default is not _REQUIRED and data.get(name) is None else data[name]


def _text(data: dict[str, Any], name: str, default: Any) -> Any:
    value = _given(data, name, default)
    if value is not default and not _is_plain(value):
        raise malformed(f"{name} must be text of 1 to {TEXT_LENGTH_MAX} printable characters, got {_shown(value)}")
    return value


def _nullable_text(data: dict[str, Any], name: str) -> Any:
    """A field that must be there and may be null."""
    _given(data, name, _REQUIRED)
    return _text(data, name, None)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= TEXT_LENGTH_MAX and bool(_PRINTABLE.fullmatch(value))


def _host(data: dict[str, Any]) -> str:
    value = _given(data, "rank_ip", _REQUIRED)
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise malformed(f"rank_ip must be an address or a host name, got {_shown(value)}")
    return value


def _flag(data: dict[str, Any], name: str) -> bool:
    value = _given(data, name, False)
    if type(value) is not bool:
        raise malformed(f"{name} must be true or false, got {_shown(value)}")
    return value


def _layout(data: dict[str, Any]) -> dict[str, Any] | None:
    value = _given(data, "dsv41_spec_layout", None)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise malformed(f"dsv41_spec_layout must be an object or null, got {_shown(value)}")
    level: list[Any] = [value]
    for _ in range(LAYOUT_DEPTH_MAX):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inside(each)]
        if not level:
            return value
    raise malformed(f"dsv41_spec_layout is nested more than {LAYOUT_DEPTH_MAX} deep")


def _inside(each: dict[str, Any] | list[Any]) -> list[Any]:
    return list(each.values()) if isinstance(each, dict) else each


def _numbers(data: dict[str, Any], name: str, length_max: int) -> list[int]:
    values = _given(data, name, _REQUIRED)
    if not isinstance(values, list):
        raise malformed(f"{name} must be a list, got {_shown(values)}")
    if len(values) > length_max:
        raise Refused(413, "too_large", f"{name} has {len(values)} numbers, more than the {length_max} of one request")
    for value in values:
        if type(value) is not int or not 0 <= value < ROOM_LIMIT:
            raise malformed(f"{name} must hold whole numbers from 0 to {ROOM_LIMIT - 1}, got {_shown(value)}")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key is given twice")
    return data


def _shown(value: Any) -> str:
    """What was given, short enough for a line."""
    text = f"a {type(value).__name__}" if isinstance(value, dict | list) else ascii(_cut(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cut(value: Any) -> Any:
    """Python refuses to write out integers of thousands of digits."""
    if type(value) is int and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    return value[:60] if isinstance(value, str) else value
