"""What an operator sees of a bootstrap server, in Prometheus' text format and in a registry of its own.

SGLang's bootstrap server has no metrics, so there are no names to keep; these carry the prefix of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


class BootstrapMetrics:
    """Counters of what was asked and refused; gauges that look at the tables when they are read."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "kvpoll_bootstrap_requests", "HTTP requests by route and status.", ["route", "code"], registry=self.registry
        )
        self._refused = Counter(
            "kvpoll_bootstrap_refused", "Requests that changed nothing, by reason.", ["reason"], registry=self.registry
        )

    def watch(self, name: str, says: str, read: Callable[[], float]) -> None:
        """A gauge ``kvpoll_bootstrap_<name>`` that calls ``read`` whenever the metrics are asked for."""
        Gauge(f"kvpoll_bootstrap_{name}", says, registry=self.registry).set_function(read)

    def count(self, route: str, status: int) -> None:
        """A request was answered. ``route`` is one of the server's own, never what a stranger wrote."""
        self._requests.labels(route, str(status)).inc()

    def count_refusal(self, reason: str) -> None:
        """A request was refused for this reason, one word."""
        self._refused.labels(reason).inc()

    def text(self) -> bytes:
        """Everything, as ``GET /metrics`` answers it."""
        return generate_latest(self.registry)
