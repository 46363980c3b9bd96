"""The cluster as one thing: servers, engines, router, transport, and the way from a node's name to its rank."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from kvpoll.sim.bootstrap import BootstrapServer
from kvpoll.sim.decode import DecodeEngine
from kvpoll.sim.engine import Engine
from kvpoll.sim.prefill import PrefillEngine
from kvpoll.sim.transport import Transport
from kvpoll.sim.world import covers
from kvpoll.spec.trace import Surveyed
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.ranks.host import Plan, Request, engine_of
from kvpoll.statemachine.ranks.router import Router

if TYPE_CHECKING:
    from kvpoll.sim.world import World
    from kvpoll.statemachine.ranks.rank import Rank


class Cluster:
    """Everything that lives in a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.cluster = self
        self.topology = world.topology
        self.transport = Transport(world)
        count = self.topology.prefill.count
        self.servers = [BootstrapServer(world, f"B{number}") for number in range(count)]
        self.prefill: list[PrefillEngine] = []
        self.decode: list[DecodeEngine] = []
        self.prefill = [PrefillEngine(self, number) for number in range(count)]
        self.decode = [DecodeEngine(self, number) for number in range(self.topology.decode.count)]
        self._engines = {engine.name: engine for engine in self.engines()}
        self.router = Router(world, Fleet(self))
        self.plan = Plan(self.topology.prefill.sizes, self.topology.follows_room, self.topology.mla)
        for engine in self.engines():
            engine.on_crash = self._crashed
        world.network.on_restored = self._restored

    def engines(self) -> list[Engine]:
        """Prefill engines first."""
        return [*self.prefill, *self.decode]

    def start(self, servers_late: Collection[str] = ()) -> None:
        """Bring everything up; the bootstrap servers too, but for those that a fault holds back."""
        for server in self.servers:
            if server.name not in servers_late:
                server.start()
        for engine in self.engines():
            engine.start()

    # -- from names to things

    def engine(self, name: str) -> Engine | None:
        """The engine of that name."""
        return self._engines.get(name)

    def server_of(self, engine: str) -> BootstrapServer:
        """The bootstrap server of a prefill engine."""
        return self.servers[int(engine[1:])]

    def rank(self, node: str) -> Any:
        """The rank that lives at a node now, or None."""
        engine = self.engine(engine_of(node))
        return engine.ranks.get(node) if engine is not None and engine.up else None

    def hand(self, node: str, message: str, incarnation: Incarnation, arguments: tuple[Any, ...]) -> None:
        """A control message arrived at a node."""
        rank = self.rank(node)
        if rank is not None:
            rank.receive(message, incarnation, *arguments)

    # -- disturbances

    def disturb(self, target: str) -> None:
        """Something happened to a node or to the way there: detectors that look at it start probing."""
        for engine in self.engines():
            for detector in engine.detectors:
                seen = covers(target, detector.target) or target == "*" or covers(target, detector.rank.node)
                if seen or engine_of(target) in (detector.target, engine.name):
                    detector.disturb()

    def _crashed(self, engine: Engine) -> None:
        self.transport.forget(engine.name)
        self.router.engine_crashed(engine.name)
        self.disturb(engine.name)

    def _restored(self, left: str, right: str) -> None:
        for node, peer in ((left, right), (right, left)):
            rank = self.rank(node)
            if rank is not None and not rank.stopped:
                rank.restored(engine_of(peer))

    # -- the end of a run

    def survey(self) -> None:
        """Look at every idle node: nothing should be left."""
        for engine in self.engines():
            engine.report_health()
            for rank in engine.ranks.values():
                self.world.emit(_survey(rank))
        for server in self.servers:
            tables = (("dp_entries", len(server.dp_entries)),)
            self.world.emit(Surveyed(self.world.now, server.name, tables, (), 0))


class Fleet:
    """The cluster as its router sees it."""

    def __init__(self, cluster: Cluster) -> None:
        topology = cluster.topology
        self.cluster = cluster
        self.prefill, self.decode = topology.prefill, topology.decode
        self.load_balance, self.follows_room = topology.load_balance, topology.follows_room
        self.latency_s = topology.latency_s

    def command(self, engine: str, leader: str, request: Request, message: str, command: tuple[Any, ...]) -> bool:
        """One message to an engine's controller; a severed one loses it."""
        target = self.cluster.engine(engine)
        if target is None or not target.up:
            return False
        identity = Incarnation(*request.pair, target.epoch)
        self.cluster.world.network.send("R", leader, message, identity, self._arrive, target, request, command)
        return True

    def _arrive(self, engine: Any, request: Request, command: tuple[Any, ...]) -> None:
        if engine.up:
            engine.accept(request, command)


def _survey(rank: Rank) -> Surveyed:
    tables = {
        "rooms": len(rank.rooms),
        "requests": len(rank.entries),
        "timers": rank.timers.armed(),
        "kv_pages": rank.kv.size - len(rank.kv.free),  # type: ignore[attr-defined]
    }
    for name in ("destinations", "askers", "peers", "by_pair"):
        if hasattr(rank, name):
            tables[name] = len(getattr(rank, name))
    if hasattr(rank, "aux"):
        tables["aux_rows"] = rank.aux.size - len(rank.aux.free)
    gauges = tuple((name, float(value)) for name, value in sorted(rank.gauges.items()))
    return Surveyed(rank.host.now, rank.node, tuple(tables.items()), gauges, rank.timers.overdue())
