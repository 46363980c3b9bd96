"""A scenario on real processes: the file that the simulator runs, staged with SIGKILL, real sockets and real memory.

The injector of the simulator schedules the faults here too; what it acts on are processes. A fault that waits for an
event needs the process in which the event happens to stand still until the fault is done, since nobody could be
quick enough from outside: that rank stops itself (SIGSTOP) and is sent on (SIGCONT).
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from kvpoll.runtime.cluster.config import Lengths
from kvpoll.runtime.cluster.launcher import Launcher, Plan, RealRank
from kvpoll.runtime.cluster.merge import merged
from kvpoll.runtime.cluster.rank_process import matches
from kvpoll.runtime.cluster.tail import Tail
from kvpoll.runtime.pools.layout import Layout
from kvpoll.sim.faults import EFFECTS, Fault, Injector
from kvpoll.sim.run import PROBE, PROBE_GAP_S, Outcome, Recorder
from kvpoll.sim.scenario import Scenario
from kvpoll.sim.workload import Arrival
from kvpoll.spec.invariants import Bounds, Watch
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import EVENTS, FaultBegan, Healed, Marked, Resulted, Stream

STAGEABLE: Final = frozenset(
    {"process_down", "server_slow", "server_errors", "abort_requests", "stage_abort", "override_dp", "reuse_rooms"}
)
"""Effects of faults that can be staged on real processes."""

PAGE: Final = Layout((0, 1, 2, 3), 1, 16, 8, 16, "float16")
"""What a page holds in a staged cluster, before it is divided among ranks: 4 layers, 8 heads, 32 KiB together. Pages
stand for the scenario's: their number and owners are what it is about.
"""

KV_PAGES_MAX: Final = 2048

CORE_WAIT_S: Final = 0.25
REST_SPEED: Final = 60.0
REST_LOOK_S: Final = 5.0


@dataclass
class Staging:
    """One scenario to be staged. speed: how much faster than the wall its time runs."""

    protocol: Protocol
    scenario: Scenario
    profile: Profile
    seed: int = 0
    line: str = ""
    speed: float = 20.0
    transport: str = "shm"
    folder: Path | None = None
    spec: str | None = None
    rules: dict[str, Any] | None = None
    base: str | None = None
    collect: list[Any] | None = None
    trace: IO[str] | None = None
    progress: Callable[[float, float], None] | None = None

    def __call__(self) -> Outcome:
        """Start the cluster, play the scenario, end the cluster, and judge what all processes have recorded.

        Raises BadInput where the scenario cannot be staged, or a process does not come up.
        """
        began = time.perf_counter()
        self.check()
        with tempfile.TemporaryDirectory(prefix="kvpoll-real-") as temporary:
            folder = self.folder if self.folder is not None else Path(temporary)
            launcher = Launcher(self.protocol, self.profile, self.plan(folder))
            try:
                stage = Stage(launcher, self.scenario, self.progress)
                interrupted = stage.play(self._arrivals(launcher))
                ended_s = launcher.now
            finally:
                launcher.close()
            return self._judged(launcher, stage, ended_s, interrupted, began)

    def check(self) -> None:
        """Can this be staged at all?"""
        scenario = self.scenario
        if scenario.schedule is not None:
            raise BadInput(f"{scenario.path}: a behaviour of the explorer has no clock and cannot be staged for real")
        if scenario.topology.prefill.sizes.cp > 1:
            raise BadInput(f"{scenario.path}: context parallelism cannot be staged for real; use cp = 1")
        for fault in scenario.faults:
            if fault.kind.effect not in STAGEABLE:
                kinds = sorted(name for name in EFFECTS if name in STAGEABLE)
                raise BadInput(
                    f"{scenario.path}: fault {fault.kind.name!r} cannot be staged on real processes; "
                    f"effects that can: {', '.join(kinds)}"
                )

    def plan(self, folder: Path) -> Plan:
        """The cluster of the scenario. Pages and rows are bounded: they are real memory here."""
        topology = self.scenario.topology
        lengths = Lengths(
            topology.page_tokens, topology.chunk_tokens, topology.follows_room, topology.load_balance,
            topology.dp_attention, topology.mla,
        )  # fmt: skip
        shapes = [
            replace(shape, kv_pages=min(shape.kv_pages, KV_PAGES_MAX)) for shape in (topology.prefill, topology.decode)
        ]
        heads = max(PAGE.heads, *(shape.sizes.tp for shape in shapes))
        layers = tuple(range(max(len(PAGE.layers), topology.prefill.sizes.pp)))
        layout = replace(PAGE, heads=1, head_dim=64, kind="mla") if topology.mla else replace(PAGE, heads=heads)
        return Plan(
            prefill=shapes[0], decode=shapes[1], lengths=lengths, layout=replace(layout, layers=layers),
            profile=self.base or self.profile.name, rules=self.rules or {}, spec=self.spec,
            seed=str(self.scenario.seed + self.seed), speed=self.speed, transport=self.transport, folder=folder,
            halts=tuple(dict(fault.trigger) for fault in self.scenario.faults if fault.trigger is not None),
        )  # fmt: skip

    def _arrivals(self, launcher: Launcher) -> list[Arrival]:
        return self.scenario.workload(launcher.chance("workload"), self.scenario.timing.hostile_s)

    def _header(self) -> dict[str, Any]:
        """What the merged trace says of itself."""
        return {
            "kvpoll_trace": 1, "spec": self.protocol.digest, "scenario": self.scenario.name,
            "scenario_digest": self.scenario.digest, "title": self.scenario.title, "profile": self.profile.name,
            "seed": self.seed, "repeat": self.line, "real": True, "transport": self.transport, "speed": self.speed,
        }  # fmt: skip

    def _judged(self, launcher: Launcher, stage: Stage, ended_s: float, interrupted: bool, began: float) -> Outcome:
        if launcher.unexpected:
            raise BadInput(f"{self.scenario.path}: staging failed: {launcher.unexpected[0]}")
        stream = Stream()
        if self.collect is not None:
            stream.subscribe_all(self.collect.append)
        verdict = judge(launcher, stream, self.protocol, ended_s, self._header(), self.trace)
        watch, marks, router, faults = verdict.watch, verdict.marks, launcher.router, stage.injector.faults
        return Outcome(
            scenario=self.scenario.name, profile=self.profile.name, seed=self.seed, line=self.line,
            violations=dict(watch.first), counts={name: count for name, count in watch.counts.items() if count},
            marks=marks, unfired=[f.kind.name for f in faults if f"fault:{f.kind.name}" not in marks],
            requests=router.admitted, succeeded=router.succeeded, causes=dict(router.causes), ttft_s=verdict.ttft_s,
            events=verdict.events, simulated_s=ended_s, wall_s=time.perf_counter() - began, interrupted=interrupted,
            faults=faults,
        )  # fmt: skip


class Verdict(NamedTuple):
    """What the merged trace says: the watch of all invariants, marks, times to the first token, number of events."""

    watch: Watch
    marks: dict[str, int]
    ttft_s: list[float]
    events: int


def patient(bounds: Bounds, speed: float) -> Bounds:
    """The bounds of the spec, where what must happen soon has CORE_WAIT_S of the wall in addition: a process that the
    operating system lets wait for a core is late, and no protocol can help it. At speed 20 L2 would otherwise ask for
    a tenth of a second.
    """
    wait_s = CORE_WAIT_S * speed
    return bounds._replace(propagate_s=bounds.propagate_s + wait_s, step_s=bounds.step_s + wait_s)


def judge(
    launcher: Launcher, stream: Stream, protocol: Protocol, ended_s: float, header: dict[str, Any],
    trace: IO[str] | None = None,
) -> Verdict:  # fmt: skip
    """Judge what all processes of a cluster that has been closed have recorded, by all invariants, up to ``ended_s``.

    ``stream`` carries the merged events to whoever has subscribed; ``trace`` receives them as lines after ``header``.
    """
    marks, ttft_s, events = dict(launcher.marks), [], 0
    watch = Watch(stream, patient(protocol.bounds, launcher.plan.speed))
    if trace is not None:
        Recorder(stream, header, trace)
    for event in merged(launcher.traces):
        events += 1
        if isinstance(event, Marked):
            marks[event.mark] = marks.get(event.mark, 0) + 1
        elif isinstance(event, Resulted) and event.ttft_s is not None:
            ttft_s.append(event.ttft_s)
        watch.advance(event.t)
        stream.emit(event)
    watch.finish(ended_s)
    return Verdict(watch, marks, ttft_s, events)


class Stage:
    """The play: arrivals and faults, then the heal, probes, quiet and the survey, as in ``sim.run``."""

    def __init__(self, launcher: Launcher, scenario: Scenario, progress: Callable[[float, float], None] | None) -> None:
        self.launcher = launcher
        self.scenario = scenario
        self.injector = Injector(RealCluster(launcher), list(scenario.faults))  # type: ignore[arg-type]
        self._progress = progress
        self._tails = [Tail(path) for path in launcher.traces]
        self._told = 0.0

    def play(self, arrivals: list[Arrival]) -> bool:
        """Play it all. True when it was interrupted."""
        launcher, timing = self.launcher, self.scenario.timing
        late = {fault.target for fault in self.injector.faults if fault.kind.name == "bootstrap_late"}
        launcher.start(late)
        self.injector.schedule()
        for number, arrival in enumerate(arrivals):
            rid = f"r{number}"
            launcher.after(
                arrival.t - launcher.now, _submit, launcher, rid, arrival.input_tokens, arrival.output_tokens
            )
        for rid, t in self.scenario.leaves.items():
            launcher.after(t - launcher.now, _leave, launcher, rid)
        for fault in self.injector.faults:
            if fault.trigger is not None:
                self._send_on_after(fault)
        try:
            self._until(timing.hostile_s)
            self.injector.heal()
            self._until(launcher.now + timing.grace_s)
            launcher.emit(Healed(launcher.now, "R"))
            for number in range(timing.probes):
                launcher.router.submit(f"probe{number}", *PROBE)
                self._until(launcher.now + PROBE_GAP_S)
            self._rest(launcher.now + timing.quiet_s)
            launcher.survey()
        except KeyboardInterrupt:
            return True
        return False

    def _rest(self, until_s: float) -> None:
        """The quiet time. Once nothing lives but tombstones, nobody can be late for anything: time may run faster."""
        launcher = self.launcher
        while launcher.now < until_s:
            self._until(min(until_s, launcher.now + REST_LOOK_S))
            if launcher.loop.speed < REST_SPEED and self._is_idle():
                launcher.change_speed(REST_SPEED)

    def _is_idle(self) -> bool:
        ranks = [rank.child for engine in self.launcher.engines() for rank in engine.ranks.values()]
        return not self.launcher.router.active and all(
            "polls" in child.stats and set(child.stats["polls"]) <= {"Retired"} for child in ranks
        )

    def _until(self, t: float) -> None:
        self.launcher.run_until(t, self._look)

    def _look(self) -> None:
        """What the ranks have written since the last look, for faults that wait for an event."""
        launcher, timing = self.launcher, self.scenario.timing
        if launcher.plan.halts:
            known = {tail.path for tail in self._tails}
            self._tails += [Tail(path) for path in launcher.traces if path not in known]
            for tail in self._tails:
                for event in tail.news():
                    launcher.stream.emit(event)
        if self._progress is not None and launcher.now > self._told + 0.5 * launcher.plan.speed:
            self._told = launcher.now
            self._progress(launcher.now, timing.hostile_s + timing.grace_s + timing.quiet_s + 1.0)

    def _send_on_after(self, fault: Fault) -> None:
        """The rank that stopped itself for this fault goes on as soon as the fault has begun."""
        assert fault.trigger is not None
        pattern = {name: value for name, value in fault.trigger.items() if name != "event"}
        launcher = self.launcher
        seen: list[str] = []

        def stopped(event: Any) -> None:
            if not seen and matches(event, pattern):
                seen.append(event.node)
                if fault.at_s > 0:
                    launcher.signal(event.node, signal.SIGCONT)

        def began(event: FaultBegan) -> None:
            if event.fault == fault.id and seen:
                launcher.loop.soon(launcher.signal, seen[0], signal.SIGCONT)

        launcher.stream.subscribe(EVENTS[fault.trigger["event"]], stopped)
        launcher.stream.subscribe(FaultBegan, began)


def _submit(launcher: Launcher, rid: str, input_tokens: int, output_tokens: int) -> None:
    launcher.router.submit(rid, input_tokens, output_tokens)


def _leave(launcher: Launcher, rid: str) -> None:
    launcher.router.client_leaves(rid)


class RealCluster:
    """The launcher's cluster as the effects of ``sim.faults`` know it."""

    def __init__(self, launcher: Launcher) -> None:
        self.world = launcher
        self.router = launcher.router
        self.servers = launcher.servers
        self.prefill = [_Prefill(engine) for engine in launcher.prefill]
        self.engine = launcher.engine
        self.engines = launcher.engines
        self.server_of = launcher.server_of
        self.disturb = launcher.disturb
        self.topology = _Topology(launcher)


class _Topology:
    """Of the topology, what an effect asks for: sizes of the prefill engines."""

    def __init__(self, launcher: Launcher) -> None:
        self.prefill = launcher.plan.prefill


class _Prefill:
    """A prefill engine whose ranks can be told to fail a request by themselves."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.replicas = [_Replica(engine, dp) for dp in range(engine.shape.sizes.dp)]

    @property
    def up(self) -> bool:
        """Does it live?"""
        return bool(self._engine.up)


class _Replica:
    def __init__(self, engine: Any, dp: int) -> None:
        self.ranks = [[_Rank(rank) for rank in engine.stage(dp, pp)] for pp in range(engine.shape.sizes.pp)]


class _Rank:
    """A rank whose requests are looked up and failed in one order to its process."""

    def __init__(self, rank: RealRank) -> None:
        self._rank = rank
        self.by_pair = self

    def get(self, pair: tuple[int, int]) -> Any:
        """The request with this room, if the rank has it; it will look itself."""
        return _Entry(pair)

    def deliver(self, kind: str, incarnation: Any, cause: str) -> None:
        """Fail the request on this rank alone."""
        self._rank.abort_room(incarnation, cause)


class _Entry:
    rejected = None

    def __init__(self, pair: tuple[int, int]) -> None:
        self.incarnation = pair
