"""SGLang 0.5.23 itself, recorded while it works and judged: the profile that claims to describe it explains it.

Set ``KVPOLL_SGLANG_PYTHON`` to the interpreter of an environment in which sglang 0.5.23 is installed (a CPU build of
torch will do), and ``KVPOLL_SGLANG_TRACES`` to the folder of the recorder (``harness.py``, ``tracer.py``) if that is
not ``../shared/sglang_harness``. Without them everything here skips.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

from kvpoll.spec.protocol import load
from kvpoll.trace_lines import lines_of
from kvpoll.validation import Asked, Trial, Verdict

HOUSE = Path(__file__).resolve().parents[2]
HARNESS = Path(os.environ.get("KVPOLL_SGLANG_TRACES", HOUSE.parent / "shared" / "sglang_harness"))
SCRIPT = Path(__file__).parent / "sglang_validate" / "requests_and_aborts.py"
REQUESTS = 30


@functools.cache
def recorded(folder: Path, rooms: str) -> Path:
    """A trace of real requests; ``rooms``: "unique", or "reused" for one room number throughout."""
    python = os.environ.get("KVPOLL_SGLANG_PYTHON")
    if not python:
        pytest.skip("KVPOLL_SGLANG_PYTHON does not name an interpreter with sglang 0.5.23")
    if not (HARNESS / "tracer.py").is_file():
        pytest.skip(f"{HARNESS} holds no recorder; KVPOLL_SGLANG_TRACES can name the folder that does")
    place = folder / f"{rooms}.jsonl"
    words = [python, str(SCRIPT), str(HARNESS), "7", str(REQUESTS), rooms, str(place)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert place.is_file(), f"exit {done.returncode}: {done.stderr[-2000:]}"
    return place


def verdict(place: Path, profile: str | None = None) -> Verdict:
    lines, _, _ = lines_of(str(place))
    return Trial(load(), Asked(profile=profile), lines, str(place))()


@pytest.mark.parametrize("rooms", ["unique", "reused"])
def test_sglang_is_explained_by_the_profile_of_its_name(rooms: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Aborts at every state, decode before prefill, late metadata; and one room number used thirty times over."""
    place = recorded(tmp_path_factory.getbasetemp(), rooms)
    judged = verdict(place)
    assert judged.first is None, judged.first
    assert judged.steps > REQUESTS * 4


def test_an_abort_after_success_is_seen_and_reference_forbids_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = recorded(tmp_path_factory.getbasetemp(), "unique")
    assert "S3" in verdict(place).broken
    rules = {change.rule for changes in verdict(place, "reference").departures for change in changes}
    assert rules >= {"identity", "clear_leaves", "success_is_final"}
