"""The recorded traces of a real SGLang 0.5.23, where they lie beside the project: three happy runs and one race.

They were recorded through memmove, real Mooncake over TCP and real NIXL. `KVPOLL_SGLANG_TRACES` names the folder
that holds `trace_*.jsonl`; without it, `../shared/sglang_harness` is looked for. Nothing here knows a trace by its
name but for what is expected of it; spoiled copies show that the verdicts are earned.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput
from kvpoll.validation import Asked, Trial, Verdict

HOUSE = Path(__file__).resolve().parents[2]
TRACES = Path(os.environ.get("KVPOLL_SGLANG_TRACES", HOUSE.parent / "shared" / "sglang_harness"))
HAPPY = ("trace_happy_memmove", "trace_happy_mooncake_tcp", "trace_happy_nixl")
LATE = "trace_viol_late_metadata"

Events = list[dict[str, Any]]


def events(name: str) -> Events:
    place = TRACES / f"{name}.jsonl"
    if not place.is_file():
        pytest.skip(f"{place} is not here; KVPOLL_SGLANG_TRACES can name the folder that holds it")
    return [json.loads(line) for line in place.read_text().splitlines()]


def verdict(told: Events, profile: str | None = None) -> Verdict:
    """The verdict on these events in this order, numbered anew."""
    lines = iter([json.dumps({**event, "seq": seq}).encode() for seq, event in enumerate(told)])
    return Trial(load(), Asked(profile=profile), lines, "trace")()


def rules(judged: Verdict) -> dict[str, int]:
    return {change.rule: each.first.line for changes, each in judged.departures.items() for change in changes}


@pytest.mark.parametrize("name", HAPPY)
def test_a_happy_run_is_explained(name: str) -> None:
    judged = verdict(events(name))
    assert judged.holds and not judged.open, judged.first


@pytest.mark.parametrize("name", HAPPY)
def test_reference_says_where_a_happy_run_departs(name: str) -> None:
    told = events(name)
    room = str(told[0]["room"])
    message = next(seq for seq, event in enumerate(told, start=1) if room in event.get("frames", ()))
    cleared = next(seq for seq, event in enumerate(told, start=1) if event["ev"] == "status" and event["to"] is None)
    assert rules(verdict(told, "reference")) == {"identity": message, "clear_leaves": cleared}


def test_late_metadata_violates_s4() -> None:
    told = events(LATE)
    judged = verdict(told)
    assert judged.first is None and list(judged.broken) == ["S4"]
    resurrected = told[judged.broken["S4"].line - 1]
    assert (resurrected["node"], resurrected["frm"], resurrected["to"]) == ("P0", None, "WaitingForInput")
    found = rules(verdict(told, "reference"))
    assert sorted(found, key=lambda rule: found[rule]) == ["clear_leaves", "identity", "early_destination"]


@pytest.mark.parametrize("name", HAPPY)
def test_no_put_can_be_left_out_but_the_last(name: str) -> None:
    """A status line that is missing shows at the next one of its room, if there is one."""
    told = events(name)
    puts = [place for place, event in enumerate(told) if event["ev"] == "status"]
    for place in puts:
        later = [
            other for other in told[place + 1 :] if other["ev"] == "status" and other["node"] == told[place]["node"]
        ]
        judged = verdict(told[:place] + told[place + 1 :])
        same_again = told[place]["frm"] == told[place]["to"]
        assert (judged.first is None) == (not later or same_again), told[place]


@pytest.mark.parametrize("name", HAPPY)
def test_no_put_can_happen_twice(name: str) -> None:
    told = events(name)
    for place, event in enumerate(told):
        if event["ev"] == "status" and event["frm"] != event["to"]:
            judged = verdict(told[: place + 1] + told[place:])
            assert judged.first is not None and judged.first.line == place + 2, event


@pytest.mark.parametrize("name", HAPPY)
def test_cause_and_effect_cannot_change_places(name: str) -> None:
    """Neighbours of which one is the evidence of the other: a message or a call, and the value that it leads to."""
    told = events(name)
    effects = {("conclude_transfer", "status"), ("apply_prefill_status", "status"), ("recv", "status")}
    tried = 0
    for place, (first, second) in enumerate(pairwise(told)):
        if (first["ev"], second["ev"]) in effects and first["node"] == second["node"]:
            judged = verdict([*told[:place], second, first, *told[place + 2 :]])
            assert judged.first is not None, (first, second)
            tried += 1
    assert tried == 3


@pytest.mark.parametrize("name", HAPPY)
def test_lines_out_of_order_are_bad_input(name: str) -> None:
    told = events(name)
    lines = [json.dumps(event).encode() for event in (told[1], told[0], *told[2:])]
    with pytest.raises(BadInput, match="a trace is in order of seq"):
        Trial(load(), Asked(), iter(lines), "trace")()
