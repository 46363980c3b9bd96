"""Descriptors of the transports over engines: a typed body in the common form of ``descriptor.py``."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from kvpoll.runtime.transports.descriptor import decode, encode, require_peer
from kvpoll.runtime.transports.interface import TransportError

VERSION: Final = 1

Body = TypeVar("Body", bound=msgspec.Struct)


def seal(name: str, body: msgspec.Struct) -> bytes:
    """A descriptor of the transport ``name``. ``body`` has at least node and epoch; bytes become base64."""
    return encode(name, VERSION, msgspec.to_builtins(body))


def unseal(name: str, descriptor: bytes, form: type[Body], node: str, epoch: int) -> Body:
    """The body of a descriptor of the transport ``name`` and of this life of this node. Raises TransportError."""
    fields = decode(name, VERSION, descriptor)
    require_peer(name, fields, node, epoch)
    try:
        return msgspec.convert(fields, form)
    except msgspec.ValidationError as error:
        raise TransportError(f"{name}: the descriptor is damaged ({error}): fetch it from the peer again") from None
