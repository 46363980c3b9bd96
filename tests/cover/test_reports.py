"""Figures: what is read from a trace is tested by value, what is drawn is tested to be a figure at all."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.reports import (
    Panel,
    bars,
    draw,
    draw_gauge,
    draw_success_curve,
    gauge_row,
    gauge_series,
    pick_focus,
    story,
    style,
    warp,
    wilson,
)
from kvpoll.reports.reading import Arrow, Bar, arrows, axes_of, findings, lane_order, lanes
from kvpoll.spec import trace
from kvpoll.spec.vocabulary import Incarnation

QUEUE = "num_prefill_bootstrap_queue_reqs"


class Scribe:
    """Writes a trace by hand, one line a thing that happened, and keeps it in order of time."""

    def __init__(self, room: int = 77, attempt: int = 0) -> None:
        self.room, self.attempt = room, attempt
        self.events: list[Any] = []
        self._serial = count(1)
        self._write = count(1)
        self._poll: dict[str, str] = {}
        self._lease: dict[str, str] = {}

    @property
    def who(self) -> Incarnation:
        return Incarnation(self.room, self.attempt, 0)

    @property
    def pair(self) -> tuple[int, int]:
        return (self.room, self.attempt)

    def add(self, *events: Any) -> None:
        self.events += events

    def step(self, t: float, node: str, fact: str, poll: str | None = None, lease: str | None = None) -> None:
        was, held = self._poll.get(node, "Absent"), self._lease.get(node, "Unreserved")
        self._poll[node], self._lease[node] = poll or was, lease or held
        role = "sender" if node.startswith("P") else "receiver"
        self.add(
            trace.Stepped(
                t, node, role, self.who, fact, self.who, None, was, poll or was, held, lease or held, None, ()
            )
        )

    def message(self, t: float, node: str, to: str, kind: str, took_s: float = 0.002, lost: bool = False) -> None:
        serial = next(self._serial)
        self.add(trace.Sent(t, node, to, kind, self.who, serial))
        ending = trace.Lost if lost else trace.Delivered
        self.add(ending(t + took_s, to, node, kind, self.who, serial))

    def request(self, t: float, node: str, route: str, status: int | str, took_s: float = 0.004) -> None:
        self.add(trace.Requested(t, node, "B0", route, 0))
        self.add(trace.Answered(t + took_s, node, "B0", route, status))

    def write(self, t: float, node: str, to: str, chunk: int, last: bool = False, ok: bool = True) -> None:
        write, took_s = next(self._write), 0.02
        pages = (4 * chunk, 4 * chunk + 1)
        self.add(
            trace.WritePosted(t, node, write, self.who, to, chunk, last, pages, pages, 0 if last else None),
            trace.WriteLanded(t + took_s, to, write, self.who, pages),
            trace.WriteSettled(t + took_s + 0.001, node, write, ok),
        )

    def done(self) -> list[Any]:
        return sorted(self.events, key=lambda event: event.t)


def happy(prefill: tuple[str, ...] = ("P0",), decode: tuple[str, ...] = ("D0",), setup: bool = True) -> Scribe:
    """One request from admission to retirement, with nothing going wrong."""
    s = Scribe()
    nodes = (*prefill, *decode)
    s.add(*(trace.NodeStarted(0.0, node, 0) for node in ("R", "B0", *nodes)))
    if setup:
        for place, rank in enumerate(prefill):
            s.request(0.02 + place * 0.001, rank, "PUT /route", 200)
    s.add(trace.Admitted(0.100, "R", "req-1", s.pair, prefill, decode))
    for rank in prefill:
        s.step(0.104, rank, "RequestOpened", "Bootstrapping")
        s.add(trace.Queued(0.104, rank, QUEUE, "req-1", 1))
    for place, rank in enumerate(decode):
        skew = place * 0.0006
        s.step(0.105 + skew, rank, "RequestOpened", "Bootstrapping")
        s.request(0.106 + skew, rank, "GET /route", 200)
        s.step(0.110 + skew, rank, "RouteResolved", "WaitingForInput")
        s.step(0.114 + skew, rank, "PagesReserved", lease="Reserved")
        s.add(trace.Reserved(0.114 + skew, rank, "kv", s.who, (0, 1, 4, 5)))
        s.step(0.116 + skew, rank, "MetadataSent", lease="Exposed")
        for peer in prefill:
            s.message(0.116 + skew, rank, peer, "Metadata")
    for place, rank in enumerate(prefill):
        skew = place * 0.05
        s.step(0.120, rank, "DestinationRegistered", "WaitingForInput", "Reserved")
        s.add(trace.Queued(0.122, rank, QUEUE, "req-1", -1), trace.Decided(0.122, rank, "pp", "req-1", "admit"))
        s.add(trace.CollectiveEntered(0.121, rank, "P0", 1, "min", 1))
        for chunk, begin in ((0, 0.25), (1, 0.40)):
            t = begin + skew
            s.add(trace.Computed(t, rank, s.who, chunk))
            s.step(t, rank, "WritePosted", "Transferring", "Exposed")
            for peer in decode:
                s.write(t, rank, peer, chunk, last=chunk == 1)
        s.step(0.421 + skew, rank, "WriteCompleted", "Success", "Released")
        for peer in decode:
            s.message(0.422 + skew, rank, peer, "Status: Success")
        s.step(0.430 + skew, rank, "Cleared", "Retired")
    end = 0.44 + 0.05 * (len(prefill) - 1)
    for rank in decode:
        s.step(end - 0.01, rank, "StatusReceived", "Success", "Settled")
        s.add(trace.Committed(end, rank, s.who, prefill, (), s.pair))
        s.step(end + 0.001, rank, "Cleared", "Retired")
    s.add(trace.Resulted(end + 0.02, "R", "req-1", s.pair, True, None, 0.36))
    return s


STAGES = tuple(f"P0/pp{stage}" for stage in range(4))


def aborted_pipeline() -> Scribe:
    """PP=4: the client aborts while everybody waits for decode, which was slow to find its way."""
    s = Scribe()
    s.add(trace.Admitted(1.0, "R", "req-1", s.pair, STAGES, ("D0",)))
    for place, stage in enumerate(STAGES):
        s.step(1.004 + place * 0.001, stage, "RequestOpened", "Bootstrapping")
        s.add(trace.Queued(1.004 + place * 0.001, stage, QUEUE, "req-1", 1))
    s.step(1.005, "D0", "RequestOpened", "Bootstrapping")
    s.request(1.006, "D0", "GET /route", 404)
    s.request(1.206, "D0", "GET /route", 200)
    s.step(1.212, "D0", "RouteResolved", "WaitingForInput", "Reserved")
    s.add(trace.FaultBegan(1.3, "P0/pp2", "f1", "delay", ()), trace.FaultEnded(1.9, "P0/pp2", "f1", "delay"))
    s.add(trace.FaultBegan(1.35, "R", "f2", "client_abort", ()))
    s.add(trace.FaultEnded(1.35, "R", "f2", "client_abort"))
    s.message(1.352, "R", "P0/pp0", "Abort")
    s.message(1.352, "R", "D0", "Abort")
    s.step(1.354, "P0/pp0", "AbortRequested", "Failed", "Released")
    s.step(1.354, "D0", "AbortRequested", "Failed", "Draining")
    return s


def stuck_pipeline() -> Scribe:
    """Stages 2 and 3 never hear of the abort and keep the request for ever (sglang#26912)."""
    s = aborted_pipeline()
    s.message(1.360, "P0/pp0", "P0/pp1", "Decision")
    s.step(1.362, "P0/pp1", "DecisionReceived", "Failed", "Released")
    s.add(*(trace.Decided(1.362, stage, "pp", "req-1", "drop") for stage in STAGES[:2]))
    s.message(1.364, "P0/pp1", "P0/pp2", "Decision", 0.3, lost=True)
    for stage in STAGES[:2]:
        s.add(trace.Queued(1.37, stage, QUEUE, "req-1", -1))
        s.step(1.371, stage, "Cleared", "Retired")
    s.message(1.37, "D0", "P0/pp0", "Abort")
    s.step(31.37, "D0", "DeadlineReached", lease="Quarantined")
    s.add(trace.Resulted(1.38, "R", "req-1", s.pair, False, "aborted by client", None))
    for beat in range(298):
        s.add(*(trace.CollectiveEntered(2.0 + beat, stage, "pp", beat, "min", 1) for stage in STAGES))
    s.add(trace.Violated(61.4, "P0/pp2", "L2", s.pair, "pp0 failed at 1.354 s, this stage still waits"))
    s.add(trace.Healed(120.0, "R"))
    text = "1 request is left in num_prefill_bootstrap_queue_reqs, which must be 0 with no traffic"
    s.add(*(trace.Violated(301.4, stage, "R1", s.pair, text) for stage in STAGES[2:]))
    s.add(trace.Violated(301.4, "P0/pp3", "O1", None, "the gauge says 1, the model counts 0"))
    return s


def mended_pipeline() -> Scribe:
    """The same with a decision that names the request and is sent again until it is heard."""
    s = aborted_pipeline()
    for before, stage in pairwise(STAGES):
        t = 1.36 + 0.2 * STAGES.index(before)
        s.message(t, before, stage, "Decision", 0.2)
        s.step(t + 0.2, stage, "DecisionReceived", "Failed", "Released")
    for place, stage in enumerate(STAGES):
        t = 1.37 + 0.2 * place
        s.add(trace.Decided(t, stage, "pp", "req-1", "drop"), trace.Queued(t, stage, QUEUE, "req-1", -1))
        s.step(t + 0.01, stage, "Cleared", "Retired")
    s.message(1.37, "D0", "P0/pp0", "Abort")
    s.message(1.39, "P0/pp0", "D0", "AbortAcknowledged")
    s.step(1.392, "D0", "PeerDrained", lease="Released")
    s.step(1.393, "D0", "Cleared", "Retired")
    s.add(trace.Resulted(1.38, "R", "req-1", s.pair, False, "aborted by client", None))
    return s


def late_write() -> Scribe:
    """Prefill dies after posting; decode gives its pages to room 78, and the write lands there (S1)."""
    s = happy(setup=False)
    s.events = [event for event in s.events if event.t <= 0.26 and not isinstance(event, trace.WriteLanded)]
    other = Incarnation(78, 0, 0)
    s.add(
        trace.NodeStopped(0.262, "P0", 0),
        trace.FaultBegan(0.262, "P0", "f1", "crash", ("D0",)),
        trace.FaultEnded(0.9, "P0", "f1", "crash"),
        trace.NodeStarted(0.9, "P0", 1),
        trace.LoopStopped(0.95, "D0", "listener", "KeyError: 77"),
        trace.WritePosted(0.3, "P1", 99, other, "D0", 0, True, (8, 9), (4, 5), None),
        trace.WriteLanded(0.31, "D0", 99, other, (4, 5)),
        trace.WriteSettled(0.312, "P1", 99, True),
    )
    s.step(0.8, "D0", "PeerDied", "Failed", "Released")
    s.step(0.8, "D0", "Cleared", "Retired")
    s.add(trace.Released(0.8, "D0", "kv", s.who, (0, 1, 4, 5), 8))
    s.add(trace.Violated(0.31, "D0", "S1", (77, 0), "pages 4 and 5 of room 77 were written by room 78"))
    return s


# --- time ------------------------------------------------------------------------------------------

times = st.lists(st.floats(0, 1000).map(lambda t: round(t, 4)), min_size=2, max_size=40, unique=True)


@given(times)
def test_warp_keeps_order_and_fills_the_axis(moments: list[float]) -> None:
    time = warp(moments)
    places = [time(t) for t in sorted(moments)]
    assert (places[0], places[-1]) == (0.0, 1.0)
    assert all(before < after for before, after in pairwise(places))


@given(times)
def test_warp_is_linear_between_neighbours_and_can_be_undone(moments: list[float]) -> None:
    time = warp(moments)
    for before, after in pairwise(sorted(moments)):
        middle = (before + after) / 2
        assert time(middle) == pytest.approx((time(before) + time(after)) / 2)
        assert time.inverse(time(middle)) == pytest.approx(middle)


def test_evenly_spaced_times_give_the_linear_axis() -> None:
    time = warp([10.0, 12.0, 14.0, 16.0, 18.0])
    assert [time(t) for t in (10.0, 11.0, 13.0, 18.0)] == pytest.approx([0, 0.125, 0.375, 1])
    assert time.breaks == ()


def test_a_long_wait_is_cut_and_the_action_before_it_keeps_most_of_the_axis() -> None:
    action = [place * 0.1 for place in range(21)]
    time = warp([*action, 302.0])
    assert time.breaks == ((2.0, 302.0),)
    assert time(2.0) > 0.7
    assert 0.08 < time(302.0) - time(2.0) < 0.3


def test_a_burst_is_stretched_but_the_least_gap_stays_the_smallest() -> None:
    time = warp([0.0, 0.0001, 1.0, 2.0, 3.0, 5.0])
    assert 0.04 < time(0.0001) < time(1.0) - time(0.0001)
    assert time(5.0) - time(3.0) > time(3.0) - time(2.0)


@pytest.mark.parametrize("moments", [[], [3.5], [3.5, 3.5]])
def test_a_single_instant_is_the_middle_of_the_axis(moments: list[float]) -> None:
    assert warp(moments)(3.5) == 0.5


def test_times_outside_are_clamped() -> None:
    time = warp([1.0, 2.0])
    assert (time(0.0), time(9.0)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("t", "beside_s", "words"),
    [
        (301.4, 240.0, "301.4"),
        (1.2, 0.006, "1.2"),
        (1.2041, 0.001, "1.2041"),
        (2.0, 1.0, "2"),
        (100.0, math.inf, "100"),
    ],
)
def test_the_clock_says_what_tells_neighbours_apart(t: float, beside_s: float, words: str) -> None:
    assert style.clock(t, beside_s) == words


def test_panels_share_an_axis_only_while_each_uses_enough_of_it() -> None:
    stuck, mended = story(stuck_pipeline().done()), story(mended_pipeline().done())
    one, other = axes_of([stuck, mended])
    assert one is other

    elsewhere = story([event._replace(t=event.t + 900) for event in mended_pipeline().done()])
    apart = axes_of([mended, elsewhere])
    assert apart[0](mended.end_s) == 1.0 and apart[1](elsewhere.begin_s) == 0.0


# --- lanes, bars, arrows ---------------------------------------------------------------------------


def test_lanes_run_from_router_to_decode_and_count_as_people_do() -> None:
    nodes = ["D0", "P0/dp10", "P0/dp2", "B1", "R", "P0/dp2/tp1", "B0", "D1/tp0"]
    assert sorted(nodes, key=lane_order) == [
        "R",
        "B0",
        "B1",
        "P0/dp2",
        "P0/dp2/tp1",
        "P0/dp10",
        "D0",
        "D1/tp0",
    ]


def test_only_nodes_that_took_part_get_a_lane() -> None:
    s = happy(STAGES, ("D0/tp0", "D0/tp1"))
    stranger = Incarnation(5, 0, 0)
    s.add(trace.Sent(0.2, "D9", "P9", "Metadata", stranger, 900))
    s.add(trace.Requested(0.2, "D9", "B9", "GET /route", 0))
    assert lanes(s.done(), s.pair) == ("R", "B0", *STAGES, "D0/tp0", "D0/tp1")
    assert lanes(s.done(), (5, 0)) == ("B9", "P9", "D9")


def test_whoever_writes_into_our_pages_gets_a_lane() -> None:
    told = story(late_write().done())
    assert told.lanes == ("R", "B0", "P0", "P1", "D0")
    foreign = [arrow for arrow in told.arrows if not arrow.own]
    assert foreign == [Arrow("write", "write of room 78", "P1", "D0", 0.3, 0.31, "arrived", False)]


def test_a_write_into_pages_given_back_before_it_is_not_ours() -> None:
    s = late_write()
    s.events = [event for event in s.events if not isinstance(event, trace.Released)]
    s.add(trace.Released(0.29, "D0", "kv", s.who, (0, 1, 4, 5), 8))
    assert [arrow for arrow in story(s.done()).arrows if not arrow.own] == []


def test_bars_of_a_happy_request() -> None:
    s = happy()
    found = bars(s.done(), s.pair)
    assert [bar[2:] for bar in found if bar.node == "P0" and bar.machine == "poll"] == [
        ("Bootstrapping", 0.104, 0.120),
        ("WaitingForInput", 0.120, 0.25),
        ("Transferring", 0.25, 0.421),
        ("Success", 0.421, 0.430),
        ("Retired", 0.430, 0.46),
    ]
    assert [bar[2:] for bar in found if bar.node == "D0" and bar.machine == "lease"] == [
        ("Reserved", 0.114, 0.116),
        ("Exposed", 0.116, 0.43),
        ("Settled", 0.43, 0.46),
    ]


def test_a_stopped_process_takes_its_states_along() -> None:
    s = late_write()
    mine = [bar for bar in bars(s.done(), s.pair) if bar.node == "P0"]
    assert mine[-2:] == [
        Bar("P0", "poll", "Transferring", 0.25, 0.262),
        Bar("P0", "lease", "Exposed", 0.25, 0.262),
    ]


def test_a_stopped_engine_stops_all_its_ranks() -> None:
    s = happy(STAGES)
    s.events = [event for event in s.events if event.t < 0.2]
    s.add(trace.NodeStopped(0.21, "P0", 0), trace.Healed(0.5, "R"))
    found = bars(s.done(), s.pair)
    assert {bar.end_s for bar in found if bar.state == "WaitingForInput" and bar.node in STAGES} == {0.21}
    assert [bar.end_s for bar in found if bar.state == "WaitingForInput" and bar.node == "D0"] == [0.5]


def test_a_passing_state_is_a_bar_without_length_and_absence_is_none() -> None:
    s = Scribe()
    s.step(1.0, "D0", "RequestOpened", "Bootstrapping")
    s.step(2.0, "D0", "PeerDied", "Failed")
    s.step(2.0, "D0", "Cleared", "Absent")
    assert bars(s.done(), s.pair) == [
        Bar("D0", "poll", "Bootstrapping", 1.0, 2.0),
        Bar("D0", "poll", "Failed", 2.0, 2.0),
    ]


def test_a_state_from_before_the_trace_begins_with_it() -> None:
    s = Scribe()
    s._poll["P0"] = "WaitingForInput"
    s.add(trace.NodeStarted(0.5, "R", 0))
    s.step(2.0, "P0", "WriteFailed", "Failed")
    assert bars(s.done(), s.pair) == [
        Bar("P0", "poll", "WaitingForInput", 0.5, 2.0),
        Bar("P0", "poll", "Failed", 2.0, 2.0),
    ]


def test_messages_are_matched_by_serial_whatever_became_of_them() -> None:
    s = Scribe()
    s.message(1.0, "D0", "P0", "Metadata")
    s.message(1.1, "P0", "D0", "Status", lost=True)
    s.add(trace.Sent(1.2, "D0", "P0", "Abort", s.who, 50))
    s.add(trace.Delivered(1.3, "P0", "D0", "Metadata", s.who, 1))
    s.add(trace.Sent(1.4, "D0", "P0", "Metadata", Incarnation(77, 3, 0), 51), trace.Healed(2.0, "R"))
    assert arrows(s.done(), s.pair) == [
        Arrow("message", "Metadata", "D0", "P0", 1.0, 1.002, "arrived"),
        Arrow("message", "Metadata", "D0", "P0", 1.0, 1.3, "arrived"),
        Arrow("message", "Status", "P0", "D0", 1.1, 1.102, "lost"),
        Arrow("message", "Abort", "D0", "P0", 1.2, 2.0, "pending"),
        Arrow("message", "Metadata (attempt 3)", "D0", "P0", 1.4, 2.0, "pending", False),
    ]


def test_requests_meet_their_answers_in_order() -> None:
    s = Scribe()
    s.add(*(trace.Requested(t, "D0", "B0", "GET /route", place) for place, t in enumerate((1.0, 1.1, 1.8))))
    s.add(trace.Answered(1.2, "D0", "B0", "GET /route", 503))
    s.add(trace.Answered(1.7, "D0", "B0", "GET /route", "timeout"))
    found = [(arrow.begin_s, arrow.end_s, arrow.label, arrow.outcome) for arrow in arrows(s.done(), s.pair)]
    assert found == [
        (1.0, 1.2, "GET /route 503", "failed"),
        (1.1, 1.7, "GET /route timeout", "lost"),
        (1.8, 1.8, "GET /route unanswered", "pending"),
    ]


def test_writes_end_where_they_land_and_fail_where_they_settle() -> None:
    s = Scribe()
    s.write(1.0, "P0", "D0", 0)
    s.write(2.0, "P0", "D0", 1, last=True, ok=False)
    s.add(trace.WritePosted(3.0, "P0", 40, s.who, "D0", 2, False, (1,), (1,), None))
    found = [(arrow.label, arrow.begin_s, arrow.end_s, arrow.outcome) for arrow in arrows(s.done(), s.pair)]
    assert found == [
        ("chunk 0", 1.0, 1.02, "arrived"),
        ("chunk 1, last", 2.0, pytest.approx(2.021), "failed"),
        ("chunk 2", 3.0, 3.0, "pending"),
    ]


# --- the story of a request ------------------------------------------------------------------------


def test_the_story_follows_the_violating_request() -> None:
    ours, other = stuck_pipeline(), Scribe(room=3)
    other.add(trace.Admitted(0.5, "R", "req-0", other.pair, ("P0/pp0",), ("D0",)))
    events = sorted([*ours.events, *other.events], key=lambda event: event.t)
    assert pick_focus(events) == (77, 0)
    assert pick_focus(other.done()) == (3, 0)
    assert pick_focus([trace.Healed(1.0, "R")]) is None


def test_the_story_of_the_stuck_pipeline() -> None:
    told = story(stuck_pipeline().done())
    assert (told.begin_s, told.end_s, told.healed_s) == (1.0, 301.4, 120.0)
    assert [(e.invariant, e.node) for e in told.violations] == [
        ("L2", "P0/pp2"), ("R1", "P0/pp2"), ("R1", "P0/pp3"), ("O1", "P0/pp3"),
    ]  # fmt: skip
    assert [(f.kind, f.struck, f.begin_s, f.end_s) for f in told.faults] == [
        ("delay", ("P0/pp2",), 1.3, 1.9),
        ("client_abort", ("R",), 1.35, 1.35),
    ]
    assert [m.node for m in told.marks if m.kind == "agreed: drop"] == ["P0/pp0", "P0/pp1"]
    assert len(told.beats) == 4 * 298 and all(beat.agrees for beat in told.beats)
    assert len(told.anchors) < 60


def test_a_collective_of_unlike_shape_is_seen_on_every_rank() -> None:
    s = happy(("P0/tp0", "P0/tp1"))
    s.add(trace.CollectiveEntered(0.2, "P0/tp0", "tp", 7, "min", 3))
    s.add(trace.CollectiveEntered(0.2, "P0/tp1", "tp", 7, "min", 2))
    unlike = [(beat.node, beat.at_s) for beat in story(s.done()).beats if not beat.agrees]
    assert unlike == [("P0/tp0", 0.2), ("P0/tp1", 0.2)]


def test_a_fault_of_an_engine_strikes_its_ranks_and_cuts_off_its_peers() -> None:
    s = happy(STAGES)
    s.add(trace.FaultBegan(0.2, "P0", "f", "partition", ("D0",)))
    s.add(trace.FaultBegan(0.3, "network", "g", "reorder", ()))
    cut, everywhere = story(s.done()).faults
    assert (cut.struck, cut.severed) == (STAGES, ("D0",))
    assert (cut.begin_s, cut.end_s) == pytest.approx((0.2, 0.61))
    assert everywhere.struck == ("R", "B0", *STAGES, "D0")


def test_a_heartbeat_through_a_long_wait_is_shown_by_its_first_and_last_try() -> None:
    s = happy()
    for beat in range(100):
        s.request(0.2 + beat * 0.002, "D0", "GET /health", 200)
    told = story(s.done())
    assert [round(a.begin_s, 3) for a in told.arrows if a.label == "GET /health 200"] == [0.2, 0.398]
    assert told.begin_s == 0.1, "set-up long before the request is left out once there is much of it"


def test_findings_count_what_is_alike() -> None:
    s = Scribe()
    s.add(trace.Admitted(0.0, "R", "r", s.pair, ("P0",), ("D0",)))
    s.add(*(trace.Violated(1.5 + place, "P0", "S3", s.pair, "moved after Failed") for place in range(3)))
    s.add(*(trace.Violated(9.0, f"P{place}", "R1", None, "not empty") for place in range(7)))
    lines = findings(story(s.done()))
    assert lines[0] == "S3 at 1.5 s, P0: moved after Failed (and 2 more)"
    assert len(lines) == 7 and lines[-1] == "and 2 more"


# --- gauges and curves -----------------------------------------------------------------------------


def test_gauge_series_of_a_queue() -> None:
    series = gauge_series(stuck_pipeline().done(), QUEUE)
    assert list(series) == list(STAGES)
    assert series["P0/pp0"] == ([1.0, 1.004, 1.37, 301.4], [0, 1, 0, 0])
    assert series["P0/pp3"] == ([1.0, pytest.approx(1.007), 301.4], [0, 1, 1])
    assert gauge_series(stuck_pipeline().done(), "num_decode_prealloc_queue_reqs") == {}
    assert gauge_series([], QUEUE) == {}


def test_a_stopped_process_loses_its_queue() -> None:
    events = [
        trace.Queued(1.0, "P0/pp0", QUEUE, "a", 1),
        trace.Queued(1.0, "P0/pp0", QUEUE, "b", 1),
        trace.NodeStopped(2.0, "P0", 0),
        trace.Queued(3.0, "P0/pp0", QUEUE, "c", 1),
    ]
    assert gauge_series(events, QUEUE) == {"P0/pp0": ([1.0, 2.0, 3.0], [2, 0, 1])}


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (0, 0, 0, 1),
    ],
)
def test_wilson_interval_numbers(successes: int, total: int, low: float, high: float) -> None:
    """81 of 263 is the worked example of Newcombe (Statistics in Medicine 17, 1998), method 3."""
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {total} is not a proportion"):
        wilson(successes, total)


# --- figures ---------------------------------------------------------------------------------------


def size_of(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.fixture
def race() -> list[Panel]:
    return [
        Panel("Before", "profile before-sglang-27028", stuck_pipeline().done()),
        Panel("Mended", "profile reference", mended_pipeline().done()),
    ]


def test_a_race_is_drawn_before_and_mended_with_its_gauge(tmp_path: Path, race: list[Panel]) -> None:
    drawn = draw(race, tmp_path / "race.png", "sglang#26912", extra=[gauge_row(QUEUE)])
    width, height = size_of(drawn)
    assert width == 1650 and 1200 < height < 1900
    assert drawn.stat().st_size > 60_000
    without = draw(race, tmp_path / "plain.png", "sglang#26912")
    assert height - size_of(without)[1] == round(134 / 72 * 150)


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    panels = [Panel("Before", "", late_write().done())]
    for suffix in (".png", ".svg"):
        one, other = (draw(panels, tmp_path / f"{name}{suffix}", "S1").read_bytes() for name in "ab")
        assert one == other
    assert b"Software" not in (tmp_path / "a.png").read_bytes()


def test_more_lanes_make_a_higher_figure(tmp_path: Path) -> None:
    ranks = tuple(f"D0/tp{rank}" for rank in range(4))
    small = draw([Panel("", "", happy().done())], tmp_path / "small.png", "1P1D")
    large = draw([Panel("", "", happy(decode=ranks).done())], tmp_path / "large.png", "TP=4")
    assert size_of(large)[1] - size_of(small)[1] >= 3 * 46 / 72 * 150 - 1


def test_a_trace_survives_the_way_through_its_file(tmp_path: Path) -> None:
    events = late_write().done()
    file = io.StringIO("\n".join(['{"kvpoll_trace": 1}', *map(trace.encode, events)]))
    again = list(trace.read_trace(file, "late.jsonl")[1])
    assert story(again) == story(events)


def test_a_trace_without_requests_is_drawn_as_such(tmp_path: Path) -> None:
    drawn = draw([Panel("Empty", "", [trace.Healed(1.0, "R")])], tmp_path / "empty.png", "nothing")
    assert size_of(drawn)[0] == 1650


def test_names_that_the_palette_does_not_know_are_neutral_and_still_drawn(tmp_path: Path) -> None:
    s = happy()
    s.step(0.455, "D0", "Odd", "Parked", "Pinned")
    assert style.poll_look("Parked") == style.neutral_look("Parked")
    assert style.poll_look("Absent") is None and style.lease_look("Unreserved") is None
    assert ("poll", "Parked") in {(bar.machine, bar.state) for bar in bars(s.done(), s.pair)}
    assert draw([Panel("", "", s.done())], tmp_path / "odd.png", "unknown names").stat().st_size > 20_000


def test_gauges_and_curves_are_files_too(tmp_path: Path) -> None:
    draw_gauge(tmp_path / "gauge.png", gauge_series(stuck_pipeline().done(), QUEUE), QUEUE)
    draw_gauge(tmp_path / "empty.png", {}, QUEUE)
    points = {
        "before": [(0.0, 20, 20), (1.0, 3, 20)],
        "reference": [(0.0, 20, 20), (1.0, 20, 20), (2.0, 0, 0)],
    }
    draw_success_curve(points, tmp_path / "curve.png", "aborts a second", "requests that ended well")
    assert size_of(tmp_path / "gauge.png") == (1650, 360)
    assert size_of(tmp_path / "empty.png") == (1650, 360)
    assert size_of(tmp_path / "curve.png") == (1650, 630)
    assert (tmp_path / "gauge.png").read_bytes() != (tmp_path / "empty.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("race.pgn", "try '.png'"),
        ("missing/race.png", "there is no folder"),
        ("race", "figures are .png, .svg or .pdf"),
    ],
)
def test_a_target_that_cannot_be_written_is_named_before_anything_is_drawn(
    tmp_path: Path, race: list[Panel], name: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        draw(race, tmp_path / name, "sglang#26912")
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_without_matplotlib_only_drawing_fails_and_says_what_to_install() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import kvpoll.reports as r; print('read'); r.draw"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "read\n" and "pip install 'kvpoll[reports]'" in ran.stderr.splitlines()[-1]


def test_a_figure_has_one_to_four_panels(tmp_path: Path, race: list[Panel]) -> None:
    for panels in ([], race * 3):
        with pytest.raises(ValueError, match=f"1 to 4 panels side by side, not {len(panels)}"):
            draw(panels, tmp_path / "race.png", "too many")


# --- type, words and room --------------------------------------------------------------------------


def test_long_text_is_wrapped_to_its_width_and_loses_no_word() -> None:
    text = "1 request is left in num_prefill_bootstrap_queue_reqs, which must be 0 with no traffic"
    lines = style.wrapped(text, 150, indent="  ")
    assert len(lines) > 2 and " ".join(line.strip() for line in lines) == text
    assert all(style.text_width_pt(line) <= 150 for line in lines[1:] if "reqs" not in line)
    assert style.wrapped("", 100) == [""]


def test_claimed_room_is_not_given_twice() -> None:
    places = style.Places((0, 0, 100, 100))
    places.claim((0, 0, 50, 100))
    places.cross((60, 0, 60, 100))
    crossed, clear, outside = (55.0, 10.0, 65.0, 20.0), (70.0, 10.0, 80.0, 20.0), (95.0, 10.0, 105.0, 20.0)
    assert not places.free((40, 10, 60, 20)) and not places.free(outside)
    assert places.copy().best([crossed, clear], crossings=9) == clear
    assert places.best([crossed], crossings=0) is None
    assert places.best([crossed], crossings=1) == crossed
    assert places.best([crossed], crossings=1) is None


@pytest.mark.parametrize(
    ("segment", "enters"),
    [
        ((0, 5, 20, 5), True),
        ((0, 0, 20, 20), True),
        ((12, 5, 13, 6), True),
        ((0, 11, 20, 11), False),
        ((5, 0, 5, 20), False),
        ((0, 20, 8, 0), False),
    ],
)
def test_a_segment_knows_whether_it_enters_a_box(segment: style.Segment, enters: bool) -> None:
    assert style.touches(segment, (9.0, 4.0, 15.0, 9.5)) is enters


def test_every_poll_state_has_its_own_colour_and_short_name() -> None:
    looks = [look for look in style.POLL_LOOKS.values() if look is not None]
    assert len({look.fill for look in looks}) == len({look.short for look in looks}) == len(looks) == 7
