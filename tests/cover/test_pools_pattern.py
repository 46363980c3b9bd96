"""Pages that prove where they come from: read back after real copies, and every kind of damage told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.pattern import fill, is_corrupt, read
from kvpoll.runtime.pools.plan import copier
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import PageTag

PAIR = (2**62 + 12345, 1)


def move(
    source: KVPool, target: KVPool, source_pages: list[int], target_pages: list[int], most: int | None = None
) -> None:
    """Carry out a plan between two pools of one region each: all of it, or its first ranges."""
    (ours,), (theirs,) = source.regions(), target.regions()
    begin, end = _memory(ours), _memory(theirs)
    plan = copier(source.layout, target.layout).copies(source_pages, target_pages)
    for at, to, nbytes in list(zip(*(column.tolist() for column in plan), strict=True))[:most]:
        end[to : to + nbytes] = begin[at : at + nbytes]


def _memory(region: Any) -> Any:
    at = region.address - region.keep.ctypes.data
    return region.keep[at : at + region.nbytes]


class Cluster:
    """Prefill ranks (name -> pool) of some stages and TP ranks, and the decode ranks, over one model."""

    def __init__(self, model: Layout, prefill_tp: int, decode_tp: int, stages: int = 1) -> None:
        size = len(model.layers) // stages
        self.prefill = {
            f"P0/pp{stage}/tp{rank}": KVPool.on_host(
                replace(model, layers=model.layers[stage * size : (stage + 1) * size], tp_size=prefill_tp, tp_rank=rank)
            )
            for stage in range(stages)
            for rank in range(prefill_tp)
        }
        self.decode = [
            KVPool.on_host(replace(model, pages=model.pages + 1, tp_size=decode_tp, tp_rank=rank))
            for rank in range(decode_tp)
        ]
        self.sources = {name: pool.layout for name, pool in self.prefill.items()}

    def send(self, pair: tuple[int, int], parts: dict[int, tuple[int, int]], only: str = "P0") -> None:
        """Fill and copy: part of the prompt -> (prefill page, decode page), from ranks whose name begins so."""
        for name, pool in self.prefill.items():
            if name.startswith(only):
                for part, (page, _) in parts.items():
                    fill(pool, page, PageTag(pair, name, part, part // 2))
                for target in self.decode:
                    here, there = zip(*parts.values(), strict=True)
                    move(pool, target, list(here), list(there))

    def read(self, rank: int, page: int) -> dict[str, PageTag]:
        return read(self.decode[rank], page, self.sources)


GQA = Layout((0, 1, 2, 3), pages=8, page_tokens=16, heads=4, head_dim=32, dtype="bfloat16")
LATENT = Layout((0, 1, 2, 3), 8, 16, 1, 72, "bfloat16", "mla")
SMALL = Layout((5, 6), 8, page_tokens=4, heads=4, head_dim=8, dtype="float32")
ODD = Layout((0, 3), 8, page_tokens=3, heads=4, head_dim=24, dtype="float8_e4m3fn")

SPLIT = Layout(
    (0, 1), 8, page_tokens=6, heads=2, head_dim=24, dtype="int8"
)  # two prefill ranks a head, three tokens each


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize(
    "model, prefill_tp, decode_tp, stages, writers",
    [
        (GQA, 1, 1, 1, 1), (GQA, 2, 2, 1, 1), (GQA, 4, 2, 1, 2), (GQA, 2, 4, 1, 1), (GQA, 1, 4, 2, 2), (GQA, 4, 1, 4, 16),
        (GQA, 8, 2, 1, 4), (GQA, 2, 8, 2, 2), (GQA, 8, 1, 1, 8), (LATENT, 4, 2, 1, 1), (LATENT, 2, 4, 2, 2),
        (LATENT, 1, 1, 1, 1), (SMALL, 2, 1, 2, 4), (ODD, 2, 1, 2, 4), (ODD, 4, 4, 1, 1), (SPLIT, 4, 1, 1, 4), (SPLIT, 4, 2, 2, 4),
    ],
)  # fmt: skip
def test_what_arrives_names_each_rank_that_filled_its_share(
    model: Layout, prefill_tp: int, decode_tp: int, stages: int, writers: int, order: str
) -> None:
    cluster = Cluster(replace(model, order=order), prefill_tp, decode_tp, stages)  # type: ignore[arg-type]
    cluster.send(PAIR, {0: (3, 8), 1: (4, 2), 2: (0, 3)})
    filled: set[str] = set()
    for rank in range(decode_tp):
        for part, page in ((0, 8), (1, 2), (2, 3)):
            found = cluster.read(rank, page)
            assert found == {name: PageTag(PAIR, name, part, part // 2) for name in found}
            assert len(found) == writers
            filled |= set(found)
        assert cluster.read(rank, 5) == {}
    dummies = {name for name in cluster.sources if name not in filled}
    assert dummies == ({"P0/pp0/tp1", "P0/pp0/tp3"} if model is LATENT and prefill_tp == 4 else set())


@pytest.mark.parametrize("page_tokens, page_bytes", [(8, 16 << 10), (512, 1 << 20)])
def test_pages_of_real_size(page_tokens: int, page_bytes: int) -> None:
    """Llama-like: 8 heads of 128 bfloat16 elements; 16 KiB and 1 MiB a page of a plane, TP 2 to TP 1."""
    cluster = Cluster(Layout((0, 1), 2, page_tokens, heads=8, head_dim=128), 2, 1)
    assert cluster.decode[0].layout.page_bytes == page_bytes
    cluster.send(PAIR, {0: (0, 1), 1: (1, 2)})
    for part in (0, 1):
        assert cluster.read(0, part + 1) == {name: PageTag(PAIR, name, part, 0) for name in cluster.sources}
    cluster.decode[0].page_view(1, "v", 2)[page_bytes - 1] ^= 0x80
    assert [is_corrupt(tag) for tag in cluster.read(0, 2).values()] == [False, True]


# --- damage -----------------------------------------------------------------------------------------


def arrived(model: Layout = GQA) -> Cluster:
    """Two prefill TP ranks in two stages have filled pages 1, 2 and 3 of one decode rank."""
    cluster = Cluster(model, 2, 1, 2)
    cluster.send(PAIR, {0: (0, 1), 1: (1, 2), 2: (2, 3)})
    return cluster


ARRIVED = {model: arrived(model) for model in (GQA, replace(GQA, order="HND"), SMALL, ODD)}


@given(st.sampled_from(list(ARRIVED)), st.data(), st.integers(1, 255))
def test_one_wrong_byte_anywhere_corrupts_exactly_the_share_it_is_in(
    model: Layout, data: st.DataObject, flip: int
) -> None:
    cluster = ARRIVED[model]
    layout = cluster.decode[0].layout
    layer, name = data.draw(st.sampled_from(layout.planes))
    place = data.draw(st.integers(0, layout.page_bytes - 1))
    view = cluster.decode[0].page_view(layer, name, 2)
    sound = cluster.read(0, 2)
    view[place] ^= flip
    try:
        found = cluster.read(0, 2)
    finally:
        view[place] ^= flip
    heads = place // layout.head_bytes
    head = heads // layout.page_tokens if layout.order == "HND" else heads % layout.local_heads
    stage = layout.layers.index(layer) * 2 // len(layout.layers)
    hit = f"P0/pp{stage}/tp{head * 2 // layout.heads}"
    assert [key for key, tag in found.items() if is_corrupt(tag)] == [hit]
    assert {**found, hit: sound[hit]} == sound
    assert found[hit].source.startswith("corrupt: ") and f"layer {layer} {name} token" in found[hit].source


def test_every_single_byte_of_a_small_page_is_guarded() -> None:
    cluster = ARRIVED[SMALL]
    layout = cluster.decode[0].layout
    for plane in layout.planes:
        view = cluster.decode[0].page_view(*plane, 1)
        for place in range(layout.page_bytes):
            view[place] ^= 1
            assert sum(map(is_corrupt, cluster.read(0, 1).values())) == 1, (plane, place)
            view[place] ^= 1
    assert not any(map(is_corrupt, cluster.read(0, 1).values()))


def test_a_stale_page_of_an_older_attempt_is_told_by_its_tag() -> None:
    """Every rank but one has sent again since; nothing is corrupt, and the tag says whose it is."""
    cluster = arrived()
    older, newer = PAIR, (PAIR[0], PAIR[1] + 1)
    for name in list(cluster.sources)[1:]:
        cluster.send(newer, {0: (0, 1)}, only=name)
    first, *others = cluster.read(0, 1).items()
    assert first == ("P0/pp0/tp0", PageTag(older, "P0/pp0/tp0", 0, 0))
    assert {tag.pair for _, tag in others} == {newer}


def test_a_write_cut_off_in_the_middle_over_an_older_page_is_corrupt() -> None:
    """What an aborted write leaves: some layers new, some of the request before."""
    cluster = Cluster(GQA, 1, 1)
    cluster.send(PAIR, {0: (0, 1)})
    (name, pool), target = next(iter(cluster.prefill.items())), cluster.decode[0]
    fill(pool, 2, PageTag((7, 0), name, 0, 0))
    move(pool, target, [2], [1], most=3)
    tag = cluster.read(0, 1)[name]
    assert is_corrupt(tag) and tag.pair == (7, 0)
    assert "first at layer 1 v token 0 head 0 byte 0" in tag.source


def test_a_missing_layer_is_corrupt_and_a_missing_stage_is_absent() -> None:
    cluster = arrived()
    for layer, part in ((2, "k"), (2, "v")):
        cluster.decode[0].page_view(layer, part, 1)[:] = 0
    found = cluster.read(0, 1)
    assert [is_corrupt(tag) for tag in found.values()] == [False, False, True, True]
    for layer, part in ((3, "k"), (3, "v")):
        cluster.decode[0].page_view(layer, part, 1)[:] = 0
    assert list(cluster.read(0, 1)) == ["P0/pp0/tp0", "P0/pp0/tp1"]


def test_swapped_pages_are_told_by_their_part() -> None:
    cluster = arrived()
    for plane in cluster.decode[0].layout.planes:
        first, second = (cluster.decode[0].page_view(*plane, page) for page in (1, 2))
        first[:], second[:] = second.copy(), first.copy()
    assert {tag.part for tag in cluster.read(0, 1).values()} == {1}
    assert {tag.part for tag in cluster.read(0, 2).values()} == {0}


@pytest.mark.parametrize("axis", ["layers", "parts", "heads", "tokens"])
def test_the_right_bytes_in_the_wrong_place_are_corrupt(axis: str) -> None:
    """Two layers, keys and values, two heads, or two tokens change places within one page."""
    cluster = Cluster(GQA, 1, 1)
    cluster.send(PAIR, {0: (0, 1)})
    planes = {"layers": ((1, "k"), (2, "k")), "parts": ((1, "k"), (1, "v"))}.get(axis, ((1, "k"), (1, "k")))
    one, other = (cluster.decode[0].page_view(*plane, 1).reshape(16, 4, 64) for plane in planes)
    here, there = {"heads": (np.s_[:, 0], np.s_[:, 1]), "tokens": (np.s_[4], np.s_[5])}.get(axis, (np.s_[:], np.s_[:]))
    kept = one[here].copy()
    one[here], other[there] = other[there], kept
    (tag,) = cluster.read(0, 1).values()
    assert is_corrupt(tag) and tag.pair == PAIR


def test_the_slice_of_another_rank_is_corrupt() -> None:
    """Prefill TP rank 1 writes its heads where those of rank 0 belong, as a wrong TP rank in a descriptor does."""
    cluster = Cluster(GQA, 2, 2)
    wrong = replace(cluster.decode[0].layout, tp_rank=1)
    pool = cluster.prefill["P0/pp0/tp1"]
    fill(pool, 0, PageTag(PAIR, "P0/pp0/tp1", 0, 0))
    move(pool, KVPool(wrong, cluster.decode[0].regions(), [], np.empty((0, 64), np.uint8)), [0], [1])
    found = cluster.read(0, 1)
    assert list(found) == ["P0/pp0/tp0"] and is_corrupt(found["P0/pp0/tp0"])
    assert found["P0/pp0/tp0"].source == "corrupt: no record can be read"


def test_the_right_slice_of_another_engine_is_told_by_its_source() -> None:
    cluster = Cluster(GQA, 1, 1)
    stranger = KVPool.on_host(cluster.sources["P0/pp0/tp0"])
    fill(stranger, 0, PageTag(PAIR, "P1/dp3/pp0/tp0", 4, 9))
    move(stranger, cluster.decode[0], [0], [1])
    assert cluster.read(0, 1) == {"P0/pp0/tp0": PageTag(PAIR, "P1/dp3/pp0/tp0", 4, 9)}


@given(st.binary(min_size=1, max_size=64), st.sets(st.integers(0, 3), min_size=1))
def test_what_is_no_pattern_at_all_is_corrupt(noise: bytes, where: set[int]) -> None:
    cluster = Cluster(SMALL, 1, 1)
    for plane in [cluster.decode[0].layout.planes[index] for index in where]:
        view = cluster.decode[0].page_view(*plane, 1)
        view[:] = np.resize(np.frombuffer(noise, dtype=np.uint8), len(view))
    assert [is_corrupt(tag) for tag in cluster.read(0, 1).values()] == ([True] if any(noise) else [])


# --- what it will not do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag, problem",
    [
        (PageTag(PAIR, "P" * 41, 0, 0), "is no rank name of at most 40 bytes"),
        (PageTag(PAIR, "", 0, 0), "is no rank name of at most 40 bytes"),
        (PageTag(PAIR, "corrupt: me", 0, 0), "is no rank name of at most 40 bytes"),
        (PageTag((1, 2**32), "P0", 0, 0), "a number is negative or too large"),
        (PageTag(PAIR, "P0", -1, 0), "a number is negative or too large"),
    ],
)
def test_a_tag_that_fits_no_record_is_refused(tag: PageTag, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        fill(KVPool.on_host(SMALL), 0, tag)


def test_heads_and_shares_too_small_for_words_and_records_are_refused() -> None:
    with pytest.raises(BadInput, match="heads of 6 bytes; it needs a multiple of 8"):
        fill(KVPool.on_host(replace(SMALL, head_dim=3, dtype="bfloat16")), 0, PageTag(PAIR, "P0", 0, 0))
    tiny = KVPool.on_host(Layout((0,), 1, 1, 1, 8, "float32"))
    with pytest.raises(BadInput, match="page 1 is outside the pool of 1 pages"):
        fill(tiny, 1, PageTag(PAIR, "P0", 0, 0))
    fill(tiny, 0, PageTag(PAIR, "P0", 0, 0))
    assert read(tiny, 0, {"P0": tiny.layout}) == {"P0": PageTag(PAIR, "P0", 0, 0)}
    latent = KVPool.on_host(Layout((0,), 1, 1, 1, 8, "float32", "mla"))
    with pytest.raises(BadInput, match="fewer than 64 bytes of a head; use larger pages"):
        read(latent, 0, {"P0": latent.layout})
