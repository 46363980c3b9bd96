"""Paged KV moved between two processes by shm, by tcp, and by the engines themselves, for ``kvpoll bench runtime``.

    python -m kvpoll.bench_transfers shm|tcp|mooncake|nixl WORKLOAD REPETITIONS

prints one line of JSON: {"gb_per_s": G, "memcpy_gb_per_s": G or null}, medians of the repetitions, all bytes verified.
The workload is that of ``runtime.transports.measure``. Mooncake and NIXL are used as their own documentation does it,
without our adapters around them, so that they are measured at their best: Mooncake in batches of 1,024 ranges (more
overflow its queue, ENGINES 3), NIXL with lists prepared once for the whole pool and a progress thread. What takes
place once a connection counts for none of them.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.measure import WORKLOADS, Workload, measure_shm, measure_tcp
from kvpoll.runtime.transports.shm import allocate, as_array

ENGINES: Final = {"mooncake": "mooncake.engine", "nixl": "nixl_cu12._api"}
"""What is imported for an engine."""

BATCH: Final = 1024
LIMIT_S: Final = 120.0
WARM_UP: Final = 2
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)

Push = Callable[[], None]


class TransferFailed(Exception):
    """An engine did not move what it was told to. One line."""


def measured(kind: str, workload: str, repetitions: int) -> dict[str, float | None]:
    """GB/s of one kind. Raises TransferFailed or RuntimeError when bytes are not where they belong."""
    if kind in ENGINES:
        return {"gb_per_s": _measure_engine(kind, WORKLOADS[workload], repetitions), "memcpy_gb_per_s": None}
    measure = {"shm": measure_shm, "tcp": measure_tcp}[kind]
    (found,) = measure((workload,), repetitions=repetitions)
    return {"gb_per_s": found.rate.median, "memcpy_gb_per_s": found.memcpy.median}


def _measure_engine(kind: str, work: Workload, repetitions: int) -> float:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    owner = context.Process(target=_own, args=(kind, work, there), daemon=True)
    owner.start()
    there.close()
    try:
        pool = as_array(allocate(work.pool_bytes))
        _words(pool, work)[:] = _stamps(work)[:, None]
        push = _WRITERS[kind](pool, work, _hear(here))
        spent_s = []
        for _ in range(WARM_UP + repetitions):
            began = time.perf_counter()
            push()
            spent_s.append(time.perf_counter() - began)
        here.send("check")
        if not _hear(here):
            raise TransferFailed(f"{kind}: the bytes that arrived are not those that were sent")
        here.send("end")
    finally:
        owner.join(5)
        if owner.is_alive():
            owner.kill()
    return work.moved_bytes / 1e9 / statistics.median(spent_s[WARM_UP:])


def _hear(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT_S):
        raise TransferFailed(f"the owner did not answer within {LIMIT_S:g} s")
    return pipe.recv()


def _words(pool: NDArray[np.uint8], work: Workload) -> NDArray[np.uint64]:
    return pool[: work.pool_bytes].view(np.uint64).reshape(-1, work.page_bytes // 8)


def _stamps(work: Workload) -> NDArray[np.uint64]:
    """Every word of a page says which page of the pool it is."""
    pages = work.pool_bytes // work.page_bytes
    return (np.arange(pages, dtype=np.uint64) + np.uint64(1)) * _MIX


def _is_right(pool: NDArray[np.uint8], work: Workload) -> bool:
    """Every page that was sent is in its place, and nothing is where nothing was sent."""
    copies, words = work.copies(), _words(pool, work)
    expected = np.zeros(len(words), np.uint64)
    expected[copies.target // work.page_bytes] = _stamps(work)[copies.source // work.page_bytes]
    return bool((words == expected[:, None]).all())


def _own(kind: str, work: Workload, pipe: Connection) -> None:
    """The owner's process: memory, registered, and looked at in the end."""
    pool = as_array(allocate(work.pool_bytes))
    pool[:] = 0
    told, keep = _OWNERS[kind](pool)
    pipe.send(told)
    while pipe.recv() == "check":
        pipe.send(_is_right(pool, work))
    del keep
    os._exit(0)  # engines leave threads that do not end


# -- Mooncake


def _mooncake() -> tuple[Any, str]:
    os.environ |= {"MC_TCP_BIND_ADDRESS": "127.0.0.1", "MC_LOG_LEVEL": "ERROR", "MC_TE_METRIC": "0"}
    engine = importlib.import_module(ENGINES["mooncake"]).TransferEngine()
    status = engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    if status != 0:
        raise TransferFailed(f"mooncake: initialize answered {status}")
    return engine, f"127.0.0.1:{engine.get_rpc_port()}"


def _mooncake_owner(pool: NDArray[np.uint8]) -> tuple[Any, Any]:
    engine, session = _mooncake()
    engine.register_memory(pool.ctypes.data, pool.nbytes)
    return (session, pool.ctypes.data), engine


def _mooncake_writer(pool: NDArray[np.uint8], work: Workload, told: Any) -> Push:
    engine, _ = _mooncake()
    session, address = told
    engine.register_memory(pool.ctypes.data, pool.nbytes)
    copies = work.copies()
    sources = (copies.source + pool.ctypes.data).tolist()
    targets, lengths = (copies.target + address).tolist(), copies.nbytes.tolist()

    def push() -> None:
        for first in range(0, len(sources), BATCH):
            part = slice(first, first + BATCH)
            status = engine.batch_transfer_sync_write(session, sources[part], targets[part], lengths[part])
            if status != 0:
                raise TransferFailed(f"mooncake: batch_transfer_sync_write answered {status}")

    return push


# -- NIXL


def _nixl(name: str) -> Any:
    os.environ |= {"UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp", "NIXL_LOG_LEVEL": "ERROR"}
    module = importlib.import_module(ENGINES["nixl"])
    return module.nixl_agent(name, module.nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))


def _nixl_owner(pool: NDArray[np.uint8]) -> tuple[Any, Any]:
    agent = _nixl("decode")
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
    return (agent.get_agent_metadata(), pool.ctypes.data), agent


def _nixl_writer(pool: NDArray[np.uint8], work: Workload, told: Any) -> Push:
    agent = _nixl("prefill")
    metadata, address = told
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
    peer = agent.add_remote_agent(metadata)
    every = np.arange(0, work.pool_bytes, work.page_bytes, dtype=np.int64)

    def described(base: int) -> NDArray[np.uint64]:
        return np.stack([every + base, np.full_like(every, work.page_bytes), np.zeros_like(every)], 1).astype(np.uint64)

    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", described(pool.ctypes.data), "DRAM")
    remote = agent.prep_xfer_dlist(peer, described(address), "DRAM")
    copies = work.copies()
    pages = [(offsets // work.page_bytes).astype(np.int32) for offsets in (copies.source, copies.target)]

    def push() -> None:
        handle = agent.make_prepped_xfer("WRITE", local, pages[0], remote, pages[1], b"")
        state = agent.transfer(handle)
        end_s = time.monotonic() + LIMIT_S
        while state == "PROC" and time.monotonic() < end_s:
            time.sleep(0.0002)  # on few cores a poll without a pause takes them from the progress threads
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise TransferFailed(f"nixl: the transfer ended as {state}")
        agent.release_xfer_handle(handle)

    return push


_OWNERS: Final[dict[str, Callable[[NDArray[np.uint8]], tuple[Any, Any]]]] = {
    "mooncake": _mooncake_owner,
    "nixl": _nixl_owner,
}
_WRITERS: Final[dict[str, Callable[[NDArray[np.uint8], Workload, Any], Push]]] = {
    "mooncake": _mooncake_writer,
    "nixl": _nixl_writer,
}


def main(kind: str, workload: str, repetitions: str) -> None:
    """Measure and print. Only the figures go to standard output: engines print too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(measured(kind, workload, int(repetitions))), file=answers, flush=True)
    os._exit(0)  # engines leave threads that do not end


if __name__ == "__main__":
    main(*sys.argv[1:])
