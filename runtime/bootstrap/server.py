"""The bootstrap server: SGLang's HTTP API over the machines of the protocol, for prefill engines and by itself.

Every answer comes from ``table.RankTable`` or ``entries.DpEntries``, which ask the machines; this file reads and
writes HTTP. What SGLang's server answers with 200, 404 and 503 is answered so here, field by field (PROTOCOL 6). What
it answers with a 500 after half a change is a 4xx with ``{"error": reason}`` here, and changes nothing.

Every answer has the header ``X-Kvpoll-Epoch``, the life of this server. The topology carries it as ``server_epoch``
only for those who ask with ``&server_epoch=1``: SGLang's client cannot read a topology with a field it does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from kvpoll.runtime.bootstrap import reading
from kvpoll.runtime.bootstrap.entries import DpEntries
from kvpoll.runtime.bootstrap.metrics import CONTENT_TYPE, BootstrapMetrics
from kvpoll.runtime.bootstrap.reading import Refused
from kvpoll.runtime.bootstrap.rows import EPOCH_HEADER, TOPOLOGY
from kvpoll.runtime.bootstrap.table import RankTable
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import HealthReported, NodeStarted, NodeStopped
from kvpoll.statemachine.roles import Machines

PORT: Final = 8998
"""SGLang's default (--disaggregation-bootstrap-port)."""
MISSING_NAMED: Final = 64
"""So many missing ranks are named by ``GET /ready``; all are counted."""
START_LIMIT_S: Final = 10.0
CLOSE_LIMIT_S: Final = 5.0
HANDLERS_LIMIT_S: Final = 1.0
"""How long requests in progress may take to end when the server is closed."""

logger = logging.getLogger(__name__)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_last_epoch = 0


@dataclass(frozen=True)
class Limits:
    """What a server holds and reads at most.

    ranks: of one engine, and one above the largest DP rank. dp_entries: rooms on file at a time. body_bytes: of one
    request. query_rooms: rooms in one ``POST /query_dp_ranks``.
    """

    ranks: int = 4096
    dp_entries: int = 262_144
    body_bytes: int = 1 << 20
    query_rooms: int = 16_384


class BootstrapServer:
    """One bootstrap server for one prefill engine.

    As a thread: ``server.start()``, later ``server.close()``, or ``with BootstrapServer(...) as server``. As a
    coroutine: ``await server.run(stop)``. Either way ``port`` is the real port once it listens (0 asks for any).

    token: writes (PUT and DELETE /route, POST /register_dp_rank) need ``Authorization: Bearer <token>``. SGLang
    0.5.23 sends none, so only kvpoll's ranks can register then; decode may be SGLang's. epoch: life of this server,
    larger than that of every earlier one at the address; by default microseconds of the wall clock. emit: hears the
    trace events NodeStarted, NodeStopped and HealthReported, from the server's thread, with ``now()`` as their time.
    Raises BadInput for an address, port or token that cannot be used; nothing has been started then.
    """

    def __init__(
        self,
        protocol: Protocol,
        profile: Profile,
        host: str = "127.0.0.1",
        port: int = PORT,
        token: str | None = None,
        *,
        limits: Limits | None = None,
        epoch: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        emit: Callable[[Any], None] | None = None,
        now: Callable[[], float] = time.monotonic,
        node: str = "bootstrap",
    ) -> None:
        if not 0 <= port <= 65535:
            raise BadInput(f"port {port}: is not from 0 to 65535; 0 takes any free port")
        if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
            raise BadInput("the token must be printable ASCII without spaces, and not empty")
        self.profile = profile
        self.host = host
        self.port = port
        self.node = node
        self.epoch = epoch
        self.limits = limits or Limits()
        self.table = RankTable(protocol, profile)
        self.entries = DpEntries(Machines(protocol, profile).dp_entry, profile, self.limits.dp_entries, clock)
        self.metrics = BootstrapMetrics()
        self._token = None if token is None else f"Bearer {token}".encode()
        self._emit = emit or (lambda event: None)
        self._now = now
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._failure: Exception | None = None
        self._watch_tables()

    # -- life

    @property
    def address(self) -> str:
        """``host:port``, as clients are told it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def start(self) -> BootstrapServer:
        """Listen, served by a thread of its own. Raises BadInput; then no thread and no socket is left."""
        if self._thread is not None:
            raise RuntimeError("this server has been started before; make another one")
        listener = self._bind()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run_thread, args=(listener, started), name=f"bootstrap {self.address}", daemon=True
        )
        self._thread.start()
        if not started.wait(START_LIMIT_S) or self._failure is not None:
            self.close()
            raise RuntimeError(f"the bootstrap server at {self.address} did not start") from self._failure
        return self

    def _run_thread(self, listener: socket.socket, started: threading.Event) -> None:
        try:
            asyncio.run(self._serve(listener, None, started.set))
        except Exception as error:
            self._failure = error
            logger.exception("the bootstrap server at %s ended", self.address)
        finally:
            started.set()

    def close(self) -> None:
        """Stop listening and end the thread, within CLOSE_LIMIT_S. From any thread; twice does no harm."""
        loop, stop, thread = self._loop, self._stop, self._thread
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(stop.set)
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_LIMIT_S)

    def __enter__(self) -> BootstrapServer:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def run(self, stop: asyncio.Event, listening: Callable[[], None] | None = None) -> None:
        """Listen in the running loop until ``stop`` is set. ``listening`` is called once clients are answered.

        Raises BadInput when the address cannot be listened on.
        """
        await self._serve(self._bind(), stop, listening or (lambda: None))

    def _bind(self) -> socket.socket:
        """A listening socket, made before anything is started, so that a bad address leaves nothing behind."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM) if self.host else []
        except (OSError, ValueError):
            found = []
        if not found:
            raise BadInput(f"{self.host!r}: is not an address or name of this machine; try 127.0.0.1")
        # A name like localhost may stand for several addresses; peers that try only one try that of IPv4.
        family, *_, place = min(found, key=lambda each: each[0] != socket.AF_INET)
        try:
            listener = socket.create_server(place, family=family, backlog=512)
        except OSError as error:
            cause = os.strerror(error.errno) if error.errno is not None else str(error)
            mend = "choose another port, or end the process that holds it"
            if error.errno != errno.EADDRINUSE:
                mend = "choose an address of this machine and a port that you may use"
            raise BadInput(f"{self.address}: cannot be listened on: {cause}; {mend}") from None
        self.port = listener.getsockname()[1]
        return listener

    async def _serve(self, listener: socket.socket, stop: asyncio.Event | None, listening: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = stop or asyncio.Event()
        self.epoch = epoch = _new_epoch() if self.epoch is None else self.epoch
        app = web.Application(middlewares=[self._guard], client_max_size=self.limits.body_bytes)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
                web.get("/route", self._get_route, allow_head=False),
                web.put("/route", self._put_route),
                web.delete("/route", self._delete_route),
                web.post("/register_dp_rank", self._register_dp_rank),
                web.post("/query_dp_ranks", self._query_dp_ranks),
            ]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=HANDLERS_LIMIT_S, auto_decompress=False)
        expiry = None
        try:
            await runner.setup()
            await web.SockSite(runner, listener).start()
            expiry = asyncio.create_task(self._expire_entries())
            self._tell(NodeStarted(self._now(), self.node, epoch))
            listening()
            await self._stop.wait()
        finally:
            if expiry is not None:
                expiry.cancel()
            await runner.cleanup()
            listener.close()
            if expiry is not None:
                self._tell(NodeStopped(self._now(), self.node, epoch))

    def _tell(self, event: Any) -> None:
        """Who listens to the trace cannot disturb the server."""
        try:
            self._emit(event)
        except Exception:
            logger.exception("the listener of the bootstrap server's trace raised at %s", event)

    async def _expire_entries(self) -> None:
        """Entries are dropped when they are looked for; this is for those that nobody looks for any more."""
        while True:
            await asyncio.sleep(max(1.0, self.profile.number("dp_entry_timeout_s") / 8))
            self.entries.expire()

    def _watch_tables(self) -> None:
        watch = self.metrics.watch
        watch("ranks_registered", "Distinct ranks in the table.", lambda: len(self.table))
        watch("ranks_expected", "Ranks of the engine; 0 before the first registered.", lambda: self.table.expected or 0)
        watch("ready", "1 when every expected distinct rank is registered.", lambda: float(self._is_complete()))
        watch("dp_entries", "Rooms whose DP rank is on file.", lambda: len(self.entries))
        watch("epoch", "Life of this server.", lambda: self.epoch or 0)

    # -- every request

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Whatever happens becomes an answer with the server's epoch, and is counted."""
        try:
            response = await handler(request)
        except Refused as refusal:
            self.metrics.count_refusal(refusal.reason)
            response = _error(refusal.status, str(refusal))
            if refusal.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except web.HTTPException as error:
            self.metrics.count_refusal(_REASONS.get(error.status, "not_http"))
            response = _error(error.status, error.reason)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:
            logger.exception("a defect of the bootstrap server: %s %s", request.method, request.path)
            response = _error(500, "a defect of the bootstrap server; see its log")
        response.headers[EPOCH_HEADER] = str(self.epoch)
        resource = request.match_info.route.resource
        self.metrics.count(resource.canonical if resource else "other", response.status)
        return response

    async def _read(self, request: web.Request) -> dict[str, Any]:
        """The JSON object that a client sent. Raises Refused."""
        if request.content_type != "application/json":
            told = f"Content-Type must be application/json, got {request.content_type[:60]!r}"
            raise Refused(415, "unsupported_type", told)
        try:
            # The client has given up after this time; one that sends a byte a minute must not keep us.
            async with asyncio.timeout(self.profile.number("http_timeout_s")):
                body = await request.read()
        except TimeoutError:
            raise Refused(408, "too_slow", "the body did not arrive in time") from None
        except web.HTTPRequestEntityTooLarge:
            raise Refused(413, "too_large", f"the body is larger than {self.limits.body_bytes} bytes") from None
        return reading.read_object(body)

    def _require_token(self, request: web.Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._token):
            raise Refused(401, "unauthorized", "this server takes writes only with its bearer token")

    # -- routes

    async def _health(self, request: web.Request) -> web.Response:
        """The process answers; nothing else is said by it (SGLang's heartbeat)."""
        return web.Response(text="OK")

    async def _ready(self, request: web.Request) -> web.Response:
        """Can a decode engine meet every rank? What the count of PUTs says does not matter here (C1, O2)."""
        is_complete = self._is_complete()
        answer = {
            "ready": is_complete,
            "registered": len(self.table),
            "expected": self.table.expected,
            "missing": self.table.missing(MISSING_NAMED),
            "server_epoch": self.epoch,
        }
        return web.json_response(answer, status=200 if is_complete else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _get_route(self, request: web.Request) -> web.Response:
        place = reading.read_coordinate(request.query)
        if place != TOPOLOGY:
            return web.json_response(self.table.endpoint(place).as_json())
        answer = self.table.topology().as_json()
        if "server_epoch" in request.query:
            answer["server_epoch"] = self.epoch
        return web.json_response(answer)

    async def _put_route(self, request: web.Request) -> web.Response:
        self._require_token(request)
        info = reading.read_rank(await self._read(request), self.limits.ranks)
        if self.table.register(info):
            self._tell(HealthReported(self._now(), self.node, True, self._is_complete()))
        return web.Response(text="OK")

    async def _delete_route(self, request: web.Request) -> web.Response:
        self._require_token(request)
        place = reading.read_coordinate(request.query)
        epoch = request.query.get("process_epoch")
        self.table.unregister(place, None if epoch is None else reading.read_number(epoch, "process_epoch", 0))
        return web.Response(text="OK")

    async def _register_dp_rank(self, request: web.Request) -> web.Response:
        self._require_token(request)
        room, attempt, rank = reading.read_dp_rank(await self._read(request), self.limits.ranks)
        self.entries.register((room, attempt), rank)
        return web.Response(text="OK")

    async def _query_dp_ranks(self, request: web.Request) -> web.Response:
        asked = reading.read_query(await self._read(request), self.limits.query_rooms)
        self.entries.expire()
        known = {pair: rank for pair in asked if (rank := self.entries.rank(pair)) is not None}
        return web.json_response({_shown(pair): rank for pair, rank in known.items()})

    def _is_complete(self) -> bool:
        return self.table.is_ready and not self.table.missing(1)


_REASONS: Final = {404: "not_found", 405: "not_allowed", 413: "too_large"}


def _shown(pair: tuple[int, int | None]) -> str:
    """A room as SGLang's clients read it; with the attempt where the client named it, as one room may occur twice."""
    room, attempt = pair
    return str(room) if attempt is None else f"{room}/{attempt}"


def _error(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)


def _new_epoch() -> int:
    """Microseconds of the wall clock (below 2**53, exact in any JSON), and more than any epoch of this process."""
    global _last_epoch
    _last_epoch = max(_last_epoch + 1, time.time_ns() // 1000)
    return _last_epoch
