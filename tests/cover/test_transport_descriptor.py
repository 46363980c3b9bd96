"""Descriptors: a foreign one is named for what it is, a damaged one is refused in one line."""

from __future__ import annotations

import pytest

from kvpoll.runtime.transports import descriptor
from kvpoll.runtime.transports.descriptor import Body, Sizes
from kvpoll.runtime.transports.interface import TransportError
from kvpoll.runtime.transports.shm_wire import Descriptor as ShmDescriptor
from kvpoll.runtime.transports.tcp_wire import Descriptor as TcpDescriptor


class Memory(Body):
    """What the transport of these tests says of itself."""

    secret: bytes
    sizes: Sizes


GOOD = Memory("decode0", 3, bytes(range(8)), [4096])


def read(data: bytes, form: type[Body] = Memory) -> Body:
    return descriptor.decode("shm", 1, data, form, "decode0", 3)


def test_a_descriptor_is_one_line_of_text_and_is_read_back() -> None:
    data = descriptor.encode("shm", 1, GOOD)
    assert read(data) == GOOD
    assert data == (
        b'kvpoll-transport/1 {"epoch": 3, "node": "decode0", "secret": "AAECAwQFBgc=", "sizes": [4096], '
        b'"transport": "shm", "version": 1}'
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (descriptor.encode("tcp", 1, GOOD), "shm: the peer's descriptor is of the transport 'tcp'"),
        (descriptor.encode("shm", 9, GOOD), "the peer speaks version 9 of shm"),
        (b"garbage", "no descriptor of the transport shm"),
        (b"", "no descriptor of the transport shm"),
        (b"kvpoll-transport/1 {", "damaged"),
        (b"kvpoll-transport/1 []", "damaged"),
        (b"kvpoll-transport/1 {}", "damaged"),
        (b"kvpoll-transport/1 " + b"[" * 100_000, "damaged"),
        (b"kvpoll-transport/1 {}" + b" " * (1 << 21), "no descriptor"),
        (descriptor.encode("shm", 1, GOOD).replace(b'"AAECAwQFBgc="', b'"no base 64"'), "damaged"),
    ],
)
def test_what_is_no_descriptor_is_refused_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(TransportError, match=words) as error:
        read(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_another_life_is_named() -> None:
    with pytest.raises(TransportError, match="of decode0 epoch 3, not of decode0 epoch 4"):
        descriptor.decode("shm", 1, descriptor.encode("shm", 1, GOOD), Memory, "decode0", 4)


@pytest.mark.parametrize("sizes", ["null", "[]", "[0]", "[-1]", '["x"]', "[true]", str([1 << 62]), '{"0": 1}'])
def test_sizes_must_be_sizes(sizes: str) -> None:
    data = descriptor.encode("shm", 1, GOOD).replace(b"[4096]", sizes.encode())
    with pytest.raises(TransportError, match="sizes"):
        read(data)


SHM = ShmDescriptor("decode0", 3, "/run/pool", b"s" * 32, [1, 2], [True, False])
TCP = TcpDescriptor("decode0", 3, "127.0.0.1", 4000, b"s" * 32, [1])


@pytest.mark.parametrize(
    ("good", "field", "bad"),
    [
        (SHM, b'"/run/pool"', b'"' + b"p" * 108 + b'"'),
        (SHM, b'"/run/pool"', b"5"),
        (SHM, b"[true, false]", b"[true]"),
        (SHM, b"[true, false]", b"[1, 0]"),
        (SHM, b"c3Nz", b""),
        (TCP, b"c3Nz", b""),
        (TCP, b"4000", b"0"),
        (TCP, b"4000", b"65536"),
        (TCP, b"4000", b"true"),
        (TCP, b'"127.0.0.1"', b"null"),
    ],
)
def test_no_field_of_shm_and_tcp_is_taken_on_trust(good: Body, field: bytes, bad: bytes) -> None:
    data = descriptor.encode("shm", 1, good)
    assert field in data and read(data, type(good)) == good
    with pytest.raises(TransportError, match="shm: the descriptor is damaged"):
        read(data.replace(field, bad, 1), type(good))
