"""The invariants as values."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from kvpoll.spec.invariants import INVARIANTS


def test_all_ids_and_classes() -> None:
    """The catalogue, pinned: 24 ids, each in its class."""
    classes: dict[str, list[str]] = {}
    for ident, invariant in INVARIANTS.items():
        assert ident == invariant.id
        classes.setdefault(invariant.klass, []).append(ident)
    assert classes == {
        "safety": [f"S{number}" for number in range(1, 13)],
        "liveness": [f"L{number}" for number in range(1, 8)],
        "leak": ["R1", "R2", "R3"],
        "observability": ["O1", "O2"],
    }
    assert len(INVARIANTS) == 24


def test_values_are_complete() -> None:
    """Names are unique, sentences are sentences, monitors know their id, and only L3 has none."""
    assert len({invariant.name for invariant in INVARIANTS.values()}) == 24
    for invariant in INVARIANTS.values():
        assert invariant.sentence.endswith(".")
        assert (invariant.monitor is None) == (invariant.waits_for is not None) == (invariant.id == "L3")
        if invariant.monitor is not None:
            assert invariant.monitor.invariant == invariant.id
            assert (invariant.monitor.__doc__ or "").startswith(f"{invariant.id}. ")
    with pytest.raises(FrozenInstanceError):
        INVARIANTS["S1"].name = "other"  # type: ignore[misc]
