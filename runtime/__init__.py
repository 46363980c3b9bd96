"""The same machine over real processes, sockets and memory.

``bootstrap`` is the rendezvous server and its client, ``control`` carries the messages between ranks, ``transports``
move the bytes, ``pools`` hold them. Nothing here decides anything of the protocol: what to do comes from the step
functions of ``statemachine``, which the simulator and the explorer call too.

What a serving engine embeds is below, imported when it is first asked for::

    from kvpoll.runtime import DecodeEndpoint, KVPoll, Layout, PrefillEndpoint, Settings
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpoll.runtime.bootstrap import BootstrapServer
    from kvpoll.runtime.endpoint import DecodeEndpoint, PrefillEndpoint
    from kvpoll.runtime.pools.aux_row import AuxRow
    from kvpoll.runtime.pools.layout import Layout
    from kvpoll.runtime.pools.pool import KVPool
    from kvpoll.runtime.settings import Settings
    from kvpoll.runtime.transfer import DecodeTransfer, KVPoll, PrefillTransfer, TransferError
    from kvpoll.statemachine.mapping import Sizes

__all__ = [
    "AuxRow",
    "BootstrapServer",
    "DecodeEndpoint",
    "DecodeTransfer",
    "KVPoll",
    "KVPool",
    "Layout",
    "PrefillEndpoint",
    "PrefillTransfer",
    "Settings",
    "Sizes",
    "TransferError",
]

_HOMES = {
    "AuxRow": "runtime.pools.aux_row",
    "BootstrapServer": "runtime.bootstrap",
    **dict.fromkeys(("DecodeEndpoint", "PrefillEndpoint"), "runtime.endpoint"),
    "KVPool": "runtime.pools.pool",
    "Layout": "runtime.pools.layout",
    "Settings": "runtime.settings",
    "Sizes": "statemachine.mapping",
    **dict.fromkeys(("DecodeTransfer", "KVPoll", "PrefillTransfer", "TransferError"), "runtime.transfer"),
}

_EXTRA = ("aiohttp", "msgspec", "prometheus_client", "requests", "urllib3", "zmq")
"""What ``pip install 'kvpoll[runtime]'`` brings."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"kvpoll.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        lacking = f"kvpoll.runtime.{name} needs {error.name}, which is not installed: pip install 'kvpoll[runtime]'"
        raise ImportError(lacking, name=error.name) from None
