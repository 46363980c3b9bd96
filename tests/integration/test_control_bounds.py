"""The control plane's bounds: no table grows without end, and no call waits for a peer (R2, A19)."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq
from control_stage import Clock, bodies, drops, making_planes, making_strangers, read

from kvpoll.runtime.control.messages import MESSAGE_BYTES_MAX, Goodbye, Missed, Ping, Step
from kvpoll.runtime.control.plane import CALL_BOUND_S, CLOSE_BOUND_S

planes = pytest.fixture(making_planes)
strangers = pytest.fixture(making_strangers)


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


def test_whoever_was_silent_for_longest_is_forgotten_first(planes: Any, strangers: Any) -> None:
    plane = planes(senders_max=3)
    stranger = strangers(plane)
    for number, node in enumerate(("A", "B", "C", "A", "D"), start=1):
        stranger.letter(Goodbye(), serial=number if node != "A" else 1 + number // 4, node=node)
    read(plane, 5)
    assert list(plane._senders) == ["C", "A", "D"]
    stranger.letter(Goodbye(), serial=2, node="A")
    read(plane, 1)
    assert drops(plane) == {"duplicate": 1}


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
    clock = Clock()
    plane, friend = planes("P0", channels_max=4, clock=clock), planes("D0")
    plane.send(friend.endpoint, "D0", 0, Step(1, b""))
    clock.now += 100  # long enough for the peer's channel to make room for a message of our own
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


def test_a_silent_connection_is_found_by_tcp_and_by_zmtp(planes: Any) -> None:
    """A host that lost its power closes nothing; its sockets would stay for ever."""
    plane = planes()
    plane.send(plane.endpoint, "P0", 0, Ping(1))
    for each in (plane._pull, plane._channels[plane.endpoint].socket):
        assert each.getsockopt(zmq.TCP_KEEPALIVE) == 1
        assert each.getsockopt(zmq.HEARTBEAT_IVL) == 10_000 < each.getsockopt(zmq.HEARTBEAT_TIMEOUT)
        assert each.getsockopt(zmq.LINGER) == 0
    assert plane._pull.getsockopt(zmq.RCVHWM) == plane._channels[plane.endpoint].socket.getsockopt(zmq.SNDHWM) == 4096


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
