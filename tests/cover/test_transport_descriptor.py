"""Descriptors: a foreign one is named for what it is, a damaged one is refused in one line."""

from __future__ import annotations

import pytest

from kvpoll.runtime.transports import descriptor
from kvpoll.runtime.transports.interface import TransportError


def test_a_descriptor_is_read_back() -> None:
    data = descriptor.encode("shm", 1, {"node": "decode0", "epoch": 3, "sizes": [4096]})
    fields = descriptor.decode("shm", 1, data)
    descriptor.require_peer("shm", fields, "decode0", 3)
    assert descriptor.sizes_of("shm", fields) == [4096] and b"\n" not in data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (descriptor.encode("tcp", 1, {}), "shm: the peer's descriptor is of the transport 'tcp'"),
        (descriptor.encode("shm", 9, {}), "the peer speaks version 9 of shm"),
        (b"garbage", "no descriptor of the transport shm"),
        (b"", "no descriptor of the transport shm"),
        (b"kvpoll-transport/1 {", "damaged"),
        (b"kvpoll-transport/1 []", "damaged"),
        (b"kvpoll-transport/1 " + b"[" * 100_000, "damaged"),
        (b"kvpoll-transport/1 {}" + b" " * (1 << 21), "no descriptor"),
    ],
)
def test_what_is_no_descriptor_is_refused_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(TransportError, match=words) as error:
        descriptor.decode("shm", 1, data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_another_life_is_named() -> None:
    with pytest.raises(TransportError, match="of decode0 epoch 3, not of decode0 epoch 4"):
        descriptor.require_peer("shm", {"node": "decode0", "epoch": 3}, "decode0", 4)


@pytest.mark.parametrize("sizes", [None, [], [0], [-1], ["x"], [True], [1 << 62], {"0": 1}])
def test_sizes_must_be_sizes(sizes: object) -> None:
    with pytest.raises(TransportError, match="sizes"):
        descriptor.sizes_of("shm", {"sizes": sizes})
