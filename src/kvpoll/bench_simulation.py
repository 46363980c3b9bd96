"""Simulated hours beside seconds of one core, and beside SimPy doing nothing as often.

Each job runs twice: with every invariant judging every event, as `kvpoll run` does it, and without, which says
what the judging costs. The clock covers everything from making the cluster to the last second of traffic; the quiet
tail in which leaks would show is run too, and timed, but counts as simulated time for nobody.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kvpoll.commands.plan import MAIN, Plan, prepare
from kvpoll.sim.bench_loop import bare_loop_s
from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Scenario, Timing
from kvpoll.sim.topology import Topology
from kvpoll.sim.workload import read_mooncake, synthetic
from kvpoll.spec.protocol import Protocol
from kvpoll.statemachine.ranks.engine import EngineShape

HOUR_S: Final = 3600.0

LONE_PAIR: Final = Topology(
    prefill=EngineShape(tokens_per_s=120_000.0, kv_pages=4096),
    decode=EngineShape(kv_pages=8192, rows=512),
    chunk_tokens=16_384,
)
"""1P1D of one rank each, large enough to serve the conversation trace: what is overloaded waits, and waiting is
cheap to simulate."""


class Job(NamedTuple):
    """A simulation to time. ``run(check, progress)`` makes it; pending: events on its heap, as measured."""

    name: str
    run: Callable[[bool, Callable[[float, float], None]], Run]
    traffic_s: float
    pending: int


@dataclass(frozen=True)
class Timed:
    """One run of a job. traffic_core_s: seconds of one core until the traffic was over; tail_core_s: the rest."""

    outcome: Outcome
    traffic_s: float
    traffic_core_s: float
    tail_core_s: float

    @property
    def times_real_time(self) -> float:
        """Simulated seconds of traffic for each second of one core."""
        return self.traffic_s / self.traffic_core_s


def lone_pair_job(protocol: Protocol, trace: str | None, traffic_s: float = HOUR_S) -> Job:
    """An hour of the conversation trace, recorded or synthetic, through 1P1D without faults."""
    scenario = Scenario(
        name="bench-1p1d",
        path="kvpoll bench",
        digest="",
        title="one hour of conversation traffic through 1P1D",
        story="",
        upstream=None,
        race=None,
        topology=LONE_PAIR,
        timing=Timing(hostile_s=traffic_s, grace_s=1.0, probes=4, quiet_s=450.0),
        workload=synthetic,
        faults=(),
        expectations=(),
    )
    arrivals = None if trace is None else read_mooncake(Path(trace), traffic_s)
    profile = protocol.profile("reference")

    def run(check: bool, progress: Callable[[float, float], None]) -> Run:
        return Run(protocol, scenario, profile, arrivals=arrivals, check=check, progress=progress)

    return Job("1P1D", run, traffic_s, 42)


def main_job(trace: str | None, traffic_s: float | None = None) -> Job:
    """What `kvpoll run` does: the scenario `main`, 2P2D of twelve ranks, one fault of every kind drawn by seed 0."""
    prepared = prepare(Plan(MAIN, trace=trace, minutes=None if traffic_s is None else traffic_s / 60))

    def run(check: bool, progress: Callable[[float, float], None]) -> Run:
        made = prepared.run(0, check=check, progress=progress)
        assert isinstance(made, Run)
        return made

    return Job("2P2D", run, prepared.scenario.timing.hostile_s, 113)


def timed(job: Job, check: bool) -> Timed:
    """Run a job once."""
    reached_s: list[float] = []

    def look(now: float, whole: float) -> None:
        if now >= job.traffic_s and not reached_s:
            reached_s.append(time.process_time())

    run = job.run(check, look)
    gc.collect()
    began = time.process_time()
    outcome = run()
    ended = time.process_time()
    return Timed(outcome, job.traffic_s, reached_s[0] - began, ended - reached_s[0])


def bare_s(job: Job, outcome: Outcome) -> float:
    """Seconds for as many events of SimPy alone."""
    gc.collect()
    return bare_loop_s(outcome.events, job.pending)


def ttft_p50_s(outcome: Outcome) -> float:
    """Median time to the first token; 0 when nobody got one."""
    return statistics.median(outcome.ttft_s) if outcome.ttft_s else 0.0


def idle_events(protocol: Protocol, idle_s: float) -> int:
    """Events that SimPy schedules while a cluster of 1P1D is up for so long and nobody asks anything of it."""
    job = lone_pair_job(protocol, None, idle_s)
    run = job.run(True, lambda now, whole: None)
    timing = Timing(hostile_s=idle_s, grace_s=0.0, probes=0, quiet_s=0.0)
    scenario = dataclasses.replace(run.scenario, timing=timing)
    return dataclasses.replace(run, scenario=scenario, arrivals=[], progress=None)().events
