"""Frames of tcp, little-endian, version 1. Every frame is checked wholly before a byte of it is placed.

A writer opens a lane (one connection) with a hello and gets an answer. Then it sends frames: ``DATA`` with up to
``RANGES_MAX`` ranges and their bytes, the last of a write marked ``LAST``, or ``STOP``, which ends a write early. The
owner answers each write exactly once, when it has placed (or thrown away) the last byte of it.
"""

from __future__ import annotations

import socket
import struct
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np

from kvpoll.runtime.transports.descriptor import Body, Sizes
from kvpoll.runtime.transports.offsets import Integers
from kvpoll.spec.vocabulary import Incarnation

VERSION: Final = 1
COOKIE_BYTES: Final = 32
NODE_BYTES_MAX: Final = 255
RANGES_MAX: Final = 1024
PAYLOAD_MAX: Final = 16 << 20

DATA, STOP = 1, 2
LAST: Final = 1

WELCOME, PLACED, REVOKED, STOPPED = 0, 1, 2, 3
REFUSALS: Final = {
    16: "the hello was not understood: run the same kvpoll on both sides",
    17: "the cookie is wrong: fetch the owner's descriptor again",
    18: "the owner is in another life: fetch its descriptor again",
    19: "a newer life of this node has connected already",
    20: "the owner is closing, or has too many connections",
}

_HELLO: Final = struct.Struct(f"<4sHHqqHH{COOKIE_BYTES}s")
_ANSWER: Final = struct.Struct("<4sIQ")
_HEADER: Final = struct.Struct("<4sHHqQqqqIIQ")
HELLO_BYTES: Final = _HELLO.size
ANSWER_BYTES: Final = _ANSWER.size
HEADER_BYTES: Final = _HEADER.size
RANGE_BYTES: Final = 16


class Descriptor(Body):
    """host, port: where the owner listens. cookie: what admits a writer. sizes: bytes of each region."""

    host: str
    port: Annotated[int, msgspec.Meta(gt=0, lt=1 << 16)]
    cookie: Annotated[bytes, msgspec.Meta(min_length=COOKIE_BYTES, max_length=COOKIE_BYTES)]
    sizes: Sizes

    def __str__(self) -> str:
        return f"{self.node} epoch {self.epoch} at {self.host}:{self.port}"


class Malformed(ValueError):
    """Bytes that no writer of this version sends."""


class Hello(NamedTuple):
    """Who opens a lane: the writer's node, epoch and lane number, and the owner's epoch and cookie as it knows them."""

    node: str
    epoch: int
    lane: int
    owner_epoch: int
    cookie: bytes


class Header(NamedTuple):
    """The fixed part of a frame. payload: bytes that follow the table of that many ``ranges``."""

    kind: int
    flags: int
    owner_epoch: int
    write: int
    incarnation: Incarnation
    ranges: int
    payload: int


def pack_hello(hello: Hello) -> bytes:
    """HELLO_BYTES and the node's name."""
    node = hello.node.encode()
    return _HELLO.pack(
        b"KVTH", VERSION, len(node), hello.epoch, hello.owner_epoch, hello.lane, 0, hello.cookie
    ) + node  # fmt: skip


def node_bytes_of(hello: bytes) -> int:
    """How many bytes of node name follow these HELLO_BYTES. Raises Malformed."""
    magic, version, length, *_ = _HELLO.unpack(hello)
    if magic != b"KVTH" or version != VERSION or not 0 < length <= NODE_BYTES_MAX:
        raise Malformed("not a hello of this version")
    return int(length)


def unpack_hello(hello: bytes, node: bytes) -> Hello:
    """The hello of its two parts. Raises Malformed."""
    _, _, _, epoch, owner_epoch, lane, _, cookie = _HELLO.unpack(hello)
    try:
        return Hello(node.decode(), epoch, lane, owner_epoch, cookie)
    except UnicodeDecodeError:
        raise Malformed("the node's name is not UTF-8") from None


def pack_answer(status: int, write: int) -> bytes:
    """ANSWER_BYTES."""
    return _ANSWER.pack(b"KVTA", status, write)


def unpack_answer(answer: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(status, write). Raises Malformed."""
    magic, status, write = _ANSWER.unpack(answer)
    if magic != b"KVTA":
        raise Malformed("not an answer")
    return status, write


def pack_frame(header: Header, target: Integers, nbytes: Integers) -> bytes:
    """Header and table of ranges; the payload follows it on the wire."""
    table = np.empty((len(target), 2), dtype="<i8")
    table[:, 0], table[:, 1] = target, nbytes
    return _HEADER.pack(
        b"KVTF", header.kind, header.flags, header.owner_epoch, header.write, *header.incarnation,
        header.ranges, 0, header.payload,
    ) + table.tobytes()  # fmt: skip


def unpack_header(data: bytes | bytearray | memoryview) -> Header:
    """The header of HEADER_BYTES, within the limits. Raises Malformed."""
    magic, kind, flags, owner_epoch, write, room, attempt, epoch, count, _, payload = _HEADER.unpack(data)
    is_stop = kind == STOP and count == payload == 0
    is_data = kind == DATA and 0 < count <= RANGES_MAX and payload <= PAYLOAD_MAX
    if magic != b"KVTF" or not (is_stop or is_data):
        raise Malformed("not a frame of this version, or beyond its limits")
    return Header(kind, flags, owner_epoch, write, Incarnation(room, attempt, epoch), count, payload)


def unpack_ranges(header: Header, table: bytes | bytearray | memoryview) -> tuple[Integers, Integers]:
    """(target offsets, lengths), int64[ranges] each. Raises Malformed when the lengths do not add up to the payload."""
    ranges = np.frombuffer(table, dtype="<i8").reshape(header.ranges, 2).astype(np.int64)
    target, nbytes = ranges[:, 0], ranges[:, 1]
    if not ((nbytes > 0) & (nbytes <= PAYLOAD_MAX)).all() or int(nbytes.sum()) != header.payload:
        raise Malformed("the ranges do not add up to the payload")
    return target, nbytes


def views_per_call(ranges: int, payload: int) -> int:
    """How many ranges to hand to one sendmsg or recvmsg: about 1 MiB, which measured best, and within IOV_MAX."""
    return max(16, min(512, ranges * (1 << 20) // max(1, payload)))


def tune(connection: socket.socket, buffer_bytes: int | None, stall_s: float) -> None:
    """Options of both ends: no delay of small frames, buffers, and the kernel's own watch over a silent peer."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(stall_s)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(stall_s / 4)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
    if buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
