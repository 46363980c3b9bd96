"""The control plane over real ZeroMQ sockets, within one process: what arrives, and what is dropped as what."""

from __future__ import annotations

import random
import socket
import time
from typing import Any

import msgspec
import pytest
from control_stage import PATIENCE_S, bodies, drops, making_planes, making_strangers, read

from kvpoll.runtime.control.messages import (
    MESSAGE_BYTES_MAX,
    VERSION,
    AbortAck,
    Envelope,
    Goodbye,
    Missed,
    Ping,
    Pong,
    Status,
    Step,
    encode,
)
from kvpoll.runtime.control.plane import FRAME_MESSAGES
from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Incarnation

ROOM = Incarnation(7, 1, 0)
planes = pytest.fixture(making_planes)
strangers = pytest.fixture(making_strangers)


# --- there and back -------------------------------------------------------------------------------


def test_two_planes_talk(planes: Any) -> None:
    prefill, decode = planes("P0", 3), planes("D0", 5)
    assert decode.send(prefill.endpoint, "P0", 3, AbortAck(ROOM, 1))
    ((envelope, message),) = read(prefill, 1)
    assert message == AbortAck(ROOM, 1)
    assert envelope == Envelope("D0", 5, decode.endpoint, 1, "P0", 3)
    assert prefill.send(envelope.endpoint, envelope.node, envelope.epoch, Status(ROOM, 0, "Failed", "why not"))
    assert bodies(read(decode, 1)) == [Status(ROOM, 0, "Failed", "why not")]
    assert (prefill.sent, prefill.received, drops(prefill)) == (1, 1, {})
    assert (prefill.channels, decode.channels) == ((decode.endpoint,), (prefill.endpoint,))


def test_it_listens_on_loopback_and_says_where(planes: Any) -> None:
    plane = planes()
    assert plane.endpoint.startswith("tcp://127.0.0.1:")
    assert not plane.endpoint.endswith(":0")


def test_it_can_listen_on_ipv6(planes: Any) -> None:
    try:
        plane = planes("P0", host="::1")
    except BadInput:
        pytest.skip("this machine has no IPv6 loopback")
    other = planes("D0")
    assert other.send(plane.endpoint, "P0", 0, Ping(1))
    assert bodies(read(plane, 1)) == [Ping(1)]


def test_a_channel_keeps_its_order(planes: Any) -> None:
    prefill, senders = planes("P0"), [planes(f"D{n}") for n in range(3)]
    for number in range(500):
        for sender in senders:
            assert sender.send(prefill.endpoint, "P0", 0, Step(number, sender.node.encode()))
    inbox = read(prefill, 1500, limit=64)
    for sender in senders:
        assert [m.number for e, m in inbox if e.node == sender.node] == list(range(500))
    assert (drops(prefill), prefill.missed) == ({}, 0)


def test_what_may_wait_travels_together_and_in_order(planes: Any) -> None:
    """Until there are enough for a frame, one comes that may not wait, one is for another life, or ``flush``."""
    prefill, decode = planes("P0", 3), planes("D0")

    def send(first: int, last: int, epoch: int | None = 3, may_wait: bool = True) -> None:
        for number in range(first, last):
            assert decode.send(prefill.endpoint, "P0", epoch, Step(number, b""), may_wait)

    send(0, FRAME_MESSAGES)
    inbox = read(prefill, FRAME_MESSAGES)
    send(8, 11)
    assert decode.sent == FRAME_MESSAGES and prefill.receive() == []
    send(11, 12, may_wait=False)
    send(12, 14)
    send(14, 16, epoch=None)
    inbox += read(prefill, 6)
    assert decode.sent == 14
    decode.flush()
    inbox += read(prefill, 2)
    assert [message.number for _, message in inbox] == list(range(16))
    assert [envelope.serial for envelope, _ in inbox] == list(range(1, 17))
    assert [envelope.target_epoch for envelope, _ in inbox] == [3] * 14 + [None] * 2
    assert (drops(prefill), prefill.missed, prefill.received) == ({}, 0, 16)


@pytest.mark.parametrize("is_known", [False, True])
def test_a_channel_on_which_something_waits_is_not_taken_for_idle(planes: Any, is_known: bool) -> None:
    """Neither for making room for another, nor when idle ones are closed."""
    clock = [1000.0]
    first, second, decode = planes("P0"), planes("P1"), planes("D0", channels_max=1, clock=lambda: clock[0])
    if is_known:
        assert decode.send(first.endpoint, "P0", 0, Ping(1))
        clock[0] += 1000.0
    assert decode.send(first.endpoint, "P0", 0, Ping(2), may_wait=True)
    assert not decode.send(second.endpoint, "P1", 0, Ping(3), may_wait=True)
    decode.receive()
    decode.flush()
    assert bodies(read(first, 1 + is_known))[-1] == Ping(2)
    assert drops(decode) == {"too_many_peers": 1}


def test_one_that_cannot_be_written_does_not_take_its_companions_along(planes: Any) -> None:
    prefill, decode = planes("P0"), planes("D0")
    for message in (Step(1, b""), Step(-1, b""), Step(2, b"")):
        assert decode.send(prefill.endpoint, "P0", 0, message, may_wait=True)
    decode.flush()
    assert [message.number for message in bodies(read(prefill, 2)) if isinstance(message, Step)] == [1, 2]
    assert drops(decode) == {"unencodable": 1} and prefill.missed == 1


def test_one_call_reads_no_more_than_it_was_allowed(planes: Any) -> None:
    prefill, decode = planes("P0"), planes("D0")
    for number in range(30):
        decode.send(prefill.endpoint, "P0", 0, Step(number, b""))
    inbox: list[Any] = []
    end = time.monotonic() + PATIENCE_S
    while len(inbox) < 30 and time.monotonic() < end:
        some = prefill.receive(limit=7)
        assert len(some) <= 7
        inbox += some
    assert [message.number for message in bodies(inbox)] == list(range(30))
    assert not prefill.pending()


def test_a_ping_is_answered_by_whoever_receives(planes: Any) -> None:
    prefill, decode = planes("P0", epoch=4), planes("D0")
    decode.send(prefill.endpoint, "P0", None, Ping(77))
    assert bodies(read(prefill, 1)) == [Ping(77)]
    ((envelope, message),) = read(decode, 1)
    assert (message, envelope.node, envelope.epoch) == (Pong(77), "P0", 4)


def test_a_goodbye_may_linger(planes: Any) -> None:
    prefill, decode = planes("P0"), planes("D0")
    decode.send(prefill.endpoint, "P0", 0, Goodbye("scale-down"))
    decode.close(linger_s=1.0)
    assert bodies(read(prefill, 1)) == [Goodbye("scale-down")]


def test_with_a_token_strangers_are_not_heard(planes: Any) -> None:
    ours, friend, stranger = planes("P0", token=b"k" * 32), planes("D0", token=b"k" * 32), planes("D1")
    stranger.send(ours.endpoint, "P0", 0, Ping(1))
    read(ours, 1)
    friend.send(ours.endpoint, "P0", 0, Ping(2))
    assert bodies(read(ours, 1)) == [Ping(2)]
    assert drops(ours) == {"wrong_token": 1}


# --- what is dropped, each with its reason --------------------------------------------------------

GOOD = Envelope("D0", 0, "tcp://127.0.0.1:9", 1, "P0")


def tampered(body: Any, serial: int = 1) -> bytes:
    envelope = msgspec.structs.replace(GOOD, serial=serial)
    return b"KVP" + bytes([VERSION]) + bytes(16) + msgspec.msgpack.encode((envelope, [body]))


BAD_FRAMES = {
    "foreign": [[b"ABORT", b"7"], [b"7", b"4", b"0"], [b"None", b"10.0.0.1", b"41000"], [b"NixlMsgGuard", b"None"]],
    "malformed": [[b""], [b"", b"", b""], [b"KVP"], [b"GET /"], [tampered([5])], [tampered(["x"], 2)], [tampered([5, 1]), b""]],
    "wrong_version": [[b"KVP" + bytes([VERSION + 1]) + tampered([5, 1])[4:]]],
    "wrong_token": [encode(GOOD, [Ping(1)], b"theirs")],
    "unknown_type": [[tampered([99, 1])]],
    "oversized": [[b"KVP" + bytes([VERSION]) + bytes(MESSAGE_BYTES_MAX)]],
    "wrong_target": [
        encode(msgspec.structs.replace(GOOD, target="P1"), [Ping(1)]),
        encode(msgspec.structs.replace(GOOD, target_epoch=6), [Ping(1)]),
        encode(msgspec.structs.replace(GOOD, target_epoch=8), [Ping(1)]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD_FRAMES)
def test_a_bad_message_is_counted_and_the_next_one_arrives(planes: Any, strangers: Any, reason: str) -> None:
    """A04: one of these ended the only listener of a rank, and hours of requests with it."""
    metric: list[str] = []
    plane = planes("P0", epoch=7, on_dropped=metric.append)
    stranger = strangers(plane)
    for frames in BAD_FRAMES[reason]:
        stranger.send(*frames)
    stranger.letter(AbortAck(ROOM, 0), serial=50, node="D9", target_epoch=7)
    inbox = read(plane, len(BAD_FRAMES[reason]) + 1)
    assert bodies(inbox) == [AbortAck(ROOM, 0)]
    assert drops(plane) == {reason: len(BAD_FRAMES[reason])}
    assert metric == [reason] * len(BAD_FRAMES[reason])


def test_an_endless_frame_costs_its_sender_the_connection_and_nobody_else(planes: Any, strangers: Any) -> None:
    plane = planes("P0")
    stranger, friend = strangers(plane), planes("D1")
    stranger.send(bytes(3 * MESSAGE_BYTES_MAX))
    stranger.letter(Step(2, b""), serial=1)  # after the reconnect
    friend.send(plane.endpoint, "P0", 0, Step(1, b""))
    assert sorted(message.number for message in bodies(read(plane, 2))) == [1, 2]
    assert drops(plane) == {}


def test_a_message_of_many_frames_does_not_keep_the_loop(planes: Any, strangers: Any) -> None:
    plane = planes("P0")
    stranger = strangers(plane)
    stranger.send(*[b"x"] * 5000)
    stranger.letter(Step(1, b""), serial=1)
    end = time.monotonic() + PATIENCE_S
    while not (inbox := plane.receive(limit=100)):
        assert len(plane._partial) <= 4  # the rest is read and thrown away
        assert time.monotonic() < end
    assert bodies(inbox) == [Step(1, b"")]
    assert drops(plane) == {"malformed": 1}


def test_random_frames_end_nothing(planes: Any, strangers: Any) -> None:
    plane = planes("P0")
    stranger, chance = strangers(plane), random.Random(4)
    good = encode(GOOD, [Status(ROOM, 1, "Failed", "cause")])[0]
    for _ in range(2000):
        frames = [chance.randbytes(chance.randrange(60)) for _ in range(chance.choice((1, 1, 2, 3, 9)))]
        if chance.random() < 0.5:
            place = chance.randrange(len(good))
            frames = [good[:place] + chance.randbytes(1) + good[place + 1 :]]
        stranger.send(*frames)
    stranger.letter(Step(1, b""), serial=1, node="D7")
    inbox = read(plane, 2001)
    assert inbox[-1][1] == Step(1, b"")
    assert drops(plane)["malformed"] > 500
    assert len(plane._senders) < 2000


def test_bytes_that_are_not_zeromq_end_nothing(planes: Any) -> None:
    plane, friend = planes("P0"), planes("D0")
    address = ("127.0.0.1", int(plane.endpoint.rpartition(":")[2]))
    for noise in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 5000, b""):
        with socket.create_connection(address, timeout=PATIENCE_S) as connection:
            connection.sendall(noise)
    friend.send(plane.endpoint, "P0", 0, Ping(3))
    assert bodies(read(plane, 1)) == [Ping(3)]
    assert drops(plane) == {}


# --- lives, duplicates, gaps ----------------------------------------------------------------------


def test_a_duplicate_is_dropped(planes: Any, strangers: Any) -> None:
    plane = planes()
    stranger = strangers(plane)
    for serial in (1, 2, 2, 1, 3, 3):
        stranger.letter(Step(serial, b""), serial)
    assert [message.number for message in bodies(read(plane, 6))] == [1, 2, 3]
    assert drops(plane) == {"duplicate": 3}


def test_a_former_life_is_not_heard_any_more(planes: Any, strangers: Any) -> None:
    plane = planes()
    stranger = strangers(plane)
    stranger.letter(Step(1, b""), serial=90, epoch=4)
    stranger.letter(Step(2, b""), serial=1, epoch=5)  # its new life counts from the beginning
    stranger.letter(Step(3, b""), serial=91, epoch=4)
    stranger.letter(Step(4, b""), serial=2, epoch=5)
    assert [message.number for message in bodies(read(plane, 4))] == [1, 2, 4]
    assert drops(plane) == {"stale_sender": 1}
    assert plane.missed == 0


def test_the_epoch_of_a_room_is_left_to_the_machine(planes: Any, strangers: Any) -> None:
    """Mail for a room of a former life is answered by the machine (R1), so it must get there."""
    plane = planes(epoch=3)
    strangers(plane).letter(AbortAck(Incarnation(7, 0, 1), 0), serial=1, target_epoch=3)
    assert bodies(read(plane, 1)) == [AbortAck(Incarnation(7, 0, 1), 0)]


def test_both_ends_learn_of_a_gap(planes: Any, strangers: Any) -> None:
    """B63: what a disconnect lost is said again only if somebody knows that it was lost."""
    plane, sender = planes("P0"), planes("D0")
    stranger = strangers(plane)
    for serial in (5, 6, 9):
        stranger.letter(Step(serial, b""), serial, endpoint=sender.endpoint)
    inbox = read(plane, 3)
    assert bodies(inbox) == [Step(5, b""), Step(6, b""), Missed(2), Step(9, b"")]
    assert inbox[2][0].node == "D0"
    assert bodies(read(sender, 1)) == [Missed(2)]
    assert plane.missed == 2
    sender.send(plane.endpoint, "P0", 0, Ping(1))  # the notice is not itself answered by another
    assert not [m for m in bodies(read(plane, 1)) if isinstance(m, Missed)]


def test_a_message_that_could_not_be_read_is_no_gap(planes: Any, strangers: Any) -> None:
    plane = planes()
    stranger = strangers(plane)
    stranger.letter(Step(1, b""), serial=1)
    stranger.send(tampered([99, 0], serial=2))
    stranger.letter(Step(3, b""), serial=3)
    assert bodies(read(plane, 3)) == [Step(1, b""), Step(3, b"")]
    assert (drops(plane), plane.missed) == ({"unknown_type": 1}, 0)


def test_what_can_be_read_of_a_frame_arrives(planes: Any, strangers: Any) -> None:
    plane = planes()
    stranger = strangers(plane)
    envelope = ["D0", 0, GOOD.endpoint, 1, "P0", 0]
    bodies_sent = [Step(1, b""), [99, 0], Step(3, b"")]
    stranger.send(b"KVP" + bytes([VERSION]) + bytes(16) + msgspec.msgpack.encode((envelope, bodies_sent)))
    stranger.letter(Step(4, b""), serial=4)
    inbox = read(plane, 4)
    assert [(e.serial, m) for e, m in inbox] == [(1, Step(1, b"")), (3, Step(3, b"")), (4, Step(4, b""))]
    assert (drops(plane), plane.missed) == ({"unknown_type": 1}, 0)


def test_an_unreadable_duplicate_counts_once(planes: Any, strangers: Any) -> None:
    plane = planes()
    stranger = strangers(plane)
    stranger.letter(Step(1, b""), serial=2)
    stranger.send(tampered([99, 0], serial=2))
    read(plane, 2)
    assert drops(plane) == {"duplicate": 1}


def test_only_known_peers_are_heard_if_there_is_a_list(planes: Any, strangers: Any) -> None:
    plane = planes(known=lambda node: node == "D0")
    stranger = strangers(plane)
    stranger.letter(Step(1, b""), serial=1, node="D6")
    stranger.letter(Step(2, b""), serial=1, node="D0")
    assert bodies(read(plane, 2)) == [Step(2, b"")]
    assert drops(plane) == {"unknown_peer": 1}
    assert list(plane._senders) == ["D0"]
