"""Page pools run out, hand the newest free page out first, and count what is in quarantine as held."""

from __future__ import annotations

from sim_stage import A, B, Stage

from kvpoll.spec.trace import PageTag, Released, Reserved
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.ranks.pool import Pool


def pool(size: int) -> tuple[Stage, Pool]:
    stage = Stage()
    return stage, Pool(stage.world, "D0", "kv", size)


def test_a_pool_runs_out_and_then_hands_out_nothing() -> None:
    stage, pages = pool(5)
    assert pages.reserve(A, 3) == (2, 3, 4)
    assert pages.reserve(B, 3) is None
    assert (pages.free, pages.held) == ([0, 1], {A.pair: (2, 3, 4)})
    assert pages.reserve(B, 2) == (0, 1)
    assert pages.free == []
    assert [(event.incarnation, event.pages) for event in stage.of(Reserved)] == [(A, (2, 3, 4)), (B, (0, 1))]


def test_what_is_freed_last_is_handed_out_first() -> None:
    """LIFO, so that a page is soon someone else's: reuse bugs show within a request, not within an hour."""
    stage, pages = pool(6)
    pages.reserve(A, 2)
    pages.reserve(B, 2)
    pages.release(A)
    assert pages.reserve(Incarnation(9, 0, 0), 2) == (4, 5)
    pages.release(B)
    assert pages.reserve(Incarnation(9, 1, 0), 3) == (1, 2, 3)
    assert [(event.pages, event.free) for event in stage.of(Released)] == [((4, 5), 4), ((2, 3), 4)]


def test_a_release_of_nothing_is_silent() -> None:
    stage, pages = pool(4)
    pages.reserve(A, 2)
    pages.release(B)
    pages.release(A)
    pages.release(A)
    assert sorted(pages.free) == [0, 1, 2, 3]
    assert len(stage.of(Released)) == 1


def test_pages_belong_to_an_attempt_whatever_the_epoch() -> None:
    """A pool lives as long as its process; what it holds is asked for by (room, attempt)."""
    _, pages = pool(4)
    pages.reserve(A, 1)
    pages.release(A._replace(attempt=1))
    assert A.pair in pages.held
    pages.release(A._replace(epoch=3))
    assert pages.held == {}


def test_quarantined_pages_are_held_until_they_are_released() -> None:
    stage, pages = pool(4)
    pages.reserve(A, 3)
    pages.quarantine(A)
    pages.quarantine(B)
    assert pages.quarantined == {A.pair}
    assert pages.reserve(B, 2) is None
    assert stage.of(Released) == []
    pages.release(A)
    assert pages.quarantined == set()
    assert pages.reserve(B, 4) is not None


def test_a_fault_makes_the_next_reservations_fail_and_says_so() -> None:
    _, pages = pool(4)
    told: list[str] = []
    pages.fail_next, pages.on_failure = 2, lambda: told.append("failed")
    assert [pages.reserve(A, 1), pages.reserve(A, 1)] == [None, None]
    assert pages.reserve(A, 1) == (3,)
    assert told == ["failed", "failed"]


def test_contents_outlive_their_owner() -> None:
    """That is how a stale page is seen as data: what the last owner's writers placed is still there."""
    _, pages = pool(2)
    (page,) = pages.reserve(A, 1) or ()
    tag = PageTag(A.pair, "P0", 0, 0)
    pages.contents[page]["P0"] = tag
    pages.release(A)
    assert pages.reserve(B, 1) == (page,)
    assert pages.contents[page] == {"P0": tag}
