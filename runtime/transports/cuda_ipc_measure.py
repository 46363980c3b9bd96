"""How fast ``cuda_ipc`` moves scattered pages between two processes on one GPU, beside a plain copy within the device.

A pure function returns the figures; nothing here judges them. The other process is this module, started again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, Final, NamedTuple

import numpy as np

from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.interface import Copies, Region, Tag, TransportError
from kvpoll.spec.vocabulary import Incarnation

LIMIT_S: Final = 120.0


class Load(NamedTuple):
    """What is moved: ``pages`` random pages of a pool of twice as many, to random pages of another. The defaults are
    64 layers of 128 pages of 64 KiB: 512 MiB in 8192 ranges. writes: how many are posted at once, at most 16."""

    pages: int = 8192
    page_bytes: int = 64 << 10
    writes: int = 8
    repeats: int = 7

    @property
    def payload_bytes(self) -> int:
        """Bytes of one write."""
        return self.pages * self.page_bytes

    def copies(self) -> Copies:
        """The ranges of a write; the same in every process."""
        chance = np.random.default_rng(0)
        source, target = (chance.permutation(2 * self.pages)[: self.pages] for _ in range(2))
        size = np.full(self.pages, self.page_bytes, np.int64)
        return Copies(source * self.page_bytes, target * self.page_bytes, size)


class Figures(NamedTuple):
    """Payload in GB/s (1e9 bytes, each counted once), medians. one_write: from post until the writer is told done.
    many_writes: the same for ``Load.writes`` posted together. device_copy: ``copy_`` of as many contiguous bytes within
    the GPU, by its own events. kernel: "triton" or "torch". verified: every byte was where it belongs at the end."""

    direction: str
    kernel: str
    payload_bytes: int
    one_write: float
    many_writes: float
    device_copy: float
    verified: bool

    @property
    def ratio(self) -> float:
        """many_writes to device_copy; the project's bar is 0.8."""
        return self.many_writes / self.device_copy


def measure(direction: str, kernel: str = "auto", load: Load | None = None) -> Figures:
    """Measure with this process as the owner and a child as the writer. Raises BadInput without a GPU, TransportError
    when the child fails."""
    import torch

    load = load or Load()
    owner: Any = make(
        "cuda_ipc", "measure-owner", 0, lambda: None, lambda *life: None, direction=direction, kernel=kernel
    )
    target = torch.zeros(2 * load.payload_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    descriptor = owner.register([Region(target.data_ptr(), target.numel(), "cuda", target)])
    order = {"direction": direction, "kernel": kernel, "load": load, "descriptor": descriptor.decode()}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        told, _ = child.communicate(json.dumps(order), timeout=LIMIT_S)
        if child.returncode:
            raise TransportError(f"cuda_ipc: the writer that was to be measured ended with status {child.returncode}")
        seen = json.loads(told.splitlines()[-1])
        torch.cuda.synchronize()
        name = owner.device.kernel_name if direction == "pull" else seen["kernel"]
        one = load.payload_bytes / seen["one_s"] / 1e9
        many = load.writes * load.payload_bytes / seen["many_s"] / 1e9
        plain, verified = _device_copy(torch, load), _right(torch, target, load)
        return Figures(direction, name, load.payload_bytes, one, many, plain, verified)
    finally:
        child.kill()
        child.wait()
        owner.close()


def _pattern(torch: Any, load: Load) -> Any:
    """The writer's pool: every 8 bytes hold their own number, stirred."""
    words = torch.arange(2 * load.payload_bytes // 8, dtype=torch.int64, device="cuda")
    return (words * 0x9E3779B97F4A7C1 + 1).view(torch.uint8)


def _right(torch: Any, target: Any, load: Load) -> bool:
    """Page by page on the GPU; pages that were not written to must still be zero."""
    copies = load.copies()
    source, pages = _pattern(torch, load).view(-1, load.page_bytes), target.view(-1, load.page_bytes)
    start, end = (torch.from_numpy(side // load.page_bytes).cuda() for side in (copies.source, copies.target))
    wanted = torch.zeros_like(pages)
    wanted[end] = source[start]
    return bool(torch.equal(wanted, pages))


def _device_copy(torch: Any, load: Load) -> float:
    source = torch.ones(load.payload_bytes, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    times = []
    for _ in range(load.repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(load.payload_bytes / np.median(times[2:]) / 1e9)


def _write() -> None:
    """The child: post, wait, say how long it took."""
    import torch

    order = json.loads(sys.stdin.read())
    load = Load(*order["load"])
    writer: Any = make(
        "cuda_ipc", "measure-writer", 0, lambda: None, lambda *life: None,
        direction=order["direction"], kernel=order["kernel"],
    )  # fmt: skip
    source = _pattern(torch, load)
    torch.cuda.synchronize()
    writer.register([Region(source.data_ptr(), source.numel(), "cuda", source)])
    peer = writer.connect(order["descriptor"].encode(), "measure-owner", 0)
    copies = load.copies()

    def once(writes: int) -> float:
        began = time.perf_counter()
        handles = [writer.post(peer, copies, Tag(Incarnation(number, 0, 0), number)) for number in range(writes)]
        for handle in handles:
            while (seen := writer.poll(handle)).state == "pending":
                time.sleep(0.00002)
            if seen.state != "done":
                raise TransportError(f"cuda_ipc: a write failed: {seen.reason}")
            writer.forget(handle)
        return time.perf_counter() - began

    figures = {}
    for name, writes in (("one_s", 1), ("many_s", load.writes)):
        times = [once(writes) for _ in range(load.repeats + 2)]
        figures[name] = float(np.median(times[2:]))
    print(json.dumps({**figures, "kernel": writer.device.kernel_name}))
    writer.close()


if __name__ == "__main__":
    _write()
