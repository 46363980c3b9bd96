"""The router and the clients: draws rooms, dispatches both legs, joins their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpoll.sim.engine import Request
from kvpoll.sim.topology import rank_name
from kvpoll.spec.trace import Admitted, Resulted
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.roles import Routed

if TYPE_CHECKING:
    from kvpoll.sim.cluster import Cluster

ROOM_BITS = 63


class Router:
    """Dispatches every request to one prefill and one decode replica at the same moment."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.active: dict[str, tuple[Request, Routed]] = {}
        self.attempts: dict[int, int] = {}
        self.override: Callable[[Request], int] | None = None
        self.reuse_room: Callable[[], int | None] = lambda: None
        self.before_dispatch: list[Callable[[Request], None]] = []
        self.admitted = 0
        self.succeeded = 0
        self.causes: dict[str, int] = {}
        self.ttft_s: list[float] = []
        self._rooms = self.world.chance("rooms")
        self._load: dict[tuple[int, int], int] = {}
        self._names: dict[tuple[str, int, int], tuple[str, ...]] = {}

    def submit(self, rid: str, input_tokens: int, output_tokens: int) -> Request:
        """A client's request arrives: draw a room, pick replicas, send both legs."""
        world, topology = self.world, self.cluster.topology
        number = self.admitted
        self.admitted += 1
        pair = self._draw_room()
        prefill = number % topology.prefill.count
        decode = number % topology.decode.count
        decode_dp = (number // topology.decode.count) % topology.decode.sizes.dp
        request = Request(
            rid,
            pair,
            world.now,
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
        world.emit(Admitted(world.now, "R", rid, pair, self._ranks("P", request), self._ranks("D", request)))
        for hook in self.before_dispatch:
            hook(request)
        for engine in self._legs(request):
            self._send(engine, request, "Request", ("open", request))
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
        dp = self.cluster.topology.prefill.sizes.dp
        if self.cluster.topology.follows_room:
            return room % dp
        return min(range(dp), key=lambda rank: self._load.get((prefill, rank), 0))

    def _weigh(self, request: Request, sign: int) -> None:
        key = (request.prefill, request.prefill_dp)
        weight = request.input_tokens if self.cluster.topology.load_balance == "total_tokens" else 1
        self._load[key] = self._load.get(key, 0) + sign * weight

    def _ranks(self, side: str, request: Request) -> tuple[str, ...]:
        shape = self.cluster.topology.prefill if side == "P" else self.cluster.topology.decode
        engine, dp = (request.prefill, request.prefill_dp) if side == "P" else (request.decode, request.decode_dp)
        known = self._names.get((side, engine, dp))
        if known is not None:
            return known
        sizes = shape.sizes
        names = self._names[side, engine, dp] = tuple(
            rank_name(side, engine, sizes, dp, pp, tp, cp)
            for pp in range(sizes.pp) for cp in range(sizes.cp) for tp in range(sizes.tp)
        )  # fmt: skip
        return names

    def _legs(self, request: Request) -> list[Any]:
        return [self.cluster.prefill[request.prefill], self.cluster.decode[request.decode]]

    def _send(self, engine: Any, request: Request, message: str, command: tuple[Any, ...]) -> None:
        """One message to an engine's controller; a dead engine refuses, a severed one loses it."""
        world = self.world
        if not engine.up:
            side = "prefill" if engine.side == "P" else "decode"
            world.after(world.topology.latency_s, self._lost_leg, request, side, "connection_refused")
            return
        leader = next(iter(self._ranks(engine.side, request)))
        identity = Incarnation(*request.pair, engine.epoch)
        world.network.send("R", leader, message, identity, self._arrive, engine, request, command)

    def _arrive(self, engine: Any, request: Request, command: tuple[Any, ...]) -> None:
        if engine.up:
            engine.accept(request, command)

    # -- what comes back

    def leg_failed(self, rank: Any, request: Request, side: str, cause: str) -> None:
        """An engine answered a leg with an error."""
        identity = Incarnation(*request.pair, 0)
        self.world.network.send(rank.node, "R", "Error", identity, self._lost_leg, request, side, cause)

    def first_token(self, rank: Any, request: Request) -> None:
        """Decode streams its first token."""
        identity = Incarnation(*request.pair, 0)
        self.world.network.send(rank.node, "R", "FirstToken", identity, self._step, request, "DecodeAnswered", None)

    def _lost_leg(self, request: Request, side: str, cause: str) -> None:
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
            if f"P{request.prefill}" == name:
                self.world.after(self.world.topology.latency_s, self._lost_leg, request, "prefill", "engine_crashed")
            elif f"D{request.decode}" == name:
                self.world.after(self.world.topology.latency_s, self._lost_leg, request, "decode", "engine_crashed")

    def _step(self, request: Request, fact: str, detail: Any) -> None:
        if request.rid not in self.active:
            return
        _, state = self.active[request.rid]
        state, orders = self.world.machines.router.step(state, fact, detail)
        self.active[request.rid] = (request, state)
        for order, argument in orders:
            if order == "AnswerClient":
                self._answer(request, state, argument == "ok")
            elif order == "CancelLeg":
                self.cancel(request, argument, state.cause or "cancelled")

    def _answer(self, request: Request, state: Routed, ok: bool) -> None:
        world = self.world
        del self.active[request.rid]
        self._weigh(request, -1)
        ttft_s = world.now - request.t if ok else None
        if ttft_s is not None:
            self.succeeded += 1
            self.ttft_s.append(ttft_s)
        else:
            cause = (state.cause or "unknown").partition(":")[0]
            self.causes[cause] = self.causes.get(cause, 0) + 1
        world.emit(Resulted(world.now, "R", request.rid, request.pair, ok, state.cause, ttft_s))

    def cancel(self, request: Request, side: str | None, cause: str) -> None:
        """Abort a leg, or both."""
        for engine in self._legs(request):
            if (side is None or engine.side == side[0].upper()) and engine.up:
                self._send(engine, request, "Cancel", ("abort", request.rid, cause))
