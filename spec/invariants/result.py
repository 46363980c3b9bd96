"""What a request's fate looks like from outside it: S9 truthful-result, S10 containment."""

from __future__ import annotations

from kvpoll.spec import trace
from kvpoll.spec.invariants.monitor import Monitor, MortalMonitor, Recent
from kvpoll.spec.trace import Pair
from kvpoll.spec.vocabulary import ROOMLESS_CAUSES


class _Running:
    """What one admitted request has shown so far; failures: node -> first cause."""

    __slots__ = ("admitted", "committed", "failures")

    def __init__(self, admitted: trace.Admitted) -> None:
        self.admitted = admitted
        self.committed: set[str] = set()
        self.failures: dict[str, str | None] = {}


class TruthfulResult(MortalMonitor):
    """S9. Resulted ok: every decode rank of the admission has Committed, and no rank of the pair has turned
    Failed. Resulted not ok: the cause is that of one of the failures seen for the pair, if any was seen, or one
    that no room reports (ROOMLESS_CAUSES).

    Ranks that stopped since the admission are not judged; what they said as they failed still counts as a
    cause. What happens after the answer (a client that leaves, a late abort) makes no answer untrue.
    """

    invariant = "S9"

    def begin(self) -> None:
        self._running: Recent[Pair, _Running] = Recent()

    def on_admitted(self, event: trace.Admitted) -> None:
        self._running.remember(event.pair, _Running(event))

    def on_committed(self, event: trace.Committed) -> None:
        running = self._running.get(event.incarnation.pair)
        if running is not None:
            running.committed.add(event.node)

    def on_stepped(self, event: trace.Stepped) -> None:
        if event.poll_after != "Failed" or event.poll_before == "Failed":
            return
        running = self._running.get(event.incarnation.pair)
        if running is not None:
            running.failures.setdefault(event.node, event.cause)

    def on_resulted(self, event: trace.Resulted) -> None:
        running = self._running.pop(event.pair, None)
        if running is None:
            return
        lie = self._false_success(running) if event.ok else _false_cause(running, event.cause)
        if lie:
            self.violate(event.t, event.node, event.pair, lie)

    def _false_success(self, running: _Running) -> str | None:
        admitted = running.admitted
        for node in (*admitted.prefill, *admitted.decode):
            if self.excuse(node, admitted.t):
                continue
            if node in running.failures:
                return f"the client was told success, but {node} failed ({running.failures[node]})"
            if node in admitted.decode and node not in running.committed:
                return f"the client was told success, but {node} never committed"
        return None


def _false_cause(running: _Running, cause: str | None) -> str | None:
    causes = running.failures.values()
    if not causes or cause in causes or cause in ROOMLESS_CAUSES:
        return None
    seen = ", ".join(sorted({str(failure) for failure in causes}))
    return f"the client was told {cause!r}, but the failures were {seen}"


class Containment(Monitor):
    """S10. There is no IllegalFactRaised and no LoopStopped."""

    invariant = "S10"

    def on_illegal_fact_raised(self, event: trace.IllegalFactRaised) -> None:
        text = f"{event.fact} is illegal for a {event.role} in state {event.state}"
        self.violate(event.t, event.node, event.incarnation.pair, text)

    def on_loop_stopped(self, event: trace.LoopStopped) -> None:
        self.violate(event.t, event.node, None, f"the {event.loop} loop stopped: {event.cause}")
