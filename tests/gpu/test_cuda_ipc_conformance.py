"""The suite that every transport must pass, for ``cuda_ipc`` on a GPU. Skips without one.

A GPU copies the suite's memory in microseconds, so the checks that catch a write in its middle mostly skip here, saying
so; ``test_cuda_ipc.py`` delays the caller's stream instead, and host memory stands in elsewhere.
"""

from __future__ import annotations

from typing import ClassVar

import pytest

from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.interface import Death, Region, Transport, Wake
from kvpoll.testing import TransportConformance

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device (or torch is built without CUDA)", allow_module_level=True)


class TestPull(TransportConformance):
    """The owner copies."""

    direction: ClassVar[str] = "pull"
    limit_s: ClassVar[float] = 120.0  # each new process makes a CUDA context and compiles the kernel

    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return make("cuda_ipc", node, epoch, wake, on_death, direction=self.direction)

    def allocate(self, nbytes: int) -> Region:
        memory = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
        return Region(memory.data_ptr(), nbytes, "cuda", memory)

    def test_memory_is_on_the_gpu(self) -> None:
        region = self.allocate(4096)
        assert region.kind == "cuda" and region.keep.is_cuda


class TestPush(TestPull):
    """The writer copies."""

    direction: ClassVar[str] = "push"
