"""The adapter ``cuda_ipc`` on host memory: the same code, with memfds in place of the GPU's memory and a gate in place
of the event behind a copy. What a GPU does itself is tested in ``tests/gpu``; processes that are killed are in
``tests/integration/test_engine_cuda_ipc_host.py``.
"""

from __future__ import annotations

import gc
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transport_stage import LIMIT_S, eventually

from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.cuda_ipc import CudaIpcTransport
from kvpoll.runtime.transports.cuda_ipc_channel import Channel, Order, dial
from kvpoll.runtime.transports.cuda_ipc_device import HostDevice
from kvpoll.runtime.transports.engine_transport import Peer
from kvpoll.runtime.transports.interface import DONE, PENDING, Copies, Progress, Region, Tag, TransportError
from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Incarnation

NBYTES = 1 << 16
ROOM, OTHER = Incarnation(7, 0, 0), Incarnation(8, 0, 0)


class Side:
    """One transport with two regions of shared memory."""

    def __init__(self, node: str, direction: str, epoch: int = 0, seed: int | None = None, **options: object) -> None:
        made = make("cuda_ipc", node, epoch, lambda: None, self.died, direction=direction, backend="host", **options)
        assert isinstance(made, CudaIpcTransport) and isinstance(made.device, HostDevice)
        self.transport, self.device = made, made.device
        self.deaths: list[tuple[str, int]] = []
        self.views = []
        regions = []
        for place in range(2):
            file = os.memfd_create("kvpoll-test", os.MFD_CLOEXEC)
            os.ftruncate(file, NBYTES)
            memory = mmap.mmap(file, NBYTES)
            view = np.frombuffer(memory, np.uint8)
            if seed is not None:
                view[:] = np.random.default_rng(seed + place).integers(1, 256, NBYTES, np.uint8)
            self.views.append(view)
            regions.append(Region(view.ctypes.data, NBYTES, keep=memory, file=file))
        self.files = [region.file for region in regions]
        self.descriptor = made.register(regions)

    def died(self, *life: object) -> None:
        self.deaths.append(life)  # type: ignore[arg-type]

    @property
    def bytes(self) -> np.ndarray:
        return np.concatenate(self.views)

    def close(self) -> None:
        self.device.gate.set()
        self.transport.close()
        for file in self.files:
            if file is not None:
                os.close(file)


class Pair:
    """A writer with random pages and an owner with empty ones."""

    def __init__(self, direction: str, **options: object) -> None:
        self.owner = Side("decode0", direction)
        self.writer = Side("prefill0", direction, seed=1, **options)
        self.peer: Peer = self.writer.transport.connect(self.owner.descriptor, "decode0", 0)
        # Whose device copies: a push is launched by the writer, a pull by the owner.
        self.copier = (self.owner if direction == "pull" else self.writer).device

    def post(self, room: Incarnation = ROOM, copies: Copies | None = None) -> int:
        return self.writer.transport.post(self.peer, PAGES if copies is None else copies, Tag(room, 1))

    def poll(self, handle: int) -> Progress:
        return self.writer.transport.poll(handle)

    def becomes(self, handle: int, wanted: Progress) -> None:
        eventually(lambda: self.poll(handle) == wanted)


def ranges(*rows: tuple[int, int, int]) -> Copies:
    return Copies(*(np.ascontiguousarray(column) for column in np.array(rows, np.int64).T))


PAGES = ranges((0, NBYTES + 4096, 4096), (NBYTES, 100, 33), (50, NBYTES, 7))


def placed(source: np.ndarray, copies: Copies) -> np.ndarray:
    wanted = np.zeros(2 * NBYTES, np.uint8)
    for start, end, nbytes in zip(*copies, strict=True):
        wanted[end : end + nbytes] = source[start : start + nbytes]
    return wanted


@pytest.fixture(params=["pull", "push"])
def direction(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(direction: str) -> Iterator[Pair]:
    made = Pair(direction)
    yield made
    made.writer.close()
    made.owner.close()


def test_a_whole_write_is_one_copy_and_arrives_byte_by_byte(pair: Pair) -> None:
    handle = pair.post()
    pair.becomes(handle, DONE)
    assert (pair.owner.bytes == placed(pair.writer.bytes, PAGES)).all()
    assert pair.copier.copies_started == 1
    nothing = Copies(*(np.empty(0, np.int64) for _ in range(3)))
    assert pair.poll(pair.post(copies=nothing)) == DONE
    assert pair.copier.copies_started == 1


def test_a_write_is_pending_until_its_event_and_a_launched_copy_goes_on(pair: Pair) -> None:
    """Aborted is not drained: bytes that were launched land, and only then are the pages free."""
    pair.copier.gate.clear()
    handle = pair.post()
    eventually(lambda: pair.copier.copies_started == 1)
    assert pair.poll(handle) == PENDING
    pair.writer.transport.abort(handle)
    time.sleep(0.05)
    assert pair.poll(handle) == Progress("failed", False, "aborted by its user")
    assert not pair.owner.bytes.any()
    pair.copier.gate.set()
    pair.becomes(handle, Progress("failed", True, "aborted by its user"))
    assert (pair.owner.bytes == placed(pair.writer.bytes, PAGES)).all()  # it landed, after the abort


def test_the_deadline_fails_a_write_and_its_copy_drains_it(direction: str) -> None:
    pair = Pair(direction, deadline_s=0.05)
    try:
        pair.copier.gate.clear()
        handle = pair.post()
        pair.becomes(handle, Progress("failed", False, "not placed after 0.05 s"))
        assert not pair.owner.bytes.any()
        pair.copier.gate.set()
        pair.becomes(handle, Progress("failed", True, "not placed after 0.05 s"))
    finally:
        pair.writer.close()
        pair.owner.close()


def test_a_range_outside_is_refused(pair: Pair) -> None:
    bad = ranges((0, 0, 10), (0, NBYTES - 5, 10))
    handle = pair.post(copies=bad)
    seen = pair.poll(handle)
    assert (seen.state, seen.drained) == ("failed", True)
    assert "range 1 of the target" in str(seen.reason)
    assert pair.copier.copies_started == 0


# --- giving pages up --------------------------------------------------------------------------------


def test_a_revoked_incarnation_is_copied_no_more(pair: Pair, direction: str) -> None:
    pair.becomes(pair.post(), DONE)
    assert pair.owner.transport.revoke(ROOM) is (direction == "pull")
    for view in pair.owner.views:
        view[:] = 0

    def refused() -> bool:
        handle = pair.post()  # a push may still be launched until the writer has heard
        eventually(lambda: pair.poll(handle) != PENDING)
        return pair.poll(handle) == Progress("failed", True, "the pages were given up")

    if direction == "pull":
        assert refused()
        assert not pair.owner.bytes.any()
    else:
        eventually(refused)
    pair.becomes(pair.post(OTHER), DONE)


def test_a_pull_that_runs_is_not_yet_fenced() -> None:
    """revoke says True only when nothing of that incarnation is being copied."""
    pair = Pair("pull")
    try:
        pair.copier.gate.clear()
        running = pair.post()
        eventually(lambda: pair.copier.copies_started == 1)
        assert pair.owner.transport.revoke(ROOM) is False
        assert pair.owner.transport.revoke(OTHER) is True
        pair.copier.gate.set()
        eventually(lambda: pair.owner.transport.revoke(ROOM))
        pair.becomes(running, DONE)
    finally:
        pair.writer.close()
        pair.owner.close()


def test_an_aborted_order_that_has_not_begun_never_begins(direction: str) -> None:
    pair = Pair(direction)
    try:
        pair.copier.gate.clear()
        handles = [pair.post() for _ in range(70)]  # 64 are in flight at once
        eventually(lambda: pair.copier.copies_started == 64)
        pair.writer.transport.abort(handles[-1])
        pair.becomes(handles[-1], Progress("failed", True, "aborted by its user"))
        pair.copier.gate.set()
        pair.becomes(handles[-2], DONE)
        assert pair.copier.copies_started == 69
    finally:
        pair.writer.close()
        pair.owner.close()


# --- lives ------------------------------------------------------------------------------------------


def test_a_newer_epoch_retires_the_older_peer(pair: Pair, direction: str) -> None:
    pair.becomes(pair.post(), DONE)
    newer = Side("decode0", direction, epoch=1)
    old, pair.peer = pair.peer, pair.writer.transport.connect(newer.descriptor, "decode0", 1)
    assert pair.writer.transport.connect(newer.descriptor, "decode0", 1) is pair.peer
    assert pair.writer.transport.connect(pair.owner.descriptor, "decode0", 0) is not old
    late = pair.writer.transport.post(old, PAGES, Tag(ROOM, 2))
    assert pair.poll(late) == Progress("failed", True, "decode0 epoch 0 is over: epoch 1 has come")
    pair.becomes(pair.post(), DONE)
    assert (newer.bytes == placed(pair.writer.bytes, PAGES)).all()
    newer.close()


def test_an_owner_that_closes_fails_what_is_posted_and_proves_no_death(pair: Pair) -> None:
    """A closed socket is not a dead process: both are this process here, and it lives."""
    pair.becomes(pair.post(), DONE)
    pair.owner.transport.close()
    eventually(lambda: pair.poll(pair.post()).state == "failed")
    assert pair.owner.deaths == pair.writer.deaths == []


def test_a_writer_whose_order_is_running_when_the_owner_closes_is_not_told_done() -> None:
    pair = Pair("pull")
    try:
        pair.copier.gate.clear()
        handle = pair.post()
        eventually(lambda: pair.copier.copies_started == 1)
        began = time.monotonic()
        pair.owner.transport.close()
        assert time.monotonic() - began < 2
        eventually(lambda: pair.poll(handle).state == "failed")
        assert pair.poll(handle).drained is False
    finally:
        pair.writer.close()
        pair.owner.close()


def open_files() -> int:
    gc.collect()  # a mapping keeps a descriptor until its last view is gone
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open() -> None:
    before = open_files()
    for direction in ("pull", "push"):
        pair = Pair(direction)
        pair.becomes(pair.post(), DONE)
        pair.writer.close()
        pair.owner.close()
        del pair
    assert eventually(lambda: open_files() <= before)


# --- strangers and mistakes -------------------------------------------------------------------------


def test_a_stranger_without_the_cookie_orders_nothing(pair: Pair) -> None:
    name = pair.writer.transport.connect(pair.owner.descriptor, "decode0", 0).lane.carrier.body.socket  # type: ignore[attr-defined]
    lost: list[Channel] = []
    channel = Channel(dial(name, LIMIT_S), lambda *heard: None, lost.append, lambda channel: None)
    channel.start()
    columns = [column.tobytes() for column in PAGES]
    channel.send(Order(1, (7, 0, 0), *columns, b""))
    eventually(lambda: lost == [channel])
    channel.close()
    for rubbish in (b"\0\0\0\5hello", b"\xff\xff\xff\xff", b"\0\0\0\1\x80"):
        with dial(name, LIMIT_S) as connection:
            connection.sendall(rubbish)
            assert connection.recv(1) == b""  # hung up on
    assert pair.copier.copies_started == 0
    pair.becomes(pair.post(), DONE)


def test_both_sides_must_be_started_alike() -> None:
    owner, writer = Side("decode0", "pull"), Side("prefill0", "push")
    try:
        with pytest.raises(TransportError, match="decode0 was started to pull on host, this process to push on host"):
            writer.transport.connect(owner.descriptor, "decode0", 0)
        with pytest.raises(TransportError, match="decode0 epoch 0, not of decode0 epoch 4"):
            writer.transport.connect(owner.descriptor, "decode0", 4)
        with pytest.raises(TransportError, match="registered once"):
            owner.transport.register([])
    finally:
        writer.close()
        owner.close()


def test_options_and_memory_that_cannot_be_are_refused() -> None:
    def built(**options: object) -> CudaIpcTransport:
        made = make("cuda_ipc", "decode0", 0, lambda: None, lambda *life: None, **options)
        assert isinstance(made, CudaIpcTransport)
        return made

    with pytest.raises(BadInput, match=r"no direction 'pul' .*'pull'"):
        built(direction="pul")
    with pytest.raises(BadInput, match="no backend 'gpu'"):
        built(backend="gpu")
    with pytest.raises(TransportError, match="deadline_s is 0"):
        built(backend="host", deadline_s=0)
    transport = built(backend="host")
    memory = np.zeros(64, np.uint8)
    with pytest.raises(TransportError, match="only a region with a file descriptor"):
        transport.register([Region(memory.ctypes.data, 64, keep=memory)])
    with pytest.raises(TransportError, match="region 0 is cuda memory: it takes host"):
        transport.register([Region(memory.ctypes.data, 64, "cuda", memory)])
    transport.close()
    with pytest.raises(TransportError, match="closed"):
        transport.register([])
