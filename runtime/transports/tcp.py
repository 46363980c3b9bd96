"""tcp: the default across hosts. The writer sends frames and the owner's own threads place them.

Because the owner places every byte, it can refuse at once: ``revoke`` fences, whatever the writer does or does not
do. The payload is neither encrypted nor signed; the cookie of the descriptor keeps strangers out, not eavesdroppers.
Listens on loopback unless told otherwise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Final

from kvpoll.runtime.transports import tcp_wire as wire
from kvpoll.runtime.transports.copy_plan import Plan
from kvpoll.runtime.transports.interface import Caps, Death, Region, Tag, TransportError, Wake
from kvpoll.runtime.transports.posted import PostedWrites, Write
from kvpoll.runtime.transports.posting import PostingTransport
from kvpoll.runtime.transports.tcp_owner import Receiver
from kvpoll.runtime.transports.tcp_writer import Settings, SourceMemory, TcpPeer
from kvpoll.spec.vocabulary import Incarnation

_CLOSE_LIMIT_S: Final = 2.0
_LINGER_S: Final = 1.0
_EVERYWHERE: Final = {"0.0.0.0", "::", ""}
BUFFER_BYTES: Final = 4 << 20


class TcpTransport(PostingTransport[TcpPeer]):
    """One process's side of tcp, as writer, owner, or both.

    host, port: where the owner listens; port 0 lets the system choose. advertise: the address that peers are told,
    required when ``host`` means every interface. lanes: connections to each owner; writes are spread over them.
    stall_s: a connection on which nothing moves for so long is given up. buffer_bytes: socket buffers, None leaves
    them to the kernel. bytes_per_s: the most that one lane sends, or None.
    """

    name = "tcp"
    caps = Caps(one_sided=False, cancel="best_effort", proves_death=False, copies_max=None, memory=frozenset({"host"}))
    form = wire.Descriptor
    version = wire.VERSION

    def __init__(
        self, node: str, epoch: int, wake: Wake, on_death: Death, *, host: str = "127.0.0.1", port: int = 0,
        advertise: str | None = None, lanes: int = 1, stall_s: float = 30.0,
        buffer_bytes: int | None = BUFFER_BYTES, bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        del on_death  # the end of a connection is no proof of a process's end
        _check_options(node, host, advertise, lanes, stall_s, bytes_per_s)
        super().__init__(node, epoch, PostedWrites(wake))
        self._host, self._port, self._advertise, self._lanes = host, port, advertise or host, lanes
        self._settings = Settings(node, epoch, self.writes, buffer_bytes, stall_s, bytes_per_s)
        self._ended: list[TcpPeer] = []
        self._receiver: Receiver | None = None

    @property
    def counters(self) -> dict[str, int]:
        """As owner: connections admitted, refused, malformed, ended; writes placed, revoked; bytes thrown away."""
        return dict(self._receiver.counters) if self._receiver else {}

    def _export(self, regions: Sequence[Region]) -> wire.Descriptor:
        """Listen for writers to these regions, and send from them."""
        settings = self._settings
        settings.memory = SourceMemory(regions)
        self._receiver = Receiver(
            self.epoch, regions, self._host, self._port, settings.buffer_bytes, settings.stall_s
        )  # fmt: skip
        sizes = [region.nbytes for region in regions]
        return wire.Descriptor(
            self.node, self.epoch, self._advertise, self._receiver.port, self._receiver.cookie, sizes
        )  # fmt: skip

    def _reach(self, body: wire.Descriptor) -> TcpPeer:
        """The connections themselves are made by the first writes."""
        return TcpPeer(body, self._settings, self._lanes)

    def _retire(self, peer: TcpPeer, reason: str) -> None:
        peer.end(reason, None)
        self._ended = [other for other in [*self._ended, peer] if not other.join(0)]

    def _start(self, peer: TcpPeer, tag: Tag, plan: Plan) -> int:
        write = self.writes.add(Write(tag, plan))
        peer.submit(write)
        return write.handle

    def abort(self, handle: int) -> None:
        """Ask for the end of a write; the owner's answer drains it."""
        if self.writes.abort(handle):
            for peer in self._peers:
                for lane in peer.lanes:
                    lane.nudge()

    def revoke(self, incarnation: Incarnation) -> bool:
        """Fence: True proves that no byte of this incarnation's writes will be placed any more."""
        return self._receiver is None or self._receiver.revoke(incarnation)

    def close(self) -> None:
        """End threads and sockets. Writes under way get a moment to drain, then fail. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        until_s = time.monotonic() + _CLOSE_LIMIT_S
        peers = [*self._peers, *self._ended]
        for peer in peers:
            peer.end("the transport is closed", _LINGER_S)
        for peer in peers:
            peer.join(until_s - 0.5)
        self.writes.fail_all("the transport is closed")
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
