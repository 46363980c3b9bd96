"""The control plane of one rank: one ZeroMQ PULL that everyone writes to, one PUSH for each peer.

Theory of operation
-------------------
A plane belongs to one thread, the rank's loop; only ``wake`` may be called from others. (Two threads on one socket
mix the frames of their messages, A26, so any other thread gets a RuntimeError at once.) Nothing here waits for a
peer (A19): ``send`` hands a message to ZeroMQ's queue or drops it, ``receive`` takes what has arrived, and the only
call that sleeps is ``wait``, for as long as its caller says. A peer that hangs, is stopped, or was never there costs
its own queue and nothing else.

Nothing that arrives can end the loop (A04). What cannot be read, is meant for someone else, comes from a former life
or came before is dropped and counted under one of ``DROPPED``. The epoch inside an *incarnation* is not looked at:
whether mail for a room is late is the machine's to say.

Messages that may wait travel together, up to ``FRAME_MESSAGES`` in a frame. What a message costs both ends and ZeroMQ's
threads is then shared by several when there is much to say, and nobody waits longer than to the end of a loop's turn.

What the simulator's network promises (``sim/world.py``) holds here too. A channel keeps its order: serials rise, and
a message that was overtaken, which can happen when a connection is made anew, is dropped like a duplicate. What a
disconnect lost is noticed by both ends: a gap in the serials puts a ``Missed`` before the message that revealed it,
and sends one to the peer. Both are LinkRestored to a room. The loss of the very first messages of a channel is seen
only by who sent them (``send`` returned False), because a receiver cannot tell it from a peer that has long talked to
its predecessor.

Limits. All tables are bounded (R2). ZeroMQ's own queues hold ``queue_messages`` of at most twice
``MESSAGE_BYTES_MAX`` for each connection; how many connections a stranger may open, and how many frames he may
put into one message that he never ends, ZeroMQ does not bound. So a plane listens on loopback unless told otherwise,
and beyond it belongs behind a network that is trusted. Without a token anyone may speak under any name. Host names
are resolved by ZeroMQ's one I/O thread, where a slow name server delays every channel: advertise addresses.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import zmq

from kvpoll.runtime.control.messages import (
    ENDPOINT,
    MESSAGE_BYTES_MAX,
    NAME_CHARS_MAX,
    REASONS,
    TOKEN_BYTES_MAX,
    Envelope,
    MalformedMessage,
    Message,
    Missed,
    Ping,
    Pong,
    decode,
    encode,
)
from kvpoll.spec.source import BadInput

CALL_BOUND_S: Final = 1.0
"""L6: no call but ``wait`` takes longer, whatever peers do. It is what one scheduler step may cost; in practice a
send is microseconds, and the first one to a peer, which makes a socket, a fraction of a millisecond."""

CLOSE_BOUND_S: Final = 2.0
"""``close`` ends within this time: sockets do not linger."""

QUEUE_MESSAGES: Final = 4096
"""Longest queue of one channel, at each end. ZeroMQ learns in strides of half of it what has left, so only half is
certain to be free when everything has been sent."""

CHANNELS_MAX: Final = 1024
CHANNEL_IDLE_S: Final = 300.0
CHANNEL_BUSY_S: Final = 10.0
SENDERS_MAX: Final = 4096
RECEIVE_LIMIT: Final = 1024
FRAME_MESSAGES: Final = 8
"""Messages that are sent together, where their sender allows them to wait: fewer would cost more system calls, more
would keep the peer idle until its turn comes."""

FRAMES_KEPT: Final = 4
WAKE_BYTES: Final = 4096
PORT_MAX: Final = 65_535

RECEIVED_DROPS: Final = (*REASONS, "wrong_target", "unknown_peer", "stale_sender", "duplicate")
"""Of what arrives. wrong_target: for another node, or for another life of this one. unknown_peer: ``known`` denies
the sender. stale_sender: from a former life of a node that has been heard in a newer one. duplicate: its serial has
come before, or it was overtaken."""

SENT_DROPS: Final = ("queue_full", "too_many_peers", "unusable_endpoint", "unencodable", "closed")
"""Of what is sent. queue_full: the peer does not read. too_many_peers: ``channels_max`` others were spoken to in the
last ``CHANNEL_BUSY_S``. unencodable: over a bound of ``messages``."""

DROPPED: Final = (*RECEIVED_DROPS, *SENT_DROPS)

_log = logging.getLogger(__name__)
_is_endpoint = re.compile(ENDPOINT).match


class _Sender(NamedTuple):
    """What is remembered of one sender: its newest life, and the last serial of that life."""

    epoch: int
    serial: int


class _Channel:
    """One PUSH socket, the last serial that was used on it, and when; what waits to be sent on it, and for whom."""

    __slots__ = ("serial", "socket", "target", "used", "waiting")

    def __init__(self, socket: zmq.Socket[bytes], serial: int) -> None:
        self.socket = socket
        self.serial = serial
        self.used = 0.0
        self.waiting: list[Message] = []
        self.target: tuple[str, int | None] = ("", None)


class ControlPlane:
    """Sends and receives control messages as ``node`` in its life ``epoch``.

    ``endpoint`` is the address that peers send to; it travels in every envelope. ``sent`` and ``received`` count
    messages, ``dropped`` counts by reason, ``missed`` counts what never arrived.
    """

    def __init__(
        self,
        node: str,
        epoch: int,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        advertise: str | None = None,
        token: bytes | None = None,
        known: Callable[[str], bool] | None = None,
        on_dropped: Callable[[str], None] | None = None,
        queue_messages: int = QUEUE_MESSAGES,
        channels_max: int = CHANNELS_MAX,
        channel_idle_s: float = CHANNEL_IDLE_S,
        senders_max: int = SENDERS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind ``host``:``port`` (0: any free port) and listen. Raises BadInput when that cannot be.

        advertise: host name that peers reach this one by; needed where ``host`` is every interface. token: secret
        of the cluster, 1 to 64 bytes; messages that are not sealed with it are dropped. known: whose messages are
        welcome, None for everyone's. on_dropped: called with the reason of each drop (a metric). clock: seconds.
        """
        _check(node, epoch, token)
        _check_address(node, host, port, advertise)
        self.node = node
        self.epoch = epoch
        self.sent = 0
        self.received = 0
        self.missed = 0
        self.dropped: dict[str, int] = dict.fromkeys(DROPPED, 0)
        self._token = token
        self._known = known
        self._on_dropped = on_dropped
        self._queue_messages = queue_messages
        self._channels_max = channels_max
        self._channel_idle_s = channel_idle_s
        self._senders_max = senders_max
        self._clock = clock
        self._channels: dict[str, _Channel] = {}
        self._waiting: dict[str, _Channel] = {}
        self._senders: dict[str, _Sender] = {}
        self._serials: dict[str, int] = {}
        self._serial_floor = 0
        self._gaps: dict[str, tuple[Envelope, int]] = {}
        self._partial: list[bytes] = []
        self._swept = clock()
        self._owner: int | None = None
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, channels_max + 8)
        try:
            self._pull = self._listen(host, port)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.endpoint = _endpoint(advertise or host, self._bound_port())
        self._wake_lock = threading.Lock()
        self._is_woken = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.poller = zmq.Poller()
        self.attach(self.poller)

    # -- sockets

    def _listen(self, host: str, port: int) -> zmq.Socket[bytes]:
        pull = self._context.socket(zmq.PULL)
        _settle(pull)
        pull.setsockopt(zmq.RCVHWM, self._queue_messages)
        # Up to twice the bound is read, so that a peer's small mistake is counted; beyond it the connection is cut.
        pull.setsockopt(zmq.MAXMSGSIZE, 2 * MESSAGE_BYTES_MAX)
        pull.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
        pull.setsockopt(zmq.IPV6, ":" in host)
        pull.setsockopt(zmq.BACKLOG, 1024)
        try:
            pull.bind(f"tcp://{_bracketed(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            pull.close(linger=0)
            cause = zmq.strerror(error.errno or 0)
            mend = "choose another port, or 0 for any" if port else "give a host address of this machine"
            raise BadInput(f"{_endpoint(host, port)}: cannot listen here: {cause}; {mend}") from None
        return pull

    def _bound_port(self) -> int:
        bound = self._pull.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return int(bound.rstrip(b"\0").rpartition(b":")[2])

    def _channel(self, endpoint: str, may_evict: bool) -> _Channel | str:
        """The channel to an endpoint, made if need be; or why there is none, as one of ``SENT_DROPS``."""
        channel = self._channels.get(endpoint)
        if channel is not None:
            return channel
        if not _is_endpoint(endpoint):
            return "unusable_endpoint"
        if len(self._channels) >= self._channels_max and not (may_evict and self._evict()):
            return "too_many_peers"
        try:
            socket = self._connect(endpoint)
        except zmq.ZMQError as error:
            _log.warning("control plane of %s: cannot connect to %s: %s", self.node, endpoint, error.strerror)
            return "unusable_endpoint"
        # Serials go on where an earlier channel to this endpoint ended, or above all that are forgotten: a receiver
        # that knew the earlier one takes nothing for a duplicate, and sees what was lost when it was closed.
        serial = self._serials.pop(endpoint, self._serial_floor)
        channel = self._channels[endpoint] = _Channel(socket, serial)
        return channel

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        try:
            _settle(socket)
            socket.setsockopt(zmq.SNDHWM, self._queue_messages)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
            socket.setsockopt(zmq.IPV6, "[" in endpoint)
            socket.connect(endpoint)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        return socket

    def _evict(self) -> bool:
        """Close the channel that has been quiet for longest, if it has been quiet for ``CHANNEL_BUSY_S`` at all."""
        oldest = min(self._channels, key=lambda endpoint: self._channels[endpoint].used)
        if self._clock() - self._channels[oldest].used < CHANNEL_BUSY_S:
            return False
        self.retire(oldest)
        return True

    def retire(self, endpoint: str) -> None:
        """Close the channel to a peer that is gone; what is queued for it is lost. A later ``send`` opens another."""
        self._waiting.pop(endpoint, None)
        channel = self._channels.pop(endpoint, None)
        if channel is None:
            return
        channel.socket.close(linger=0)
        if len(self._serials) >= self._channels_max:
            self._serial_floor = max(self._serial_floor, self._serials.pop(next(iter(self._serials))))
        self._serials[endpoint] = channel.serial

    def _sweep(self) -> None:
        now = self._clock()
        if now - self._swept < min(1.0, self._channel_idle_s):
            return
        self._swept = now
        for endpoint in [e for e, c in self._channels.items() if now - c.used > self._channel_idle_s]:
            self.retire(endpoint)

    @property
    def channels(self) -> tuple[str, ...]:
        """Endpoints to which a socket is open."""
        return tuple(self._channels)

    def serial_of(self, endpoint: str) -> int:
        """The serial of the last message that was sent to an endpoint, 0 before the first; for a trace."""
        channel = self._channels.get(endpoint)
        return self._serials.get(endpoint, 0) if channel is None else channel.serial

    # -- sending

    def send(self, endpoint: str, node: str, epoch: int | None, message: Message, may_wait: bool = False) -> bool:
        """Hand a message for ``node``, in its life ``epoch`` (None: any), to the queue of its channel.

        may_wait: it may stay here until others join it, at the longest until ``flush``; a loop calls that before it
        sleeps. Returns at once. False says that it was dropped and counted; True promises nothing but order: only an
        answer proves that it arrived.
        """
        self._own()
        return self._send(endpoint, node, epoch, message, may_wait=may_wait)

    def _send(
        self, endpoint: str, node: str, epoch: int | None, message: Message,
        may_evict: bool = True, may_wait: bool = False,
    ) -> bool:  # fmt: skip
        if self._closed:
            return self._drop("closed", endpoint)
        channel = self._channel(endpoint, may_evict)
        if isinstance(channel, str):
            return self._drop(channel, endpoint)
        target = (node, epoch)
        if channel.waiting and channel.target != target:
            self._flush(endpoint, channel)
        # A serial is used up even by what is dropped below: the peer then sees the gap and both ends know.
        channel.serial += 1
        channel.used = self._clock()
        channel.target = target
        channel.waiting.append(message)
        if may_wait and len(channel.waiting) < FRAME_MESSAGES:
            self._waiting[endpoint] = channel
            return True
        return self._flush(endpoint, channel)

    def flush(self) -> None:
        """Send what waits."""
        while self._waiting:
            endpoint, channel = self._waiting.popitem()
            self._flush(endpoint, channel)

    def _flush(self, endpoint: str, channel: _Channel) -> bool:
        """Send what waits on a channel, in one frame. False when any of it was dropped."""
        messages, channel.waiting = channel.waiting, []
        if not messages:
            return True
        first = channel.serial - len(messages) + 1
        try:
            self._send_frame(channel, first, messages)
            return True
        except zmq.Again:
            for _ in messages:
                self._drop("queue_full", endpoint)
            return False
        except MalformedMessage as error:
            if len(messages) == 1:
                return self._drop("unencodable", f"{type(messages[0]).__name__} for {channel.target[0]}: {error}")
        sent = []
        for serial, message in enumerate(messages, first):  # the good ones shall not suffer for the bad one
            channel.waiting, channel.serial = [message], serial
            sent.append(self._flush(endpoint, channel))
        return all(sent)

    def _send_frame(self, channel: _Channel, serial: int, messages: list[Message]) -> None:
        envelope = Envelope(self.node, self.epoch, self.endpoint, serial, *channel.target)
        (frame,) = encode(envelope, messages, self._token)
        channel.socket.send(frame, zmq.DONTWAIT)
        self.sent += len(messages)

    def _drop(self, reason: str, detail: str) -> bool:
        """Count it, and log it when the count is a power of two: a flood fills no disk."""
        count = self.dropped[reason] = self.dropped[reason] + 1
        if self._on_dropped is not None:
            self._on_dropped(reason)
        if count & (count - 1) == 0:
            _log.warning("control plane of %s: dropped %d as %s, the last: %.300s", self.node, count, reason, detail)
        return False

    # -- receiving

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[tuple[Envelope, Message]]:
        """What has arrived, in order of each channel, looking at no more than ``limit`` frames, and at no further one
        after so many messages. Never waits.

        Pings are answered here, because whoever calls this is alive; they are returned too, since any message from
        a peer is a sign of life.
        """
        self._own()
        inbox: list[tuple[Envelope, Message]] = []
        if self._closed:
            return inbox
        try:
            for _ in range(limit):
                frames = self._read()
                if frames is not None:
                    self._take(frames, inbox)
                if len(inbox) >= limit:
                    break
        except zmq.Again:
            pass
        self._answer(inbox)
        self._sweep()
        return inbox

    def _read(self) -> list[bytes] | None:
        """The next frame; with the last one of a message, the first few of that message. Raises zmq.Again if none.

        Ours have one frame. A stranger's may have any number, and must not keep the loop until the last of them.
        """
        frame = self._pull.recv(zmq.DONTWAIT)
        if len(self._partial) < FRAMES_KEPT:
            self._partial.append(frame)
        if self._pull.getsockopt(zmq.RCVMORE):
            return None
        frames, self._partial = self._partial, []
        return frames

    def _take(self, frames: list[bytes], inbox: list[tuple[Envelope, Message]]) -> None:
        try:
            envelope, messages = decode(frames, self._token)
        except MalformedMessage as error:
            # Its place in the channel is used up, so that it does not look lost; it counts once, as what it is first.
            if error.envelope is None or self._admit(error.envelope, error.count, inbox):
                for _ in range(error.count - len(error.readable)):
                    self._drop(error.reason, str(error))
                if error.envelope is not None:
                    self._hand(error.envelope, error.readable, inbox)
            return
        if self._admit(envelope, len(messages), inbox):
            self._hand(envelope, enumerate(messages), inbox)

    def _hand(
        self, first: Envelope, messages: Iterable[tuple[int, Message]], inbox: list[tuple[Envelope, Message]]
    ) -> None:
        """Messages of one frame, by their places in it, each with an envelope that bears its own serial."""
        for place, message in messages:
            self.received += 1
            inbox.append((_numbered(first, first.serial + place) if place else first, message))

    def _admit(self, envelope: Envelope, count: int, inbox: list[tuple[Envelope, Message]]) -> bool:
        """Is this for us, from a life that is not over, and next in its channel? A gap goes to the inbox."""
        name, epoch, serial = envelope.node, envelope.epoch, envelope.serial
        if envelope.target != self.node or envelope.target_epoch not in (None, self.epoch):
            life = f"{envelope.target} epoch {envelope.target_epoch}"
            return self._drop("wrong_target", f"for {life}, this is {self.node} epoch {self.epoch}")
        if self._known is not None and not self._known(name):
            return self._drop("unknown_peer", name)
        seen = self._senders.pop(name, None)
        if seen is not None and (epoch < seen.epoch or (epoch == seen.epoch and serial <= seen.serial)):
            self._senders[name] = seen
            reason = "stale_sender" if epoch < seen.epoch else "duplicate"
            return self._drop(reason, f"{name} epoch {epoch} serial {serial} after {seen}")
        if seen is None and len(self._senders) >= self._senders_max:
            del self._senders[next(iter(self._senders))]  # the one that has been silent for longest
        self._senders[name] = _Sender(epoch, serial + count - 1)
        if seen is not None and epoch == seen.epoch and serial > seen.serial + 1:
            gap = serial - seen.serial - 1
            self.missed += gap
            self._gaps[name] = (envelope, gap)
            inbox.append((envelope, Missed(gap)))
        return True

    def _answer(self, inbox: list[tuple[Envelope, Message]]) -> None:
        """Pong to every Ping; Missed to every peer whose channel had a gap, once. Never at the cost of a channel."""
        for envelope, message in inbox:
            if isinstance(message, Ping):
                pong = Pong(message.serial)
                self._send(envelope.endpoint, envelope.node, envelope.epoch, pong, may_evict=False)
        gaps, self._gaps = self._gaps, {}
        for envelope, count in gaps.values():
            self._send(envelope.endpoint, envelope.node, envelope.epoch, Missed(count), may_evict=False)

    # -- waiting

    def attach(self, poller: zmq.Poller) -> None:
        """Let a loop's own poller wait for messages and for ``wake`` too. After it returns, call ``receive``."""
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)

    def filenos(self) -> tuple[int, int]:
        """File descriptors for a selector: of the messages, and of ``wake``.

        The first is edge-triggered (ZMQ_FD): it says that something changed, once. Go to sleep on it only after
        ``pending`` was False.
        """
        descriptor = self._pull.getsockopt(zmq.FD)
        assert isinstance(descriptor, int)
        return descriptor, self._wake_read

    def pending(self) -> bool:
        """Is there a message to receive now?"""
        self._own()
        return not self._closed and bool(self._pull.poll(0))

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a message arrives, ``wake`` is called, or the time is over. True unless the time was over."""
        self._own()
        if self._closed:
            return False
        ready = self.poller.poll(max(0, math.ceil(timeout_s * 1000)))
        self.clear_wake()
        return bool(ready)

    def clear_wake(self) -> None:
        """Take back what ``wake`` wrote, for a loop that has its own poller. ``wait`` does it by itself."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._wake_read, WAKE_BYTES)) == WAKE_BYTES:
                pass  # one read that is not full has emptied it
        # Only now: who finds it set relies on a look at what it has handed in, and that look is still to come.
        self._is_woken = False

    def wake(self) -> None:
        """End the ``wait`` that runs, or the next one. May be called from any thread, also after ``close``.

        A system call only once between two waits: each gives the interpreter's lock away.
        """
        if self._is_woken:
            return
        self._is_woken = True
        with self._wake_lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.write(self._wake_write, b"w")

    # -- the end

    def close(self, linger_s: float = 0.0) -> None:
        """Close all sockets, within ``CLOSE_BOUND_S``. A second close does nothing.

        linger_s: how long what is still queued (a Goodbye) may take to leave; at most ``CLOSE_BOUND_S`` / 2.
        """
        self._own()
        self.flush()
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)
        linger_ms = int(1000 * min(max(0.0, linger_s), CLOSE_BOUND_S / 2))
        for channel in self._channels.values():
            channel.socket.close(linger=linger_ms)
        self._channels.clear()
        self._pull.close(linger=0)
        self._context.term()  # returns when the last socket has gone, and none stays longer than linger_ms

    def __enter__(self) -> ControlPlane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hand_over(self) -> None:
        """Give the plane to the next thread that uses it. For its owner only, as the last thing it does with it."""
        self._own()
        self._owner = None

    def _own(self) -> None:
        """The first thread that uses the sockets owns them. In another one ZeroMQ would mix frames or abort."""
        here = threading.get_ident()
        if self._owner is None:
            self._owner = here
        elif self._owner != here:
            raise RuntimeError(f"the control plane of {self.node} is used by two threads; only wake() may be (A26)")


def _numbered(first: Envelope, serial: int) -> Envelope:
    """The envelope of a later message of a frame."""
    return Envelope(first.node, first.epoch, first.endpoint, serial, first.target, first.target_epoch)


def _settle(socket: zmq.Socket[bytes]) -> None:
    """What both ends have in common: no lingering, and a peer that is silent at the level of TCP or ZMTP is found."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    # Longer than any detector waits (heartbeat.py decides about peers): this only frees connections of the dead.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)


def _check(node: str, epoch: int, token: bytes | None) -> None:
    if not 0 < len(node) <= NAME_CHARS_MAX:
        raise BadInput(f"control plane: node name {node!r} must have 1 to {NAME_CHARS_MAX} characters; shorten it")
    if not 0 <= epoch < 2**63:
        raise BadInput(f"control plane of {node}: epoch {epoch} must have 63 bits; count from 0")
    if token is not None and not 0 < len(token) <= TOKEN_BYTES_MAX:
        raise BadInput(f"control plane of {node}: the token has {len(token)} bytes; give 1 to {TOKEN_BYTES_MAX}")


def _check_address(node: str, host: str, port: int, advertise: str | None) -> None:
    if not 0 <= port <= PORT_MAX:
        raise BadInput(
            f"control plane of {node}: port {port} does not exist; choose one up to {PORT_MAX}, or 0 for any"
        )
    if host in ("0.0.0.0", "::", "*") and advertise is None:
        raise BadInput(f"control plane of {node}: host {host} is no address to answer to; say which one to advertise")
    if not _is_endpoint(_endpoint(advertise or host, 1)):
        raise BadInput(f"control plane of {node}: {advertise or host!r} is not a host name or address; give one")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _endpoint(host: str, port: int) -> str:
    return f"tcp://{_bracketed(host)}:{port}"
