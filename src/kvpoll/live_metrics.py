"""Prometheus metrics of a running cluster, on loopback: SGLang's names where it has one, kvpoll's own for the rest.

SGLang's gauges carry its prefix ``sglang:`` (observability/metrics_collector.py), so a dashboard made for SGLang shows
this cluster too. Labels: node (the rank's name), side ("prefill" or "decode").
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client import start_http_server
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvpoll.live_cluster import Line, Snapshot
from kvpoll.live_table import QUEUES, sent_per_s
from kvpoll.spec.source import BadInput

SIDES: Final = {"P": "prefill", "D": "decode"}
LABELS: Final = ("node", "side")


class ClusterMetrics(Collector):
    """Answers with the snapshot that was shown last. The cluster's thread shows; the server's threads read."""

    def __init__(self, port: int) -> None:
        """Listen on 127.0.0.1. Port 0 takes any; ``port`` says which. Raises BadInput when it cannot be had."""
        self._shown: Snapshot | None = None
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise BadInput(f"--metrics {port}: cannot be listened on: {error.strerror}; choose another port") from None
        self.port: int = self._server.server_port

    def show(self, shot: Snapshot) -> None:
        """This is how the cluster stands now."""
        self._shown = shot

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def collect(self) -> Iterator[Any]:
        """What ``GET /metrics`` answers."""
        shot = self._shown
        if shot is None:
            return
        ranks = [line for line in shot.lines if line.node[:1] in SIDES]
        names = sorted({name for queues in QUEUES.values() for name, _ in queues})
        for name in names:
            yield _gauge(f"sglang:{name}", "Requests in this queue.", ranks, _queue(name))
        for name in ("free", "held", "quarantined"):
            yield _gauge(f"kvpoll_kv_pages_{name}", f"KV pages that are {name}.", ranks, _pages(name))
        speeds = GaugeMetricFamily("sglang:kv_transfer_speed_gb_s", "Written of late.", labels=LABELS)
        for line in ranks:
            if line.node.startswith("P"):
                speeds.add_metric((line.node, "prefill"), line.sent_per_s / 1e9)
        yield speeds
        yield _counter("kvpoll_kv_bytes_sent", "Bytes written to decode ranks.", ranks, "P", lambda line: line.sent)
        yield _counter(
            "kvpoll_kv_bytes_verified", "Bytes read back and found sound.", ranks, "D", lambda line: line.verified
        )
        yield from _of_requests(shot)
        up = GaugeMetricFamily("kvpoll_process_up", "Is there a process, and does it run?", labels=("node",))
        for line in shot.lines:
            up.add_metric((line.node,), float(line.state == "up"))
        yield up


def _of_requests(shot: Snapshot) -> Iterator[Any]:
    yield GaugeMetricFamily("kvpoll_requests_active", "Requests without an answer yet.", value=shot.active)
    answers = CounterMetricFamily("kvpoll_requests", "Answered requests, by first cause of failure.", labels=("cause",))
    answers.add_metric(("ok",), shot.succeeded)
    for cause, count in sorted(shot.causes.items()):
        answers.add_metric((cause,), count)
    yield answers
    yield GaugeMetricFamily("kvpoll_kv_bytes_per_s", "Written by all ranks, of late.", value=sent_per_s(shot))


def _queue(name: str) -> Callable[[Line], float | None]:
    """The gauge of a rank whose side has it; 0 from the start, as a scrape wants it."""
    sides = {side for side, queues in QUEUES.items() if name in dict(queues)}
    return lambda line: line.queues.get(name, 0) if line.size and line.node[:1] in sides else None


def _pages(name: str) -> Callable[[Line], float | None]:
    return lambda line: getattr(line, name) if line.size else None


def _gauge(name: str, says: str, ranks: list[Line], read: Callable[[Line], float | None]) -> GaugeMetricFamily:
    """A gauge of those ranks that have it."""
    family = GaugeMetricFamily(name, says, labels=LABELS)
    for line in ranks:
        value = read(line)
        if value is not None:
            family.add_metric((line.node, SIDES[line.node[:1]]), float(value))
    return family


def _counter(
    name: str, says: str, ranks: list[Line], side: str, read: Callable[[Line], int]
) -> CounterMetricFamily:  # fmt: skip
    family = CounterMetricFamily(name, says, labels=LABELS)
    for line in ranks:
        if line.node.startswith(side):
            family.add_metric((line.node, SIDES[side]), float(read(line)))
    return family
