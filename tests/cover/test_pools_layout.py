"""Where everything lies in a rank's KV memory, and what is said when two ranks do not fit."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.runtime.pools.layout import MAGIC, Layout, Plane, mismatch
from kvpoll.spec.source import BadInput

STAGE = Layout((4, 5), pages=10, page_tokens=16, heads=8, head_dim=64, tp_size=4, tp_rank=2, rows=3, row_bytes=64)


def test_offsets_of_a_rank_with_two_of_eight_heads() -> None:
    assert (STAGE.local_heads, STAGE.first_head) == (2, 4)
    assert STAGE.planes == (Plane(4, "k"), Plane(4, "v"), Plane(5, "k"), Plane(5, "v"))
    assert STAGE.head_bytes == 64 * 2
    assert STAGE.page_bytes == 16 * 2 * 128 == 4096
    assert (STAGE.plane_bytes, STAGE.layer_bytes, STAGE.kv_bytes) == (40_960, 81_920, 163_840)
    assert STAGE.total_bytes == 163_840 + 3 * 64
    assert STAGE.page_offset(4, "k", 0) == 0
    assert STAGE.page_offset(5, "v", 7) == 3 * 40_960 + 7 * 4096
    assert STAGE.row_offset(2) == 163_840 + 128
    assert STAGE.page_shape == (16, 2, 64) and replace(STAGE, order="HND").page_shape == (2, 16, 64)


def test_an_mla_rank_holds_one_latent_plane_a_layer_whole() -> None:
    latent = Layout((0, 1, 2), 5, 64, heads=1, head_dim=576, kind="mla", tp_size=8, tp_rank=7)
    assert (latent.local_heads, latent.first_head, latent.parts) == (1, 0, ("latent",))
    assert latent.page_bytes == 64 * 576 * 2 and latent.kv_bytes == 15 * latent.page_bytes


def test_with_more_ranks_than_heads_neighbours_hold_one_head() -> None:
    ranks = [Layout((0,), 1, 1, heads=2, head_dim=8, tp_size=8, tp_rank=rank) for rank in range(8)]
    assert [each.first_head for each in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {each.local_heads for each in ranks} == {1}


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"pages": 0}, "KV layout: pages is 0; it must be from 1 to 2147483647"),
        ({"page_tokens": -1}, "KV layout: page_tokens is -1; it must be from 1 to 2147483647"),
        ({"layers": ()}, "KV layout: 0 layers; a rank holds from 1 to 4096"),
        ({"layers": (3, 3)}, "KV layout: layer ids must be ascending, from 0"),
        ({"layers": (-1, 3)}, "KV layout: layer ids must be ascending, from 0"),
        ({"dtype": "bfloat"}, "KV layout: unknown dtype 'bfloat' (did you mean 'bfloat16'?)"),
        ({"kind": "gqa"}, 'KV layout: kind \'gqa\', order \'NHD\'; valid are "mha" or "mla", "NHD" or "HND"'),
        ({"tp_rank": 4}, "KV layout: tp_rank 4 of 4, 3 rows: out of range"),
        ({"kind": "mla"}, "KV layout: MLA has one latent head, not 8; give heads = 1"),
        ({"heads": 6}, "KV layout: 6 KV heads cannot be laid over TP 4; one must divide the other"),
        ({"pages": 2**31 - 1, "page_tokens": 2**31 - 1}, "that is no memory"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(BadInput) as error:
        replace(STAGE, **change)  # type: ignore[arg-type]
    assert str(error.value).endswith(problem)


@pytest.mark.parametrize(
    "layer, part, page, problem",
    [
        (6, "k", 0, "KV layout: no plane 'k' of layer 6; this rank holds layers 4-5"),
        (4, "latent", 0, "KV layout: no plane 'latent' of layer 4; this rank holds layers 4-5"),
        (4, "k", 10, "KV layout: page 10 is outside the pool of 10 pages"),
        (4, "k", -1, "KV layout: page -1 is outside the pool of 10 pages"),
    ],
)
def test_an_offset_that_does_not_exist_is_refused(layer: int, part: str, page: int, problem: str) -> None:
    with pytest.raises(BadInput) as error:
        STAGE.page_offset(layer, part, page)
    assert str(error.value) == problem
    with pytest.raises(BadInput, match="aux row 3 is outside the pool of 3 rows"):
        STAGE.row_offset(3)


# --- travelling -------------------------------------------------------------------------------------


@given(
    st.builds(
        Layout,
        layers=st.sets(st.integers(0, 200), min_size=1).map(sorted).map(tuple),
        pages=st.integers(1, 1 << 20),
        page_tokens=st.integers(1, 1024),
        heads=st.just(8),
        head_dim=st.integers(1, 512),
        dtype=st.sampled_from(["float16", "float8_e5m2", "uint8"]),
        order=st.sampled_from(["NHD", "HND"]),
        tp_rank=st.integers(0, 3),
        tp_size=st.just(4),
        rows=st.integers(0, 4096),
    )
)
def test_a_layout_arrives_as_it_left(layout: Layout) -> None:
    assert Layout.from_bytes(layout.to_bytes()) == layout


@given(st.binary(max_size=64), st.booleans())
def test_bytes_of_anything_else_are_refused_in_one_line(noise: bytes, disguised: bool) -> None:
    data = MAGIC + bytes([1]) + noise if disguised else noise
    with pytest.raises(BadInput) as error:
        Layout.from_bytes(data)
    assert str(error.value).startswith("KV layout of a peer: ") and "\n" not in str(error.value)


def test_a_layout_cut_short_wrong_or_of_another_version_is_refused() -> None:
    data = STAGE.to_bytes()
    for cut in range(len(data)):
        with pytest.raises(BadInput):
            Layout.from_bytes(data[:cut])
    with pytest.raises(BadInput, match=r"version 9, not 1; run the same kvpoll on both sides"):
        Layout.from_bytes(data[:3] + bytes([9]) + data[4:])
    fields = msgspec.msgpack.decode(data[4:])
    for wrong in ({"pages": 0}, {"pages": "10"}, {"layers": [5, 4]}, {"order": "DHN"}):
        with pytest.raises(BadInput, match="KV layout of a peer"):
            Layout.from_bytes(data[:4] + msgspec.msgpack.encode({**fields, **wrong}))


# --- fitting ----------------------------------------------------------------------------------------

DECODE = replace(STAGE, layers=tuple(range(8)), tp_size=2, tp_rank=1, pages=99, rows=50)


def test_ranks_of_different_sizes_stages_and_pools_fit() -> None:
    assert mismatch(STAGE, DECODE) is None
    assert mismatch(STAGE, replace(DECODE, tp_size=16, tp_rank=15)) is None


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"page_tokens": 32}, "page size (tokens) differs: prefill has 16, decode has 32; start both with the same --page-size"),
        ({"dtype": "float16"}, "KV dtype differs: prefill has bfloat16, decode has float16; start both with the same --kv-cache-dtype"),
        ({"order": "HND"}, "page order differs: prefill has NHD, decode has HND; use an attention backend of the same KV layout on both sides"),
        ({"heads": 4}, "number of KV heads differs: prefill has 8, decode has 4; serve the same model on both sides"),
        ({"kind": "mla", "heads": 1}, "attention kind differs: prefill has mha, decode has mla; serve the same model on both sides"),
        ({"head_dim": 128}, "head dimension differs: prefill has 64, decode has 128; serve the same model on both sides"),
        ({"row_bytes": 128}, "aux row size (bytes) differs: prefill has 64, decode has 128; run the same version with the same options on both sides"),
        ({"layers": (0, 1, 2, 3, 5)}, "layers differ: decode lacks layer 4 of this prefill rank; give decode PP 1 or the PP size and layer split of prefill"),
        ({"layers": (7,)}, "layers differ: decode lacks layers 4-5 of this prefill rank; give decode PP 1 or the PP size and layer split of prefill"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_told_apart_with_the_mend(change: dict[str, object], problem: str) -> None:
    assert mismatch(STAGE, replace(DECODE, **change)) == problem  # type: ignore[arg-type]


def test_tp_sizes_of_which_none_divides_the_other_do_not_fit() -> None:
    thirds, halves = (Layout((0,), 1, 1, heads=6, head_dim=8, tp_size=size) for size in (3, 2))
    assert mismatch(thirds, halves) == "TP size differs: prefill has 3, decode has 2; one must divide the other"
