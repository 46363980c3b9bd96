"""The watch: whom it subscribes, what it records, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from invariant_traces import BOUNDS, A, B, admitted, announced, end, failed, found, opened, surveyed

from kvpoll.spec import trace
from kvpoll.spec.invariants import INVARIANTS, RECORDED, InvariantError, Monitor, Watch, judge
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import Stream, Violated


def emitter(only: Iterable[str] | None = None) -> tuple[Stream, Watch, Callable[[Any], None]]:
    stream = Stream()
    return stream, Watch(stream, BOUNDS, only), stream.emit


def test_watch_subscribes_only_to_what_it_needs() -> None:
    """An event that no chosen monitor handles costs its producer one look."""
    stream, watch, _ = emitter(["S10"])
    wanted = {cls.__name__ for cls in trace.EVENTS.values() if stream.wants(cls)}
    assert wanted == {"IllegalFactRaised", "LoopStopped"}
    assert list(watch.monitors) == ["S10"]


def test_watch_of_everything_has_23_monitors() -> None:
    """L3 waits for a protocol that could break it."""
    _, watch, _ = emitter()
    assert list(watch.monitors) == [ident for ident in INVARIANTS if ident != "L3"]
    assert not emitter(["L3"])[1].monitors


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("s1", "(did you mean 'S1'?)"),
        ("L77", "(did you mean 'L7'?)"),
        ("zzzz", "(valid: L1, L2, L3, L4, L5, L6, L7, O1, O2, R1, R2, R3, ...)"),
    ],
)
def test_wrong_id_is_told_with_the_nearest(name: str, mend: str) -> None:
    """Bad input gives one clear line with the mend."""
    with pytest.raises(InvariantError) as caught:
        Watch(Stream(), BOUNDS, ["S2", name])
    assert str(caught.value) == f"{name!r} is not an invariant {mend}"
    assert isinstance(caught.value, BadInput)


def test_violations_are_emitted_once_each() -> None:
    """The first of each (invariant, pair, node) is kept and emitted; all are counted."""
    stream, watch, emit = emitter(["L6"])
    heard: list[Violated] = []
    stream.subscribe(Violated, heard.append)
    for t in range(3):
        emit(trace.Stalled(t, "D0", 9.0, "P0"))
    emit(trace.Stalled(3, "D1", 9.0, "P0"))
    assert found(watch) == [("L6", 0, "D0", None), ("L6", 3, "D1", None)]
    assert heard == watch.violations
    assert watch.counts == {"L6": 4}
    assert watch.first == {"L6": heard[0]}
    assert heard[0].text == "one step waited 9 s for P0 (at most 0.5 s)"


def test_violations_are_capped_for_each_invariant() -> None:
    """A flood of one invariant neither fills the memory nor hides another."""
    _, watch, emit = emitter(["L6", "L5"])
    for number in range(RECORDED + 5):
        emit(trace.Stalled(number, f"D{number}", 9.0, "P0"))
    emit(surveyed(9999, overdue=1))
    assert watch.counts == {"L6": RECORDED + 5, "L5": 1}
    assert len(watch.violations) == RECORDED + 1
    assert watch.violations[-1].invariant == "L5"


def test_deadlines_of_several_monitors_are_told_in_order_of_time() -> None:
    """One long silence, four old debts: they are recorded as they fell due."""
    events = [
        admitted(0),
        opened(0, "P0"),
        opened(0, "D0"),
        trace.Healed(1, "R"),
        admitted(1, B, (), ()),
        failed(60, "P0"),
        announced(61, "P0", (9, 0)),
        end(500),
    ]
    assert found(judge(events, BOUNDS)) == [
        ("L4", 31.0, "R", B),
        ("L2", 62.0, "D0", A),
        ("R2", 71.0, "P0", (9, 0)),
        ("L1", 100.0, "D0", A),
    ]


def test_advance_judges_only_what_time_has_passed() -> None:
    """A deadline may be met exactly on time; it is told once time is past it, and only once."""
    _, watch, emit = emitter(["L1"])
    emit(admitted(0))
    emit(admitted(5, B))
    watch.advance(100.0)
    assert found(watch) == []
    assert watch.monitors["L1"].due == 100.0
    watch.advance(100.5)
    assert found(watch) == [("L1", 100.0, "P0", A), ("L1", 100.0, "D0", A)]
    assert watch.monitors["L1"].due == 105.0
    watch.advance(101.0)
    watch.finish(105.0)
    watch.finish(105.0)
    assert watch.counts == {"L1": 4}
    assert watch.monitors["L1"].due == float("inf")


def test_monitor_without_bound_is_never_due() -> None:
    """Time alone changes nothing for a monitor that has no bound."""
    _, watch, _ = emitter(["S2"])
    watch.advance(1e9)
    watch.monitors["S2"].advance(1e9)
    watch.finish(1e9)
    assert watch.monitors["S2"].due == float("inf")
    assert watch.counts == {}


def test_judge_of_nothing_finds_nothing() -> None:
    """An empty trace holds."""
    assert judge([], BOUNDS).violations == []


def test_judge_reads_a_trace_that_already_names_violations() -> None:
    """What another judge wrote into the trace is no evidence."""
    assert judge([Violated(1, "D0", "L5", None, "old"), surveyed(2)], BOUNDS).violations == []


def test_misspelt_handler_is_refused() -> None:
    """A handler that names no event would silently never run."""
    with pytest.raises(TypeError, match=r"Wrong.on_steped handles no event \(did you mean 'on_stepped'\?\)"):

        class Wrong(Monitor):
            def on_steped(self, event: trace.Stepped) -> None:
                """Never runs."""
