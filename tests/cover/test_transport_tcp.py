"""tcp against peers that are hostile, silent or slow: what is refused changes nothing, and silence proves nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport_stage import LIMIT_S, eventually

from kvpoll.runtime.transports import descriptor as descriptors
from kvpoll.runtime.transports import tcp_wire as wire
from kvpoll.runtime.transports.interface import Copies, Progress, Region, Tag, TransportError
from kvpoll.runtime.transports.shm_memory import allocate, as_array
from kvpoll.runtime.transports.tcp import TcpTransport
from kvpoll.spec.vocabulary import Incarnation

NBYTES = 1 << 16
ROOM = Incarnation(1, 0, 1)


def transport(node: str, epoch: int = 1, **options: object) -> TcpTransport:
    return TcpTransport(node, epoch, lambda: None, lambda *life: None, **options)  # type: ignore[arg-type]


class Owner:
    """A real owner of 64 KiB of zeros."""

    def __init__(self) -> None:
        self.transport = transport("decode0")
        self.pool = allocate(NBYTES)
        self.descriptor = self.transport.register([self.pool])
        self.body = descriptors.decode("tcp", wire.VERSION, self.descriptor, wire.Descriptor, "decode0", 1)
        assert self.transport._receiver is not None
        self.cookie = self.transport._receiver.cookie

    @property
    def changed(self) -> int:
        return int((as_array(self.pool) != 0).sum())

    def knock(self) -> socket.socket:
        """A raw connection to its port."""
        return socket.create_connection((self.body.host, self.body.port), LIMIT_S)

    def greeted(self, lane: int = 0, epoch: int = 1) -> socket.socket:
        """A connection of a writer that has been welcomed."""
        raw = self.knock()
        raw.sendall(wire.pack_hello(wire.Hello("prefill0", epoch, lane, 1, self.cookie)))
        assert answer(raw) == (wire.WELCOME, 0)
        return raw


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.transport.close()


def answer(raw: socket.socket) -> tuple[int, int]:
    return wire.unpack_answer(raw.recv(wire.ANSWER_BYTES, socket.MSG_WAITALL))


def frame(*rows: tuple[int, int], write: int = 7, flags: int = wire.LAST, payload: int | None = None) -> bytes:
    """Header and table of a DATA frame with these (target, nbytes)."""
    target, nbytes = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    total = int(nbytes.sum()) if payload is None else payload
    return wire.pack_frame(wire.Header(wire.DATA, flags, 1, write, ROOM, len(rows), total), target, nbytes)


def is_closed(raw: socket.socket) -> bool:
    try:
        return raw.recv(1) == b""
    except ConnectionResetError:
        return True


def serves(owner: Owner) -> bool:
    """Whether a good writer still gets its bytes through."""
    writer, source = transport("prefill9"), allocate(NBYTES)
    as_array(source)[:] = 5
    writer.register([source])
    handle = writer.post(writer.connect(owner.descriptor, "decode0", 1), one(0, 100), Tag(Incarnation(9, 0, 1), 1))
    done = eventually(lambda: writer.poll(handle).state != "pending") and writer.poll(handle).state == "done"
    writer.close()
    return done and owner.changed == 100


def one(at: int, nbytes: int) -> Copies:
    return Copies(np.array([at]), np.array([at]), np.array([nbytes]))


# --- strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 8,
        b"\0" * 200,
        b"KVTH" + b"\xff" * 200,
    ],
)
def test_a_stranger_is_turned_away_and_counted(owner: Owner, hello: bytes) -> None:
    with owner.knock() as raw:
        raw.sendall(hello)
        assert answer(raw)[0] == 16 and is_closed(raw)
    assert eventually(lambda: owner.transport.counters["malformed"] == 1)
    assert owner.changed == 0 and serves(owner)


@pytest.mark.parametrize(
    ("owner_epoch", "cookie", "status"), [(1, b"\0" * wire.COOKIE_BYTES, 17), (2, None, 18)], ids=["cookie", "life"]
)
def test_a_wrong_cookie_or_life_is_refused(owner: Owner, owner_epoch: int, cookie: bytes | None, status: int) -> None:
    with owner.knock() as raw:
        raw.sendall(wire.pack_hello(wire.Hello("prefill0", 1, 0, owner_epoch, cookie or owner.cookie)))
        assert answer(raw)[0] == status and is_closed(raw)
    assert eventually(lambda: owner.transport.counters["refused"] == 1)
    assert serves(owner)


def test_an_older_life_of_a_writer_is_refused_after_a_newer_one_and_loses_its_connection(owner: Owner) -> None:
    older = owner.greeted(epoch=1)
    newer = owner.greeted(epoch=2)
    assert is_closed(older)
    with owner.knock() as raw:
        raw.sendall(wire.pack_hello(wire.Hello("prefill0", 1, 0, 1, owner.cookie)))
        assert answer(raw)[0] == 19
    newer.close()


@pytest.mark.parametrize(
    "bad",
    [
        frame((NBYTES, 8)),
        frame((NBYTES - 4, 8)),
        frame((-8, 8)),
        frame((0, 8), (NBYTES, 8)),
        frame((0, 8), payload=16),
        frame((0, 0), payload=0),
        frame((0, 1 << 40), payload=1 << 40),
        frame((0, (1 << 62)), (8, (1 << 62)), (16, (1 << 62)), (24, (1 << 62)), payload=0),
        b"KVTF" + b"\xff" * 200,
        b"\0" * 200,
        wire.pack_frame(wire.Header(wire.DATA, 1, 2, 7, ROOM, 1, 8), np.array([0]), np.array([8])),
        wire.pack_frame(wire.Header(9, 1, 1, 7, ROOM, 1, 8), np.array([0]), np.array([8])),
    ],
    ids=["behind", "across", "before", "second", "sum", "empty", "huge", "overflow", "ones", "zeros", "life", "kind"],
)
def test_a_malformed_frame_closes_its_connection_and_changes_nothing(owner: Owner, bad: bytes) -> None:
    raw = owner.greeted()
    raw.sendall(bad + b"\xee" * 64)
    assert is_closed(raw)
    assert eventually(lambda: owner.transport.counters["malformed"] == 1)
    assert owner.changed == 0 and serves(owner)


def test_a_writer_that_vanishes_in_the_middle_of_a_frame_leaves_only_what_it_sent(owner: Owner) -> None:
    raw = owner.greeted()
    raw.sendall(frame((0, 100)) + b"\xee" * 60)
    assert eventually(lambda: owner.changed == 60)
    raw.close()
    assert eventually(lambda: owner.transport.counters["connections_ended"] == 1)
    assert owner.changed == 60


@given(st.binary(max_size=200))
def test_no_bytes_make_the_decoders_raise_anything_but_malformed(data: bytes) -> None:
    for unpack, size in ((wire.unpack_header, wire.HEADER_BYTES), (wire.node_bytes_of, wire.HELLO_BYTES)):
        for start in (b"", b"KVTF\1\0\1\0", b"KVTH\1\0\5\0"):
            whole = (start + data).ljust(size, b"\0")[:size]
            try:
                unpack(whole)
            except wire.Malformed:
                continue
            assert whole[:4] in (b"KVTF", b"KVTH")


def test_a_frame_is_read_back() -> None:
    target, nbytes = np.array([0, 4096], np.int64), np.array([8, 16], np.int64)
    header = wire.Header(wire.DATA, wire.LAST, 3, 1 << 60, Incarnation((1 << 63) - 1, 2, 3), 2, 24)
    data = wire.pack_frame(header, target, nbytes)
    assert wire.unpack_header(data[: wire.HEADER_BYTES]) == header
    read = wire.unpack_ranges(header, data[wire.HEADER_BYTES :])
    assert [column.tolist() for column in read] == [[0, 4096], [8, 16]]


# --- the fence ------------------------------------------------------------------------------------


def test_revoke_fences_a_frame_that_is_half_received(owner: Owner) -> None:
    """The bytes that are still on their way go into the bin, the connection and its other writes go on."""
    raw = owner.greeted()
    raw.sendall(frame((0, 1000)) + b"\xee" * 400)
    assert eventually(lambda: owner.changed == 400)
    assert owner.transport.revoke(ROOM)
    as_array(owner.pool)[:] = 0
    raw.sendall(b"\xee" * 600)
    assert answer(raw) == (wire.REVOKED, 7)
    assert owner.changed == 0 and owner.transport.counters["bytes_thrown"] == 600
    raw.sendall(frame((0, 8), write=8) + b"\xee" * 8)
    assert answer(raw) == (wire.REVOKED, 8) and owner.changed == 0
    other = wire.pack_frame(
        wire.Header(wire.DATA, wire.LAST, 1, 9, ROOM._replace(attempt=1), 1, 8), np.array([0]), np.array([8])
    )
    raw.sendall(other + b"\xee" * 8)
    assert answer(raw) == (wire.PLACED, 9) and owner.changed == 8
    raw.close()


def test_revoke_says_no_when_a_thread_does_not_let_go_in_time(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll.runtime.transports.tcp_owner._REVOKE_LIMIT_S", 0.05)
    raw = owner.greeted()
    receiver = owner.transport._receiver
    assert receiver is not None
    [lane] = receiver._open
    with lane._gate:  # as if it were in the middle of placing
        assert not owner.transport.revoke(ROOM)
    assert owner.transport.revoke(ROOM)
    raw.close()


def test_a_newer_connection_of_a_lane_is_welcomed_only_after_the_older_one_has_ended(owner: Owner) -> None:
    """It is how a writer learns that nothing of a lost connection is placed any more."""
    older = owner.greeted()
    older.sendall(frame((0, 1000)) + b"\xee" * 400)
    assert eventually(lambda: owner.changed == 400)
    newer = owner.greeted()
    as_array(owner.pool)[:] = 0
    with contextlib.suppress(OSError):
        older.sendall(b"\xee" * 600)
    newer.sendall(frame((0, 8), write=8) + b"\xee" * 8)
    assert answer(newer) == (wire.PLACED, 8) and owner.changed == 8
    newer.close()


# --- silence --------------------------------------------------------------------------------------


class SilentOwner:
    """Welcomes writers and then says nothing; knows every connection that it got."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections: list[socket.socket] = []
        self.descriptor = descriptors.encode(
            "tcp", wire.VERSION,
            wire.Descriptor("decode0", 1, "127.0.0.1", self.listener.getsockname()[1], b"A" * 32, [NBYTES]),
        )  # fmt: skip
        self.welcomes = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            self.welcomes.acquire()
            connection.sendall(wire.pack_answer(wire.WELCOME, 0))

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def silent() -> Iterator[SilentOwner]:
    made = SilentOwner()
    yield made
    made.close()


def writer_to(silent: SilentOwner, **options: object) -> tuple[TcpTransport, int]:
    """A writer whose whole memory is posted, and taken up by its thread."""
    writer = transport("prefill0", **options)
    writer.register([allocate(NBYTES)])
    handle = writer.post(writer.connect(silent.descriptor, "decode0", 1), one(0, NBYTES), Tag(ROOM, 1))
    assert eventually(lambda: len(silent.connections) == 1)
    silent.welcomes.release()
    return writer, handle


def test_silence_fails_a_write_and_proves_nothing_until_a_newer_connection_is_welcomed(silent: SilentOwner) -> None:
    writer, handle = writer_to(silent, stall_s=0.3)
    assert eventually(lambda: writer.poll(handle).state == "failed")
    progress = writer.poll(handle)
    assert not progress.drained and "no progress" in str(progress.reason)
    assert eventually(lambda: len(silent.connections) == 2), "it asks what became of its bytes"
    assert not writer.poll(handle).drained
    silent.welcomes.release()
    assert eventually(lambda: writer.poll(handle).drained)
    assert writer.poll(handle).reason == progress.reason
    writer.close()


def test_an_abort_fails_at_once_and_waits_for_the_owner_s_word(silent: SilentOwner) -> None:
    writer, handle = writer_to(silent)
    assert eventually(lambda: writer.writes._writes[handle].holds)
    writer.abort(handle)
    assert writer.poll(handle) == Progress("failed", False, "aborted by its user")
    assert eventually(lambda: len(silent.connections[0].recv(NBYTES * 2, socket.MSG_PEEK)) > 0)
    silent.connections[0].sendall(wire.pack_answer(wire.STOPPED, handle + 1))  # of a write that nobody waits for
    silent.connections[0].sendall(wire.pack_answer(wire.STOPPED, handle))
    assert eventually(lambda: writer.poll(handle).drained)
    writer.close()


def test_the_end_of_the_connection_drains(silent: SilentOwner) -> None:
    writer, handle = writer_to(silent)
    assert eventually(lambda: writer.writes._writes[handle].holds)
    silent.connections[0].close()
    assert eventually(lambda: writer.poll(handle).drained) and writer.poll(handle).state == "failed"
    writer.close()


def test_an_answer_that_is_none_fails_without_proof(silent: SilentOwner) -> None:
    writer, handle = writer_to(silent)
    assert eventually(lambda: writer.writes._writes[handle].holds)
    silent.connections[0].sendall(struct.pack("<4sIQ", b"HTTP", 1, handle))
    assert eventually(lambda: writer.poll(handle).state == "failed")
    assert not writer.poll(handle).drained and "no answer" in str(writer.poll(handle).reason)
    writer.close()


def test_close_does_not_wait_for_the_silent(silent: SilentOwner) -> None:
    writer, handle = writer_to(silent)
    assert eventually(lambda: writer.writes._writes[handle].holds)
    writer.close()
    progress = writer.poll(handle)
    assert progress.state == "failed" and not progress.drained
    assert not [thread for thread in threading.enumerate() if thread.name == "kvpoll-tcp-to-decode0"]


def test_nobody_at_the_address_fails_the_write_with_nothing_sent() -> None:
    gone = Owner()
    gone.transport.close()
    writer = transport("prefill0")
    writer.register([allocate(NBYTES)])
    handle = writer.post(writer.connect(gone.descriptor, "decode0", 1), one(0, 8), Tag(ROOM, 1))
    assert eventually(lambda: writer.poll(handle).state == "failed")
    progress = writer.poll(handle)
    assert progress.drained and "decode0 epoch 1 at 127.0.0.1" in str(progress.reason)
    writer.close()


# --- options and lives ----------------------------------------------------------------------------


def test_it_listens_on_loopback_only_unless_told_otherwise(owner: Owner) -> None:
    receiver = owner.transport._receiver
    assert receiver is not None and receiver._listener.getsockname()[0] == "127.0.0.1"
    with pytest.raises(TransportError, match="advertise="):
        transport("decode0", host="0.0.0.0")


@pytest.mark.parametrize("options", [{"lanes": 0}, {"stall_s": 0}, {"bytes_per_s": -1}, {"lanes": 65}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(TransportError, match="lanes=") as error:
        transport("decode0", **options)
    assert "\n" not in str(error.value)


def test_a_taken_port_and_a_strange_address_are_one_line(owner: Owner) -> None:
    for options, words in (({"port": owner.body.port}, "in use"), ({"host": "192.0.2.1"}, "cannot listen")):
        late = transport("decode1", **options)
        with pytest.raises(TransportError, match=words) as error:
            late.register([allocate(8)])
        assert "\n" not in str(error.value)
        late.close()


def test_memory_that_it_cannot_send_is_refused() -> None:
    made = transport("decode0")
    with pytest.raises(TransportError, match="cuda memory"):
        made.register([Region(0, 8, "cuda")])
    with pytest.raises(TransportError, match="at least one"):
        made.register([])
    made.close()


def test_one_descriptor_is_one_peer_and_an_older_life_takes_no_writes(owner: Owner) -> None:
    writer = transport("prefill0")
    writer.register([allocate(NBYTES)])
    newer = descriptors.encode("tcp", wire.VERSION, msgspec.structs.replace(owner.body, epoch=2))
    peer = writer.connect(owner.descriptor, "decode0", 1)
    assert writer.connect(owner.descriptor, "decode0", 1) is peer
    writer.connect(newer, "decode0", 2)
    again = writer.connect(owner.descriptor, "decode0", 1)
    for retired in (peer, again):
        progress = writer.poll(writer.post(retired, one(0, 8), Tag(ROOM, 1)))
        assert progress.state == "failed" and progress.drained and "epoch 2 has come" in str(progress.reason)
    writer.close()


def test_a_full_queue_fails_the_write_and_blocks_nobody(silent: SilentOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll.runtime.transports.writer_thread.QUEUE_MAX", 3)
    writer = transport("prefill0")
    writer.register([allocate(NBYTES)])
    peer = writer.connect(silent.descriptor, "decode0", 1)  # it is not welcomed, so nothing leaves the queue
    handles = [writer.post(peer, one(0, 8), Tag(ROOM, n)) for n in range(5)]
    assert [writer.poll(handle).state for handle in handles] == ["pending"] * 3 + ["failed"] * 2
    assert "queued" in str(writer.poll(handles[-1]).reason) and writer.poll(handles[-1]).drained
    writer.close()
