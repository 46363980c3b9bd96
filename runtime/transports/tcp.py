"""tcp: the default across hosts. The writer sends frames and the owner's own threads place them.

Because the owner places every byte, it can refuse at once: ``revoke`` fences, whatever the writer does or does not
do. The payload is neither encrypted nor signed; the cookie of the descriptor keeps strangers out, not eavesdroppers.
Listens on loopback unless told otherwise.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Final

from kvpoll.runtime.transports import descriptor as descriptors
from kvpoll.runtime.transports import tcp_wire as wire
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
from kvpoll.runtime.transports.tcp_owner import Receiver
from kvpoll.runtime.transports.tcp_writer import Address, Settings, SourceMemory, TcpPeer
from kvpoll.spec.vocabulary import Incarnation

_CLOSE_LIMIT_S: Final = 2.0
_LINGER_S: Final = 1.0
_EVERYWHERE: Final = {"0.0.0.0", "::", ""}
BUFFER_BYTES: Final = 4 << 20


class TcpTransport:
    """One process's side of tcp, as writer, owner, or both.

    host, port: where the owner listens; port 0 lets the system choose. advertise: the address that peers are told,
    required when ``host`` means every interface. lanes: connections to each owner; writes are spread over them.
    stall_s: a connection on which nothing moves for so long is given up. buffer_bytes: socket buffers, None leaves
    them to the kernel. bytes_per_s: the most that one lane sends, or None.
    """

    name = "tcp"
    caps = Caps(one_sided=False, cancel="best_effort", proves_death=False, copies_max=None, memory=frozenset({"host"}))

    def __init__(
        self, node: str, epoch: int, wake: Wake, on_death: Death, *, host: str = "127.0.0.1", port: int = 0,
        advertise: str | None = None, lanes: int = 1, stall_s: float = 30.0,
        buffer_bytes: int | None = BUFFER_BYTES, bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        del on_death  # the end of a connection is no proof of a process's end
        _check_options(node, host, advertise, lanes, stall_s, bytes_per_s)
        self.node, self.epoch = node, epoch
        self._host, self._port, self._advertise, self._lanes = host, port, advertise or host, lanes
        self._writes = PostedWrites(wake)
        self._settings = Settings(node, epoch, self._writes, buffer_bytes, stall_s, bytes_per_s)
        self._peers: dict[bytes, TcpPeer] = {}
        self._ended: list[TcpPeer] = []
        self._space = Space([])
        self._receiver: Receiver | None = None
        self._posted: dict[int, TcpPeer] = {}
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """As owner: connections admitted, refused, malformed, ended; writes placed, revoked; bytes thrown away."""
        return dict(self._receiver.counters) if self._receiver else {}

    def register(self, regions: Sequence[Region]) -> bytes:
        """Listen for writers to these regions, and send from them. Host memory only."""
        if self._closed or self._receiver:
            raise TransportError("tcp: register is called once, before close")
        for region in regions:
            if region.kind not in self.caps.memory or region.nbytes <= 0:
                raise TransportError(
                    f"tcp: a region of {region.nbytes} bytes of {region.kind} memory cannot be sent: "
                    f"give host memory, or use cuda_ipc"
                )
        if not regions:
            raise TransportError("tcp: no region was given: register at least one")
        self._space = Space([r.nbytes for r in regions], [r.address for r in regions])
        settings = self._settings
        settings.memory = SourceMemory(regions)
        self._receiver = Receiver(
            self.epoch, regions, self._host, self._port, settings.buffer_bytes, settings.stall_s
        )  # fmt: skip
        return descriptors.encode(self.name, wire.VERSION, {
            "node": self.node, "epoch": self.epoch, "host": self._advertise, "port": self._receiver.port,
            "cookie": base64.b64encode(self._receiver.cookie).decode(), "sizes": self._space.sizes,
        })  # fmt: skip

    def connect(self, descriptor: bytes, node: str, epoch: int) -> TcpPeer:
        """The owner behind the descriptor. The connection itself is made by the first write."""
        known = self._peers.get(descriptor)
        if known is not None:
            return known
        address = _address(descriptor, node, epoch)
        peer = TcpPeer(address, self._settings, self._lanes)
        lives = {key: other for key, other in self._peers.items() if other.address.node == node}
        newest = max((other.address.epoch for other in lives.values()), default=epoch)
        if newest > epoch:
            peer.end(f"{address} was replaced by epoch {newest}", None)
            return peer
        for key, other in lives.items():
            other.end(f"{other.address} was replaced by epoch {epoch}", None)
            del self._peers[key]
            self._ended.append(other)
        self._ended = [other for other in self._ended if not other.join(0)]
        self._peers[descriptor] = peer
        return peer

    def post(self, peer: TcpPeer, copies: Copies, tag: Tag) -> int:
        """Queue a write. A range outside the regions of either side fails it at once, with nothing sent."""
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
        """Ask for the end of a write; the owner's answer drains it."""
        if self._writes.abort(handle):
            for peer in self._peers.values():
                for lane in peer.lanes:
                    lane.nudge()

    def forget(self, handle: int) -> None:
        """The handle is not polled again."""
        self._writes.forget(handle)

    def revoke(self, incarnation: Incarnation) -> bool:
        """Fence: True proves that no byte of this incarnation's writes will be placed any more."""
        return self._receiver is None or self._receiver.revoke(incarnation)

    def close(self) -> None:
        """End threads and sockets. Writes under way get a moment to drain, then fail. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        until_s = time.monotonic() + _CLOSE_LIMIT_S
        peers = [*self._peers.values(), *self._ended]
        for peer in peers:
            peer.end("the transport is closed", _LINGER_S)
        for peer in peers:
            peer.join(until_s - 0.5)
        self._writes.fail_all("the transport is closed", drained=lambda write: not write.begun)
        if self._receiver is not None:
            self._receiver.close(max(0.5, until_s - time.monotonic()))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _check_options(
    node: str, host: str, advertise: str | None, lanes: int, stall_s: float, bytes_per_s: float | None
) -> None:
    if not 0 < len(node.encode()) <= wire.NODE_BYTES_MAX:
        raise TransportError(f"tcp: the node's name {node!r} must have 1 to {wire.NODE_BYTES_MAX} bytes")
    if host in _EVERYWHERE and advertise is None:
        raise TransportError(
            f"tcp: host {host!r} means every interface, which is no address to connect to: say in advertise= "
            f"under which address peers reach this host"
        )
    if not 1 <= lanes <= 64 or not stall_s > 0 or (bytes_per_s is not None and not bytes_per_s > 0):
        raise TransportError(
            f"tcp: lanes={lanes}, stall_s={stall_s}, bytes_per_s={bytes_per_s}: give 1 to 64 lanes and positive limits"
        )


def _address(descriptor: bytes, node: str, epoch: int) -> Address:
    fields: dict[str, Any] = descriptors.decode("tcp", wire.VERSION, descriptor)
    descriptors.require_peer("tcp", fields, node, epoch)
    sizes = descriptors.sizes_of("tcp", fields)
    host, port = fields.get("host"), fields.get("port")
    try:
        cookie = base64.b64decode(str(fields.get("cookie")), validate=True)
    except ValueError:
        cookie = b""
    if not isinstance(host, str) or type(port) is not int or not 0 < port < 65536 or len(cookie) != wire.COOKIE_BYTES:
        raise TransportError("tcp: the descriptor is damaged (host, port, cookie): fetch it from the peer again")
    return Address(node, epoch, host, port, cookie, sizes)
