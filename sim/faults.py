"""Faults as data (``spec/faults.toml``), and the few effects that they are made of.

A `Fault` is one entry of a scenario's schedule. It begins at a time, or when a trace event matches its trigger,
acts for ``for_s`` seconds and ends. It leaves the mark ``fault:<kind>`` when it really did something; a scenario
whose fault never fired is a defect, and ``kvpoll run`` says so.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpoll.sim.topology import Topology, rank_names
from kvpoll.sim.world import covers
from kvpoll.spec.source import Source
from kvpoll.spec.trace import EVENTS, FaultBegan, FaultEnded
from kvpoll.statemachine.conduct import follows_wall_clock
from kvpoll.statemachine.ranks.host import Request

if TYPE_CHECKING:
    from kvpoll.sim.cluster import Cluster
    from kvpoll.sim.transport import Transport, Write

FAULTS_PATH = Path(__file__).parent.parent / "spec" / "faults.toml"


@dataclass(frozen=True)
class Kind:
    """One kind of fault: what it says, which effect it has, what parameters it takes, how a seed draws it."""

    name: str
    says: str
    effect: str
    parameters: Mapping[str, Any]
    severs: bool = False
    draw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule. ``trigger`` is a pattern of trace-event fields; ``at_s`` then counts from the match."""

    id: str
    kind: Kind
    target: str
    at_s: float
    for_s: float
    parameters: Mapping[str, Any]
    trigger: Mapping[str, Any] | None = None


@functools.lru_cache(maxsize=1)
def kinds() -> dict[str, Kind]:
    """The fault vocabulary."""
    source = Source(FAULTS_PATH)
    found = {}
    for name, entry in source.data["fault"].items():
        source.require_known(("fault", name), entry, ("says", "effect", "severs", "parameters", "draw"), "key")
        if entry["effect"] not in EFFECTS:
            raise source.error(("fault", name, "effect"), f"unknown effect {entry['effect']!r}")
        found[name] = Kind(name, **entry)
    return found


class Injector:
    """Carries out a fault schedule on a cluster."""

    def __init__(self, cluster: Cluster, faults: list[Fault]) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.faults = faults
        self.active: dict[str, tuple[Fault, Callable[[], None]]] = {}
        self.healed = False
        self.chance = self.world.chance("faults")

    def schedule(self) -> None:
        """Arm every fault."""
        for fault in self.faults:
            if fault.trigger is None:
                self.world.after(fault.at_s, self.begin, fault)
            else:
                self._await(fault)

    def _await(self, fault: Fault) -> None:
        assert fault.trigger is not None
        pattern = {name: value for name, value in fault.trigger.items() if name != "event"}
        pending = [True]

        def watch(event: Any) -> None:
            if pending and all(_matches(getattr(event, name), value) for name, value in pattern.items()):
                pending.clear()
                self.world.after(fault.at_s, self.begin, fault)

        stream = self.world.stream
        stream.subscribe(EVENTS[fault.trigger["event"]], watch)
        stream.recording = True  # a trigger hears what a recorder would, whether there is one or not

    def begin(self, fault: Fault) -> None:
        """The fault takes effect."""
        if self.healed:
            return
        severs: tuple[str, ...] = ()
        if fault.kind.severs:
            target = fault.target.partition("/")[0] if fault.kind.effect == "process_down" else fault.target
            severs = ("*",) if target.startswith("B") else (target,)
        world = self.world
        world.emit(FaultBegan(world.now, fault.target, fault.id, fault.kind.name, severs))
        self.active[fault.id] = (fault, EFFECTS[fault.kind.effect](self, fault))
        world.after(fault.for_s, self.end, fault)

    def end(self, fault: Fault) -> None:
        """The fault stops acting."""
        if fault.id in self.active:
            _, undo = self.active.pop(fault.id)
            undo()
            self.world.emit(FaultEnded(self.world.now, fault.target, fault.id, fault.kind.name))

    def heal(self) -> None:
        """Everything stops and everyone is up again; what has not begun never will."""
        self.healed = True
        for fault, _ in list(self.active.values()):
            self.end(fault)

    def fired(self, fault: Fault) -> None:
        """The fault really did something."""
        self.world.mark(fault.target, f"fault:{fault.kind.name}")


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str) and wanted.endswith("*"):
        return str(value).startswith(wanted[:-1])
    return bool(value == wanted)


# ------------------------------------------------------------------------------------------------------ effects
# Each takes the injector and the fault, acts, and returns what ends it.

Undo = Callable[[], None]


def _process_down(injector: Injector, fault: Fault) -> Undo:
    """Kill a process tree; a prefill engine takes its bootstrap server along, since it lives in it."""
    cluster = injector.cluster
    name = fault.target.partition("/")[0]
    amnesia = bool(fault.parameters["amnesia"])
    if name.startswith("B"):
        server = cluster.servers[int(name[1:])]
        server.stop()
        injector.fired(fault)
        cluster.disturb(name)

        def listen() -> None:
            if cluster.prefill[int(name[1:])].up and not _is_held_down(injector, name):
                server.start(amnesia)
                cluster.disturb(name)

        return listen
    engine = cluster.engine(name)
    assert engine is not None
    servers = [cluster.server_of(name)] if name.startswith("P") else []
    for server in servers:
        server.stop()
        cluster.disturb(server.name)
    engine.crash()
    injector.fired(fault)

    def restart() -> None:
        if _is_held_down(injector, name):
            return
        for server in servers:
            if not _is_held_down(injector, server.name):
                server.start(True)
                cluster.disturb(server.name)
        engine.start()
        cluster.disturb(name)

    return restart


def _is_held_down(injector: Injector, name: str) -> bool:
    """Does another fault keep this process down? The last of them to end lets it up."""
    return any(
        other.target.partition("/")[0] == name and other.kind.effect == "process_down"
        for other, _ in injector.active.values()
    )


def _server_slow(injector: Injector, fault: Fault) -> Undo:
    server = injector.cluster.servers[int(fault.target[1:])]
    server.slow_s += fault.parameters["slow_s"]
    injector.fired(fault)

    def undo() -> None:
        server.slow_s = max(0.0, server.slow_s - fault.parameters["slow_s"])

    return undo


def _server_errors(injector: Injector, fault: Fault) -> Undo:
    server = injector.cluster.servers[int(fault.target[1:])]
    server.error_share = fault.parameters["share"]
    injector.fired(fault)

    def undo() -> None:
        others = [
            other.parameters["share"]
            for other, _ in injector.active.values()
            if (other.kind.effect, other.target) == (fault.kind.effect, fault.target)
        ]
        server.error_share = others[-1] if others else 0.0  # one that still acts goes on

    return undo


def _in_list(entries: list[Any], entry: Any) -> Undo:
    entries.append(entry)
    return lambda: entries.remove(entry)


def _delay_messages(injector: Injector, fault: Fault) -> Undo:
    injector.fired(fault)
    return _in_list(
        injector.world.network.delays,
        (fault.target, fault.parameters["delay_s"], fault.parameters.get("random", False)),
    )


def _duplicate_messages(injector: Injector, fault: Fault) -> Undo:
    injector.fired(fault)
    return _in_list(injector.world.network.duplicating, (fault.target, fault.parameters["share"]))


def _sever(injector: Injector, fault: Fault) -> Undo:
    network, pair = injector.world.network, (fault.target, fault.parameters["peer"])
    network.severed.append(pair)
    injector.cluster.disturb(fault.target)
    injector.fired(fault)

    def undo() -> None:
        network.restore(*pair)
        injector.cluster.disturb(fault.target)

    return undo


@dataclass(frozen=True)
class _Strike:
    """What happens to a write that a fault picks."""

    injector: Injector
    fault: Fault
    target: str
    share: float

    def strike(self, transport: Transport, write: Write, duration_s: float) -> None:
        """Instead of finishing after ``duration_s``: be late, or place a part and fail."""
        self.injector.fired(self.fault)
        world, late_s = self.injector.world, self.fault.parameters["late_s"]
        if late_s:
            world.after(duration_s + late_s, transport.finish, write)
            return
        world.after(duration_s, self._fail, transport, write)

    def _fail(self, transport: Transport, write: Write) -> None:
        world, parameters = self.injector.world, self.fault.parameters
        placed = int(len(write.pages) * parameters["places"])
        transport.fail(write, parameters["settle_s"])
        if placed:
            world.after(parameters["settle_s"] * 0.5, transport.land, write, placed)


def _strike_writes(injector: Injector, fault: Fault) -> Undo:
    strike = _Strike(injector, fault, fault.target, fault.parameters["share"])
    return _in_list(injector.cluster.transport.faults, strike)


def _slow_rank(injector: Injector, fault: Fault) -> Undo:
    injector.fired(fault)
    undos = [
        _in_list(engine.slowdowns, (fault.target, fault.parameters["factor"])) for engine in injector.cluster.engines()
    ]

    def undo() -> None:
        for each in undos:
            each()

    return undo


def _slow_link(injector: Injector, fault: Fault) -> Undo:
    injector.fired(fault)
    return _in_list(injector.cluster.transport.slow, (fault.target, fault.parameters["factor"]))


def _fail_allocations(injector: Injector, fault: Fault) -> Undo:
    ranks = [
        rank
        for engine in injector.cluster.engines()
        for rank in engine.ranks.values()
        if covers(fault.target, rank.node)
    ]
    for rank in ranks:
        rank.kv.fail_next += int(fault.parameters["count"])
        rank.kv.on_failure = functools.partial(injector.fired, fault)

    def undo() -> None:
        for rank in ranks:
            rank.kv.fail_next = 0

    return undo


def _on_dispatch(injector: Injector, hook: Callable[[Request], None]) -> Undo:
    return _in_list(injector.cluster.router.before_dispatch, hook)


def _abort_requests(injector: Injector, fault: Fault) -> Undo:
    world, router, side = injector.world, injector.cluster.router, fault.parameters["side"]

    def give_up(request: Request) -> None:
        if request.rid not in router.active:
            return
        injector.fired(fault)
        if side == "client":
            router.client_leaves(request.rid)
        else:
            router.cancel(request, None if side == "both" else side, f"{side}_abort")

    def hook(request: Request) -> None:
        if injector.chance.random() < fault.parameters["share"]:
            spread = 2.0 * injector.chance.random() if fault.kind.name != "prefill_abort" else 1.0
            world.after(fault.parameters["after_s"] * spread, give_up, request)

    return _on_dispatch(injector, hook)


def _stage_abort(injector: Injector, fault: Fault) -> Undo:
    """One pipeline stage fails a request by itself, as a worker error or a rank-local check does."""
    world, cluster = injector.world, injector.cluster

    def give_up(request: Request) -> None:
        engine = cluster.prefill[request.prefill]
        if not engine.up:
            return
        for rank in engine.replicas[request.prefill_dp].ranks[int(fault.parameters["stage"])]:
            entry = rank.by_pair.get(request.pair)
            if entry is not None and entry.rejected is None:
                injector.fired(fault)
                rank.deliver("AbortRequested", entry.incarnation, "stage_abort")

    def hook(request: Request) -> None:
        if injector.chance.random() < fault.parameters["share"]:
            world.after(fault.parameters["after_s"], give_up, request)

    return _on_dispatch(injector, hook)


def _override_dp(injector: Injector, fault: Fault) -> Undo:
    router, dp = injector.cluster.router, injector.cluster.topology.prefill.sizes.dp
    previous = router.override
    ended: list[Fault] = []

    def override(request: Request) -> int:
        if ended:
            return previous(request) if previous is not None else request.prefill_dp
        if injector.chance.random() >= fault.parameters["share"]:
            return request.prefill_dp
        injector.fired(fault)
        return (request.prefill_dp + int(fault.parameters["shift"])) % dp

    router.override = override

    def undo() -> None:
        """Two of this kind may overlap and end in any order: one that lies below another steps aside."""
        ended.append(fault)
        if router.override is override:
            router.override = previous

    return undo


def _reuse_rooms(injector: Injector, fault: Fault) -> Undo:
    router = injector.cluster.router
    previous = router.reuse_room
    ended: list[Fault] = []
    rooms: list[int] = []

    def reuse() -> int | None:
        if ended:
            return previous()
        if not rooms or injector.chance.random() >= fault.parameters["share"]:
            return None
        injector.fired(fault)
        return injector.chance.choice(rooms[-64:])

    router.reuse_room = reuse
    stop = _on_dispatch(injector, lambda request: rooms.append(request.pair[0]))

    def undo() -> None:
        """Two of this kind may overlap and end in any order: one that lies below another steps aside."""
        stop()
        ended.append(fault)
        if router.reuse_room is reuse:
            router.reuse_room = previous

    return undo


def _jump_clock(injector: Injector, fault: Fault) -> Undo:
    """The wall clock moves; whether timers care is the rule deadline_clock."""
    injector.fired(fault)
    if follows_wall_clock(injector.world.profile):
        for engine in injector.cluster.engines():
            for rank in engine.ranks.values():
                if covers(fault.target, rank.node):
                    rank.timers.jump(fault.parameters["offset_s"])
    return lambda: None


EFFECTS: dict[str, Callable[[Injector, Fault], Undo]] = {
    "process_down": _process_down,
    "server_slow": _server_slow,
    "server_errors": _server_errors,
    "delay_messages": _delay_messages,
    "duplicate_messages": _duplicate_messages,
    "sever": _sever,
    "strike_writes": _strike_writes,
    "slow_rank": _slow_rank,
    "slow_link": _slow_link,
    "fail_allocations": _fail_allocations,
    "abort_requests": _abort_requests,
    "stage_abort": _stage_abort,
    "override_dp": _override_dp,
    "reuse_rooms": _reuse_rooms,
    "jump_clock": _jump_clock,
}


# ---------------------------------------------------------------------------------------------- drawn by a seed


def draw_faults(chance: random.Random, topology: Topology, until_s: float) -> list[Fault]:
    """One fault of every kind, each somewhere in [0, until_s) with drawn strength."""
    return [draw_fault(chance, kind, topology, until_s) for kind in kinds().values() if kind.draw]


def draw_fault(chance: random.Random, kind: Kind, topology: Topology, until_s: float) -> Fault:
    """One fault of a kind, somewhere in [0, until_s), with values from the ranges that the kind draws from."""
    values = {name: _value(chance, value, topology) for name, value in kind.draw.items() if name != "target"}
    target = _target(chance, kind.draw["target"], topology)
    parameters = {name: values.get(name, default) for name, default in kind.parameters.items()}
    if "peer" in parameters and parameters["peer"] == "required":
        target, parameters["peer"] = _link(chance, topology)
    at_s = values.get("at_s", round(chance.uniform(1.0, until_s * 0.95), 3))
    return Fault(kind.name, kind, target, at_s, values["for_s"], parameters)


def _value(chance: random.Random, value: Any, topology: Topology) -> Any:
    if value == "stage":
        return chance.randrange(topology.prefill.sizes.pp)
    if not isinstance(value, list):
        return value
    low, high = value
    return chance.randint(low, high) if isinstance(low, int) else round(chance.uniform(low, high), 4)


def _link(chance: random.Random, topology: Topology) -> tuple[str, str]:
    return f"P{chance.randrange(topology.prefill.count)}", f"D{chance.randrange(topology.decode.count)}"


def _target(chance: random.Random, what: str, topology: Topology) -> str:
    prefill, decode = (
        f"P{chance.randrange(topology.prefill.count)}",
        f"D{chance.randrange(topology.decode.count)}",
    )
    prefill_ranks, decode_ranks = (
        list(rank_names("P", topology.prefill)),
        list(rank_names("D", topology.decode)),
    )
    choices = {
        "server": ["B" + prefill[1:]],
        "prefill_engine": [prefill],
        "decode_engine": [decode],
        "any_engine": [prefill, decode],
        "prefill_rank": prefill_ranks,
        "decode_rank": decode_ranks,
        "any_rank": prefill_ranks + decode_ranks,
        "router": ["R"],
        "link": [prefill],
    }
    return chance.choice(choices[what])
