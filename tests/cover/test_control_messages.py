"""Control messages: every one survives the wire, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.runtime.control.messages import (
    ATTEMPT_MAX,
    CAUSE_CHARS_MAX,
    EPOCH_MAX,
    FRAME_MESSAGES_MAX,
    HEAD_BYTES,
    INDEX_MAX,
    MESSAGE_BYTES_MAX,
    MESSAGES,
    NAME_CHARS_MAX,
    REASONS,
    ROOM_MAX,
    ROW_MAX,
    SERIAL_MAX,
    VERSION,
    Abort,
    AbortAck,
    Agreed,
    Command,
    Deliver,
    Enter,
    Envelope,
    Goodbye,
    MalformedMessage,
    Metadata,
    Mismatch,
    Missed,
    Ping,
    Pong,
    Reply,
    StageStatus,
    Status,
    Step,
    TurnWanted,
    decode,
    encode,
    pack_pages,
    unpack_pages,
)
from kvpoll.spec.vocabulary import Incarnation

ROOM = Incarnation(7, 1, 2)
OWNER = Incarnation(7, 1, 5)
ENVELOPE = Envelope("D0/tp1", 5, "tcp://127.0.0.1:41000", 12, "P0/tp0", 2)


def incarnations() -> st.SearchStrategy[Incarnation]:
    return st.builds(Incarnation, st.integers(0, ROOM_MAX), st.integers(0, ATTEMPT_MAX), st.integers(0, EPOCH_MAX))


def texts(most: int, least: int = 0) -> st.SearchStrategy[str]:
    return st.text(min_size=least, max_size=most)


INDEX = st.integers(0, INDEX_MAX)
COUNT = st.integers(0, SERIAL_MAX)
NAME = texts(NAME_CHARS_MAX, least=1)
RID = texts(60, least=1)
CAUSE = st.none() | texts(80)
BLOB = st.binary(max_size=200)
PAGES = st.lists(st.integers(0, ROW_MAX), max_size=40).map(pack_pages)
ROOMS = incarnations()

ANY: dict[type[msgspec.Struct], st.SearchStrategy[Any]] = {
    Metadata: st.builds(Metadata, ROOMS, INDEX, INDEX, ROOMS, PAGES, st.integers(-1, ROW_MAX), BLOB, BLOB),
    Abort: st.builds(Abort, ROOMS, INDEX, ROOMS),
    Status: st.builds(Status, ROOMS, INDEX, st.sampled_from(["Success", "Failed"]), CAUSE),
    AbortAck: st.builds(AbortAck, ROOMS, INDEX),
    Ping: st.builds(Ping, COUNT),
    Pong: st.builds(Pong, COUNT),
    Goodbye: st.builds(Goodbye, CAUSE),
    StageStatus: st.builds(StageStatus, ROOMS, INDEX, RID, st.integers(0, 4), CAUSE),
    Step: st.builds(Step, COUNT, BLOB),
    Agreed: st.builds(Agreed, st.lists(RID, max_size=20).map(tuple)),
    Enter: st.builds(Enter, NAME, COUNT, INDEX, NAME, texts(80), BLOB),
    Deliver: st.builds(Deliver, NAME, COUNT, st.lists(BLOB, max_size=8).map(tuple)),
    Mismatch: st.builds(Mismatch, NAME, COUNT),
    TurnWanted: st.builds(TurnWanted, NAME, COUNT),
    Command: st.builds(Command, NAME, BLOB),
    Reply: st.builds(Reply, RID, NAME, st.sampled_from(["prefill", "decode"]), CAUSE),
    Missed: st.builds(Missed, COUNT),
}
ENVELOPES = st.builds(
    Envelope, NAME, st.integers(0, EPOCH_MAX), st.sampled_from(["tcp://127.0.0.1:1", "tcp://[::1]:65535", "tcp://host-7.lan:80"]),
    COUNT, NAME, st.none() | st.integers(0, EPOCH_MAX),
)  # fmt: skip


def sealed(body: bytes) -> list[bytes]:
    """A frame that is ours up to its body."""
    return [b"KVP" + bytes([VERSION]) + bytes(16) + body]


def wire(message: Any, envelope: Any = ENVELOPE) -> list[bytes]:
    """Frames as somebody might write them who checks nothing."""
    return sealed(msgspec.msgpack.encode((envelope, [message])))


def refusal(frames: list[bytes], token: bytes | None = None) -> tuple[str, bool]:
    """Why these frames are refused, and whether their envelope could be read all the same."""
    with pytest.raises(MalformedMessage) as caught:
        decode(frames, token)
    assert caught.value.reason in REASONS
    assert "\n" not in str(caught.value)
    return caught.value.reason, caught.value.envelope is not None


# --- there and back -------------------------------------------------------------------------------


def test_every_message_has_a_strategy_here_and_a_tag_of_its_own() -> None:
    assert set(ANY) == set(MESSAGES)
    tags = [kind.__struct_config__.tag for kind in MESSAGES]
    assert tags == list(range(1, len(MESSAGES) + 1))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_arrives_as_it_was_sent(kind: type[msgspec.Struct]) -> None:
    @given(ENVELOPES, ANY[kind], st.none() | st.binary(min_size=1, max_size=64))
    def there_and_back(envelope: Envelope, message: Any, token: bytes | None) -> None:
        frames = encode(envelope, [message], token)
        arrived = decode(frames, token)
        assert arrived == (envelope, (message,))
        assert type(arrived[1][0]) is kind
        assert len(frames) == 1

    there_and_back()


def test_an_incarnation_arrives_as_one() -> None:
    _, (abort,) = decode(encode(ENVELOPE, [Abort(ROOM, 3, OWNER)]))
    assert isinstance(abort, Abort)
    assert type(abort.incarnation) is type(abort.owner) is Incarnation
    assert abort.incarnation.pair == (7, 1)


@given(st.lists(st.integers(0, ROW_MAX), max_size=100))
def test_page_numbers_come_back(numbers: list[int]) -> None:
    assert unpack_pages(pack_pages(numbers)) == tuple(numbers)
    assert len(pack_pages(numbers)) == 4 * len(numbers)


@pytest.mark.parametrize("numbers", [[-1], [0, 2**31]])
def test_a_page_number_has_31_bits(numbers: list[int]) -> None:
    with pytest.raises(OverflowError, match="31 bits"):
        pack_pages(numbers)


def test_a_request_in_small_pages_fits() -> None:
    """A prompt of a million tokens at SGLang's default of one token a page."""
    message = Metadata(ROOM, 0, 1, OWNER, pack_pages(range(1_000_000)), 0, b"", b"")
    assert decode(encode(ENVELOPE, [message]))[1] == (message,)


# --- what an author may not send ------------------------------------------------------------------

OUT_OF_BOUNDS = {
    "an index beyond its bits": Status(ROOM, INDEX_MAX + 1, "Success"),
    "an outcome that is none": Status(ROOM, 0, "Perhaps"),  # type: ignore[arg-type]
    "a text for a number": Ping("1"),  # type: ignore[arg-type]
    "a truth for a number": Ping(True),
    "a poll that is none": StageStatus(ROOM, 0, "r", 5),
    "a row below none": Metadata(ROOM, 0, 1, OWNER, b"", -2, b"", b""),
    "a nameless group": Mismatch("", 0),
    "a request id without end": Reply("r" * 600, "failed", "prefill"),
    "a side that is none": Reply("r", "failed", "middle"),  # type: ignore[arg-type]
    "a number beyond 64 bits": Ping(2**64),
    "a text that is no Unicode": Command("\udc80", b""),
    "too many payloads": Deliver("g", 0, (b"",) * 70_000),
    "an object": Step(0, object()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_what_the_receiver_would_refuse_is_refused_at_its_author(message: Any) -> None:
    with pytest.raises(MalformedMessage) as caught:
        encode(ENVELOPE, [message])
    assert caught.value.reason == "malformed"


def test_a_message_that_is_too_long_is_refused_at_its_author() -> None:
    with pytest.raises(MalformedMessage) as caught:
        encode(ENVELOPE, [Step(1, bytes(MESSAGE_BYTES_MAX))])
    assert caught.value.reason == "oversized"


@pytest.mark.parametrize(
    "incarnation", [Incarnation(-1, 0, 0), Incarnation(2**63, 0, 0), Incarnation(1, 2**31, 0), Incarnation(1, 0, -1)]
)
def test_an_incarnation_out_of_bounds_cannot_be_addressed(incarnation: Incarnation) -> None:
    with pytest.raises(ValueError, match="out of bounds"):
        AbortAck(incarnation, 0)
    with pytest.raises(ValueError, match="out of bounds"):
        Abort(ROOM, 0, incarnation)
    with pytest.raises(ValueError, match="out of bounds"):
        Metadata(ROOM, 0, 1, incarnation, b"", 0, b"", b"")


def test_pages_that_are_no_numbers_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="7 bytes"):
        Metadata(ROOM, 0, 1, OWNER, b"1234567", 0, b"", b"")


@pytest.mark.parametrize("cause", ["x" * 5000, "no\udc80 Unicode", "\udc80" * 2000])
@pytest.mark.parametrize("kind", [Status, StageStatus, Reply, Goodbye])
def test_a_cause_is_cut_rather_than_its_notice_lost(kind: type, cause: str) -> None:
    """A traceback as the cause of a failure must not keep the peer from hearing that there was one."""
    message = {
        Status: Status(ROOM, 0, "Failed", cause),
        StageStatus: StageStatus(ROOM, 1, "r", 0, cause),
        Reply: Reply("r", "failed", "decode", cause),
        Goodbye: Goodbye(cause),
    }[kind]
    _, (arrived,) = decode(encode(ENVELOPE, [message]))
    field = "reason" if kind is Goodbye else "cause"
    kept = getattr(arrived, field)
    assert kept == cause.replace("\udc80", "?")[:CAUSE_CHARS_MAX]
    assert msgspec.structs.replace(arrived, **{field: cause}) == message


# --- what is refused ------------------------------------------------------------------------------

PING = [5, 1]
FOREIGN = {
    "SGLang status (Mooncake)": [b"7423", b"4", b"0"],
    "SGLang status (NIXL)": [b"KV_STATUS", b"7", b"4", b"0", b""],
    "SGLang metadata": [b"123456789", b"10.0.0.1", b"41000", b"session", b"\x01\0\0\0", b"3", b"", b"1", b"0"],
    "SGLang abort": [b"ABORT", b"7"],
    "SGLang acknowledgement": [b"ABORT_ACK", b"7", b"0", b"1"],
    "SGLang registration": [b"None", b"10.0.0.1", b"41000"],
    "SGLang guard": [b"NixlMsgGuard", b"None"],
    "SGLang, one frame": [b"BOOTSTRAP"],
}
MALFORMED = {
    "nothing": [],
    "an empty frame": [b""],
    "a short frame": [b"KVP"],
    "another protocol": [b"GET / HTTP/1.1\r\n"],
    "two frames": [*wire(PING), b""],
    "a version and nothing else": [b"KVP" + bytes([VERSION]) + bytes(16)],
    "a body that is no MessagePack": sealed(b"\xc1\xc1"),
    "a body that is too short": [wire(PING)[0][:-4]],
    "a body with something behind it": [wire(PING)[0] + b"\0"],
    "an envelope without fields": wire(PING, []),
    "an envelope with one field more": wire(PING, ["D0", 0, "tcp://h:1", 1, "P0", None, 1]),
    "an envelope without a sender": wire(PING, ["", 0, "tcp://h:1", 1, "P0", None]),
    "an epoch below zero": wire(PING, ["D0", -1, "tcp://h:1", 1, "P0", None]),
    "a serial with a fraction": wire(PING, ["D0", 0, "tcp://h:1", 1.5, "P0", None]),
    "an endpoint on the disk": wire(PING, ["D0", 0, "ipc:///run/secret", 1, "P0", None]),
    "an endpoint everywhere": wire(PING, ["D0", 0, "tcp://*:1", 1, "P0", None]),
    "an endpoint through another one": wire(PING, ["D0", 0, "tcp://eth0:0;h:1", 1, "P0", None]),
    "an endpoint with a line more": wire(PING, ["D0", 0, "tcp://h:1\n", 1, "P0", None]),
    "a name without end": wire(PING, ["D" * 1000, 0, "tcp://h:1", 1, "P0", None]),
    "arrays without bottom": sealed(b"\x91" * 200_000),
    "a list that claims 4 billion payloads": wire(msgspec.Raw(b"\x94\x0c\xa1g\x00\xdd\xff\xff\xff\xff")),
    "an array that claims 4 billion elements": sealed(b"\x92\xdd\xff\xff\xff\xff"),
}
MALFORMED_BODY = {
    "no array": 7,
    "an empty array": [],
    "a tag that is no number": ["Ping", 1],
    "a field too few": [5],
    "a field too many": [5, 1, 2],
    "a text for a number": [5, "1"],
    "a number for an incarnation": [4, 7, 0],
    "a short incarnation": [4, [7, 1], 0],
    "a room of 64 bits": [4, [2**63, 1, 0], 0],
    "a room below zero": [4, [-1, 1, 0], 0],
    "an attempt without bound": [4, [1, 2**40, 0], 0],
    "pages that are no numbers": [1, ROOM, 0, 1, OWNER, b"123", 0, b"", b""],
    "a text for bytes": [9, 0, "payload"],
    "a text that is no UTF-8": msgspec.Raw(b"\x93\x0d\xa1\xff\x00"),
}


@pytest.mark.parametrize("frames", FOREIGN.values(), ids=FOREIGN)
def test_frames_of_sglang_are_told_apart(frames: list[bytes]) -> None:
    assert refusal(frames) == ("foreign", False)


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED)
def test_frames_without_a_readable_envelope_are_malformed(frames: list[bytes]) -> None:
    reason = refusal(frames)
    assert reason == ("malformed", False)


@pytest.mark.parametrize("body", MALFORMED_BODY.values(), ids=MALFORMED_BODY)
def test_a_readable_envelope_is_kept_when_the_message_is_malformed(body: Any) -> None:
    """Its serial is used up: the next message must not look as if one had been lost."""
    assert refusal(wire(body)) == ("malformed", True)


def test_several_messages_travel_in_one_frame_and_one_bad_one_condemns_them_but_says_how_many_they_were() -> None:
    told = [Ping(1), Status(ROOM, 0, "Success"), Pong(2)]
    (frame,) = encode(ENVELOPE, told)
    assert decode([frame]) == (ENVELOPE, tuple(told))
    for bad in ([5, "1"], [200, 1]):
        with pytest.raises(MalformedMessage) as caught:
            decode(sealed(msgspec.msgpack.encode((ENVELOPE, [told[0], bad, told[2]]))))
        assert caught.value.envelope == ENVELOPE and caught.value.count == 3
        assert caught.value.readable == [(0, told[0]), (2, told[2])]
    for none_or_many in ([], [Ping(1)] * (FRAME_MESSAGES_MAX + 1)):
        assert refusal(sealed(msgspec.msgpack.encode((ENVELOPE, none_or_many)))) == ("malformed", True)
        with pytest.raises(MalformedMessage):
            encode(ENVELOPE, none_or_many)


@pytest.mark.parametrize("tag", [0, len(MESSAGES) + 1, 127])
def test_a_tag_of_a_later_version_is_unknown(tag: int) -> None:
    assert refusal(wire([tag, 1, 2, 3])) == ("unknown_type", True)


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, 255])
def test_another_version_is_named(version: int) -> None:
    (frame,) = encode(ENVELOPE, [Ping(1)])
    with pytest.raises(MalformedMessage, match=f"version {version}, this is version {VERSION}") as caught:
        decode([b"KVP" + bytes([version]) + frame[4:]])
    assert caught.value.reason == "wrong_version"


def test_a_frame_that_is_too_long_is_not_even_read() -> None:
    assert refusal(sealed(bytes(MESSAGE_BYTES_MAX))) == ("oversized", False)


@pytest.mark.parametrize("ours, theirs", [(b"ours", b"theirs"), (b"ours", None), (None, b"theirs")])
def test_a_stranger_has_another_token_or_none(ours: bytes | None, theirs: bytes | None) -> None:
    assert refusal(encode(ENVELOPE, [Ping(1)], theirs), ours) == ("wrong_token", False)


@given(st.integers(0, 300), st.integers(1, 255))
def test_a_seal_covers_every_byte_behind_it(place: int, change: int) -> None:
    (frame,) = encode(ENVELOPE, [Status(ROOM, 0, "Failed", "x" * 300)], b"ours")
    changed = bytearray(frame)
    changed[HEAD_BYTES + place] ^= change
    assert refusal([bytes(changed)], b"ours") == ("wrong_token", False)


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_random_frames_are_refused_with_a_reason(frames: list[bytes]) -> None:
    assert refusal(frames)[0] in REASONS


@given(st.binary(max_size=80))
def test_random_bodies_are_refused_with_a_reason(body: bytes) -> None:
    reason, _ = refusal(sealed(body))
    assert reason == "malformed"


@given(st.sampled_from(MESSAGES).flatmap(lambda kind: ANY[kind]), st.data())
def test_a_message_with_one_byte_changed_is_refused_or_still_one(message: Any, data: st.DataObject) -> None:
    """Nothing but a message or MalformedMessage comes out, whatever a broken sender did to one."""
    (frame,) = encode(ENVELOPE, [message])
    place = data.draw(st.integers(0, len(frame) - 1))
    changed = frame[:place] + bytes([data.draw(st.integers(0, 255))]) + frame[place + 1 :]
    try:
        envelope, arrived = decode([changed])
    except MalformedMessage as error:
        assert error.reason in REASONS
    else:
        assert decode(encode(envelope, arrived)) == (envelope, arrived)
