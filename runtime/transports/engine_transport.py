"""What the transports over an engine have in common: a lane to each peer, and an end that loses nothing.

An adapter says three things of its engine: how memory becomes known (``_export``), how to speak to one peer
(``_carrier``), and how it ends (``_shut``). What counts as drained is decided in ``engine_writes.py``, the same way for
all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

from kvpoll.runtime.transports.copy_plan import Plan, cut
from kvpoll.runtime.transports.engine_lane import Carrier, Lane
from kvpoll.runtime.transports.engine_writes import WriteBook
from kvpoll.runtime.transports.interface import Death, Tag, TransportError, Wake
from kvpoll.runtime.transports.offsets import Space
from kvpoll.runtime.transports.posting import PostingTransport
from kvpoll.spec.vocabulary import Incarnation

DEADLINE_S: Final = 60.0

_LEFT_BEHIND: list[Any] = []
"""Transports that were closed while their engine was still at work: they and their memory are never freed.

A part without proof may still be read from our memory, and an engine that is destroyed under a running call takes the
process with it. The process's end frees both.
"""


class Peer:
    """An owner as its writers see it: its offset space and the lane of writes to it."""

    def __init__(self, node: str, epoch: int, space: Space) -> None:
        self.node = node
        self.epoch = epoch
        self.space = space
        self.lane: Lane


class EngineTransport(PostingTransport[Peer]):
    """One side of the data path of one process, over an engine that moves the bytes.

    deadline_s: a write that is not placed by then fails (and is drained later, or never). part_ranges, part_bytes: the
    engine is given a write in parts of at most so much, and an abort takes effect between them. depth: parts that the
    engine may hold at once for one peer.
    """

    writes: WriteBook
    part_ranges: int = 1024
    part_bytes: int = 64 << 20
    depth: int = 1

    def __init__(self, node: str, epoch: int, wake: Wake, on_death: Death, deadline_s: float = DEADLINE_S) -> None:
        if not deadline_s > 0:
            raise TransportError(f"deadline_s is {deadline_s}; it must be above 0")
        super().__init__(node, epoch, WriteBook(self.name, wake, deadline_s))
        self._on_death = on_death
        self._closing = threading.Lock()

    # --- what an adapter says of its engine -------------------------------------------------------

    def _carrier(self, body: Any, peer: Peer) -> Carrier:
        """How to speak to the owner that this descriptor is of. Does not wait for it."""
        raise TypeError(f"{type(self).__name__} does not say how it speaks to a peer")

    def _shut(self) -> None:
        """End the engine; nothing is with it any more."""

    def _cut(self, ranges: Plan) -> Iterator[Any]:
        return cut(ranges, self.part_ranges, self.part_bytes)

    # --- what every transport says of itself ------------------------------------------------------

    def _reach(self, body: Any) -> Peer:
        peer = Peer(body.node, body.epoch, Space([size for _, size in body.regions], [at for at, _ in body.regions]))
        peer.lane = Lane(self.writes, self._carrier(body, peer), f"{self.name}-to-{body.node}", self.depth)
        return peer

    def _retire(self, peer: Peer, reason: str) -> None:
        peer.lane.retire(reason)

    def _start(self, peer: Peer, tag: Tag, plan: Plan) -> int:
        return peer.lane.put(tag, self._cut(plan))

    # --- the interface of transports --------------------------------------------------------------

    def revoke(self, incarnation: Incarnation) -> bool:
        """False: the owner of memory that an engine writes into cannot keep the engine out."""
        del incarnation
        return False

    def close(self) -> None:
        """End threads, engine and registrations. What the engine still works on stays allocated until the process
        ends: see ``_LEFT_BEHIND``."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self.writes.close()
        if self.writes.unsettled or any(lane.thread and lane.thread.is_alive() for lane in self.writes.lanes):
            _LEFT_BEHIND.append(self)
            return
        with contextlib.suppress(Exception):  # the engine is on its way out; nothing depends on its last word
            self._shut()
