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
from any thread (``wait*``, ``drain``, ``close`` and ``check`` wait, for as long as they say). What happens is learned
by ``poll``, by a callback, or by awaiting. Polls are of this rank alone: ranks of a group merge theirs by minimum, as
``statemachine.agreement`` does it.

The engine owns the pages and says which ones a transfer uses. It gets them back by ``pages_free``, and not before: a
transfer that has failed keeps its pages until every writer is proven quiet (S1), however long that takes. What waits
for that proof is counted as quarantined. Pages that are still held are refused to another transfer.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from kvpoll.runtime.bootstrap import RankInfo, Topology
from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.control.plane import ControlPlane
from kvpoll.runtime.embedded import EmbeddedEngine, Listener, Receiver, Sender
from kvpoll.runtime.host import Host
from kvpoll.runtime.live_watch import LiveWatch, PresumedWrites
from kvpoll.runtime.logs import Moments
from kvpoll.runtime.loop import Loop
from kvpoll.runtime.memory import RowOwners
from kvpoll.runtime.metrics import EndpointMetrics, serve
from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.runtime.server_watch import ServerWatch
from kvpoll.runtime.settings import Settings, check, chosen_profile
from kvpoll.runtime.trace_file import TraceFile
from kvpoll.runtime.transfer import DecodeTransfer, Key, KVPoll, PrefillTransfer, Transfer, TransferError
from kvpoll.runtime.transports import allocate, make
from kvpoll.runtime.transports.interface import TransportError
from kvpoll.runtime.writes import Writes
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import NodeStarted, Violated
from kvpoll.statemachine.conduct import probes_ranks, watches_server
from kvpoll.statemachine.ranks.host import rank_name

__all__ = [
    "CLOSE_LIMIT_S", "DecodeEndpoint", "DecodeTransfer", "Endpoint", "KVPoll", "Layout", "PrefillEndpoint",
    "PrefillTransfer", "Settings", "Transfer", "TransferError",
]  # fmt: skip

CLOSE_LIMIT_S: Final = 5.0
"""``close`` returns within this time, and the two seconds that a transport may take."""

SETTLE_LIMIT_S: Final = 1.0
"""So long ``close`` waits for writes that were given up to become quiet, and for the bootstrap server's answer."""

ROOM_MAX: Final = 2**63 - 1
POLLS: Final = {poll.name: poll for poll in KVPoll}
_numbers = itertools.count()


class Endpoint(Listener):
    """What both ends share: the thread, the memory, the transport. Use ``PrefillEndpoint`` or ``DecodeEndpoint``.

    node: this rank's name. epoch: this life of it. pool: its memory (``KVPool``). transfers: by (room, attempt), until
    they are over. violations: what monitored mode has found. callback_errors: callbacks of the engine that raised.

    Raises BadInput, one line with the mend, when it cannot start; then nothing is left of it: no thread, no socket.
    """

    side = ""

    def __init__(self, settings: Settings) -> None:
        check(settings, self.side)
        self.settings = settings
        self.protocol = load()
        self.profile = chosen_profile(settings, self.protocol)
        self.epoch = settings.epoch if settings.epoch is not None else time.time_ns() // 1_000_000
        self.engine_name = self._engine_name()
        sizes = settings.sizes
        self.node = rank_name(self.engine_name, sizes, settings.dp, settings.pp, settings.tp, settings.cp)
        self.transfers: dict[tuple[int, int], Transfer] = {}
        self.violations: list[Violated] = []
        self.callback_errors = 0
        self.is_draining = False
        self.is_closed = False
        self.log = Moments(self.node, self.epoch)
        self._claims: dict[Key, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._trace: TraceFile | None = None
        self._metrics_closes: list[Callable[[], None]] = []
        with ExitStack() as undo:
            self._plane = ControlPlane(
                self.node, self.epoch, settings.host, settings.port, token=settings.secret, on_dropped=self._dropped
            )
            undo.callback(self._plane.close)
            self._build(undo)
            self._thread = threading.Thread(target=self._run, name=f"kvpoll {self.node}", daemon=True)
            self._plane.hand_over()
            self._thread.start()
            undo.pop_all()

    def _engine_name(self) -> str:
        raise AssertionError("an endpoint of no side")

    def _make_rank(self, engine: EmbeddedEngine) -> Sender | Receiver:
        raise AssertionError("an endpoint of no side")

    # -- being built

    def _build(self, undo: ExitStack) -> None:
        settings = self.settings
        loop = Loop(self._plane)
        servers = {self.engine_name: settings.bootstrap} if settings.bootstrap else {}
        self.host = host = Host(
            self.protocol, self.profile, self._plane, loop, _Lengths(settings.layout.page_tokens), servers,
            self.epoch, settings.token, mla=settings.layout.kind == "mla",
        )  # fmt: skip
        undo.callback(host.close)
        host.fits = self._problem
        host.moment = self.log
        if settings.trace is not None:
            self._record(settings.trace)
            undo.callback(self._end_trace)
        watch = LiveWatch(host, self._violated) if settings.monitored else None
        self._make_memory(undo)
        self.rank = self._make_rank(EmbeddedEngine(host, self.engine_name, self.epoch, settings))
        self.rank.listener = self
        host.rank = self.rank
        if watch is not None and isinstance(self.rank, Receiver):
            self.rank.presumed = PresumedWrites(self.rank, watch.watch)
        self.metrics = EndpointMetrics(self)
        host.emit(NodeStarted(host.now, self.node, self.epoch))

    def _make_memory(self, undo: ExitStack) -> None:
        settings, host = self.settings, self.host
        try:
            self.transport = make(
                settings.transport, self.node, self.epoch, self._woken,
                lambda node, epoch: host.loop.post(host.saw_end, node, epoch), **settings.options,
            )  # fmt: skip
            undo.callback(self.transport.close)
            region = None if settings.pool is not None else allocate(settings.transport, settings.layout.total_bytes)
            self.pool = settings.pool or KVPool.on_host(settings.layout, region)
            descriptor = self.transport.register(self.pool.regions())
        except (TransportError, OSError) as error:
            raise BadInput(f"{settings.transport}: {error}") from None
        host.memory = (descriptor, settings.layout.to_bytes())
        host.writes = Writes(host, self.pool, self.transport)

    def _record(self, path: Any) -> None:
        header = {
            "node": self.node, "epoch": self.epoch, "profile": self.profile.name, "spec": self.protocol.digest,
        }  # fmt: skip
        try:
            self._trace = TraceFile(path, header)
        except OSError as error:
            raise BadInput(f"{path}: the trace cannot be written: {error.strerror}; choose another path") from None
        self.host.stream.recording = True
        self.host.emitted.append(self._trace)

    def _end_trace(self) -> None:
        if self._trace is not None:
            self._trace.close()

    def _woken(self) -> None:
        writes = getattr(self.host, "writes", None)
        if writes is not None:
            writes.wake()

    # -- from the engine

    @property
    def sender(self) -> Sender:
        """The rank, of a prefill endpoint."""
        assert isinstance(self.rank, Sender)
        return self.rank

    @property
    def receiver(self) -> Receiver:
        """The rank, of a decode endpoint."""
        assert isinstance(self.rank, Receiver)
        return self.rank

    @property
    def dropped(self) -> dict[str, int]:
        """Control messages that were dropped, by reason."""
        return self._plane.dropped

    @property
    def missed(self) -> int:
        """Control messages that never arrived."""
        return self._plane.missed

    def do(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have the endpoint's thread call a function; of a closed endpoint, nothing."""
        self.host.loop.post(function, *arguments)

    def contained(self, transfer: Transfer, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Carry out what an engine ordered. A defect of ours on the way fails this transfer and no other (A27)."""
        try:
            function(*arguments)
        except Exception:
            try:
                self.rank.give_up(transfer.pair, "internal_error")
            finally:
                if transfer.poll() not in (KVPoll.Failed, KVPoll.Success):
                    transfer.move(KVPoll.Failed, "internal_error")
                if transfer.pair not in self.rank.pages.held:  # what was claimed never came as far as the rank
                    self.freed(transfer.pair, transfer.keys())
            raise

    def refuse_own_thread(self, what: str) -> None:
        """Raises TransferError in the endpoint's thread, which is where callbacks run: it would wait for itself."""
        if threading.current_thread() is self._thread:
            raise TransferError(f"{what} was called in a callback and would wait for itself; call it in another thread")

    def claim(self, transfer: Transfer, pages: tuple[int, ...], row: int | None = None) -> None:
        """This memory belongs to this transfer until it is free. Raises TransferError when some of it cannot."""
        keys = pages if row is None else (*pages, ~row)
        layout, pair = self.settings.layout, transfer.pair
        with self._lock:
            if self.is_closed:
                raise TransferError(f"{self.node} is closed")
            claims = self._claims
            for number in pages:
                if not 0 <= number < layout.pages:
                    raise TransferError(f"page {number} is outside the pool of {layout.pages} pages")
            if row is not None and not 0 <= row < layout.rows:
                raise TransferError(f"row {row} is outside the pool of {layout.rows} rows")
            for key in keys:
                if key in claims:
                    self._refuse(transfer, key)
            for key in keys:
                claims[key] = pair
            transfer.take(keys)

    def _refuse(self, transfer: Transfer, key: Key) -> NoReturn:
        """Memory cannot be claimed, because it was before."""
        named = f"page {key}" if key >= 0 else f"row {~key}"
        if self._claims[key] == transfer.pair:
            raise TransferError(f"{named} was given to {transfer.rid} before; it is sent once")
        room, attempt = self._claims[key]
        raise TransferError(f"{named} is still held by room {room} attempt {attempt}: wait for its pages_free")

    def _open(self, transfer: Transfer) -> None:
        room, attempt = transfer.pair
        if not 0 < room <= ROOM_MAX or not 0 <= attempt <= ROOM_MAX:
            raise TransferError(f"room {room} attempt {attempt}: rooms are from 1 to 2^63 - 1, attempts from 0")
        with self._lock:
            if self.is_closed:
                raise TransferError(f"{self.node} is closed")
            if self.is_draining:
                raise TransferError(f"{self.node} is draining and takes no new requests")
            if transfer.pair in self.transfers:
                raise TransferError(f"room {room} is in use; give another attempt number, or another room")
            self.transfers[transfer.pair] = transfer
        self.log("admitted", transfer.pair, rid=transfer.rid)

    def health(self) -> dict[str, Any]:
        """Can a request finish here? ``ok`` is the answer, the rest says why. Any thread.

        state: of the registration ("registered", "registering", "exhausted"), "serving", "draining", or "closed".
        transfers, quarantined_pages: counts. defects: the first errors inside the endpoint; each cost one request.
        """
        able, why = self.rank.standing()
        state = "closed" if not self._thread.is_alive() else "draining" if self.is_draining else why
        return {
            "ok": able and state not in ("closed", "draining"), "state": state, "transfers": len(self.transfers),
            "quarantined_pages": self.rank.quarantined_pages(), "defects": list(self.host.loop.failed),
        }  # fmt: skip

    def serve_metrics(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve ``metrics.text()`` at /metrics over HTTP until ``close``; port 0 is any. Returns the port.

        Raises BadInput when the address is taken or is none of this machine.
        """
        found, close = serve(self.metrics.registry, port, host)
        self._metrics_closes.append(close)
        return found

    def drain(self, timeout_s: float) -> bool:
        """Planned scale-down: take no more requests, be found by none, and wait until those that are here are over and
        their pages free. True when nothing is left; only then do ``close`` and the Goodbye to peers lose nothing.
        Raises TransferError in a callback.
        """
        self.refuse_own_thread("drain")
        with self._lock:
            first, self.is_draining = not self.is_draining, True
        if first:
            self.do(self.rank.leave)
        end_s = time.monotonic() + timeout_s
        while True:
            if not self.transfers and not self._claims and not len(self.host.writes or ()):
                return True
            if time.monotonic() >= end_s or not self._thread.is_alive():
                return False
            time.sleep(0.005)

    def close(self) -> None:
        """Give up what is not over, tell the peers, and end the thread, the sockets and the transport; within
        CLOSE_LIMIT_S and two seconds. A second close does nothing. Raises TransferError in a callback.

        Peers are told Goodbye when no write of this rank is under way any more; their quarantined pages come back with
        it. Else they will find out by themselves, since nothing may be promised to them. Pages of this rank that are
        not free by then will never be: the process must keep the memory, or end.
        """
        self.refuse_own_thread("close")
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
        self.do(self._end)
        self._thread.join(CLOSE_LIMIT_S)
        self.transport.close()
        for close in self._metrics_closes:
            close()
        self._end_trace()
        self.log("closed")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- in the endpoint's thread

    def _run(self) -> None:
        try:
            self.host.loop.run(self.host.receive)
        finally:
            self.host.close()
            self._plane.close(linger_s=0.2)
            for transfer in list(self.transfers.values()):
                if transfer.poll() not in (KVPoll.Failed, KVPoll.Success):
                    transfer.move(KVPoll.Failed, "endpoint_closed")

    def _end(self) -> None:
        for pair in list(self.transfers):
            self.rank.give_up(pair, "endpoint_closed")
        open_calls = [self.rank]
        self.rank.leave(open_calls.clear)
        self._leave(self.host.now + SETTLE_LIMIT_S, open_calls)

    def _leave(self, until: float, open_calls: list[Any]) -> None:
        """Say Goodbye once nothing moves any more, or be silent."""
        writes = len(self.host.writes or ())
        if (writes or open_calls) and self.host.now < until:
            self.host.after(0.005, self._leave, until, open_calls)
            return
        if not writes:
            for node in list(self.host.directory):
                self.host.tell(node, wire.Goodbye("closed"), "Goodbye", self.rank.nobody)
        self.host.loop.stop()

    def polled(self, pair: tuple[int, int], name: str, cause: str | None) -> None:
        """A room has another poll."""
        poll = POLLS.get(name)
        transfer = self.transfers.get(pair) if poll is not None else None  # nobody polls Announced or Retired
        if transfer is None or poll is None or poll is transfer.poll():  # that a room was opened is no news
            return
        self.metrics.moved(transfer, poll, cause)
        transfer.move(poll, cause)
        if poll is KVPoll.Failed:
            self.log("failed", pair, rid=transfer.rid, cause=cause)
            if not transfer.pages_free:
                self.log("quarantined", pair, rid=transfer.rid, cause=cause, pages=transfer.pages_held())
        elif poll is KVPoll.Success:
            self.log("succeeded", pair, rid=transfer.rid)

    def freed(self, pair: tuple[int, int], keys: Sequence[Key]) -> None:
        """Memory is the engine's again."""
        claims = self._claims
        with self._lock:
            for key in keys:
                if claims.get(key) == pair:
                    del claims[key]
        transfer = self.transfers.get(pair)
        if transfer is not None:
            transfer.give_back(keys)
            if transfer.poll() is KVPoll.Failed and keys and keys[0] >= 0:
                self.log("released", pair, rid=transfer.rid, pages=len(keys))
            if transfer.is_done:
                self.transfers.pop(pair, None)

    def over(self, pair: tuple[int, int]) -> None:
        """What the engine ordered with ``release`` is done."""
        transfer = self.transfers.get(pair)
        if transfer is not None:
            transfer.finish()
            if transfer.is_done:
                self.transfers.pop(pair, None)

    def _violated(self, event: Violated) -> None:
        self.violations.append(event)
        self.log("violated", event.pair, invariant=event.invariant, text=event.text)

    def _dropped(self, reason: str) -> None:
        count = self._plane.dropped[reason]
        if count & (count - 1) == 0:
            self.log("messages_dropped", reason=reason, count=count)

    def _problem(self, topology: Topology) -> str | None:
        """Why a prefill engine cannot serve this rank: one line with the mend, or None."""
        layout, tp = self.settings.layout, self.settings.sizes.tp
        if topology.page_size != layout.page_tokens:
            return (
                f"page size differs: prefill has {topology.page_size} tokens, decode has {layout.page_tokens}; "
                f"start both with the same --page-size"
            )
        if topology.kv_cache_dtype not in (None, layout.dtype):
            return (
                f"KV dtype differs: prefill has {topology.kv_cache_dtype}, decode has {layout.dtype}; "
                f"start both with the same --kv-cache-dtype"
            )
        few, many = sorted((topology.attn_tp_size, tp))
        if many % few:
            return (
                f"TP sizes do not fit: prefill has {topology.attn_tp_size}, decode has {tp}; one must divide the other"
            )
        return None


class PrefillEndpoint(Endpoint):
    """The prefill end of one rank. It registers by itself, and again when the bootstrap server was restarted."""

    side = "prefill"

    def _engine_name(self) -> str:
        return self.settings.bootstrap

    def _make_rank(self, engine: EmbeddedEngine) -> Sender:
        settings, host = self.settings, self.host
        rank = Sender(engine, self.node, settings.dp, settings.pp, settings.tp, settings.cp)
        ip, _, port = self._plane.endpoint.removeprefix("tcp://").rpartition(":")
        dp, pp, tp, cp = settings.sizes
        layout, balance = settings.layout, "follow_bootstrap_room" if settings.follows_room else "total_requests"
        host.info = RankInfo(
            rank_ip=ip, rank_port=int(port), page_size=layout.page_tokens, kv_cache_dtype=layout.dtype,
            attn_tp_size=tp, attn_tp_rank=settings.tp, attn_cp_size=cp, attn_cp_rank=settings.cp,
            pp_size=pp, pp_rank=settings.pp, system_dp_size=dp, system_dp_rank=settings.dp,
            load_balance_method=balance, process_epoch=self.epoch, rank_name=self.node, node=self.node,
        )  # fmt: skip
        assert host.writes is not None
        host.writes.rows_said = rank.aux_rows
        host.loop.post(rank.register, "Started")
        if watches_server(self.profile):
            host.loop.post(self._watch_server, rank)
        return rank

    def _watch_server(self, rank: Sender) -> None:
        watch = ServerWatch(self.host, self.engine_name, restarted=lambda: rank.register("ServerRestarted"))
        self.host.server_answered = watch.answered

    def admit(
        self,
        room: int,
        attempt: int = 0,
        rid: str | None = None,
        on_poll: Callable[[PrefillTransfer, KVPoll], None] | None = None,
        on_pages_free: Callable[[PrefillTransfer], None] | None = None,
    ) -> PrefillTransfer:
        """A request was routed here. room: the number both sides were given, from 1 to 2^63 - 1; attempt counts earlier
        uses of the same number. The callbacks are those of ``Transfer``.

        Raises TransferError when this pair is in use, the endpoint drains or is closed. Whether another attempt of a
        room may live here yet is the machine's to say: if not, the transfer turns Failed with "room_in_use".
        """
        transfer = PrefillTransfer(self, rid or f"{room}/{attempt}", (room, attempt), on_poll, on_pages_free)
        self._open(transfer)
        self.do(self.contained, transfer, self.rank.begin, (transfer.pair, transfer.rid, self.engine_name))
        return transfer

    def wait_registered(self, timeout_s: float) -> None:
        """Block until the bootstrap server lists this rank. Raises BadInput, naming the server, when it does not in
        time, and at once when the server refuses this rank for good (a wrong token).
        """
        self.refuse_own_thread("wait_registered")
        address, end_s = self.settings.bootstrap, time.monotonic() + timeout_s
        while not self.rank.standing()[0]:
            answer = self.host.last_answer or "no answer yet"
            if answer.startswith(("PUT /route 401", "PUT /route 403")):
                raise BadInput(f"{address}: this rank may not register ({answer}); give the server's token")
            if time.monotonic() >= end_s:
                raise BadInput(
                    f"{address}: this rank is not registered after {timeout_s:g} s ({answer}); "
                    f"start the server (kvpoll serve --port {address.rpartition(':')[2]}), or give its address"
                )
            time.sleep(0.005)


class DecodeEndpoint(Endpoint):
    """The decode end of one rank."""

    side = "decode"

    def _engine_name(self) -> str:
        return self.settings.name or f"decode@{socket.gethostname()}:{os.getpid()}.{next(_numbers)}"

    def _make_rank(self, engine: EmbeddedEngine) -> Receiver:
        self._watched: dict[str, ServerWatch] = {}
        rank = Receiver(engine, self.node, self.settings.tp)
        rank.row_owners = RowOwners(self.pool)  # type: ignore[assignment]  # looks into the memory itself
        return rank

    def admit(
        self,
        room: int,
        bootstrap: str,
        attempt: int = 0,
        rid: str | None = None,
        on_poll: Callable[[DecodeTransfer, KVPoll], None] | None = None,
        on_pages_free: Callable[[DecodeTransfer], None] | None = None,
    ) -> DecodeTransfer:
        """A request was routed here, and its prefill to the engine whose bootstrap server this is ("host:port").

        Raises TransferError as ``PrefillEndpoint.admit``, and BadInput for an address that is none.
        """
        self.host.add_server(bootstrap, bootstrap)
        transfer = DecodeTransfer(self, rid or f"{room}/{attempt}", (room, attempt), on_poll, on_pages_free)
        self._open(transfer)
        self.do(self.contained, transfer, self._begin, (transfer, bootstrap))
        return transfer

    def _begin(self, transfer: DecodeTransfer, bootstrap: str) -> None:
        if not probes_ranks(self.profile) and bootstrap not in self._watched:
            self._watched[bootstrap] = ServerWatch(self.host, bootstrap, suspect=lambda: self.rank.suspect(bootstrap))
        self.rank.begin(transfer.pair, transfer.rid, bootstrap)

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
            raise BadInput(f"{bootstrap}: {problem}")


@dataclass(frozen=True)
class _Lengths:
    page_tokens: int
    chunk_tokens: int = 0
