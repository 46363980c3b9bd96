"""One process with one transport, told what to do by JSON lines: the writer or the owner of a story.

Answers each line with one line. Bytes are never compared with what a peer says: both sides draw the same random pools
from a seed, so an owner knows every byte that it must hold.
"""

from __future__ import annotations

import base64
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from orders import serve

from kvpoll.runtime import transports
from kvpoll.runtime.transports.interface import Copies, Region, Tag
from kvpoll.spec.vocabulary import Incarnation

PAUSE_S = 0.002


class Rank:
    """The state of this process: memory of ``pages`` pages of ``page_bytes``, one transport, its peers."""

    def __init__(self) -> None:
        self.woken = threading.Event()
        self.deaths: list[Any] = []
        self.transport: Any = None
        self.peers: dict[str, Any] = {}
        self.pool = np.empty(0, np.uint8)
        self.page_bytes = 1

    def start(self, name: str, node: str, epoch: int, pages: int, page_bytes: int, regions: int = 1,
              seed: int | None = None, **options: Any) -> dict[str, Any]:  # fmt: skip
        """Make the transport and register memory: zeros, or the random pool of a seed."""
        self.page_bytes = page_bytes
        nbytes = pages * page_bytes
        # A file under the memory, for the transports that share it by descriptor.
        file = os.memfd_create("kvpoll-rank", os.MFD_CLOEXEC)
        os.ftruncate(file, nbytes)
        self.memory = mmap.mmap(file, nbytes)
        self.pool = np.frombuffer(self.memory, np.uint8)
        self.pool[:] = 0 if seed is None else drawn(seed, nbytes)
        self.transport = transports.make(
            name, node, epoch, self.woken.set, lambda *life: self.deaths.append(life), **options
        )
        each = nbytes // regions
        address = self.pool.ctypes.data
        given = [
            Region(address + place * each, each, keep=self.memory, file=file if regions == 1 else None)
            for place in range(regions)
        ]
        descriptor = self.transport.register(given)
        return {"descriptor": base64.b64encode(descriptor).decode(), "pid": os.getpid()}

    def connect(self, descriptor: str, node: str, epoch: int) -> dict[str, Any]:
        key = f"{node}#{epoch}"
        self.peers[key] = self.transport.connect(base64.b64decode(descriptor), node, epoch)
        return {"peer": key}

    def post(self, peer: str, source: list[int], target: list[int], nbytes: list[int] | int) -> dict[str, Any]:
        lengths = np.full(len(source), nbytes) if isinstance(nbytes, int) else np.array(nbytes)
        copies = Copies(np.array(source, np.int64), np.array(target, np.int64), lengths.astype(np.int64))
        self.woken.clear()
        began = time.monotonic()
        handle = self.transport.post(self.peers[peer], copies, Tag(Incarnation(7, 0, 0), 1))
        return {"handle": handle, "took_s": time.monotonic() - began}

    def poll(self, handle: int) -> dict[str, Any]:
        return dict(self.transport.poll(handle)._asdict())

    def wait(self, handle: int, limit_s: float, drained: bool = False) -> dict[str, Any]:
        """Poll until the write is over (and ``drained``), or the limit."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            seen = self.transport.poll(handle)
            if seen.drained or (seen.state != "pending" and not drained):
                break
            self.woken.wait(PAUSE_S)
        return self.poll(handle)

    def abort(self, handle: int) -> dict[str, Any]:
        self.transport.abort(handle)
        return self.poll(handle)

    def forget(self, handle: int) -> dict[str, Any]:
        self.transport.forget(handle)
        return {}

    def gate(self, is_open: bool) -> dict[str, Any]:
        """Of ``cuda_ipc`` on host memory: may copies end?"""
        gate = self.transport.device.gate
        (gate.set if is_open else gate.clear)()
        return {}

    def copies_started(self) -> dict[str, Any]:
        return {"copies": self.transport.device.copies_started}

    def died(self, lives: int = 0, limit_s: float = 0.0) -> dict[str, Any]:
        """Which deaths this process was told of, once there are so many or the limit is over."""
        until = time.monotonic() + limit_s
        while len(self.deaths) < lives and time.monotonic() < until:
            time.sleep(PAUSE_S)
        return {"deaths": self.deaths}

    def revoke(self) -> dict[str, Any]:
        return {"proven": self.transport.revoke(Incarnation(7, 0, 0))}

    def zero(self) -> dict[str, Any]:
        """What a new owner of the pages would do first."""
        self.pool[:] = 0
        return {}

    def touched(self) -> dict[str, Any]:
        """How many pages hold a byte that is not zero."""
        return {"pages": int(self.pool.reshape(-1, self.page_bytes).any(axis=1).sum())}

    def await_touched(self, pages: int, limit_s: float) -> dict[str, Any]:
        """Until at least so many pages have been written to, or the limit."""
        until = time.monotonic() + limit_s
        while (seen := self.touched())["pages"] < pages and time.monotonic() < until:
            time.sleep(PAUSE_S)
        return seen

    def check(self, seed: int, source: list[int], target: list[int], nbytes: int) -> dict[str, Any]:
        """Do the copies of the pool of ``seed`` lie here byte by byte, and is every other byte zero?"""
        wanted = np.zeros_like(self.pool)
        theirs = drawn(seed, len(self.pool))
        for start, end in zip(source, target, strict=True):
            wanted[end : end + nbytes] = theirs[start : start + nbytes]
        return {"wrong": int((wanted != self.pool).sum())}

    def close(self) -> dict[str, Any]:
        began = time.monotonic()
        self.transport.close()
        return {"took_s": time.monotonic() - began}


def drawn(seed: int, nbytes: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)


serve(Rank())
