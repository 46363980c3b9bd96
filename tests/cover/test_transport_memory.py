"""The memory transport: every fault strikes exactly where it was told to, and late bytes really overwrite."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import DONE, PENDING, Copies, Progress, Region, Tag, TransportError
from kvpoll.runtime.transports.memory import Fabric, Fault, MemoryTransport
from kvpoll.runtime.transports.shm_memory import allocate, as_array
from kvpoll.spec.vocabulary import Incarnation

PAGE = 64
PAGES = 8


class Pair:
    """A writer with pages 1 2 3 ... and an owner with zeros, on one fabric."""

    def __init__(self, fabric: Fabric | None = None, *, one_sided: bool = True) -> None:
        self.fabric = fabric or Fabric()
        self.rings: list[str] = []
        self.deaths: list[tuple[str, int]] = []
        self.owner = MemoryTransport(
            "decode0", 1, lambda: None, lambda *life: self.deaths.append(life), fabric=self.fabric, one_sided=one_sided
        )
        self.writer = MemoryTransport(
            "prefill0", 1, lambda: self.rings.append("writer"), lambda *life: None, fabric=self.fabric
        )
        self.target, self.source = allocate(PAGE * PAGES), allocate(PAGE * PAGES)
        as_array(self.source).reshape(PAGES, PAGE)[:] = np.arange(1, PAGES + 1, dtype=np.uint8)[:, None]
        self.descriptor = self.owner.register([self.target])
        self.writer.register([self.source])
        self.peer = self.writer.connect(self.descriptor, "decode0", 1)

    def post(self, pages: list[int], attempt: int = 0) -> int:
        """Source page i goes to the i-th of these pages, one range each, last first."""
        source = np.arange(len(pages), dtype=np.int64)[::-1] * PAGE
        target = np.array(pages, np.int64)[::-1] * PAGE
        copies = Copies(source, target, np.full(len(pages), PAGE, np.int64))
        return self.writer.post(self.peer, copies, Tag(Incarnation(1, attempt, 1), attempt))

    @property
    def pages(self) -> list[int]:
        """First byte of each of the owner's pages."""
        return as_array(self.target).reshape(PAGES, PAGE)[:, 0].tolist()

    def give_away(self) -> None:
        """The owner gives all its pages to another room."""
        as_array(self.target)[:] = 99


def test_nothing_moves_without_a_step_and_one_step_places_one_range() -> None:
    pair = Pair()
    handle = pair.post([0, 1, 2])
    assert pair.writer.poll(handle) == PENDING and pair.pages == [0] * 8
    assert pair.fabric.step() and pair.pages == [0, 0, 3, 0, 0, 0, 0, 0]
    assert pair.fabric.run() == 3
    assert pair.writer.poll(handle) == DONE and pair.pages == [1, 2, 3, 0, 0, 0, 0, 0]
    assert pair.rings == ["writer"] and not pair.fabric.step()


def test_a_failed_write_lands_late_on_pages_that_belong_to_another_room() -> None:
    """RACES A01: the pages were released on failure alone, and the write was not over."""
    pair = Pair()
    pair.fabric.inject(Fault("late", ranges=1))
    handle = pair.post([0, 1, 2])
    pair.fabric.run()
    assert pair.writer.poll(handle) == Progress("failed", False, "failed after 1 ranges")
    pair.give_away()
    assert pair.fabric.land(tell=False) == 1
    assert pair.pages == [1, 2, 99, 99, 99, 99, 99, 99]
    assert not pair.writer.poll(handle).drained
    assert pair.fabric.land() == 1 and pair.writer.poll(handle).drained


def test_an_owner_that_places_the_bytes_itself_is_not_overwritten_late() -> None:
    pair = Pair(one_sided=False)
    pair.fabric.inject(Fault("late", ranges=1))
    pair.post([0, 1, 2])
    pair.fabric.run()
    assert pair.owner.revoke(Incarnation(1, 0, 1))
    pair.give_away()
    pair.fabric.land()
    assert pair.pages == [99] * 8


def test_a_one_sided_revoke_proves_nothing_and_ends_the_write_at_its_next_step() -> None:
    pair = Pair()
    handle = pair.post([0, 1, 2])
    pair.fabric.step()
    assert not pair.owner.revoke(Incarnation(1, 0, 1))
    assert pair.writer.poll(handle) == PENDING
    pair.fabric.step()
    assert pair.writer.poll(handle) == Progress("failed", True, "revoked by its owner")
    assert pair.pages == [0, 0, 3, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("fault", "progress", "pages"),
    [
        (Fault("partial", ranges=2), Progress("failed", True, "failed after 2 ranges"), [0, 2, 3, 0, 0, 0, 0, 0]),
        (Fault("drop_completion"), PENDING, [1, 2, 3, 0, 0, 0, 0, 0]),
        (Fault("delay", steps=4), DONE, [1, 2, 3, 0, 0, 0, 0, 0]),
        (Fault("duplicate_completion", steps=2), DONE, [1, 2, 3, 0, 0, 0, 0, 0]),
        (
            Fault("owner_death", ranges=1),
            Progress("failed", True, "decode0 epoch 1 has ended"),
            [0, 0, 3, 0, 0, 0, 0, 0],
        ),
    ],
)
def test_each_fault_leaves_its_trace(fault: Fault, progress: Progress, pages: list[int]) -> None:
    pair = Pair()
    pair.fabric.inject(fault)
    handle = pair.post([0, 1, 2])
    pair.fabric.run()
    assert pair.writer.poll(handle) == progress and pair.pages == pages and not pair.fabric.under_way
    assert len(pair.rings) == {"drop_completion": 0, "duplicate_completion": 2}.get(fault.kind, 1)


def test_a_dead_writer_stops_between_two_ranges_and_its_owner_is_told_once() -> None:
    pair = Pair()
    pair.fabric.inject(Fault("writer_death", ranges=2))
    pair.post([0, 1, 2])
    pair.fabric.run()
    pair.give_away()
    assert pair.deaths == [("prefill0", 1)] and not pair.fabric.step() and pair.pages == [99] * 8
    pair.writer.close()
    assert pair.deaths == [("prefill0", 1)]


def test_a_fault_waits_for_the_write_that_it_names() -> None:
    pair = Pair()
    pair.fabric.inject(Fault("partial", node="prefill0", nth=1))
    first, second, third = pair.post([0]), pair.post([1]), pair.post([2])
    pair.fabric.run()
    assert [pair.writer.poll(h).state for h in (first, second, third)] == ["done", "failed", "done"]


def test_an_aborted_late_write_still_lands_and_only_then_drains() -> None:
    pair = Pair()
    pair.fabric.inject(Fault("late"))
    handle = pair.post([0])
    pair.fabric.run()
    pair.writer.abort(handle)
    pair.fabric.run()
    assert not pair.writer.poll(handle).drained
    pair.fabric.land()
    assert pair.writer.poll(handle).drained and pair.pages[0] == 1


def history(seed: int) -> tuple[list[int], int]:
    draw = random.Random(seed)
    pair = Pair(Fabric(choose=lambda count: draw.randrange(count)))
    seen: list[NDArray[np.uint8]] = []
    for attempt in range(3):
        pair.post([attempt, attempt + 1, attempt + 2], attempt)
    while pair.fabric.step():
        seen.append(as_array(pair.target).copy())
    return [int(page.sum()) for page in seen], pair.fabric.steps


def test_a_seed_chooses_the_interleaving_and_repeats_it() -> None:
    assert history(1) == history(1)
    assert len({str(history(seed)) for seed in range(8)}) > 1


def test_a_successor_takes_the_place_of_its_former_life() -> None:
    pair = Pair()
    handle = pair.post([0, 1])
    successor = MemoryTransport("decode0", 2, lambda: None, lambda *life: None, fabric=pair.fabric)
    successor.register([pair.target])
    assert pair.writer.poll(handle) == Progress("failed", True, "decode0 epoch 1 has ended")
    late = pair.post([3])
    assert pair.writer.poll(late).state == "failed" and pair.pages == [0] * 8


def test_memory_that_cannot_be_used_is_refused() -> None:
    owner = MemoryTransport("decode0", 1, lambda: None, lambda *life: None, fabric=Fabric())
    with pytest.raises(TransportError, match="host memory"):
        owner.register([Region(0, 4096, "cuda")])
    with pytest.raises(TransportError, match="at least one"):
        owner.register([])
    owner.register([allocate(8)])
    with pytest.raises(TransportError, match="once"):
        owner.register([allocate(8)])
