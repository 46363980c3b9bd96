"""What the transports over an engine have in common: memory, peers and their epochs, and the book of writes.

An adapter says three things of its engine: how memory becomes known (``_export``), how to speak to one peer
(``_carrier``), and how it ends (``_shut``). Everything else, above all what counts as drained, is decided here and in
``engine_writes.py``, the same way for all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import msgspec

from kvpoll.runtime.transports.engine_descriptor import seal, unseal
from kvpoll.runtime.transports.engine_writes import Carrier, Lane, WriteBook
from kvpoll.runtime.transports.gather_scatter import BadRange, Plan, Space, cut, plan
from kvpoll.runtime.transports.interface import Caps, Copies, Death, Progress, Region, Tag, TransportError, Wake
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


class EngineTransport:
    """One side of the data path of one process, over an engine that moves the bytes.

    deadline_s: a write that is not placed by then fails (and is drained later, or never). part_ranges, part_bytes: the
    engine is given a write in parts of at most so much, and an abort takes effect between them. depth: parts that the
    engine may hold at once for one peer.
    """

    name: str
    caps: Caps
    form: ClassVar[type[msgspec.Struct]]
    part_ranges: int = 1024
    part_bytes: int = 64 << 20
    depth: int = 1

    def __init__(self, node: str, epoch: int, wake: Wake, on_death: Death, deadline_s: float = DEADLINE_S) -> None:
        if not deadline_s > 0:
            raise TransportError(f"deadline_s is {deadline_s}; it must be above 0")
        self.node = node
        self.epoch = epoch
        self._on_death = on_death
        self._book = WriteBook(self.name, wake, deadline_s)
        self._regions: tuple[Region, ...] | None = None
        self._space = Space([])
        self._descriptor = b""
        self._peers: dict[str, Peer] = {}
        self._descriptors: dict[tuple[str, int], bytes] = {}
        self._closing = threading.Lock()
        self._closed = False

    # --- what an adapter says of its engine -------------------------------------------------------

    def _export(self, regions: Sequence[Region]) -> msgspec.Struct:
        """Make memory known to the engine; the body of the descriptor. Raises TransportError."""
        raise TypeError(f"{type(self).__name__} does not say how it registers memory")

    def _carrier(self, body: Any, peer: Peer) -> Carrier:
        """How to speak to the owner that this descriptor is of. Does not wait for it."""
        raise TypeError(f"{type(self).__name__} does not say how it speaks to a peer")

    def _shut(self) -> None:
        """End the engine; nothing is with it any more."""

    def _space_of(self, regions: Sequence[Region]) -> Space:
        return Space([(region.address, region.nbytes) for region in regions])

    def _plan(self, copies: Copies, peer: Peer) -> Plan:
        return plan(copies, self._space, peer.space)

    def _cut(self, ranges: Plan) -> Iterator[Any]:
        return cut(ranges, self.part_ranges, self.part_bytes)

    @property
    def own_space(self) -> Space:
        """This process's offset space; empty before ``register``."""
        return self._space

    # --- the interface of transports --------------------------------------------------------------

    def register(self, regions: Sequence[Region]) -> bytes:
        """Make this process's memory known; once. Raises TransportError."""
        if self._regions is not None:
            raise TransportError(f"{self.name}: memory is registered once, and was; make another transport for more")
        if self._closed:
            raise TransportError(f"{self.name}: the transport is closed")
        regions = tuple(regions)
        for place, region in enumerate(regions):
            if region.kind not in self.caps.memory:
                raise TransportError(
                    f"{self.name}: region {place} is {region.kind} memory; it takes "
                    f"{' and '.join(sorted(self.caps.memory))}"
                )
            if region.nbytes <= 0 or region.address <= 0:
                raise TransportError(f"{self.name}: region {place} has {region.nbytes} bytes at {region.address:#x}")
        descriptor = seal(self.name, self._export(regions))
        self._regions, self._space = regions, self._space_of(regions)
        self._descriptor = descriptor
        return descriptor

    def connect(self, descriptor: bytes, node: str, epoch: int) -> Peer:
        """The peer of this descriptor; a newer epoch of its node retires the older peer. Raises TransportError."""
        known = self._peers.get(node)
        if known is not None and known.epoch == epoch and self._descriptors.get((node, epoch)) == descriptor:
            return known
        body: Any = unseal(self.name, descriptor, self.form, node, epoch)
        peer = Peer(node, epoch, Space([(address, nbytes) for address, nbytes in body.regions]))
        peer.lane = Lane(self._book, self._carrier(body, peer), f"{self.name}-to-{node}", self.depth)
        if known is not None and known.epoch > epoch:
            peer.lane.retire(f"{node} epoch {epoch} is over: epoch {known.epoch} is known")
            return peer
        if known is not None:
            known.lane.retire(f"{node} epoch {known.epoch} is over: epoch {epoch} has come")
            self._descriptors.pop((node, known.epoch), None)
        self._peers[node] = peer
        self._descriptors[(node, epoch)] = descriptor
        return peer

    def post(self, peer: Peer, copies: Copies, tag: Tag) -> int:
        """Start a write. A range outside the registered memory fails it, drained, before any byte is sent."""
        try:
            ranges = self._plan(copies, peer)
        except BadRange as error:
            return self._book.settle_at_once(tag, f"refused: {error}")
        if len(ranges.nbytes) == 0:
            return self._book.settle_at_once(tag, None)
        return peer.lane.put(tag, self._cut(ranges))

    def poll(self, handle: int) -> Progress:
        """How a write stands. KeyError for a handle that is not known."""
        return self._book.poll(handle)

    def abort(self, handle: int) -> None:
        """Begin no further part of it. What the engine holds goes on, and is drained when it has landed."""
        write = self._book.find(handle)
        if write is not None:
            self._book.fail([write], "aborted")

    def forget(self, handle: int) -> None:
        """The user will not poll this handle again."""
        self._book.forget(handle)

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
        self._book.close()
        if self._book.unsettled or any(lane.thread and lane.thread.is_alive() for lane in self._book.lanes):
            _LEFT_BEHIND.append(self)
            return
        with contextlib.suppress(Exception):  # the engine is on its way out; nothing depends on its last word
            self._shut()
