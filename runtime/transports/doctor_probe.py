"""What ``doctor`` runs in a child process: import one thing, then really use it. One line of JSON after each stage.

A child may crash, hang or print; whoever started it judges by the last stage that it reached.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.engine_import import cause_and_mend
from kvpoll.runtime.transports.interface import Copies, Region, Tag, Transport
from kvpoll.spec.vocabulary import Incarnation

NBYTES: Final = 64 << 10
LIMIT_S: Final = 20.0
PAUSE_S: Final = 0.001

MODULES: Final = {
    "mooncake": ("mooncake.engine", "mooncake"),
    "nixl": ("nixl_cu12._api", "nixl"),
    "cuda_ipc": ("torch", "torch"),
    "torch": ("torch", "torch"),
    "CUDA": ("torch", "torch"),
    "triton": ("triton", ""),
    "numpy": ("numpy", "runtime"),
    "msgspec": ("msgspec", "runtime"),
    "pyzmq": ("zmq", "runtime"),
    "aiohttp": ("aiohttp", "runtime"),
    "requests": ("requests", "runtime"),
    "prometheus_client": ("prometheus_client", "runtime"),
    "matplotlib": ("matplotlib", "reports"),
}
"""Module to import, and the extra of kvpoll that brings it, if one does. Other transports are kvpoll's own."""


def tell(stage: str, note: str = "") -> None:
    """Stages: "imported", "used", or "failed" with what is wrong and the mend."""
    print(json.dumps({"stage": stage, "note": note}), file=ANSWERS, flush=True)


ANSWERS: Any = sys.stdout


def main(words: list[str]) -> None:
    """Probe the thing that is named first."""
    global ANSWERS
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print where they like
    name = words[0]
    if name == "cuda_ipc-writer":
        _write_by_cuda(sys.stdin.readline())
        return
    if name in MODULES:
        module, extra = MODULES[name]
        try:
            importlib.import_module(module)
        except Exception as error:
            tell("failed", cause_and_mend(error, module, extra))
            return
        tell("imported")
    try:
        tell("used", USES.get(name, lambda: "")())
    except Exception as error:
        tell("failed", " ".join(str(error).split()) or type(error).__name__)


# --- transports -------------------------------------------------------------------------------------


class _Ends:
    """An owner and a writer in this process, and whether the bytes arrived."""

    def __init__(self, name: str, **options: Any) -> None:
        self.woken = threading.Event()
        self.owner = make(name, "doctor-owner", 0, self.woken.set, lambda node, epoch: None, **options)
        self.writer = make(name, "doctor-writer", 0, self.woken.set, lambda node, epoch: None, **options)

    def carry(self, allocate: Callable[[], Region], step: Callable[[], Any] = lambda: None) -> None:
        source, target = allocate(), allocate()
        wanted = np.random.default_rng(0).bytes(NBYTES)
        _bytes_of(source)[:] = np.frombuffer(wanted, np.uint8)
        descriptor = self.owner.register([target])
        self.writer.register([source])
        await_write(self.writer, descriptor, "doctor-owner", step)
        if _bytes_of(target).tobytes() != wanted:
            raise RuntimeError("the bytes that arrived are not those that were sent; do not use this transport")
        self.writer.close()
        self.owner.close()


def await_write(writer: Transport, descriptor: bytes, owner: str, step: Callable[[], Any] = lambda: None) -> None:
    """Write the whole memory in two ranges that change places. Raises RuntimeError when it does not arrive."""
    peer = writer.connect(descriptor, owner, 0)
    half = NBYTES // 2
    copies = Copies(np.array([0, half]), np.array([0, half]), np.array([half, half]))
    handle = writer.post(peer, copies, Tag(Incarnation(1, 0, 0), 1))
    until = time.monotonic() + LIMIT_S
    while (progress := writer.poll(handle)).state == "pending":
        step()
        if time.monotonic() > until:
            raise RuntimeError(f"a write of {NBYTES} bytes was not placed within {LIMIT_S:g} s")
        time.sleep(PAUSE_S)
    if progress.state != "done":
        raise RuntimeError(f"a write of {NBYTES} bytes failed: {progress.reason}")


def _bytes_of(region: Region) -> Any:
    """The memory of a host region, uint8."""
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * region.nbytes).from_address(region.address))


def _plain() -> Region:
    memory = mmap.mmap(-1, NBYTES)
    return Region(np.frombuffer(memory, np.uint8).ctypes.data, NBYTES, keep=memory)


def _use_plain(name: str) -> str:
    _Ends(name).carry(_plain)
    return ""


def _use_memory() -> str:
    from kvpoll.runtime.transports.memory import Fabric

    fabric = Fabric()
    _Ends("memory", fabric=fabric).carry(_plain, fabric.step)
    return ""


def _use_shm() -> str:
    from kvpoll.runtime.transports.shm import allocate

    _Ends("shm").carry(lambda: allocate(NBYTES))
    return ""


def _use_mooncake() -> str:
    from kvpoll.runtime.transports.mooncake_namespace import raise_loopback

    if os.environ.get(IN_NAMESPACE):
        raise_loopback()
    return _use_plain("mooncake")


IN_NAMESPACE: Final = "KVPOLL_DOCTOR_IN_NAMESPACE"


def _use_cuda_ipc() -> str:
    """This process owns, a child of it writes: memory cannot be mapped by the process that exports it."""
    import torch

    owner = make("cuda_ipc", "doctor-owner", 0, lambda: None, lambda node, epoch: None)
    target = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda")
    descriptor = owner.register([Region(target.data_ptr(), NBYTES, "cuda", target)])
    torch.cuda.synchronize()
    told = subprocess.run(
        [sys.executable, "-P", "-m", __spec__.name, "cuda_ipc-writer"],
        input=descriptor + b"\n", capture_output=True, timeout=2 * LIMIT_S, check=False,
    )  # fmt: skip
    lines = told.stdout.decode().splitlines()
    answer = json.loads(lines[-1]) if lines else {"note": f"the writer ended with status {told.returncode}"}
    if answer["note"]:
        raise RuntimeError(answer["note"])
    torch.cuda.synchronize()
    if not torch.equal(target.cpu(), _cuda_pattern()):
        raise RuntimeError("the bytes that arrived are not those that were sent; do not use this transport")
    owner.close()
    return torch.cuda.get_device_name()


def _cuda_pattern() -> Any:
    import torch

    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8))


def _write_by_cuda(descriptor: str) -> None:
    import torch

    try:
        writer = make("cuda_ipc", "doctor-writer", 0, lambda: None, lambda node, epoch: None)
        source = _cuda_pattern().cuda()
        writer.register([Region(source.data_ptr(), NBYTES, "cuda", source)])
        await_write(writer, descriptor.rstrip("\n").encode(), "doctor-owner")
        torch.cuda.synchronize()
        writer.close()
    except Exception as error:
        tell("failed", " ".join(str(error).split()) or type(error).__name__)
    else:
        tell("used")


# --- dependencies -----------------------------------------------------------------------------------


def _use_torch() -> str:
    import torch

    assert int((torch.arange(4) * 2).sum()) == 12
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _use_cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        if not torch.version.cuda:
            raise RuntimeError("torch is built without CUDA; install a CUDA build of torch, on a machine with a GPU")
        raise RuntimeError(f"torch is built for CUDA {torch.version.cuda} and finds no GPU; check nvidia-smi")
    assert int((torch.arange(4, device="cuda") * 2).sum()) == 12
    return str(torch.cuda.get_device_name())


def _use_triton() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU to compile for; the copy kernel is tested in Triton's interpreter only")
    from kvpoll.runtime.transports.cuda_ipc_device import CudaDevice

    CudaDevice(kernel="triton").prove_kernel()
    return ""


def _use_msgspec() -> str:
    import msgspec

    assert msgspec.msgpack.decode(msgspec.msgpack.encode([1, "two"])) == [1, "two"]
    return ""


def _use_pyzmq() -> str:
    import zmq

    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        port = one.bind_to_random_port("tcp://127.0.0.1")
        other.connect(f"tcp://127.0.0.1:{port}")
        other.send(b"x")
        assert one.poll(int(LIMIT_S * 1000)) and one.recv() == b"x"
    return f"libzmq {zmq.zmq_version()}"


USES: Final[dict[str, Callable[[], str]]] = {
    "memory": _use_memory, "shm": _use_shm, "tcp": lambda: _use_plain("tcp"), "mooncake": _use_mooncake,
    "nixl": lambda: _use_plain("nixl"), "cuda_ipc": _use_cuda_ipc, "torch": _use_torch, "CUDA": _use_cuda,
    "triton": _use_triton, "msgspec": _use_msgspec, "pyzmq": _use_pyzmq,
}  # fmt: skip
"""How each is used; what is not here is used by being imported."""


if __name__ == "__main__":
    main(sys.argv[1:])
    ANSWERS.flush()
    os._exit(0)  # an engine's threads must not hold up the answer
