"""shm: the default on one host. The owner's pool is a shared file that the writer maps and copies into.

At 0.8 of memcpy and better it is the fastest path between two processes on one host that needs no privilege
(ENGINES 2). It is one-sided: the owner cannot refuse a byte, so its pages are quiet only by the writer's word
(``drained``) or by the writer's end, which the owner learns from the operating system (``on_death``).

An owner's regions come from ``allocate``. A process that only writes may register any host memory.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvpoll.runtime.transports import descriptor as descriptors
from kvpoll.runtime.transports import shm_wire
from kvpoll.runtime.transports.interface import (
    DONE,
    Caps,
    Copies,
    Death,
    Progress,
    Region,
    Tag,
    TransportError,
    Wake,
)
from kvpoll.runtime.transports.offsets import Refused, Space, plan_of
from kvpoll.runtime.transports.posted import PostedWrites
from kvpoll.runtime.transports.shm_control import ControlPage
from kvpoll.runtime.transports.shm_memory import allocate, as_array, as_tensor, seal
from kvpoll.runtime.transports.shm_owner import Doorkeeper
from kvpoll.runtime.transports.shm_writer import Address, ShmPeer
from kvpoll.spec.vocabulary import Incarnation

__all__ = ["ShmTransport", "allocate", "as_array", "as_tensor"]

_CLOSE_LIMIT_S: Final = 2.0


class ShmTransport:
    """One process's side of shm, as writer, owner, or both.

    socket_dir: folder for the Unix socket, needed only when the two processes live in different network namespaces;
    without it the socket has no file. bytes_per_s: the most that this process writes to one peer, or None.
    """

    name = "shm"
    caps = Caps(
        one_sided=True, cancel="best_effort", proves_death=True, copies_max=None, memory=frozenset({"host"})
    )  # fmt: skip

    def __init__(
        self, node: str, epoch: int, wake: Wake, on_death: Death,
        *, socket_dir: Path | None = None, bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        if not 0 < len(node.encode()) <= shm_wire.NODE_BYTES_MAX:
            raise TransportError(f"shm: the node's name {node!r} must have 1 to {shm_wire.NODE_BYTES_MAX} bytes")
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise TransportError(f"shm: bytes_per_s is {bytes_per_s}: give a positive number, or None for no limit")
        self.node, self.epoch = node, epoch
        self._on_death, self._socket_dir, self._bytes_per_s = on_death, socket_dir, bytes_per_s
        self._writes = PostedWrites(wake)
        self._peers: dict[bytes, ShmPeer] = {}
        self._ended: list[ShmPeer] = []
        self._regions: list[Region] = []
        self._space = Space([])
        self._control: ControlPage | None = None
        self._doorkeeper: Doorkeeper | None = None
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """As owner: writers admitted, refused and ended so far."""
        return dict(self._doorkeeper.counters) if self._doorkeeper else {}

    def register(self, regions: Sequence[Region]) -> bytes:
        """Admit writers to these regions. Those with a ``file`` can be written by peers, the others only read from."""
        if self._closed or self._doorkeeper:
            raise TransportError("shm: register is called once, before close")
        for region in regions:
            if region.kind not in self.caps.memory or region.nbytes <= 0:
                raise TransportError(
                    f"shm: a region of {region.nbytes} bytes of {region.kind} memory cannot be shared: "
                    f"allocate host memory with kvpoll.runtime.transports.shm.allocate, or use cuda_ipc"
                )
        files = [region.file for region in regions if region.file is not None]
        if not regions or len(files) >= shm_wire.FILES_MAX:
            raise TransportError(
                f"shm: {len(regions)} regions ({len(files)} shared) cannot be registered: "
                f"give 1 to {shm_wire.FILES_MAX - 1}, and put several layers into one region"
            )
        for file in files:
            seal(file)
        self._regions = list(regions)
        self._space = Space([r.nbytes for r in regions], [r.address for r in regions])
        self._control = ControlPage(self.epoch)
        self._doorkeeper = Doorkeeper([self._control.file, *files], self._on_death, self._socket_dir)
        return descriptors.encode(self.name, shm_wire.VERSION, {
            "node": self.node, "epoch": self.epoch, "path": self._doorkeeper.address,
            "secret": base64.b64encode(self._doorkeeper.secret).decode(),
            "sizes": self._space.sizes, "shared": [r.file is not None for r in regions],
        })  # fmt: skip

    def connect(self, descriptor: bytes, node: str, epoch: int) -> ShmPeer:
        """The owner behind the descriptor. The connection itself is made by the first write."""
        known = self._peers.get(descriptor)
        if known is not None:
            return known
        address = _address(descriptor, node, epoch)
        peer = ShmPeer(address, self._writes, self.node, self.epoch, self._bytes_per_s)
        lives = [other for other in self._peers.values() if other.address.node == node]
        newest = max((other.address.epoch for other in lives), default=epoch)
        if newest > epoch:
            peer.end(f"{address} was replaced by epoch {newest}", retired=True)
            return peer
        for other in lives:
            other.end(f"{other.address} was replaced by epoch {epoch}", retired=True)
            del self._peers[next(key for key, value in self._peers.items() if value is other)]
            self._ended.append(other)
        self._ended = [other for other in self._ended if not other.join(0)]
        self._peers[descriptor] = peer
        return peer

    def post(self, peer: ShmPeer, copies: Copies, tag: Tag) -> int:
        """Queue a write. A range outside the regions of either side fails it at once, with nothing placed."""
        if not len(copies.nbytes):
            return self._writes.add_ended(tag, DONE).handle
        try:
            plan = plan_of(copies, self._space, peer.address.space)
        except Refused as refused:
            return self._writes.add_ended(tag, Progress("failed", True, str(refused))).handle
        write = self._writes.add(tag, plan)
        if self._closed:
            self._writes.fail(write, "the transport is closed", drained=True)
        else:
            peer.submit(write)
        return write.handle

    def poll(self, handle: int) -> Progress:
        """How a write stands."""
        return self._writes.poll(handle)

    def abort(self, handle: int) -> None:
        """Ask for the end of a write; it drains at its next piece."""
        self._writes.abort(handle)

    def forget(self, handle: int) -> None:
        """The handle is not polled again."""
        self._writes.forget(handle)

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
        peers = [*self._peers.values(), *self._ended]
        for peer in peers:
            peer.end("the transport is closed", retired=False)
        joined = [peer.join(_CLOSE_LIMIT_S / len(peers)) for peer in peers]
        quiet = all(joined)
        self._writes.fail_all("the transport is closed", drained=lambda write: quiet or not write.begun)
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._control = None
        if quiet:  # else a thread may still read from them
            self._regions = []

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _address(descriptor: bytes, node: str, epoch: int) -> Address:
    fields: dict[str, Any] = descriptors.decode("shm", shm_wire.VERSION, descriptor)
    descriptors.require_peer("shm", fields, node, epoch)
    sizes = descriptors.sizes_of("shm", fields)
    path, shared, secret = fields.get("path"), fields.get("shared"), fields.get("secret")
    try:
        key = base64.b64decode(str(secret), validate=True)
    except ValueError:
        key = b""
    if not isinstance(path, str) or not isinstance(shared, list) or len(shared) != len(sizes):
        raise TransportError("shm: the descriptor is damaged (path, shared): fetch it from the peer again")
    if len(key) != shm_wire.SECRET_BYTES or len(path.encode()) > 107:
        raise TransportError("shm: the descriptor is damaged (secret, path): fetch it from the peer again")
    return Address(node, epoch, path, key, sizes, [bool(each) for each in shared])
