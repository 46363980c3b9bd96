"""Starts a cluster of real processes, routes requests to it, kills and restarts parts of it, and ends all of it.

The launcher is the router of the cluster (node ``R``), and to a fault injector it looks like ``sim.cluster.Cluster``:
``engine(name).crash()`` here is SIGKILL to every rank process of that engine. A rank that dies by itself takes its
engine with it, as in SGLang, and is remembered as ``unexpected``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from kvpoll.runtime.cluster.config import Lengths, RankConfig, ServerConfig, Shape
from kvpoll.runtime.cluster.nursery import Nursery
from kvpoll.runtime.cluster.process import LAUNCHER
from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.control.messages import Envelope
from kvpoll.runtime.control.plane import ControlPlane
from kvpoll.runtime.loop import Loop
from kvpoll.runtime.memory import place
from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.trace_file import TraceFile
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import HealthReported, Marked, NodeStopped, Stream
from kvpoll.statemachine.health import reports_healthy
from kvpoll.statemachine.ranks.engine import EngineShape
from kvpoll.statemachine.ranks.host import Request, rank_name
from kvpoll.statemachine.ranks.router import Router
from kvpoll.statemachine.roles import Machines

START_LIMIT_S: Final = 60.0
END_LIMIT_S: Final = 5.0
LOOK_S: Final = 0.05
"""How often, in wall seconds, the launcher looks whether a child has ended."""

_json: Final = msgspec.json.Encoder().encode


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster to start. layout: the whole model's memory, of which ranks keep their slices; pages are per rank.

    rules: changes of the profile. folder: where traces and the log go; traces: record them at all.
    """

    prefill: EngineShape
    decode: EngineShape
    lengths: Lengths
    layout: Layout
    profile: str
    rules: dict[str, Any] = msgspec.field(default_factory=dict)
    spec: str | None = None
    seed: str = "0"
    speed: float = 1.0
    transport: str = "shm"
    transport_options: dict[str, Any] = msgspec.field(default_factory=dict)
    folder: Path
    traces: bool = True
    monitored: bool = False
    halts: tuple[dict[str, Any], ...] = ()


class Child:
    """One process: what it is called, its life, its pid, where it listens once it has said hello."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.epoch = -1
        self.pid: int | None = None
        self.endpoint: str | None = None
        self.control_port = 0
        self.has_begun = False
        self.stats: dict[str, Any] = {}
        self.registered = False
        self.running = True


class RealServer:
    """A bootstrap server of the cluster, as a fault injector knows it."""

    def __init__(self, launcher: Launcher, number: int) -> None:
        self.launcher = launcher
        self.name = f"B{number}"
        self.child = Child(self.name)
        self.port = free_port()
        self._slow_s = 0.0
        self._error_share = 0.0

    @property
    def up(self) -> bool:
        """Is there a process?"""
        return self.child.pid is not None

    def start(self, amnesia: bool = True) -> None:
        """A new process; it knows nothing of what the former one was told."""
        if self.up:
            return
        if not amnesia:
            raise BadInput(f"{self.name}: a real server that was killed has lost its tables; give amnesia = true")
        self.launcher.bear(self.child, self.config)

    def config(self, epoch: int, origin: float | None) -> ServerConfig:
        """What its next process is told."""
        return ServerConfig(port=self.port, **self.launcher.common(self.child, epoch, origin))

    def stop(self) -> None:
        """SIGKILL."""
        self.launcher.kill(self.child)

    @property
    def slow_s(self) -> float:
        """Seconds that every request waits before it is handled."""
        return self._slow_s

    @slow_s.setter
    def slow_s(self, value: float) -> None:
        self._slow_s = value
        self.disturb()

    @property
    def error_share(self) -> float:
        """Share of requests that are answered 500."""
        return self._error_share

    @error_share.setter
    def error_share(self, value: float) -> None:
        self._error_share = value
        self.disturb()

    def disturb(self) -> None:
        """Tell the process how slow and how wrong it is to be."""
        self.launcher.order(self.child, "disturb", slow_s=self._slow_s, error_share=self._error_share)


class RealRank:
    """A rank process, as a fault injector knows it: some of what the rank itself has."""

    def __init__(self, launcher: Launcher, node: str) -> None:
        self.launcher = launcher
        self.node = node
        self.child = Child(node)

    def abort_room(self, pair: tuple[int, int], cause: str) -> None:
        """This rank alone fails a request, as a worker error or a rank-local check does."""
        self.launcher.order(self.child, "abort_room", pair=pair, cause=cause)


class RealEngine:
    """The rank processes of one engine, which live and die together."""

    def __init__(self, launcher: Launcher, side: str, number: int) -> None:
        self.launcher = launcher
        self.side = side
        self.number = number
        self.name = f"{side}{number}"
        self.shape = launcher.plan.prefill if side == "P" else launcher.plan.decode
        self.epoch = -1
        self.up = False
        self.replicas = [self._stages(dp) for dp in range(self.shape.sizes.dp)]
        self.ranks = {node: RealRank(launcher, node) for stages in self.replicas for stage in stages for node in stage}

    def _stages(self, dp: int) -> tuple[tuple[str, ...], ...]:
        sizes = self.shape.sizes
        return tuple(tuple(rank_name(self.name, sizes, dp, pp, tp) for tp in range(sizes.tp)) for pp in range(sizes.pp))

    def stage(self, dp: int, pp: int) -> list[RealRank]:
        """The ranks of one pipeline stage."""
        return [self.ranks[node] for node in self.replicas[dp][pp]]

    def start(self) -> None:
        """A new life: every rank as a new process."""
        if self.up:
            return
        self.up = True
        self.epoch += 1
        for dp, stages in enumerate(self.replicas):
            for pp, stage in enumerate(stages):
                for tp, node in enumerate(stage):
                    make = self.launcher.rank_config(self, node, dp, pp, tp)
                    self.launcher.bear(self.ranks[node].child, make)

    def crash(self) -> None:
        """SIGKILL to every rank."""
        if not self.up:
            return
        self.up = False
        for rank in self.ranks.values():
            self.launcher.kill(rank.child)
        self.launcher.router.engine_crashed(self.name)

    def has_begun(self) -> bool:
        """Has every rank of this life been built?"""
        return self.up and all(rank.child.has_begun for rank in self.ranks.values())

    def report_health(self) -> None:
        """Put together what the ranks say, and tell the trace what the health endpoint says."""
        launcher, children = self.launcher, [rank.child for rank in self.ranks.values()]
        registered = all(child.registered for child in children)
        running = all(child.running for child in children)
        healthy = reports_healthy(launcher.profile, self.up, registered, running)
        launcher.emit(HealthReported(launcher.now, self.name, healthy, self.up and registered and running))


class Launcher:
    """The cluster. One thread owns it; ``run_until`` turns its loop."""

    def __init__(self, protocol: Protocol, profile: Profile, plan: Plan) -> None:
        self.protocol = protocol
        self.profile = profile
        self.machines = Machines(protocol, profile)
        self.plan = plan
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.stream = Stream()
        self.plane = ControlPlane(LAUNCHER, 0)
        self.loop = Loop(self.plane, speed=plan.speed)
        self.marks: dict[str, int] = {}
        self.unexpected: list[str] = []
        self.traces: list[Path] = []
        self.world = self
        self.origin: float | None = None
        self.surveyed: set[str] = set()
        self._trace = TraceFile(self._trace_path(LAUNCHER, 0), {"node": LAUNCHER}) if plan.traces else None
        self._log = (plan.folder / "stderr.log").open("wb")
        self._nursery = Nursery(self._log.fileno())
        self.servers = [RealServer(self, number) for number in range(plan.prefill.count)]
        self.prefill = [RealEngine(self, "P", number) for number in range(plan.prefill.count)]
        self.decode = [RealEngine(self, "D", number) for number in range(plan.decode.count)]
        self.router = Router(self, Fleet(self))  # type: ignore[arg-type]

    # -- what the router and a fault injector ask of their host

    @property
    def now(self) -> float:
        """Seconds since the start of the trace."""
        return self.loop.now

    def emit(self, event: Any) -> None:
        """Tell the trace what happened here, and whoever listens."""
        if self._trace is not None:
            self._trace(event)
        self.stream.emit(event)

    def mark(self, node: str, mark: str) -> None:
        """Witness something that a scenario waits for."""
        self.marks[mark] = self.marks.get(mark, 0) + 1
        if self.marks[mark] == 1:
            self.emit(Marked(self.now, node, mark))

    def after(self, delay_s: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function later."""
        self.loop.after(delay_s, function, *arguments)

    def chance(self, purpose: str) -> random.Random:
        """A generator of its own for every purpose."""
        return random.Random(f"{self.plan.seed}/{purpose}")

    def engines(self) -> list[RealEngine]:
        """Prefill engines first."""
        return [*self.prefill, *self.decode]

    def engine(self, name: str) -> RealEngine | None:
        """The engine of that name."""
        return next((engine for engine in self.engines() if engine.name == name), None)

    def server_of(self, engine: str) -> RealServer:
        """The bootstrap server of a prefill engine."""
        return self.servers[int(engine[1:])]

    def disturb(self, target: str) -> None:
        """Real failure detectors notice by themselves."""

    # -- configs

    def common(self, child: Child, epoch: int, origin: float | None) -> dict[str, Any]:
        """What every process is told. A later life listens where the former one did."""
        plan, node = self.plan, child.node
        trace = str(self._trace_path(node, epoch)) if plan.traces else None
        return {
            "node": node, "epoch": epoch, "launcher": self.plane.endpoint, "origin": origin, "speed": self.loop.speed,
            "profile": plan.profile, "rules": plan.rules, "spec": plan.spec, "trace": trace,
            "control_port": child.control_port,
        }  # fmt: skip

    def _trace_path(self, node: str, epoch: int) -> Path:
        path = self.plan.folder / f"{node.replace('/', '-')}.{epoch}.jsonl"
        if path not in self.traces:
            path.unlink(missing_ok=True)
            self.traces.append(path)
        return path

    def rank_config(
        self, engine: RealEngine, node: str, dp: int, pp: int, tp: int
    ) -> Callable[[int, float | None], RankConfig]:
        """Makes what a rank's next process is told."""
        plan = self.plan
        is_prefill = engine.side == "P"
        other = plan.decode if is_prefill else plan.prefill
        servers = {f"P{server.name[1:]}": f"127.0.0.1:{server.port}" for server in self.servers}
        halts = tuple(pattern for pattern in plan.halts if pattern.get("node") == node)

        def make(epoch: int, origin: float | None) -> RankConfig:
            return RankConfig(
                side="prefill" if is_prefill else "decode", engine=engine.name, dp=dp, pp=pp, tp=tp,
                stages=engine.replicas[dp], shape=Shape.of(engine.shape), peer_sizes=other.sizes,
                lengths=plan.lengths, servers=servers,
                layout=self.layout_of(engine.shape, pp, tp), sources=self._sources(), transport=plan.transport,
                transport_options=plan.transport_options, seed=f"{plan.seed}/{node}/{epoch}",
                monitored=plan.monitored, halts=halts if epoch == 0 else (),  # a fault strikes one life
                **self.common(engine.ranks[node].child, epoch, origin),
            )  # fmt: skip

        return make

    def layout_of(self, shape: EngineShape, pp: int, tp: int) -> Layout:
        """The slice of the model's memory that one rank keeps."""
        sizes, whole = shape.sizes, self.plan.layout
        count = len(whole.layers)
        layers = whole.layers[count * pp // sizes.pp : count * (pp + 1) // sizes.pp]
        return dataclasses.replace(
            whole, layers=layers, pages=shape.kv_pages, rows=shape.rows, tp_rank=tp, tp_size=sizes.tp
        )

    def _sources(self) -> dict[str, Layout]:
        """Layouts of the prefill ranks, by their place in a replica."""
        sizes = self.plan.prefill.sizes
        return {
            place(rank_name("P0", sizes, 0, pp, tp)): self.layout_of(self.plan.prefill, pp, tp)
            for pp in range(sizes.pp) for tp in range(sizes.tp)
        }  # fmt: skip

    # -- lives

    def bear(self, child: Child, make: Callable[[int, float | None], Any]) -> None:
        """A new process for a child."""
        child.epoch += 1
        child.endpoint, child.has_begun, child.registered, child.running = None, False, False, True
        child.stats = {}
        child.pid = self._nursery.bear(make(child.epoch, self.origin))

    def kill(self, child: Child) -> None:
        """SIGKILL, and wait until the operating system says that it is gone."""
        if child.pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        end_s = time.monotonic() + END_LIMIT_S
        while child.pid not in self._nursery.ended() and time.monotonic() < end_s:
            time.sleep(0.001)
        child.pid = None
        self.emit(NodeStopped(self.now, child.node, child.epoch))

    def signal(self, node: str, number: signal.Signals) -> None:
        """Send a signal to the process of a rank or server."""
        child = next(child for child in self.children() if child.node == node)
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    def children(self) -> Iterator[Child]:
        """Servers and ranks."""
        yield from (server.child for server in self.servers)
        yield from (rank.child for engine in self.engines() for rank in engine.ranks.values())

    def start(self, servers_late: set[str] | frozenset[str] = frozenset()) -> None:
        """Start everything, wait until it is there, and let time begin. Raises BadInput when it does not come."""
        for server in self.servers:
            if server.name not in servers_late:
                server.start()
        for engine in self.engines():
            engine.start()
        expected = [child for child in self.children() if child.pid is not None]
        end_s = time.monotonic() + START_LIMIT_S
        while any(child.endpoint is None for child in expected):
            self.loop.turn(self._receive, 0.05)
            lost = [child.node for child in expected if child.pid in self._nursery.ended()]
            if lost or time.monotonic() > end_s:
                missing = lost or [child.node for child in expected if child.endpoint is None]
                raise BadInput(f"{missing[0]} did not come up: {self.complaint() or 'it said nothing'}")
        self.origin = time.monotonic() + 0.01
        self.loop.origin = self.origin
        for server in self.servers:
            self._begin_server(server)
        for engine in self.engines():
            self._begin(engine)
        self._look()

    def complaint(self) -> str:
        """The last line that a process of the cluster wrote to its standard error."""
        lines = (self.plan.folder / "stderr.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _begin(self, engine: RealEngine) -> None:
        """Every rank of the engine is there: tell each where the others are."""
        children = [rank.child for rank in engine.ranks.values()]
        if self.origin is None or any(child.endpoint is None for child in children):
            return
        directory = {child.node: (child.endpoint, child.epoch) for child in children}
        for child in children:
            child.has_begun = True
            self.order(child, "begin", origin=self.origin, directory=directory)

    def _begin_server(self, server: RealServer) -> None:
        if self.origin is not None and server.child.endpoint is not None:
            server.child.has_begun = True
            self.order(server.child, "begin", origin=self.origin)
            server.disturb()

    def _look(self) -> None:
        """Has a child ended that nobody killed?"""
        ended = self._nursery.ended()
        for engine in self.engines():
            gone = [rank.child for rank in engine.ranks.values() if rank.child.pid in ended]
            if engine.up and gone:
                self.unexpected.append(
                    f"{gone[0].node} ended with status {ended[gone[0].pid or 0]}: {self.complaint()}"
                )
                engine.crash()
        for server in self.servers:
            if server.child.pid in ended:
                self.unexpected.append(
                    f"{server.name} ended with status {ended[server.child.pid or 0]}: {self.complaint()}"
                )
                self.kill(server.child)
        self.after(LOOK_S * self.loop.speed, self._look)

    # -- messages

    def order(self, child: Child, kind: str, **content: Any) -> bool:
        """Send a command to a process."""
        if child.endpoint is None or child.pid is None:
            return False
        return self.plane.send(child.endpoint, child.node, child.epoch, wire.Command(kind, _json(content)))

    def _receive(self) -> None:
        for envelope, message in self.plane.receive():
            child = next((child for child in self.children() if child.node == envelope.node), None)
            if child is None or envelope.epoch != child.epoch or child.pid is None:
                continue
            if isinstance(message, wire.Reply):
                self._replied(message)
            elif isinstance(message, wire.Command):
                self._told(child, envelope, message.kind, msgspec.json.decode(message.payload))

    def _replied(self, message: wire.Reply) -> None:
        known = self.router.active.get(message.rid)
        if known is None:
            return
        if message.kind == "first_token":
            self.router.first_token(known[0])
        else:
            self.router.leg_failed(known[0], message.side, message.cause or "failed")

    def _told(self, child: Child, envelope: Envelope, kind: str, content: dict[str, Any]) -> None:
        if kind == "hello":
            child.endpoint = envelope.endpoint
            child.control_port = int(envelope.endpoint.rpartition(":")[2])
            for engine in self.engines():
                if child.node in engine.ranks:
                    self._begin(engine)
            for server in self.servers:
                if server.child is child:
                    self._begin_server(server)
        elif kind == "surveyed":
            self.surveyed.add(child.node)
        elif kind in ("health", "stats"):
            child.registered, child.running = content["registered"], content["running"]
            if kind == "stats":
                child.stats = content
            else:
                home = self.engine(child.node.partition("/")[0])
                if home is not None:
                    home.report_health()

    # -- running

    def change_speed(self, speed: float) -> None:
        """Time runs at this speed from now on, in every process; no life may be just beginning. What a cluster keeps
        for minutes of its own time, so that late messages find it, is then gone in seconds of the wall.
        """
        at = time.monotonic()
        self.loop.change_speed(at, speed)
        self.origin = self.loop.origin
        for child in self.children():
            self.order(child, "speed", at=at, speed=speed)

    def run_until(self, t: float, every: Callable[[], None] = lambda: None) -> None:
        """Turn the loop until this time; ``every`` is called at each turn."""
        while self.now < t:
            self.loop.turn(self._receive, max(0.0, min(0.05, (t - self.now) / self.loop.speed)))
            every()

    def survey(self) -> None:
        """Have every rank say what is left on it, and the engines how healthy they are."""
        self.surveyed.clear()
        waiting = set()
        for engine in self.engines():
            engine.report_health()
            for rank in engine.ranks.values():
                if self.order(rank.child, "survey"):
                    waiting.add(rank.node)
        end_s = time.monotonic() + END_LIMIT_S
        while not waiting <= self.surveyed and time.monotonic() < end_s:
            self.loop.turn(self._receive, 0.01)
        missing = sorted(waiting - self.surveyed)
        if missing:
            self.unexpected.append(f"{missing[0]} does not answer")

    def close(self, patience_s: float = END_LIMIT_S) -> None:
        """End every process: ask first, and after ``patience_s`` SIGKILL. Nothing is left."""
        asked = [child for child in self.children() if self.order(child, "quit")]
        end_s = time.monotonic() + patience_s
        with contextlib.suppress(OSError):
            while time.monotonic() < end_s:
                ended = self._nursery.ended()
                if all(child.pid in ended for child in asked):
                    break
                time.sleep(0.01)
        self._nursery.close()
        self.plane.close()
        if self._trace is not None:
            self._trace.close()
        self._log.close()


class Fleet:
    """The engines, as the router sees them."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.prefill, self.decode = launcher.plan.prefill, launcher.plan.decode
        self.load_balance = launcher.plan.lengths.load_balance
        self.follows_room = launcher.plan.lengths.follows_room
        self.latency_s = 0.0

    def command(self, engine: str, leader: str, request: Request, message: str, command: tuple[Any, ...]) -> bool:
        """Hand a command to an engine's controller, which hands it to ``leader``. False: the connection is refused."""
        target = self.launcher.engine(engine)
        if target is None or not target.has_begun():
            return False
        child = target.ranks[leader].child
        assert child.endpoint is not None
        work = wire.Command("work", _json(command))
        return self.launcher.plane.send(child.endpoint, leader, child.epoch, work)


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
