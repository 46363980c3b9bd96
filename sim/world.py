"""Virtual time and everything that is shared in it: clock, chance, messages, HTTP, links, events.

SimPy's heap of (time, priority, order) is the only scheduler, so equal times keep insertion order; chance comes
from generators named by purpose and derived from the seed; nothing else is a source of difference between two
runs. A repeat is byte-identical.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import simpy

from kvpoll.spec.invariants import Watch
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.trace import Delivered, Lost, Marked, Sent, Stream
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.conduct import sends_again
from kvpoll.statemachine.ranks.host import Destination, Plan, Reply, Request, Waiting, engine_of, is_of
from kvpoll.statemachine.roles import Machines

if TYPE_CHECKING:
    from kvpoll.sim.cluster import Cluster
    from kvpoll.sim.topology import Topology


class World:
    """The stage of one run. ``now`` is in seconds since its start."""

    def __init__(
        self,
        protocol: Protocol,
        profile: Profile,
        topology: Topology,
        seed: int | str,
        stream: Stream,
        check: bool = True,
    ) -> None:
        self.env = simpy.Environment()
        self.protocol = protocol
        self.profile = profile
        self.topology = topology
        self.seed = seed
        self.stream = stream
        self._observers = stream.observers
        self.machines = Machines(protocol, profile)
        self.watch = Watch(stream, protocol.bounds, None if check else ())
        self.network = Network(self)
        self.marks: dict[str, int] = {}
        self.epochs: dict[str, int] = {}
        self.alive: dict[str, bool] = {}
        self.cluster: Cluster

    @property
    def now(self) -> float:
        now: float = self.env._now  # what env.now returns; it is asked for a million times an hour
        return now

    def chance(self, purpose: str) -> random.Random:
        """A random generator of its own for every purpose, so that a change in one disturbs no other."""
        return random.Random(f"{self.seed}/{purpose}")

    def after(self, delay_s: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function later."""
        event = simpy.Timeout(self.env, delay_s)
        assert event.callbacks is not None
        event.callbacks.append(lambda _: function(*arguments))

    def sleep(self, delay_s: float) -> simpy.Event:
        """What a task yields to go on after this time."""
        return self.env.timeout(delay_s)

    def happening(self) -> simpy.Event:
        """What a task yields to go on when it succeeds."""
        return simpy.Event(self.env)

    def spawn(self, task: Waiting) -> None:
        """Run a task."""
        self.env.process(task)

    # -- what ranks ask of the rest of the cluster

    def send(self, node: str, to: str, message: str, incarnation: Incarnation, *arguments: Any) -> None:
        """Send a control message to another rank."""
        self.network.send(node, to, message, incarnation, self.cluster.hand, to, message, incarnation, arguments)

    def request(self, node: str, engine: str, route: str, detail: Any, repeat: int, reply: Reply) -> None:
        """Send an HTTP request to the bootstrap server of a prefill engine."""
        self.cluster.server_of(engine).request(node, route, detail, repeat, reply)

    def post(self, rank: Any, destination: Destination, chunk: int, first: int, pages: tuple[int, ...], last: bool,
             done: Callable[[str], None]) -> None:  # fmt: skip
        """Write pages of a prompt."""
        self.cluster.transport.post(rank, destination, chunk, first, pages, last, done)

    def problem(self, destination: Destination) -> str | None:
        """Every rank can write to every other."""
        return None

    def abandon(self, own: Incarnation) -> None:
        """Its writes cannot be stopped."""

    def refuse(self, own: Incarnation) -> bool:
        """Its writes are one-sided: the writer places the bytes."""
        return False

    def explain(self, own: Incarnation, reason: str) -> None:
        """Nobody reads."""

    def plan(self, engine: str) -> Plan:
        """The topology of a prefill engine."""
        return self.cluster.plan

    def believed_epoch(self, rank: Any, engine: str) -> int | None:
        """An engine's process epoch as this rank's failure detector last saw it."""
        detectors = rank.engine.detectors
        return next((d.state.epoch for d in detectors if d.rank is rank and d.target == engine), None)

    def true_epoch(self, engine: str) -> int:
        """An engine's process epoch as it is."""
        return self.epochs[engine]

    def leg_failed(self, rank: Any, request: Request, side: str, cause: str) -> None:
        """Answer the router's leg with an error."""
        identity = Incarnation(*request.pair, 0)
        self.network.send(rank.node, "R", "Error", identity, self.cluster.router.leg_failed, request, side, cause)

    def first_token(self, rank: Any, request: Request) -> None:
        """Stream the first token to the router."""
        identity = Incarnation(*request.pair, 0)
        self.network.send(rank.node, "R", "FirstToken", identity, self.cluster.router.first_token, request)

    # -- telling

    def wants(self, event_type: type[Any]) -> bool:
        """Yes: whatever the type, the watch learns the time from it."""
        return True

    def emit(self, event: Any) -> None:
        """Tell invariants and recorder what happened; deadlines that passed before it are judged first."""
        if event.t > self.watch.due:
            self.watch.advance(event.t)
        for observer in self._observers[type(event)]:
            observer(event)

    def scheduled_events(self) -> int:
        """How many SimPy events this run has scheduled. SimPy numbers them and says the next number only so."""
        return int(repr(self.env._eid).removeprefix("count(").removesuffix(")"))

    def mark(self, node: str, mark: str) -> None:
        """Witness something that a scenario waits for."""
        self.marks[mark] = self.marks.get(mark, 0) + 1
        if self.marks[mark] == 1 or self.stream.wants(Marked):
            self.emit(Marked(self.now, node, mark))


class Network:
    """Ordered channels between nodes, with latency, disconnects and partitions.

    A channel keeps order (TCP); nothing orders two channels. A severed channel loses what is in flight on it and
    what is sent into it, and both ends notice when it comes back (``on_restored``).
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.severed: list[tuple[str, str]] = []
        self.delays: list[tuple[str, float, bool]] = []
        self.duplicating: list[tuple[str, float]] = []
        self.on_restored: Callable[[str, str], None] = lambda left, right: None
        self._last: dict[tuple[str, str], float] = {}
        self._broken: set[tuple[str, str]] = set()
        self._unsent: list[tuple[Any, ...]] = []
        self._serial = 0
        self._jitter = world.chance("latency")
        self._spread = world.topology.jitter
        self._copies = world.chance("duplicates")

    def is_severed(self, left: str, right: str) -> bool:
        """Is there a partition between two nodes? Engines are named by prefix, "*" is everyone.

        Ranks of one engine share their fate: a broken link inside it is a crash, not a lost message.
        """
        if not self.severed or engine_of(left) == engine_of(right):
            return False
        return any(
            (covers(a, left) and covers(b, right)) or (covers(a, right) and covers(b, left)) for a, b in self.severed
        )

    def latency_s(self, node: str) -> float:
        """One draw of one-way latency to or from ``node``."""
        delay = self.world.topology.latency_s * (1.0 + self._spread * self._jitter.random())
        for prefix, extra_s, is_random in self.delays:
            if covers(prefix, node):
                delay += extra_s * (self._jitter.random() if is_random else 1.0)
        return delay

    def send(
        self,
        node: str,
        to: str,
        message: str,
        incarnation: Incarnation,
        deliver: Callable[..., None],
        *arguments: Any,
    ) -> None:
        """Send a control message; ``deliver(*arguments)`` is called when it arrives, if it arrives."""
        world = self.world
        self._serial += 1
        serial = self._serial
        if world.stream.wants(Sent):
            world.emit(Sent(world.now, node, to, message, incarnation, serial))
        delay_s = self._in_turn(node, to, self.latency_s(node))
        epoch = world.epochs.get(engine_of(to), 0)
        parcel = (node, to, message, incarnation, serial, epoch, deliver, arguments)
        world.after(delay_s, self._arrive, parcel)
        if (
            self.duplicating
            and engine_of(node) != engine_of(to)
            and any(covers(p, node) and self._copies.random() < share for p, share in self.duplicating)
        ):
            world.mark(node, "message_duplicated")
            world.after(delay_s, self._arrive, parcel)

    def _in_turn(self, node: str, to: str, latency_s: float) -> float:
        """How long a message takes that may not overtake the one before it on its channel.

        What counts is the sum that SimPy makes of now and the delay: rounded down by its last bit, it would let a
        message overtake one that waits for the very same moment.
        """
        now, last = self.world.now, self._last.get((node, to), 0.0)
        delay_s = max(last, now + latency_s) - now
        while now + delay_s < last:
            delay_s += math.ulp(last)
        self._last[node, to] = now + delay_s
        return delay_s

    def _arrive(self, parcel: tuple[Any, ...]) -> None:
        node, to, message, incarnation, serial, epoch, deliver, arguments = parcel
        world = self.world
        if self.is_severed(node, to):
            self._broken.add((node, to))
            world.mark(node, "message_lost")
            world.emit(Lost(world.now, to, node, message, incarnation, serial))
            if "R" in (node, to) and sends_again(world.profile):
                self._unsent.append(parcel)
            return
        if not world.alive.get(engine_of(to), True) or world.epochs.get(engine_of(to), 0) != epoch:
            world.emit(Lost(world.now, to, node, message, incarnation, serial))
            return
        if world.stream.wants(Delivered):
            world.emit(Delivered(world.now, to, node, message, incarnation, serial))
        deliver(*arguments)

    def restore(self, left: str, right: str) -> None:
        """A partition ends; both ends of every channel that lost something learn of it."""
        self.severed.remove((left, right))
        pairs = sorted({(min(pair), max(pair)) for pair in self._broken if not self.is_severed(*pair)})
        self._broken = {pair for pair in self._broken if self.is_severed(*pair)}
        for one, other in pairs:
            self.world.mark(one, "link_restored")
            self.on_restored(one, other)
        self._send_again()

    def _send_again(self) -> None:
        """What router and engines could not tell each other is told when the link is back; nobody else will."""
        unsent, self._unsent = self._unsent, []
        for parcel in unsent:
            node, to, message, incarnation, _, epoch, deliver, arguments = parcel
            if self.is_severed(node, to):
                self._unsent.append(parcel)
            elif self.world.epochs.get(engine_of(to), 0) == epoch:
                self.send(node, to, message, incarnation, deliver, *arguments)


def covers(prefix: str, node: str) -> bool:
    """Does a fault's target name this node? "*" is everyone, "P0" is engine P0 with all its ranks."""
    return prefix == "*" or is_of(node, prefix)
