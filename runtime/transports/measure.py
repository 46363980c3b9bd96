"""How fast shm and tcp move pages between two processes, beside one thread's memcpy on the same memory.

The workload is that of ENGINES 2: 64 layers, scattered pages, source and target permuted independently, pools twice
the size of what is moved; the time runs from the post until the writer sees it done. Pure functions that return
figures; nothing here judges or prints them. Every figure is of bytes that were verified.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import Copies, Tag, Transport
from kvpoll.runtime.transports.shm import ShmTransport, allocate, as_array
from kvpoll.runtime.transports.tcp import TcpTransport
from kvpoll.spec.vocabulary import Incarnation

LIMIT_S: Final = 120.0
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)


class Workload(NamedTuple):
    """``pages`` pages of ``page_bytes`` in each of ``layers`` layers; pools hold twice as many."""

    layers: int
    pages: int
    page_bytes: int

    @property
    def moved_bytes(self) -> int:
        """Bytes of one transfer."""
        return self.layers * self.pages * self.page_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of either pool."""
        return 2 * self.moved_bytes

    def copies(self) -> Copies:
        """The transfer: the same pages in every layer, layer by layer."""
        draw = np.random.default_rng(0)
        source, target = (draw.permutation(2 * self.pages)[: self.pages] * self.page_bytes for _ in range(2))
        layer = np.arange(self.layers, dtype=np.int64)[:, None] * 2 * self.pages * self.page_bytes
        nbytes = np.full(self.layers * self.pages, self.page_bytes, np.int64)
        return Copies((layer + source).ravel(), (layer + target).ravel(), nbytes)


WORKLOADS: Final = {
    "16 KiB": Workload(64, 128, 16 << 10),
    "64 KiB": Workload(64, 128, 64 << 10),
    "1 MiB": Workload(64, 8, 1 << 20),
}


class Rate(NamedTuple):
    """GB/s (1e9 bytes) of payload: the median of all repetitions, the slowest and the fastest."""

    median: float
    lowest: float
    highest: float


class Measured(NamedTuple):
    """One transport under one workload, and memcpy of as many contiguous bytes in the same rounds."""

    transport: str
    workload: str
    rate: Rate
    memcpy: Rate

    @property
    def share_of_memcpy(self) -> float:
        """Median over median."""
        return self.rate.median / self.memcpy.median


def measure_shm(
    workloads: Sequence[str] = ("64 KiB", "1 MiB"),
    *,
    repetitions: int = 9,
    progress: Callable[[str], None] | None = None,
) -> list[Measured]:
    """shm between two processes. ``progress`` is told what is being measured."""
    return [_measure("shm", name, repetitions, progress) for name in workloads]


def measure_tcp(
    workloads: Sequence[str] = ("64 KiB", "1 MiB"),
    *,
    repetitions: int = 9,
    progress: Callable[[str], None] | None = None,
) -> list[Measured]:
    """tcp between two processes over loopback."""
    return [_measure("tcp", name, repetitions, progress) for name in workloads]


def _measure(kind: str, name: str, repetitions: int, progress: Callable[[str], None] | None) -> Measured:
    if progress is not None:
        progress(f"{kind}, {name} pages")
    work = WORKLOADS[name]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    owner = context.Process(target=_own, args=(kind, work, there), daemon=True)
    owner.start()
    there.close()
    rang = threading.Event()
    writer = _make(kind, "prefill0", rang.set)
    try:
        pool = allocate(work.pool_bytes)
        _stamp(as_array(pool), work)
        writer.register([pool])
        peer = writer.connect(_hear(here), "decode0", 0)
        transfers, copies = [], []
        # Memory of the same kind: numpy's own would lie on huge pages, which no shared pool gets by default.
        other = as_array(allocate(work.moved_bytes))
        for repetition in range(repetitions + 2):
            moved_s = _transfer_s(writer, peer, work, rang)
            began = time.perf_counter()
            np.copyto(other, as_array(pool)[: work.moved_bytes])
            if repetition >= 2:  # the first ones map and fault in what later ones only use
                transfers.append(moved_s)
                copies.append(time.perf_counter() - began)
        here.send("check")
        if not _hear(here):
            raise RuntimeError(f"{kind}, {name} pages: the bytes that arrived are not those that were sent")
    finally:
        writer.close()
        here.close()
        owner.join(10)
        if owner.is_alive():
            owner.kill()
    return Measured(kind, name, _rate(work, transfers), _rate(work, copies))


def _transfer_s(writer: Transport, peer: Any, work: Workload, rang: threading.Event) -> float:
    copies = work.copies()
    began = time.perf_counter()
    handle = writer.post(peer, copies, Tag(Incarnation(1, 0, 0), 0))
    while (progress := writer.poll(handle)).state == "pending":
        if time.perf_counter() - began > LIMIT_S:
            raise RuntimeError(f"{writer.name}: {work.moved_bytes} bytes did not arrive within {LIMIT_S:g} s")
        rang.wait(1.0)
        rang.clear()
    took_s = time.perf_counter() - began
    if progress.state != "done":
        raise RuntimeError(f"{writer.name}: the transfer failed: {progress.reason}")
    writer.forget(handle)
    return took_s


def _rate(work: Workload, times_s: Sequence[float]) -> Rate:
    gigabytes = work.moved_bytes / 1e9
    return Rate(gigabytes / statistics.median(times_s), gigabytes / max(times_s), gigabytes / min(times_s))


def _make(kind: str, node: str, wake: Callable[[], None]) -> Transport:
    if kind == "shm":
        return ShmTransport(node, 0, wake, lambda node, epoch: None)
    return TcpTransport(node, 0, wake, lambda node, epoch: None)


def _hear(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT_S):
        raise RuntimeError(f"the owner did not answer within {LIMIT_S:g} s")
    return pipe.recv()


def _words(pool: NDArray[np.uint8], work: Workload) -> NDArray[np.uint64]:
    return pool.view(np.uint64).reshape(-1, work.page_bytes // 8)


def _stamp(pool: NDArray[np.uint8], work: Workload) -> None:
    """Every word of a page says which page of the pool it is."""
    words = _words(pool, work)
    words[:] = ((np.arange(len(words), dtype=np.uint64) + np.uint64(1)) * _MIX)[:, None]


def _is_right(pool: NDArray[np.uint8], work: Workload) -> bool:
    words, copies = _words(pool, work), work.copies()
    expected = np.zeros(len(words), np.uint64)
    pages = (copies.source // work.page_bytes).astype(np.uint64) + np.uint64(1)
    expected[copies.target // work.page_bytes] = pages * _MIX
    return bool((words == expected[:, None]).all())


def _own(kind: str, work: Workload, pipe: Connection) -> None:
    owner = _make(kind, "decode0", lambda: None)
    pool = allocate(work.pool_bytes)
    pipe.send(owner.register([pool]))
    try:
        while pipe.recv() == "check":
            pipe.send(_is_right(as_array(pool), work))
    except (EOFError, OSError):
        pass
    owner.close()
