"""The trace of an instrumented SGLang: one JSON object a line, as its recorder writes them.

A recorder swaps the manager's status table for one that tells, wraps a few methods and the control socket's receive
call, and so sees a real SGLang 0.5.23 work without a change to it (PROTOCOL 16). Every line has ``seq`` (total
order over all threads), ``t`` (seconds of the machine's monotonic clock), ``thr`` (thread name), ``node`` (``P...``
a prefill rank, ``D...`` a decode rank) and ``ev``:

* ``status``: the table's entry of ``room`` went from ``frm`` to ``to``; null where there is none. These are the
  polls by name.
* ``recv``: a control message came in. ``frames`` are its first nine frames as text; one that is longer than 24
  bytes is only measured (``<80B>``).
* any other: a method of the manager was called, with some of its arguments.

``read_line`` turns a line into `Put`, `Heard` or `Called`. What the frames of the three backends mean is decided
here and nowhere else (PROTOCOL 7.1, 7.2). Frames that mean nothing to the protocol of a room come as ``other``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from kvpoll.spec.trace import TraceError
from kvpoll.spec.vocabulary import POLL_NUMBERS

POLLS: Final[dict[int, str]] = {number: name for name, number in POLL_NUMBERS.items()}
GUARDS: Final = ("NixlMsgGuard", "MoriMsgGuard")
"""First frame of every message to a prefill rank, under nixl and mori; it says nothing."""

REQUIRED_FRAME: Final = {"NixlMsgGuard": 6, "MoriMsgGuard": 7, "": 7}
"""Guard -> frame (the guard not counted) of required_dst_info_num in a metadata message."""

ROOM_OF: Final = ("room", "bootstrap_room")
DIGITS_MAX: Final = 24
RANK_MAX: Final = 4096


class Message(NamedTuple):
    """What the frames of a control message say.

    kind: "metadata" (decode publishes its pages), "abort", "status" (prefill reports an outcome), "abort_ack",
    "other". room: None for other. sender: "ip:port session" of who sent it, where the frames say so. number:
    destinations required (metadata), prefill rank (status, abort_ack). outcome: poll by name (status).
    """

    kind: str
    room: int | None = None
    sender: str = ""
    number: int | None = None
    outcome: str | None = None


OTHER: Final = Message("other")


class Put(NamedTuple):
    """The status table's entry of a room changed, or was stored again. before/after: poll, or None for no entry."""

    seq: int
    t: float
    thread: str
    node: str
    room: int
    before: str | None
    after: str | None


class Heard(NamedTuple):
    """A control message was received."""

    seq: int
    t: float
    thread: str
    node: str
    message: Message


class Called(NamedTuple):
    """A method of the manager was called. room: None where the method concerns none."""

    seq: int
    t: float
    thread: str
    node: str
    method: str
    room: int | None
    arguments: Mapping[str, Any]


SglangEvent = Put | Heard | Called


def read_line(line: str | bytes, where: str = "trace") -> SglangEvent:
    """The event of one line. Raises TraceError naming ``where`` when it is not one."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not a JSON object ({error}); the line may be cut off") from None
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: a JSON object was expected")
    return from_fields(fields, where)


def from_fields(fields: dict[str, Any], where: str) -> SglangEvent:
    """The event that a decoded line holds. Raises TraceError."""
    for name, form in (("seq", int), ("t", (int, float)), ("thr", str), ("node", str), ("ev", str)):
        if not isinstance(fields.get(name), form) or isinstance(fields[name], bool):
            raise TraceError(f"{where}: an event of an SGLang trace needs {name!r}, got {fields.get(name)!r}")
    node, kind = fields["node"], fields["ev"]
    if node[:1] not in ("P", "D"):
        raise TraceError(f"{where}: node {node!r} is neither prefill (P...) nor decode (D...)")
    head = (fields["seq"], fields["t"], fields["thr"], node)
    if kind == "status":
        return Put(*head, _room(fields, where), _poll(fields, "frm", where), _poll(fields, "to", where))
    if kind == "recv":
        frames = fields.get("frames")
        if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
            raise TraceError(f"{where}: 'frames' must be a list of strings, got {frames!r}")
        return Heard(*head, message_of(frames, node[0]))
    room = _room(fields, where) if any(name in fields for name in ROOM_OF) else None
    _check_arguments(kind, fields, where)
    return Called(*head, kind, room, fields)


def _room(fields: Mapping[str, Any], where: str) -> int:
    room = next((fields[name] for name in ROOM_OF if name in fields), None)
    if not isinstance(room, int) or isinstance(room, bool):
        raise TraceError(f"{where}: a room is a whole number, got {room!r}")
    return room


def _poll(fields: Mapping[str, Any], name: str, where: str) -> str | None:
    if name not in fields:
        raise TraceError(f"{where}: a status event needs {name!r}")
    poll = fields[name]
    if poll is None or (isinstance(poll, str) and poll in POLL_NUMBERS):
        return poll
    raise TraceError(f"{where}: {name!r} is {poll!r}; valid: null, {', '.join(POLL_NUMBERS)}")


def _check_arguments(method: str, fields: Mapping[str, Any], where: str) -> None:
    """The arguments that a judge reads have their form; a recorder leaves out what the caller left out."""
    if method in ("conclude_transfer", "apply_prefill_status") and fields.get("status") not in POLL_NUMBERS:
        raise TraceError(f"{where}: {method} needs a 'status', one of {', '.join(POLL_NUMBERS)}")
    rank = fields.get("prefill_rank", 0)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= RANK_MAX:
        raise TraceError(f"{where}: 'prefill_rank' must be a whole number from 0 to {RANK_MAX}, got {rank!r}")


def message_of(frames: Sequence[str], side: str) -> Message:
    """What a control message says that a rank of ``side`` ("P" or "D") received."""
    guard = frames[0] if frames and frames[0] in GUARDS else ""
    rest = frames[1:] if guard else frames
    if not rest:
        return OTHER
    return _to_prefill(rest, guard) if side == "P" else _to_decode(rest)


def _to_prefill(frames: Sequence[str], guard: str) -> Message:
    if frames[0] == "ABORT":
        room = _number(frames, 1)
        return OTHER if room is None else Message("abort", room, ":".join(frames[2:4]))
    room, required = _number(frames, 0), _number(frames, REQUIRED_FRAME[guard])
    if room is None or required is None:
        return OTHER
    return Message("metadata", room, f"{':'.join(frames[1:3])} {frames[3]}", required)


def _to_decode(frames: Sequence[str]) -> Message:
    if frames[0] == "ABORT_ACK":
        room = _number(frames, 1)
        return OTHER if room is None else Message("abort_ack", room, "", _number(frames, 2))
    if frames[0] == "KV_STATUS":
        frames = frames[1:]
    room, poll, rank = _number(frames, 0), _number(frames, 1), _number(frames, 2)
    if room is None or rank is None or rank > RANK_MAX or poll not in POLLS or len(frames) > 4:
        return OTHER
    return Message("status", room, "", rank, POLLS[poll])


def _number(frames: Sequence[str], place: int) -> int | None:
    """The whole number in a frame; None where the frame is missing or holds something else."""
    if place >= len(frames) or not frames[place].isascii() or not frames[place].isdigit():
        return None
    return int(frames[place]) if len(frames[place]) <= DIGITS_MAX else None  # longer ones are only measured
