"""What a serving engine embeds: the two ends of a KV transfer.

    prefill = PrefillEndpoint(Settings(layout, bootstrap="127.0.0.1:8998"))
    transfer = prefill.admit(room=4711)                    # Bootstrapping
    ... transfer.poll() is KVPoll.WaitingForInput ...
    transfer.send(pages=[3, 4, 5], last=True)              # Transferring, then Success
    transfer.release()

    decode = DecodeEndpoint(Settings(layout))
    transfer = decode.admit(room=4711, bootstrap="127.0.0.1:8998")
    ... transfer.poll() is KVPoll.WaitingForInput ...
    transfer.publish(pages=[7, 8, 9], row=0)
    ... transfer.poll() is KVPoll.Success: the pages are filled ...
    transfer.commit()
    ... the request has ended ...
    transfer.release()

One endpoint is one rank. It has a loop in a thread of its own; every call of the engine returns at once and may come
from any thread. What happens is learned by ``poll``, by a callback, or by awaiting. Polls are of this rank alone:
ranks of a group merge theirs by minimum, as ``statemachine.agreement`` does it.

The engine owns the pages and says which ones a transfer uses. It gets them back by ``pages_free``, and not before: a
transfer that has failed keeps its pages until every writer is proven quiet (S1), however long that takes. What waits
for that proof is counted as quarantined. Pages that are still held are refused to another transfer.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from kvpoll.runtime.bootstrap import RankInfo, Topology
from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.control.plane import ControlPlane
from kvpoll.runtime.embedded import EmbeddedEngine, Receiver, Sender
from kvpoll.runtime.host import Host
from kvpoll.runtime.loop import Loop
from kvpoll.runtime.metrics import EndpointMetrics
from kvpoll.runtime.pools import aux_row
from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.runtime.server_watch import ServerWatch
from kvpoll.runtime.trace_file import TraceFile
from kvpoll.runtime.transports import allocate, make
from kvpoll.runtime.writes import Writes
from kvpoll.spec.invariants import Watch
from kvpoll.spec.protocol import Value, load
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import NodeStarted, Violated
from kvpoll.spec.vocabulary import POLL_NUMBERS
from kvpoll.statemachine.conduct import probes_ranks, watches_server
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.host import rank_name

CLOSE_LIMIT_S: Final = 5.0


class KVPoll(IntEnum):
    """How a transfer stands on this rank. Ranks merge by minimum."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class TransferError(Exception):
    """A call came at a moment when it cannot mean anything, or with pages that are not free. One line: cause, mend."""


@dataclass(frozen=True)
class Settings:
    """What an endpoint is told.

    layout: this rank's memory. bootstrap: "host:port" of the prefill engine's bootstrap server; prefill only.
    name: of the engine; prefill's is its bootstrap address. sizes: parallel sizes of this engine (dp, pp, tp, cp), and
    dp, pp, tp this rank's place. destinations: how many decode ranks write metadata for a room to each prefill rank
    (decode TP / prefill TP, at least 1). pool: the engine's own memory; made here where it is None.

    profile, rules: of the protocol; reference unless there is a reason. host, port: where the control plane listens.
    transport, options: see ``kvpoll doctor``. epoch: this process's life, larger after every restart; by default
    milliseconds of the wall clock. token: bearer token of the bootstrap server. secret: of the control plane.
    monitored: check the invariants on what this rank does, as it does it. trace: record it to this file.
    """

    layout: Layout
    bootstrap: str = ""
    name: str = ""
    sizes: Sizes = field(default_factory=Sizes)
    dp: int = 0
    pp: int = 0
    tp: int = 0
    destinations: int = 1
    follows_room: bool = True
    pool: KVPool | None = None
    profile: str = "reference"
    rules: dict[str, Value] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 0
    transport: str = "shm"
    options: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    token: str | None = None
    secret: bytes | None = None
    monitored: bool = False
    trace: Path | None = None


class Transfer:
    """One request's transfer on this rank. ``on_poll`` and ``on_pages_free`` are called from the endpoint's thread."""

    def __init__(self, endpoint: Endpoint, rid: str, pair: tuple[int, int]) -> None:
        self.endpoint = endpoint
        self.rid = rid
        self.pair = pair
        self.on_poll: Callable[[Transfer, KVPoll], None] | None = None
        self.on_pages_free: Callable[[Transfer], None] | None = None
        self.is_over = False
        self.admitted_s = time.monotonic()
        self._poll = KVPoll.Bootstrapping
        self._cause: str | None = None
        self._holds = False
        self._changed = threading.Condition()
        self._awaiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def poll(self) -> KVPoll:
        """How it stands now. Never waits."""
        return self._poll

    @property
    def failure(self) -> str | None:
        """Why it failed: the first cause, and what the peer said of it. None unless Failed."""
        return self._cause

    @property
    def pages_free(self) -> bool:
        """May the pages be used again? True also before the first were given."""
        return not self._holds

    def abort(self, cause: str = "aborted") -> None:
        """Give up. The peer is told at once; ``release`` is still to be called."""
        self.endpoint.do(self._abort, cause)

    def _abort(self, cause: str) -> None:
        self.endpoint.rank.give_up(self.pair, cause)

    def release(self) -> None:
        """The engine is done with this transfer, and on decode with its pages. Gives up what is not over yet."""
        self.endpoint.do(self.endpoint.rank.finish, self.pair)

    def wait(self, *polls: KVPoll, timeout_s: float) -> KVPoll:
        """Block until the poll is one of these, Failed, or Success, or the time is over; returns it."""
        wanted = {*polls, KVPoll.Failed, KVPoll.Success}
        with self._changed:
            self._changed.wait_for(lambda: self._poll in wanted, timeout_s)
        return self._poll

    def wait_pages_free(self, timeout_s: float) -> bool:
        """Block until the pages may be used again, or the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._holds, timeout_s)

    async def reached(self, *polls: KVPoll) -> KVPoll:
        """Await one of these polls, Failed or Success. Bound it with ``asyncio.timeout`` where that is wanted."""
        wanted = {*polls, KVPoll.Failed, KVPoll.Success}
        mine = (asyncio.get_running_loop(), asyncio.Event())
        self._awaiting.append(mine)
        try:
            while self._poll not in wanted:
                await mine[1].wait()
                mine[1].clear()
        finally:
            self._awaiting.remove(mine)
        return self._poll

    # -- from the endpoint's thread

    def _move(self, poll: KVPoll, cause: str | None) -> None:
        """The room has another poll."""
        with self._changed:
            self._poll = poll
            self._cause = cause if poll == KVPoll.Failed else None
            self._changed.notify_all()
        self._wake()
        if self.on_poll is not None:
            self.on_poll(self, poll)

    def _hold(self, holds: bool) -> None:
        """Pages were taken, or came back."""
        if holds == self._holds:
            return
        with self._changed:
            self._holds = holds
            self._changed.notify_all()
        self._wake()
        if not holds and self.on_pages_free is not None:
            self.on_pages_free(self)

    def _wake(self) -> None:
        for loop, event in list(self._awaiting):
            loop.call_soon_threadsafe(event.set)


class PrefillTransfer(Transfer):
    """Prefill's end: the source."""

    def send(self, pages: Sequence[int], last: bool = False) -> None:
        """Send the prompt's next pages, whose KV is computed; ``last`` with the final ones, which may be none.

        Each decode rank gets what it needs of them. Raises TransferError when a page is held by another transfer.
        """
        given = tuple(int(page) for page in pages)
        self.endpoint.claim(self, given)
        self.endpoint.do(self._send, given, last)

    def _send(self, pages: tuple[int, ...], last: bool) -> None:
        rank = self.endpoint.rank
        assert isinstance(rank, Sender)
        rank.send_chunk(self.pair, pages, last)


class DecodeTransfer(Transfer):
    """Decode's end: the destination."""

    def publish(self, pages: Sequence[int], row: int) -> None:
        """Tell prefill where to write: pages in prompt order, and the aux row. Once, when WaitingForInput.

        Raises TransferError when a page is held by another transfer.
        """
        given = tuple(int(page) for page in pages)
        self.endpoint.claim(self, given)
        self.endpoint.do(self._publish, given, row)

    def _publish(self, pages: tuple[int, ...], row: int) -> None:
        rank = self.endpoint.rank
        assert isinstance(rank, Receiver)
        rank.publish_to(self.pair, pages, row)

    def commit(self) -> None:
        """After Success: the engine decodes from the pages. Nothing can fail this transfer any more; ``release`` gives
        the pages back when the request has ended.
        """
        rank = self.endpoint.rank
        assert isinstance(rank, Receiver)
        self.endpoint.do(rank.commit, self.pair)

    def aux(self, row: int) -> aux_row.AuxRow | None:
        """What the aux row says; None when it is not this request's (S5)."""
        found = aux_row.unpack(self.endpoint.pool.get_row(row))
        return found if found is not None and found.pair == self.pair else None


class Endpoint:
    """What both ends share: the thread, the memory, the transport. Use ``PrefillEndpoint`` or ``DecodeEndpoint``.

    Raises BadInput when it cannot start; then nothing is left of it.
    """

    side = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.protocol = load()
        self.profile = self.protocol.profile(settings.profile).with_rules(settings.rules)
        self.epoch = settings.epoch if settings.epoch is not None else time.time_ns() // 1_000_000
        self.engine_name = self._engine_name()
        self.node = rank_name(self.engine_name, settings.sizes, settings.dp, settings.pp, settings.tp)
        self.transfers: dict[tuple[int, int], Transfer] = {}
        self.violations: list[Violated] = []
        self.is_draining = False
        self._claims: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._trace: TraceFile | None = None
        self._plane = ControlPlane(self.node, self.epoch, settings.host, settings.port, token=settings.secret)
        try:
            self._build()
        except BaseException:
            self._plane.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"kvpoll {self.node}", daemon=True)
        self._plane.hand_over()
        self._thread.start()

    def _engine_name(self) -> str:
        raise AssertionError("an endpoint of no side")

    def _make_rank(self, engine: EmbeddedEngine) -> Sender | Receiver:
        raise AssertionError("an endpoint of no side")

    def _build(self) -> None:
        settings = self.settings
        loop = Loop(self._plane)
        servers = {self.engine_name: settings.bootstrap} if settings.bootstrap else {}
        self.host = host = Host(
            self.protocol, self.profile, self._plane, loop, _Lengths(settings.layout.page_tokens), servers,
            self.epoch, settings.token, mla=settings.layout.kind == "mla",
        )  # fmt: skip
        host.fits = self._problem
        if settings.trace is not None:
            header = {
                "node": self.node,
                "epoch": self.epoch,
                "profile": self.profile.name,
                "spec": self.protocol.digest,
            }
            self._trace = TraceFile(settings.trace, header)
            host.stream.recording = True
            host.emitted.append(self._trace)
        if settings.monitored:
            self._watch = Watch(host.stream, self.protocol.bounds)
            host.stream.subscribe(Violated, self.violations.append)
            host.watch_due = self._watch
        self.pool = settings.pool or KVPool.on_host(
            settings.layout, allocate(settings.transport, settings.layout.total_bytes)
        )
        self.transport = make(
            settings.transport, self.node, self.epoch, self._woken,
            lambda node, epoch: loop.post(host.saw_end, node, epoch), **settings.options,
        )  # fmt: skip
        try:
            host.memory = (self.transport.register(self.pool.regions()), settings.layout.to_bytes())
        except Exception as error:
            self.transport.close()
            raise BadInput(f"{settings.transport}: {error}") from None
        host.writes = Writes(host, self.pool, self.transport)
        engine = EmbeddedEngine(host, self.engine_name, self.epoch, settings)
        self.rank = self._make_rank(engine)
        self.rank.told = self._told
        host.rank = self.rank
        self.metrics = EndpointMetrics(self)
        host.emit(NodeStarted(host.now, self.node, self.epoch))

    def _woken(self) -> None:
        writes = getattr(self.host, "writes", None)
        if writes is not None:
            writes.wake()

    def _run(self) -> None:
        self.host.loop.run(self.host.receive)
        self.host.close()
        self._plane.close(linger_s=0.2)

    # -- from the engine

    @property
    def dropped(self) -> dict[str, int]:
        """Control messages that were dropped, by reason."""
        return self._plane.dropped

    @property
    def missed(self) -> int:
        """Control messages that never arrived."""
        return self._plane.missed

    def do(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have the endpoint's thread call a function."""
        self.host.loop.post(function, *arguments)

    def claim(self, transfer: Transfer, pages: tuple[int, ...]) -> None:
        """These pages belong to this transfer until they are free. Raises TransferError when one cannot."""
        size = self.settings.layout.pages
        with self._lock:
            for page in pages:
                if not 0 <= page < size:
                    raise TransferError(f"page {page} is outside the pool of {size} pages")
                holder = self._claims.get(page, transfer.pair)
                if holder != transfer.pair:
                    raise TransferError(
                        f"page {page} is still held by room {holder[0]} attempt {holder[1]}: wait for its pages_free"
                    )
            for page in pages:
                self._claims[page] = transfer.pair
        if pages:
            transfer._hold(True)

    def _open(self, transfer: Transfer) -> None:
        with self._lock:
            if self.is_draining:
                raise TransferError(f"{self.node} is draining and takes no new requests")
            if not 0 < transfer.pair[0] < 1 << 63:
                raise TransferError(f"room {transfer.pair[0]} is not from 1 to 2^63 - 1")
            if transfer.pair in self.transfers:
                raise TransferError(f"room {transfer.pair[0]} is in use; give another attempt number, or another room")
            self.transfers[transfer.pair] = transfer

    def health(self) -> dict[str, Any]:
        """Can a request finish here? ``ok`` is the answer, the rest says why."""
        ok, why = self.rank.standing()
        return {
            "ok": ok and not self.is_draining and not self.host.loop.failed and self._thread.is_alive(),
            "state": "draining" if self.is_draining else why,
            "transfers": len(self.transfers), "quarantined_pages": self.rank.quarantined_pages(),
            "defects": list(self.host.loop.failed),
        }  # fmt: skip

    def drain(self, timeout_s: float) -> bool:
        """Planned scale-down: take no more requests, and wait until those that are here are over and their pages
        free. True when nothing is left; only then do ``close`` and the Goodbye to peers lose nothing.
        """
        with self._lock:
            self.is_draining = True
        self.do(self.rank.leave)
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if not self.transfers and not self._claims and not len(self.host.writes or ()):
                return True
            time.sleep(0.005)
        return False

    def close(self) -> None:
        """End the thread, the sockets and the transport, within CLOSE_LIMIT_S. Peers are told goodbye if nothing of
        theirs is held any more; else they will find out, since nothing may be promised to them.
        """
        if not self._thread.is_alive():
            return
        self.do(self._end)
        self._thread.join(CLOSE_LIMIT_S)
        self.transport.close()
        if self._trace is not None:
            self._trace.close()

    def _end(self) -> None:
        if not len(self.host.writes or ()):
            for node in list(self.host.directory):
                self.host.tell(node, wire.Goodbye("closed"), "Goodbye", self.rank.nobody)
        self.host.loop.stop()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- from the rank

    def _told(self, pair: tuple[int, int], what: str, detail: Any) -> None:
        """The rank tells of a transfer: "poll" (name, cause), "free" (pages), "over"."""
        transfer = self.transfers.get(pair)
        if what == "free":
            with self._lock:
                for page in detail:
                    self._claims.pop(page, None)
        if transfer is None:
            return
        if what == "poll":
            name, cause = detail
            if name in POLL_NUMBERS:
                self.metrics.moved(transfer, name, cause)
                transfer._move(KVPoll(POLL_NUMBERS[name]), cause)
        elif what == "free":
            transfer._hold(False)
        elif what == "over":
            transfer.is_over = True
            self.transfers.pop(pair, None)

    def _problem(self, topology: Topology) -> str | None:
        """Why a prefill engine cannot serve this rank, or None."""
        layout = self.settings.layout
        if topology.page_size != layout.page_tokens:
            return f"page size differs: prefill has {topology.page_size} tokens, decode has {layout.page_tokens}"
        if topology.kv_cache_dtype not in (None, layout.dtype):
            return f"KV dtype differs: prefill has {topology.kv_cache_dtype}, decode has {layout.dtype}"
        few, many = sorted((topology.attn_tp_size, self.settings.sizes.tp))
        if many % few:
            return f"TP sizes do not fit: prefill has {topology.attn_tp_size}, decode has {self.settings.sizes.tp}"
        return None


class PrefillEndpoint(Endpoint):
    """The prefill end of one rank."""

    side = "prefill"

    def _engine_name(self) -> str:
        if not self.settings.bootstrap:
            raise BadInput("a prefill endpoint needs its engine's bootstrap server: give bootstrap = 'HOST:PORT'")
        return self.settings.bootstrap

    def _make_rank(self, engine: EmbeddedEngine) -> Sender:
        settings = self.settings
        rank = Sender(engine, self.node, settings.dp, settings.pp, settings.tp, 0)
        ip, _, port = self._plane.endpoint.removeprefix("tcp://").rpartition(":")
        dp, pp, tp, cp = settings.sizes
        layout, balance = settings.layout, "follow_bootstrap_room" if settings.follows_room else "total_requests"
        self.host.info = RankInfo(
            rank_ip=ip, rank_port=int(port), page_size=layout.page_tokens, kv_cache_dtype=layout.dtype,
            attn_tp_size=tp, attn_tp_rank=settings.tp, attn_cp_size=cp, pp_size=pp, pp_rank=settings.pp,
            system_dp_size=dp, system_dp_rank=settings.dp, load_balance_method=balance,
            process_epoch=self.epoch, rank_name=self.node, node=self.node,
        )  # fmt: skip
        self.host.loop.post(rank.register, "Started")
        if watches_server(self.profile):
            self.host.loop.post(self._watch_server, rank)
        return rank

    def _watch_server(self, rank: Sender) -> None:
        ServerWatch(self.host, self.engine_name, restarted=lambda: rank.register("ServerRestarted"))

    def admit(self, room: int, attempt: int = 0, rid: str | None = None) -> PrefillTransfer:
        """A request was routed here. ``attempt`` counts earlier uses of the same room number.

        Raises TransferError when the room is in use or the endpoint drains.
        """
        transfer = PrefillTransfer(self, rid or f"{room}/{attempt}", (room, attempt))
        self._open(transfer)
        self.do(self.rank.begin, transfer.pair, transfer.rid, self.engine_name)
        return transfer

    def wait_registered(self, timeout_s: float) -> None:
        """Block until the bootstrap server lists this rank. Raises BadInput, naming the server, when it does not."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if self.rank.standing()[0]:
                return
            time.sleep(0.01)
        address = self.settings.bootstrap
        answer = self.host.last_answer or "no answer yet"
        raise BadInput(
            f"{address}: this rank is not registered after {timeout_s:g} s ({answer}); "
            f"start the server (kvpoll serve --port {address.rpartition(':')[2]}), or give its address"
        )


class DecodeEndpoint(Endpoint):
    """The decode end of one rank."""

    side = "decode"

    def _engine_name(self) -> str:
        name = self.settings.name or self._plane_name()
        if "/" in name:
            raise BadInput(f"{name!r}: an engine's name has no slash; ranks are named below it")
        return name

    def _plane_name(self) -> str:
        return f"decode@{socket.gethostname()}:{os.getpid()}"

    def _make_rank(self, engine: EmbeddedEngine) -> Receiver:
        return Receiver(engine, self.node, self.settings.tp)

    def admit(self, room: int, bootstrap: str, attempt: int = 0, rid: str | None = None) -> DecodeTransfer:
        """A request was routed here, and its prefill to the engine whose bootstrap server this is ("host:port").

        Raises TransferError as ``PrefillEndpoint.admit``, and BadInput for an address that is none.
        """
        self.host.add_server(bootstrap, bootstrap)
        transfer = DecodeTransfer(self, rid or f"{room}/{attempt}", (room, attempt))
        self._open(transfer)
        self.do(self._begin, transfer, bootstrap)
        return transfer

    def _begin(self, transfer: DecodeTransfer, bootstrap: str) -> None:
        if not probes_ranks(self.profile) and bootstrap not in self._watched:
            self._watched[bootstrap] = ServerWatch(self.host, bootstrap, suspect=lambda: self.rank.suspect(bootstrap))
        self.rank.begin(transfer.pair, transfer.rid, bootstrap)

    def _build(self) -> None:
        self._watched: dict[str, ServerWatch] = {}
        super()._build()

    def check(self, bootstrap: str) -> None:
        """Ask a prefill engine's bootstrap server whether the two fit. Raises BadInput: unreachable, not ready, or a
        page size, dtype or topology that differs, with the mend. Waits for the answer, at most http_timeout_s.
        """
        self.host.add_server(bootstrap, bootstrap)
        status, body = self.host.servers[bootstrap].client.topology()
        if status != 200:
            told = f": {body}" if body else ""
            raise BadInput(
                f"{bootstrap}: no topology ({status}{told}); is the prefill engine up and all of it registered?"
            )
        problem = self._problem(body)
        if problem is not None:
            raise BadInput(f"{bootstrap}: {problem}; start both sides with the same model and options")


@dataclass(frozen=True)
class _Lengths:
    page_tokens: int
    chunk_tokens: int = 0
