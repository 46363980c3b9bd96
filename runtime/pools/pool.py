"""The memory behind a Layout: made here, given as a region, or adopted from an engine's own tensors.

Host memory needs numpy only; torch is imported when tensors or CUDA memory are asked for. The pool hands out views of
its memory and counts nothing: which pages are free, reserved or in quarantine is the driver's business.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.pools.layout import Layout, Plane
from kvpoll.runtime.transports.interface import Region
from kvpoll.spec.source import BadInput

if TYPE_CHECKING:
    import torch

Bytes = NDArray[np.uint8]
ALIGNMENT: Final = 64
"""Bytes. Enough for every dtype, a cache line, and the vector loads of a copy kernel."""


class KVPool:
    """All KV pages and aux rows of one rank. Built by ``on_host``, ``on_cuda`` or ``adopt``.

    kind: "host" or "cuda". On the host, ``page_view`` and ``row_view`` are the memory itself. On either, ``get`` and
    ``put``, ``get_row`` and ``put_row`` move one page of one plane or one row.
    """

    def __init__(self, layout: Layout, regions: tuple[Region, ...], planes: list[Any], rows: Any) -> None:
        self.layout = layout
        self.kind = regions[0].kind
        self._regions = regions
        self._planes = planes  # one uint8 [pages, page_bytes] a plane: numpy arrays, or tensors on CUDA
        self._rows = rows  # uint8 [rows, row_bytes]
        self._row_memory = memoryview(rows.reshape(-1)) if self.kind == "host" else None

    @classmethod
    def on_host(cls, layout: Layout, region: Region | None = None) -> KVPool:
        """A pool in host memory: in this region, from its first byte, or in fresh zeroed memory.

        Raises BadInput when the region is not host memory, too small, or not aligned to 64 bytes.
        """
        if region is None:
            region = _fresh(layout.total_bytes)
        if region.kind != "host":
            raise BadInput(f"KV pool: a {region.kind} region cannot be a pool in host memory; use on_cuda or adopt")
        if region.nbytes < layout.total_bytes:
            raise BadInput(
                f"KV pool: {region.nbytes} bytes are too few for the layout, which takes {layout.total_bytes}; "
                f"give more memory, or fewer than {layout.pages} pages"
            )
        if region.address % ALIGNMENT:
            raise BadInput(f"KV pool: address {region.address:#x} is not aligned to {ALIGNMENT} bytes")
        return cls(layout, (region,), *_cut(layout, _host_bytes(region)))

    @classmethod
    def on_cuda(cls, layout: Layout, device: int = 0) -> KVPool:
        """A pool in fresh zeroed memory of a CUDA device. Raises BadInput without torch, device or enough memory."""
        torch = _torch()
        if not torch.cuda.is_available() or device >= torch.cuda.device_count():
            raise BadInput(f"KV pool: torch {torch.__version__} sees no CUDA device {device}; use host memory")
        try:
            block = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=f"cuda:{device}")
        except torch.OutOfMemoryError:
            raise BadInput(
                f"KV pool: CUDA device {device} has no room for {layout.total_bytes} bytes; give fewer pages"
            ) from None
        region = Region(block.data_ptr(), layout.total_bytes, "cuda", block)
        return cls(layout, (region,), *_cut(layout, block))

    @classmethod
    def adopt(
        cls, layout: Layout, tensors: Mapping[tuple[int, str], torch.Tensor], rows: torch.Tensor | None = None
    ) -> KVPool:
        """A pool made of an engine's own tensors, nothing copied: a region for each, then one for the aux rows.

        tensors: for each (layer, part) a contiguous tensor of the layout's dtype with plane_bytes bytes, whatever its
        shape (SGLang's are [tokens, heads, head_dim]). rows: likewise uint8 [rows, row_bytes]; left out, the pool
        makes its own beside the tensors. Raises BadInput naming the first tensor that does not fit.
        """
        torch = _torch()
        wanted = getattr(torch, layout.dtype)
        unknown = sorted(set(tensors) - set(layout.planes))
        if unknown:
            raise BadInput(f"KV pool: the layout has no plane {unknown[0]}")
        given = []
        for plane in layout.planes:
            if plane not in tensors:
                raise BadInput(f"KV pool: the tensor of layer {plane.layer}, part {plane.part!r} is missing")
            given.append(_flat(f"layer {plane.layer}, part {plane.part!r}", tensors[plane], wanted, layout.plane_bytes))
        if layout.rows:
            if rows is None:
                rows = torch.zeros(layout.aux_bytes, dtype=torch.uint8, device=given[0].device)
            given.append(_flat("aux rows", rows, torch.uint8, layout.aux_bytes))
        devices = {str(each.device) for each in given}
        if len(devices) > 1:
            raise BadInput(f"KV pool: tensors on {' and '.join(sorted(devices))}; all must be on one device")
        kind: Any = given[0].device.type.replace("cpu", "host")
        if kind not in ("host", "cuda"):
            raise BadInput(f"KV pool: tensors on {given[0].device}; a pool is on cpu or cuda")
        regions = tuple(Region(each.data_ptr(), each.nbytes, kind, each) for each in given)
        blocks = given if kind == "cuda" else [_host_bytes(region) for region in regions]
        planes = [block.reshape(layout.pages, layout.page_bytes) for block in blocks[: len(layout.planes)]]
        aux = blocks[-1] if layout.rows else blocks[0][:0]
        return cls(layout, regions, planes, aux.reshape(layout.rows, layout.row_bytes))

    def regions(self) -> tuple[Region, ...]:
        """The memory, for ``Transport.register``. Laid end to end it has the offsets of the layout."""
        return self._regions

    def page_view(self, layer: int, part: str, page: int) -> Bytes:
        """One page of one plane, uint8 [page_bytes], as the memory itself. Raises BadInput on CUDA: use ``get``."""
        self._host_only("page_view", "get and put")
        view: Bytes = self._plane(layer, part, page)[page]
        return view

    def row_view(self, row: int) -> Bytes:
        """One aux row, uint8 [row_bytes], as the memory itself. Raises BadInput on CUDA: use ``get_row``."""
        self._host_only("row_view", "get_row and put_row")
        view: Bytes = self._row(row)
        return view

    def get(self, layer: int, part: str, page: int) -> Bytes:
        """The bytes of one page of one plane, uint8 [page_bytes]: a view on the host, a copy from CUDA."""
        return _to_host(self._plane(layer, part, page)[page])

    def put(self, layer: int, part: str, page: int, data: Bytes) -> None:
        """Overwrite one page of one plane."""
        self._plane(layer, part, page)[page] = _like(self.kind, data)

    def get_row(self, row: int) -> bytes:
        """The bytes of an aux row, copied."""
        if self._row_memory is None:
            return bytes(_to_host(self._row(row)))
        return bytes(self._row_memory[self._row_bytes(row)])

    def _row_bytes(self, row: int) -> slice:
        begin = self.layout.row_offset(row) - self.layout.kv_bytes
        return slice(begin, begin + self.layout.row_bytes)

    def put_row(self, row: int, data: bytes) -> None:
        """Overwrite an aux row; what ``data`` leaves of it becomes zero. Raises BadInput when data is longer."""
        if len(data) > self.layout.row_bytes:
            raise BadInput(f"KV pool: {len(data)} bytes do not fit into an aux row of {self.layout.row_bytes}")
        padded = data.ljust(self.layout.row_bytes, b"\0")
        if self._row_memory is None:
            self._row(row)[:] = _like(self.kind, np.frombuffer(padded, dtype=np.uint8))
        else:
            self._row_memory[self._row_bytes(row)] = padded

    def clear_page(self, page: int) -> None:
        """Zero one page of every plane."""
        for plane in self.layout.planes:
            self._plane(*plane, page)[page] = 0

    def tensors(self) -> dict[Plane, torch.Tensor]:
        """Every plane as a torch tensor [pages, *layout.page_shape] of the layout's dtype, sharing the memory.

        Raises BadInput where torch is not installed.
        """
        torch = _torch()
        dtype = getattr(torch, self.layout.dtype)
        shape = (self.layout.pages, *self.layout.page_shape)
        blocks = self._planes if self.kind == "cuda" else [torch.from_numpy(block) for block in self._planes]
        return {plane: block.view(dtype).view(shape) for plane, block in zip(self.layout.planes, blocks, strict=True)}

    def _plane(self, layer: int, part: str, page: int) -> Any:
        self.layout.page_offset(layer, part, page)  # names what is out of range
        return self._planes[self.layout.plane_index[Plane(layer, part)]]

    def _row(self, row: int) -> Any:
        self.layout.row_offset(row)
        return self._rows[row]

    def _host_only(self, name: str, instead: str) -> None:
        if self.kind != "host":
            raise BadInput(f"KV pool: {name} needs host memory and this pool is on {self.kind}; use {instead}")


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BadInput(f"KV pool: tensors need torch, which cannot be imported ({error}); pip install torch") from None
    return torch


def _fresh(nbytes: int) -> Region:
    """Zeroed host memory. Raises BadInput when the machine has not that much."""
    try:
        block = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    except MemoryError:
        raise BadInput(f"KV pool: this machine has no room for {nbytes} bytes; give fewer pages") from None
    return Region(block.ctypes.data + -block.ctypes.data % ALIGNMENT, nbytes, "host", block)


def _host_bytes(region: Region) -> Bytes:
    """The region as a uint8 array that keeps alive whatever owns the memory."""
    memory = (ctypes.c_uint8 * region.nbytes).from_address(region.address)
    memory.keep = region.keep  # type: ignore[attr-defined]  # ctypes arrays take attributes; and views keep the array
    return np.frombuffer(memoryview(memory), dtype=np.uint8)


def _cut(layout: Layout, block: Any) -> tuple[list[Any], Any]:
    """Planes [pages, page_bytes] and rows [rows, row_bytes] of one block, an array or a tensor of bytes."""
    starts = range(0, layout.kv_bytes, layout.plane_bytes)
    planes = [block[at : at + layout.plane_bytes].reshape(layout.pages, layout.page_bytes) for at in starts]
    rows = block[layout.kv_bytes : layout.total_bytes].reshape(layout.rows, layout.row_bytes)
    return planes, rows


def _flat(what: str, tensor: Any, dtype: Any, nbytes: int) -> Any:
    """The tensor as bytes, uint8 [nbytes]."""
    if tensor.dtype != dtype:
        raise BadInput(f"KV pool: {what}: the tensor is {tensor.dtype}, the layout says {dtype}")
    if tensor.nbytes != nbytes:
        raise BadInput(f"KV pool: {what}: the tensor has {tensor.nbytes} bytes, the layout says {nbytes}")
    if not tensor.is_contiguous():
        raise BadInput(f"KV pool: {what}: the tensor is not contiguous, so its pages have no fixed offsets")
    return tensor.detach().view(-1).view(_torch().uint8)


def _to_host(data: Any) -> Bytes:
    """Bytes of a pool as an array: the same memory, or from CUDA a copy."""
    host: Bytes = data if isinstance(data, np.ndarray) else data.cpu().numpy()
    return host


def _like(kind: str, data: Bytes) -> Any:
    """The bytes as what a pool of this kind takes."""
    return data if kind == "host" else _torch().from_numpy(np.array(data))
