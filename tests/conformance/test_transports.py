"""Our transports against the suite that we give to others, and the suite against transports that lie.

A check that has never refused anything may be asleep: each mutant below breaks one promise, and the check named
beside it must say so.
"""

from __future__ import annotations

import mmap
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from kvpoll.runtime.transports.interface import DONE, Copies, Death, Progress, Region, Tag, Transport, Wake
from kvpoll.runtime.transports.memory import Fabric, MemoryTransport, Peer
from kvpoll.runtime.transports.shm import ShmTransport
from kvpoll.runtime.transports.shm_memory import address_of
from kvpoll.runtime.transports.tcp import TcpTransport
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.testing import NotConforming, TransportConformance

SLOW = 24 << 20


class TestShm(TransportConformance):
    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return ShmTransport(node, epoch, wake, on_death)

    def make_slow(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return ShmTransport(node, epoch, wake, on_death, bytes_per_s=SLOW)


class TestTcp(TransportConformance):
    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return TcpTransport(node, epoch, wake, on_death, lanes=2)

    def make_slow(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return TcpTransport(node, epoch, wake, on_death, bytes_per_s=SLOW)

    def allocate(self, nbytes: int) -> Region:
        memory = mmap.mmap(-1, nbytes)  # any host memory will do
        return Region(address_of(memory), nbytes, keep=memory)


class OnFabric(TransportConformance):
    """An in-process suite: each check has a fabric of its own, which moves when the check waits."""

    in_process = True
    big_bytes = 1 << 20
    quiet_s = 0.02
    limit_s = 10.0
    kind: type[MemoryTransport] = MemoryTransport
    one_sided = True

    @cached_property
    def fabric(self) -> Fabric:
        return Fabric()

    def make(self, node: str, epoch: int, wake: Wake, on_death: Death) -> Transport:
        return self.kind(node, epoch, wake, on_death, fabric=self.fabric, one_sided=self.one_sided)

    def drive(self) -> None:
        self.fabric.step()


class TestMemory(OnFabric):
    """One-sided, as a memory write of another process is."""


class TestMemoryPlacedByItsOwner(OnFabric):
    one_sided = False


# --- transports that lie --------------------------------------------------------------------------


class DrainedTooSoon(MemoryTransport):
    """Takes its own abort for a proof: it says drained, and writes on."""

    def abort(self, handle: int) -> None:
        write = self.writes._writes[handle]
        self.writes.abort(handle)
        self.writes.fail(write, "aborted", drained=True)
        write.aborted = False


class DoneTooSoon(MemoryTransport):
    """Says done when the engine has taken the write, not when it has performed it."""

    def poll(self, handle: int) -> Progress:
        progress = super().poll(handle)
        return DONE if progress.state == "pending" else progress


class FenceInWordsOnly(MemoryTransport):
    """Says that revoking has fenced, and fences nothing."""

    def __init__(self, node: str, epoch: int, wake: Wake, on_death: Death, **named: Any) -> None:
        super().__init__(node, epoch, wake, on_death, **{**named, "one_sided": False})

    def revoke(self, incarnation: Incarnation) -> bool:
        return True


class FenceOfAnotherPower(MemoryTransport):
    """One-sided, and still claims that the owner can fence."""

    def revoke(self, incarnation: Incarnation) -> bool:
        super().revoke(incarnation)
        return True


class OneTooFar(MemoryTransport):
    """Writes eight bytes more than it was asked to."""

    def post(self, peer: Peer, copies: Copies, tag: Tag) -> int:
        fits = copies.target + copies.nbytes + 8 <= peer.space.total
        longer = np.where(fits & (copies.source + copies.nbytes + 8 <= self.space.total), 8, 0)
        return super().post(peer, copies._replace(nbytes=copies.nbytes + longer), tag)


class Clipper(MemoryTransport):
    """Silently leaves out the ranges that do not fit, and reports success."""

    def post(self, peer: Peer, copies: Copies, tag: Tag) -> int:
        good = (copies.target >= 0) & (copies.target <= peer.space.total - copies.nbytes)
        return super().post(peer, Copies(*(column[good] for column in copies)), tag)


class Sloppy(MemoryTransport):
    """Loses the last range of every write."""

    def post(self, peer: Peer, copies: Copies, tag: Tag) -> int:
        return super().post(peer, Copies(*(column[:-1] for column in copies)), tag)


class Silent(MemoryTransport):
    """Never calls wake."""

    def __init__(self, node: str, epoch: int, wake: Wake, on_death: Death, **named: Any) -> None:
        super().__init__(node, epoch, lambda: None, on_death, **named)


class TimelessPeer(MemoryTransport):
    """Addresses a peer by its name alone: a write for an older life lands in the newer one."""

    def post(self, peer: Peer, copies: Copies, tag: Tag) -> int:
        life = self.fabric._lives.get(peer.node)
        return super().post(peer if life is None else peer._replace(epoch=life.epoch), copies, tag)


class Forgiving(MemoryTransport):
    """Turns a failure into a success when the same room is tried again."""

    def poll(self, handle: int) -> Progress:
        progress = super().poll(handle)
        return DONE if progress.state == "failed" and handle < self.writes._last else progress


class NeverDrains(MemoryTransport):
    """Forgets to say when an aborted write has drained: its pages would be held for ever."""

    def poll(self, handle: int) -> Progress:
        progress = super().poll(handle)
        return progress._replace(drained=False) if progress.state == "failed" else progress


class AnyDescriptor(MemoryTransport):
    """Takes whatever it is given for a descriptor."""

    def connect(self, descriptor: bytes, node: str, epoch: int) -> Peer:
        return Peer(node, epoch, self.space)


class StaysPending(MemoryTransport):
    """Closes without ending what is pending."""

    def close(self) -> None:
        self._closed = True
        self.fabric.leave(self)


class ClosesUnseen(MemoryTransport):
    """Its end is kept from the owners that it has written to."""

    def close(self) -> None:
        self.connected.clear()
        super().close()


LIARS = [
    (DrainedTooSoon, "test_an_aborted_write_drains_and_is_quiet", "no byte changes after"),
    (DoneTooSoon, "test_pages_arrive_byte_by_byte_and_nothing_else_changes", "wrong or missing"),
    (FenceInWordsOnly, "test_revoked_pages_are_quiet_at_once_or_once_the_writer_says_so", "revoke said"),
    (FenceInWordsOnly, "test_a_write_for_revoked_pages_places_nothing", "a write for revoked pages fails"),
    (FenceOfAnotherPower, "test_revoked_pages_are_quiet_at_once_or_once_the_writer_says_so", "cannot fence"),
    (OneTooFar, "test_pages_arrive_byte_by_byte_and_nothing_else_changes", "outside them"),
    (Clipper, "test_a_range_outside_the_regions_is_refused", "refused with a reason"),
    (Sloppy, "test_ranges_of_any_length_arrive", "wrong or missing"),
    (Silent, "test_wake_is_called_when_a_write_ends", "wake is called"),
    (TimelessPeer, "test_a_write_for_an_older_life_never_enters_a_newer_one", "a write to an older life"),
    (Forgiving, "test_the_end_of_one_attempt_says_nothing_of_another", "stays failed"),
    (NeverDrains, "test_an_aborted_write_drains_and_is_quiet", "drains while both sides live"),
    (AnyDescriptor, "test_a_descriptor_of_something_else_is_refused", "TransportError"),
    (ClosesUnseen, "test_a_closed_writer_is_reported_as_over", "names the life of a writer that closed"),
    (StaysPending, "test_close_while_a_write_is_under_way", "close ends what is pending"),
]


@pytest.mark.parametrize(("liar", "check", "words"), LIARS)
def test_a_transport_that_lies_is_caught(liar: type[MemoryTransport], check: str, words: str) -> None:
    suite = type("Suite", (OnFabric,), {"kind": liar, "limit_s": 0.5})()
    with pytest.raises(NotConforming, match=words):
        getattr(suite, check)()


@pytest.mark.parametrize("check", sorted({check for _, check, _ in LIARS}))
def test_the_same_checks_pass_without_the_lie(check: str) -> None:
    suite = OnFabric()
    getattr(suite, check)()
    assert suite.fabric.steps >= 0 and not suite.fabric.under_way
