"""CUDA IPC between two processes on one host: memory of a GPU, mapped into the other process and copied in one launch.

Two directions, chosen on both sides alike:

- "pull" (the default): the owner maps the writer's memory and copies out of it. The owner's process places the bytes,
  so it fences alone, and the writer's pages must be held until the owner says that an order has ended, or is dead.
- "push": the writer maps the owner's memory and copies into it. One launch cannot be called back, so the pages of a
  failed write are free only on the writer's word, or when its process has ended.

A copy is over when the event that was recorded behind it is complete, and only then; what a device still does after it
reported an error is not known. Each process watches the other through a pidfd: see ``cuda_ipc_channel.py``.
"""

from __future__ import annotations

import hmac
import itertools
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from kvpoll.runtime.transports.copy_plan import Plan
from kvpoll.runtime.transports.cuda_ipc_channel import (
    Cancel,
    Channel,
    Closed,
    Ended,
    Hello,
    Listener,
    Message,
    Order,
    Revoked,
    Welcome,
    dial,
)
from kvpoll.runtime.transports.cuda_ipc_device import CudaDevice, Device, HostDevice, Mapped
from kvpoll.runtime.transports.cuda_ipc_pull import Puller, Source
from kvpoll.runtime.transports.descriptor import Body, Places
from kvpoll.runtime.transports.engine_lane import Broken, Carrier, Refused
from kvpoll.runtime.transports.engine_transport import DEADLINE_S, EngineTransport, Peer
from kvpoll.runtime.transports.interface import Caps, Death, Region, Tag, TransportError, Wake
from kvpoll.runtime.transports.offsets import Space
from kvpoll.spec.source import BadInput, nearest
from kvpoll.spec.vocabulary import Incarnation

DIRECTIONS: Final = ("pull", "push")
BACKENDS: Final = ("cuda", "host")
DIAL_S: Final = 5.0
PULL_CLOSING_S: Final = 0.5
CHANNEL_CLOSING_S: Final = 0.2


class Descriptor(Body):
    """socket, cookie: how to reach the owner. regions: [(first offset, nbytes)]. exports: how to map each (push)."""

    direction: str
    backend: str
    socket: str
    cookie: bytes
    regions: Places
    exports: list[bytes]


class Launch(NamedTuple):
    """A whole write, as its lane carries it: offsets, and the point of the caller's work after which to read."""

    ranges: Plan
    mark: Any


class CudaIpcTransport(EngineTransport):
    """One process's side.

    direction: "pull" or "push". backend: "cuda", or "host" for memory of a memfd, as tests use it. device: number of
    the GPU, None for the current one. kernel: see ``CudaDevice``.
    """

    name = "cuda_ipc"
    form = Descriptor
    depth = 64

    def __init__(
        self,
        node: str,
        epoch: int,
        wake: Wake,
        on_death: Death,
        *,
        direction: str = "pull",
        backend: str = "cuda",
        device: int | None = None,
        kernel: str = "auto",
        deadline_s: float = DEADLINE_S,
    ) -> None:
        if direction not in DIRECTIONS:
            raise BadInput(f"cuda_ipc has no direction {direction!r}{nearest(direction, DIRECTIONS)}")
        if backend not in BACKENDS:
            raise BadInput(f"cuda_ipc has no backend {backend!r}{nearest(backend, BACKENDS)}")
        self.direction, self.backend = direction, backend
        self.device: Device = HostDevice() if backend == "host" else CudaDevice(device, kernel)
        self.caps = Caps(
            one_sided=direction == "push",
            cancel="best_effort",
            proves_death=True,
            copies_max=None,
            memory=frozenset({self.device.kind}),
        )
        super().__init__(node, epoch, wake, on_death, deadline_s)
        self.mapped: list[Mapped] = []
        self._cookie = secrets.token_bytes(16)
        self._listener: Listener | None = None
        self._puller: Puller | None = None
        self._writers: dict[Channel, tuple[str, int]] = {}
        self._channels: dict[Channel, bool] = {}
        """All that are open, and whether an owner is at the other end."""
        self._channels_lock = threading.Lock()

    # --- memory and peers ---------------------------------------------------------------------------

    def _space_of(self, regions: Sequence[Region]) -> Space:
        """Offsets stand for addresses until a copy begins: where the other side lies is not known before."""
        return Space([region.nbytes for region in regions])

    def _export(self, regions: Sequence[Region]) -> Descriptor:
        self.mapped = self.device.own(regions)
        exports = [self.device.export(region, mapped) for region, mapped in zip(regions, self.mapped, strict=True)]
        space = self._space_of(regions)
        if self.direction == "pull":
            self._puller = Puller(self.device, _space(self.mapped), self.mapped, self._open_writer, self._writer_gone)
        self._exports = exports
        self._listener = Listener(self._connected)
        return Descriptor(
            self.node, self.epoch, self.direction, self.backend, self._listener.name, self._cookie,
            list(zip(space.starts.tolist(), space.sizes.tolist(), strict=True)),
            exports if self.direction == "push" else [],
        )  # fmt: skip

    def _carrier(self, body: Descriptor, peer: Peer) -> Carrier:
        if (body.direction, body.backend) != (self.direction, self.backend):
            raise TransportError(
                f"cuda_ipc: {body.node} was started to {body.direction} on {body.backend}, this process to "
                f"{self.direction} on {self.backend}; start both alike"
            )
        return _Push(self, body, peer) if self.direction == "push" else _Pull(self, body, peer)

    def _cut(self, ranges: Plan) -> Iterator[Launch]:
        """One launch for the whole write; the mark is made now, in the caller's thread and stream."""
        return iter([Launch(ranges, self.device.mark())])

    def hello(self, body: Descriptor) -> Hello:
        """What this process says first to an owner."""
        pulled = self.direction == "pull"
        return Hello(self.node, self.epoch, body.cookie, self._exports if pulled else [], self.space.sizes.tolist())

    def opened(self, channel: Channel, to_owner: bool) -> None:
        """Remember a channel, so that ``close`` ends it."""
        with self._channels_lock:
            self._channels[channel] = to_owner

    def leave(self, channel: Channel) -> None:
        """Nothing is under way to this owner any more. When the transport closes, it takes its leave of all itself."""
        if not self._closed:
            channel.close()
            with self._channels_lock:
                self._channels.pop(channel, None)

    # --- as owner -----------------------------------------------------------------------------------

    def revoke(self, incarnation: Incarnation) -> bool:
        """Pull: True when nothing of it is being copied here, and nothing will be. Push: False; writers are told."""
        room = _room(incarnation)
        if self._puller is not None:
            return self._puller.revoke(room)
        with self._channels_lock:
            writers = list(self._writers)
        for channel in writers:
            channel.send(Revoked(room))
        return False

    def _connected(self, connection: socket.socket) -> None:
        channel = Channel(connection, self._heard, self._lost, self._died)
        self.opened(channel, to_owner=False)
        channel.start()

    def _heard(self, channel: Channel, message: Message) -> None:
        if isinstance(message, Hello):
            if not hmac.compare_digest(message.cookie, self._cookie):
                raise ValueError("a hello with a cookie that is not ours")
            channel.peer = message
            with self._channels_lock:
                self._writers[channel] = (message.node, message.epoch)
            channel.send(Welcome())
        elif isinstance(message, Closed) and channel.peer is not None:
            channel.peer = None  # a stranger from now on: what it might still order is not taken
            self._died(channel)
        elif channel.peer is None or self._puller is None:
            raise ValueError("a message that was not asked for")
        elif isinstance(message, Order):
            self._puller.submit(channel, message)
        elif isinstance(message, Cancel):
            self._puller.cancel(channel, message.number)

    def _lost(self, channel: Channel) -> None:
        """A closed socket proves nothing: a writer's process is watched further, a stranger's is none of ours."""
        if channel.peer is None:
            channel.close()
            with self._channels_lock:
                self._channels.pop(channel, None)

    def _died(self, channel: Channel) -> None:
        if self._puller is not None:
            self._puller.writer_died(channel)
        else:
            self._writer_gone(channel)

    def _writer_gone(self, channel: Channel) -> None:
        """That life is over, by its end or by its own word, and nothing that it began or ordered moves."""
        with self._channels_lock:
            life = self._writers.pop(channel, None)
            if life is None or life in self._writers.values():
                return
        if not self._closed:
            self._on_death(*life)
            self.writes.tell()

    def _open_writer(self, channel: Channel) -> Source:
        """Map a writer's regions; in the puller's thread. Raises TransportError."""
        hello: Hello = channel.peer
        regions = [self.device.open(export) for export in hello.exports]
        if [mapped.nbytes for mapped in regions] != hello.sizes:
            raise TransportError("the writer's regions are not as long as it said")
        return Source(_space(regions), regions)

    def close(self) -> None:
        """End what is running as far as half a second allows; the rest of ``EngineTransport.close``."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        quiet = self._puller is None or self._puller.close(PULL_CLOSING_S)
        if not quiet:
            _STILL_PULLING.append(self)
        super().close()
        with self._channels_lock:
            channels, self._channels = self._channels, {}
        # What this process itself still copies into an owner's memory would make the word of its end a lie.
        may_say_so = self.direction == "pull" or not self.writes.unsettled
        for channel, to_owner in channels.items():
            if to_owner and may_say_so:
                channel.send(Closed())
            channel.close()
        for channel in channels:
            channel.join(CHANNEL_CLOSING_S)


_STILL_PULLING: list[CudaIpcTransport] = []
"""Closed while a copy of theirs was running: their memory stays until the process ends."""


class _ToOwner:
    """What both directions share on the writer's side: the channel to the owner, and what it proves."""

    def __init__(self, transport: CudaIpcTransport, body: Descriptor, peer: Peer) -> None:
        self.transport, self.body, self.peer = transport, body, peer
        self.channel: Channel | None = None
        self.dead = False
        self._welcome = threading.Event()

    def open(self) -> None:
        """Connect and be welcomed. Raises Refused."""
        try:
            connection = dial(self.body.socket, DIAL_S)
        except OSError as error:
            raise Refused(f"{self.peer.node} is not there: {error.strerror or error}") from None
        self.channel = Channel(connection, self._heard, self._lost, self._died)
        self.transport.opened(self.channel, to_owner=True)
        self.channel.start()
        self.channel.send(self.transport.hello(self.body))
        if not self._welcome.wait(DIAL_S) or self.channel.lost:
            raise Refused(f"{self.peer.node} did not answer within {DIAL_S:g} s")

    def close(self) -> None:
        """Nothing is under way."""
        if self.channel is not None:
            self.transport.leave(self.channel)

    def _heard(self, channel: Channel, message: Message) -> None:
        del channel
        if isinstance(message, Welcome):
            self._welcome.set()
        else:
            self._told(message)
            self.peer.lane.nudge()

    def _told(self, message: Message) -> None:
        del message

    def _lost(self, channel: Channel) -> None:
        del channel
        self._welcome.set()
        self.peer.lane.retire(f"{self.peer.node} closed the connection")
        self.peer.lane.nudge()

    def _died(self, channel: Channel) -> None:
        del channel
        self.dead = True
        self.peer.lane.retire(f"the process of {self.peer.node} has ended")
        self.peer.lane.nudge()


class _Push(_ToOwner):
    """Copies into the owner's memory, here."""

    def __init__(self, transport: CudaIpcTransport, body: Descriptor, peer: Peer) -> None:
        super().__init__(transport, body, peer)
        self._theirs: list[Mapped] = []
        self._revoked: set[tuple[int, int, int]] = set()

    def open(self) -> None:
        super().open()
        self._theirs = [self.transport.device.open(export) for export in self.body.exports]
        if [(mapped.nbytes) for mapped in self._theirs] != self.peer.space.sizes.tolist():
            raise Refused(f"the regions of {self.peer.node} are not as long as it said")

    def begin(self, part: Launch, tag: Tag) -> Any:
        """Launch. Raises Refused when the owner is gone or has given the pages up."""
        if self.dead:
            raise Refused(f"the process of {self.peer.node} has ended")
        if _room(tag.incarnation) in self._revoked:
            raise Refused("the pages were given up")
        mine = self.transport.mapped
        ranges = part.ranges._replace(
            source=_space(mine).addresses_of(part.ranges.source, part.ranges.source_region),
            target=_space(self._theirs).addresses_of(part.ranges.target, part.ranges.target_region),
        )
        return self.transport.device.copy(ranges, mine, self._theirs, part.mark)

    def landed(self, ticket: Any) -> bool:
        """Its event is complete. A device that fails once the owner's process has ended has no page left to spoil."""
        try:
            return self.transport.device.finished(ticket)
        except Exception as error:
            said = " ".join(str(error).split())
            if self.dead:
                raise Refused(f"the process of {self.peer.node} has ended; the device says {said}") from None
            raise Broken(f"the device failed: {said}") from None

    def give_up(self, ticket: Any) -> None:
        """A launched copy cannot be called back."""
        del ticket

    def _told(self, message: Message) -> None:
        if isinstance(message, Revoked):
            self._revoked.add(message.room)
            self.peer.lane.drop(Incarnation(*message.room), "the pages were given up")


class _Pull(_ToOwner):
    """Orders the owner to copy, and waits for its word."""

    def __init__(self, transport: CudaIpcTransport, body: Descriptor, peer: Peer) -> None:
        super().__init__(transport, body, peer)
        self._numbers = itertools.count(1)
        self._ended: dict[int, Ended] = {}

    def begin(self, part: Launch, tag: Tag) -> Any:
        """Send the order. The ticket keeps the mark alive until the owner has used it."""
        device = self.transport.device
        number = next(self._numbers)
        ranges = part.ranges
        order = Order(
            number, _room(tag.incarnation), ranges.source.tobytes(), ranges.target.tobytes(), ranges.nbytes.tobytes(),
            device.export_mark(part.mark),
        )  # fmt: skip
        if self.channel is None or not self.channel.send(order):
            raise Refused(f"{self.peer.node} is not reached")
        return number, part.mark

    def landed(self, ticket: Any) -> bool:
        """The owner's word, or its end: a process that is gone reads nothing."""
        ended = self._ended.pop(ticket[0], None)
        if ended is None:
            if self.dead:
                raise Refused(f"the process of {self.peer.node} has ended")
            return False
        if ended.reason is None:
            return True
        raise (Broken if ended.unsure else Refused)(ended.reason)

    def give_up(self, ticket: Any) -> None:
        """Not begun, it will not be; its end is told either way."""
        if self.channel is not None:
            self.channel.send(Cancel(ticket[0]))

    def _told(self, message: Message) -> None:
        if isinstance(message, Ended):
            self._ended[message.number] = message


def _room(incarnation: Incarnation) -> tuple[int, int, int]:
    return incarnation.room, incarnation.attempt, incarnation.epoch


def _space(mapped: Sequence[Mapped]) -> Space:
    return Space([each.nbytes for each in mapped], [each.address for each in mapped])
