"""Nothing is left behind, nothing piles up: R1 quiesce-zero, R2 bounded-maps, R3 retry-budget."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Final

from kvpoll.spec import trace
from kvpoll.spec.invariants.monitor import GONE, OPENING, Monitor, TimedMonitor
from kvpoll.spec.trace import Pair

WINDOW_S: Final = 1.0 - 1e-9
"""Half open: two requests that are a second apart, to the nanosecond, are in different windows."""


class QuiesceZero(Monitor):
    """R1. On Surveyed: every table of the node has 0 entries."""

    invariant = "R1"

    def on_surveyed(self, event: trace.Surveyed) -> None:
        left = [f"{entries} in {name}" for name, entries in event.tables if entries]
        if left:
            self.violate(event.t, event.node, None, f"left on an idle node: {', '.join(left)}")


class BoundedMaps(TimedMonitor):
    """R2. A room is *ownerless* on a node while it is Announced, or numbered without a RequestOpened. At most
    ``ownerless_rooms`` are so at once (reported where the bound is crossed, with the pair that crosses it),
    and none for longer than ``ownerless_s`` (reported at the deadline, once for each room).
    """

    invariant = "R2"

    def begin(self) -> None:
        self._ownerless: defaultdict[str, dict[int, tuple[Pair, float]]] = defaultdict(dict)

    def on_stepped(self, event: trace.Stepped) -> None:
        """Only openings, announcements and ends matter; an owner may come without a change of poll."""
        before, after = event.poll_before, event.poll_after
        if event.fact == OPENING:
            if event.fact_incarnation == event.incarnation:
                self._ownerless[event.node].pop(event.incarnation.room, None)
        elif before == after:
            self._succeed(event)
        elif after in GONE:
            self._ownerless[event.node].pop(event.incarnation.room, None)
        elif before in GONE:
            self._orphan(event)

    def _succeed(self, event: trace.Stepped) -> None:
        """Another attempt may take the place of an ownerless one without a change of poll."""
        known = self._ownerless[event.node].get(event.incarnation.room)
        if known is not None and known[0] != event.incarnation.pair:
            self._orphan(event)

    def _orphan(self, event: trace.Stepped) -> None:
        rooms, pair, most = self._ownerless[event.node], event.incarnation.pair, self.bounds.ownerless_rooms
        rooms[pair[0]] = (pair, event.t)
        self.expect(event.t + self.bounds.ownerless_s, (event.node, pair, event.t))
        if len(rooms) == most + 1:
            self.violate(event.t, event.node, pair, f"{len(rooms)} rooms that nobody opened (at most {most})")

    def lapse(self, deadline: float, debt: tuple[str, Pair, float]) -> None:
        node, pair, since = debt
        if self._ownerless[node].get(pair[0]) == (pair, since):
            text = f"nobody opened the room within {self.bounds.ownerless_s:g} s, and it is still there"
            self.violate(deadline, node, pair, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        self._ownerless.pop(event.node, None)


class RetryBudget(Monitor):
    """R3. Of the Requested with repeat > 0, each node sends at most ``repeats_per_s`` in any window of one
    second.
    """

    invariant = "R3"

    def begin(self) -> None:
        one_too_many = int(self.bounds.repeats_per_s) + 1
        self._times: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=one_too_many))

    def on_requested(self, event: trace.Requested) -> None:
        if event.repeat <= 0:
            return
        times = self._times[event.node]
        times.append(event.t)
        if len(times) == times.maxlen and event.t - times[0] < WINDOW_S:
            text = (
                f"{len(times)} repeated requests within one second "
                f"(at most {self.bounds.repeats_per_s:g}), the last {event.route} to {event.server}"
            )
            self.violate(event.t, event.node, None, text)
