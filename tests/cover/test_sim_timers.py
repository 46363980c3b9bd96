"""Deadlines of a rank: in order, cancelled, started again, and moved by the wall clock where they look at it."""

from __future__ import annotations

import pytest
from sim_stage import A, B, Stage

from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.ranks.rank import Timers

C = Incarnation(9, 0, 0)


class Clock:
    """Timers of ten and of three seconds, and what rang when."""

    def __init__(self) -> None:
        self.stage = Stage()
        self.rung: list[tuple[float, Incarnation, str]] = []
        self.timers = Timers(self.stage.world, {"long": 10.0, "short": 3.0}, self._fire)

    def _fire(self, incarnation: Incarnation, name: str) -> None:
        self.rung.append((round(self.stage.world.now, 6), incarnation, name))

    def until(self, t: float) -> None:
        self.stage.until(t)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_timers_ring_once_in_order_of_their_deadlines(clock: Clock) -> None:
    clock.timers.arm(A, "long")
    clock.timers.arm(B, "short")
    clock.until(1)
    clock.timers.arm(C, "long")
    clock.timers.arm(A, "short")
    assert clock.timers.armed() == 4
    clock.until(100)
    assert clock.rung == [(3, B, "short"), (4, A, "short"), (10, A, "long"), (11, C, "long")]
    assert clock.timers.armed() == 0


def test_timers_of_one_moment_ring_in_the_order_in_which_they_were_armed(clock: Clock) -> None:
    for incarnation in (C, A, B):
        clock.timers.arm(incarnation, "long")
    clock.until(100)
    assert clock.rung == [(10, C, "long"), (10, A, "long"), (10, B, "long")]


def test_a_cancelled_timer_does_not_ring_and_holds_nobody_up(clock: Clock) -> None:
    clock.timers.arm(A, "long")
    clock.timers.arm(A, "short")
    clock.until(1)
    clock.timers.arm(B, "long")
    clock.timers.cancel(A, "long")
    clock.timers.cancel(B, "short")  # never armed
    clock.until(100)
    assert clock.rung == [(3, A, "short"), (11, B, "long")]


def test_a_timer_that_is_armed_again_starts_again(clock: Clock) -> None:
    clock.timers.arm(A, "long")
    clock.until(4)
    clock.timers.arm(A, "long")
    assert clock.timers.armed() == 1
    clock.until(100)
    assert clock.rung == [(14, A, "long")]


def test_a_timer_that_is_cancelled_and_armed_again_rings_once(clock: Clock) -> None:
    clock.timers.arm(A, "long")
    clock.timers.cancel(A, "long")
    clock.until(5)
    clock.timers.arm(A, "long")
    clock.until(100)
    assert clock.rung == [(15, A, "long")]


def test_a_timer_that_is_armed_again_as_it_rings_holds_no_other_up(clock: Clock) -> None:
    """As the drain timer is, when it quarantines pages: the next room's rings on time, not one duration later."""
    clock.timers.arm(A, "long")
    clock.until(1)
    clock.timers.arm(B, "long")
    heard = clock.timers._fire

    def arms_again(incarnation: Incarnation, name: str) -> None:
        heard(incarnation, name)
        clock.timers.arm(incarnation, name)

    clock.timers._fire = arms_again
    clock.until(32)
    assert clock.rung == [(t + later, who, "long") for t in (10, 20, 30) for later, who in ((0, A), (1, B))]


def test_timers_of_a_dead_process_do_not_ring(clock: Clock) -> None:
    clock.timers.arm(A, "long")
    clock.until(5)
    clock.timers.stopped = True
    clock.until(100)
    assert clock.rung == []


def test_a_timer_that_should_have_rung_is_overdue(clock: Clock) -> None:
    """L5: what the survey counts when a reaper waits for work that never comes."""
    clock.timers.arm(A, "long")
    clock.timers.arm(B, "long")
    clock.timers.cancel(B, "long")
    clock.until(5)
    assert clock.timers.overdue() == 0
    clock.timers.stopped = True
    clock.until(10)
    assert clock.timers.overdue() == 0
    clock.until(11)
    assert clock.timers.overdue() == 1


def test_idle_timers_cost_nothing(clock: Clock) -> None:
    clock.timers.arm(A, "long")
    clock.until(20)
    assert clock.stage.cost(10_000) == 0


@pytest.mark.parametrize("offset_s, rings_at", [(4.0, 6.0), (100.0, 2.0), (-5.0, 15.0)])
def test_a_jump_of_the_wall_clock_moves_timers_that_run(clock: Clock, offset_s: float, rings_at: float) -> None:
    """PROTOCOL 17.5: a timer that compares time.time() rings early when the clock is set forward."""
    clock.timers.arm(A, "long")
    clock.until(2)
    clock.timers.jump(offset_s)
    clock.until(100)
    assert clock.rung == [(rings_at, A, "long")]
    assert clock.timers.overdue() == 0


@pytest.mark.parametrize("offset_s", [5.0, -5.0])
def test_a_timer_that_is_armed_after_a_jump_runs_its_whole_time(clock: Clock, offset_s: float) -> None:
    """The clock was wrong before and after it: a deadline is an offset from what it says now."""
    clock.timers.arm(A, "long")
    clock.until(2)
    clock.timers.jump(offset_s)
    clock.timers.arm(B, "long")
    clock.until(100)
    assert sorted(clock.rung) == sorted([(10.0 - offset_s, A, "long"), (12.0, B, "long")])
    assert clock.timers.overdue() == 0


def test_a_timer_that_is_armed_after_the_clock_was_set_back_does_not_wait_for_a_late_ring(clock: Clock) -> None:
    clock.timers.arm(A, "long")
    clock.timers.jump(-60.0)
    clock.until(6)
    clock.timers.cancel(A, "long")
    clock.timers.arm(B, "long")
    clock.until(100)
    assert clock.rung == [(16.0, B, "long")]
