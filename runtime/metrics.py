"""What an operator sees of an endpoint, in Prometheus' text format: under SGLang's names where it has one.

SGLang measures a transfer on prefill, in four phases; so does this. What SGLang has no name for (leases, quarantine,
what the control plane dropped) bears the prefix of the product. Every series has one label, ``node``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from kvpoll.runtime.transfer import KVPoll, Transfer
from kvpoll.spec.source import BadInput

if TYPE_CHECKING:
    from kvpoll.runtime.endpoint import Endpoint

MILLISECONDS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 30_000, 120_000)
"""SGLang's buckets, and two more up to the longest deadline."""

PORT_MAX: Final = 65_535


class EndpointMetrics:
    """Counters and histograms of one endpoint; gauges look when they are read. ``registry`` is its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.registry = CollectorRegistry()
        self._endpoint = endpoint
        node = endpoint.node
        self._bootstrap_failed = self._counter(
            "num_bootstrap_failed_reqs", "Requests that failed before memory was given."
        )
        self._transfer_failed = self._counter(
            "num_transfer_failed_reqs", "Requests that failed after memory was given."
        )
        self._bootstrap_ms = self._histogram("kv_transfer_bootstrap_ms", "From admission to WaitingForInput.")
        self._latency_ms = self._histogram("kv_transfer_latency_ms", "From WaitingForInput to Success.")
        self._outcomes = Counter(
            "kvpoll_transfers", "Transfers that ended, by first cause ('ok' for Success).",
            labelnames=["node", "cause"], registry=self.registry,
        )  # fmt: skip
        self._succeeded = self._outcomes.labels(node, "ok")
        self._watch("kvpoll_transfers_live", "Transfers that are not over.", lambda: len(endpoint.transfers))
        self._watch("kvpoll_pages_quarantined", "Pages kept because a writer is not proven quiet.", self._quarantined)
        self._watch("kvpoll_writes_unsettled", "Writes posted and not proven over.", self._unsettled)
        self._watch("kvpoll_bytes_written", "Bytes that this rank has written to peers.", self._bytes)
        self._watch("kvpoll_rooms", "Rooms in the table, tombstones included.", lambda: len(endpoint.rank.rooms))
        self._watch("kvpoll_callback_errors", "Callbacks of the engine that raised.", lambda: endpoint.callback_errors)
        self._watch("kvpoll_defects", "Calls inside the endpoint that raised.", lambda: len(endpoint.host.loop.failed))
        self._watch("kvpoll_messages_missed", "Control messages that never arrived.", lambda: endpoint.missed)
        self._watch("kvpoll_violations", "Invariants seen broken, in monitored mode.", lambda: len(endpoint.violations))
        self._watch("kvpoll_healthy", "1 while a request can finish here.", lambda: float(endpoint.health()["ok"]))
        dropped = Gauge(
            "kvpoll_messages_dropped", "Control messages dropped.", ["node", "reason"], registry=self.registry
        )
        for reason in endpoint.dropped:
            dropped.labels(node, reason).set_function(partial(endpoint.dropped.__getitem__, reason))

    def _counter(self, name: str, says: str) -> Counter:
        return Counter(f"sglang:{name}", says, ["node"], registry=self.registry).labels(self._endpoint.node)

    def _histogram(self, name: str, says: str) -> Histogram:
        whole = Histogram(f"sglang:{name}", says, ["node"], registry=self.registry, buckets=MILLISECONDS)
        return whole.labels(self._endpoint.node)

    def _watch(self, name: str, says: str, read: Any) -> None:
        Gauge(name, says, ["node"], registry=self.registry).labels(self._endpoint.node).set_function(read)

    def _quarantined(self) -> float:
        return self._endpoint.rank.quarantined_pages()

    def _unsettled(self) -> float:
        return len(self._endpoint.host.writes or ())

    def _bytes(self) -> float:
        writes = self._endpoint.host.writes
        return writes.bytes_done if writes is not None else 0

    def moved(self, transfer: Transfer, poll: KVPoll, cause: str | None) -> None:
        """A transfer has another poll. From the endpoint's thread."""
        if poll is KVPoll.WaitingForInput:
            now = time.monotonic()
            self._bootstrap_ms.observe(1000 * (now - transfer.admitted_s))
            transfer.ready_s = now
        elif poll is KVPoll.Transferring:
            if transfer.ready_s is None:
                transfer.ready_s = time.monotonic()
        elif poll is KVPoll.Success:
            began_s = transfer.admitted_s if transfer.ready_s is None else transfer.ready_s
            self._latency_ms.observe(1000 * (time.monotonic() - began_s))
            self._succeeded.inc()
        elif poll is KVPoll.Failed:
            failed = self._transfer_failed if transfer.was_exposed else self._bootstrap_failed
            failed.inc()
            self._outcomes.labels(self._endpoint.node, _label(transfer, cause)).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


def _label(transfer: Transfer, cause: str | None) -> str:
    """The cause as a label, of which there are few: what an engine gives as its reason may be anything."""
    first = (cause or "failed").partition(":")[0]
    return "aborted" if first == (transfer.given_up_as or "").partition(":")[0] else first


def serve(registry: CollectorRegistry, port: int, host: str) -> tuple[int, Callable[[], None]]:
    """Serve ``/metrics`` from a thread. Returns the port (0 asks for any) and what ends it.

    Raises BadInput when the address cannot be listened on.
    """
    if not 0 <= port <= PORT_MAX:
        raise BadInput(f"metrics: port {port} does not exist; choose one up to {PORT_MAX}, or 0 for any")
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise BadInput(f"metrics: cannot listen on {host}:{port}: {error.strerror}; choose another port") from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close
