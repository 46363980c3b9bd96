"""Read and write the bytes of a region, wherever its memory is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import Region, TransportError
from kvpoll.runtime.transports.shm_memory import as_array

Bytes = NDArray[np.uint8]


def read(region: Region) -> Bytes:
    """The region's bytes, uint8[nbytes]: a view of host memory, a copy of device memory."""
    if region.kind == "host":
        return as_array(region)
    content: Bytes = _tensor(region).cpu().numpy()
    return content


def write(region: Region, content: Bytes | int) -> None:
    """Fill the region with ``content``, uint8[nbytes], or with one value; done when this returns."""
    if region.kind == "host":
        as_array(region)[:] = content
        return
    import torch

    tensor = _tensor(region)
    if isinstance(content, int):
        tensor.fill_(content)
    else:
        tensor.copy_(torch.from_numpy(content))
    torch.cuda.synchronize()


def _tensor(region: Region) -> Any:
    keep = region.keep
    if not hasattr(keep, "numel") or keep.numel() * keep.element_size() != region.nbytes:
        raise TransportError("a region of device memory must keep the tensor that it is, whole and contiguous")
    import torch

    return keep.view(-1).view(torch.uint8)
