"""Ways to move KV bytes between processes, all behind the one interface of ``interface.py``.

``make`` builds one by name. Each is imported when it is asked for: an engine that is not installed costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from kvpoll.runtime.transports.interface import Death, Region, Transport, Wake
from kvpoll.spec.source import BadInput, nearest

NAMES: Final = ("memory", "shm", "tcp", "mooncake", "nixl", "cuda_ipc")

_HOMES: Final = {
    "memory": ("memory", "MemoryTransport"),
    "shm": ("shm", "ShmTransport"),
    "tcp": ("tcp", "TcpTransport"),
    "mooncake": ("mooncake", "MooncakeTransport"),
    "nixl": ("nixl", "NixlTransport"),
    "cuda_ipc": ("cuda_ipc", "CudaIpcTransport"),
}
"""Module and class of each transport."""


def make(name: str, node: str, epoch: int, wake: Wake, on_death: Death, **options: Any) -> Transport:
    """One side of the data path of this process. ``options`` are those of the transport's class.

    Raises BadInput for a name that there is none of, an option that the transport does not have, and an engine that is
    not installed or cannot be imported; TransportError when it cannot start.
    """
    if name not in _HOMES:
        raise BadInput(f"there is no transport {name!r}{nearest(name, NAMES)}")
    module, kind = _HOMES[name]
    made = getattr(import_module(f"kvpoll.runtime.transports.{module}"), kind)
    known = _options(made)
    for option in options:
        if option not in known:
            raise BadInput(f"the transport {name} has no option {option!r}{nearest(option, known)}")
    transport: Transport = made(node, epoch, wake, on_death, **options)
    return transport


def allocate(name: str, nbytes: int) -> Region | None:
    """Memory that this transport can share with other processes; None where any memory will do."""
    made = getattr(import_module(f"kvpoll.runtime.transports.{_HOMES[name][0]}"), "allocate", None)
    region: Region | None = made(nbytes) if made is not None else None
    return region


def _options(made: type) -> list[str]:
    """Names of the options that a transport's class takes, after the four that all have."""
    code = made.__init__.__code__  # type: ignore[misc]
    return list(code.co_varnames[5 : code.co_argcount + code.co_kwonlyargcount])
