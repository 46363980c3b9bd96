"""The checks that every transport must pass, as one class of pytest tests.

Derive a class whose name begins with ``Test`` and say how your transport is made. Each check runs a writer and an owner
as two real processes, moves real bytes, and looks at memory byte by byte; the harshest ones stop or kill a process in
the middle of a write. What all of them defend is one sentence: **once the transport, or the operating system, has said
that a write is quiet, no byte of its pages changes any more** (DESIGN 5, S1; RACES A01; ENGINES 4).

What a transport does not claim (``Caps``) is not demanded: such a check skips and says why.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from kvpoll.runtime.transports import descriptor as descriptors
from kvpoll.runtime.transports.interface import Death, Progress, Region, Transport, Wake
from kvpoll.runtime.transports.shm_memory import allocate
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.testing.party import HiredParty, Numbers, Party

WRITER, OWNER = "prefill0", "decode0"
Ranges = tuple[Numbers, Numbers, Numbers]


class NotConforming(AssertionError):
    """The transport breaks a promise of the interface; the message says which and how it was seen."""


def expect(kept: object, promise: str) -> None:
    """Raise NotConforming unless the promise was kept."""
    if not kept:
        raise NotConforming(promise)


def skip(reason: str) -> None:
    """Leave the running check, saying why it does not apply."""
    import pytest

    pytest.skip(reason)


class Stage:
    """A writer and an owner, connected, with memory of ``nbytes`` each: the writer's patterned, the owner's blank."""

    def __init__(self, suite: TransportConformance, sizes: list[int], slow: bool) -> None:
        self.suite, self.sizes, self.nbytes = suite, sizes, sum(sizes)
        self.limit_s = suite.limit_s
        self.writer, self.owner = suite.hire(), suite.hire()
        self.slow = slow
        self.owner_epoch = 1
        self._writes = 0
        self.writer.begin(WRITER, 1, sizes, 7, slow)
        self.connect_new_owner()

    def connect_new_owner(self) -> None:
        """The owner is born (again), and the writer connects to this life of it."""
        born = self.owner.begin(OWNER, self.owner_epoch, self.sizes, None, self.slow)
        self.descriptor, self.caps = born
        self.peer = self.writer.connect(self.descriptor, OWNER, self.owner_epoch)

    def post(self, copies: Ranges, *, attempt: int = 0, peer: int | None = None) -> int:
        """Post a write for this attempt at room 1."""
        self._writes += 1
        incarnation = Incarnation(1, attempt, self.owner_epoch)
        handle = self.writer.post(self.peer if peer is None else peer, copies, incarnation, self._writes)
        assert isinstance(handle, int)
        return handle

    def ended(self, handle: int) -> Progress:
        """The write, once it has ended."""
        progress: Progress = self.writer.await_end(handle, self.limit_s, drained=False)
        expect(progress.state != "pending", f"a write ends: still {progress} after {self.limit_s:g} s")
        return progress

    def drained(self, handle: int) -> Progress:
        """The write, once it has drained; its reason if that took too long."""
        progress: Progress = self.writer.await_end(handle, self.limit_s, drained=True)
        return progress

    def expect_delivery(self, copies: Ranges, *, attempt: int = 0) -> None:
        """Write into blank memory, and find exactly these bytes there."""
        self.owner.blank()
        progress = self.ended(self.post(copies, attempt=attempt))
        expect(progress == ("done", True, None), f"a good write is done and drained: it is {progress}")
        self.expect_exactly(copies, "done")

    def expect_exactly(self, copies: Ranges, said: str) -> None:
        """The owner's memory holds the bytes of these copies, and nothing else has changed."""
        wrong, strayed = self.owner.damage(7, self.nbytes, copies)
        expect(not strayed, f"only the posted ranges change: {strayed} bytes outside them did")
        expect(not wrong, f"every byte is placed when a write is {said}: {wrong} bytes are wrong or missing")

    def expect_quiet(self, because: str) -> None:
        """Give all pages to someone else; from now on nothing of them changes."""
        self.owner.blank()
        self.suite.let_time_pass()
        changed = self.owner.changed()
        expect(not changed, f"no byte changes after {because}: {changed} bytes were overwritten")

    def post_and_catch(self) -> int:
        """A write of the whole memory, caught when some, but not all, of it has arrived. Skips if it is too fast."""
        for attempt in range(self.suite.catch_attempts):
            self.owner.blank()
            handle = self.post(self.suite.scattered(self.nbytes, 1.0), attempt=attempt)
            self.attempt = attempt
            changed = self.owner.await_changed(self.nbytes // 32, self.limit_s)
            progress = self.writer.poll(handle)
            expect(changed or progress.state != "pending", f"a write begins to arrive within {self.limit_s:g} s")
            if progress.state == "pending":
                return handle
            expect(progress.state == "done", f"a good write is done: it is {progress}")
        skip("a write ends before it can be caught in its middle: offer make_slow, or raise big_bytes")
        raise AssertionError("unreachable")

    @property
    def caught(self) -> Incarnation:
        """Incarnation of the write that ``post_and_catch`` returned."""
        return Incarnation(1, self.attempt, self.owner_epoch)


class TransportConformance:
    """Derive, say how to ``make`` the transport, run pytest. The attributes below may be overridden.

    in_process: the transport joins parties within one process only; then ``drive`` lets its world move.
    page_bytes, pages: size of the small checks. big_bytes: memory of the checks that catch a write in its middle.
    limit_s: how long anything may take before it counts as hanging. quiet_s: how long memory is watched after it was
    said to be quiet. poll_limit_s, close_limit_s: bounds on calls that must return at once, or soon; generous, since
    they look for blocking, not for speed.
    """

    in_process: ClassVar[bool] = False
    page_bytes: ClassVar[int] = 4096
    pages: ClassVar[int] = 256
    big_bytes: ClassVar[int] = 16 << 20
    limit_s: ClassVar[float] = 30.0
    quiet_s: ClassVar[float] = 0.3
    poll_limit_s: ClassVar[float] = 1.0
    close_limit_s: ClassVar[float] = 10.0
    catch_attempts: ClassVar[int] = 4

    # --- what a class says -------------------------------------------------------------------------

    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        """A transport for this process. Called in the process that will use it."""
        raise TypeError(f"{type(self).__name__} must define make(self, node, epoch, wake, on_death)")

    def make_slow(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        """The same, so slow that ``big_bytes`` take one second or longer, if the transport can be slowed down."""
        return self.make(node, epoch, wake, on_death)

    def allocate(self, nbytes: int) -> Region:
        """Memory that both a writer and an owner may register."""
        return allocate(nbytes)

    def drive(self) -> None:
        """Let the world of an in-process transport move a little."""

    # --- what the checks use -----------------------------------------------------------------------

    _idle: ClassVar[list[HiredParty]] = []

    def hire(self) -> Any:
        """A party: in this process, or in a child that an earlier check has left."""
        if self.in_process:
            return Party(self)
        while type(self)._idle:
            party = type(self)._idle.pop()
            if party.is_alive:
                return party
        return HiredParty(type(self), 2 * self.limit_s + 10)

    def let_time_pass(self) -> None:
        """Long enough for a byte that is still under way to land."""
        until_s = time.monotonic() + self.quiet_s
        while time.monotonic() < until_s:
            self.drive()
            if not self.in_process:
                time.sleep(0.01)

    @contextmanager
    def stage(self, *, sizes: list[int] | None = None, slow: bool = False) -> Iterator[Stage]:
        """A connected writer and owner; afterwards their processes are kept for the next check."""
        stage = Stage(self, sizes or [self.big_bytes if slow else self.page_bytes * self.pages], slow)
        try:
            yield stage
        except BaseException:
            for party in (stage.writer, stage.owner):
                if not self.in_process and party.is_alive:
                    party.kill()
            raise
        for party in (stage.writer, stage.owner):
            if self.in_process:
                party.end()
            elif party.is_alive:
                party.end()
                type(self)._idle.append(party)

    @classmethod
    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        cls._idle = []

    @classmethod
    def teardown_class(cls) -> None:
        """pytest calls this after the last check."""
        while cls._idle:
            cls._idle.pop().kill()

    def scattered(self, nbytes: int, share: float, *, page_bytes: int | None = None, seed: int = 0) -> Ranges:
        """Copies of a share of all pages, from shuffled places to shuffled places."""
        page = page_bytes or self.page_bytes
        draw = np.random.default_rng(seed)
        count = nbytes // page
        chosen = max(1, int(count * share))
        source, target = (draw.permutation(count)[:chosen].astype(np.int64) * page for _ in range(2))
        return source, target, np.full(chosen, page, np.int64)

    # --- bytes -------------------------------------------------------------------------------------

    def test_pages_arrive_byte_by_byte_and_nothing_else_changes(self) -> None:
        with self.stage() as stage:
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5))
            stage.expect_delivery(self.scattered(stage.nbytes, 0.25, seed=1), attempt=1)

    def test_ranges_of_any_length_arrive(self) -> None:
        lengths = np.array([1, 3, 8, 4095, 4097, 1, 65537, 12], np.int64)
        with self.stage() as stage:
            begins = np.cumsum(lengths + 13) - lengths
            stage.expect_delivery((begins, begins[::-1] + stage.nbytes // 2, lengths[::-1].copy()))

    def test_a_post_of_more_ranges_than_an_engine_queues_arrives(self) -> None:
        """Mooncake fails beyond 2048 queued ranges with part of them still being written (ENGINES 3)."""
        with self.stage() as stage:
            stage.expect_delivery(self.scattered(9216 * 128, 1.0, page_bytes=64) if stage.nbytes >= 9216 * 128
                                  else self.scattered(stage.nbytes, 1.0, page_bytes=64))  # fmt: skip

    def test_several_regions_are_one_space(self) -> None:
        page = self.page_bytes
        with self.stage(sizes=[3 * page, 5 * page]) as stage:
            target = np.array([7, 0, 3, 2], np.int64) * page
            stage.expect_delivery((np.array([0, 2, 3, 7], np.int64) * page, target, np.full(4, page, np.int64)))

    def test_a_write_of_nothing_is_done_at_once(self) -> None:
        nothing = np.empty(0, np.int64)
        with self.stage() as stage:
            progress = stage.writer.poll(stage.post((nothing, nothing, nothing)))
            expect(progress == ("done", True, None), f"a write of no ranges is done at once: it is {progress}")
            expect(not stage.owner.changed(), "a write of no ranges changes nothing")

    def test_a_range_outside_the_regions_is_refused(self) -> None:
        page = self.page_bytes
        with self.stage(sizes=[4 * page, 4 * page]) as stage:
            for source, target, nbytes, what in (
                (0, 8 * page, page, "a target behind the end"),
                (0, 8 * page - 8, page, "a target across the end"),
                (0, -page, page, "a target before the beginning"),
                (0, 3 * page, 2 * page, "a target across the border of two regions"),
                (8 * page, 0, page, "a source behind the end"),
                (0, 0, 1 << 62, "a length beyond all memory"),
            ):
                rows = np.array([[page, page, page], [source, target, nbytes]], np.int64).T
                progress = stage.drained(stage.post((rows[0], rows[1], rows[2])))
                expect(progress.state == "failed" and progress.reason, f"{what} is refused with a reason: {progress}")
                expect(progress.drained, f"{what} is refused before anything moves, so it has drained")
                expect(not stage.owner.changed(), f"{what} changes nothing, not even its good ranges")
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5), attempt=1)

    # --- calls -------------------------------------------------------------------------------------

    def test_wake_is_called_when_a_write_ends(self) -> None:
        with self.stage() as stage:
            handle = stage.post(self.scattered(stage.nbytes, 0.5))
            expect(stage.writer.await_wake(handle, self.limit_s), "wake is called once the end can be polled")

    def test_an_end_is_final(self) -> None:
        copies = self.scattered(self.page_bytes * self.pages, 0.5)
        with self.stage() as stage:
            handle = stage.post(copies)
            stage.ended(handle)
            aborted = stage.writer.abort(handle)
            expect(aborted == ("done", True, None), f"abort changes nothing of a write that is done: {aborted}")
            stage.expect_exactly(copies, "done")
            stage.expect_quiet("a write is done")
            again = stage.writer.poll(handle)
            expect(again == ("done", True, None), f"a write stays done: it is {again}")
            stage.writer.forget(handle)
            stage.expect_delivery(copies, attempt=1)

    def test_close_while_a_write_is_under_way(self) -> None:
        with self.stage(slow=True) as stage:
            handle = stage.post_and_catch()
            took_s, threads = stage.writer.close()
            expect(took_s <= self.close_limit_s, f"close returns soon: it took {took_s:.1f} s")
            expect(not threads, f"close ends all threads: {threads} are left")
            progress = stage.writer.poll(handle)
            expect(progress.state != "pending", "close ends what is pending")
            if progress.drained:
                stage.expect_quiet("a closed writer has said that its write is quiet")

    def test_a_descriptor_of_something_else_is_refused(self) -> None:
        with self.stage() as stage:
            for foreign in (
                b"",
                b"{}",
                b"\0" * 64,
                descriptors.encode("carrier-pigeon", 1, descriptors.Body(OWNER, 1)),
            ):
                message = stage.writer.refuses(foreign, OWNER, 1)
                expect(message is not None, f"connect refuses the descriptor {foreign!r} with TransportError")
                expect("\n" not in str(message), "an error is one line")

    # --- abort, revoke, incarnations ---------------------------------------------------------------

    def test_an_aborted_write_drains_and_is_quiet(self) -> None:
        with self.stage(slow=True) as stage:
            handle = stage.post_and_catch()
            at_once = stage.writer.abort(handle)
            if at_once.drained:
                stage.expect_quiet("abort has said at once that the write is quiet")
            progress = stage.drained(handle)
            expect(progress.drained, f"an aborted write drains while both sides live: it is {progress}")
            stage.expect_quiet("an aborted write has drained")

    def test_revoked_pages_are_quiet_at_once_or_once_the_writer_says_so(self) -> None:
        with self.stage(slow=True) as stage:
            handle = stage.post_and_catch()
            fenced = stage.owner.revoke(stage.caught)
            expect(not (fenced and stage.caps.one_sided), "a one-sided transport cannot fence by itself")
            progress = stage.drained(handle)
            expect(progress.drained, f"a revoked write drains while both sides live: it is {progress}")
            self.let_time_pass()
            changed = stage.owner.changed() if fenced else 0
            expect(not changed, f"revoke said that nothing is placed any more: {changed} bytes were overwritten")
            stage.expect_quiet("a revoked write has drained")
            stage.expect_delivery(self.scattered(stage.nbytes, 1 / 16), attempt=self.catch_attempts)

    def test_a_write_for_revoked_pages_places_nothing(self) -> None:
        with self.stage() as stage:
            fenced = stage.owner.revoke(Incarnation(1, 0, 1))
            progress = stage.ended(stage.post(self.scattered(stage.nbytes, 0.5)))
            if not fenced and progress.state == "done":
                skip("this transport does not tell its writers what is revoked, and does not claim to")
            expect(progress.state == "failed", f"a write for revoked pages fails: it is {progress}")
            expect(not stage.owner.changed(), "a write for revoked pages places nothing")
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5), attempt=1)

    def test_the_end_of_one_attempt_says_nothing_of_another(self) -> None:
        with self.stage(slow=True) as stage:
            former = stage.post_and_catch()
            stage.writer.abort(former)
            stage.drained(former)
            copies = self.scattered(stage.nbytes, 1 / 16, seed=3)
            stage.expect_delivery(copies, attempt=self.catch_attempts)
            progress = stage.writer.poll(former)
            expect(progress.state == "failed", f"the older attempt stays failed: it is {progress}")

    # --- lives -------------------------------------------------------------------------------------

    def test_a_peer_that_is_not_there_fails_the_write(self) -> None:
        with self.stage() as stage:
            stage.owner.end()
            progress = stage.ended(stage.post(self.scattered(stage.nbytes, 0.5)))
            expect(progress.state == "failed" and progress.reason, f"it fails with a reason: {progress}")
            stage.owner_epoch = 2
            stage.connect_new_owner()
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5))

    def test_a_write_for_an_older_life_never_enters_a_newer_one(self) -> None:
        with self.stage() as stage:
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5))
            older = stage.peer
            stage.owner.end()
            stage.owner_epoch = 2
            stage.connect_new_owner()
            progress = stage.ended(stage.post(self.scattered(stage.nbytes, 0.5), peer=older))
            expect(progress.state == "failed", f"a write to an older life fails: it is {progress}")
            changed = stage.owner.changed()
            expect(not changed, f"a write to an older life changes nothing in the newer: {changed} bytes changed")
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5), attempt=1)

    def test_a_restarted_writer_is_served(self) -> None:
        with self.stage() as stage:
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5))
            stage.writer.end()
            stage.writer.begin(WRITER, 2, stage.sizes, 7, False)
            stage.peer = stage.writer.connect(stage.descriptor, OWNER, 1)
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5, seed=1), attempt=1)

    def test_a_killed_owner_fails_its_writes_and_its_successor_is_served(self) -> None:
        self._needs_processes()
        with self.stage(slow=True) as stage:
            handle = stage.post_and_catch()
            stage.owner.kill()
            progress = stage.ended(handle)
            expect(progress.state == "failed" and progress.reason, f"it fails with a reason: {progress}")
            stage.owner = self.hire()
            stage.owner_epoch = 2
            stage.connect_new_owner()
            stage.expect_delivery(self.scattered(stage.nbytes, 1 / 16))

    def test_a_killed_writer_is_reported_once_and_is_quiet(self) -> None:
        self._needs_processes()
        with self.stage(slow=True) as stage:
            if not stage.caps.proves_death:
                skip("this transport does not claim to prove a writer's death")
            stage.post_and_catch()
            expect(not stage.owner.deaths(), "nobody has died yet")
            stage.writer.kill()
            deaths = stage.owner.await_death(self.limit_s)
            expect(deaths == [(WRITER, 1)], f"on_death names the writer's life: {deaths}")
            stage.expect_quiet("the operating system has seen the writer's end")
            expect(stage.owner.deaths() == deaths, f"on_death is called once: {stage.owner.deaths()}")

    def test_a_closed_writer_is_reported_as_over(self) -> None:
        with self.stage() as stage:
            if not stage.caps.proves_death:
                skip("this transport does not claim to prove a writer's death")
            stage.expect_delivery(self.scattered(stage.nbytes, 0.5))
            expect(not stage.owner.deaths(), "nobody is over yet")
            stage.writer.close()
            deaths = stage.owner.await_death(self.limit_s)
            expect(deaths == [(WRITER, 1)], f"on_death names the life of a writer that closed: {deaths}")
            stage.expect_quiet("a writer has closed, and its life is reported as over")

    def test_a_stopped_owner_blocks_nobody(self) -> None:
        self._needs_processes()
        with self.stage(slow=True) as stage:
            handle = stage.post_and_catch()
            stage.owner.stop()
            try:
                longest_s = stage.writer.slowest_poll_s(handle, 100)
                expect(longest_s <= self.poll_limit_s, f"poll returns at once: it took {longest_s:.2f} s")
                stage.writer.abort(handle)
                self.let_time_pass()
            finally:
                stage.owner.resume()
            if stage.drained(handle).drained:
                stage.expect_quiet("the write to an owner that stood still has drained")

    def test_a_stopped_writer_is_not_dead_and_overwrites_nothing_that_was_released(self) -> None:
        """stale_writer.py: Mooncake overwrote 40 pages that were released on failure alone, NIXL 7376 (ENGINES 4)."""
        self._needs_processes()
        with self.stage(slow=True) as stage:
            handle = stage.post_and_catch()
            stage.writer.stop()
            try:
                fenced = stage.owner.revoke(stage.caught)
                self.let_time_pass()
                deaths = stage.owner.deaths()
                expect(not deaths, f"a stopped process is not dead: {deaths}")
            finally:
                stage.writer.resume()
            progress = stage.drained(handle)
            expect(not fenced or not stage.owner.changed(), "revoke said that nothing is placed any more")
            if progress.drained:
                stage.expect_quiet("the resumed writer has said that its write is quiet")

    def _needs_processes(self) -> None:
        if self.in_process:
            skip("needs a process for each side, to stop or kill it")
