"""Monitors run for ever: each holds what is live, and a bounded memory of the past."""

from __future__ import annotations

from typing import Any

from invariant_traces import (
    BOUNDS,
    admitted,
    decided,
    end,
    entered,
    failed,
    incarnation,
    landed,
    opened,
    posted,
    released,
    reserved,
    restored,
    resulted,
    settled,
    severed,
    step,
)

from kvpoll.spec import trace
from kvpoll.spec.invariants import AGREEMENT_WINDOW, REMEMBERED, Recent, judge
from kvpoll.spec.trace import PageTag


def test_debts_are_forgotten_once_told() -> None:
    """What was told at its deadline is neither kept nor told again when a fault ends."""
    events = [
        opened(0, "P0"),
        opened(0, "D0"),
        admitted(0, prefill=("P0",), decode=("D0",)),
        failed(1, "P0"),
        end(4),
        severed(5, "*"),
        restored(6),
        end(500),
    ]
    watch = judge(events, BOUNDS, ["L1", "L2"])
    assert watch.counts == {"L1": 1, "L2": 1}
    assert vars(watch.monitors["L1"])["_endings"] == {}
    assert vars(watch.monitors["L2"])["_owed"] == {}


def test_recent_forgets_its_oldest() -> None:
    """Bounded memory: the oldest entry goes first."""
    recent: Recent[int, str] = Recent(2)
    for number in (1, 2, 3):
        recent.remember(number, "x")
    assert list(recent) == [2, 3]


def test_s4_forgets_after_enough_others() -> None:
    """The memory of cleared rooms is bounded, and that is its limit."""

    def cleared_then_late(others: int) -> dict[str, int]:
        events = [step(0, "P0", (room, 0), "Cleared", "Failed", "Retired") for room in range(others + 1)]
        return judge([*events, opened(1, "P0", (0, 0), "Retired")], BOUNDS, ["S4"]).counts

    assert cleared_then_late(REMEMBERED - 1) == {"S4": 1}
    assert cleared_then_late(REMEMBERED) == {}


def test_s7_compares_within_its_window() -> None:
    """A rank that lags further than the window is not judged, one that lags less is."""

    def lag(decisions: int) -> dict[str, int]:
        events: list[Any] = [decided(0, "P0/pp0", str(number)) for number in range(decisions)]
        events += [entered(0, "D0/tp0", number) for number in range(decisions)]
        events += [decided(1, "P0/pp1", "other"), entered(1, "D0/tp1", 0, "other")]
        return judge(events, BOUNDS, ["S7"]).counts

    assert lag(AGREEMENT_WINDOW) == {"S7": 2}
    assert lag(AGREEMENT_WINDOW + 1) == {}


def request(number: int) -> list[Any]:
    """A whole request that keeps every rule, from admission to empty tables."""
    t, pair = float(number), (number, 0)
    own, one = incarnation(pair), (number % 50,)
    return [
        admitted(t, pair),
        opened(t, "P0", pair),
        opened(t, "D0", pair),
        reserved(t, "D0", pair, *one),
        reserved(t, "D0", pair, *one, pool="aux"),
        step(t, "D0", pair, "PeerResolved", "Bootstrapping", "WaitingForInput"),
        trace.Addressed(t, "D0", own, "P0", 0, 0),
        step(t, "P0", pair, "DestinationRegistered", "Bootstrapping", "WaitingForInput"),
        reserved(t, "P0", pair, *one),
        trace.Computed(t, "P0", own, 0),
        posted(t, number, pair, source=one, target=one, row=one[0]),
        landed(t, number, pair, *one),
        settled(t, number),
        step(t, "P0", pair, "WriteCompleted", "WaitingForInput", "Success"),
        step(t, "D0", pair, "WriteCompleted", "WaitingForInput", "Success"),
        trace.Committed(t, "D0", own, ("P0",), ({"P0": PageTag(pair, "P0", 0, 0)},), pair),
        released(t, "P0", pair, *one, free=50),
        step(t, "P0", pair, "Cleared", "Success", "Absent"),
        resulted(t, True, pair=pair),
        released(t, "D0", pair, *one, free=50),
        released(t, "D0", pair, *one, free=50, pool="aux"),
        step(t, "D0", pair, "Cleared", "Success", "Absent"),
    ]


def test_state_is_dropped_when_requests_are_over() -> None:
    """After a thousand good requests no monitor holds more than its stated memory of the past."""
    watch = judge([event for number in range(1000) for event in request(number)], BOUNDS)
    assert watch.violations == []
    remembered = {
        ("S4", "_cleared"),  # what S4 is for
        ("S11", "_computed"),  # late writes are not early ones
    }
    for ident, monitor in watch.monitors.items():
        for name, state in vars(monitor).items():
            if name in ("bounds", "_totals") or not hasattr(state, "__len__"):
                continue
            if (ident, name) in remembered:
                continue
            live = list(state.values()) if isinstance(state, dict) else list(state)
            held = sum(len(inner) if isinstance(inner, dict | set) else 1 for inner in live)
            limit = int(BOUNDS.end_s) + 1 if name == "_deadlines" else 0
            assert held <= limit, (ident, name, held)
