"""The conformance suite pointed at the engines; run by the interpreter that has them (see ``test_engine_conformance``)."""

from __future__ import annotations

import os
from typing import ClassVar

from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.interface import Death, Transport, Wake
from kvpoll.testing import TransportConformance


class Slow(TransportConformance):
    """Engines are not slowed down: enough memory instead, so that a write can be caught in its middle."""

    big_bytes: ClassVar[int] = 64 << 20
    quiet_s: ClassVar[float] = 0.6
    limit_s: ClassVar[float] = 20.0


class TestMooncake(Slow):
    """In a network namespace with only lo, or with KVPOLL_MOONCAKE_OPEN set on a machine of one's own."""

    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        is_open = bool(os.environ.get("KVPOLL_MOONCAKE_OPEN"))
        return make("mooncake", node, epoch, wake, on_death, allow_all_interfaces=is_open)


class TestNixl(Slow):
    """Over tcp on lo."""

    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return make("nixl", node, epoch, wake, on_death)
