"""Which bytes of a prefill rank go where on a decode rank: the copies of a set of pages.

A prefill rank's *share* of a decode rank's page is what both of them keep: the layers that both stages have, the heads
that both TP ranks have, and all tokens. The shares of the prefill ranks that a decode rank contacts
(statemachine/mapping.py) tile its pages: every byte has exactly one writer, so a wrong byte names its writer.

Two cases need saying. MLA: TP ranks hold the same latent vectors; the first contacted one writes, the others have no
share. Replicated heads (TP beyond the number of KV heads): contacted ranks with the same head divide the tokens of the
page between them, where SGLang 0.5.23 lets each of them write all of it.

A plan of 100,000 ranges is computed by arrays, without a Python loop over pages or layers. One of a few ranges is
computed by such a loop, which has ended before numpy has begun.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.pools.layout import Layout, Plane, mismatch
from kvpoll.runtime.transports.interface import Copies, Offsets
from kvpoll.spec.source import BadInput
from kvpoll.statemachine.mapping import Sizes, map_ranks

Pages = Sequence[int] | NDArray[np.integer]

Columns = Sequence[Any]
"""Source, target and length of ranges: three lists, or three arrays."""

FEW_RANGES: Final = 64
"""Up to so many ranges a loop is quicker than arrays."""


class Share(NamedTuple):
    """What one prefill rank fills of each page of one decode rank.

    layers: global ids. source_head, target_head: where the slice begins among the heads that each rank keeps; heads:
    its width. token, tokens: first token of the page and how many.
    """

    layers: tuple[int, ...]
    source_head: int
    target_head: int
    heads: int
    token: int
    tokens: int


@functools.lru_cache(maxsize=1024)
def share(source: Layout, target: Layout) -> Share | None:
    """The share of prefill rank ``source`` in decode rank ``target``, or None when it writes nothing there.

    Raises BadInput when the layouts do not fit.
    """
    problem = mismatch(source, target)
    if problem:
        raise BadInput(f"KV layouts: {problem}")
    mla = source.kind == "mla"
    mapping = map_ranks(Sizes(tp=source.tp_size), Sizes(tp=target.tp_size), target.tp_rank, mla=mla)
    writers = mapping.tp_ranks[:1] if mapping.has_dummies else mapping.tp_ranks
    first = max(source.first_head, target.first_head)
    heads = min(source.first_head + source.local_heads, target.first_head + target.local_heads) - first
    if source.tp_rank not in writers:
        return None
    alike = [rank for rank in writers if source.first_head_of(rank) == source.first_head]
    place = alike.index(source.tp_rank)
    begin, end = (source.page_tokens * each // len(alike) for each in (place, place + 1))
    if begin == end:
        return None
    return Share(source.layers, first - source.first_head, first - target.first_head, heads, begin, end - begin)


def gap(sources: Iterable[Layout], target: Layout) -> str | None:
    """What of the target's pages no source fills, or two do: one line, or None when their shares tile it.

    To be asked once the layouts of all contacted prefill ranks are known. Raises BadInput when one does not fit.
    """
    filled = {layer: np.zeros((target.local_heads, target.page_tokens), dtype=np.int32) for layer in target.layers}
    for source in sources:
        part = share(source, target)
        if part is None:
            continue
        heads = slice(part.target_head, part.target_head + part.heads)
        for layer in part.layers:
            filled[layer][heads, part.token : part.token + part.tokens] += 1
    for layer, times in filled.items():
        if (times != 1).any():
            head, token = np.argwhere(times != 1)[0]
            fault = "no prefill rank fills" if times[head, token] == 0 else "several prefill ranks fill"
            return f"{fault} layer {layer}, head {target.first_head + head}; check the PP and TP sizes of prefill"
    return None


class Copier:
    """The copies from one prefill rank's pool to one decode rank's, for any set of pages.

    Raises BadInput when the layouts do not fit.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        self.source, self.target = source, target
        part = share(source, target)
        nothing = np.empty(0, dtype=np.int64)
        self._ours, self._theirs, self._nbytes = (
            (nothing, nothing, 0) if part is None else _pieces(source, target, part)
        )
        self._planes = [nothing if part is None else _planes(layout, part) for layout in (source, target)]
        self._is_whole = self._nbytes == source.page_bytes == target.page_bytes
        self._of_page: list[tuple[int, int]] = []
        if len(self._planes[0]) * len(self._ours) <= FEW_RANGES:
            planes = zip(*(each.tolist() for each in self._planes), strict=True)
            pieces = list(zip(self._ours.tolist(), self._theirs.tolist(), strict=True))
            self._of_page = [(at + here, to + there) for at, to in planes for here, there in pieces]

    def copies(self, source_pages: Pages, target_pages: Pages, rows: tuple[int, int] | None = None) -> Copies:
        """The ranges that fill ``target_pages`` of the decode rank from ``source_pages`` of the prefill rank, and the
        one that carries aux row ``rows[0]`` to ``rows[1]``. Which of several prefill ranks sends the row, the caller
        decides: see ``writes_aux``.

        Offsets are those of the two layouts. Ranges do not overlap in the target and never cross from one plane into
        the next; whole pages that follow one another on both sides are one range. Without pages when ``source`` has no
        share.

        Raises BadInput when a page or row is outside its pool, a target page is named twice, or the two lists have
        different lengths.
        """
        columns = self._few(source_pages, target_pages) or self._many(source_pages, target_pages)
        if rows is not None:
            columns = self._with_row(columns, *rows)
        return Copies(*(np.array(columns, np.int64) if isinstance(columns[0], list) else columns))

    def _few(self, source_pages: Pages, target_pages: Pages) -> Columns | None:
        """The ranges by a loop; None when they are many, and when there is something wrong with the pages."""
        count = len(target_pages)
        if count != len(source_pages) or not 0 < count * len(self._of_page) <= FEW_RANGES:
            return None
        try:
            pairs = sorted(zip(map(index, target_pages), map(index, source_pages), strict=True))
        except TypeError:
            return None
        here_pages, there_pages = self.source.pages, self.target.pages
        runs: list[list[int]] = []
        here = there = -2
        for after_there, after_here in pairs:
            if after_there == there or not (0 <= after_there < there_pages and 0 <= after_here < here_pages):
                return None
            if self._is_whole and after_there == there + 1 and after_here == here + 1:
                runs[-1][2] += self._nbytes
            else:
                runs.append([after_here, after_there, self._nbytes])
            here, there = after_here, after_there
        here_bytes, there_bytes = self.source.page_bytes, self.target.page_bytes
        ranges = [
            (here * here_bytes + ours, there * there_bytes + theirs, nbytes)
            for here, there, nbytes in runs
            for ours, theirs in self._of_page
        ]
        return tuple(map(list, zip(*ranges, strict=True)))

    def _many(self, source_pages: Pages, target_pages: Pages) -> Columns:
        """All planes x all pages x the pieces of a page, or x runs of whole pages where a page is one piece."""
        here, there = _checked(self.source, source_pages, "prefill"), _checked(self.target, target_pages, "decode")
        if len(here) != len(there):
            raise BadInput(f"pages: {len(here)} of prefill for {len(there)} of decode; each page needs its destination")
        order = np.argsort(there)
        here, there = here[order], there[order]
        if (there[1:] == there[:-1]).any():
            twice = there[1:][there[1:] == there[:-1]][0]
            raise BadInput(f"pages: decode's page {twice} is named twice; each page holds one page of the prompt")
        lengths = np.full(1, self._nbytes, dtype=np.int64)
        if self._is_whole and len(here):
            first = np.flatnonzero(np.r_[True, (np.diff(here) != 1) | (np.diff(there) != 1)])
            lengths = np.diff(np.r_[first, len(here)]) * self._nbytes
            here, there = here[first], there[first]
        ours, theirs = (planes[:, None, None] for planes in self._planes)
        at_source = ours + (here * self.source.page_bytes)[:, None] + self._ours
        at_target = theirs + (there * self.target.page_bytes)[:, None] + self._theirs
        nbytes = np.broadcast_to(lengths[:, None], at_target.shape)
        return at_source.ravel(), at_target.ravel(), nbytes.ravel()

    def _with_row(self, columns: Columns, source_row: int, target_row: int) -> Columns:
        row = (self.source.row_offset(source_row), self.target.row_offset(target_row), self.source.row_bytes)
        if isinstance(columns[0], list):
            return tuple([*column, last] for column, last in zip(columns, row, strict=True))
        return tuple(np.append(column, last) for column, last in zip(columns, row, strict=True))


@functools.lru_cache(maxsize=1024)
def copier(source: Layout, target: Layout) -> Copier:
    """The one for these two layouts. Raises BadInput when they do not fit."""
    return Copier(source, target)


def writes_aux(source: Layout, target: Layout) -> bool:
    """Is this the one prefill rank that sends the aux row: the first contacted TP rank of the last stage?

    SGLang's last stage sends it from every TP rank; one is enough, and then a torn row has one culprit.
    """
    mla = source.kind == "mla"
    mapping = map_ranks(Sizes(tp=source.tp_size), Sizes(tp=target.tp_size), target.tp_rank, mla=mla)
    return source.tp_rank == mapping.tp_ranks[0] and target.layers[-1] in source.layers


def _checked(layout: Layout, pages: Pages, side: str) -> Offsets:
    """Page numbers as int64 [n], all inside the pool."""
    numbers = np.asarray(pages)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise BadInput(f"pages: {side}'s page numbers must be a list of whole numbers")
    numbers = numbers.astype(np.int64)
    outside = numbers[(numbers < 0) | (numbers >= layout.pages)]
    if len(outside):
        raise BadInput(f"pages: {side}'s page {outside[0]} is outside its pool of {layout.pages} pages")
    return numbers


def _planes(layout: Layout, part: Share) -> Offsets:
    """Where the planes of the share's layers begin."""
    index = [layout.plane_index[Plane(layer, each)] for layer in part.layers for each in layout.parts]
    return np.array(index, dtype=np.int64) * layout.plane_bytes


def _pieces(source: Layout, target: Layout, part: Share) -> tuple[Offsets, Offsets, int]:
    """Contiguous pieces of the share inside one page: offsets at the source, at the target, and their common size."""
    if source.order == "HND":
        run, count = part.tokens, part.heads
        if part.tokens == source.page_tokens:  # heads side by side are one piece
            run, count = run * count, 1
        steps = np.arange(count, dtype=np.int64) * source.page_tokens
        ours, theirs = (steps + head * source.page_tokens + part.token for head in (part.source_head, part.target_head))
    else:
        run, count = part.heads, part.tokens
        if part.heads == source.local_heads == target.local_heads:
            run, count = run * count, 1
        tokens = np.arange(count, dtype=np.int64) + part.token
        ours = tokens * source.local_heads + part.source_head
        theirs = tokens * target.local_heads + part.target_head
    return ours * source.head_bytes, theirs * source.head_bytes, run * source.head_bytes
