"""The aux row: what was packed comes back, and a row that is blank, torn or damaged is nobody's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.runtime.pools.aux_row import ROW_BYTES, AuxRow, pack, unpack
from kvpoll.spec.source import BadInput

ROW = AuxRow(room=2**63 - 1, attempt=3, first_token=128_009, prompt_tokens=4097, cached_tokens=512, pages=57)
COUNTS = st.integers(0, 2**64 - 1)


@given(
    st.builds(AuxRow, COUNTS, COUNTS, st.integers(-(2**63), 2**63 - 1), COUNTS, COUNTS, COUNTS), st.binary(max_size=64)
)
def test_a_row_comes_back_from_a_longer_one(row: AuxRow, beyond: bytes) -> None:
    assert unpack(pack(row) + beyond) == row


def test_a_row_has_sixty_four_bytes_and_names_its_request() -> None:
    assert len(pack(ROW)) == ROW_BYTES == 64
    assert ROW.pair == (2**63 - 1, 3)


def test_any_wrong_byte_makes_it_nobodys() -> None:
    data = pack(ROW)
    for place in range(ROW_BYTES):
        wrong = bytearray(data)
        wrong[place] ^= 0x10
        assert unpack(wrong) is None, place


def test_a_blank_a_short_and_a_torn_row_are_nobodys() -> None:
    older = pack(ROW._replace(attempt=2, first_token=7))
    assert unpack(bytes(ROW_BYTES)) is None
    assert unpack(pack(ROW)[:-1]) is None
    assert unpack(pack(ROW)[:32] + older[32:]) is None


@pytest.mark.parametrize("change", [{"room": -1}, {"pages": 2**64}, {"first_token": 2**63}])
def test_a_number_that_does_not_fit_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="aux row: a field is negative or above 64 bits"):
        pack(ROW._replace(**change))
