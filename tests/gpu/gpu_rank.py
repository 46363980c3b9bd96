"""One process with ``cuda_ipc`` over the memory of a GPU, told what to do by JSON lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "integration" / "engine_processes"))
from orders import serve

from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.interface import Copies, Region, Tag
from kvpoll.spec.vocabulary import Incarnation

REGION_BYTES = 8 << 20


class Rank:
    """Two regions of memory on the GPU: random from a seed, or zero."""

    def start(self, node: str, epoch: int, seed: int | None, **options: Any) -> dict[str, Any]:
        self.deaths: list[Any] = []
        self.transport: Any = make(
            "cuda_ipc", node, epoch, lambda: None, lambda *life: self.deaths.append(life), **options
        )
        self.memory = [self.drawn(seed, place) for place in range(2)]
        regions = [Region(each.data_ptr(), each.numel(), "cuda", each) for each in self.memory]
        torch.cuda.synchronize()
        return {"descriptor": self.transport.register(regions).decode()}

    @staticmethod
    def drawn(seed: int | None, place: int) -> torch.Tensor:
        if seed is None:
            return torch.zeros(REGION_BYTES, dtype=torch.uint8, device="cuda")
        chance = np.random.default_rng(seed + place)
        return torch.from_numpy(chance.integers(1, 256, REGION_BYTES, np.uint8)).cuda()

    def connect(self, descriptor: str, node: str, epoch: int) -> dict[str, Any]:
        self.peer = self.transport.connect(descriptor.encode(), node, epoch)
        return {}

    def post(self, ranges: list[list[int]], busy_s: float = 0.0) -> dict[str, Any]:
        """Post after ``busy_s`` of work on the caller's stream, which the copy must wait for."""
        if busy_s:
            cycles = int(busy_s * 1.5e9)
            torch.cuda._sleep(cycles)
            self.memory[0].bitwise_not_()  # the copy must see this, though the host does not wait for it
        columns = np.array(ranges, np.int64).reshape(-1, 3).T
        copies = Copies(*(np.ascontiguousarray(column) for column in columns))
        return {"handle": self.transport.post(self.peer, copies, Tag(Incarnation(7, 0, 0), 1))}

    def wait(self, handle: int, limit_s: float, drained: bool = False) -> dict[str, Any]:
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            seen = self.transport.poll(handle)
            if seen.drained or (seen.state != "pending" and not drained):
                break
            time.sleep(0.0005)
        return dict(self.transport.poll(handle)._asdict())

    def abort(self, handle: int) -> dict[str, Any]:
        self.transport.abort(handle)
        return {}

    def revoke(self) -> dict[str, Any]:
        return {"proven": self.transport.revoke(Incarnation(7, 0, 0))}

    def zero(self) -> dict[str, Any]:
        for each in self.memory:
            each.zero_()
        torch.cuda.synchronize()
        return {}

    def touched(self) -> dict[str, Any]:
        return {"bytes": sum(int((each != 0).sum()) for each in self.memory)}

    def check(self, seed: int, ranges: list[list[int]], inverted: bool = False) -> dict[str, Any]:
        """Bytes that are not as they must be, those that no range covers included. inverted: of region 0."""
        theirs = [self.drawn(seed, place) for place in range(2)]
        if inverted:
            theirs[0].bitwise_not_()
        source, wanted = torch.cat(theirs), torch.zeros(2 * REGION_BYTES, dtype=torch.uint8, device="cuda")
        for start, end, nbytes in ranges:
            wanted[end : end + nbytes] = source[start : start + nbytes]
        return {"wrong": int((torch.cat(self.memory) != wanted).sum())}

    def died(self, limit_s: float) -> dict[str, Any]:
        until = time.monotonic() + limit_s
        while not self.deaths and time.monotonic() < until:
            time.sleep(0.005)
        return {"deaths": self.deaths}

    def kernel(self) -> dict[str, Any]:
        device = self.transport.device
        return {"name": device.kernel_name, "reason": device.kernel_reason}

    def close(self) -> dict[str, Any]:
        self.transport.close()
        return {}


serve(Rank())
