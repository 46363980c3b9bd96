"""The control plane and its heartbeats between real processes that are stopped, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvpoll.runtime.control.heartbeat import Heartbeats
from kvpoll.runtime.control.measure import Figures, MeasurementFailed, measure
from kvpoll.runtime.control.messages import Command, Goodbye, Missed, Ping, Pong, Reply, Step
from kvpoll.runtime.control.plane import CALL_BOUND_S, CLOSE_BOUND_S, ControlPlane
from kvpoll.spec.protocol import load
from kvpoll.statemachine.roles import Machines

PATIENCE_S = 30.0

FAR = """
import os, sys
from kvpoll.runtime.control.messages import Command, Goodbye, Reply
from kvpoll.runtime.control.plane import ControlPlane

node, epoch, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
plane = ControlPlane(node, epoch, port=port, queue_messages=200)
print(plane.endpoint, flush=True)
parent = os.getppid()
while os.getppid() == parent:
    plane.wait(0.2)
    for envelope, message in plane.receive():
        if isinstance(message, Command):
            told = Reply(message.payload.decode(), message.kind, "prefill", str(plane.dropped["wrong_target"]))
            plane.send(envelope.endpoint, envelope.node, envelope.epoch, told)
        elif isinstance(message, Goodbye):
            plane.close(linger_s=1.0)
            sys.exit(0)
"""


class Far:
    """A rank in a process of its own: it answers pings, and every Command with a Reply."""

    def __init__(self, node: str = "P0", epoch: int = 0, port: int = 0) -> None:
        self.node, self.epoch = node, epoch
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", FAR, node, str(epoch), str(port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        assert self.endpoint, "the far process did not start"

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # SIGKILL ends a stopped process too
        self.process.wait(timeout=PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def far() -> Iterator[Callable[..., Far]]:
    made: list[Far] = []

    def make(*arguments: Any) -> Far:
        made.append(Far(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def near() -> Iterator[ControlPlane]:
    with ControlPlane("D0", 0, queue_messages=200) as plane:
        yield plane


def hear(plane: ControlPlane, wanted: Callable[[Any], bool]) -> list[Any]:
    """Everything that arrives up to the first message that is wanted."""
    inbox: list[Any] = []
    end = time.monotonic() + PATIENCE_S
    while not any(wanted(message) for _, message in inbox):
        assert time.monotonic() < end, f"never heard; dropped {plane.dropped}, heard {inbox[-3:]}"
        plane.wait(0.1)
        inbox += plane.receive()
    return inbox


def ask(plane: ControlPlane, far: Far, what: str) -> Reply:
    assert plane.send(far.endpoint, far.node, far.epoch, Command("asked", what.encode()))
    inbox = hear(plane, lambda message: isinstance(message, Reply) and message.rid == what)
    reply = inbox[-1][1]
    assert isinstance(reply, Reply)
    return reply


def fill(plane: ControlPlane, far: Far, payload_bytes: int = 50_000) -> float:
    """Send until the queue to this peer is full; the longest that one send took, in seconds."""
    worst, dropped = 0.0, plane.dropped["queue_full"]
    while plane.dropped["queue_full"] < dropped + 100:
        begun = time.monotonic()
        plane.send(far.endpoint, far.node, far.epoch, Step(0, bytes(payload_bytes)))
        worst = max(worst, time.monotonic() - begun)
    return worst


def test_a_stopped_peer_makes_nobody_wait_and_knows_what_it_missed(near: ControlPlane, far: Any) -> None:
    """A19: one hung prefill froze the decode scheduler, and with it the traffic to everybody else."""
    hung, well = far("P0"), far("P1")
    ask(near, hung, "before")
    hung.signal(signal.SIGSTOP)
    assert fill(near, hung) < CALL_BOUND_S
    assert ask(near, well, "meanwhile").rid == "meanwhile"
    hung.signal(signal.SIGCONT)
    end = time.monotonic() + PATIENCE_S
    while not near.send(hung.endpoint, "P0", 0, Command("asked", b"after")):  # its queue has to move first
        assert time.monotonic() < end
        near.wait(0.05)
    inbox = hear(near, lambda message: isinstance(message, Missed))
    (missed,) = {message.count for _, message in inbox if isinstance(message, Missed)}
    assert missed == near.dropped["queue_full"]


def test_a_plane_closes_in_time_whatever_its_peers_do(far: Any) -> None:
    stopped, killed = far("P0"), far("P1")
    plane = ControlPlane("D0", 0, queue_messages=200)
    for peer in (stopped, killed):
        ask(plane, peer, "before")
    stopped.signal(signal.SIGSTOP)
    killed.kill()
    for peer in (stopped, killed):
        fill(plane, peer)
    begun = time.monotonic()
    plane.close(linger_s=0.5)
    assert time.monotonic() - begun < CLOSE_BOUND_S


def test_a_peer_that_restarts_at_its_address_gets_no_mail_of_its_predecessor(near: ControlPlane, far: Any) -> None:
    first = far("P0", 0)
    ask(near, first, "before")
    first.kill()
    for number in range(190):  # more than the dead connection can swallow, less than the queue holds
        near.send(first.endpoint, "P0", 0, Command("asked", b"too late %d" % number))
    second = far("P0", 1, first.port)
    assert second.endpoint == first.endpoint
    inbox_before = near.received
    reply = ask(near, second, "again")  # on the channel that the first one left behind
    assert near.received == inbox_before + 1  # no reply to what was meant for the first
    assert 1 <= int(reply.cause or 0) <= 190  # it did get that mail, and knew that it was not its own


def test_a_question_to_any_life_finds_the_new_one(near: ControlPlane, far: Any) -> None:
    first = far("P0", 0)
    ask(near, first, "before")
    first.kill()
    second = far("P0", 4, first.port)
    assert near.send(second.endpoint, "P0", None, Ping(9))
    envelope, message = hear(near, lambda message: isinstance(message, Pong))[-1]
    assert (message, envelope.epoch) == (Pong(9), 4)


def test_a_peer_that_restarts_elsewhere_is_reached_there(near: ControlPlane, far: Any) -> None:
    first = far("P0", 0)
    ask(near, first, "before")
    first.kill()
    second = far("P0", 1)
    assert second.endpoint != first.endpoint
    near.retire(first.endpoint)
    assert ask(near, second, "again").rid == "again"
    assert near.channels == (second.endpoint,)


def test_a_peer_that_starts_late_gets_what_waited_for_it(near: ControlPlane, far: Any) -> None:
    probe = far("P0")
    probe.kill()
    assert near.send(probe.endpoint, "P0", 1, Command("asked", b"early"))
    far("P0", 1, probe.port)
    reply = hear(near, lambda message: isinstance(message, Reply))[-1][1]
    assert reply.rid == "early"


def test_goodbye_ends_a_peer_in_good_order(near: ControlPlane, far: Any) -> None:
    peer = far("P0")
    ask(near, peer, "before")
    near.send(peer.endpoint, "P0", 0, Goodbye("scale-down"))
    assert peer.process.wait(timeout=PATIENCE_S) == 0


# --- heartbeats over the plane --------------------------------------------------------------------

INTERVAL_S = 0.25
"""Generous for a process that answers at once, even on a loaded machine with the misses below."""
MISSES = 8


class Watch:
    """A rank's loop with heartbeats: receive, tell the detector, tick."""

    def __init__(self, plane: ControlPlane, *peers: Far) -> None:
        protocol = load()
        rules = {"heartbeat_interval_s": INTERVAL_S, "heartbeat_max_failure": MISSES}
        profile = protocol.profile("reference").with_rules(rules)
        self.plane = plane
        self.endpoints = {peer.node: peer.endpoint for peer in peers}
        self.said: list[tuple[Any, ...]] = []
        self.heard = 0
        self.beats = Heartbeats(
            Machines(protocol, profile), profile, time.monotonic(),
            lambda node, serial: self.send(node, serial),
            lambda node: self.said.append(("suspected", node)),
            lambda node, epoch: self.said.append(("dead", node, epoch)),
            lambda node: self.said.append(("restored", node)),
        )  # fmt: skip
        for peer in peers:
            self.beats.watch(peer.node, peer.epoch)

    def send(self, node: str, serial: int) -> None:
        self.plane.send(self.endpoints[node], node, None, Ping(serial))

    def turn(self) -> None:
        for envelope, _ in self.plane.receive():
            self.heard += 1
            self.beats.heard(envelope.node, envelope.epoch)
        due = self.beats.tick(time.monotonic())
        self.plane.wait(due - time.monotonic())

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"said {self.said}, gaps {self.beats.gaps}"
            self.turn()


def test_a_stopped_peer_is_suspected_never_dead_and_restored_when_it_goes_on(near: ControlPlane, far: Any) -> None:
    peer, other = far("P0"), far("P1")
    watch = Watch(near, peer, other)
    watch.until(lambda: watch.heard >= 4)
    peer.signal(signal.SIGSTOP)
    watch.until(lambda: ("suspected", "P0") in watch.said)
    peer.signal(signal.SIGCONT)
    watch.until(lambda: ("restored", "P0") in watch.said)
    assert not [word for word in watch.said if word[0] == "dead" or word == ("suspected", "P1")]


def test_a_killed_peer_is_dead_when_its_successor_answers(near: ControlPlane, far: Any) -> None:
    peer = far("P0", 6)
    watch = Watch(near, peer)
    watch.until(lambda: watch.heard >= 2)
    peer.kill()
    watch.until(lambda: ("suspected", "P0") in watch.said)
    far("P0", 7, peer.port)
    watch.until(lambda: ("restored", "P0") in watch.said)
    assert [word for word in watch.said if word[0] == "dead"] == [("dead", "P0", 6)]
    assert watch.said.index(("suspected", "P0")) < watch.said.index(("dead", "P0", 6))


def test_a_restart_faster_than_the_heartbeat_is_noticed(near: ControlPlane, far: Any) -> None:
    """A20, A21: SGLang's probe of the server saw nothing, and requests died one by one at their deadlines."""
    peer = far("P0", 0)
    watch = Watch(near, peer)
    watch.until(lambda: watch.heard >= 2)
    peer.kill()
    far("P0", 1, peer.port)
    watch.until(lambda: ("dead", "P0", 0) in watch.said)
    assert watch.beats.state_of("P0") == ("Alive", 1, 0)


SLEEPER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_control_processes import Watch
from kvpoll.runtime.control.plane import ControlPlane

class Peer:
    node, endpoint, epoch = "P0", sys.argv[2], 0

plane = ControlPlane("D0", 0)
watch = Watch(plane, Peer)
watch.until(lambda: watch.heard >= 3)
print("watching", flush=True)
watch.until(lambda: watch.beats.gaps >= 1)
heard = watch.heard
watch.until(lambda: watch.heard >= heard + 3)
print(watch.said, flush=True)
plane.close()
"""


def test_who_was_stopped_itself_suspects_nobody(far: Any) -> None:
    """SIGSTOP of the watcher for longer than all misses together: it wakes, and its peers were well all the time."""
    peer = far("P0")
    folder = os.path.dirname(__file__)  # noqa: PTH120
    watcher = subprocess.Popen(
        [sys.executable, "-P", "-c", SLEEPER, folder, peer.endpoint], stdout=subprocess.PIPE, text=True
    )
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "watching\n"
        os.kill(watcher.pid, signal.SIGSTOP)
        time.sleep(INTERVAL_S * (MISSES + 2))  # what is tested is this very pause
        os.kill(watcher.pid, signal.SIGCONT)
        assert watcher.communicate(timeout=PATIENCE_S)[0] == "[]\n"
    finally:
        watcher.kill()
        watcher.wait()


# --- the measurement ------------------------------------------------------------------------------


def test_the_measurement_measures_and_loses_nothing() -> None:
    figures = measure(messages=3000, round_trips=50)
    assert isinstance(figures, Figures)
    assert figures.lost == 0
    assert figures.status_per_s > 0 < figures.metadata_per_s
    assert 0 < figures.round_trip_us_p50 <= figures.round_trip_us_p99
    assert figures.status_bytes < figures.metadata_bytes < 1000


def test_a_measurement_without_its_far_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MeasurementFailed, match="ended with status 1 before it listened"):
        measure(messages=10, round_trips=1)
