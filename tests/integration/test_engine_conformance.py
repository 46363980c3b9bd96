"""The suite that every transport must pass (``kvpoll.testing``), for those that ``tests/conformance`` does not have.

``cuda_ipc`` runs here, on host memory. Mooncake and NIXL run in the interpreter that has them (KVPOLL_ENGINE_PYTHON),
Mooncake in a network namespace of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine_processes"))
from staging import SOURCE, Stage, engine_python, why_not_imported, why_not_isolated

from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.cuda_ipc import CudaIpcTransport
from kvpoll.runtime.transports.cuda_ipc_device import HostDevice
from kvpoll.runtime.transports.interface import Death, Transport, Wake
from kvpoll.testing import TransportConformance

SUITE = Path(__file__).parent / "engine_processes" / "conforming.py"
LIMIT_S = 400.0


class TestCudaIpcPull(TransportConformance):
    """The owner copies."""

    direction: ClassVar[str] = "pull"

    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return make("cuda_ipc", node, epoch, wake, on_death, direction=self.direction, backend="host")

    def make_slow(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        made = self.make(node, epoch, wake, on_death)
        assert isinstance(made, CudaIpcTransport) and isinstance(made.device, HostDevice)
        made.device.bytes_per_s = 16 << 20
        return made


class TestCudaIpcPush(TestCudaIpcPull):
    """The writer copies."""

    direction: ClassVar[str] = "push"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module"), [("Mooncake", "mooncake.engine"), ("Nixl", "nixl_cu12._api")])
def test_the_real_engine_conforms(name: str, module: str) -> None:
    python = engine_python()
    reason = why_not_imported(python, module) or why_not_imported(python, "pytest")
    reason = reason or (why_not_isolated() if name == "Mooncake" else None)
    if reason:
        pytest.skip(f"{name} with {python}: {reason}")
    with Stage(python, isolated=name == "Mooncake", MC_TCP_STATUS_TIMEOUT_SEC="3", MC_TCP_PROGRESS_TIMEOUT_SEC="3",
               UCX_NET_DEVICES="lo", UCX_TLS="tcp") as stage:  # fmt: skip
        told = subprocess.run(
            [*stage.command, "-m", "pytest", "-rfEs", "-p", "no:cacheprovider", "-k", f"Test{name}", str(SUITE)],
            env=stage.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=SOURCE.parent,
        )  # fmt: skip
    assert told.returncode == 0, told.stdout[-6000:]
    passed = re.search(r"(\d+) passed", told.stdout)
    assert passed and int(passed[1]) >= 15, told.stdout[-3000:]
