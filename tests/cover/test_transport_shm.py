"""shm: who is admitted, what the control page tells, and what a mapping demands of a stranger's file."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from transport_stage import LIMIT_S, eventually

from kvpoll.runtime.transports import descriptor as descriptors
from kvpoll.runtime.transports import shm_wire as wire
from kvpoll.runtime.transports.interface import Copies, Progress, Region, Tag, TransportError
from kvpoll.runtime.transports.shm import ShmTransport, allocate, as_array, as_tensor
from kvpoll.runtime.transports.shm_control import CONTROL_BYTES, ControlPage, ControlView
from kvpoll.runtime.transports.shm_memory import Mapping, is_sealed
from kvpoll.spec.vocabulary import Incarnation

NBYTES = 1 << 16
ROOM = Incarnation(1, 0, 1)


def one(at: int, nbytes: int) -> Copies:
    return Copies(np.array([at]), np.array([at]), np.array([nbytes]))


class Owner:
    """A real owner of 64 KiB of zeros; ``deaths`` is what its transport was told to report."""

    def __init__(self, socket_dir: Path | None = None) -> None:
        self.deaths: list[tuple[str, int]] = []
        self.transport = ShmTransport(
            "decode0", 1, lambda: None, lambda *life: self.deaths.append(life), socket_dir=socket_dir
        )
        self.pool = allocate(NBYTES)
        self.descriptor = self.transport.register([self.pool])
        self.body = descriptors.decode("shm", wire.VERSION, self.descriptor, wire.Descriptor, "decode0", 1)
        assert self.transport._doorkeeper is not None
        self.secret = self.transport._doorkeeper.secret

    @property
    def changed(self) -> int:
        return int((as_array(self.pool) != 0).sum())

    def knock(self, message: bytes | None = None) -> socket.socket:
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        raw.settimeout(LIMIT_S)
        raw.connect(self.body.path)
        if message is not None:
            raw.send(message)
        return raw

    def hello(self, epoch: int = 1, secret: bytes | None = None) -> bytes:
        return wire.pack_hello(wire.Hello("prefill0", epoch, secret or self.secret))


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.transport.close()


def writer(node: str = "prefill9", **options: object) -> ShmTransport:
    made = ShmTransport(node, 1, lambda: None, lambda *life: None, **options)  # type: ignore[arg-type]
    source = allocate(NBYTES)
    as_array(source)[:] = 5
    made.register([source])
    return made


def write(made: ShmTransport, owner: Owner, copies: Copies) -> Progress:
    handle = made.post(made.connect(owner.descriptor, "decode0", 1), copies, Tag(ROOM, 1))
    assert eventually(lambda: made.poll(handle).state != "pending")
    return made.poll(handle)


def test_pages_arrive_through_an_abstract_socket_and_through_one_in_a_folder(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        owner, made = Owner(folder), writer()
        assert write(made, owner, one(100, 50)).state == "done" and owner.changed == 50
        if folder is not None:
            [inside] = folder.iterdir()
            assert inside.stat().st_mode & 0o777 == 0o700
        made.close()
        owner.transport.close()
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


# --- strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [b"x", b"KVSH" + b"\xff" * 60, b"\0" * 1000])
def test_a_stranger_is_refused_and_gets_no_file(owner: Owner, message: bytes) -> None:
    with owner.knock(message) as raw:
        answer, files, _, _ = socket.recv_fds(raw, 64, 8)
        assert wire.unpack_answer(answer) == (1, 0) and files == []
        assert raw.recv(1) == b""
    assert owner.transport.counters["refused"] == 1 and owner.deaths == []


def test_a_wrong_secret_gets_no_file(owner: Owner) -> None:
    with owner.knock(owner.hello(secret=b"\0" * wire.SECRET_BYTES)) as raw:
        answer, files, _, _ = socket.recv_fds(raw, 64, 8)
        assert wire.unpack_answer(answer) == (2, 0) and files == []
    assert owner.transport.counters["admitted"] == 0


def test_a_silent_caller_is_dropped(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll.runtime.transports.shm_owner._HELLO_LIMIT_S", 0.05)
    with owner.knock() as raw:
        assert raw.recv(1) == b""
    assert eventually(lambda: owner.transport.counters["refused"] == 1)


def test_an_admitted_writer_s_end_is_reported_once_and_a_bye_is_none(owner: Owner) -> None:
    first, second = owner.knock(owner.hello()), owner.knock(owner.hello())
    for raw in (first, second):
        answer, files, _, _ = socket.recv_fds(raw, 64, 8)
        assert wire.unpack_answer(answer) == (wire.WELCOME, 2)
        assert all(is_sealed(file) for file in files)
        for file in files:
            os.close(file)
    first.close()
    assert owner.deaths == [], "its life goes on in another connection"
    second.close()
    assert eventually(lambda: owner.deaths) and owner.deaths == [("prefill0", 1)]
    third = owner.knock(owner.hello(epoch=2))
    for file in socket.recv_fds(third, 64, 8)[1]:
        os.close(file)
    third.send(wire.BYE)
    third.close()
    with owner.knock(owner.hello(epoch=1)) as late:
        assert wire.unpack_answer(late.recv(64)) == (4, 0), "an older life after a newer one"
    assert owner.deaths == [("prefill0", 1)]


def test_a_closed_writer_is_reported_and_a_closed_owner_ends_the_writes(owner: Owner) -> None:
    made, slow = writer(), writer("prefill8", bytes_per_s=1000)
    assert write(made, owner, one(0, 8)).state == "done"
    made.close()
    assert eventually(lambda: owner.deaths == [("prefill9", 1)])
    handle = slow.post(slow.connect(owner.descriptor, "decode0", 1), one(0, NBYTES), Tag(ROOM, 1))
    assert eventually(lambda: owner.changed > 8)
    owner.transport.close()
    assert eventually(lambda: slow.poll(handle).drained)
    assert slow.poll(handle).state == "failed" and owner.deaths == [("prefill9", 1)]
    late = slow.post(slow.connect(owner.descriptor, "decode0", 1), one(0, 8), Tag(ROOM, 2))
    assert eventually(lambda: slow.poll(late).state == "failed") and slow.poll(late).drained
    slow.close()


# --- the control page -----------------------------------------------------------------------------


def test_the_control_page_tells_revocations_lives_and_the_end() -> None:
    page = ControlPage(epoch=3)
    view = ControlView(page.file, epoch=3)
    assert view.why_stop(ROOM) is None
    page.revoke(Incarnation(1, 1, 3))
    assert view.why_stop(ROOM) is None, "another attempt at the room is another incarnation"
    page.revoke(ROOM)
    assert view.why_stop(ROOM) == "revoked by its owner"
    assert ControlView(page.file, epoch=4).why_stop(ROOM) == "the owner is in another life"
    page.close()
    assert view.why_stop(Incarnation(9, 0, 3)) == "the owner has closed"


def test_a_writer_that_slept_for_a_ring_of_revocations_misses_the_oldest_only() -> None:
    page = ControlPage(epoch=1)
    view = ControlView(page.file, epoch=1)
    for room in range(5000):
        page.revoke(Incarnation(room, 0, 1))
    assert view.why_stop(Incarnation(0, 0, 1)) is None
    assert view.why_stop(Incarnation(4999, 0, 1)) == view.why_stop(Incarnation(904, 0, 1)) == "revoked by its owner"


def test_a_revoked_write_stops_at_its_next_piece(owner: Owner) -> None:
    made = writer(bytes_per_s=20_000)
    handle = made.post(made.connect(owner.descriptor, "decode0", 1), one(0, NBYTES), Tag(ROOM, 1))
    assert eventually(lambda: owner.changed)
    assert not owner.transport.revoke(ROOM), "one-sided: asking is no proof"
    assert eventually(lambda: made.poll(handle).drained)
    assert made.poll(handle) == Progress("failed", True, "revoked by its owner")
    placed = owner.changed
    assert placed < NBYTES
    as_array(owner.pool)[:] = 0
    assert write(made, owner, one(0, 8)).reason == "revoked by its owner" and owner.changed == 0
    made.close()


# --- memory ---------------------------------------------------------------------------------------


def test_a_pool_keeps_itself_alive_in_every_view() -> None:
    region = allocate(NBYTES)
    array = as_array(region)
    array[:4] = (1, 2, 3, 4)
    del region
    assert array[:5].tolist() == [1, 2, 3, 4, 0]
    with pytest.raises(TransportError, match="0 bytes"):
        allocate(0)
    with pytest.raises(TransportError, match="smaller pool"):
        allocate(1 << 60)


def test_a_tensor_shares_the_pool() -> None:
    torch = pytest.importorskip("torch")
    region = allocate(64)
    tensor = as_tensor(region)
    tensor[3] = 7
    assert tensor.dtype == torch.uint8 and as_array(region)[3] == 7


def test_a_file_that_could_shrink_or_is_too_small_is_not_mapped() -> None:
    """Touching what a peer has cut off would kill this process with SIGBUS."""
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 4096)
    with pytest.raises(TransportError, match="not sealed"):
        Mapping(file, 4096)
    os.close(file)
    small = allocate(4096)
    assert small.file is not None
    with pytest.raises(TransportError, match="smaller than the 8192"):
        Mapping(small.file, 8192)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(small.file, 0)
    with pytest.raises(TransportError, match="smaller than"):
        ControlView(small.file, 1)
    assert CONTROL_BYTES > 4096


def test_plain_memory_can_be_read_from_but_not_written_to(owner: Owner) -> None:
    plain = ShmTransport("decode1", 1, lambda: None, lambda *life: None)
    memory = np.zeros(NBYTES, np.uint8)
    descriptor = plain.register([Region(memory.ctypes.data, NBYTES, keep=memory)])
    made = writer()
    handle = made.post(made.connect(descriptor, "decode1", 1), one(0, 8), Tag(ROOM, 1))
    assert eventually(lambda: made.poll(handle).state == "failed")
    assert "not shared memory" in str(made.poll(handle).reason) and made.poll(handle).drained
    memory[:] = 6
    assert write(plain, owner, one(0, 8)).state == "done" and as_array(owner.pool)[0] == 6
    for each in (made, plain):
        each.close()


def test_memory_and_options_that_cannot_be_used_are_named() -> None:
    made = ShmTransport("decode0", 1, lambda: None, lambda *life: None)
    for regions, words in (
        ([Region(0, 8, "cuda")], "cuda memory"),
        ([], "at least one"),
        ([Region(4096, 8, file=os.open(os.devnull, os.O_RDONLY))], "cannot be sealed"),
    ):
        with pytest.raises(TransportError, match=words) as error:
            made.register(regions)
        assert "\n" not in str(error.value)
    made.close()
    with pytest.raises(TransportError, match="writable folder"):
        bad = ShmTransport("decode0", 1, lambda: None, lambda *life: None, socket_dir=Path("/nowhere"))
        bad.register([allocate(8)])
    with pytest.raises(TransportError, match="bytes_per_s"):
        ShmTransport("decode0", 1, lambda: None, lambda *life: None, bytes_per_s=0)


def test_a_newer_life_retires_the_older_peer_without_feigning_a_death(owner: Owner) -> None:
    made = writer()
    assert write(made, owner, one(0, 8)).state == "done"
    older = made.connect(owner.descriptor, "decode0", 1)
    assert made.connect(owner.descriptor, "decode0", 1) is older
    made.connect(descriptors.encode("shm", wire.VERSION, msgspec.structs.replace(owner.body, epoch=2)), "decode0", 2)
    assert eventually(lambda: owner.transport._doorkeeper and not owner.transport._doorkeeper._visitors)
    progress = made.poll(made.post(older, one(0, 8), Tag(ROOM, 2)))
    assert progress.drained and "epoch 2 has come" in str(progress.reason)
    made.close()
    assert owner.deaths == []


def test_close_leaves_no_thread_and_no_file() -> None:
    def mine() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvpoll-shm")]

    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir())), mine()
    owner, made = Owner(), writer()
    assert write(made, owner, one(0, 8)).state == "done"
    made.close()
    owner.transport.close()
    del owner, made
    gc.collect()  # the owner and the function that it gave to its transport refer to each other
    assert (len(list(Path("/proc/self/fd").iterdir())), mine()) == before
