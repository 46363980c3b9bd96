"""One run: a hostile phase with faults, a heal, probes, quiet, a survey. Invariants are checked all along."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from kvpoll.sim.cluster import Cluster
from kvpoll.sim.faults import Fault, Injector
from kvpoll.sim.scenario import Scenario, Timing
from kvpoll.sim.workload import Arrival
from kvpoll.sim.world import World
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.trace import Healed, Stream, Violated, encode

PROBE_GAP_S = 0.25
PROBE = (1024, 8)
"""Tokens of a probe: prompt and answer."""
Progress = Callable[[float, float], None]


class Enough(Exception):
    """Raised by a listener that has seen what it wanted: the run ends here, unhealed and without a survey."""


@dataclass
class Outcome:
    """What came of one run."""

    scenario: str
    profile: str
    seed: int | str
    line: str
    violations: dict[str, Violated]
    counts: dict[str, int]
    marks: dict[str, int]
    unfired: list[str]
    requests: int
    succeeded: int
    causes: dict[str, int]
    ttft_s: list[float]
    events: int
    simulated_s: float
    wall_s: float
    digest: str | None = None
    interrupted: bool = False
    faults: list[Fault] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Did every invariant hold?"""
        return not self.violations


class Recorder:
    """Writes a trace as JSON lines, and its digest, so that a repeat can be compared byte by byte."""

    def __init__(self, stream: Stream, header: dict[str, Any], file: IO[str] | None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._write(json.dumps(header, sort_keys=True))
        stream.subscribe_all(self._event)

    def _event(self, event: Any) -> None:
        self._write(encode(event))

    def _write(self, line: str) -> None:
        self._hash.update(line.encode())
        self._hash.update(b"\n")
        if self._file is not None:
            self._file.write(line)
            self._file.write("\n")

    @property
    def digest(self) -> str:
        """sha256 of all lines so far."""
        return self._hash.hexdigest()[:16]


@dataclass
class Run:
    """One run to be made. ``trace`` receives JSON lines; ``collect`` receives the events themselves.

    ``check`` False leaves the invariants out, which is for measuring what they cost. ``listen`` subscribes to the
    stream after the invariants; what it subscribes may raise Enough.
    """

    protocol: Protocol
    scenario: Scenario
    profile: Profile
    seed: int | str = 0
    line: str = ""
    arrivals: list[Arrival] | None = None
    faults: tuple[Fault, ...] | None = None
    trace: IO[str] | None = None
    record: bool = False
    collect: list[Any] | None = None
    progress: Progress | None = None
    check: bool = True
    listen: Callable[[Stream], None] | None = None

    def __call__(self) -> Outcome:
        """Simulate. An interrupt ends the run early; what was recorded so far stays readable."""
        began = time.perf_counter()
        stream = Stream()
        seed = self.seed if not self.scenario.seed else self.scenario.seed + int(self.seed)
        world = World(self.protocol, self.profile, self.scenario.topology, seed, stream, self.check)
        arrivals = self.arrivals
        if arrivals is None:
            arrivals = self.scenario.workload(world.chance("workload"), self.scenario.timing.hostile_s)
        recorder = None
        if self.trace is not None or self.record:
            recorder = Recorder(stream, self._header(arrivals), self.trace)
        if self.collect is not None:
            stream.subscribe_all(self.collect.append)
        if self.listen is not None:
            self.listen(stream)
        cluster = Cluster(world)
        faults = list(self.scenario.faults if self.faults is None else self.faults)
        injector = Injector(cluster, faults)
        interrupted = False
        try:
            self._play(world, cluster, injector, arrivals)
        except Enough:
            pass
        except KeyboardInterrupt:
            interrupted = True
        return Outcome(
            scenario=self.scenario.name,
            profile=self.profile.name,
            seed=self.seed,
            line=self.line,
            violations=dict(world.watch.first),
            counts={name: count for name, count in world.watch.counts.items() if count},
            marks=dict(world.marks),
            unfired=[fault.kind.name for fault in faults if f"fault:{fault.kind.name}" not in world.marks],
            requests=cluster.router.admitted,
            succeeded=cluster.router.succeeded,
            causes=dict(cluster.router.causes),
            ttft_s=cluster.router.ttft_s,
            events=world.scheduled_events(),
            simulated_s=world.now,
            wall_s=time.perf_counter() - began,
            digest=recorder.digest if recorder is not None else None,
            interrupted=interrupted,
            faults=faults,
        )

    def _header(self, arrivals: list[Arrival]) -> dict[str, Any]:
        workload = hashlib.sha256(repr([tuple(arrival) for arrival in arrivals]).encode()).hexdigest()[:12]
        return {
            "kvpoll_trace": 1,
            "spec": self.protocol.digest,
            "scenario": self.scenario.name,
            "scenario_digest": self.scenario.digest,
            "title": self.scenario.title,
            "profile": self.profile.name,
            "seed": self.seed,
            "repeat": self.line,
            "workload": workload,
        }

    def _play(self, world: World, cluster: Cluster, injector: Injector, arrivals: list[Arrival]) -> None:
        timing = self.scenario.timing
        late = {fault.target for fault in injector.faults if fault.kind.name == "bootstrap_late"}
        injector.schedule()
        cluster.start(servers_late=late)
        world.env.process(_arrive(world, cluster, arrivals))
        if self.arrivals is None:
            for rid, t in self.scenario.leaves.items():
                world.after(t, _leave, cluster, rid)
        self._advance(world, timing.hostile_s)
        settle(world, cluster, injector, timing, functools.partial(self._advance, world))

    def _advance(self, world: World, until_s: float) -> None:
        """Run to a time; with progress, in slices of ten simulated seconds."""
        if self.progress is None:
            world.env.run(until=max(until_s, world.now + 1e-9))
            return
        timing = self.scenario.timing
        whole = timing.hostile_s + timing.grace_s + timing.probes * PROBE_GAP_S + timing.quiet_s
        while world.now < until_s:
            world.env.run(until=min(until_s, world.now + 10.0))
            self.progress(world.now, whole)


def settle(
    world: World, cluster: Cluster, injector: Injector, timing: Timing, advance: Callable[[float], None]
) -> None:
    """The healed phase: faults stop, probes must succeed, and after a quiet time nothing may be left."""
    injector.heal()
    advance(world.now + timing.grace_s)
    world.emit(Healed(world.now, "R"))
    for number in range(timing.probes):
        cluster.router.submit(f"probe{number}", *PROBE)
        advance(world.now + PROBE_GAP_S)
    advance(world.now + timing.quiet_s)
    cluster.survey()
    world.watch.finish(world.now)


def _leave(cluster: Cluster, rid: str) -> None:
    cluster.router.client_leaves(rid)


def _arrive(world: World, cluster: Cluster, arrivals: list[Arrival]) -> Any:
    for number, arrival in enumerate(arrivals):
        if arrival.t > world.now:
            yield world.env.timeout(arrival.t - world.now)
        cluster.router.submit(f"r{number}", arrival.input_tokens, arrival.output_tokens)
