"""What the transport ``cuda_ipc`` asks of the machine below it: share memory, order work, copy, say when it is over.

``CudaDevice`` is the real one. ``HostDevice`` does the same on host memory of a memfd, with a stand-in for the event
that is complete when its gate is open; with it the whole adapter, two processes included, is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from kvpoll.runtime.transports.copy_plan import Plan, cut
from kvpoll.runtime.transports.gather_scatter_tables import copy_by_memmove, copy_by_torch
from kvpoll.runtime.transports.interface import Region, TransportError
from kvpoll.spec.source import BadInput


class Mapped(NamedTuple):
    """Memory of one region as this process sees it. ``tensor`` is its uint8 tensor on a GPU."""

    address: int
    nbytes: int
    keep: Any
    tensor: Any = None


class Device(Protocol):
    """The machine below. Calls that take a plan may be made from any one thread."""

    kind: str

    def own(self, regions: Sequence[Region]) -> list[Mapped]:
        """This process's regions. Raises TransportError for memory that cannot be shared."""
        ...

    def export(self, region: Region, mapped: Mapped) -> bytes:
        """What another process needs to ``open`` it."""
        ...

    def open(self, exported: bytes) -> Mapped:
        """Another process's region. Raises TransportError."""
        ...

    def mark(self) -> Any:
        """A point in the work that the caller has given the device so far."""
        ...

    def export_mark(self, mark: Any) -> bytes:
        """The same point, for another process; ``mark`` must stay alive until that has opened it."""
        ...

    def open_mark(self, exported: bytes) -> Any: ...

    def copy(self, ranges: Plan, sources: Sequence[Mapped], targets: Sequence[Mapped], after: Any) -> Any:
        """Start one batched copy after that point; its ticket. ``ranges`` holds addresses of these mappings."""
        ...

    def finished(self, ticket: Any) -> bool:
        """Is every byte of the copy in place? Raises when the device has failed."""
        ...


# --- CUDA ------------------------------------------------------------------------------------------


class CudaExport(msgspec.Struct):
    """What ``torch.UntypedStorage._share_cuda_`` returns, the GPU's identity, and where the region lies inside."""

    uuid: str
    handle: bytes
    size_bytes: int
    offset_bytes: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    event_sync_required: bool
    region_offset: int
    region_bytes: int


class CudaMark(msgspec.Struct):
    """The handle of an interprocess event."""

    handle: bytes


class CudaDevice:
    """One GPU, through torch.

    index: its number in this process, None for the current one. kernel: "triton", "torch" (two launches for pages of
    one size, one for each range otherwise), or "auto": Triton where it works, and ``kernel_reason`` why not.

    torch's private ``_share_cuda_`` and ``_new_shared_cuda`` are what ``torch.multiprocessing`` itself uses to pass a
    tensor on. The memory must come from cudaMalloc: expandable segments cannot be shared this way. The exporter must
    outlive what is mapped, and cannot map its own.
    """

    kind = "cuda"

    def __init__(self, index: int | None = None, kernel: str = "auto") -> None:
        try:
            import torch
        except ImportError:
            raise BadInput("the transport cuda_ipc needs torch with CUDA; pip install torch") from None
        if not torch.cuda.is_available():
            build = torch.version.cuda
            raise BadInput(
                "the transport cuda_ipc finds no GPU: "
                + (f"torch {torch.__version__} has CUDA {build}, check nvidia-smi" if build else
                   f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
            )  # fmt: skip
        if kernel not in ("auto", "triton", "torch"):
            raise BadInput(f"cuda_ipc has no kernel {kernel!r} (valid: auto, triton, torch)")
        self.torch: Any = torch
        self.torch.cuda.init()
        self.index = torch.cuda.current_device() if index is None else index
        self.device = torch.device("cuda", self.index)
        self.uuid = _uuid(torch, self.index)
        self.stream: Any = self.torch.cuda.Stream(self.device)
        self.kernel = kernel
        self.kernel_reason: str | None = None
        self._launch: Callable[..., Any] | None = None
        self._settled = threading.Lock()
        self._is_settled = False

    def own(self, regions: Sequence[Region]) -> list[Mapped]:
        """The regions as uint8 tensors over the storages that they keep."""
        return [self._own(place, region) for place, region in enumerate(regions)]

    def _own(self, place: int, region: Region) -> Mapped:
        tensor = region.keep
        if not (isinstance(tensor, self.torch.Tensor) and tensor.is_cuda):
            raise TransportError(f"cuda_ipc: region {place} must keep the CUDA tensor whose memory it is")
        if tensor.device.index != self.index:
            raise TransportError(f"cuda_ipc: region {place} is on {tensor.device}, the transport on {self.device}")
        storage = tensor.untyped_storage()
        offset = region.address - storage.data_ptr()
        if offset < 0 or offset + region.nbytes > storage.nbytes():
            raise TransportError(f"cuda_ipc: region {place} reaches beyond the storage of the tensor that it keeps")
        return Mapped(region.address, region.nbytes, tensor, self._bytes(storage, offset, region.nbytes))

    def _bytes(self, storage: Any, offset: int, nbytes: int) -> Any:
        empty = self.torch.empty(0, dtype=self.torch.uint8, device=self.device)
        return empty.set_(storage, offset, (nbytes,))

    def export(self, region: Region, mapped: Mapped) -> bytes:
        """The storage's CUDA IPC handle."""
        storage = mapped.keep.untyped_storage()
        try:
            _, handle, size, offset, counter, counter_offset, event, must_wait = storage._share_cuda_()
        except RuntimeError as error:
            raise TransportError(
                f"cuda_ipc: the memory cannot be shared: {_line(error)}; allocate it without expandable segments "
                "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False)"
            ) from None
        return msgspec.msgpack.encode(
            CudaExport(
                self.uuid, handle, size, offset, counter, counter_offset, event, must_wait,
                region.address - storage.data_ptr(), region.nbytes,
            )
        )  # fmt: skip

    def open(self, exported: bytes) -> Mapped:
        """Map it. The GPU is found by identity: numbers differ with CUDA_VISIBLE_DEVICES."""
        given = msgspec.msgpack.decode(exported, type=CudaExport)
        count = self.torch.cuda.device_count()
        index = next((number for number in range(count) if _uuid(self.torch, number) == given.uuid), None)
        if index is None:
            raise TransportError(f"cuda_ipc: the peer's GPU {given.uuid} is not visible here: CUDA_VISIBLE_DEVICES")
        try:
            storage = self.torch.UntypedStorage._new_shared_cuda(
                index, given.handle, given.size_bytes, given.offset_bytes, given.counter_handle,
                given.counter_offset, given.event_handle, given.event_sync_required,
            )  # fmt: skip
        except RuntimeError as error:
            raise TransportError(f"cuda_ipc: the peer's memory cannot be mapped: {_line(error)}") from None
        empty = self.torch.empty(0, dtype=self.torch.uint8, device=self.torch.device("cuda", index))
        tensor = empty.set_(storage, given.region_offset, (given.region_bytes,))
        return Mapped(tensor.data_ptr(), given.region_bytes, storage, tensor)

    def mark(self) -> Any:
        """An interprocess event on the caller's current stream: the KV that it computes there must be in place."""
        with self.torch.cuda.device(self.device):
            event = self.torch.cuda.Event(interprocess=True)
            event.record(self.torch.cuda.current_stream(self.device))
        return event

    def export_mark(self, mark: Any) -> bytes:
        """Its handle."""
        return msgspec.msgpack.encode(CudaMark(mark.ipc_handle()))

    def open_mark(self, exported: bytes) -> Any:
        """The other process's event."""
        handle = msgspec.msgpack.decode(exported, type=CudaMark).handle
        return self.torch.cuda.Event.from_ipc_handle(self.device, handle)

    def copy(self, ranges: Plan, sources: Sequence[Mapped], targets: Sequence[Mapped], after: Any) -> Any:
        """One launch on the transport's own stream, and an event behind it.

        The event is only asked after the record returned: an event that was never recorded counts as complete.
        """
        torch = self.torch
        self._settle_kernel()
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            keep: Any = None
            if self._launch is not None:
                keep = self._launch(ranges, sources[0].tensor, targets[0].tensor)
            else:
                copy_by_torch(
                    ranges,
                    {place: mapped.tensor for place, mapped in enumerate(sources)},
                    {place: mapped.tensor for place, mapped in enumerate(targets)},
                )
            event = torch.cuda.Event(interprocess=True)
            event.record(self.stream)
        return event, keep, after

    def finished(self, ticket: Any) -> bool:
        """``cudaEventQuery``; a sticky CUDA error is raised."""
        return bool(ticket[0].query())

    def prove_kernel(self) -> None:
        """Compile the kernel now, not with the first copy. Raises what goes wrong if it was asked for by name."""
        self._settle_kernel()

    @property
    def kernel_name(self) -> str:
        """What copies, once the first copy was made: "triton", or "torch" for the reason in ``kernel_reason``."""
        return "triton" if self._launch is not None else "torch"

    def _settle_kernel(self) -> None:
        """Compile the kernel with a copy of 16 bytes, once, and decide by its result."""
        with self._settled:
            if self._is_settled:
                return
            self._is_settled = True
            if self.kernel == "torch":
                return
            try:
                self._launch = self._proven_kernel()
            except Exception as error:  # no Triton, no C compiler, an unknown GPU
                if self.kernel == "triton":
                    raise
                self.kernel_reason = f"{type(error).__name__}: {_line(error)}"

    def _proven_kernel(self) -> Callable[..., Any]:
        from kvpoll.runtime.transports.gather_scatter_kernel import launch

        torch = self.torch
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            source = torch.arange(32, dtype=torch.uint8, device=self.device)
            target = torch.zeros(32, dtype=torch.uint8, device=self.device)
            place = np.zeros(1, np.int64)
            for nbytes in (16, 15):  # both widths of the kernel
                start, end = (np.array([side.data_ptr()], np.int64) for side in (source, target))
                launch(Plan(start, end, np.array([nbytes], np.int64), place, place), source, target)
                if not torch.equal(target[:nbytes], source[:nbytes]):
                    raise RuntimeError("the kernel copied wrongly")
        return launch


def _uuid(torch: Any, index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


# --- the host's stand-in ----------------------------------------------------------------------------


class HostExport(msgspec.Struct):
    """A file that both processes map: reached through the exporter's /proc entry."""

    pid: int
    file: int
    nbytes: int


class HostDevice:
    """Host memory in place of a GPU: copies happen when they are asked after, while ``gate`` is open.

    So a copy that was started is in flight for as long as the gate is shut, as a launched kernel is until its event
    completes, and like a kernel it cannot be called back. ``bytes_per_s``: how fast it is; None for all at once.
    """

    kind = "host"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.bytes_per_s: float | None = None
        self.copies_started = 0

    def own(self, regions: Sequence[Region]) -> list[Mapped]:
        """The regions as they are."""
        return [Mapped(region.address, region.nbytes, region.keep) for region in regions]

    def export(self, region: Region, mapped: Mapped) -> bytes:
        """Its file. Raises TransportError for memory without one."""
        del mapped
        if region.file is None:
            raise TransportError("cuda_ipc on host memory: only a region with a file descriptor can be shared")
        return msgspec.msgpack.encode(HostExport(os.getpid(), region.file, region.nbytes))

    def open(self, exported: bytes) -> Mapped:
        """Map it."""
        given = msgspec.msgpack.decode(exported, type=HostExport)
        try:
            file = os.open(f"/proc/{given.pid}/fd/{given.file}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"cuda_ipc: the peer's memory cannot be mapped: {error.strerror}") from None
        with contextlib.closing(os.fdopen(file, "r+b", buffering=0)) as opened:
            memory = mmap.mmap(opened.fileno(), given.nbytes)
        return Mapped(np.frombuffer(memory, np.uint8).ctypes.data, given.nbytes, memory)

    def mark(self) -> Any:
        """The host has done what it was told by the time it returns."""
        return None

    def export_mark(self, mark: Any) -> bytes:
        """Nothing."""
        del mark
        return b""

    def open_mark(self, exported: bytes) -> Any:
        """Nothing."""
        del exported

    def copy(self, ranges: Plan, sources: Sequence[Mapped], targets: Sequence[Mapped], after: Any) -> Any:
        """In flight from now on."""
        del after
        self.copies_started += 1
        return _HostCopy(ranges, self.bytes_per_s), list(sources), list(targets)  # mappings stay while it is under way

    def finished(self, ticket: Any) -> bool:
        """Copies, if the gate is open, what should have been copied by now; True when that is everything."""
        return self.gate.is_set() and ticket[0].go_on()


class _HostCopy:
    """A copy of the host's that takes its time."""

    def __init__(self, ranges: Plan, bytes_per_s: float | None) -> None:
        self._pieces = cut(ranges, 1, _HOST_PIECE_BYTES)
        self._rate = bytes_per_s or 1e18
        self._began = time.monotonic()
        self._copied = 0

    def go_on(self) -> bool:
        while self._copied <= (time.monotonic() - self._began) * self._rate:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            copy_by_memmove(piece)
            self._copied += piece.total
        return False


_HOST_PIECE_BYTES = 64 << 10


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
