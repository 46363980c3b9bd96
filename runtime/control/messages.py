"""What ranks say to each other, and the one way to write and read it.

Messages travel in one ZeroMQ frame, so that they arrive whole or not at all and no two senders can interleave their
parts (A26):

    KVP | version, 1 byte | seal, 16 bytes | MessagePack of [envelope, [message, ...]]

The *envelope* says who speaks, in which life, where it can be answered, and for whose ears this is; a *message* is one
of the classes below, told apart by the number of its tag. Both are arrays without field names. Every field has
a type and a bound, and ``decode`` takes nothing that does not fit: it raises ``MalformedMessage`` with one of
``REASONS``, never anything else (A04). The seal is a keyed BLAKE2b over what follows it, if the cluster has a token,
and zeros if not. It keeps strangers and misrouted clusters out; it hides nothing and does not stop a replay.

A tag number is never given to another class, and a class never changes under its number: a message that must say
more gets a new class and number, or all get the next ``VERSION``.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from kvpoll.spec.vocabulary import Incarnation

MAGIC: Final = b"KVP"
VERSION: Final = 2
SEAL_BYTES: Final = 16
HEAD_BYTES: Final = len(MAGIC) + 1 + SEAL_BYTES

MESSAGE_BYTES_MAX: Final = 8 << 20
"""Longest frame that is sent or read: the pages of a prompt of a million tokens at one token a page are 4 MiB."""

FRAME_MESSAGES_MAX: Final = 64
TOKEN_BYTES_MAX: Final = 64
ROOM_MAX: Final = 2**63 - 1
EPOCH_MAX: Final = 2**63 - 1
SERIAL_MAX: Final = 2**63 - 1
ATTEMPT_MAX: Final = 2**31 - 1
ROW_MAX: Final = 2**31 - 1
INDEX_MAX: Final = 65_535
NAME_CHARS_MAX: Final = 128
RID_CHARS_MAX: Final = 512
CAUSE_CHARS_MAX: Final = 1024
LIST_ITEMS_MAX: Final = 65_536
PAGE_NUMBER_BYTES: Final = 4

REASONS: Final = ("foreign", "malformed", "wrong_version", "wrong_token", "unknown_type", "oversized")
"""Why ``decode`` refuses: not ours but SGLang's; not readable; of another version; sealed with another token or
none; a tag that this version does not have; longer than ``MESSAGE_BYTES_MAX``."""

Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Rid = Annotated[str, Meta(min_length=1, max_length=RID_CHARS_MAX)]
Cause = Annotated[str, Meta(max_length=CAUSE_CHARS_MAX)] | None
Index = Annotated[int, Meta(ge=0, le=INDEX_MAX)]
Count = Annotated[int, Meta(ge=0, le=SERIAL_MAX)]
Epoch = Annotated[int, Meta(ge=0, le=EPOCH_MAX)]
Blob = Annotated[bytes, Meta(max_length=MESSAGE_BYTES_MAX)]
Side = Literal["prefill", "decode"]

_PORT: Final = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
ENDPOINT: Final = rf"^tcp://(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):(?:{_PORT})\Z"
"""A sender's word for where to answer is connected to, so it may not name a file, a device or another scheme."""
Endpoint = Annotated[str, Meta(max_length=270, pattern=ENDPOINT)]


class MalformedMessage(Exception):
    """Frames that are no message of ours, or hold one that is none. ``reason`` is one of ``REASONS``. ``envelope`` is
    set if it was readable, ``count`` says how many messages it covers, and ``readable`` which of them could be read,
    each with its place.
    """

    def __init__(
        self, reason: str, detail: str, envelope: Envelope | None = None,
        count: int = 1, readable: Sequence[tuple[int, Message]] = (),
    ) -> None:  # fmt: skip
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.envelope = envelope
        self.count = max(1, count)
        self.readable = readable


class _Array(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """Written as an array of its fields in order; never part of a reference cycle, so not tracked for one."""


class Envelope(_Array, frozen=True):
    """Who speaks to whom. ``serial`` rises by one with each message of a channel, so a gap is a loss; of several in a
    frame it is the first one's.

    node, epoch, endpoint: the sender, its life, and where its PULL socket listens. target, target_epoch: the
    receiver, and its life as the sender knows it, or None where the sender does not know (a probe asks for it).
    """

    node: Name
    epoch: Epoch
    endpoint: Endpoint
    serial: Count
    target: Name
    target_epoch: Epoch | None = None


class _OfRoom(_Array, frozen=True):
    """A message about one room. ``incarnation`` carries the epoch of its receiver, as ``spec.vocabulary`` says."""

    incarnation: Incarnation

    def __post_init__(self) -> None:
        _require_incarnation(self.incarnation)


class Metadata(_OfRoom, frozen=True, tag=1):
    """Decode to prefill: the destination of a room. The decode rank's node and endpoint are the envelope's.

    index: decode's bit. required: how many destinations the prefill rank must wait for (PROTOCOL 7.4). owner:
    decode's own incarnation of the room. pages: int32 little-endian page numbers in prompt order, see
    ``pack_pages``; empty for a dummy. row: aux row, -1 for none. descriptor: of the owner's memory, as its transport
    wrote it. layout: how that memory is laid out, as the pools wrote it. Page numbers are a stranger's word until
    they have been compared with the size of the pool that ``layout`` states.
    """

    index: Index
    required: Index
    owner: Incarnation
    pages: Blob
    row: Annotated[int, Meta(ge=-1, le=ROW_MAX)]
    descriptor: Blob
    layout: Blob

    def __post_init__(self) -> None:
        _require_incarnation(self.incarnation)
        _require_incarnation(self.owner)
        if len(self.pages) % PAGE_NUMBER_BYTES:
            raise ValueError(f"pages are int32 numbers, but {len(self.pages)} bytes are no whole number of them")


class Abort(_OfRoom, frozen=True, tag=2):
    """Decode to prefill: this room is given up. ``owner`` is the incarnation to acknowledge; index: decode's bit."""

    index: Index
    owner: Incarnation

    def __post_init__(self) -> None:
        _require_incarnation(self.incarnation)
        _require_incarnation(self.owner)


class Status(_OfRoom, frozen=True, tag=3):
    """Prefill to decode: how this rank's part of the room ended. index: the prefill rank's unique rank."""

    index: Index
    outcome: Literal["Success", "Failed"]
    cause: Cause = None


class AbortAck(_OfRoom, frozen=True, tag=4):
    """Prefill to decode: no write of this room runs and none will start. index: the prefill rank's unique rank."""

    index: Index


class Ping(_Array, frozen=True, tag=5):
    """Are you there, and in which life? ``serial`` numbers the question."""

    serial: Count


class Pong(_Array, frozen=True, tag=6):
    """The answer to the Ping of this serial; the envelope says in which life it was given."""

    serial: Count


class Goodbye(_Array, frozen=True, tag=7):
    """The sender leaves as planned (scale-down): nothing of it is lost, and nothing more will come."""

    reason: Cause = None


class StageStatus(_OfRoom, frozen=True, tag=8):
    """A later pipeline stage to stage 0: its poll (0..4) of a request, and the cause if it failed."""

    stage: Index
    rid: Rid
    poll: Annotated[int, Meta(ge=0, le=4)]
    cause: Cause = None


class Step(_Array, frozen=True, tag=9):
    """A pipeline stage to the next one: its step of this number, as the driver encoded it."""

    number: Count
    payload: Blob


class Agreed(_Array, frozen=True, tag=10):
    """The last pipeline stage to stage 0: requests that every stage found ready."""

    candidates: Annotated[tuple[Rid, ...], Meta(max_length=LIST_ITEMS_MAX)]


class Enter(_Array, frozen=True, tag=11):
    """A rank enters collective ``sequence`` of its group, as rank ``index``, with this kind, shape and payload."""

    group: Name
    sequence: Count
    index: Index
    kind: Name
    shape: Annotated[str, Meta(max_length=CAUSE_CHARS_MAX)]
    payload: Blob


class Deliver(_Array, frozen=True, tag=12):
    """A collective is complete: the payloads of all ranks in order of rank."""

    group: Name
    sequence: Count
    payloads: Annotated[tuple[Blob, ...], Meta(max_length=LIST_ITEMS_MAX)]


class Mismatch(_Array, frozen=True, tag=13):
    """A collective can never complete: two ranks brought different kinds or shapes."""

    group: Name
    sequence: Count


class TurnWanted(_Array, frozen=True, tag=14):
    """Something changed for a group: every rank must take turn ``turn``."""

    group: Name
    turn: Count


class Command(_Array, frozen=True, tag=15):
    """The router to a rank: "open" a request, "abort" it, ...; payload as the driver encoded it."""

    kind: Name
    payload: Blob


class Reply(_Array, frozen=True, tag=16):
    """A rank to the router: "failed", "first_token", ... of one request, on which side, and why."""

    rid: Rid
    kind: Name
    side: Side
    cause: Cause = None


class Missed(_Array, frozen=True, tag=17):
    """This many messages between the two never arrived: whoever hears it says again what matters (LinkRestored)."""

    count: Count


Message = (
    Metadata | Abort | Status | AbortAck | Ping | Pong | Goodbye | StageStatus | Step | Agreed
    | Enter | Deliver | Mismatch | TurnWanted | Command | Reply | Missed
)  # fmt: skip

MESSAGES: Final[tuple[type[msgspec.Struct], ...]] = Message.__args__
_TAGS: Final = frozenset(kind.__struct_config__.tag for kind in MESSAGES)

_encode: Final = msgspec.msgpack.Encoder().encode
Messages = Annotated[tuple[Message, ...], Meta(min_length=1, max_length=FRAME_MESSAGES_MAX)]

_decode: Final = msgspec.msgpack.Decoder(tuple[Envelope, Messages]).decode
_decode_pair: Final = msgspec.msgpack.Decoder(tuple[Envelope, msgspec.Raw]).decode
_decode_each: Final = msgspec.msgpack.Decoder(
    Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=FRAME_MESSAGES_MAX)]
).decode
_decode_message: Final = msgspec.msgpack.Decoder(Message).decode
_UNREADABLE: Final = (ValueError, RecursionError)  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
_NO_SEAL: Final = bytes(SEAL_BYTES)
_OURS: Final = MAGIC + bytes([VERSION])


def _require_incarnation(incarnation: Incarnation) -> None:
    room, attempt, epoch = incarnation
    if not (0 <= room <= ROOM_MAX and 0 <= attempt <= ATTEMPT_MAX and 0 <= epoch <= EPOCH_MAX):
        raise ValueError(f"{incarnation} is out of bounds: 63 bits of room and epoch, 31 bits of attempt")


# -- writing -----------------------------------------------------------------------------------------------------


def encode(envelope: Envelope, messages: Sequence[Message], token: bytes | None = None) -> list[bytes]:
    """The frames of these messages; today there is one.

    A cause that is longer than ``CAUSE_CHARS_MAX`` is cut, because losing the end of a text is better than losing the
    notice. Anything else that the receiver would refuse is refused here, at its author: raises MalformedMessage
    "oversized" or "malformed".
    """
    try:
        body = _encode((envelope, messages))
        _decode(body)  # constructors check no types; what passes here passes at the receiver
    except (*_UNREADABLE, TypeError, OverflowError) as error:
        shorter = [_cut(message) for message in messages]
        if shorter == list(messages):
            raise MalformedMessage("malformed", _line(error), envelope) from None
        return encode(envelope, shorter, token)
    if HEAD_BYTES + len(body) > MESSAGE_BYTES_MAX:
        raise MalformedMessage("oversized", f"{len(body)} bytes, over {MESSAGE_BYTES_MAX}", envelope)
    return [_OURS + _seal(token, body) + body]


def _cut(message: Message) -> Message:
    """The message with a cause that fits; the same one if its cause is not what does not fit."""
    field = "reason" if isinstance(message, Goodbye) else "cause"
    cause = getattr(message, field, None)
    if not isinstance(cause, str):
        return message
    kept = cause.encode("utf-8", "replace").decode()[:CAUSE_CHARS_MAX]
    return message if kept == cause else msgspec.structs.replace(message, **{field: kept})


def _seal(token: bytes | None, body: bytes) -> bytes:
    if token is None:
        return _NO_SEAL
    return hashlib.blake2b(body, key=token, digest_size=SEAL_BYTES).digest()


def pack_pages(numbers: Sequence[int]) -> bytes:
    """Page numbers as int32 little-endian bytes, for ``Metadata.pages``. Raises OverflowError beyond 31 bits."""
    if len(numbers) and not 0 <= min(numbers) <= max(numbers) <= ROW_MAX:
        raise OverflowError("page numbers have 31 bits")
    return struct.pack(f"<{len(numbers)}i", *numbers)


def unpack_pages(pages: bytes) -> tuple[int, ...]:
    """The page numbers in ``Metadata.pages``. A stranger's numbers may be negative."""
    return struct.unpack(f"<{len(pages) // PAGE_NUMBER_BYTES}i", pages)


# -- reading -----------------------------------------------------------------------------------------------------


def decode(frames: Sequence[bytes], token: bytes | None = None) -> tuple[Envelope, Messages]:
    """The messages in these frames. Raises MalformedMessage, and nothing else, for whatever they hold."""
    frame = frames[0] if len(frames) == 1 else b""
    if frame[:4] != _OURS:
        raise _strange(frames)
    if len(frame) > MESSAGE_BYTES_MAX:
        raise MalformedMessage("oversized", f"{len(frame)} bytes, over {MESSAGE_BYTES_MAX}")
    body = frame[HEAD_BYTES:]
    if not hmac.compare_digest(frame[len(_OURS) : HEAD_BYTES], _seal(token, body)):
        raise MalformedMessage("wrong_token", "sealed by another cluster" if token else "sealed, but we have no token")
    try:
        return _decode(body)
    except _UNREADABLE:
        raise _unreadable(body) from None


def _unreadable(body: bytes) -> MalformedMessage:
    """Why this is no message, and whose it was if the envelope can be read."""
    try:
        envelope, raw = _decode_pair(body)
    except _UNREADABLE as error:
        return MalformedMessage("malformed", f"envelope: {_line(error)}")
    try:
        each = _decode_each(raw)
    except _UNREADABLE as error:
        return MalformedMessage("malformed", f"messages: {_line(error)}", envelope)
    readable: list[tuple[int, Message]] = []
    fault: tuple[str, str] | None = None
    for place, message in enumerate(each):
        try:
            readable.append((place, _decode_message(message)))
        except _UNREADABLE as error:
            known = _known_tag(bytes(message))
            fault = fault or ("malformed" if known else "unknown_type", _line(error))
    reason, detail = fault or ("malformed", f"{len(each)} messages in a frame")
    return MalformedMessage(reason, detail, envelope, len(each), readable)


def _known_tag(body: bytes) -> bool:
    """Is this an array that begins with the number of a class? Else a tag was readable and is none of ours, or not."""
    is_array = len(body) >= 2 and body[0] & 0xF0 == 0x90 and body[0] != 0x90
    return not is_array or body[1] in _TAGS or body[1] > 0x7F


_SGLANG_WORDS: Final = frozenset(
    b"None ABORT ABORT_ACK BOOTSTRAP KV_STATUS NixlMsgGuard MoriMsgGuard CHUNK_READY STAGING_REQ STAGING_RSP "
    b"WATERMARK AUX_DATA".split()
)
_ASCII_NUMBER: Final = re.compile(rb"[0-9]{1,20}\Z")


def _strange(frames: Sequence[bytes]) -> MalformedMessage:
    """Why frames that do not begin like ours are refused."""
    first = frames[0] if frames else b""
    if first in _SGLANG_WORDS or _ASCII_NUMBER.match(first):
        return MalformedMessage("foreign", f"{len(frames)} frames of SGLang, first {first.decode()}")
    if len(frames) != 1:
        return MalformedMessage("malformed", f"{len(frames)} frames where one was expected")
    if first[:3] == MAGIC and len(first) > 3:
        return MalformedMessage("wrong_version", f"version {first[3]}, this is version {VERSION}")
    return MalformedMessage("malformed", f"{len(first)} bytes that do not begin with {MAGIC.decode()}")


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
