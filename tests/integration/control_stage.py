"""A stage for the control plane: planes that are closed afterwards, strangers who send any frames, and readers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq

from kvpoll.runtime.control.messages import Envelope, encode
from kvpoll.runtime.control.plane import ControlPlane

PATIENCE_S = 30.0


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
        self.send(*encode(Envelope(node, epoch, endpoint, serial, target, target_epoch), [message], token))

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


def making_planes() -> Iterator[Callable[..., ControlPlane]]:
    """For a fixture: makes planes, and closes them all."""
    made: list[ControlPlane] = []

    def make(node: str = "P0", epoch: int = 0, **rest: Any) -> ControlPlane:
        made.append(ControlPlane(node, epoch, **rest))
        return made[-1]

    yield make
    for plane in made:
        plane.close()


def making_strangers() -> Iterator[Callable[[ControlPlane], Stranger]]:
    """For a fixture: makes strangers who speak to a plane, and closes them all."""
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
