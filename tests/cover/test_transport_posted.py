"""The table of posted writes: two facts that change once each, and in no other way."""

from __future__ import annotations

import pytest

from kvpoll.runtime.transports.interface import DONE, PENDING, Progress, Tag
from kvpoll.runtime.transports.posted import PostedWrites
from kvpoll.spec.vocabulary import Incarnation

TAG = Tag(Incarnation(5, 0, 1), 1)


def table() -> tuple[PostedWrites, list[int]]:
    rings: list[int] = []
    return PostedWrites(lambda: rings.append(1)), rings


def test_a_write_that_nobody_took_up_is_over_with_its_abort() -> None:
    writes, rings = table()
    write = writes.add(TAG, None)
    assert writes.poll(write.handle) == PENDING
    assert not writes.abort(write.handle)
    assert writes.poll(write.handle) == Progress("failed", True, "aborted by its user")
    assert not writes.begin(write) and len(rings) == 1


def test_a_write_under_way_fails_with_its_abort_and_drains_by_the_thread_s_word() -> None:
    writes, rings = table()
    write = writes.add(TAG, None)
    assert writes.begin(write)
    assert writes.abort(write.handle) and write.aborted
    assert writes.poll(write.handle) == Progress("failed", False, "aborted by its user")
    writes.finish(write)  # it had placed everything: too late for done, and proof that it is quiet
    assert writes.poll(write.handle) == Progress("failed", True, "aborted by its user")
    assert len(rings) == 2


def test_what_ended_as_it_was_posted_wakes_whoever_waits_for_it() -> None:
    writes, rings = table()
    assert writes.poll(writes.add_ended(TAG, DONE).handle) == DONE and len(rings) == 1


def test_the_first_reason_stays_and_drained_is_never_taken_back() -> None:
    writes, rings = table()
    write = writes.add(TAG, None)
    writes.begin(write)
    writes.fail(write, "the connection was lost", drained=False)
    writes.fail(write, "another", drained=True)
    writes.fail(write, "a third", drained=False)
    assert writes.poll(write.handle) == Progress("failed", True, "the connection was lost")
    assert len(rings) == 2, "what changes nothing wakes nobody"


def test_done_is_final() -> None:
    writes, _ = table()
    write = writes.add(TAG, None)
    writes.begin(write)
    writes.finish(write)
    writes.fail(write, "late", drained=False)
    assert not writes.abort(write.handle)
    assert writes.poll(write.handle) == DONE


def test_a_forgotten_write_is_kept_until_it_has_drained() -> None:
    writes, _ = table()
    write = writes.add(TAG, None)
    writes.begin(write)
    writes.forget(write.handle)
    writes.fail(write, "lost", drained=False)
    assert len(writes) == 1
    writes.fail(write, "lost", drained=True)
    assert len(writes) == 0
    with pytest.raises(KeyError):
        writes.poll(write.handle)


def test_a_wake_that_raises_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    writes = PostedWrites(lambda: [][0])
    write = writes.add(TAG, None)
    writes.finish(write)
    assert writes.poll(write.handle) == DONE
    assert "wake function" in caplog.text
