"""Descriptors: the bytes by which a process tells its peers how to reach its memory.

One line of text, ``kvpoll-transport/1 {json}``, so that a descriptor can be read in a log and one of another
transport is recognised for what it is. Each transport says in a typed ``Body`` what its descriptors hold; whatever does
not fit is refused before a byte of it is used. Descriptors travel over the control plane. They hold the secret that
admits a writer, so they are as confidential as the memory itself.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, TypeVar

import msgspec

from kvpoll.runtime.transports.interface import TransportError

_MARK: Final = b"kvpoll-transport/1 "
_BYTES_MAX: Final = 1 << 20

Size = Annotated[int, msgspec.Meta(gt=0, lt=1 << 62)]
"""Bytes of one region."""

Sizes = Annotated[list[Size], msgspec.Meta(min_length=1)]
"""Bytes of each region, in the order in which they were registered."""

Places = list[tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)], Size]]
"""(address, bytes) of each region: where a writer's engine finds it."""


class Body(msgspec.Struct):
    """What every descriptor says: whose memory it is. Fields of bytes travel as base64."""

    node: str
    epoch: int


Form = TypeVar("Form", bound=Body)


def encode(transport: str, version: int, body: Body) -> bytes:
    """Descriptor of ``transport``; ``version`` is that of its own wire format."""
    fields = {"transport": transport, "version": version, **msgspec.to_builtins(body)}
    return _MARK + json.dumps(fields, sort_keys=True).encode()


def decode(transport: str, version: int, descriptor: bytes, form: type[Form], node: str, epoch: int) -> Form:
    """The body of a descriptor of ``transport`` and of this life of this node.

    Raises TransportError for any other bytes, naming what they are, and for another life, naming both.
    """
    if len(descriptor) > _BYTES_MAX or not descriptor.startswith(_MARK):
        raise TransportError(
            f"{transport}: this is no descriptor of the transport {transport} (it starts {descriptor[:24]!r}): "
            f"pass what the peer's register() returned, and use the same transport on both sides"
        )
    fields = _fields(transport, descriptor)
    if fields["transport"] != transport:
        raise TransportError(
            f"{transport}: the peer's descriptor is of the transport {fields['transport']!r}: "
            f"use the same transport on both sides"
        )
    if fields["version"] != version:
        raise TransportError(
            f"{transport}: the peer speaks version {fields['version']!r} of {transport}, this process version "
            f"{version}: run the same kvpoll on both sides"
        )
    try:
        body = msgspec.convert(fields, form)
    except msgspec.ValidationError as error:
        raise TransportError(
            f"{transport}: the descriptor is damaged ({error}): fetch it from the peer again"
        ) from None
    if (body.node, body.epoch) != (node, epoch):
        raise TransportError(
            f"{transport}: the descriptor is of {body.node} epoch {body.epoch}, not of {node} epoch {epoch}: "
            f"fetch the descriptor of the peer's present life"
        )
    return body


def _fields(transport: str, descriptor: bytes) -> dict[str, Any]:
    """What follows the mark, if it is an object that names a transport and a version."""
    try:
        fields = json.loads(descriptor[len(_MARK) :])
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not {"transport", "version"} <= fields.keys():
        raise TransportError(f"{transport}: the descriptor is damaged: fetch it from the peer again")
    return fields
