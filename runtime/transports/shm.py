"""shm: the default on one host. The owner's pool is a shared file that the writer maps and copies into.

At 0.8 of memcpy and better it is the fastest path between two processes on one host that needs no privilege
(ENGINES 2). It is one-sided: the owner cannot refuse a byte, so its pages are quiet only by the writer's word
(``drained``) or by the writer's end, which the owner learns from the operating system (``on_death``).

An owner's regions come from ``allocate``. A process that only writes may register any host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvpoll.runtime.transports import shm_wire
from kvpoll.runtime.transports.copy_plan import Plan
from kvpoll.runtime.transports.interface import Caps, Copies, Death, Region, Tag, TransportError, Wake
from kvpoll.runtime.transports.posted import PostedWrites, Write
from kvpoll.runtime.transports.posting import PostingTransport
from kvpoll.runtime.transports.shm_control import ControlPage
from kvpoll.runtime.transports.shm_memory import allocate, as_array, as_tensor, seal
from kvpoll.runtime.transports.shm_owner import Doorkeeper
from kvpoll.runtime.transports.shm_writer import ShmPeer
from kvpoll.spec.vocabulary import Incarnation

__all__ = ["ShmTransport", "allocate", "as_array", "as_tensor"]

_CLOSE_LIMIT_S: Final = 2.0


class ShmTransport(PostingTransport[ShmPeer]):
    """One process's side of shm, as writer, owner, or both.

    socket_dir: folder for the Unix socket, needed only when the two processes live in different network namespaces;
    without it the socket has no file. bytes_per_s: the most that this process writes to one peer, or None.
    """

    name = "shm"
    caps = Caps(
        one_sided=True, cancel="best_effort", proves_death=True, copies_max=None, memory=frozenset({"host"})
    )  # fmt: skip
    form = shm_wire.Descriptor
    version = shm_wire.VERSION

    def __init__(
        self, node: str, epoch: int, wake: Wake, on_death: Death,
        *, socket_dir: Path | None = None, bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        if not 0 < len(node.encode()) <= shm_wire.NODE_BYTES_MAX:
            raise TransportError(f"shm: the node's name {node!r} must have 1 to {shm_wire.NODE_BYTES_MAX} bytes")
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise TransportError(f"shm: bytes_per_s is {bytes_per_s}: give a positive number, or None for no limit")
        super().__init__(node, epoch, PostedWrites(wake))
        self._on_death, self._socket_dir, self._bytes_per_s = on_death, socket_dir, bytes_per_s
        self._ended: list[ShmPeer] = []
        self._control: ControlPage | None = None
        self._doorkeeper: Doorkeeper | None = None

    @property
    def counters(self) -> dict[str, int]:
        """As owner: writers admitted, refused and ended so far."""
        return dict(self._doorkeeper.counters) if self._doorkeeper else {}

    def _export(self, regions: Sequence[Region]) -> shm_wire.Descriptor:
        """Open a pool for writers: those of the regions that lie in a file. Others can only be written from."""
        files = [region.file for region in regions if region.file is not None]
        if len(files) >= shm_wire.FILES_MAX:
            raise TransportError(
                f"shm: {len(files)} shared regions cannot be registered: give {shm_wire.FILES_MAX - 1} at most, and "
                f"put several layers into one region"
            )
        for file in files:
            seal(file)
        self._control = ControlPage(self.epoch)
        self._doorkeeper = Doorkeeper([self._control.file, *files], self._on_death, self._socket_dir)
        sizes, shared = [region.nbytes for region in regions], [region.file is not None for region in regions]
        return shm_wire.Descriptor(
            self.node, self.epoch, self._doorkeeper.address, self._doorkeeper.secret, sizes, shared
        )  # fmt: skip

    def _reach(self, body: shm_wire.Descriptor) -> ShmPeer:
        """The connection itself is made by the first write."""
        return ShmPeer(body, self.writes, self.node, self.epoch, self._bytes_per_s)

    def _retire(self, peer: ShmPeer, reason: str) -> None:
        peer.end(reason, retired=True)
        self._ended = [other for other in [*self._ended, peer] if not other.join(0)]

    def post(self, peer: ShmPeer, copies: Copies, tag: Tag) -> int:
        """As ``PostingTransport.post``; a small write may be over when this returns."""
        if not self._closed and peer.place_at_once(self.space, copies, tag):
            return self.writes.add_done(tag)
        return super().post(peer, copies, tag)

    def _start(self, peer: ShmPeer, tag: Tag, plan: Plan) -> int:
        write = self.writes.add(Write(tag, plan))
        peer.submit(write)
        return write.handle

    def revoke(self, incarnation: Incarnation) -> bool:
        """Ask writers, through the control page, to stop at their next piece. Never a proof: returns False."""
        if self._control is not None and not self._closed:
            self._control.revoke(incarnation)
        return False

    def close(self) -> None:
        """End threads, sockets and mappings. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._control is not None:
            self._control.close()
        peers = [*self._peers, *self._ended]
        for peer in peers:
            peer.end("the transport is closed", retired=False)
        joined = [peer.join(_CLOSE_LIMIT_S / len(peers)) for peer in peers]
        quiet = all(joined)
        self.writes.fail_all("the transport is closed", drained=quiet)
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._control = None
        if quiet:  # else a thread may still read from them
            self.regions = ()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
