"""The aux row of a request: what decode must know besides the KV itself, in one row of the aux buffer.

    offset  bytes  field
    0       4      "KVAX"
    4       4      version, 1
    8       8      room
    16      8      attempt
    24      8      first token id (signed)
    32      8      prompt tokens
    40      8      of them, tokens whose KV decode had already (its cached prefix)
    48      8      pages that prefill wrote
    56      4      CRC-32 of the other 56 bytes before it
    60      4      zero

All little-endian, 64 bytes, the least that RDMA likes (SGLang's MetadataBuffers says so); a row may be longer. The row
names its request, so that decode can tell a row of its own from one that an older request left or overwrote
(SGLang stores its room number in the metadata for the same reason), and the checksum tells a torn row from a whole one.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

from kvpoll.spec.source import BadInput

ROW_BYTES: Final = 64
_MAGIC: Final = b"KVAX"
_VERSION: Final = 1
_FIELDS: Final = struct.Struct("<4sIQQqQQQ")
_CHECKSUM: Final = struct.Struct("<II")


class AuxRow(NamedTuple):
    """What prefill tells about one request. first_token: the token that prefill sampled."""

    room: int
    attempt: int
    first_token: int
    prompt_tokens: int
    cached_tokens: int
    pages: int

    @property
    def pair(self) -> tuple[int, int]:
        """Whose row it is, as the invariants want it (``Committed.row_pair``)."""
        return self.room, self.attempt


def pack(row: AuxRow) -> bytes:
    """The row as 64 bytes. Raises BadInput when a number does not fit into its field."""
    try:
        fields = _FIELDS.pack(_MAGIC, _VERSION, *row)
    except struct.error:
        raise BadInput(f"aux row: a field is negative or above 64 bits in {row}") from None
    return fields + _CHECKSUM.pack(zlib.crc32(fields), 0)


def unpack(data: bytes | bytearray | memoryview) -> AuxRow | None:
    """What ``pack`` made, or None: nobody wrote this row, or it is torn, or it is of another version.

    Bytes beyond the 64th are ignored.
    """
    head = bytes(data[:ROW_BYTES])
    if len(head) < ROW_BYTES:
        return None
    magic, version, *numbers = _FIELDS.unpack_from(head)
    checksum, zero = _CHECKSUM.unpack_from(head, _FIELDS.size)
    sound = magic == _MAGIC and version == _VERSION and zero == 0 and checksum == zlib.crc32(head[: _FIELDS.size])
    return AuxRow(*numbers) if sound else None
