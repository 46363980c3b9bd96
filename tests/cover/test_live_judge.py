"""A cluster judged while it runs: traces that grow are merged, and what breaks is told once, as early as it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zmq")

from kvpoll.live_judge import LiveJudge
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import NodeStarted, NodeStopped, Reserved, Stepped, encode
from kvpoll.spec.vocabulary import Incarnation

BOUNDS = load().bounds


class Trace:
    """What one process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text('{"kvpoll_trace": 1}\n')

    def write(self, *events: Any, end: str = "\n") -> None:
        with self.path.open("a") as file:
            file.write("\n".join(map(encode, events)) + end)


@pytest.fixture
def judge() -> LiveJudge:
    return LiveJudge(BOUNDS)


def reserved(t: float, room: int) -> Reserved:
    return Reserved(t, "D0", "kv", Incarnation(room, 0, 0), (5,))


def test_what_breaks_is_told_when_it_is_judged_and_once(judge: LiveJudge, tmp_path: Path) -> None:
    trace = Trace(tmp_path / "D0")
    trace.write(reserved(1.0, 1), reserved(2.0, 2))
    assert judge.look([trace.path], 1.5) == []
    (violated,) = judge.look([trace.path], 3.0)
    assert (violated.invariant, violated.t, violated.node) == ("S8", 2.0, "D0")
    assert judge.look([trace.path], 4.0) == []
    assert judge.watch.counts == {"S8": 1} and judge.late == 0


def test_two_traces_are_judged_in_order_of_time(judge: LiveJudge, tmp_path: Path) -> None:
    """The launcher knows of the death; what the dead one held is not held against its next life."""
    launcher, first, second = (Trace(tmp_path / name) for name in ("L", "D0.0", "D0.1"))
    second.write(NodeStarted(3.0, "D0", 1), reserved(4.0, 2))
    first.write(reserved(1.0, 1))
    launcher.write(NodeStopped(2.0, "D0", 0))
    assert judge.look([second.path, first.path, launcher.path], 5.0) == []
    assert judge.watch.counts == {}


def test_a_line_that_is_cut_waits_and_one_that_is_late_is_judged_as_it_comes(judge: LiveJudge, tmp_path: Path) -> None:
    one, other = Trace(tmp_path / "D0"), Trace(tmp_path / "R")
    one.write(reserved(1.0, 1))
    other.write(NodeStarted(5.0, "P0", 0))
    judge.look([one.path, other.path], 6.0)
    one.write(reserved(2.0, 2), end="")
    assert judge.look([one.path, other.path], 7.0) == []
    one.write(end="\n")
    (violated,) = judge.look([one.path, other.path], 7.0)
    assert (violated.invariant, violated.t, judge.late) == ("S8", 2.0, 1)


def test_a_bound_is_judged_although_nothing_more_happens(judge: LiveJudge, tmp_path: Path) -> None:
    """L2: nobody writes a line when nothing happens."""
    trace = Trace(tmp_path / "both")
    steps = [("P0", "sender", "Bootstrapping", 1.0), ("D0", "receiver", "Bootstrapping", 1.0)]
    own = Incarnation(7, 0, 0)
    empty: tuple[Any, ...] = ("Unreserved", "Unreserved", None, ())
    trace.write(*(Stepped(t, n, r, own, "RequestOpened", own, None, "Absent", p, *empty) for n, r, p, t in steps))
    trace.write(Stepped(2.0, "D0", "receiver", own, "AbortRequested", own, None, "Bootstrapping", "Failed", *empty))
    assert judge.look([trace.path], 2.0 + BOUNDS.propagate_s) == []
    (violated,) = judge.look([trace.path], 2.1 + BOUNDS.propagate_s)
    assert (violated.invariant, violated.node) == ("L2", "P0")
