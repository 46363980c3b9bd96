"""The table of posted writes: two facts that change once each, and in no other way."""

from __future__ import annotations

import pytest

from kvpoll.runtime.transports.interface import DONE, PENDING, Progress, Tag
from kvpoll.runtime.transports.posted import PostedWrites, Write
from kvpoll.spec.vocabulary import Incarnation

TAG = Tag(Incarnation(5, 0, 1), 1)


def table() -> tuple[PostedWrites, list[int]]:
    rings: list[int] = []
    return PostedWrites(lambda: rings.append(1)), rings


def test_a_write_that_nobody_took_up_is_over_with_its_abort() -> None:
    writes, rings = table()
    write = writes.add(Write(TAG))
    assert writes.poll(write.handle) == PENDING
    assert not writes.abort(write.handle)
    assert writes.poll(write.handle) == Progress("failed", True, "aborted by its user")
    assert not writes.begin(write) and len(rings) == 1


def test_a_write_under_way_fails_with_its_abort_and_drains_by_the_thread_s_word() -> None:
    writes, rings = table()
    write = writes.add(Write(TAG))
    assert writes.begin(write)
    assert writes.abort(write.handle) and write.aborted
    assert writes.poll(write.handle) == Progress("failed", False, "aborted by its user")
    writes.finish(write)  # it had placed everything: too late for done, and proof that it is quiet
    assert writes.poll(write.handle) == Progress("failed", True, "aborted by its user")
    assert len(rings) == 2


def test_what_ended_as_it_was_posted_wakes_whoever_waits_for_it() -> None:
    writes, rings = table()
    assert writes.poll(writes.add_ended(TAG, None)) == DONE and len(rings) == 1
    assert writes.poll(writes.add_ended(TAG, "refused")) == Progress("failed", True, "refused") and len(rings) == 2


def test_the_first_reason_stays_and_drained_is_never_taken_back() -> None:
    writes, rings = table()
    write = writes.add(Write(TAG))
    writes.begin(write)
    writes.fail(write, "the connection was lost")
    writes.fail(write, "another", drained=True)
    writes.fail(write, "a third")
    assert writes.poll(write.handle) == Progress("failed", True, "the connection was lost")
    assert len(rings) == 2, "what changes nothing wakes nobody"


def test_done_is_final() -> None:
    writes, _ = table()
    write = writes.add(Write(TAG))
    writes.begin(write)
    writes.finish(write)
    writes.fail(write, "late")
    assert not writes.abort(write.handle)
    assert writes.poll(write.handle) == DONE


def test_a_forgotten_write_is_unknown_and_wakes_nobody() -> None:
    writes, rings = table()
    write = writes.add(Write(TAG))
    writes.begin(write)
    writes.forget(write.handle)
    assert len(writes) == 0
    with pytest.raises(KeyError):
        writes.poll(write.handle)
    writes.fail(write, "lost")
    writes.fail(write, "lost", drained=True)
    assert write.progress == Progress("failed", True, "lost") and rings == []
    assert not writes.abort(write.handle)


def test_a_write_of_several_parts_has_drained_when_the_last_of_them_is_let_go() -> None:
    writes, rings = table()
    write = writes.add(Write(TAG))
    write.holds = 2
    writes.fail(write, "not placed in time")
    assert writes.poll(write.handle) == Progress("failed", False, "not placed in time")
    write.holds = 1
    writes.fail(write, "late")
    assert not writes.poll(write.handle).drained and len(rings) == 1
    write.holds = 0
    writes.fail(write, "late")
    assert writes.poll(write.handle) == Progress("failed", True, "not placed in time") and len(rings) == 2


def test_the_end_of_a_transport_fails_what_is_pending_and_proves_nothing_of_what_is_held() -> None:
    writes, rings = table()
    waiting, held, done = (writes.add(Write(TAG)) for _ in range(3))
    writes.begin(held)
    writes.finish(done)
    writes.fail_all("the transport is closed")
    assert [writes.poll(write.handle).drained for write in (waiting, held, done)] == [True, False, True]
    assert writes.poll(done.handle) == DONE and len(rings) == 2
    writes.fail_all("the transport is closed", drained=True)
    assert writes.poll(held.handle) == Progress("failed", True, "the transport is closed")


def test_a_wake_that_raises_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    writes = PostedWrites(lambda: [][0])
    write = writes.add(Write(TAG))
    writes.finish(write)
    assert writes.poll(write.handle) == DONE
    assert "wake function" in caplog.text
