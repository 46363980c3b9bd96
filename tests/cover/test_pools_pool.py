"""The memory behind a layout: made, given, or adopted; the same offsets whichever way, and one clear line when not."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvpoll.runtime.pools.layout import ELEMENT_BYTES, Layout, Plane
from kvpoll.runtime.pools.pool import ALIGNMENT, KVPool
from kvpoll.runtime.transports.interface import Region
from kvpoll.spec.source import BadInput

LAYOUT = Layout((2, 3), pages=5, page_tokens=4, heads=4, head_dim=8, tp_size=2, tp_rank=1, rows=3)


def offset_space(pool: KVPool) -> bytes:
    """All memory, region after region, as a transport sees it."""
    return b"".join(ctypes.string_at(region.address, region.nbytes) for region in pool.regions())


def write_everywhere(pool: KVPool) -> None:
    """A number of its own to every page of every plane and every row."""
    layout = pool.layout
    places = [(*plane, page) for plane in layout.planes for page in range(layout.pages)]
    for number, place in enumerate(places, start=1):
        pool.put(*place, np.full(layout.page_bytes, number, dtype=np.uint8))
    for row in range(layout.rows):
        pool.put_row(row, bytes([200 + row]) * layout.row_bytes)


def expected_bytes(layout: Layout) -> bytes:
    memory = bytearray(layout.total_bytes)
    number = 0
    for plane in layout.planes:
        for page in range(layout.pages):
            number += 1
            at = layout.page_offset(*plane, page)
            memory[at : at + layout.page_bytes] = bytes([number]) * layout.page_bytes
    for row in range(layout.rows):
        at = layout.row_offset(row)
        memory[at : at + layout.row_bytes] = bytes([200 + row]) * layout.row_bytes
    return bytes(memory)


def test_pages_and_rows_lie_where_the_layout_says() -> None:
    pool = KVPool.on_host(LAYOUT)
    assert offset_space(pool) == bytes(LAYOUT.total_bytes)
    assert pool.kind == "host" and pool.regions()[0].address % ALIGNMENT == 0
    write_everywhere(pool)
    assert offset_space(pool) == expected_bytes(LAYOUT)
    assert pool.get(3, "k", 4).tolist() == [15] * LAYOUT.page_bytes
    assert pool.get_row(2) == bytes([202]) * 64
    pool.clear_page(4)
    assert not pool.get(3, "k", 4).any() and pool.get(3, "k", 3).all()


def test_views_are_the_memory() -> None:
    pool = KVPool.on_host(LAYOUT)
    page, row = pool.page_view(2, "v", 1), pool.row_view(0)
    page[:] = 7
    row[:2] = 9
    assert pool.get(2, "v", 1).tolist() == [7] * LAYOUT.page_bytes
    assert pool.get_row(0)[:3] == b"\x09\x09\x00"


class Watched(np.ndarray):  # type: ignore[type-arg]
    """Memory whose end can be seen."""


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    block = np.zeros(LAYOUT.total_bytes + ALIGNMENT, dtype=np.uint8).view(Watched)
    last = weakref.ref(block)
    pool = KVPool.on_host(
        LAYOUT, Region(block.ctypes.data + -block.ctypes.data % ALIGNMENT, LAYOUT.total_bytes, "host", block)
    )
    page = pool.page_view(2, "v", 1)
    del pool, block
    gc.collect()
    assert last() is not None
    page[:] = 7
    del page
    gc.collect()
    assert last() is None


@pytest.fixture
def shared() -> Iterator[Region]:
    """Memory behind a file descriptor, larger than the layout, as the shm transport makes it."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd_create")
    file = os.memfd_create("kvpoll-test")
    os.ftruncate(file, 2 * LAYOUT.total_bytes)
    mapping = mmap.mmap(file, 2 * LAYOUT.total_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    yield Region(address, 2 * LAYOUT.total_bytes, "host", mapping, file)
    os.close(file)


def test_a_pool_in_given_memory_writes_through_to_the_file(shared: Region) -> None:
    pool = KVPool.on_host(LAYOUT, shared)
    write_everywhere(pool)
    assert shared.file is not None
    assert os.pread(shared.file, LAYOUT.total_bytes, 0) == expected_bytes(LAYOUT)
    assert pool.regions() == (shared,)


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            {"nbytes": 100},
            "KV pool: 100 bytes are too few for the layout, which takes 2752; give more memory, or fewer than 5 pages",
        ),
        ({"address": 4097}, "KV pool: address 0x1001 is not aligned to 64 bytes"),
        ({"kind": "cuda"}, "KV pool: a cuda region cannot be a pool in host memory; use on_cuda or adopt"),
    ],
)
def test_memory_that_cannot_hold_the_layout_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(BadInput) as error:
        KVPool.on_host(LAYOUT, Region(4096, LAYOUT.total_bytes)._replace(**change))
    assert str(error.value) == problem


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(BadInput, match=r"no room for \d+ bytes; give fewer pages"):
        KVPool.on_host(replace(LAYOUT, pages=2**31 - 1, page_tokens=2**20))


def test_places_and_rows_that_do_not_exist_are_refused() -> None:
    pool = KVPool.on_host(LAYOUT)
    for call in (pool.get, pool.page_view):
        with pytest.raises(BadInput, match="page 5 is outside"):
            call(2, "k", 5)
    with pytest.raises(BadInput, match="no plane 'k' of layer 0"):
        pool.get(0, "k", 0)
    with pytest.raises(BadInput, match="aux row 3"):
        pool.row_view(3)
    with pytest.raises(BadInput, match="65 bytes do not fit into an aux row of 64"):
        pool.put_row(0, bytes(65))


def test_without_torch_the_host_pool_works_and_tensors_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    pool = KVPool.on_host(LAYOUT)
    write_everywhere(pool)
    with pytest.raises(BadInput, match=r"tensors need torch, which cannot be imported .*; pip install torch"):
        pool.tensors()
    with pytest.raises(BadInput, match="pip install torch"):
        KVPool.on_cuda(LAYOUT)


# --- torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_tensors_share_the_memory_with_the_right_dtype_and_shape(dtype: str, order: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    layout = replace(LAYOUT, dtype=dtype, order=order)  # type: ignore[arg-type]
    pool = KVPool.on_host(layout)
    tensors = pool.tensors()
    assert list(tensors) == [Plane(2, "k"), Plane(2, "v"), Plane(3, "k"), Plane(3, "v")]
    tensor = tensors[Plane(3, "k")]
    assert tensor.dtype == getattr(torch, dtype)
    assert tuple(tensor.shape) == (5, *((2, 4, 8) if order == "HND" else (4, 2, 8)))
    tensor[4].fill_(1)
    one = torch.ones(1).to(tensor.dtype).view(torch.uint8).tolist()
    assert pool.page_view(3, "k", 4).tolist() == one * (layout.page_bytes // len(one))
    assert not pool.get(3, "k", 3).any()


def engine_tensors(layout: Layout, **options: object) -> dict[tuple[int, str], object]:
    """KV buffers as SGLang allocates them: [tokens, heads, head_dim] a layer and part."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shape = (layout.pages * layout.page_tokens, layout.local_heads, layout.head_dim)
    return {plane: torch.zeros(shape, dtype=getattr(torch, layout.dtype), **options) for plane in layout.planes}


def test_an_engines_own_tensors_are_adopted_where_they_are() -> None:
    tensors = engine_tensors(LAYOUT)
    pool = KVPool.adopt(LAYOUT, tensors)  # type: ignore[arg-type]
    write_everywhere(pool)
    assert len(pool.regions()) == 5
    assert [region.nbytes for region in pool.regions()] == [LAYOUT.plane_bytes] * 4 + [LAYOUT.aux_bytes]
    assert [region.address for region in pool.regions()[:4]] == [each.data_ptr() for each in tensors.values()]  # type: ignore[attr-defined]
    assert offset_space(pool) == expected_bytes(LAYOUT)
    import torch

    assert tensors[3, "k"].view(torch.uint8)[4 * 4 : 5 * 4].unique().tolist() == [15]  # type: ignore[attr-defined]


def test_tensors_that_do_not_fit_are_named() -> None:
    import torch

    good = engine_tensors(LAYOUT)
    here = (3, "v")
    bad = {
        "the tensor of layer 3, part 'v' is missing": {key: each for key, each in good.items() if key != here},
        r"layer 3, part 'v': the tensor is torch.float32, the layout says torch.bfloat16": {**good, here: torch.zeros(20, 2, 4)},
        r"layer 3, part 'v': the tensor has 32 bytes, the layout says 640": {**good, here: torch.zeros(16, dtype=torch.bfloat16)},
        r"layer 3, part 'v': the tensor is not contiguous": {**good, here: torch.zeros(16, 20, dtype=torch.bfloat16).T},
        r"the layout has no plane \(9, 'k'\)": {**good, (9, "k"): good[here]},
        r"tensors on cpu and meta; all must be on one device": {**good, here: torch.zeros(20, 2, 8, dtype=torch.bfloat16, device="meta")},
    }  # fmt: skip
    for problem, tensors in bad.items():
        with pytest.raises(BadInput, match=problem):
            KVPool.adopt(LAYOUT, tensors)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="tensors on meta; a pool is on cpu or cuda"):
        KVPool.adopt(LAYOUT, engine_tensors(LAYOUT, device="meta"))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="aux rows: the tensor has 64 bytes, the layout says 192"):
        KVPool.adopt(LAYOUT, good, torch.zeros(64, dtype=torch.uint8))  # type: ignore[arg-type]


def test_a_pool_without_aux_rows_has_planes_only() -> None:
    bare = replace(LAYOUT, rows=0)
    for pool in (KVPool.on_host(bare), KVPool.adopt(bare, engine_tensors(bare))):  # type: ignore[arg-type]
        assert sum(region.nbytes for region in pool.regions()) == bare.kv_bytes == bare.total_bytes
        with pytest.raises(BadInput, match="aux row 0 is outside the pool of 0 rows"):
            pool.get_row(0)


def test_a_cuda_pool_holds_the_same_bytes_or_says_that_there_is_no_device() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="sees no CUDA device 0; use host memory"):
            KVPool.on_cuda(LAYOUT)
        return
    for pool in (KVPool.on_cuda(LAYOUT), KVPool.adopt(LAYOUT, engine_tensors(LAYOUT, device="cuda"))):  # type: ignore[arg-type]
        write_everywhere(pool)
        assert {region.kind for region in pool.regions()} == {"cuda"}
        assert b"".join(bytes(region.keep.cpu().numpy()) for region in pool.regions()) == expected_bytes(LAYOUT)
        assert pool.get(3, "k", 4).tolist() == [15] * LAYOUT.page_bytes
        assert pool.tensors()[Plane(3, "k")].device.type == "cuda"
        with pytest.raises(BadInput, match="page_view needs host memory and this pool is on cuda; use get and put"):
            pool.page_view(2, "k", 0)
