"""Copy plans against a slow reference: small memories of real ranks, copied range by range, looked at byte by byte."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.plan import FEW_RANGES, Copier, copier, gap, share, writes_aux
from kvpoll.runtime.transports.interface import Copies
from kvpoll.spec.source import BadInput

UNTOUCHED = -1


@dataclass(frozen=True)
class Model:
    """What is served, and on which sizes. stages: the layer ids of each prefill stage."""

    kind: str
    order: str
    heads: int
    head_dim: int
    page_tokens: int
    stages: tuple[tuple[int, ...], ...]
    prefill_tp: int
    decode_tp: int
    decode_staged: bool

    def layout(self, layers: tuple[int, ...], tp_size: int, tp_rank: int, pages: int) -> Layout:
        return Layout(
            layers, pages, self.page_tokens, self.heads, self.head_dim, "float32", self.kind, self.order,  # type: ignore[arg-type]
            tp_rank, tp_size, rows=2, row_bytes=8,
        )  # fmt: skip

    def prefill(self, pages: int) -> list[Layout]:
        ranks = product(self.stages, range(self.prefill_tp))
        return [self.layout(layers, self.prefill_tp, rank, pages) for layers, rank in ranks]

    def decode(self, pages: int) -> list[Layout]:
        whole = tuple(layer for stage in self.stages for layer in stage)
        stages = self.stages if self.decode_staged else (whole,)
        return [self.layout(layers, self.decode_tp, rank, pages) for layers in stages for rank in range(self.decode_tp)]


@st.composite
def models(draw: st.DrawFn) -> Model:
    sizes = st.sampled_from([1, 2, 3, 4, 6, 8])
    prefill_tp = draw(sizes)
    decode_tp = draw(sizes.filter(lambda size: max(size, prefill_tp) % min(size, prefill_tp) == 0))
    kind = draw(st.sampled_from(["mha", "mla"]))
    fits = [
        heads for heads in (1, 2, 3, 4, 6, 8, 12) if all(max(heads, tp) % min(heads, tp) == 0 for tp in (prefill_tp, decode_tp))
    ]  # fmt: skip
    layers = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(sorted))
    cut = draw(st.integers(1, len(layers)))
    stages = tuple(tuple(part) for part in (layers[:cut], layers[cut:]) if part)
    return Model(
        kind=kind,
        order=draw(st.sampled_from(["NHD", "HND"])),
        heads=1 if kind == "mla" else draw(st.sampled_from(fits)),
        head_dim=draw(st.integers(1, 3)),
        page_tokens=draw(st.integers(1, 5)),
        stages=stages,
        prefill_tp=prefill_tp,
        decode_tp=decode_tp,
        decode_staged=draw(st.booleans()),
    )


def element(layer: int, part: str, part_of_prompt: int, head: int, token: int, dim: int) -> int:
    """A number for each element of a prompt's KV, the same wherever it is kept."""
    number = layer * 2 + (part == "v")
    for digit, base in ((part_of_prompt, 8), (head, 16), (token, 8), (dim, 4)):
        number = number * base + digit
    return number


def memory_of(layout: Layout, prompt: list[int]) -> NDArray[np.int32]:
    """A rank's memory that holds a prompt in these pages, in order, and UNTOUCHED elsewhere; said slowly."""
    memory = np.full(layout.total_bytes // 4, UNTOUCHED, dtype=np.int32)
    for layer, part in layout.planes:
        for number, page in enumerate(prompt):
            start = layout.page_offset(layer, part, page) // 4
            view = memory[start : start + layout.page_bytes // 4].reshape(layout.page_shape)
            for head, token, dim in product(
                range(layout.local_heads), range(layout.page_tokens), range(layout.head_dim)
            ):
                place = (head, token, dim) if layout.order == "HND" else (token, head, dim)
                view[place] = element(layer, part, number, layout.first_head + head, token, dim)
    return memory


def apply(plan: Copies, source: NDArray[np.int32], target: NDArray[np.int32], touched: NDArray[np.int64]) -> None:
    ours, theirs = source.view(np.uint8), target.view(np.uint8)
    for begin, end, nbytes in zip(*(column.tolist() for column in plan), strict=True):
        assert nbytes > 0 and begin >= 0 and end >= 0 and begin + nbytes <= len(ours) and end + nbytes <= len(theirs)
        theirs[end : end + nbytes] = ours[begin : begin + nbytes]
        touched[end : end + nbytes] += 1


@settings(max_examples=120)
@given(models(), st.integers(1, 4), st.randoms(use_true_random=False), st.sampled_from([0, FEW_RANGES]))
def test_all_ranks_together_fill_exactly_the_pages_that_were_named(
    model: Model, length: int, random: object, few: int
) -> None:
    """After every prefill rank's copies, by loop or by arrays, each decode rank holds the prompt, and each byte was
    written once.
    """
    pages = 6
    sources = model.prefill(pages)
    prompts = {id(source): random.sample(range(pages), length) for source in sources}  # type: ignore[attr-defined]
    for target in model.decode(pages + 1):
        prompt = random.sample(range(pages + 1), length)  # type: ignore[attr-defined]
        memory = np.full(target.total_bytes // 4, UNTOUCHED, dtype=np.int32)
        touched = np.zeros(target.total_bytes, dtype=np.int64)
        contacted = [source for source in sources if set(source.layers) <= set(target.layers)]
        for source in contacted:
            theirs = prompts[id(source)]
            with patch("kvpoll.runtime.pools.plan.FEW_RANGES", few):
                plan = Copier(source, target).copies(theirs, prompt)
            apply(plan, memory_of(source, theirs), memory, touched)
        expected = memory_of(target, prompt)
        assert np.array_equal(memory, expected)
        assert np.array_equal(touched, np.repeat(expected != UNTOUCHED, 4))
        assert gap(contacted, target) is None


@given(models())
def test_shares_and_gaps_agree(model: Model) -> None:
    """Take away one prefill rank that has a share, and the gap is named; give one twice, and that is named."""
    sources = model.prefill(4)
    for target in model.decode(4):
        writers = [each for each in sources if set(each.layers) <= set(target.layers) and share(each, target)]
        for absent in writers:
            problem = gap([each for each in writers if each is not absent], target)
            assert problem is not None and problem.startswith("no prefill rank fills layer ")
        assert "several prefill ranks fill" in (gap([*writers, writers[0]], target) or "")
        assert sum(writes_aux(each, target) for each in sources if set(each.layers) <= set(target.layers)) == 1


# --- known cases ------------------------------------------------------------------------------------

ONE = Layout((0, 1), pages=16, page_tokens=4, heads=8, head_dim=2, dtype="float16", rows=4)


def test_whole_pages_that_follow_one_another_on_both_sides_are_one_range() -> None:
    plan = copier(ONE, ONE).copies([3, 4, 5, 9, 6], [10, 11, 12, 2, 13])
    page = ONE.page_bytes
    assert plan.total == 5 * 4 * page
    assert sorted(plan.nbytes.tolist()) == [page] * 4 + [4 * page] * 4
    first = ONE.page_offset(1, "v", 3), ONE.page_offset(1, "v", 10), 4 * page
    assert first in set(zip(*(column.tolist() for column in plan), strict=True))


def test_pages_are_not_joined_across_planes() -> None:
    """The last page of one plane and the first of the next may be in two regions of memory."""
    everything = list(range(ONE.pages))
    plan = copier(ONE, ONE).copies(everything, everything)
    assert plan.nbytes.tolist() == [ONE.plane_bytes] * 4
    assert sorted(plan.target.tolist()) == [index * ONE.plane_bytes for index in range(4)]


@pytest.mark.parametrize("order, ranges, size", [("NHD", 4 * 4, 4 * 4), ("HND", 4, 4 * 4 * 4)])
def test_a_slice_of_heads_is_a_piece_a_token_or_one_piece_where_heads_come_first(
    order: str, ranges: int, size: int
) -> None:
    """Two ranks with four heads each write to one with eight: per token and plane, or per plane."""
    half, whole = (replace(ONE, order=order, tp_size=size) for size in (2, 1))  # type: ignore[arg-type]
    plan = copier(half, whole).copies([1], [2])
    assert len(plan.nbytes) == ranges and set(plan.nbytes.tolist()) == {size}
    assert len(copier(whole, half).copies([1], [2]).nbytes) == ranges


def test_copies_of_one_head_share_the_tokens_of_a_page() -> None:
    """Two KV heads over eight prefill ranks: the four ranks of a head write a quarter of the page each."""
    ranks = [Layout((0,), 4, 8, heads=2, head_dim=2, tp_size=8, tp_rank=rank) for rank in range(8)]
    whole = Layout((0,), 4, 8, heads=2, head_dim=2)
    shares = [share(each, whole) for each in ranks]
    assert [(each.target_head, each.token, each.tokens) for each in shares if each] == [
        (head, token, 2) for head in (0, 1) for token in (0, 2, 4, 6)
    ]


def test_of_mla_ranks_the_first_writes_and_the_dummies_have_no_share() -> None:
    ranks = [Layout((0,), 4, 8, 1, 4, kind="mla", tp_size=4, tp_rank=rank) for rank in range(4)]
    halves = [Layout((0,), 4, 8, 1, 4, kind="mla", tp_size=2, tp_rank=rank) for rank in range(2)]
    assert [[share(each, target) is not None for each in ranks] for target in halves] == [
        [True, False, False, False],
        [False, False, True, False],
    ]
    assert copier(ranks[1], halves[0]).copies([0], [1]).total == 0
    assert [[share(each, target) is not None for each in halves] for target in ranks] == [
        [True, False], [True, False], [False, True], [False, True],
    ]  # fmt: skip


def test_an_aux_row_is_one_range_behind_the_pages() -> None:
    assert [column.tolist() for column in copier(ONE, replace(ONE, pages=3)).copies([], [], (1, 3))] == [
        [ONE.kv_bytes + 64],
        [replace(ONE, pages=3).kv_bytes + 3 * 64],
        [64],
    ]
    with pytest.raises(BadInput, match="aux row 4 is outside the pool of 4 rows"):
        copier(ONE, ONE).copies([], [], (0, 4))
    assert [column.tolist()[-1] for column in copier(ONE, ONE).copies([1], [2], (1, 3))] == [
        ONE.kv_bytes + 64, ONE.kv_bytes + 3 * 64, 64
    ]  # fmt: skip
    with pytest.raises(BadInput, match="aux row size"):
        copier(ONE, replace(ONE, row_bytes=128))


@pytest.mark.parametrize(
    "sources, targets, problem",
    [
        ([0], [16], "pages: decode's page 16 is outside its pool of 16 pages"),
        ([-1], [0], "pages: prefill's page -1 is outside its pool of 16 pages"),
        ([0, 1], [0], "pages: 2 of prefill for 1 of decode; each page needs its destination"),
        ([0, 1, 2], [7, 3, 7], "pages: decode's page 7 is named twice; each page holds one page of the prompt"),
        ([0.5], [1], "pages: prefill's page numbers must be a list of whole numbers"),
        ([[0]], [[1]], "pages: prefill's page numbers must be a list of whole numbers"),
    ],
)
def test_pages_that_cannot_be_copied_are_refused(sources: list[int], targets: list[int], problem: str) -> None:
    with pytest.raises(BadInput) as error:
        copier(ONE, ONE).copies(sources, targets)
    assert str(error.value) == problem


def test_layouts_that_do_not_fit_have_no_plan_and_no_pages_no_ranges() -> None:
    with pytest.raises(BadInput, match="KV layouts: page size"):
        copier(ONE, replace(ONE, page_tokens=8)).copies([0], [0])
    assert copier(ONE, ONE).copies([], []).total == 0
