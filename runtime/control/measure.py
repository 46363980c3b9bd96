"""How fast the control plane is between two real processes on this machine: messages a second and round trips.

The far process is this module run as a program: a loop that receives, and thereby answers pings. Nothing is simulated
or subtracted: encoding, both queues, loopback TCP, decoding and all checks of both planes are in the figures.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

from kvpoll.runtime.control.messages import (
    Envelope,
    Goodbye,
    Message,
    Metadata,
    Ping,
    Pong,
    Status,
    encode,
    pack_pages,
)
from kvpoll.runtime.control.plane import ControlPlane
from kvpoll.spec.vocabulary import Incarnation

ANSWER_S = 30.0
"""How long one answer of the far process may take before the measurement gives up."""

BATCH = 256
BATCHES_IN_FLIGHT = 3
"""Together well below the half of the queue that is certain to be free (``plane.QUEUE_MESSAGES``)."""

PAGES = 64


class Figures(NamedTuple):
    """Rates are messages that arrived and were checked, per second, one way; latencies are microseconds there and
    back. ``lost`` counts what either plane dropped, which must be 0 for the figures to mean anything.
    """

    status_per_s: float
    metadata_per_s: float
    round_trip_us_p50: float
    round_trip_us_p99: float
    round_trips: int
    status_bytes: int
    metadata_bytes: int
    lost: int


class MeasurementFailed(Exception):
    """The far process did not start or did not answer. The message is one line."""


def measure(messages: int = 50_000, round_trips: int = 2_000) -> Figures:
    """Measure with a second process; takes some seconds. Raises MeasurementFailed."""
    room = Incarnation(2**62, 1, 0)
    status = Status(room, 0, "Success")
    metadata = Metadata(room, 0, 1, room, pack_pages(range(PAGES)), 0, bytes(128), bytes(64))
    with ControlPlane("near", 0) as plane, _Far(plane) as far:
        far.rate(status, messages // 10)  # warm
        status_per_s = far.rate(status, messages)
        metadata_per_s = far.rate(metadata, messages)
        trips = np.array([far.round_trip_us() for _ in range(round_trips)])
        envelope = Envelope("near", 0, plane.endpoint, 1, "far", 0)
        return Figures(
            status_per_s,
            metadata_per_s,
            float(np.percentile(trips, 50)),
            float(np.percentile(trips, 99)),
            round_trips,
            len(encode(envelope, [status])[0]),
            len(encode(envelope, [metadata])[0]),
            sum(plane.dropped.values()) + plane.missed + far.missed,
        )


class _Far:
    """The far process, seen from the near plane."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.missed = 0
        self._serial = 0
        self._heard = 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kvpoll.runtime.control.measure"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        self._endpoint = self._process.stdout.readline().strip() if ready else ""

    def __enter__(self) -> _Far:
        if not self._endpoint:
            self._end()
            raise MeasurementFailed(f"the far process ended with status {self._process.returncode} before it listened")
        return self

    def __exit__(self, *_: object) -> None:
        self.plane.send(self._endpoint, "far", 0, Goodbye("measured"))
        self._end()

    def _end(self) -> None:
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def rate(self, message: Message, count: int) -> float:
        """Messages per second one way; a ping after each batch says that the batch has been read."""
        begun = time.perf_counter()
        batches = max(1, count // BATCH)
        first = self._serial + 1
        for batch in range(batches):
            for _ in range(BATCH):
                self._send(message)
            self._ping()
            self._await(first + batch - BATCHES_IN_FLIGHT)
        self._await(self._serial)
        return batches * BATCH / (time.perf_counter() - begun)

    def round_trip_us(self) -> float:
        begun = time.perf_counter()
        self._ping()
        self._await(self._serial)
        return (time.perf_counter() - begun) * 1e6

    def _ping(self) -> None:
        self._serial += 1
        self._send(Ping(self._serial))

    def _send(self, message: Message) -> None:
        if not self.plane.send(self._endpoint, "far", 0, message):
            dropped = {reason: count for reason, count in self.plane.dropped.items() if count}
            raise MeasurementFailed(f"a message could not be queued: {dropped}")

    def _await(self, serial: int) -> None:
        """Until the pong of this serial, or a later one, has come."""
        deadline = time.monotonic() + ANSWER_S
        while self._heard < serial:
            self.plane.wait(0.1)
            for _, message in self.plane.receive():
                if isinstance(message, Pong):
                    self._heard = message.serial
                else:
                    self.missed += 1  # only a Missed can come from a loop that says nothing else
            if time.monotonic() > deadline:
                raise MeasurementFailed(f"no answer within {ANSWER_S:g} s")


def _serve() -> None:
    """The far process: say where it listens, read until a Goodbye, or until the near process is gone."""
    parent = os.getppid()
    with ControlPlane("far", 0) as plane:
        print(plane.endpoint, flush=True)
        while os.getppid() == parent:
            plane.wait(0.5)
            if any(isinstance(message, Goodbye) for _, message in plane.receive()):
                return


if __name__ == "__main__":
    _serve()
