"""The router and the clients: draws rooms, dispatches both legs, joins their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvpoll.spec.trace import Admitted, Resulted
from kvpoll.statemachine.ranks.engine import EngineShape
from kvpoll.statemachine.ranks.host import Host, Request, rank_name
from kvpoll.statemachine.roles import Routed

ROOM_BITS = 63
SIDES = ("prefill", "decode")


class Fleet(Protocol):
    """The engines that a router dispatches to."""

    @property
    def prefill(self) -> EngineShape:
        """What every prefill engine looks like."""

    @property
    def decode(self) -> EngineShape:
        """What every decode engine looks like."""

    @property
    def load_balance(self) -> str:
        """How prefill's controller picks a DP rank: by room, least requests, or least tokens."""

    @property
    def follows_room(self) -> bool:
        """Does it dispatch by room mod dp?"""

    @property
    def latency_s(self) -> float:
        """How long it takes to learn that nobody listens."""

    def command(self, engine: str, leader: str, request: Request, message: str, command: tuple[Any, ...]) -> bool:
        """Hand a command to an engine's controller, which hands it to ``leader``. False: the connection is refused."""


class Router:
    """Dispatches every request to one prefill and one decode replica at the same moment."""

    def __init__(self, host: Host, fleet: Fleet) -> None:
        self.host = host
        self.fleet = fleet
        self.active: dict[str, tuple[Request, Routed]] = {}
        self.attempts: dict[int, int] = {}
        self.override: Callable[[Request], int] | None = None
        self.reuse_room: Callable[[], int | None] = lambda: None
        self.before_dispatch: list[Callable[[Request], None]] = []
        self.admitted = 0
        self.succeeded = 0
        self.causes: dict[str, int] = {}
        self.ttft_s: list[float] = []
        self._rooms = self.host.chance("rooms")
        self._load: dict[tuple[int, int], int] = {}
        self._names: dict[tuple[str, int, int], tuple[str, ...]] = {}

    def submit(self, rid: str, input_tokens: int, output_tokens: int) -> Request:
        """A client's request arrives: draw a room, pick replicas, send both legs."""
        host, fleet = self.host, self.fleet
        number = self.admitted
        self.admitted += 1
        pair = self._draw_room()
        prefill = number % fleet.prefill.count
        decode = number % fleet.decode.count
        decode_dp = (number // fleet.decode.count) % fleet.decode.sizes.dp
        request = Request(
            rid,
            pair,
            host.now,
            input_tokens,
            output_tokens,
            prefill,
            self._prefill_dp(pair[0], prefill),
            decode,
            decode_dp,
        )
        if self.override is not None:
            request = request._replace(prefill_dp=self.override(request))
        self._weigh(request, 1)
        self.active[rid] = (request, Routed())
        host.emit(Admitted(host.now, "R", rid, pair, self._ranks("P", request), self._ranks("D", request)))
        for hook in self.before_dispatch:
            hook(request)
        for side in SIDES:
            self._send(side, request, "Request", ("open", request))
        return request

    def _draw_room(self) -> tuple[int, int]:
        room = self.reuse_room()
        if room is None:
            room = self._rooms.getrandbits(ROOM_BITS) or 1
            return (room, self.attempts.get(room, 0))
        self.attempts[room] = self.attempts.get(room, 0) + 1
        return (room, self.attempts[room])

    def _prefill_dp(self, room: int, prefill: int) -> int:
        """The DP controller's choice: by room, or the least loaded (requests or tokens)."""
        dp = self.fleet.prefill.sizes.dp
        if self.fleet.follows_room:
            return room % dp
        return min(range(dp), key=lambda rank: self._load.get((prefill, rank), 0))

    def _weigh(self, request: Request, sign: int) -> None:
        key = (request.prefill, request.prefill_dp)
        weight = request.input_tokens if self.fleet.load_balance == "total_tokens" else 1
        self._load[key] = self._load.get(key, 0) + sign * weight

    def _ranks(self, side: str, request: Request) -> tuple[str, ...]:
        shape = self.fleet.prefill if side == "P" else self.fleet.decode
        engine, dp = (request.prefill, request.prefill_dp) if side == "P" else (request.decode, request.decode_dp)
        known = self._names.get((side, engine, dp))
        if known is not None:
            return known
        sizes = shape.sizes
        names = self._names[side, engine, dp] = tuple(
            rank_name(f"{side}{engine}", sizes, dp, pp, tp, cp)
            for pp in range(sizes.pp) for cp in range(sizes.cp) for tp in range(sizes.tp)
        )  # fmt: skip
        return names

    def _send(self, side: str, request: Request, message: str, command: tuple[Any, ...]) -> None:
        """One message to an engine's controller; a dead engine refuses, a severed one loses it."""
        letter = side[0].upper()
        leader = self._ranks(letter, request)[0]
        is_heard = self.fleet.command(self._engine(side, request), leader, request, message, command)
        if not is_heard and message == "Request":
            self.host.after(self.fleet.latency_s, self.leg_failed, request, side, "connection_refused")

    def _engine(self, side: str, request: Request) -> str:
        return f"P{request.prefill}" if side == "prefill" else f"D{request.decode}"

    # -- what comes back

    def first_token(self, request: Request) -> None:
        """Decode streams its first token."""
        self._step(request, "DecodeAnswered", None)

    def leg_failed(self, request: Request, side: str, cause: str) -> None:
        """An engine answered a leg with an error, or the connection to it broke."""
        self._step(request, "LegFailed", (side, cause))

    def client_leaves(self, rid: str) -> bool:
        """The client closes its connection. False when its request is already over."""
        if rid not in self.active:
            return False
        self._step(self.active[rid][0], "ClientLeft", None)
        return True

    def engine_crashed(self, name: str) -> None:
        """Connections to a dead engine are reset."""
        for request, _ in list(self.active.values()):
            for side in SIDES:
                if self._engine(side, request) == name:
                    self.host.after(self.fleet.latency_s, self.leg_failed, request, side, "engine_crashed")

    def _step(self, request: Request, fact: str, detail: Any) -> None:
        if request.rid not in self.active:
            return
        _, state = self.active[request.rid]
        state, orders = self.host.machines.router.step(state, fact, detail)
        self.active[request.rid] = (request, state)
        for order, argument in orders:
            if order == "AnswerClient":
                self._answer(request, state, argument == "ok")
            elif order == "CancelLeg":
                self.cancel(request, argument, state.cause or "cancelled")

    def _answer(self, request: Request, state: Routed, ok: bool) -> None:
        host = self.host
        del self.active[request.rid]
        self._weigh(request, -1)
        ttft_s = host.now - request.t if ok else None
        if ttft_s is not None:
            self.succeeded += 1
            self.ttft_s.append(ttft_s)
        else:
            cause = (state.cause or "unknown").partition(":")[0]
            self.causes[cause] = self.causes.get(cause, 0) + 1
        host.emit(Resulted(host.now, "R", request.rid, request.pair, ok, state.cause, ttft_s))

    def cancel(self, request: Request, side: str | None, cause: str) -> None:
        """Abort a leg, or both."""
        for leg in SIDES:
            if side is None or leg == side:
                self._send(leg, request, "Cancel", ("abort", request.rid, cause))
