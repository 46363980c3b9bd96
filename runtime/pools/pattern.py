"""Contents that prove where they come from: what tests and real runs fill KV pages with, and how they are read back.

Every 8-byte word of a page is one word of a 64-byte *record*, exclusive-or a number drawn from the word's place. The
record says whose page it is: room, attempt, chunk, part (which page of the prompt) and the source rank's name. The
place is global: layer, key or value, head of the model, token of the page, word of the head. So the reader, who knows
where it looks, gets the record back from any eight neighbouring words, and then knows every other byte of the share:

* a flipped byte, a missing layer, a page that is half another's: words that do not agree with the record;
* another head, layer or token than belongs here: the record does not come out, its checksum is wrong;
* a stale page, a page of another request, swapped pages, the right slice of the wrong rank: a sound record that
  names another room, attempt, part or source, which is for the reader's caller to judge (invariant S5).

It needs no list of what might be found, and nothing is kept between writer and reader. What it will not do: pages
whose heads are not a multiple of 8 bytes, and shares with fewer than 64 bytes of each head in a page.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.pools.layout import Layout, Plane
from kvpoll.runtime.pools.plan import Share, share
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import PageTag

Words = NDArray[np.uint64]

CORRUPT: Final = "corrupt"
"""How the source of a tag begins that stands for a share which does not verify."""

NAME_BYTES: Final = 40
_RECORD: Final = struct.Struct(f"<QIII{NAME_BYTES}sI")
_RECORD_WORDS: Final = _RECORD.size // 8
_UNREADABLE: Final = (-1, -1)


def fill(pool: KVPool, page: int, tag: PageTag) -> None:
    """Write the pattern of ``tag`` to one page of every plane: all that this prefill rank keeps of it.

    tag.source is the name of the rank whose pool this is. Raises BadInput when the page is outside the pool, the tag
    does not fit into a record, or the layout's heads are not a multiple of 8 bytes.
    """
    layout = pool.layout
    places = _places(layout)
    bases = {turn: _physical(layout, base) for turn, base in _bases(places, _record(tag)).items()}
    row = np.empty_like(next(iter(bases.values())))
    for plane, outer, turn in zip(layout.planes, places.planes, places.turns, strict=True):
        np.bitwise_xor(bases[turn], outer, out=row)
        pool.put(*plane, page, row.reshape(-1).view(np.uint8))


def read(pool: KVPool, page: int, sources: Mapping[str, Layout]) -> dict[str, PageTag]:
    """What one page of a decode rank holds: for each prefill rank in ``sources`` (name -> its layout) that has a
    share of it, the tag found there.

    A share that nobody touched (all zero) is absent. A share that does not verify byte by byte has a tag whose source
    begins with "corrupt" and goes on with where: see ``is_corrupt``. Nothing else is judged: a sound tag may name
    another room, attempt, part or source than the caller expects. Raises BadInput when a layout does not fit.
    """
    found = {}
    for name, layout in sources.items():
        part = share(layout, pool.layout)
        tag = _read_share(pool, page, part) if part else None
        if tag is not None:
            found[name] = tag
    return found


def is_corrupt(tag: PageTag) -> bool:
    """Does this tag stand for bytes that do not verify?"""
    return tag.source.startswith(CORRUPT)


# --- records --------------------------------------------------------------------------------------


def _record(tag: PageTag) -> Words:
    """The tag as eight words. Raises BadInput when it does not fit."""
    name = tag.source.encode()
    if not 0 < len(name) <= NAME_BYTES or name.startswith(CORRUPT.encode()):
        raise BadInput(f"page pattern: {tag.source!r} is no rank name of at most {NAME_BYTES} bytes")
    try:
        room, attempt = tag.pair
        plain = _RECORD.pack(room, attempt, tag.part, tag.chunk, name, 0)
    except struct.error:
        raise BadInput(f"page pattern: a number is negative or too large in {tag}") from None
    checksum = zlib.crc32(plain[:-4])
    return np.frombuffer(plain[:-4] + checksum.to_bytes(4, "little"), dtype="<u8").astype(np.uint64)


def _tag(record: Words) -> PageTag | None:
    """The tag of a record, or None when its checksum is wrong."""
    data = record.astype("<u8").tobytes()
    room, attempt, part, chunk, name, checksum = _RECORD.unpack(data)
    if checksum != zlib.crc32(data[:-4]):
        return None
    return PageTag((room, attempt), name.rstrip(b"\0").decode(errors="replace"), part, chunk)


# --- places ---------------------------------------------------------------------------------------


class _Places(NamedTuple):
    """What the words of a layout's pages are mixed with.

    planes: uint64 [planes], a number for each layer and part. inner: uint64 [tokens, heads, words], one for each
    place in a page. turns: for each plane, with which word of the record its pages begin.
    """

    planes: Words
    inner: Words
    turns: tuple[int, ...]


@functools.lru_cache(maxsize=32)
def _places(layout: Layout) -> _Places:
    if layout.head_bytes % 8:
        raise BadInput(f"page pattern: heads of {layout.head_bytes} bytes; it needs a multiple of 8")
    heads, words = layout.local_heads, layout.head_bytes // 8
    token, head, word = np.ogrid[: layout.page_tokens, layout.first_head : layout.first_head + heads, :words]
    inner = _mixed((head << 44) + (token << 22) + word)
    # a number for each plane of the model, the same on every rank whatever layers it holds
    numbers = [plane.layer * len(layout.parts) + layout.parts.index(plane.part) for plane in layout.planes]
    turns = tuple(number * layout.page_tokens * words % _RECORD_WORDS for number in numbers)
    return _Places(_mixed(np.array(numbers) + (1 << 62)), inner, turns)


def _mixed(numbers: NDArray[np.int64]) -> Words:
    """Each number as 64 even bits (the finaliser of splitmix64)."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _bases(places: _Places, record: Words) -> dict[int, Words]:
    """For each turn, a page's words [tokens, heads, words] before its plane's number is mixed in."""
    tokens, _, words = places.inner.shape
    bases = {}
    for turn in set(places.turns):
        said = np.resize(np.roll(record, -turn), tokens * words).reshape(tokens, 1, words)
        bases[turn] = places.inner ^ said
    return bases


def _physical(layout: Layout, words: Words) -> Words:
    """From [tokens, heads, words] to the order in which a page lies."""
    return np.ascontiguousarray(words.swapaxes(0, 1) if layout.order == "HND" else words)


# --- reading --------------------------------------------------------------------------------------


class _View(NamedTuple):
    """A share of one page of one plane: its words, the numbers mixed into them, its turn and its place."""

    plane: Plane
    words: Words
    inner: Words
    outer: np.uint64
    turn: int


def _views(pool: KVPool, page: int, part: Share) -> Iterator[_View]:
    """The share's planes, each as [tokens, heads, words]."""
    layout = pool.layout
    places = _places(layout)
    window = (slice(part.token, part.token + part.tokens), slice(part.target_head, part.target_head + part.heads))
    inner = places.inner[window]
    heads_first = layout.order == "HND"
    shape = (*layout.page_shape[:2], -1)
    for layer in part.layers:
        for name in layout.parts:
            index = layout.plane_index[Plane(layer, name)]
            words = pool.get(layer, name, page).view(np.uint64).reshape(shape)
            words = (words.swapaxes(0, 1) if heads_first else words)[window]
            yield _View(Plane(layer, name), words, inner, places.planes[index], places.turns[index])


def _read_share(pool: KVPool, page: int, part: Share) -> PageTag | None:
    """The tag of a share, None when it is untouched, or a tag that says what is corrupt."""
    views = list(_views(pool, page, part))
    record = next((each for each in _guesses(views, part.token) if _tag(each) is not None), None)
    if record is None:
        if not any(view.words.any() for view in views):
            return None
        return PageTag(_UNREADABLE, f"{CORRUPT}: no record can be read", -1, -1)
    tag = _tag(record)
    assert tag is not None
    wrong = _first_wrong(views, _bases(_places(pool.layout), record), part)
    return tag if wrong is None else tag._replace(source=f"{CORRUPT}: {tag.source} but for {wrong}")


def _guesses(views: list[_View], first_token: int) -> Iterator[Words]:
    """The record as the first words of the share say it, then as the last of the planes and heads do.

    One of them survives any single wrong byte, so that what is wrong can be told with the tag.
    """
    for head, order in ((0, views), (-1, views[::-1])):
        said = np.zeros(_RECORD_WORDS, dtype=np.uint64)
        missing = set(range(_RECORD_WORDS))
        for view in order:
            words = view.words.shape[2]
            rows = -(-_RECORD_WORDS // words)
            plain = (view.words[:rows, head] ^ view.inner[:rows, head] ^ view.outer).reshape(-1)[:_RECORD_WORDS]
            slots = (view.turn + first_token * words + np.arange(len(plain))) % _RECORD_WORDS
            said[slots] = plain
            missing -= set(slots.tolist())
            if not missing:
                break
        if missing:
            raise BadInput(f"page pattern: a share has fewer than {_RECORD.size} bytes of a head; use larger pages")
        yield said


def _first_wrong(views: list[_View], bases: dict[int, Words], part: Share) -> str | None:
    """Where the share first differs from what the record implies, and how much of it does; None when it does not."""
    window = (slice(part.token, part.token + part.tokens), slice(part.target_head, part.target_head + part.heads))
    wrong, total, first = 0, 0, ""
    scratch = np.empty(views[0].words.shape, dtype=np.uint64)
    for view in views:
        np.bitwise_xor(bases[view.turn][window], view.outer, out=scratch)
        total += scratch.size
        if np.array_equal(scratch, view.words):
            continue
        places = np.argwhere(scratch != view.words)
        wrong += len(places)
        token, head, word = places[0]
        plane = view.plane
        first = first or f"layer {plane.layer} {plane.part} token {part.token + token} head {head} byte {8 * word}"
    return f"{wrong} of {total} words, first at {first}" if wrong else None
