"""What counts as done, failed and drained, whatever an engine says or does not say.

The engine here is a script: each test decides when a part lands, is refused or breaks off, which a real engine would
decide by itself (``tests/integration/test_engine_stories.py`` has those).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transport_stage import LIMIT_S, eventually

from kvpoll.runtime.transports.engine_lane import Broken, Lane, Refused
from kvpoll.runtime.transports.engine_writes import WriteBook
from kvpoll.runtime.transports.interface import DONE, PENDING, Progress, Tag
from kvpoll.spec.vocabulary import Incarnation

ROOM = Incarnation(7, 0, 0)
TAG = Tag(ROOM, 1)


class Engine:
    """A carrier whose parts are words: "lands", "stays" (until told), "refused", "broken", "breaks" (later), "stuck"."""

    def __init__(self, opens: str | None = None) -> None:
        self.opens = opens
        self.begun: list[str] = []
        self.given_up: list[str] = []
        self.landed_now: set[str] = set()
        self.free = threading.Event()
        self.closed = threading.Event()

    def open(self) -> None:
        if self.opens is not None:
            raise Refused(self.opens)

    def begin(self, part: Any, tag: Tag) -> str:
        self.begun.append(part)
        word: str = part.partition(" ")[0]
        if word == "refused":
            raise Refused("it will not")
        if word == "broken":
            raise Broken("it gave up")
        if word == "stuck":
            self.free.wait(LIMIT_S)
        return str(part)

    def landed(self, ticket: str) -> bool:
        if ticket in self.landed_now:
            if ticket.startswith("breaks"):
                raise RuntimeError("the peer is gone")
            if ticket.startswith("dies"):
                raise Refused("its process has ended")
            return True
        return ticket.startswith(("lands", "stuck"))

    def give_up(self, ticket: str) -> None:
        self.given_up.append(ticket)

    def close(self) -> None:
        self.closed.set()


class Scene:
    """A book, one lane and its engine."""

    def __init__(self, engine: Engine | None = None, depth: int = 1, deadline_s: float = 3600.0) -> None:
        self.engine = engine or Engine()
        self.woken = 0
        self.book = WriteBook("scripted", self._wake, deadline_s)
        self.lane = Lane(self.book, self.engine, "scripted-lane", depth)

    def _wake(self) -> None:
        self.woken += 1
        raise RuntimeError("a user's mistake that must end no thread")

    def put(self, *parts: str) -> int:
        return self.lane.put(TAG, parts)


@pytest.fixture
def scenes() -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(**options: Any) -> Scene:
        made.append(Scene(**options))
        return made[-1]

    yield make
    for scene in made:
        scene.engine.free.set()
        scene.book.close()


def becomes(scene: Scene, handle: int, wanted: Progress) -> None:
    assert eventually(lambda: scene.book.poll(handle) == wanted)


def test_a_write_is_done_when_its_last_part_has_landed(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    handle = scene.put("lands 1", "stays 2", "lands 3")
    eventually(lambda: scene.engine.begun == ["lands 1", "stays 2"])
    assert scene.book.poll(handle) == PENDING
    scene.engine.landed_now.add("stays 2")
    becomes(scene, handle, DONE)
    assert scene.engine.begun == ["lands 1", "stays 2", "lands 3"]
    assert scene.woken == 1
    assert scene.book.unsettled == 0


def test_an_aborted_write_is_drained_when_what_was_begun_has_landed(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    handle = scene.put("stays 1", "lands 2")
    eventually(lambda: scene.engine.begun == ["stays 1"])
    assert scene.book.abort(handle)
    assert scene.book.poll(handle) == Progress("failed", False, "aborted by its user")
    eventually(lambda: scene.engine.given_up == ["stays 1"])
    scene.engine.landed_now.add("stays 1")
    becomes(scene, handle, Progress("failed", True, "aborted by its user"))
    assert scene.engine.begun == ["stays 1"]  # the second part was never begun
    assert scene.woken == 2


def test_what_the_engine_breaks_off_is_never_drained(scenes: Callable[..., Scene]) -> None:
    scene = scenes(depth=2)
    at_once = scene.put("broken 1")
    becomes(scene, at_once, Progress("failed", False, "it gave up"))
    later = scene.put("breaks 1", "stays 2")
    eventually(lambda: len(scene.engine.begun) == 3)
    scene.engine.landed_now |= {"breaks 1", "stays 2"}
    becomes(scene, later, Progress("failed", False, "RuntimeError: the peer is gone"))
    eventually(lambda: scene.book.unsettled == 2)  # the broken one and the one that broke: for ever
    scene.lane.retire("a newer life")
    assert not scene.engine.closed.wait(0.2)  # an engine must not lose what it may still work on


def test_what_the_engine_refused_is_drained(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    handle = scene.put("lands 1", "refused 2", "lands 3")
    becomes(scene, handle, Progress("failed", True, "it will not"))
    assert scene.engine.begun == ["lands 1", "refused 2"]


def test_a_part_at_rest_by_proof_is_drained_though_not_placed(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    handle = scene.put("dies 1")
    eventually(lambda: scene.engine.begun == ["dies 1"])
    scene.engine.landed_now.add("dies 1")
    becomes(scene, handle, Progress("failed", True, "its process has ended"))


def test_the_deadline_is_ours_even_while_the_engine_holds_the_thread(scenes: Callable[..., Scene]) -> None:
    scene = scenes(deadline_s=0.05)
    held, queued = scene.put("stuck 1"), scene.put("lands 2")
    becomes(scene, held, Progress("failed", False, "not placed after 0.05 s"))
    becomes(scene, queued, Progress("failed", True, "not placed after 0.05 s"))  # nothing of it was begun
    scene.engine.free.set()
    becomes(scene, held, Progress("failed", True, "not placed after 0.05 s"))
    assert scene.engine.begun == ["stuck 1"]


def test_a_failed_part_in_flight_does_not_hold_up_the_next_write(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    first, second = scene.put("stays 1"), scene.put("lands 2")
    eventually(lambda: scene.engine.begun == ["stays 1"])
    assert scene.book.abort(first)
    becomes(scene, second, DONE)
    assert scene.book.poll(first) == Progress("failed", False, "aborted by its user")


def test_a_retired_peer_fails_what_waits_and_watches_what_flies(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    flying, waiting = scene.put("stays 1"), scene.put("lands 2")
    eventually(lambda: scene.engine.begun == ["stays 1"])
    scene.lane.retire("epoch 1 has come")
    assert scene.book.poll(flying) == Progress("failed", False, "epoch 1 has come")
    assert scene.book.poll(waiting) == Progress("failed", True, "epoch 1 has come")
    late = scene.put("lands 3")
    assert scene.book.poll(late) == Progress("failed", True, "epoch 1 has come")
    scene.engine.landed_now.add("stays 1")
    becomes(scene, flying, Progress("failed", True, "epoch 1 has come"))
    assert scene.engine.closed.wait(LIMIT_S)
    assert scene.engine.begun == ["stays 1"]


def test_a_peer_that_cannot_be_opened_fails_its_writes(scenes: Callable[..., Scene]) -> None:
    scene = scenes(engine=Engine(opens="nobody is there"))
    handle = scene.put("lands 1")
    becomes(scene, handle, Progress("failed", True, "the peer cannot be opened: nobody is there"))
    assert scene.book.poll(scene.put("lands 2")).state == "failed"
    assert scene.engine.begun == []


def test_the_writes_of_one_incarnation_can_be_dropped(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    first = scene.put("stays 1")
    other = scene.lane.put(Tag(Incarnation(8, 0, 0), 2), ["lands 2"])
    eventually(lambda: scene.engine.begun == ["stays 1"])
    scene.lane.drop(ROOM, "given up")
    assert scene.book.poll(first) == Progress("failed", False, "given up")
    becomes(scene, other, DONE)


def test_close_fails_what_is_pending_within_two_seconds_though_a_thread_is_held(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    held, queued = scene.put("stuck 1"), scene.put("lands 2")
    eventually(lambda: scene.engine.begun == ["stuck 1"])
    began = time.monotonic()
    scene.book.close()
    assert time.monotonic() - began < 2
    assert scene.book.poll(held) == Progress("failed", False, "the transport is closed")
    assert scene.book.poll(queued) == Progress("failed", True, "the transport is closed")
    assert scene.book.unsettled == 1
    assert scene.book.poll(scene.put("lands 3")) == Progress("failed", True, "the transport is closed")


def test_a_forgotten_write_is_unknown_and_still_settles(scenes: Callable[..., Scene]) -> None:
    scene = scenes()
    handle = scene.put("stays 1")
    eventually(lambda: scene.engine.begun == ["stays 1"])
    scene.book.forget(handle)
    with pytest.raises(KeyError):
        scene.book.poll(handle)
    assert scene.book.unsettled == 1
    scene.engine.landed_now.add("stays 1")
    eventually(lambda: scene.book.unsettled == 0)
    scene.book.forget(handle)  # twice is once
