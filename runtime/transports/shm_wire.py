"""What an shm writer and an owner say to each other, over a Unix socket that keeps message borders (SOCK_SEQPACKET).

The writer sends one hello; the owner answers with a status and, when it welcomes, the file descriptors of its control
page and of its shareable regions. After that the connection is silent: its end is the message. ``BYE`` before the end
says that the writer has unmapped the pool and lives on (it has turned to a newer life of the owner).
"""

from __future__ import annotations

import socket
import struct
from typing import Annotated, Final, NamedTuple

import msgspec

from kvpoll.runtime.transports.descriptor import Body, Sizes

VERSION: Final = 1
BYE: Final = b"bye"
MESSAGE_MAX: Final = 1024
NODE_BYTES_MAX: Final = 255
SECRET_BYTES: Final = 32
FILES_MAX: Final = 240
"""Regions and control page together: a message carries at most 253 descriptors (SCM_MAX_FD)."""

WELCOME: Final = 0
REFUSALS: Final = {
    1: "the hello was not understood: run the same kvpoll on both sides",
    2: "the secret is wrong: fetch the owner's descriptor again",
    3: "the process belongs to another user",
    4: "a newer life of this node has connected already",
    5: "the owner is closing",
}

PATH_BYTES_MAX: Final = 107


class Descriptor(Body):
    """path: of the owner's socket. sizes: bytes of each region; shared: which of them can be mapped."""

    path: str
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    sizes: Sizes
    shared: list[bool]

    def __post_init__(self) -> None:
        """Raises ValueError for what no owner says; msgspec makes a ValidationError of it."""
        if len(self.shared) != len(self.sizes):
            raise ValueError("shared and sizes differ in length")
        if len(self.path.encode()) > PATH_BYTES_MAX:
            raise ValueError(f"the path has more than {PATH_BYTES_MAX} bytes")


_MAGIC: Final = b"KVSH"
_HELLO: Final = struct.Struct(f"<4sHHq{SECRET_BYTES}s")
_ANSWER: Final = struct.Struct("<4sHHH")


class Hello(NamedTuple):
    """Who wants to write: node and epoch of the writer, and the secret of the owner's descriptor."""

    node: str
    epoch: int
    secret: bytes


def pack_hello(hello: Hello) -> bytes:
    """One message. The node's name has at most ``NODE_BYTES_MAX`` bytes in UTF-8."""
    node = hello.node.encode()
    return _HELLO.pack(_MAGIC, VERSION, len(node), hello.epoch, hello.secret) + node


def unpack_hello(message: bytes) -> Hello | None:
    """The hello, or None for anything else."""
    if len(message) < _HELLO.size:
        return None
    magic, version, length, epoch, secret = _HELLO.unpack_from(message)
    node = message[_HELLO.size :]
    if magic != _MAGIC or version != VERSION or len(node) != length:
        return None
    try:
        return Hello(node.decode(), epoch, secret)
    except UnicodeDecodeError:
        return None


def pack_answer(status: int, files: int) -> bytes:
    """The answer's first bytes; ``files`` descriptors go with them."""
    return _ANSWER.pack(_MAGIC, VERSION, status, files)


def unpack_answer(message: bytes) -> tuple[int, int] | None:
    """(status, number of descriptors), or None for anything else."""
    if len(message) != _ANSWER.size:
        return None
    magic, version, status, files = _ANSWER.unpack(message)
    return (status, files) if magic == _MAGIC and version == VERSION else None


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end, as the kernel saw it at connect."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[1])
