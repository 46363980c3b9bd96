"""The control plane over real ZeroMQ sockets, within one process: what arrives, what is dropped, what is bounded."""

from __future__ import annotations

import gc
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from kvpoll.runtime.control.messages import (
    MESSAGE_BYTES_MAX,
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
from kvpoll.runtime.control.plane import CALL_BOUND_S, CLOSE_BOUND_S, DROPPED, ControlPlane
from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Incarnation

PATIENCE_S = 30.0
ROOM = Incarnation(7, 1, 0)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Stranger:
    """A PUSH socket that sends whatever frames it is given, as fast as the plane takes them."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PUSH)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, int(PATIENCE_S * 1000))
        self.socket.connect(endpoint)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def letter(self, message: Any, serial: int, node: str = "D0", epoch: int = 0, target_epoch: int | None = 0,
               target: str = "P0", endpoint: str = "tcp://127.0.0.1:9", token: bytes | None = None) -> None:  # fmt: skip
        self.send(*encode(Envelope(node, epoch, endpoint, serial, target, target_epoch), message, token))

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def planes() -> Iterator[Callable[..., ControlPlane]]:
    made: list[ControlPlane] = []

    def make(node: str = "P0", epoch: int = 0, **rest: Any) -> ControlPlane:
        made.append(ControlPlane(node, epoch, **rest))
        return made[-1]

    yield make
    for plane in made:
        plane.close()


@pytest.fixture
def strangers() -> Iterator[Callable[[ControlPlane], Stranger]]:
    made: list[Stranger] = []

    def make(plane: ControlPlane) -> Stranger:
        made.append(Stranger(plane.endpoint))
        return made[-1]

    yield make
    for stranger in made:
        stranger.close()


def read(plane: ControlPlane, messages: int, limit: int = 1024) -> list[Any]:
    """What the plane delivers until it has seen so many messages, delivered or dropped."""
    inbox: list[Any] = []
    end = time.monotonic() + PATIENCE_S
    seen_before = seen(plane)
    while seen(plane) - seen_before < messages:
        assert time.monotonic() < end, f"{seen(plane) - seen_before} of {messages} messages came: {plane.dropped}"
        plane.wait(0.1)
        inbox += plane.receive(limit)
    return inbox


def seen(plane: ControlPlane) -> int:
    return plane.received + sum(plane.dropped.values())


def drops(plane: ControlPlane) -> dict[str, int]:
    return {reason: count for reason, count in plane.dropped.items() if count}


def bodies(inbox: list[Any]) -> list[Any]:
    return [message for _, message in inbox]


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
    return b"KVP\x01" + bytes(16) + msgspec.msgpack.encode((envelope, body))


BAD_FRAMES = {
    "foreign": [[b"ABORT", b"7"], [b"7", b"4", b"0"], [b"None", b"10.0.0.1", b"41000"], [b"NixlMsgGuard", b"None"]],
    "malformed": [[b""], [b"", b"", b""], [b"KVP"], [b"GET /"], [tampered([5])], [tampered(["x"], 2)], [tampered([5, 1]), b""]],
    "wrong_version": [[b"KVP\x02" + tampered([5, 1])[4:]]],
    "wrong_token": [encode(GOOD, Ping(1), b"theirs")],
    "unknown_type": [[tampered([99, 1])]],
    "oversized": [[b"KVP\x01" + bytes(MESSAGE_BYTES_MAX)]],
    "wrong_target": [
        encode(msgspec.structs.replace(GOOD, target="P1"), Ping(1)),
        encode(msgspec.structs.replace(GOOD, target_epoch=6), Ping(1)),
        encode(msgspec.structs.replace(GOOD, target_epoch=8), Ping(1)),
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
        assert time.monotonic() < end
    assert bodies(inbox) == [Step(1, b"")]
    assert drops(plane) == {"malformed": 1}


def test_random_frames_end_nothing(planes: Any, strangers: Any) -> None:
    plane = planes("P0")
    stranger, chance = strangers(plane), random.Random(4)
    good = encode(GOOD, Status(ROOM, 1, "Failed", "cause"))[0]
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


# --- bounds ---------------------------------------------------------------------------------------


def test_ten_thousand_names_do_not_grow_the_table(planes: Any, strangers: Any) -> None:
    """R2: the one that was silent for longest is forgotten first."""
    plane = planes(senders_max=100)
    stranger = strangers(plane)
    for number in range(10_000):
        stranger.letter(Step(number, b""), serial=1, node=f"D{number}")
        if number % 50 == 0:
            stranger.letter(Step(0, b""), serial=number // 50 + 1, node="regular")
    read(plane, 10_200)
    assert len(plane._senders) == 100
    assert "regular" in plane._senders
    assert plane.channels == ()


def test_memory_does_not_grow_with_traffic(planes: Any, strangers: Any) -> None:
    plane = planes(senders_max=50)
    stranger = strangers(plane)

    def round_of(offset: int) -> int:
        for number in range(offset, offset + 3000):
            stranger.letter(Step(number, b"x"), serial=number + 1, node=f"D{number % 70}", endpoint="tcp://127.0.0.1:9")
        read(plane, 3000)
        gc.collect()
        return sum(
            len(table) for table in (plane._senders, plane._channels, plane._serials, plane._gaps, plane._partial)
        )

    assert round_of(0) == round_of(3000) == round_of(6000) <= 60


def test_pings_from_anywhere_open_no_more_channels_than_allowed(planes: Any, strangers: Any) -> None:
    """An answer goes where the envelope says, and a stranger may say anything. It must not cost a peer its channel."""
    plane, friend = planes("P0", channels_max=4), planes("D0")
    plane.send(friend.endpoint, "D0", 0, Step(1, b""))
    stranger = strangers(plane)
    for number in range(20):
        stranger.letter(Ping(number), serial=1, node=f"X{number}", endpoint=f"tcp://127.0.0.1:{number + 1}")
    read(plane, 20)
    assert len(plane.channels) == 4
    assert friend.endpoint in plane.channels
    assert drops(plane) == {"too_many_peers": 17}


def test_the_quietest_channel_makes_room_but_no_busy_one(planes: Any) -> None:
    clock = Clock()
    plane, others = planes("P0", channels_max=2, clock=clock), [planes(f"D{n}") for n in range(3)]
    first, second, third = (other.endpoint for other in others)
    assert plane.send(first, "D0", 0, Step(1, b""))
    clock.now += 1
    assert plane.send(second, "D1", 0, Step(1, b""))
    assert not plane.send(third, "D2", 0, Step(1, b""))
    assert drops(plane) == {"too_many_peers": 1}
    clock.now += 9.5
    assert plane.send(third, "D2", 0, Step(1, b""))
    assert set(plane.channels) == {second, third}


def test_an_idle_channel_is_closed_and_the_next_message_is_no_duplicate(planes: Any) -> None:
    clock = Clock()
    plane, other = planes("P0", clock=clock, channel_idle_s=60), planes("D0")
    for number in range(3):
        plane.send(other.endpoint, "D0", 0, Step(number, b""))
    read(other, 3)
    clock.now += 59
    plane.receive()
    assert plane.channels == (other.endpoint,)
    clock.now += 2
    plane.receive()
    assert plane.channels == ()
    plane.send(other.endpoint, "D0", 0, Step(3, b""))
    assert bodies(read(other, 1)) == [Step(3, b"")]
    assert (drops(other), other.missed) == ({}, 0)


def test_a_channel_forgotten_altogether_goes_on_above_all_serials(planes: Any) -> None:
    plane, others = planes("P0", channels_max=1), [planes(f"D{n}") for n in range(3)]
    for number in range(4):
        for other in others:
            plane.send(other.endpoint, other.node, 0, Step(number, b""))
            assert Step(number, b"") in bodies(read(other, 1))
            plane.retire(other.endpoint)
    assert [drops(other) for other in others] == [{}, {}, {}]
    assert len(plane._serials) == 1


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "tcp://",
        "ipc:///tmp/x",
        "inproc://x",
        "tcp://*:1",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
    ],
)
def test_an_endpoint_that_is_none_is_refused(planes: Any, endpoint: str) -> None:
    plane = planes()
    assert plane.send(endpoint, "D0", 0, Ping(1)) is False
    assert drops(plane) == {"unusable_endpoint": 1}
    assert plane.channels == ()


def test_what_cannot_be_encoded_is_counted_and_known_to_the_peer(planes: Any) -> None:
    plane, other = planes("P0"), planes("D0")
    assert plane.send(other.endpoint, "D0", 0, Step(0, b""))
    assert plane.send(other.endpoint, "D0", 0, Step(1, bytes(MESSAGE_BYTES_MAX))) is False
    assert plane.send(other.endpoint, "D0", 0, Step(-1, b"")) is False
    assert plane.send(other.endpoint, "D0", 0, Step(2, b""))
    assert drops(plane) == {"unencodable": 2}
    assert bodies(read(other, 2)) == [Step(0, b""), Missed(2), Step(2, b"")]


# --- nobody waits (A19) ---------------------------------------------------------------------------


def slowest_s(call: Callable[[], Any], times: int) -> float:
    worst = 0.0
    for _ in range(times):
        begun = time.monotonic()
        call()
        worst = max(worst, time.monotonic() - begun)
    return worst


def deaf_tcp() -> tuple[socket.socket, str]:
    """Listens, and the kernel accepts; nobody ever reads."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def nobody() -> str:
    """An endpoint at which nobody listens: the port was free a moment ago."""
    listener, endpoint = deaf_tcp()
    listener.close()
    return endpoint


@pytest.mark.parametrize("kind", ["absent", "deaf", "never reads"])
def test_a_peer_that_does_not_read_costs_its_own_messages_only(planes: Any, kind: str) -> None:
    plane, friend = planes("P0", queue_messages=50), planes("D0")
    listener, endpoint = deaf_tcp()
    if kind == "never reads":
        endpoint = planes("D1", queue_messages=50).endpoint  # it answers the handshake, then nobody calls receive
    if kind == "absent":
        endpoint = nobody()
    payload = Step(0, bytes(200_000))
    assert slowest_s(lambda: plane.send(endpoint, "D1", 0, payload), 400) < CALL_BOUND_S
    assert drops(plane).get("queue_full", 0) >= 200
    assert list(drops(plane)) == ["queue_full"]
    assert plane.send(friend.endpoint, "D0", 0, Ping(1))
    assert bodies(read(friend, 1)) == [Ping(1)]
    assert slowest_s(plane.close, 1) < CLOSE_BOUND_S
    listener.close()


def test_a_lingering_close_is_bounded_too(planes: Any) -> None:
    plane = planes()
    plane.send(nobody(), "D0", 0, Goodbye())
    assert slowest_s(lambda: plane.close(linger_s=60), 1) < CLOSE_BOUND_S


def test_a_name_that_does_not_resolve_makes_nobody_wait(planes: Any) -> None:
    plane = planes()
    endpoint = "tcp://no-such-host.invalid:1"
    assert slowest_s(lambda: plane.send(endpoint, "D0", 0, Ping(1)), 5) < CALL_BOUND_S
    assert slowest_s(plane.receive, 5) < CALL_BOUND_S
    assert slowest_s(plane.close, 1) < CLOSE_BOUND_S


def test_what_was_dropped_at_a_full_queue_is_noticed_when_it_moves(planes: Any) -> None:
    plane, other = planes("P0", queue_messages=5), planes("D0", queue_messages=5)
    number = 0
    while plane.dropped["queue_full"] < 10:
        number += 1
        plane.send(other.endpoint, "D0", 0, Step(number, bytes(500_000)))
    inbox = read(other, plane.sent)
    while not plane.send(other.endpoint, "D0", 0, Step(0, b"")):
        time.sleep(0.01)
    inbox += read(other, 1)
    assert any(isinstance(message, Missed) for message in bodies(inbox))
    assert other.missed == plane.dropped["queue_full"]
    assert any(isinstance(message, Missed) for message in bodies(read(plane, 1)))


# --- waiting and waking ---------------------------------------------------------------------------


def test_wake_ends_a_wait_from_any_thread(planes: Any) -> None:
    plane = planes()
    waker = threading.Timer(0.05, plane.wake)
    waker.start()
    assert plane.wait(PATIENCE_S) is True
    assert plane.receive() == []
    waker.join()
    assert plane.wait(0.0) is False  # it was taken


def test_a_wake_before_the_wait_is_not_lost_and_many_are_one(planes: Any) -> None:
    plane = planes()
    for _ in range(100_000):  # more than a pipe holds: nobody may block on it
        plane.wake()
    assert plane.wait(PATIENCE_S) is True
    assert plane.wait(0.0) is False


def test_a_message_ends_a_wait_and_nothing_does_not(planes: Any) -> None:
    plane, other = planes("P0"), planes("D0")
    assert plane.wait(0.01) is False
    other.send(plane.endpoint, "P0", 0, Ping(1))
    assert plane.wait(PATIENCE_S) is True
    assert bodies(plane.receive()) == [Ping(1)]


def test_a_loop_can_wait_for_it_with_a_poller_of_its_own(planes: Any) -> None:
    plane, other = planes("P0"), planes("D0")
    poller = zmq.Poller()
    plane.attach(poller)
    other.send(plane.endpoint, "P0", 0, Ping(1))
    assert poller.poll(PATIENCE_S * 1000)
    assert bodies(plane.receive()) == [Ping(1)]
    plane.wake()
    assert [fileno for fileno, _ in poller.poll(PATIENCE_S * 1000)] == [plane.filenos()[1]]
    plane.clear_wake()
    assert poller.poll(0) == []
    assert len(set(plane.filenos())) == 2


def test_a_second_thread_is_sent_away(planes: Any) -> None:
    """A26: two threads on one socket mixed the frames of their messages."""
    plane = planes()
    plane.receive()
    caught: list[Exception] = []

    def intrude() -> None:
        for call in (plane.receive, plane.close, lambda: plane.send(plane.endpoint, "P0", 0, Ping(1))):
            try:
                call()
            except RuntimeError as error:
                caught.append(error)

    intruder = threading.Thread(target=intrude)
    intruder.start()
    intruder.join()
    assert len(caught) == 3
    assert "two threads" in str(caught[0])


def test_it_can_be_handed_to_another_thread(planes: Any) -> None:
    plane = planes()
    plane.send(plane.endpoint, "P0", 0, Ping(1))
    plane.hand_over()
    inbox: list[Any] = []

    def own() -> None:
        inbox.extend(read(plane, 1))
        plane.hand_over()

    loop = threading.Thread(target=own)
    loop.start()
    loop.join()
    assert bodies(inbox) == [Ping(1)]


# --- beginning and end ----------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_close_leaves_no_file_and_may_be_called_twice(planes: Any) -> None:
    planes("warm").close()
    before = open_files()
    plane = planes()
    plane.send(plane.endpoint, "P0", 0, Ping(1))
    read(plane, 1)
    assert open_files() > before
    plane.close()
    plane.close()
    assert open_files() == before


def test_after_the_end_nothing_happens(planes: Any) -> None:
    with planes() as plane:
        pass
    assert plane.send(plane.endpoint, "P0", 0, Ping(1)) is False
    assert drops(plane) == {"closed": 1}
    assert plane.receive() == []
    assert plane.wait(PATIENCE_S) is False
    assert not plane.pending()
    plane.wake()


BAD_STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "a host that is elsewhere": ({"host": "192.0.2.1"}, r"^tcp://192\.0\.2\.1:0: cannot listen here: .*; give a host"),
    "a port beyond the last": ({"port": 65_536}, "port 65536 does not exist; choose one up to 65535, or 0"),
    "a port below the first": ({"port": -1}, "port -1 does not exist; choose one"),
    "a host that is no name": ({"host": "not a host"}, "is not a host name or address; give one"),
    "every interface": ({"host": "0.0.0.0"}, "say which one to advertise"),
    "no name": ({"node": ""}, "1 to 128 characters"),
    "a name without end": ({"node": "P" * 129}, "1 to 128 characters"),
    "an epoch below zero": ({"epoch": -1}, "63 bits"),
    "an empty token": ({"token": b""}, "give 1 to 64"),
    "a token that is too long": ({"token": b"k" * 65}, "give 1 to 64"),
}


@pytest.mark.parametrize("settings, complaint", BAD_STARTS.values(), ids=BAD_STARTS)
def test_a_bad_start_is_one_clear_line_and_leaves_nothing(settings: dict[str, Any], complaint: str) -> None:
    ControlPlane("warm", 0).close()
    before = open_files()
    with pytest.raises(BadInput, match=complaint) as caught:
        ControlPlane(**{"node": "P0", "epoch": 0, **settings})
    assert "\n" not in str(caught.value)
    assert open_files() == before


def test_a_port_that_is_taken_is_said(planes: Any) -> None:
    port = int(planes().endpoint.rpartition(":")[2])
    with pytest.raises(BadInput, match=f"127.0.0.1:{port}: cannot listen here: Address already in use; choose another"):
        ControlPlane("P1", 0, port=port)


def test_an_advertised_name_is_what_peers_are_told(planes: Any) -> None:
    plane, other = planes("P0", host="0.0.0.0", advertise="localhost"), planes("D0")
    assert plane.endpoint.startswith("tcp://localhost:")
    other.send(plane.endpoint, "P0", 0, Ping(1))
    assert bodies(read(plane, 1)) == [Ping(1)]


def test_every_reason_is_a_number_from_the_beginning(planes: Any) -> None:
    """A metric that appears only with the first drop cannot be alerted on."""
    assert planes().dropped == dict.fromkeys(DROPPED, 0)
    assert len(set(DROPPED)) == len(DROPPED)
