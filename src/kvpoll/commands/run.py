"""``kvpoll run``: one scenario, one seed or many; by default ten minutes of traffic with every fault."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

from kvpoll.commands import real, seeds
from kvpoll.commands.options import (
    Verbs,
    add_profile,
    add_seed,
    add_spec,
    add_verb,
    counted,
    lasting,
    open_to_write,
)
from kvpoll.commands.plan import FAULT_MODES, MAIN, SWARM, Plan, Prepared, prepare
from kvpoll.commands.screen import Screen, plural, seconds
from kvpoll.commands.status import HOLDS, INTERRUPTED, VIOLATED
from kvpoll.commands.verdict import FOR_EVER_S, as_object, by_count, by_time, deviations, percentiles
from kvpoll.sim.faults import Fault
from kvpoll.sim.run import Outcome
from kvpoll.sim.scenario import Expectation
from kvpoll.sim.swarm import draw_swarm
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.source import BadInput


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(verbs, "run", "Run a scenario and say what broke, what failed and how fast it went.", act)
    add_arguments(parser)
    parser.add_argument("--record", metavar="FILE", help="write the trace, one JSON object a line (one seed only)")
    parser.add_argument("--seeds", metavar="N", type=counted, help="run N seeds, from --seed on, in several processes")
    parser.add_argument("--jobs", metavar="J", type=counted, help="processes for --seeds (default: one for each core)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="with --seeds: append to DIR/results.jsonl, skip what is there; with --real: keep every trace",
    )
    real.add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that decide what a run does; a line that repeats a run has no others."""
    parser.add_argument("scenario", nargs="?", default=MAIN, metavar="SCENARIO", help=f"name or path (default {MAIN})")
    add_profile(parser, "reference", "a profile, or what the scenario calls one (default reference)")
    add_seed(parser)
    parser.add_argument("--trace", metavar="FILE", help="replay the requests of this trace in the Mooncake format")
    parser.add_argument("--minutes", metavar="N", type=lasting, help=f"how much of the workload ({MAIN}: 10)")
    parser.add_argument(
        "--faults",
        choices=FAULT_MODES,
        help=f"all: one of every kind, drawn by seed (default of {MAIN}); scenario: those of the file; none",
    )
    parser.add_argument(
        "--swarm", action="store_true", help="the seed draws which kinds of fault there are, how many and how strong"
    )
    parser.add_argument(
        "--set",
        metavar="RULE=VALUE",
        action="append",
        default=[],
        dest="changes",
        help="change a rule of the profile",
    )
    add_spec(parser)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the options describe. Raises BadInput."""
    if arguments.swarm and arguments.faults is not None:
        raise BadInput("--swarm draws the faults; leave --faults away")
    return Plan(
        scenario=arguments.scenario,
        profile=arguments.profile,
        changes=tuple(arguments.changes),
        trace=arguments.trace,
        minutes=arguments.minutes,
        faults=SWARM if arguments.swarm else arguments.faults,
        spec=arguments.spec,
    )


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """One seed in full, or many with a line each."""
    plan = plan_of(arguments)
    if arguments.real:
        return status(real.act(plan, arguments, screen, partial(show, is_real=True)))
    real.check_alone(arguments)
    if arguments.seeds is not None:
        if arguments.record is not None:
            raise BadInput("--record writes one trace; leave --seeds away")
        return seeds.act(plan, arguments, screen)
    for option in ("out", "jobs"):
        if getattr(arguments, option) is not None:
            raise BadInput(f"--{option} is for many seeds; add --seeds N")
    prepared = prepare(plan)
    record = None if arguments.record is None else Path(arguments.record)
    outcome = play(prepared, arguments.seed, record, screen)
    if arguments.json:
        screen.json(as_object(outcome, prepared.expectation))
    else:
        show(prepared, outcome, _recorded(record, outcome), screen)
    return status(outcome)


def play(prepared: Prepared, seed: int, record: Path | None, screen: Screen) -> Outcome:
    """Run one seed, with progress on a terminal. A trace is readable even when the run was interrupted."""
    with contextlib.ExitStack() as stack:
        file = None if record is None else stack.enter_context(open_to_write(record))
        advance = stack.enter_context(screen.progress(f"{prepared.scenario.name}, seed {seed}", " simulated s"))
        return prepared.run(seed, trace=file, progress=advance)()


def status(outcome: Outcome) -> int:
    """Exit status of one run."""
    return INTERRUPTED if outcome.interrupted else HOLDS if outcome.holds else VIOLATED


# ---------------------------------------------------------------------------------------------- what to show


def show(prepared: Prepared, outcome: Outcome, recorded: str | None, screen: Screen, is_real: bool = False) -> None:
    """Everything about one run, the line that repeats it last. recorded: what to say of its trace."""
    scenario = prepared.scenario
    screen.prose(f"{scenario.name}: {scenario.title}")
    lasts = f"{scenario.timing.hostile_s:g} s of requests and faults"
    screen.say(f"profile {outcome.profile}, seed {outcome.seed}, {lasts}")
    if prepared.plan.fault_mode == SWARM:
        screen.prose(draw_swarm(outcome.seed, scenario).line)
    screen.say()
    _show_faults(outcome, screen)
    _show_requests(outcome, screen)
    _show_speed(outcome, screen, "real" if is_real else "simulated")
    _show_marks(outcome, screen)
    if recorded is not None:
        screen.say(recorded)
    _show_verdict(outcome, prepared.expectation, screen)
    screen.say(outcome.line)


def _recorded(record: Path | None, outcome: Outcome) -> str | None:
    if record is None:
        return None
    return f"trace written to {record}, digest {outcome.digest}; `kvpoll replay {record}` repeats it"


def _show_faults(outcome: Outcome, screen: Screen) -> None:
    if not outcome.faults:
        screen.say("no faults")
        return
    columns = ["fault", "target", "at", "for", "with", "fired"]
    screen.table(columns, [_fault_cells(fault, outcome) for fault in by_time(outcome.faults)], right=["at", "for"])
    screen.say()


def _fault_cells(fault: Fault, outcome: Outcome) -> list[str]:
    at = f"{fault.at_s:g} s"
    if fault.trigger is not None:
        pattern = " ".join(f"{name}={value}" for name, value in fault.trigger.items() if name != "event")
        at = f"{fault.trigger['event']} {pattern} + {at}"
    lasts = "to the end" if fault.for_s > FOR_EVER_S else f"{fault.for_s:g} s"
    given = " ".join(f"{name}={value}" for name, value in fault.parameters.items())
    return [
        fault.kind.name,
        fault.target,
        at,
        lasts,
        given,
        "no" if fault.kind.name in outcome.unfired else "yes",
    ]


def _show_requests(outcome: Outcome, screen: Screen) -> None:
    failed = sum(outcome.causes.values())
    unanswered = outcome.requests - outcome.succeeded - failed
    rest = f", {unanswered:,} unanswered" if unanswered else ""
    screen.say(f"{plural(outcome.requests, 'request')}: {outcome.succeeded:,} succeeded, {failed:,} failed{rest}")
    if outcome.causes:
        rows = [[cause, f"{count:,}"] for cause, count in by_count(outcome.causes).items()]
        screen.table(["first cause of failure", "requests"], rows, right=["requests"])
    found = percentiles(outcome.ttft_s)
    screen.say("time to first token: " + ", ".join(f"{name} {seconds(value)}" for name, value in found.items()))
    screen.say()


def _show_speed(outcome: Outcome, screen: Screen, how: str) -> None:
    per_s, ratio = outcome.events / outcome.wall_s, outcome.simulated_s / outcome.wall_s
    screen.say(f"{outcome.events:,} events in {outcome.wall_s:.2f} s: {per_s:,.0f} events/s")
    time_of_it = "s simulated" if how == "simulated" else "s of its time"
    screen.say(f"{outcome.simulated_s:,.0f} {time_of_it}: {ratio:,.0f} times as fast as real time")


def _show_marks(outcome: Outcome, screen: Screen) -> None:
    marks = {mark: count for mark, count in outcome.marks.items() if not mark.startswith("fault:")}
    if marks:
        screen.prose("seen: " + ", ".join(f"{mark} {count:,}" for mark, count in by_count(marks).items()))
    screen.say()


def _show_verdict(outcome: Outcome, said: Expectation | None, screen: Screen) -> None:
    if outcome.interrupted:
        screen.say(f"interrupted after {outcome.simulated_s:,.1f} s of its time; what follows is of that part", "bold")
    if outcome.holds:
        screen.say("holds: no invariant broke", "green")
    else:
        screen.say(f"breaks: {plural(len(outcome.violations), 'invariant')}", "red")
        columns = ["invariant", "name", "first at", "times", "what was seen"]
        screen.table(columns, _violation_rows(outcome), right=["first at", "times"])
    if said is not None and not outcome.interrupted:
        surprises = deviations(outcome, said)
        told = f"NOT as expected: {'; '.join(surprises)}" if surprises else f"exactly as {outcome.scenario} expects"
        screen.prose(told)


def _violation_rows(outcome: Outcome) -> list[list[str]]:
    ordered = sorted(outcome.violations.items(), key=lambda item: (item[1].t, item[0]))
    return [
        [name, INVARIANTS[name].name, seconds(found.t), f"{outcome.counts.get(name, 1):,}", _seen(found)]
        for name, found in ordered
    ]


def _seen(found: Any) -> str:
    return f"{found.node}: {found.text}"
