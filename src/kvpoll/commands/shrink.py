"""``kvpoll shrink``: from a run that breaks an invariant to the smallest that still does, as a scenario file."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpoll.commands import shrink_schedule
from kvpoll.commands.options import Verbs, add_verb, lasting, open_to_write
from kvpoll.commands.plan import Plan, Prepared, prepare
from kvpoll.commands.replay import parse_line
from kvpoll.commands.run import add_arguments, plan_of
from kvpoll.commands.screen import Screen, plural, seconds
from kvpoll.commands.status import HOLDS, INTERRUPTED
from kvpoll.commands.verdict import deviations
from kvpoll.sim.run import Run
from kvpoll.sim.scenario import Expectation
from kvpoll.sim.scenario_text import Case, case_of, write_case
from kvpoll.sim.shrink import BUDGET, Shrunk, shrink
from kvpoll.sim.shrink import INTERRUPTED as BY_CTRL_C
from kvpoll.sim.shrink_case import Judge, Seen, Size, expectation_of, look, size_of, tiers
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Protocol
from kvpoll.spec.source import BadInput, nearest
from kvpoll.spec.trace import read_header

REFERENCE = "reference"


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Reduce a run that breaks an invariant to the smallest that still does, and write it as a scenario."
    more = "SCENARIO is one, with the options of `run`; or a quoted `kvpoll run ...` line; or a recorded trace."
    parser = add_verb(verbs, "shrink", says, act, more)
    add_arguments(parser)
    parser.add_argument("--invariant", metavar="ID", help="the one to keep broken (default: the first that breaks)")
    parser.add_argument("--budget", metavar="SECONDS", type=lasting, help="stop after so long with the best so far")
    parser.add_argument("--out", metavar="FILE", help="where to write it (default: shrunk-SCENARIO-seedN-ID.toml)")


@dataclass(frozen=True)
class Job:
    """What is to be shrunk, where the result goes, and how much there was. spec: another kvpoll.toml, if so."""

    line: str
    spec: str | None
    path: Path
    judge: Judge
    before: Size

    def plan(self, case: Case) -> Plan:
        """The run of the written scenario."""
        path = self.path
        shown = str(path) if path.is_absolute() or path.parts[:1] == ("..",) else f"./{path}"
        return Plan(shown, case.label, spec=self.spec)


@dataclass(frozen=True)
class Written:
    """What came of it. holds: does the reference, in the same case? surprises: how a replay differs from the file."""

    found: Shrunk[Case]
    after: Size
    holds: bool
    surprises: Sequence[str]


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run, reduce, write, and say how far that came."""
    wanted = _invariant(arguments.invariant)
    given = _given(arguments)
    prepared = prepare(plan_of(given))
    if prepared.scenario.schedule is not None:
        return shrink_schedule.act(prepared, wanted, arguments, screen)
    case = _case(prepared, given.seed)
    job = _job(case, prepared, given.seed, wanted, arguments.out, screen)
    _write(job, case, [], None)  # so that a place that cannot be written is told before the work
    written = _finish(job, _shrink(case, job.judge, arguments.budget, screen))
    if arguments.json:
        screen.json(_as_object(job, written))
    else:
        _show(job, written, screen)
        screen.say(job.plan(written.found.case).line(0))
    return INTERRUPTED if written.found.ended == BY_CTRL_C else HOLDS


def _job(case: Case, prepared: Prepared, seed: int, wanted: str | None, out: str | None, screen: Screen) -> Job:
    scenario, line = prepared.scenario, prepared.plan.line(seed)
    seen = _first_look(case, prepared.protocol, wanted, line, screen)
    judge = Judge(prepared.protocol, seen, first=wanted is None)
    path = Path(out or f"shrunk-{scenario.name}-seed{seed}-{judge.wanted}.toml")
    if path.suffix != ".toml" or path.resolve() == Path(scenario.path).resolve():
        raise BadInput(f"--out {path}: give another file, with a name that ends in .toml")
    return Job(line, prepared.plan.spec, path, judge, size_of(case, judge))


def _finish(job: Job, found: Shrunk[Case]) -> Written:
    """Write the scenario with what must come of it, and believe it only when it replays."""
    judge, case = job.judge, found.case
    after = size_of(case, judge)
    others = _reference(case, judge.protocol)
    _write(job, case, [expectation_of(case, judge.protocol, judge.wanted), *others], after)
    return Written(found, after, bool(others), _replay(job.plan(case), judge))


# ----------------------------------------------------------------------------------------------- what to shrink


def _invariant(name: str | None) -> str | None:
    if name is not None and name not in INVARIANTS:
        raise BadInput(f"--invariant: unknown invariant {name!r}{nearest(name.upper(), INVARIANTS)}")
    return name


def _given(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options of the run: those of this command, of a quoted line, or of the line in a trace."""
    what = arguments.scenario
    if what.split()[:2] == ["kvpoll", "run"]:
        found = parse_line(what, "shrink")
    elif _is_trace(Path(what)):
        found = parse_line(_line_in(Path(what)), f"{what}:1")
    else:
        return arguments
    for name in vars(found):
        if name != "scenario" and getattr(arguments, name) != arguments.parser.get_default(name):
            option = "set" if name == "changes" else name
            raise BadInput(f"--{option}: a line or a trace says all of its run; leave --{option} away")
    return found


def _is_trace(path: Path) -> bool:
    """A trace begins with an object, which no TOML file does."""
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False


def _line_in(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            header = read_header(file.readline(), f"{path}:1")
    except UnicodeDecodeError:
        raise BadInput(f"{path}:1: is not text; a kvpoll trace was expected") from None
    line = header.get("repeat")
    if not isinstance(line, str) or not line:
        raise BadInput(f"{path}:1: the header has no line to repeat; only what kvpoll recorded can be shrunk")
    return line


def _case(prepared: Prepared, seed: int) -> Case:
    """The run of one seed with everything drawn."""
    plan, protocol = prepared.plan, prepared.protocol
    labels = {said.label: said.profile for said in prepared.scenario.expectations}
    profile = labels.get(plan.profile, plan.profile)
    plain = protocol.profile(profile)
    rules = {name: value for name, value in prepared.profile.rules.items() if value != plain[name]}
    return case_of(prepared.scenario, prepared.faults(seed), profile, rules, seed, prepared.arrivals)


def _first_look(case: Case, protocol: Protocol, wanted: str | None, line: str, screen: Screen) -> Seen:
    with screen.progress("looking for the violation", " simulated s") as advance:
        seen = look(case, protocol, wanted, first=wanted is None, advance=advance)
    if seen is None:
        what = "every invariant holds" if wanted is None else f"{wanted} holds"
        raise BadInput(
            f"nothing to shrink: {what} in `{line}`; give a run that breaks it (`kvpoll campaign` finds some)"
        )
    return seen


def _shrink(case: Case, judge: Judge, budget_s: float | None, screen: Screen) -> Shrunk[Case]:
    with screen.status(f"shrinking {judge.wanted}") as tell:

        def progress(what: str, tried: int, best: Case) -> None:
            faults, requests = plural(len(best.faults), "fault"), plural(len(best.asks), "request")
            tell(f"{what}; {faults}, {requests} left after {plural(tried, 'run')}; Ctrl-C keeps the best so far")

        return shrink(case, tiers(judge), judge, progress, budget_s)


# -------------------------------------------------------------------------------------------------- what to write


def _write(job: Job, case: Case, expectations: Sequence[Expectation], after: Size | None) -> None:
    invariant, violated = INVARIANTS[job.judge.wanted], job.judge.seen.violated
    how_far = "not shrunk yet" if after is None else f"{_changes(job.before, after)}, all up to the violation"
    remarks = ["Written by `kvpoll shrink`, from", f"  {job.line}", how_far, "To see it break:"]
    title = f"{invariant.id} {invariant.name} breaks under {case.label}"
    story = f"{invariant.sentence} At {seconds(violated.t)} it broke on {violated.node}: {violated.text}."
    text = write_case(case, title, story, expectations, [*remarks, f"  {job.plan(case).line(0)}"])
    with open_to_write(job.path) as file:
        file.write(text)


def _reference(case: Case, protocol: Protocol) -> list[Expectation]:
    """What the reference makes of the same case, if every invariant holds there and every fault strikes."""
    if case.profile == REFERENCE and not case.rules:
        return []
    outcome = Run(protocol, case.scenario(), protocol.profile(REFERENCE))()
    marks = tuple(sorted(mark for mark in outcome.marks if mark.startswith("fault:")))
    said = Expectation(REFERENCE, REFERENCE, {}, (), (), marks, ())
    return [] if outcome.interrupted or deviations(outcome, said) else [said]


def _replay(plan: Plan, judge: Judge) -> list[str]:
    """Run what was written, as text; how it differs from what the file expects. A defect if it does not break."""
    prepared = prepare(plan)
    assert prepared.expectation is not None
    outcome = prepared.run(0)()
    if judge.wanted not in outcome.violations and not outcome.interrupted:
        raise RuntimeError(f"{plan.scenario} was written, but {judge.wanted} does not break in it")
    return deviations(outcome, prepared.expectation)


# --------------------------------------------------------------------------------------------------- what to show

NAMES = {field.name: field.name for field in dataclasses.fields(Size)} | {"story": "of the violating request"}


def _changes(before: Size, after: Size) -> str:
    """faults 14 -> 1, ..., for people."""
    pairs = [(NAMES[name], old, getattr(after, name)) for name, old in dataclasses.asdict(before).items()]
    return ", ".join(f"{name} {old:,} -> {new:,}" for name, old, new in pairs)


def _show(job: Job, written: Written, screen: Screen) -> None:
    found, violated = written.found, job.judge.seen.violated
    if found.ended == BY_CTRL_C:
        screen.say("interrupted: this is the best so far", "bold")
    elif found.ended == BUDGET:
        screen.say("the budget is spent: this is the best so far", "bold")
    name = INVARIANTS[violated.invariant].name
    screen.prose(f"{violated.invariant} {name}, at {seconds(violated.t)}, {violated.node}: {violated.text}")
    screen.say(_changes(job.before, written.after))
    if found.crashed:
        screen.say(f"{plural(found.crashed, 'smaller run')} crashed the simulator and did not count", "yellow")
    if found.case.profile != REFERENCE or found.case.rules:
        screen.say("the reference holds in it" if written.holds else "the file says nothing of the reference")
    if written.surprises:
        screen.prose(f"NOT as expected: {'; '.join(written.surprises)}")
    screen.say(f"written to {job.path} after {plural(found.tried, 'run')}")


def _as_object(job: Job, written: Written) -> dict[str, Any]:
    found, violated = written.found, job.judge.seen.violated
    return {
        "invariant": violated.invariant,
        "t": violated.t,
        "node": violated.node,
        "text": violated.text,
        "before": dataclasses.asdict(job.before),
        "after": dataclasses.asdict(written.after),
        "ended": found.ended,
        "runs": found.tried,
        "crashed": found.crashed,
        "reference_holds": written.holds,
        "deviations": list(written.surprises),
        "scenario": str(job.path),
        "repeat": job.plan(found.case).line(0),
    }
