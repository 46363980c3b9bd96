"""Exploring a model: safety with symmetry, then what must come true on the whole graph, and what was found."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from kvpoll.sim.explorer.judges import Judge, judges
from kvpoll.sim.explorer.model import ModelFile
from kvpoll.sim.explorer.properties import broken_promises
from kvpoll.sim.explorer.schedule import ScheduledRun, Stepper
from kvpoll.sim.explorer.schedule_text import Schedule, write_schedule
from kvpoll.sim.explorer.search import Explored, Progress, Search, Taken, TooLarge
from kvpoll.sim.explorer.system import System
from kvpoll.sim.run import Outcome as Result
from kvpoll.sim.scenario import parse_scenario
from kvpoll.spec.protocol import Profile, Protocol, Value, load
from kvpoll.spec.source import Source
from kvpoll.spec.trace import Admitted, Healed, NodeStarted, NodeStopped, Requested, Stepped

LIVENESS_STATES: Final = 400_000
"""Liveness needs every edge and no symmetry; above this many states it is only judged when asked for."""

COMMONPLACE: Final = frozenset({Stepped, Admitted, NodeStarted, NodeStopped})
"""Events that nearly every model emits; hearing nothing else tells a monitor nothing, if it could hear more."""

NEEDS: Final[dict[str, type[Any]]] = {"S10": Stepped, "L2": Stepped, "L4": Healed, "L6": Requested}
"""What must have happened for a monitor to have had something to judge: S10 listens for what must never happen."""


@dataclass(frozen=True)
class Counterexample:
    """A behaviour that breaks an invariant. cycle: what follows ``path`` for ever (liveness only)."""

    invariant: str
    text: str
    path: list[Taken]
    cycle: list[Taken] = field(default_factory=list)
    ends: str = "here"

    @property
    def depth(self) -> int:
        """Its length in moves."""
        return len(self.path)


@dataclass(frozen=True)
class Limits:
    """How far to go: bytes of memory, states, depth, threads; and whether liveness is judged (None: if small)."""

    memory_bytes: int = 8 << 30
    states: int | None = None
    depth: int | None = None
    workers: int = 1
    symmetry: bool = True
    liveness: bool | None = None
    until_found: bool = False


@dataclass
class Report:
    """What came of exploring one model under one profile.

    exercised: invariants whose monitors heard something that tells. liveness: None if it was not judged.
    """

    model: ModelFile
    profile: Profile
    changes: Mapping[str, Value]
    system: System
    safety: Explored
    liveness: Explored | None
    broken: dict[str, Counterexample]
    exercised: frozenset[str]

    @property
    def unwitnessed(self) -> list[str]:
        """Marks that the model must witness and has not, in a search that was complete."""
        return sorted(self.model.marks - self.safety.marks) if self.safety.complete else []

    @property
    def complete(self) -> bool:
        """Was every reachable state seen?"""
        return self.safety.complete


def explore(
    model: ModelFile,
    protocol: Protocol,
    profile: Profile,
    changes: Mapping[str, Value] | None = None,
    only: tuple[str, ...] | None = None,
    limits: Limits = Limits(),
    progress: Callable[[str, Progress], None] = lambda phase, progress: None,
    prepare: Callable[[Search], None] = lambda search: None,
) -> Report:
    """Explore a model under a profile. ``prepare`` sees the search before it runs (to resume, or to stop it).

    Raises TooLarge when the model does not fit into its memory.
    """
    system = model.build(protocol, profile)
    chosen = judges(protocol.bounds, only)
    prompt = [judge for judge in chosen if not judge.timed]
    search = Search(system, prompt, limits.symmetry, False, limits.memory_bytes, limits.workers)
    prepare(search)
    safety = search.run(lambda seen: progress("states", seen), limits.states, limits.depth, limits.until_found)
    broken = {
        name: Counterexample(name, found.text, _without_survey(found.path), ends=_end(found.path))
        for name, found in safety.found.items()
    }
    liveness = None
    timed = [judge for judge in chosen if judge.timed]
    if (timed or only is None or "R1" in only) and safety.complete and _is_wanted(limits, safety, system):
        liveness = _judge_liveness(system, timed, only, limits, progress, broken)
    searches = [safety.search] + ([liveness.search] if liveness is not None else [])
    heard = frozenset(judge.invariant for each in searches for judge in each.judges if _has_heard(each, judge))
    return Report(model, profile, changes or {}, system, safety, liveness, broken, heard)


def _is_wanted(limits: Limits, safety: Explored, system: System) -> bool:
    if limits.liveness is not None:
        return limits.liveness
    return safety.states * (1 + len(system.renames)) <= LIVENESS_STATES


def _judge_liveness(
    system: System,
    timed: list[Judge],
    only: tuple[str, ...] | None,
    limits: Limits,
    progress: Callable[[str, Progress], None],
    broken: dict[str, Counterexample],
) -> Explored:
    search = Search(system, timed, False, True, limits.memory_bytes, limits.workers)
    explored = search.run(lambda seen: progress("behaviours", seen))
    for name, found in explored.found.items():
        broken[name] = Counterexample(name, found.text, found.path)
    for name, promise in broken_promises(search, only).items():
        if name in broken and broken[name].depth <= promise.depth:
            continue
        broken[name] = Counterexample(name, promise.text, promise.prefix, promise.cycle, "for ever")
    return explored


def _without_survey(path: list[Taken]) -> list[Taken]:
    return path[:-1] if _end(path) == "idle" else path


def _end(path: list[Taken]) -> str:
    return "idle" if path and path[-1].move.name == "survey" else "here"


def _has_heard(search: Search, judge: Judge) -> bool:
    """Did any behaviour tell this monitor anything that it could judge by?"""
    heard = set(judge.handles)
    telling = {NEEDS[judge.invariant]} if judge.invariant in NEEDS else heard - COMMONPLACE or heard
    if {event.__name__ for event in telling} == {"Surveyed"}:
        return search.explored.quiet > 0
    return any(
        type(event) in telling
        for group in search.groups
        for outcome, used in zip(group.outcomes, group.used, strict=False)
        if used
        for event in outcome.events
    )


def schedule_of(report: Report, found: Counterexample) -> Schedule:
    """The counterexample as moves that can be played again."""
    stepper = Stepper(report.system)
    written: list[str] = []
    for taken in (*found.path, *found.cycle):
        written.append(stepper.written(taken.move, taken.outcome))
        stepper.take(written[-1])
    name = report.model.name if report.model.is_shipped else report.model.path
    return Schedule(name, tuple(written[: found.depth]), tuple(written[found.depth :]), found.ends)


def scenario_of(report: Report, found: Counterexample, breaks: tuple[str, ...], origin: str) -> str:
    """The counterexample as the text of a scenario."""
    title = f"{found.invariant} under {report.profile.name}: {found.text}"
    story = f"{report.model.title}. Found by: {origin}"
    return write_schedule(title, story, schedule_of(report, found), _base(report), report.changes, breaks)


def replay(
    report: Report,
    found: Counterexample,
    protocol: Protocol,
    origin: str,
    place: str = "counterexample.toml",
    trace: IO[str] | None = None,
) -> tuple[str, Result, list[Any]]:
    """Play a counterexample in virtual time under the streaming monitors. ``place``: where its scenario will stand.

    Returns the scenario's text, which expects what really broke; what came of it; and the events.
    """
    draft = scenario_of(report, found, (found.invariant,), origin)
    words = ["kvpoll", "run", place, "--profile", _base(report)]
    if protocol.path != load().path:
        words += ["--spec", protocol.path]
    line = shlex.join([*words, "--seed", "0"])
    first = _play(draft, report, protocol, line, None, [])
    others = sorted(first.violations.keys() - {found.invariant})
    text = scenario_of(report, found, (found.invariant, *others), origin)
    events: list[Any] = []
    return text, _play(text, report, protocol, line, trace, events), events


def _base(report: Report) -> str:
    """The named profile under which the scenario stands; its expectation repeats the rules that were changed."""
    return report.profile.base if report.changes and report.profile.base else report.profile.name


def _play(text: str, report: Report, protocol: Protocol, line: str, trace: IO[str] | None, events: list[Any]) -> Result:
    name = Path(shlex.split(line)[2]).stem
    scenario = parse_scenario(Source(f"{name}.toml", text), protocol, name)
    return ScheduledRun(protocol, scenario, report.profile, 0, line, trace, collect=events)()


__all__ = ["Counterexample", "Limits", "Report", "TooLarge", "explore", "replay", "schedule_of"]
