"""The control plane from its start to its end: waiting, waking, threads, bad starts, and what is left behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import zmq
from control_stage import PATIENCE_S, bodies, drops, making_planes, read

from kvpoll.runtime.control.messages import Ping
from kvpoll.runtime.control.plane import DROPPED, ControlPlane
from kvpoll.spec.source import BadInput

planes = pytest.fixture(making_planes)


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
