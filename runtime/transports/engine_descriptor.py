"""What an owner's ``register`` returns, as bytes: the transport's name and version in plain text, then MessagePack.

The name stands in front so that the wrong transport's descriptor is refused by name, not by a decoding error.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from kvpoll.runtime.transports.interface import TransportError

MARK = b"kvpoll-transport "
VERSION = 1
DESCRIPTOR_BYTES_MAX = 1 << 20

Body = TypeVar("Body", bound=msgspec.Struct)


def seal(name: str, body: msgspec.Struct) -> bytes:
    """A descriptor of the transport ``name``."""
    return MARK + f"{name} {VERSION}\n".encode() + msgspec.msgpack.encode(body)


def unseal(name: str, descriptor: bytes, form: type[Body]) -> Body:
    """The body of a descriptor of the transport ``name``. Raises TransportError."""
    if len(descriptor) > DESCRIPTOR_BYTES_MAX:
        raise TransportError(f"a descriptor of {len(descriptor)} bytes is over {DESCRIPTOR_BYTES_MAX}")
    head, _, body = descriptor.partition(b"\n")
    words = head.decode("ascii", "replace").split() if head.startswith(MARK) else []
    if len(words) != 3:
        raise TransportError(f"not a descriptor of the transport {name}: {bytes(descriptor[:24])!r}...")
    if words[1] != name:
        raise TransportError(f"a descriptor of {words[1]} was given to {name}; use one transport on both sides")
    if words[2] != str(VERSION):
        raise TransportError(f"a {name} descriptor of version {words[2]}, not {VERSION}; run one kvpoll on both sides")
    try:
        return msgspec.msgpack.decode(body, type=form)
    except msgspec.MsgspecError as error:
        raise TransportError(f"a damaged descriptor of {name}: {error}") from None
