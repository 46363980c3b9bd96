"""Ranks among each other: S6 right-peer (of the two sides), S7 rank-agreement (within a group)."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, Final

from kvpoll.spec import trace
from kvpoll.spec.invariants.monitor import Monitor, MortalMonitor, Recent, TimedMonitor, ends
from kvpoll.spec.trace import Pair

AGREEMENT_WINDOW: Final = 4_096
"""How far (in collectives or decisions) one rank may lag behind its group and still be compared."""

TAKEN: Final[frozenset[str]] = frozenset({"Announced", "Bootstrapping", "WaitingForInput"})
"""Sender states that take a destination without a visible change, as one of several that are needed."""


class _Waiting:
    """An admitted request; decode: its decode ranks that have not come to an end."""

    __slots__ = ("admitted_t", "decode", "prefill")

    def __init__(self, event: trace.Admitted) -> None:
        self.admitted_t = event.t
        self.prefill = event.prefill
        self.decode = set(event.decode)


class RightPeer(MortalMonitor, TimedMonitor):
    """S6. Decode's pages (DestinationRegistered) are *accepted by the wrong peer* when a sender takes them
    that is no prefill rank of the pair's admission, or is in another process epoch than they were meant for.
    Then every decode rank of the pair has ended within ``propagate_s``: decode may ask the wrong peer, but it
    must not go on waiting for it. The violation is at that deadline, on the wrong peer.

    Judged are the last ``REMEMBERED`` admitted pairs, each until its last decode rank has ended. Decode ranks
    that are down or stopped since the admission are excused.
    """

    invariant = "S6"

    def begin(self) -> None:
        self._waiting: Recent[Pair, _Waiting] = Recent()
        self._epochs: dict[str, int] = {}

    def on_admitted(self, event: trace.Admitted) -> None:
        self._waiting.remember(event.pair, _Waiting(event))

    def on_stepped(self, event: trace.Stepped) -> None:
        if event.role == "receiver":
            if event.poll_before != event.poll_after and ends(event):
                self._strike(event.incarnation[:2], event.node)
        elif event.fact == "DestinationRegistered" and _accepts(event):
            self._judge(event)

    def _strike(self, pair: Pair, node: str) -> None:
        waiting = self._waiting.get(pair)
        if waiting is not None:
            waiting.decode.discard(node)
            if not waiting.decode:
                del self._waiting[pair]

    def _judge(self, event: trace.Stepped) -> None:
        pair, meant = event.fact_incarnation.pair, event.fact_incarnation.epoch
        waiting = self._waiting.get(pair)
        if waiting is None:
            return
        # A room that the message itself made may bear the epoch of the message, not of the process (A21).
        epoch = max(event.incarnation.epoch, self._epochs.get(event.node, 0))
        if event.node not in waiting.prefill:
            mistake = f"{event.node} took the pages"
        elif meant != epoch:
            mistake = f"{event.node} in epoch {epoch} took pages meant for its epoch {meant}"
        else:
            return
        self.expect(event.t + self.bounds.propagate_s, (event.node, pair, waiting, mistake))

    def lapse(self, deadline: float, debt: tuple[str, Pair, _Waiting, str]) -> None:
        node, pair, waiting, mistake = debt
        left = sorted(rank for rank in waiting.decode if not self.excuse(rank, waiting.admitted_t))
        if left:
            right = ", ".join(waiting.prefill)
            text = f"{mistake}, the request runs on {right}, and {left[0]} has not ended"
            self.violate(deadline, node, pair, text)

    def on_node_started(self, event: trace.NodeStarted) -> None:
        super().on_node_started(event)
        self._epochs[event.node] = event.epoch


def _accepts(event: trace.Stepped) -> bool:
    if event.poll_before != event.poll_after or event.lease_before != event.lease_after:
        return True
    return event.poll_after in TAKEN and not event.actions


class _History:
    """The decisions of one agreement group and how far each rank has come; ``None``: it went astray."""

    def __init__(self) -> None:
        self.first = 0
        self.decisions: deque[tuple[str, str]] = deque()
        self.position: dict[str, int | None] = {}

    def append(self, decision: tuple[str, str]) -> None:
        self.decisions.append(decision)
        if len(self.decisions) > AGREEMENT_WINDOW:
            self.decisions.popleft()
            self.first += 1


class RankAgreement(Monitor):
    """S7. In each group, the k-th collective that any rank enters has the kind and shape of the k-th of every
    other; and the decisions (rid, outcome) of each rank are a prefix of one common history.

    The history is what the rank that came first did. A rank is judged up to its first other decision;
    compared are the last ``AGREEMENT_WINDOW`` entries. While a rank of an engine is down its groups (those
    whose name begins with the same engine) are not judged, and once all are up again histories begin anew.
    """

    invariant = "S7"

    def begin(self) -> None:
        self._collectives: dict[str, Recent[int, tuple[str, Any, str]]] = {}
        self._histories: defaultdict[str, _History] = defaultdict(_History)
        self._down: dict[str, set[str]] = {}

    def on_collective_entered(self, event: trace.CollectiveEntered) -> None:
        if self._down and _engine(event.group) in self._down:
            return
        entered = self._collectives.get(event.group)
        if entered is None:
            entered = self._collectives[event.group] = Recent(AGREEMENT_WINDOW)
        first = entered.get(event.sequence)
        if first is None:
            entered.remember(event.sequence, (event.kind, event.shape, event.node))
        elif first[0] != event.kind or first[1] != event.shape:
            text = (
                f"collective {event.sequence} of {event.group}: {event.kind} {event.shape} here, "
                f"{first[0]} {first[1]} on {first[2]}"
            )
            self.violate(event.t, event.node, None, text)

    def on_decided(self, event: trace.Decided) -> None:
        if self._down and _engine(event.group) in self._down:
            return
        history = self._histories[event.group]
        position = history.position.get(event.node, 0)
        if position is None:
            return
        history.position[event.node] = position + 1
        place = position - history.first
        if place == len(history.decisions):
            history.append((event.rid, event.outcome))
        elif place >= 0 and history.decisions[place] != (event.rid, event.outcome):
            history.position[event.node] = None
            self._report_astray(event, position, history.decisions[place])

    def _report_astray(self, event: trace.Decided, position: int, expected: tuple[str, str]) -> None:
        text = (
            f"decision {position} of {event.group}: {event.outcome} {event.rid} here, "
            f"{expected[1]} {expected[0]} on the rank that came first"
        )
        self.violate(event.t, event.node, None, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """A group with a dead rank cannot agree on anything."""
        engine = _engine(event.node)
        self._down.setdefault(engine, set()).add(event.node)
        for groups in (self._collectives, self._histories):
            for group in [group for group in groups if _engine(group) == engine]:
                del groups[group]

    def on_node_started(self, event: trace.NodeStarted) -> None:
        """Once the whole engine is up, it is judged again."""
        engine = _engine(event.node)
        down = self._down.get(engine, set())
        down.discard(event.node)
        if not down:
            self._down.pop(engine, None)


def _engine(name: str) -> str:
    return name.split("/", 1)[0]
