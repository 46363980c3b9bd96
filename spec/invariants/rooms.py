"""One room on one rank: S2 generation, S3 sticky-terminal, S4 no-resurrection, S12 room-unique."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from kvpoll.spec.invariants.monitor import GONE, LIVE_POLLS, OPENING, Monitor, Recent, said
from kvpoll.spec.trace import NodeStopped, Pair, Stepped
from kvpoll.spec.vocabulary import POLL_NUMBERS, TERMINAL_POLLS

RIVALRY: Final = "RivalOpened"
"""Another request asked for a room that is taken; unless the step orders ``REJECTION`` it gets the room."""

REJECTION: Final = "RejectRequest"


class Generation(Monitor):
    """S2. A Stepped whose fact was meant for another incarnation than the room's own changes neither poll nor
    lease; answering such a fact (actions only) is harmless.

    ``incarnation`` is the room's own before the step, or after it if the step opened the room: so a fact that
    opens a room is compared with what it opened.
    """

    invariant = "S2"

    def on_stepped(self, event: Stepped) -> None:
        if event.fact_incarnation == event.incarnation:
            return
        if event.poll_before == event.poll_after and event.lease_before == event.lease_after:
            return
        text = (
            f"{event.fact} meant for {tuple(event.fact_incarnation)} moved {tuple(event.incarnation)} "
            f"from {event.poll_before}/{event.lease_before} to {event.poll_after}/{event.lease_after}"
        )
        self.violate(event.t, event.node, event.incarnation.pair, text)


class StickyTerminal(Monitor):
    """S3. No Stepped leads from Success or Failed to another numbered poll, and none from a numbered poll to
    a smaller one, except to Failed.

    A room that is over may be taken by another attempt: RequestOpened of a pair other than the one that ended
    there is not judged here.
    """

    invariant = "S3"

    def begin(self) -> None:
        self._ended: Recent[tuple[str, int], Pair] = Recent()

    def on_stepped(self, event: Stepped) -> None:
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        if before in TERMINAL_POLLS:
            self._judge_ended(event)
        elif after in TERMINAL_POLLS:
            self._ended.remember((event.node, event.incarnation.room), event.incarnation.pair)
        elif POLL_NUMBERS.get(after, 9) < POLL_NUMBERS.get(before, 0):
            self._report_step(event)

    def _judge_ended(self, event: Stepped) -> None:
        pair = event.incarnation.pair
        ended = self._ended.pop((event.node, pair[0]), None)
        if event.poll_after not in POLL_NUMBERS:
            return
        if event.poll_after in TERMINAL_POLLS:
            self._ended.remember((event.node, pair[0]), pair)
        if event.fact != OPENING or ended is None or ended == pair:
            self._report_step(event)

    def _report_step(self, event: Stepped) -> None:
        text = f"{event.fact} moved the room from {event.poll_before} back to {event.poll_after}"
        self.violate(event.t, event.node, event.incarnation.pair, text)


class NoResurrection(Monitor):
    """S4. A pair that a node has cleared (numbered to Absent, or anything to Retired) never becomes Announced
    or numbered there again. A message that comes before its room was ever opened is early, not late, and is no
    violation: what becomes of such a room is R2's business.

    Each node remembers its last ``REMEMBERED`` cleared pairs and forgets them when it stops. Another attempt
    at the same room is another pair, and welcome.
    """

    invariant = "S4"

    def begin(self) -> None:
        self._cleared: defaultdict[str, Recent[Pair, None]] = defaultdict(Recent)

    def on_stepped(self, event: Stepped) -> None:
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        if after in GONE:
            if after == "Retired" or before in POLL_NUMBERS:
                self._cleared[event.node].remember(event.incarnation.pair, None)
        elif before in GONE:
            self._judge(event)

    def _judge(self, event: Stepped) -> None:
        pair, after = event.incarnation.pair, event.poll_after
        if pair in self._cleared.get(event.node, ()):
            text = f"{event.fact} brought a cleared room back as {after}"
            self.violate(event.t, event.node, pair, text)

    def on_node_stopped(self, event: NodeStopped) -> None:
        """A new process has cleared nothing."""
        self._cleared.pop(event.node, None)


class RoomUnique(Monitor):
    """S12. A Stepped by RequestOpened never makes a pair live (numbered, not terminal) on a node on which
    another pair of the same room is live; nor does it move a live room that belongs to another pair than it
    opens. A RivalOpened of another pair that is offered to a live room is answered by RejectRequest.
    """

    invariant = "S12"

    def begin(self) -> None:
        self._live: defaultdict[str, dict[int, Pair]] = defaultdict(dict)

    def on_stepped(self, event: Stepped) -> None:
        was_live = event.poll_before in LIVE_POLLS
        if event.poll_after not in LIVE_POLLS:
            if was_live:
                self._live[event.node].pop(event.incarnation.room, None)
        elif event.fact == OPENING:
            self._open(event, was_live)
        elif not was_live:
            self._live[event.node][event.incarnation.room] = event.incarnation.pair
        elif event.fact == RIVALRY and REJECTION not in event.actions:
            rival, own = event.fact_incarnation.pair, event.incarnation.pair
            if rival != own:
                self._report_two(event, rival, own)

    def _open(self, event: Stepped, was_live: bool) -> None:
        own, meant = event.incarnation.pair, event.fact_incarnation.pair
        live = self._live[event.node]
        present = live.get(own[0])
        if own != meant and was_live:
            if event.poll_before == event.poll_after and event.lease_before == event.lease_after:
                return
            present, own = own, meant
        live[own[0]] = own
        if present is not None and present != own:
            self._report_two(event, own, present)

    def _report_two(self, event: Stepped, second: Pair, first: Pair) -> None:
        text = f"{said(second)} was opened while attempt {first[1]} of the room was live"
        self.violate(event.t, event.node, second, text)

    def on_node_stopped(self, event: NodeStopped) -> None:
        self._live.pop(event.node, None)
