"""What a node says of itself is so: O1 metric-truth, O2 health-truth."""

from __future__ import annotations

from collections import Counter, defaultdict

from kvpoll.spec import trace
from kvpoll.spec.invariants.monitor import Monitor


class MetricTruth(Monitor):
    """O1. On Surveyed (an idle node): every gauge says 0, what Queued has counted is 0 for every queue of the
    node, and a gauge that bears the name of a queue says what Queued has counted for it.
    """

    invariant = "O1"

    def begin(self) -> None:
        self._queues: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def on_queued(self, event: trace.Queued) -> None:
        self._queues[event.node][event.queue] += event.delta

    def on_surveyed(self, event: trace.Surveyed) -> None:
        queues = self._queues[event.node]
        wrong = [
            f"{name} says {value:g}" + (f", counted {queues[name]}" if name in queues else "")
            for name, value in event.gauges
            if value or queues[name]
        ]
        said = {name for name, _ in event.gauges}
        wrong += [f"{name} not reported, counted {n}" for name, n in queues.items() if n and name not in said]
        if wrong:
            self.violate(event.t, event.node, None, f"on an idle node: {'; '.join(wrong)}")

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        self._queues.pop(event.node, None)


class HealthTruth(Monitor):
    """O2. No HealthReported is healthy while no request could finish on the engine."""

    invariant = "O2"

    def on_health_reported(self, event: trace.HealthReported) -> None:
        if event.healthy and not event.able:
            self.violate(event.t, event.node, None, "says it is healthy, but no request can finish on it")
