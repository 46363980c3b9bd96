"""Descriptors: the bytes by which a process tells its peers how to reach its memory.

One line of text, ``kvpoll-transport/1 {json}``, so that a descriptor can be read in a log and one of another
transport is recognised for what it is. Descriptors travel over the control plane. They hold the secret that admits a
writer, so they are as confidential as the memory itself.
"""

from __future__ import annotations

import json
from typing import Any, Final

from kvpoll.runtime.transports.interface import TransportError

_MARK: Final = b"kvpoll-transport/1 "
_BYTES_MAX: Final = 1 << 20


def encode(transport: str, version: int, fields: dict[str, Any]) -> bytes:
    """Descriptor of ``transport``; ``version`` is that of its own wire format, ``fields`` what JSON can hold."""
    return _MARK + json.dumps({"transport": transport, "version": version, **fields}, sort_keys=True).encode()


def decode(transport: str, version: int, descriptor: bytes) -> dict[str, Any]:
    """The fields of a descriptor of ``transport``. Raises TransportError for any other bytes, naming what they are."""
    if len(descriptor) > _BYTES_MAX or not descriptor.startswith(_MARK):
        raise TransportError(
            f"{transport}: this is no descriptor of the transport {transport} (it starts {descriptor[:24]!r}): "
            f"pass what the peer's register() returned, and use the same transport on both sides"
        )
    try:
        fields = json.loads(descriptor[len(_MARK) :])
        named, found = fields["transport"], fields["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TransportError(f"{transport}: the descriptor is damaged: fetch it from the peer again") from None
    if named != transport:
        raise TransportError(
            f"{transport}: the peer's descriptor is of the transport {named!r}: use the same transport on both sides"
        )
    if found != version:
        raise TransportError(
            f"{transport}: the peer speaks version {found!r} of {transport}, this process version {version}: "
            f"run the same kvpoll on both sides"
        )
    assert isinstance(fields, dict)
    return fields


def require_peer(transport: str, fields: dict[str, Any], node: str, epoch: int) -> None:
    """The descriptor is of this life of this node; raises TransportError naming both otherwise."""
    found = (fields.get("node"), fields.get("epoch"))
    if found != (node, epoch):
        raise TransportError(
            f"{transport}: the descriptor is of {found[0]} epoch {found[1]}, not of {node} epoch {epoch}: "
            f"fetch the descriptor of the peer's present life"
        )


def sizes_of(transport: str, fields: dict[str, Any], key: str = "sizes") -> list[int]:
    """A list of positive byte counts from a descriptor; raises TransportError when it is anything else."""
    sizes = fields.get(key)
    if not isinstance(sizes, list) or not sizes or not all(type(n) is int and 0 < n < 1 << 62 for n in sizes):
        raise TransportError(f"{transport}: the descriptor is damaged ({key}): fetch it from the peer again")
    return sizes
