"""Everything ends in time: L1 bounded-end, L4 recover, L5 reaper-free, L6 non-blocking, L7 honest-timer."""

from __future__ import annotations

from kvpoll.spec import trace
from kvpoll.spec.invariants.monitor import (
    LIVE_POLLS,
    PAUSE,
    Monitor,
    MortalMonitor,
    Recent,
    TimedMonitor,
    ends,
    matches,
)
from kvpoll.spec.trace import Pair


class _Ending:
    """An admitted request that has not ended everywhere; pending: node -> has it opened the room there?"""

    __slots__ = ("admitted_t", "pending", "resulted")

    def __init__(self, event: trace.Admitted) -> None:
        self.admitted_t = event.t
        self.pending = dict.fromkeys((*event.prefill, *event.decode), False)
        self.resulted = False


class BoundedEnd(MortalMonitor, TimedMonitor):
    """L1. Within ``end_s`` of Admitted every prefill and decode rank of it has come to an end for the pair:
    Success, Failed, Retired, or from a numbered poll to Absent. The violation is at the deadline, on the
    rank.

    A rank that is down or stopped since the admission is excused. So is one that never opened the room, once
    the client has its answer: nobody will bring the request to it any more.
    """

    invariant = "L1"

    def begin(self) -> None:
        self._endings: dict[Pair, _Ending] = {}

    def on_admitted(self, event: trace.Admitted) -> None:
        ending = self._endings[event.pair] = _Ending(event)
        self.expect(event.t + self.bounds.end_s, (event.pair, ending))

    def on_stepped(self, event: trace.Stepped) -> None:
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        opened = after in LIVE_POLLS
        if opened and before in LIVE_POLLS:
            return
        pair = event.incarnation[:2]
        ending = self._endings.get(pair)
        if ending is None or event.node not in ending.pending:
            return
        if opened:
            ending.pending[event.node] = True
        elif ends(event):
            del ending.pending[event.node]
            if not ending.pending:
                del self._endings[pair]

    def on_resulted(self, event: trace.Resulted) -> None:
        """Ranks that know nothing of the request need not hear of it any more."""
        ending = self._endings.get(event.pair)
        if ending is not None:
            ending.resulted = True

    def lapse(self, deadline: float, debt: tuple[Pair, _Ending]) -> None:
        pair, ending = debt
        if self._endings.get(pair) is not ending:
            return
        del self._endings[pair]
        for node, opened in ending.pending.items():
            if (ending.resulted and not opened) or self.excuse(node, ending.admitted_t):
                continue
            state = "has not ended" if opened else "was never opened"
            self.violate(deadline, node, pair, f"the room {state} {self.bounds.end_s:g} s after admission")


class Recover(TimedMonitor):
    """L4. Every request Admitted after Healed is Resulted ok within ``recover_s`` of its admission. The
    violation is at the answer when it is not ok, else at the deadline, on the router.
    """

    invariant = "L4"

    def begin(self) -> None:
        self._healed = False
        self._pending: dict[Pair, trace.Admitted] = {}

    def on_healed(self, event: trace.Healed) -> None:
        self._healed = True

    def on_admitted(self, event: trace.Admitted) -> None:
        if self._healed:
            self._pending[event.pair] = event
            self.expect(event.t + self.bounds.recover_s, event)

    def on_resulted(self, event: trace.Resulted) -> None:
        """The clock stops; but not at just any answer."""
        if self._pending.pop(event.pair, None) is not None and not event.ok:
            text = f"request {event.rid}, admitted after the faults, failed: {event.cause}"
            self.violate(event.t, event.node, event.pair, text)

    def lapse(self, deadline: float, debt: trace.Admitted) -> None:
        if self._pending.get(debt.pair) is debt:
            del self._pending[debt.pair]
            bound_s = self.bounds.recover_s
            text = f"request {debt.rid}, admitted after the faults, has no answer after {bound_s:g} s"
            self.violate(deadline, debt.node, debt.pair, text)


class ReaperFree(Monitor):
    """L5. On Surveyed: overdue is 0."""

    invariant = "L5"

    def on_surveyed(self, event: trace.Surveyed) -> None:
        if event.overdue:
            self.violate(event.t, event.node, None, f"{event.overdue} expired entries were not removed")


class NonBlocking(Monitor):
    """L6. On Stalled: blocked_s is at most ``step_s``."""

    invariant = "L6"

    def on_stalled(self, event: trace.Stalled) -> None:
        if event.blocked_s > self.bounds.step_s:
            text = f"one step waited {event.blocked_s:g} s for {event.on} (at most {self.bounds.step_s:g} s)"
            self.violate(event.t, event.node, None, text)


class HonestTimer(Monitor):
    """L7. Judged are Stepped by DeadlineReached that change the poll. With detail "waiting" on a receiver, it
    comes after an Addressed of that node and pair: before that the peer had nowhere to write. With detail
    "bootstrap" on a sender, no receiver of the pair is in WaitingForInput without having Addressed: such a
    peer has resolved its ranks and waits only for its own memory.

    A receiver whose process stood still (a fault of kind "pause") at any time since it opened the room is excused:
    its own deadline, which would have ended the request first, stood still as well.
    """

    invariant = "L7"

    def begin(self) -> None:
        self._addressed: Recent[tuple[str, Pair], None] = Recent()
        self._holding: dict[Pair, set[str]] = {}
        self._opened_t: dict[tuple[str, Pair], float] = {}
        self._pauses: set[tuple[str, str]] = set()
        self._went_on_t: dict[str, float] = {}

    def on_fault_began(self, event: trace.FaultBegan) -> None:
        """A process stands still from here on; its peers cannot know."""
        if event.kind == PAUSE:
            self._pauses.add((event.node, event.fault))

    def on_fault_ended(self, event: trace.FaultEnded) -> None:
        """It goes on, and is late with what it had begun."""
        if (event.node, event.fault) in self._pauses:
            self._pauses.discard((event.node, event.fault))
            self._went_on_t[event.node] = event.t

    def _stood_still(self, node: str, since: float) -> bool:
        return any(matches(name, node) for name, _ in self._pauses) or any(
            t >= since and matches(name, node) for name, t in self._went_on_t.items()
        )

    def on_addressed(self, event: trace.Addressed) -> None:
        """From here on the prefill side can act."""
        pair = event.incarnation[:2]
        self._addressed.remember((event.node, pair), None)
        self._let_go(pair, event.node)

    def on_stepped(self, event: trace.Stepped) -> None:
        if event.poll_before == event.poll_after:
            return
        if event.fact == "DeadlineReached":
            self._judge(event)
        if event.role != "receiver":
            return
        pair, after = event.incarnation[:2], event.poll_after
        if after in LIVE_POLLS:
            self._opened_t.setdefault((event.node, pair), event.t)
        if after == "WaitingForInput":
            if (event.node, pair) not in self._addressed:
                self._holding.setdefault(pair, set()).add(event.node)
            return
        self._let_go(pair, event.node)
        if after not in LIVE_POLLS:
            self._addressed.pop((event.node, pair), None)
            self._opened_t.pop((event.node, pair), None)

    def _judge(self, event: trace.Stepped) -> None:
        pair = event.incarnation[:2]
        if event.role == "receiver":
            if event.detail == "waiting" and (event.node, pair) not in self._addressed:
                text = "gave up waiting for a peer that had not been told where to write"
                self.violate(event.t, event.node, pair, text)
        elif event.detail == "bootstrap" and pair in self._holding:
            held = {node for node in self._holding[pair] if not self._stood_still(node, self._opened_t[node, pair])}
            if held:
                text = f"gave up on {', '.join(sorted(held))}, which was only waiting for its own memory"
                self.violate(event.t, event.node, pair, text)

    def _let_go(self, pair: Pair, node: str) -> None:
        holding = self._holding.get(pair)
        if holding is not None:
            holding.discard(node)
            if not holding:
                del self._holding[pair]

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """It waits for nothing any more."""
        for pair in [pair for pair, nodes in self._holding.items() if event.node in nodes]:
            self._let_go(pair, event.node)
        for table in (self._addressed, self._opened_t):
            for key in [key for key in table if key[0] == event.node]:
                del table[key]
