"""The bootstrap server as a process that starts, crashes, forgets and restarts, and HTTP to reach it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from kvpoll.spec.trace import Answered, HealthReported, NodeStarted, NodeStopped, Requested
from kvpoll.statemachine.roles import DpEntry, Registry

if TYPE_CHECKING:
    from kvpoll.sim.world import World

Reply = Callable[[int | str, Any], None]


class BootstrapServer:
    """Rank registration, route lookup, DP-rank registration and batch query of one prefill engine."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.up = False
        self.epoch = -1
        self.slow_s = 0.0
        self.error_share = 0.0
        self.registry = Registry()
        self.dp_entries: dict[Hashable, DpEntry] = {}
        self._expiry_s: dict[Hashable, float] = {}
        self._draw = world.chance(f"{name}/errors")
        world.alive[name] = False

    def start(self, amnesia: bool = True) -> None:
        """Begin to listen; a process that was killed has lost its tables."""
        if self.up:
            return
        self.up = True
        self.epoch += 1
        world = self.world
        world.epochs[self.name] = self.epoch
        world.alive[self.name] = True
        if amnesia:
            self.registry = Registry()
            self.dp_entries, self._expiry_s = {}, {}
        world.emit(NodeStarted(world.now, self.name, self.epoch))

    def stop(self) -> None:
        """Stop listening, as after a crash."""
        if self.up:
            self.up = False
            self.world.alive[self.name] = False
            self.world.emit(NodeStopped(self.world.now, self.name, self.epoch))

    # -- HTTP as a client sees it

    def request(self, client: str, route: str, detail: Any, repeat: int, reply: Reply) -> None:
        """Send one request; ``reply(status, body)`` is called with a code, "refused" or "timeout"."""
        world = self.world
        world.emit(Requested(world.now, client, self.name, route, repeat))
        timeout_s = world.profile.number("http_timeout_s")
        latency_s = world.topology.http_latency_s / 2 + world.network.latency_s(client)
        if world.network.is_severed(client, self.name):
            world.after(timeout_s, self._answer, client, route, "timeout", None, reply)
        elif not self.up:
            world.after(latency_s, self._answer, client, route, "refused", None, reply)
        elif self.slow_s + latency_s * 2 > timeout_s:
            world.after(timeout_s, self._answer, client, route, "timeout", None, reply)
            world.after(self.slow_s, self._handle_unheard, route, detail, self.epoch)
        else:
            world.after(latency_s + self.slow_s, self._handle, client, route, detail, self.epoch, reply)

    def _handle_unheard(self, route: str, detail: Any, epoch: int) -> None:
        """The server does what it was asked although the client has stopped listening (C1)."""
        if self.up and epoch == self.epoch:
            self.world.mark(self.name, "request_applied_unheard")
            self._serve(route, detail)

    def _handle(self, client: str, route: str, detail: Any, epoch: int, reply: Reply) -> None:
        latency_s = self.world.topology.http_latency_s / 2
        if not self.up or epoch != self.epoch:
            self.world.after(latency_s, self._answer, client, route, "refused", None, reply)
        elif self.error_share and self._draw.random() < self.error_share:
            self.world.mark(self.name, "http_error")
            self.world.after(latency_s, self._answer, client, route, 500, None, reply)
        else:
            status, body = self._serve(route, detail)
            self.world.after(latency_s, self._answer, client, route, status, body, reply)

    def _answer(self, client: str, route: str, status: int | str, body: Any, reply: Reply) -> None:
        world = self.world
        if world.stream.wants(Answered):
            world.emit(Answered(world.now, client, self.name, route, status))
        reply(status, body)

    # -- what the server does

    def _serve(self, route: str, detail: Any) -> tuple[int, Any]:
        machines = self.world.machines
        if route == "PUT /route":
            before = self.registry.state
            self.registry, _ = machines.registry.step(self.registry, "RankRegistered", detail)
            if self.registry.state == "Ready" != before:
                self._tell_readiness(detail[2])
            return 200, None
        if route == "DELETE /route":
            self.registry, orders = machines.registry.step(self.registry, "RankUnregistered", detail)
            return {"AnswerRoute": 200, "AnswerUnknownRank": 404, "AnswerStale": 409}[orders[0][0]], None
        if route == "GET /route":
            self.registry, orders = machines.registry.step(self.registry, "RouteRequested", detail)
            status = {"AnswerRoute": 200, "AnswerNotReady": 503, "AnswerUnknownRank": 404}[orders[0][0]]
            return status, dict(self.registry.ranks) if status == 200 else None
        if route == "POST /register_dp_rank":
            self._enter_dp_rank(*detail)
            return 200, None
        return 200, {key: rank for key in detail if (rank := self._dp_rank(key)) is not None}

    def _enter_dp_rank(self, key: Hashable, rank: int) -> None:
        """File where a request runs; the entry carries its own time of expiry, as one with the same rank is equal."""
        world = self.world
        entry, _ = world.machines.dp_entry.step(self.dp_entries.get(key, DpEntry()), "DpRankRegistered", rank)
        timeout_s = world.profile.number("dp_entry_timeout_s")
        self.dp_entries[key], self._expiry_s[key] = entry, world.now + timeout_s
        world.after(timeout_s, self._expire, key, world.now + timeout_s)

    def _dp_rank(self, key: Hashable) -> int | None:
        entry = self.dp_entries.get(key, DpEntry())
        _, orders = self.world.machines.dp_entry.step(entry, "DpRankQueried")
        return entry.rank if orders else None

    def _tell_readiness(self, expected: int) -> None:
        """What the server says of its table, and whether every rank is really there (C1, B44)."""
        complete = len(self.registry.ranks) >= expected
        self.world.emit(HealthReported(self.world.now, self.name, True, complete))

    def _expire(self, key: Hashable, expiry_s: float) -> None:
        """An entry ages with its table: a process that takes the table over takes its times over too (R1)."""
        if self._expiry_s.get(key) == expiry_s:
            self.world.machines.dp_entry.step(self.dp_entries.pop(key), "EntryExpired", None)
            del self._expiry_s[key]
