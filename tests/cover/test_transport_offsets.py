"""Copy plans: what is refused, what is merged, and that pieces are the plan again, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.runtime.transports.interface import Copies
from kvpoll.runtime.transports.offsets import Plan, Refused, Space, plan_of


def copies(*rows: tuple[int, int, int]) -> Copies:
    return Copies(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))


def bytes_of(plan: Plan) -> dict[int, int]:
    """Target byte -> source byte."""
    rows = zip(plan.source.tolist(), plan.target.tolist(), plan.nbytes.tolist(), strict=True)
    return {target + i: source + i for source, target, nbytes in rows for i in range(nbytes)}


def test_neighbours_on_both_sides_become_one_range_within_one_region() -> None:
    space = Space([100, 50], [1000, 5000])
    plan = plan_of(copies((0, 20, 10), (10, 30, 10), (20, 60, 10), (90, 90, 10), (100, 100, 10)), space, Space([150]))
    assert plan.source.tolist() == [1000, 1020, 1090, 5000]
    assert plan.target.tolist() == [20, 60, 90, 100]
    assert plan.nbytes.tolist() == [20, 10, 10, 10]
    assert plan.total == 50


@pytest.mark.parametrize(
    ("row", "whose"),
    [
        ((-1, 0, 1), "writer"), ((150, 0, 1), "writer"), ((99, 0, 2), "writer"), ((0, 0, 151), "writer"),
        ((0, -1, 1), "owner"), ((0, 80, 1), "owner"), ((0, 39, 2), "owner"), ((0, 0, 1 << 62), "writer"),
        ((0, 0, 0), "writer"), ((0, 0, -5), "writer"), ((1 << 62, 0, 1 << 62), "writer"),
    ],
)  # fmt: skip
def test_a_range_that_leaves_its_region_refuses_the_whole_post(row: tuple[int, int, int], whose: str) -> None:
    with pytest.raises(Refused, match=f"range 1 .* of the {whose}"):
        plan_of(copies((0, 0, 1), row), Space([100, 50]), Space([40, 40]))


def test_columns_that_are_not_columns_are_refused() -> None:
    one = np.ones(1, np.int64)
    with pytest.raises(Refused, match="1 sources, 1 targets and 2 lengths"):
        plan_of(Copies(one, one, np.ones(2, np.int64)), Space([9]), Space([9]))
    with pytest.raises(Refused, match="integer arrays"):
        plan_of(Copies(one, one, np.ones(1)), Space([9]), Space([9]))  # type: ignore[arg-type]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.permutations(range(30)),
    st.integers(1, 100),
    st.integers(1, 8),
)
def test_pieces_are_the_plan_again_and_keep_both_limits(
    lengths: list[int], order: list[int], bytes_most: int, ranges_most: int
) -> None:
    at = [i for i in order if i < len(lengths)]
    nbytes = np.array(lengths, np.int64)
    source, shuffled = np.cumsum(nbytes) - nbytes, nbytes[at]
    total = int(nbytes.sum())
    ordered = Copies(source[at], np.cumsum(shuffled) - shuffled, shuffled)
    plan = plan_of(ordered, Space([total]), Space([total]))
    pieces = list(plan.pieces(bytes_most, ranges_most))
    whole: dict[int, int] = {}
    for piece in pieces:
        assert piece.total <= max(bytes_most, 4) and len(piece.nbytes) <= ranges_most
        whole |= bytes_of(piece)
    assert whole == bytes_of(plan)
    assert sum(piece.total for piece in pieces) == plan.total


def test_a_range_longer_than_a_piece_is_cut_and_no_piece_is_empty() -> None:
    plan = plan_of(copies((0, 0, 1000)), Space([1000], [64]), Space([1000]))
    pieces = list(plan.pieces(128, 4096))
    assert [piece.total for piece in pieces] == [96] * 10 + [40]
    assert bytes_of(plan) == {i: 64 + i for i in range(1000)}
