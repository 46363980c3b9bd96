"""What all transports have in common: memory, peers and their lives, and what is refused before it is begun.

A transport says how its memory becomes known (``_export``), how an owner is reached (``_reach``, ``_retire``), and how
a write to it begins (``_start``). What may be registered and posted is decided here, the same way for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from kvpoll.runtime.transports import descriptor as descriptors
from kvpoll.runtime.transports.copy_plan import Plan, plan_of
from kvpoll.runtime.transports.interface import Caps, Copies, Progress, Region, Tag, TransportError
from kvpoll.runtime.transports.offsets import BadRange, Space
from kvpoll.runtime.transports.peers import Peers
from kvpoll.runtime.transports.posted import PostedWrites


class Reached(Protocol):
    """An owner as its writers see it."""

    @property
    def space(self) -> Space:
        """Its offset space."""
        ...


P = TypeVar("P", bound=Reached)


class PostingTransport(Generic[P]):
    """One side of the data path of one process: see ``interface.Transport``.

    form, version: what its descriptors hold, and the version of its own wire format.
    """

    name: str
    caps: Caps
    form: ClassVar[type[descriptors.Body]]
    version: ClassVar[int] = 1

    def __init__(self, node: str, epoch: int, writes: PostedWrites) -> None:
        self.node, self.epoch, self.writes = node, epoch, writes
        self.regions: tuple[Region, ...] = ()
        self.space = Space([])
        self._peers: Peers[P] = Peers()
        self._closed = False

    # --- what a transport says of itself ----------------------------------------------------------

    def _export(self, regions: Sequence[Region]) -> descriptors.Body:
        """Make memory known; the body of the descriptor. Raises TransportError."""
        raise TypeError(f"{type(self).__name__} does not say how it registers memory")

    def _reach(self, body: Any) -> P:
        """The owner that this descriptor is of. Does not wait for it."""
        raise TypeError(f"{type(self).__name__} does not say how it reaches an owner")

    def _retire(self, peer: P, reason: str) -> None:
        """That life is over: nothing more is begun for it, and what waits fails."""

    def _start(self, peer: P, tag: Tag, plan: Plan) -> int:
        """Begin a write of at least one range, all of them checked; its handle."""
        raise TypeError(f"{type(self).__name__} does not say how it writes")

    def _space_of(self, regions: Sequence[Region]) -> Space:
        return Space.of(regions)

    def _plan(self, copies: Copies, peer: P) -> Plan:
        return plan_of(copies, self.space, peer.space)

    # --- the interface of transports --------------------------------------------------------------

    def register(self, regions: Sequence[Region]) -> bytes:
        """Make this process's memory known; once. Raises TransportError."""
        if self._closed:
            raise TransportError(f"{self.name}: the transport is closed: make another one")
        if self.regions:
            raise TransportError(f"{self.name}: memory is registered once, and was: make another transport for more")
        if not regions:
            raise TransportError(f"{self.name}: no region was given: register at least one")
        for place, region in enumerate(regions):
            if region.kind not in self.caps.memory:
                raise TransportError(
                    f"{self.name}: region {place} is {region.kind} memory: it takes "
                    f"{' and '.join(sorted(self.caps.memory))} memory; other transports take other kinds"
                )
            if region.nbytes <= 0 or region.address <= 0:
                raise TransportError(
                    f"{self.name}: region {place} has {region.nbytes} bytes at {region.address:#x}: "
                    f"register memory that is there"
                )
        body = self._export(regions)
        self.regions, self.space = tuple(regions), self._space_of(regions)
        return descriptors.encode(self.name, self.version, body)

    def connect(self, descriptor: bytes, node: str, epoch: int) -> P:
        """The owner behind the descriptor; a newer epoch of its node retires the older peer. Raises TransportError."""
        peer = self._peers.find(descriptor, node, epoch)
        if peer is None:
            peer = self._reach(descriptors.decode(self.name, self.version, descriptor, self.form, node, epoch))
            over = self._peers.enter(descriptor, node, epoch, peer)
            if over is not None:
                self._retire(*over)
        return peer

    def post(self, peer: P, copies: Copies, tag: Tag) -> int:
        """Start a write. A range outside the regions of either side fails it, drained, before any byte is moved."""
        try:
            plan = self._plan(copies, peer)
        except BadRange as bad:
            return self.writes.add_ended(tag, str(bad))
        if len(plan.nbytes) == 0:
            return self.writes.add_ended(tag, None)
        if self._closed:
            return self.writes.add_ended(tag, "the transport is closed")
        return self._start(peer, tag, plan)

    def poll(self, handle: int) -> Progress:
        """How a write stands. KeyError for a handle that is not known."""
        return self.writes.poll(handle)

    def abort(self, handle: int) -> None:
        """Ask for the end of a write: a request, never a proof."""
        self.writes.abort(handle)

    def forget(self, handle: int) -> None:
        """The user will not poll this handle again."""
        self.writes.forget(handle)
