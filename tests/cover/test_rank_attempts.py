"""What decode says of the next attempt at a room, while prefill has not cleared the last one."""

from __future__ import annotations

from sim_stage import A, Stage

from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.ranks.host import Destination
from kvpoll.statemachine.ranks.sender import EARLY_MAX

NEXT = Incarnation(A.room, 1, 0)


def publish(rank: object, who: Incarnation) -> None:
    rank.receive("Metadata", who, Destination("D0", who, 0, (1, 2), 0), 1)  # type: ignore[attr-defined]


def test_it_waits_until_the_room_is_over_and_is_not_lost() -> None:
    """It used to be dropped: both sides waited for their timers, 120 s under reference."""
    stage = Stage()
    rank = stage.cluster().rank("P0")
    rank.deliver("RequestOpened", A, 1)
    publish(rank, NEXT)
    assert (rank.rooms[A.room].incarnation, rank.rooms[A.room].local.poll) == (A, "Bootstrapping")
    assert rank.destinations == {}
    rank.deliver("AbortRequested", A, "client_left")
    rank.deliver("Cleared", A)
    stage.until(1.1)
    assert (rank.rooms[A.room].incarnation, rank.rooms[A.room].local.poll) == (NEXT, "Announced")
    rank.deliver("RequestOpened", NEXT, 1)
    assert rank.rooms[A.room].local.poll == "WaitingForInput"
    assert stage.world.marks["attempt_ahead"] == 1


def test_what_a_stranger_says_of_attempts_to_come_is_bounded() -> None:
    rank = Stage().cluster().rank("P0")
    rank.deliver("RequestOpened", A, 1)
    for attempt in range(1, EARLY_MAX + 10):
        publish(rank, Incarnation(A.room, attempt, 0))
    assert sum(map(len, rank._early.values())) == EARLY_MAX


def test_under_bare_room_numbers_there_is_no_next_attempt() -> None:
    rank = Stage(profile="sglang-0.5.23").cluster().rank("P0")
    rank.deliver("RequestOpened", A, 1)
    publish(rank, NEXT)
    assert rank.rooms[A.room].local.poll == "WaitingForInput"
