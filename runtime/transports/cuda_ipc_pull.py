"""The owner's side of a pull: it copies out of the writers' memory itself, in the order in which orders came.

Because the owner's own process places the bytes, it can fence: what it has not begun it will not begin, and what it
has begun it sees end.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from kvpoll.runtime.transports.copy_plan import Plan, plan_of
from kvpoll.runtime.transports.cuda_ipc_channel import Channel, Ended, Order
from kvpoll.runtime.transports.cuda_ipc_device import Device, Mapped
from kvpoll.runtime.transports.engine_lane import PAUSE_MIN_S, PAUSE_SHARE
from kvpoll.runtime.transports.interface import Copies
from kvpoll.runtime.transports.offsets import BadRange, Space

REVOKED_MAX: Final = 1 << 16
"""Incarnations whose orders are refused; the oldest are forgotten, long after their writers were told."""

DEPTH: Final = 64
PAUSE_MAX_S: Final = 0.002
REVOKE_WAIT_S: Final = 0.05


class Source(NamedTuple):
    """A writer's memory as mapped here."""

    space: Space
    regions: Sequence[Mapped]


class _Running(NamedTuple):
    channel: Channel
    order: Order
    ticket: Any
    begun: float


class Puller:
    """The queue of orders, and the thread that begins them and watches them end.

    open_source: maps a writer's memory; called in the thread, once per writer. gone: called when a writer's process
    has ended and nothing that it ordered is being copied any more.
    """

    def __init__(
        self,
        device: Device,
        space: Space,
        regions: Sequence[Mapped],
        open_source: Callable[[Channel], Source],
        gone: Callable[[Channel], None],
    ) -> None:
        self._device, self._space, self._regions = device, space, regions
        self._open_source, self._gone = open_source, gone
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Channel, Order]] = deque()
        self._running: list[_Running] = []
        self._dead: list[Channel] = []
        self._revoked: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        self._sources: dict[Channel, Source] = {}
        self._broken = False
        self._closed = False
        self._thread = threading.Thread(target=self._pull, name="cuda_ipc-puller", daemon=True)
        self._thread.start()

    def submit(self, channel: Channel, order: Order) -> None:
        """An order has come."""
        with self._changed:
            self._waiting.append((channel, order))
            self._changed.notify_all()

    def cancel(self, channel: Channel, number: int) -> None:
        """Do not begin this order, if it has not begun."""
        self._drop(lambda sender, order: sender is channel and order.number == number, "aborted")

    def revoke(self, room: tuple[int, int, int]) -> bool:
        """Begin nothing more for this incarnation. True when nothing of it is being copied, after a short wait."""
        with self._changed:
            self._revoked[room] = None
            if len(self._revoked) > REVOKED_MAX:
                self._revoked.popitem(last=False)
        self._drop(lambda sender, order: order.room == room, "the pages were given up")
        until = time.monotonic() + REVOKE_WAIT_S
        with self._changed:
            while any(running.order.room == room for running in self._running):
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return False
            return not self._broken

    def writer_died(self, channel: Channel) -> None:
        """Drop what it ordered; ``gone`` is called once what is being copied for it has ended."""
        self._drop(lambda sender, order: sender is channel, "the writer's process has ended")
        with self._changed:
            self._dead.append(channel)
            self._changed.notify_all()

    def close(self, limit_s: float) -> bool:
        """Begin nothing more, wait for what runs, tell the writers. False if something still runs."""
        self._drop(lambda sender, order: True, "the owner was closed")
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(limit_s)
        return not self._thread.is_alive() and not self._broken

    def _drop(self, chosen: Callable[[Channel, Order], bool], reason: str) -> None:
        with self._changed:
            dropped = [pair for pair in self._waiting if chosen(*pair)]
            self._waiting = deque(pair for pair in self._waiting if not chosen(*pair))
        for channel, order in dropped:
            channel.send(Ended(order.number, reason))

    def _pull(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._running or self._dead):
                    self._changed.wait()
                if self._closed and not self._running:
                    return
            moved = self._begin_next()
            moved |= self._look()
            self._bury()
            with self._changed:
                if self._running and not moved:
                    age = time.monotonic() - max(running.begun for running in self._running)
                    self._changed.wait(min(PAUSE_MAX_S, max(PAUSE_MIN_S, age * PAUSE_SHARE)))

    def _begin_next(self) -> bool:
        with self._changed:
            if not self._waiting or len(self._running) >= DEPTH:
                return False
            channel, order = self._waiting.popleft()
            if order.room in self._revoked:
                refusal: str | None = "the pages were given up"
            else:
                refusal = None
                # Entered before it begins, so that a revocation from now on waits for it.
                self._running.append(_Running(channel, order, None, 0.0))
        if refusal is not None:
            channel.send(Ended(order.number, refusal))
            return True
        ticket: Any = None
        ended: Ended | None = None
        try:
            ranges, source = self._ranges(channel, order)
            mark = self._device.open_mark(order.mark)
            try:
                ticket = self._device.copy(ranges, source.regions, self._regions, mark)
            except Exception as error:
                ended = self._break(order, error)
        except BadRange as error:
            ended = Ended(order.number, f"refused: {error}")
        except Exception as error:  # the writer's memory or event cannot be opened: nothing was begun
            ended = Ended(order.number, f"cannot be pulled: {_line(error)}")
        with self._changed:
            self._running.pop()
            if ended is None:
                self._running.append(_Running(channel, order, ticket, time.monotonic()))
            self._changed.notify_all()
        if ended is not None:
            channel.send(ended)
        return True

    def _ranges(self, channel: Channel, order: Order) -> tuple[Plan, Source]:
        """The order's ranges at addresses of this process. Raises BadRange."""
        if channel not in self._sources:
            self._sources[channel] = self._open_source(channel)
        source = self._sources[channel]
        columns = [np.frombuffer(column, np.int64) for column in (order.source, order.target, order.nbytes)]
        return plan_of(Copies(*columns), source.space, self._space), source

    def _break(self, order: Order, error: Exception) -> Ended:
        self._broken = True
        return Ended(order.number, f"the device failed: {_line(error)}", unsure=True)

    def _look(self) -> bool:
        over: list[tuple[_Running, Ended]] = []
        for running in self._running:
            try:
                if self._device.finished(running.ticket):
                    over.append((running, Ended(running.order.number, None)))
            except Exception as error:
                over.append((running, self._break(running.order, error)))
        with self._changed:
            done = {id(running) for running, _ in over}
            self._running = [running for running in self._running if id(running) not in done]
            self._changed.notify_all()
        for running, ended in over:
            running.channel.send(ended)
        return bool(over)

    def _bury(self) -> None:
        with self._changed:
            busy = {running.channel for running in self._running}
            gone = [channel for channel in self._dead if channel not in busy]
            self._dead = [channel for channel in self._dead if channel in busy]
        for channel in gone:
            self._sources.pop(channel, None)
            self._gone(channel)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
