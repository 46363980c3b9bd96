"""An engine is one server process tree: its ranks live and die together, at one address, life after life."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpoll.sim.world import covers
from kvpoll.spec.trace import HealthReported, NodeStarted, NodeStopped
from kvpoll.statemachine.health import reports_healthy
from kvpoll.statemachine.roles import Peer

if TYPE_CHECKING:
    from kvpoll.sim.world import World
    from kvpoll.statemachine.ranks.engine import EngineShape


class Engine:
    """Shared by prefill and decode servers: lives, ranks by node name, health, failure detectors."""

    side = ""

    def __init__(self, world: World, number: int, shape: EngineShape) -> None:
        self.host = world
        self.number = number
        self.shape = shape
        self.name = f"{self.side}{number}"
        self.up = False
        self.epoch = -1
        self.ranks: dict[str, Any] = {}
        self.slowdowns: list[tuple[str, float]] = []
        self.detectors: list[Detector] = []
        self.on_crash: Callable[[Engine], None] = lambda engine: None
        world.alive[self.name] = False
        world.epochs[self.name] = -1

    def start(self) -> None:
        """Begin a life: new epoch, empty tables."""
        if self.up:
            return
        self.up = True
        self.epoch += 1
        world = self.host
        world.alive[self.name] = True
        world.epochs[self.name] = self.epoch
        self.build()
        for node in self.ranks:
            world.emit(NodeStarted(world.now, node, self.epoch))
        self.ready()

    def crash(self) -> None:
        """The process tree dies (a rank that dies takes its engine with it, as in SGLang)."""
        if not self.up:
            return
        self.up = False
        world = self.host
        world.alive[self.name] = False
        for rank in self.ranks.values():
            rank.over = rank.timers.stopped = True
            world.emit(NodeStopped(world.now, rank.node, self.epoch))
        self.detectors = []
        self.on_crash(self)

    def build(self) -> None:
        """Make the ranks of a new life."""
        raise AssertionError("an engine of no side")

    def ready(self) -> None:
        """Called when the ranks of a new life are up."""

    def pace(self, rank: Any) -> float:
        """How much slower than nominal this rank runs now."""
        factor: float = rank.pace
        for prefix, slowdown in self.slowdowns:
            if covers(prefix, rank.node):
                factor *= slowdown
        return factor

    def is_registered(self) -> bool:
        """Could a decode rank find this engine's ranks?"""
        return True

    def loops_running(self) -> bool:
        """Is every scheduler loop alive, and none caught in a collective that can never complete?"""
        return not any(rank.stopped or rank.collectives.blocked for rank in self.ranks.values())

    def report_health(self) -> None:
        """Say what the health endpoint says, and what is true."""
        world = self.host
        registered, running = self.is_registered(), self.loops_running()
        healthy = reports_healthy(world.profile, self.up, registered, running)
        world.emit(HealthReported(world.now, self.name, healthy, self.up and registered and running))


class Detector:
    """One process's failure detector of another. It probes only while something may have changed.

    An answered probe of a healthy peer changes nothing, so those are skipped; ``disturb`` starts probing at the
    detector's own next interval boundary, and it stops when the peer is steadily alive.
    """

    def __init__(
        self, rank: Any, target: str, on_suspected: Callable[[str], None], on_dead: Callable[[str, int], None]
    ) -> None:
        self.rank = rank
        self.host: World = rank.host
        self.target = target
        self.state = Peer("Alive", self.host.epochs.get(target, 0))
        self._on_suspected = on_suspected
        self._on_dead = on_dead
        self._interval_s = self.host.profile.number("heartbeat_interval_s")
        self._phase_s = rank.chance.random() * self._interval_s
        self._probing = False

    def disturb(self) -> None:
        """Something happened to the target or to the way there."""
        if not self._probing:
            self._probing = True
            now = self.host.now
            periods = int((now - self._phase_s) // self._interval_s) + 1
            self.host.after(self._phase_s + periods * self._interval_s - now, self._probe)

    def _probe(self) -> None:
        if self.rank.is_over():
            return
        world = self.host
        reachable = world.alive.get(self.target, False) and not world.network.is_severed(self.rank.node, self.target)
        fact, detail = ("ProbeAnswered", world.epochs[self.target]) if reachable else ("ProbeMissed", None)
        self.state, orders = world.machines.peer.step(self.state, fact, detail)
        for order, _ in orders:
            if order == "DeclareSuspected":
                world.mark(self.rank.node, "peer_suspected")
                self._on_suspected(self.target)
            elif order == "DeclareDead":
                world.mark(self.rank.node, "peer_died")
                self._on_dead(self.target, world.epochs[self.target])
        if reachable:
            self._probing = False
        else:
            world.after(self._interval_s, self._probe)
