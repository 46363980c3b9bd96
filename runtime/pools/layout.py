"""How one rank's KV cache lies in memory: pages of planes, then aux rows, in one space of byte offsets.

A *plane* is one buffer of one layer: its keys, its values, or for MLA its latent vectors. A plane holds ``pages``
pages end to end, and a page holds ``page_tokens`` tokens of the heads that this TP rank keeps, as ``[tokens, heads,
head_dim]`` (order "NHD") or ``[heads, tokens, head_dim]`` ("HND", where the slice of a head is one piece). Planes lie
in order of layers, keys before values; the aux rows follow. Nothing is padded, so the offset of everything is a
product, and a pool made of separate tensors has the same offsets as one made of a single block.

A Layout travels in the descriptor that decode publishes, so it is plain data, and what arrives is checked.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import msgspec

from kvpoll.spec.source import BadInput, nearest

ELEMENT_BYTES: Final = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of one element; the names are those of torch's dtypes."""

LAYERS_MAX: Final = 4096
COUNT_MAX: Final = 2**31 - 1  # pages travel as int32 in every engine
BYTES_MAX: Final = 2**60
MAGIC: Final = b"KVL"
VERSION: Final = 1


class Plane(NamedTuple):
    """One buffer of one layer. layer: global layer id. part: "k", "v", or "latent"."""

    layer: int
    part: str


@dataclass(frozen=True)
class Layout:
    """The KV memory of one rank.

    layers: global ids of the layers that this PP stage holds, ascending. pages: pages of each plane. page_tokens:
    tokens of a page. heads: KV heads of the model over all TP ranks; 1 for "mla". head_dim: elements of one head of
    one token; for "mla" the latent vector with its rope part. dtype: a name of ELEMENT_BYTES. tp_rank, tp_size: which
    slice of the heads this rank keeps; when tp_size exceeds heads, neighbouring ranks keep copies of one head. rows,
    row_bytes: aux rows, one per request.

    Raises BadInput when the numbers contradict each other.
    """

    layers: tuple[int, ...]
    pages: int
    page_tokens: int
    heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kind: Literal["mha", "mla"] = "mha"
    order: Literal["NHD", "HND"] = "NHD"
    tp_rank: int = 0
    tp_size: int = 1
    rows: int = 0
    row_bytes: int = 64

    def __post_init__(self) -> None:
        problem = _contradiction(self)
        if problem:
            raise BadInput(f"KV layout: {problem}")

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        """Planes of one layer."""
        return ("latent",) if self.kind == "mla" else ("k", "v")

    @functools.cached_property
    def planes(self) -> tuple[Plane, ...]:
        """All planes, in the order in which they lie."""
        return tuple(Plane(layer, part) for layer in self.layers for part in self.parts)

    @functools.cached_property
    def plane_index(self) -> dict[Plane, int]:
        """Where each plane stands in ``planes``."""
        return {plane: index for index, plane in enumerate(self.planes)}

    @functools.cached_property
    def local_heads(self) -> int:
        """Heads that this rank keeps."""
        return 1 if self.kind == "mla" else max(1, self.heads // self.tp_size)

    @property
    def first_head(self) -> int:
        """Global number of the first of them."""
        return self.first_head_of(self.tp_rank)

    def first_head_of(self, tp_rank: int) -> int:
        """Global number of the first head that another TP rank of this engine keeps."""
        return 0 if self.kind == "mla" else tp_rank * self.heads // self.tp_size

    @functools.cached_property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @functools.cached_property
    def head_bytes(self) -> int:
        """One head of one token of one plane."""
        return self.head_dim * self.element_bytes

    @functools.cached_property
    def page_bytes(self) -> int:
        """One page of one plane."""
        return self.page_tokens * self.local_heads * self.head_bytes

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """Elements of one page of one plane: tokens, heads, head_dim, the first two in the layout's order."""
        tokens, heads = self.page_tokens, self.local_heads
        return (heads, tokens, self.head_dim) if self.order == "HND" else (tokens, heads, self.head_dim)

    @functools.cached_property
    def plane_bytes(self) -> int:
        return self.pages * self.page_bytes

    @functools.cached_property
    def layer_bytes(self) -> int:
        """All planes of one layer."""
        return self.plane_bytes * len(self.parts)

    @functools.cached_property
    def kv_bytes(self) -> int:
        """All planes; the offset of the first aux row."""
        return self.layer_bytes * len(self.layers)

    @functools.cached_property
    def aux_bytes(self) -> int:
        return self.rows * self.row_bytes

    @functools.cached_property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.aux_bytes

    def page_offset(self, layer: int, part: str, page: int) -> int:
        """Where a page of a plane begins. Raises BadInput when this rank does not have it."""
        index = self.plane_index.get(Plane(layer, part))
        if index is None:
            raise BadInput(f"KV layout: no plane {part!r} of layer {layer}; this rank holds {_span(self.layers)}")
        if not 0 <= page < self.pages:
            raise BadInput(f"KV layout: page {page} is outside the pool of {self.pages} pages")
        return index * self.plane_bytes + page * self.page_bytes

    def row_offset(self, row: int) -> int:
        """Where an aux row begins. Raises BadInput when there is no such row."""
        if not 0 <= row < self.rows:
            raise BadInput(f"KV layout: aux row {row} is outside the pool of {self.rows} rows")
        return self.kv_bytes + row * self.row_bytes

    def to_bytes(self) -> bytes:
        """The layout as bytes for a peer, with a version."""
        return MAGIC + bytes([VERSION]) + msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """What ``to_bytes`` encoded. Raises BadInput for anything else, whatever it is."""
        if data[:3] != MAGIC or len(data) < 5:
            raise BadInput("KV layout of a peer: not a kvpoll layout; is the peer a kvpoll rank?")
        if data[3] != VERSION:
            raise BadInput(f"KV layout of a peer: version {data[3]}, not {VERSION}; run the same kvpoll on both sides")
        try:
            return _decode(data[4:])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
            raise BadInput(f"KV layout of a peer: {error}") from None


_decode: Final[Callable[[bytes], Layout]] = msgspec.msgpack.Decoder(Layout, strict=True).decode


def _contradiction(layout: Layout) -> str | None:
    """What is wrong with the numbers, or None."""
    counts: dict[str, Any] = {
        name: getattr(layout, name) for name in ("pages", "page_tokens", "heads", "head_dim", "tp_size", "row_bytes")
    }
    for name, value in counts.items():
        if not 0 < value <= COUNT_MAX:
            return f"{name} is {value}; it must be from 1 to {COUNT_MAX}"
    layers = layout.layers
    if not 0 < len(layers) <= LAYERS_MAX:
        return f"{len(layers)} layers; a rank holds from 1 to {LAYERS_MAX}"
    if layers[0] < 0 or layers[-1] > COUNT_MAX or any(a >= b for a, b in itertools.pairwise(layers)):
        return "layer ids must be ascending, from 0"
    if layout.dtype not in ELEMENT_BYTES:
        return f"unknown dtype {layout.dtype!r}{nearest(layout.dtype, ELEMENT_BYTES)}"
    if layout.kind not in ("mha", "mla") or layout.order not in ("NHD", "HND"):
        return f'kind {layout.kind!r}, order {layout.order!r}; valid are "mha" or "mla", "NHD" or "HND"'
    if not 0 <= layout.tp_rank < layout.tp_size or not 0 <= layout.rows <= COUNT_MAX:
        return f"tp_rank {layout.tp_rank} of {layout.tp_size}, {layout.rows} rows: out of range"
    if layout.kind == "mla" and layout.heads != 1:
        return f"MLA has one latent head, not {layout.heads}; give heads = 1"
    few, many = sorted((layout.heads, layout.tp_size))
    if layout.kind == "mha" and many % few:
        return f"{layout.heads} KV heads cannot be laid over TP {layout.tp_size}; one must divide the other"
    return f"{layout.total_bytes} bytes; that is no memory" if layout.total_bytes > BYTES_MAX else None


def _span(layers: tuple[int, ...]) -> str:
    """Layer ids for people: "layers 4-7", "layers 0-1, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"layer {text}" if len(layers) == 1 else f"layers {text}"


_MUST_AGREE: Final = (
    ("kind", "attention kind", "serve the same model on both sides"),
    ("page_tokens", "page size (tokens)", "start both with the same --page-size"),
    ("dtype", "KV dtype", "start both with the same --kv-cache-dtype"),
    ("order", "page order", "use an attention backend of the same KV layout on both sides"),
    ("heads", "number of KV heads", "serve the same model on both sides"),
    ("head_dim", "head dimension", "serve the same model on both sides"),
    ("row_bytes", "aux row size (bytes)", "run the same version with the same options on both sides"),
)


def mismatch(prefill: Layout, decode: Layout) -> str | None:
    """Why pages of this prefill rank cannot be copied to this decode rank: one line with the mend, or None.

    Dtypes are compared by name, as SGLang compares them: of equal size is not enough. (PROTOCOL 6, sanity checks.)
    """
    for name, what, mend in _MUST_AGREE:
        here, there = getattr(prefill, name), getattr(decode, name)
        if here != there:
            return f"{what} differs: prefill has {here}, decode has {there}; {mend}"
    few, many = sorted((prefill.tp_size, decode.tp_size))
    if many % few:
        return f"TP size differs: prefill has {prefill.tp_size}, decode has {decode.tp_size}; one must divide the other"
    lacking = tuple(sorted(set(prefill.layers) - set(decode.layers)))
    if lacking:
        return (
            f"layers differ: decode lacks {_span(lacking)} of this prefill rank; "
            f"give decode PP 1 or the PP size and layer split of prefill"
        )
    return None
