"""A small cluster of real processes under load, in real time, with what is done to it: the play of ``kvpoll up``.

A load, deeds (kill, stop, restart), the end of both, probes, and a quiet time after which nothing may be left. What a
cluster keeps for minutes so that late messages find it (tombstones, deadlines) is not waited for at the wall's pace:
when the load is over and everything is answered, time runs LAPSE times as fast.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final, Literal, NamedTuple

from kvpoll.live_judge import LAG_S, LiveJudge
from kvpoll.runtime.cluster.launcher import Child, Launcher, Plan, RealEngine, RealServer
from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.plan import share
from kvpoll.sim.faults import Fault, Injector, kinds
from kvpoll.sim.run import PROBE
from kvpoll.sim.workload import Arrival
from kvpoll.spec.invariants import PAUSE
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.trace import (
    Committed,
    FaultBegan,
    FaultEnded,
    Healed,
    Stream,
    Surveyed,
    WritePosted,
    WriteSettled,
)
from kvpoll.staging import RealCluster, Verdict, judge, patient
from kvpoll.statemachine.ranks.engine import decode_timers, prefill_timers
from kvpoll.statemachine.ranks.host import engine_of

LAPSE: Final = 40.0
QUIET_MORE_S: Final = 60.0
"""Quiet time of the cluster after its longest timer."""

DRAIN_S: Final = 10.0
PROBE_S: Final = 6.0
"""How long requests, and then probes, are waited for in real time; the rest of their time passes in the lapse."""

QUICK_S: Final = 0.2
RATE_WINDOW_S: Final = 2.0
SAMPLE_S: Final = 0.25
JUDGE_S: Final = 0.25
FOR_EVER_S: Final = 1e9
LOG_MAX: Final = 200


@dataclass(frozen=True)
class Deed:
    """Something done to a process. target: a node of the trace ("D0", "P1/tp0", "B0"). for_s: how long it is down."""

    what: Literal["kill", "stop", "restart"]
    target: str
    at_s: float
    for_s: float

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.what} {self.target}"


class Line(NamedTuple):
    """A rank or a server, as the table shows it. polls: rooms by poll; queues: gauges by SGLang's name.

    sent, verified: bytes over all lives; sent_per_s, verified_per_s: over the last seconds. state: "up", "starting",
    "stopped", "down".
    """

    node: str
    pid: int | None
    life: int
    state: str
    queues: dict[str, int]
    polls: dict[str, int]
    sent: int
    verified: int
    sent_per_s: float
    verified_per_s: float
    free: int
    held: int
    quarantined: int
    size: int


class Snapshot(NamedTuple):
    """How the cluster stands. t: seconds of its time; ending: seconds of load in all. told: (t, what happened).

    violated: how often each invariant was seen broken so far. The verdict may say more: it sees everything.
    """

    t: float
    phase: str
    ending: float
    requests: int
    succeeded: int
    active: int
    causes: dict[str, int]
    lines: list[Line]
    told: list[tuple[float, str]]
    violated: dict[str, int]


class Moved(NamedTuple):
    """What the trace says of bytes: placed by writes, verified on arrival, and how fast single writes were.

    write_bytes_per_s: for each write, bytes by the time from post to proof, ascending.
    """

    placed: int
    writes: int
    failed_writes: int
    verified: int
    pages_verified: int
    write_bytes_per_s: list[float]


class LiveCluster:
    """The cluster and its play. ``play`` returns when all is over; ``judged`` then says what came of it."""

    def __init__(
        self, protocol: Protocol, profile: Profile, plan: Plan, arrivals: list[Arrival], deeds: list[Deed],
        load_s: float, *, restarts: bool = True, restart_s: float = 2.0, abort_share: float = 0.0,
    ) -> None:  # fmt: skip
        """restarts: a killed process comes back, after ``restart_s`` when nobody said otherwise. abort_share: of
        clients, that leave within a second.
        """
        self.protocol, self.profile = protocol, profile
        self.launcher = Launcher(protocol, profile, plan)
        self.arrivals, self.deeds = arrivals, deeds
        self.load_s = load_s
        self.restarts, self.restart_s = restarts, restart_s
        self.phase = "starting"
        self.is_ending = False
        self.told: deque[tuple[float, str]] = deque(maxlen=LOG_MAX)
        self.defects: list[str] = []
        self.surveyed = False
        self.loaded_s = 0.0
        self.ended_s = 0.0
        aborts = _aborts(abort_share, load_s) if abort_share else []
        self.injector = Injector(RealCluster(self.launcher), aborts)  # type: ignore[arg-type]
        self._stopped: dict[str, str] = {}
        self._back: set[tuple[str, int]] = set()
        self._serial = 0
        self._noticed = 0
        self._judge = LiveJudge(patient(protocol.bounds, self.launcher.loop.speed))
        self._judged_s = 0.0
        self._meters: dict[str, _Meter] = {child.node: _Meter() for child in self.launcher.children()}

    # -- the play

    def play(self, look: Callable[[], None]) -> None:
        """All of it; ``look`` is called at each turn. Raises BadInput when a process does not come up."""
        launcher = self.launcher
        launcher.start()
        self.phase = "load"
        self.injector.schedule()
        for number, arrival in enumerate(self.arrivals):
            launcher.after(arrival.t - launcher.now, self._submit, f"r{number}", arrival)
        for deed in self.deeds:
            launcher.after(deed.at_s - launcher.now, self._do, deed)
        self._until(self.load_s, lambda: self.is_ending, look)
        self.loaded_s = launcher.now
        self.is_ending = True
        self.phase = "drain"
        self._heal()
        self._until(launcher.now + DRAIN_S, self._is_calm, look)
        if not self._is_maimed():
            self._probe(look)
        self._lapse(look)

    def end_load(self) -> None:
        """No request more; what is under way is finished and judged."""
        self.is_ending = True

    def close(self, patience_s: float | None = None) -> None:
        """End every process; a process that was stopped is sent on first, so that it can be asked."""
        for name in list(self._stopped):
            self._send_on(name)
        if patience_s is None:
            self.launcher.close()
        else:
            self.launcher.close(patience_s)

    def _until(self, t: float, enough: Callable[[], bool], look: Callable[[], None]) -> None:
        launcher = self.launcher
        while launcher.now < t and not enough():
            launcher.run_until(min(t, launcher.now + 0.05 * launcher.loop.speed))
            self._notice()
            self._judge_so_far()
            look()

    def _judge_so_far(self) -> None:
        """What is found is told at once, the first of each invariant."""
        launcher, wall_s = self.launcher, time.monotonic()
        if wall_s - self._judged_s < JUDGE_S:
            return
        self._judged_s = wall_s
        known = set(self._judge.watch.counts)
        for violated in self._judge.look(launcher.traces, launcher.now - LAG_S * launcher.loop.speed):
            if violated.invariant not in known:
                known.add(violated.invariant)
                self.tell(f"violated: {violated.invariant} at {violated.t:.1f} s on {violated.node}: {violated.text}")

    def _submit(self, rid: str, arrival: Arrival) -> None:
        if not self.is_ending:
            self.launcher.router.submit(rid, arrival.input_tokens, arrival.output_tokens)

    def _probe(self, look: Callable[[], None]) -> None:
        """The faults are over: from here on requests must succeed (L4)."""
        launcher = self.launcher
        self.phase = "probes"
        launcher.emit(Healed(launcher.now, "R"))
        for number in range(max(len(launcher.prefill), len(launcher.decode))):
            launcher.router.submit(f"probe{number}", *PROBE)
        active = launcher.router.active
        self._until(launcher.now + PROBE_S, lambda: not any(rid.startswith("probe") for rid in active), look)

    def _lapse(self, look: Callable[[], None]) -> None:
        launcher = self.launcher
        self.phase = "quiet"
        launcher.change_speed(LAPSE)
        timers = {**prefill_timers(self.profile), **decode_timers(self.profile)}
        self._until(launcher.now + max(timers.values()) + QUIET_MORE_S, lambda: False, look)
        if self._is_stuck():  # what a deadline ends now is remembered for as long again
            self._until(launcher.now + max(timers.values()) + QUIET_MORE_S, lambda: False, look)
        launcher.survey()
        self.surveyed = True
        self._notice()
        self.ended_s = launcher.now
        self.phase = "over"

    def _is_calm(self) -> bool:
        """Is everything answered, and everybody there who should be?"""
        children = [child for child in self.launcher.children() if child.pid is not None]
        there = all(child.has_begun for child in children)
        ranks = [child for child in children if not child.node.startswith("B")]
        registered = all(child.registered for child in ranks if child.node.startswith("P"))
        return there and registered and not self.launcher.router.active

    def _is_stuck(self) -> bool:
        """Is some rank still busy with a request?"""
        return any(sum(child.stats.get("polls", {}).values()) for child in self.launcher.children() if child.pid)

    def _is_maimed(self) -> bool:
        """Is something down for good? Then nothing can be asked of requests that come now."""
        return any(child.pid is None for child in self.launcher.children())

    # -- deeds

    def _do(self, deed: Deed) -> None:
        if self.is_ending:
            return
        if deed.what == "stop":
            self._stop(deed)
        elif deed.what == "restart":
            self._restart(deed)
        else:
            down_s = deed.for_s if self.restarts else FOR_EVER_S
            back = f"back after {down_s:g} s" if self.restarts else "left down"
            self._down(deed.target, down_s)
            self.tell(f"{deed.target} killed (SIGKILL), {back}")

    def _down(self, target: str, for_s: float) -> None:
        """SIGKILL, through the injector, so that the trace and the invariants know of it."""
        self._serial += 1
        kind = "bootstrap_amnesia" if target.startswith("B") else "rank_crash"
        known = kinds()[kind]
        fault = Fault(f"{kind}-up{self._serial}", known, target, 0.0, for_s, dict(known.parameters))
        self.injector.begin(fault)

    def _restart(self, deed: Deed) -> None:
        """What is down comes up; what is up is killed and is back before a heartbeat was missed."""
        down = [fault for fault, _ in self.injector.active.values() if _is_down(fault, deed.target)]
        for fault in down:
            self.injector.end(fault)
        if not down:
            self._down(deed.target, QUICK_S)
        self.tell(f"{deed.target} restarted")

    def _stop(self, deed: Deed) -> None:
        """SIGSTOP to a process, or to all of an engine, and SIGCONT later."""
        launcher = self.launcher
        self._serial += 1
        name = f"stop-up{self._serial}"
        severs = ("*",) if deed.target.startswith("B") else (deed.target,)
        launcher.emit(FaultBegan(launcher.now, deed.target, name, PAUSE, severs))
        self._stopped[name] = deed.target
        for child in self._under(deed.target):
            launcher.signal(child.node, signal.SIGSTOP)
        self.tell(f"{deed.target} stopped (SIGSTOP) for {deed.for_s:g} s")
        launcher.after(deed.for_s, self._send_on, name)

    def _send_on(self, fault: str) -> None:
        if fault not in self._stopped:
            return
        target = self._stopped.pop(fault)
        for child in self._under(target):
            self.launcher.signal(child.node, signal.SIGCONT)
        self.launcher.emit(FaultEnded(self.launcher.now, target, fault, PAUSE))
        self.tell(f"{target} goes on (SIGCONT)")

    def _under(self, target: str) -> list[Child]:
        """The processes that a name stands for: one, or every rank of an engine."""
        return [child for child in self.launcher.children() if target in (child.node, engine_of(child.node))]

    def _heal(self) -> None:
        """Everything that was done ends, but for what is to be left down."""
        for name in list(self._stopped):
            self._send_on(name)
        self.injector.healed = True
        for fault, _ in list(self.injector.active.values()):
            if self.restarts or fault.kind.effect != "process_down":
                self.injector.end(fault)

    def _notice(self) -> None:
        """Processes that ended without our doing: killed from outside, or by themselves. They come back too."""
        launcher = self.launcher
        for text in launcher.unexpected[self._noticed :]:
            self.tell(text)
            if "status -" not in text:  # a signal is somebody's doing, an exit is a defect
                self.defects.append(text)
        new, self._noticed = len(launcher.unexpected) - self._noticed, len(launcher.unexpected)
        if new and self.restarts:
            parts: list[RealEngine | RealServer] = [*launcher.engines(), *launcher.servers]
            for part in parts:
                if not part.up and not any(_is_down(fault, part.name) for fault, _ in self.injector.active.values()):
                    launcher.after(self.restart_s, self._bring_back, part)
        now = time.monotonic()
        for child in launcher.children():
            self._meters[child.node].read(child, now)
            if child.epoch > 0 and child.has_begun and (child.node, child.epoch) not in self._back:
                self._back.add((child.node, child.epoch))
                self.tell(f"{child.node} is back: life {child.epoch}, pid {child.pid}")
            for text in child.stats.get("failed", ()):
                if (said := f"{child.node}: {text}") not in self.defects:
                    self.defects.append(said)

    def _bring_back(self, part: RealEngine | RealServer) -> None:
        if not part.up and self.phase != "quiet":
            part.start()

    def tell(self, text: str) -> None:
        """Something happened that people want to read."""
        self.told.append((self.launcher.now, text))

    # -- how it stands

    def snapshot(self) -> Snapshot:
        """Everything that the table and the metrics show."""
        launcher = self.launcher
        router = launcher.router
        stopped = {child.node for target in self._stopped.values() for child in self._under(target)}
        return Snapshot(
            max(launcher.now, 0.0), self.phase, self.load_s, router.admitted, router.succeeded, len(router.active),
            dict(router.causes), [self._line(child, child.node in stopped) for child in launcher.children()],
            list(self.told), dict(self._judge.watch.counts),
        )  # fmt: skip

    def _line(self, child: Child, is_stopped: bool) -> Line:
        meter = self._meters[child.node]
        sent, verified, sent_per_s, verified_per_s = meter.totals()
        state = "down" if child.pid is None else "stopped" if is_stopped else "up" if child.has_begun else "starting"
        stats = child.stats if child.pid is not None else {}
        size, free, quarantined = (int(stats.get(name, 0)) for name in ("size", "free", "quarantined"))
        return Line(
            child.node, child.pid, max(child.epoch, 0), state, stats.get("gauges", {}), stats.get("polls", {}),
            sent, verified, sent_per_s, verified_per_s, free, size - free - quarantined, quarantined, size,
        )  # fmt: skip

    # -- what came of it

    def judged(self, header: dict[str, Any], trace: IO[str] | None) -> tuple[Verdict, Moved, dict[str, dict[str, int]]]:
        """The verdict on the merged trace, what was moved, and what is left by node. Call it after ``close``."""
        stream = Stream()
        tally = _Tally(self.launcher)
        stream.subscribe(WritePosted, tally.posted)
        stream.subscribe(WriteSettled, tally.settled)
        stream.subscribe(Committed, tally.committed)
        left: dict[str, dict[str, int]] = {}

        def surveyed(event: Surveyed) -> None:
            left[event.node] = {name: count for name, count in event.tables if count}

        stream.subscribe(Surveyed, surveyed)
        verdict = judge(self.launcher, stream, self.protocol, self.ended_s, header, trace)
        return verdict, tally.moved(), left


def _aborts(share: float, load_s: float) -> list[Fault]:
    parameters = {**kinds()["client_abort"].parameters, "share": share, "after_s": 0.5}
    return [Fault("client_abort-up", kinds()["client_abort"], "R", 0.0, load_s, parameters)]


def _is_down(fault: Fault, target: str) -> bool:
    """Does this fault keep that engine or server down? A prefill engine takes its server along."""
    held, name = engine_of(fault.target), engine_of(target)
    with_server = held.startswith("P") and name == f"B{held[1:]}"
    return fault.kind.effect == "process_down" and (held == name or with_server)


class _Meter:
    """Bytes of one node over all its lives, and how many a second of late."""

    def __init__(self) -> None:
        self._lives: dict[int, tuple[int, int]] = {}
        self._samples: deque[tuple[float, int, int]] = deque()

    def read(self, child: Child, now: float) -> None:
        stats = child.stats
        if stats:
            self._lives[child.epoch] = (int(stats.get("bytes", 0)), int(stats.get("verified", 0)))
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, *self._sums()))
        while now - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()

    def _sums(self) -> tuple[int, int]:
        return sum(sent for sent, _ in self._lives.values()), sum(checked for _, checked in self._lives.values())

    def totals(self) -> tuple[int, int, float, float]:
        """Sent, verified, and both by the second."""
        sent, verified = self._sums()
        if len(self._samples) < 2:
            return sent, verified, 0.0, 0.0
        (began, *before), (ended, *after) = self._samples[0], self._samples[-1]
        per_s = [(now - then) / (ended - began) for then, now in zip(before, after, strict=True)]
        return sent, verified, per_s[0], per_s[1]


class _Tally:
    """Counts bytes from the trace: what a write placed is its pages times the writer's share of a page."""

    def __init__(self, launcher: Launcher) -> None:
        self._layouts: dict[str, Layout] = {}
        for engine in launcher.engines():
            for stages in engine.replicas:
                for pp, stage in enumerate(stages):
                    for tp, node in enumerate(stage):
                        self._layouts[node] = launcher.layout_of(engine.shape, pp, tp)
        self._pending: dict[tuple[str, int], WritePosted] = {}
        self._placed = self._writes = self._failed = self._verified = self._pages = 0
        self._rates: list[float] = []

    def _share_bytes(self, writer: str, target: str) -> int:
        source, layout = self._layouts[writer], self._layouts[target]
        part = share(source, layout)
        return (
            0 if part is None else len(part.layers) * len(layout.parts) * part.tokens * part.heads * source.head_bytes
        )

    def posted(self, event: WritePosted) -> None:
        self._pending[event.node, event.write] = event

    def settled(self, event: WriteSettled) -> None:
        posted = self._pending.pop((event.node, event.write), None)
        if posted is None:
            return
        if not event.ok:
            self._failed += 1
            return
        placed = len(posted.target_pages) * self._share_bytes(posted.node, posted.target)
        self._writes += 1
        self._placed += placed
        if placed and event.t > posted.t:
            self._rates.append(placed / (event.t - posted.t))

    def committed(self, event: Committed) -> None:
        for page in event.contents:
            self._pages += 1
            for component, tag in page.items():
                if tag.source == component and tag.pair == event.incarnation.pair:
                    self._verified += self._share_bytes(component, event.node)

    def moved(self) -> Moved:
        return Moved(self._placed, self._writes, self._failed, self._verified, self._pages, sorted(self._rates))
