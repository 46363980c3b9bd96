"""Memory that another process can map: memfd pools, and mappings of a peer's pool.

A pool is an anonymous file (``memfd_create``): it has no name to clean up, goes with its last mapping, and its size
is sealed, so that a peer cannot shrink it and kill whoever touches the missing part (SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import Region, TransportError

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PAGE: Final = mmap.PAGESIZE
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class SharedPool:
    """What keeps an allocated region alive: its mapping and its file descriptor."""

    def __init__(self, nbytes: int, name: str) -> None:
        if nbytes <= 0:
            raise TransportError(f"shm: a pool of {nbytes} bytes cannot be allocated: ask for at least one byte")
        try:
            self.file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise TransportError(f"shm: no shared memory file: {error.strerror}: raise the limit of files") from None
        self._close = weakref.finalize(self, os.close, self.file)
        try:
            os.ftruncate(self.file, nbytes)
            self.mapping = mmap.mmap(self.file, nbytes)
        except OSError as error:
            self._close()
            raise TransportError(
                f"shm: {nbytes} bytes cannot be mapped: {error.strerror}: use a smaller pool"
            ) from None
        seal(self.file)


def allocate(nbytes: int, *, prefault: bool = True, name: str = "kvpoll") -> Region:
    """A region of ``nbytes`` zero bytes that peers on this host can map. Freed when nothing refers to it any more.

    prefault: touch every page now, so that no transfer pays for it (it dominates short runs, ENGINES 8). Raises
    TransportError when the memory is not to be had.
    """
    pool = SharedPool(nbytes, name)
    if prefault:
        try:
            # fallocate fails cleanly where touching a page beyond the memory limit would be a SIGBUS.
            os.posix_fallocate(pool.file, 0, nbytes)
        except OSError as error:
            raise TransportError(f"shm: {nbytes} bytes are not free: {error.strerror}: use a smaller pool") from None
        _advise(pool.mapping, mmap.MADV_POPULATE_WRITE if hasattr(mmap, "MADV_POPULATE_WRITE") else 23)
    return Region(address_of(pool.mapping), nbytes, "host", pool, pool.file)


def _advise(mapping: mmap.mmap, advice: int) -> None:
    """Advice that an older kernel may not know; then first use pays instead."""
    with contextlib.suppress(OSError, ValueError):
        mapping.madvise(advice)


def address_of(buffer: Any) -> int:
    """Address of the first byte of a writable buffer. The buffer is not kept alive by it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def as_array(region: Region) -> NDArray[np.uint8]:
    """The region's bytes as uint8[nbytes], a view that keeps the region alive. Host memory only."""
    if region.kind != "host":
        raise TransportError(f"a region of {region.kind} memory has no view for numpy: use the tensor it came from")
    buffer = (ctypes.c_ubyte * region.nbytes).from_address(region.address)
    buffer.keep = region.keep  # type: ignore[attr-defined]
    view: NDArray[np.uint8] = np.frombuffer(memoryview(buffer), dtype=np.uint8)
    return view


def as_tensor(region: Region) -> Any:
    """The region's bytes as a torch tensor, uint8[nbytes], a view that keeps the region alive."""
    import torch

    return torch.from_numpy(as_array(region))


def seal(file: int) -> None:
    """Fix the size of a shared file for good. Raises TransportError for a file that cannot be sealed."""
    try:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        if is_sealed(file):
            return
        raise TransportError(
            f"shm: file {file} cannot be sealed against shrinking: allocate pools with "
            f"kvpoll.runtime.transports.shm.allocate, or memfd_create with MFD_ALLOW_SEALING"
        ) from None


def is_sealed(file: int) -> bool:
    """Whether nobody can shrink this file any more."""
    try:
        return bool(fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


class Mapping:
    """A peer's file in this process's memory; ``close`` unmaps it. A forked child does not inherit it.

    Python's own mmap keeps a duplicate of the descriptor, which a forked child would inherit and so keep the dead
    owner's memory alive; hence the C call.
    """

    def __init__(self, file: int, nbytes: int, *, writable: bool = True) -> None:
        if not is_sealed(file) or os.fstat(file).st_size < nbytes:
            raise TransportError(
                f"shm: the peer's file is smaller than the {nbytes} bytes it declared, or not sealed: it cannot be used"
            )
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, file, 0)
        if address in (None, _FAILED):
            raise TransportError(f"shm: {nbytes} bytes of the peer cannot be mapped: {os.strerror(ctypes.get_errno())}")
        self.address: int = address
        self.nbytes = nbytes
        _libc.madvise(address, -(-nbytes // _PAGE) * _PAGE, mmap.MADV_DONTFORK)

    def words(self) -> memoryview:
        """The first bytes as signed 64-bit words. Must not be used after ``close``."""
        buffer = (ctypes.c_byte * (self.nbytes // 8 * 8)).from_address(self.address)
        return memoryview(buffer).cast("B").cast("q")

    def close(self) -> None:
        """Unmap; a second call does nothing."""
        if self.nbytes:
            _libc.munmap(self.address, self.nbytes)
            self.nbytes = 0
