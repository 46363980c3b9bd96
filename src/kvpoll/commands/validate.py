"""``kvpoll validate``: is there anything in this trace that the profile cannot explain, or that breaks an invariant?"""

from __future__ import annotations

import argparse
import gc
import shlex
from typing import Any

from kvpoll.commands.options import Verbs, add_profile, add_spec, add_verb, counted
from kvpoll.commands.plan import read_spec
from kvpoll.commands.screen import Screen, plural
from kvpoll.commands.status import HOLDS, INTERRUPTED, VIOLATED
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Protocol
from kvpoll.spec.source import BadInput, nearest
from kvpoll.statemachine.judge import Change, Finding
from kvpoll.trace_lines import lines_of
from kvpoll.validation import FORMATS, Asked, Departure, Trial, Verdict

SHOWN = 8
"""Ways out of a state, and departures, that are shown; --json has all."""

GARBAGE = 100_000
"""New objects between two looks of Python's collector for cycles."""


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Name the first event of a trace that a profile cannot explain, and every invariant that it breaks."
    parser = add_verb(verbs, "validate", says, act)
    parser.add_argument("trace", metavar="TRACE", help="a trace of kvpoll or of an instrumented SGLang; - for a pipe")
    add_profile(parser, None, "judge by this profile (default: that of the trace; for SGLang sglang-0.5.23)")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="what the trace is (default: look)")
    parser.add_argument("--invariant", metavar="ID", action="append", dest="only", help="judge only this one")
    parser.add_argument("--no-invariants", action="store_true", help="judge only whether the profile explains it")
    parser.add_argument(
        "--news-only", action="store_true", help="the trace leaves out steps that move neither poll nor lease"
    )
    parser.add_argument(
        "--part", action="store_true", help="the trace holds some of the ranks only: judge what one rank decides"
    )
    parser.add_argument("--max-violations", metavar="N", type=counted, help="stop after N findings (default: read on)")
    add_spec(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Read the trace once and tell what was found."""
    asked = asked_of(arguments)
    protocol = read_spec(arguments.spec)
    lines, size, place = lines_of(arguments.trace)
    name = "standard input" if arguments.trace == "-" else arguments.trace
    trial = Trial(protocol, asked, lines, name)
    gc.set_threshold(GARBAGE)  # a trace makes few cycles, and looking for them after every 700 objects costs a tenth
    with screen.progress(f"validating {name}", " bytes") as advance:
        verdict = trial((lambda: advance(place(), size)) if size else (lambda: None))
    line = line_of(arguments, trial.profile.name)
    if arguments.json:
        screen.json(as_object(name, verdict, protocol, line))
    else:
        show(name, verdict, protocol, screen)
        screen.say(f"repeat: {line}")
    if any(note.startswith("interrupted") for note in verdict.notes):
        return INTERRUPTED
    return HOLDS if verdict.holds else VIOLATED


def asked_of(arguments: argparse.Namespace) -> Asked:
    """How the options want the trace to be judged. Raises BadInput."""
    if arguments.only and arguments.no_invariants:
        raise BadInput("--invariant and --no-invariants exclude each other")
    for name in arguments.only or ():
        if name not in INVARIANTS:
            raise BadInput(f"{name!r} is not an invariant{nearest(name.upper(), INVARIANTS)}")
    only = () if arguments.no_invariants else None if arguments.only is None else tuple(arguments.only)
    return Asked(
        arguments.profile,
        arguments.format,
        arguments.news_only,
        arguments.part,
        only,
        arguments.max_violations or 0,
    )


def line_of(arguments: argparse.Namespace, profile: str) -> str:
    """The command that repeats this validation."""
    words = ["kvpoll", "validate", arguments.trace, "--profile", profile]
    words += [] if arguments.format == "auto" else ["--format", arguments.format]
    for name in arguments.only or ():
        words += ["--invariant", name]
    words += ["--no-invariants"] * arguments.no_invariants + ["--news-only"] * arguments.news_only
    words += ["--part"] * arguments.part
    if arguments.max_violations is not None:
        words += ["--max-violations", str(arguments.max_violations)]
    if arguments.spec is not None:
        words += ["--spec", arguments.spec]
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------- what to show


def show(name: str, verdict: Verdict, protocol: Protocol, screen: Screen) -> None:
    """The first event in full, then what else there is."""
    first = verdict.first
    if first is not None:
        _show_finding(name, first, verdict.departures[first.changes], protocol, screen)
        _show_others(name, verdict, protocol, screen)
    for broken in sorted(verdict.broken.values(), key=lambda broken: broken.line):
        violated = broken.violated
        times = verdict.counts.get(violated.invariant, 1)
        more = "" if times == 1 else f" ({times:,} in all)"
        screen.say(
            f"{name}:{broken.line}: {violated.invariant} breaks on {violated.node}: {violated.text}{more}", "red"
        )
        screen.say(f"  {violated.invariant}: {INVARIANTS[violated.invariant].sentence}")
        if broken.event is not None:
            screen.say(f"  event: {broken.event}")
        for told in broken.context:
            screen.say(f"  earlier: {name}:{told.line}: {told.text}")
    if verdict.open:
        shown = ", ".join(f"{node} room {room} {poll}" for node, room, poll in verdict.open[:SHOWN])
        more = f" and {len(verdict.open) - SHOWN} more" if len(verdict.open) > SHOWN else ""
        screen.say(f"still in the table at the end: {shown}{more}")
    for note in verdict.notes:
        screen.say(f"note: {note}")
    judged = f"{plural(verdict.lines, 'line')}, {plural(verdict.steps, 'step')} judged"
    if first is not None:
        says = f"not explained by {verdict.profile}: {plural(verdict.unexplained, 'event')}"
    else:
        says = f"explained by {verdict.profile}"
    broke = f"{', '.join(verdict.broken)} broke" if verdict.broken else "no invariant broke"
    screen.say(f"{says}; {broke} ({judged})", "green" if verdict.holds else "red")


def _show_finding(name: str, found: Finding, departure: Departure, protocol: Protocol, screen: Screen) -> None:
    screen.say(f"{name}:{found.line}: {found.event}", "red")
    if found.room is not None:
        screen.say(f"  at t = {found.t:.6f} s, {found.room}")
    if found.before is not None:
        screen.say(f"  before: {found.before}")
    screen.say(f"  why: {found.why}")
    for text in found.allowed[:SHOWN]:
        screen.say(f"  allowed: {text}")
    if len(found.allowed) > SHOWN:
        screen.say(f"  allowed: {len(found.allowed) - SHOWN} more")
    for change in found.changes:
        screen.say(f"  rule: {_told(change, protocol)}")
    for invariant in found.invariants:
        screen.say(f"  invariant: {invariant} {INVARIANTS[invariant].sentence}")
    for told in found.context:
        screen.say(f"  earlier: {name}:{told.line}: {told.text}")
    if departure.times > 1:
        screen.say(f"  {departure.times:,} events depart like this")


def _show_others(name: str, verdict: Verdict, protocol: Protocol, screen: Screen) -> None:
    """The other kinds of departure, a line each."""
    first = verdict.first
    others = [(key, each) for key, each in verdict.departures.items() if each.first is not first]
    for changes, departure in sorted(others, key=lambda item: item[1].first.line)[: 2 * SHOWN]:
        rules = ", ".join(f"{change.rule} = {change.needs}" for change in changes) or "no choice of rules"
        invariants = f" ({', '.join(departure.first.invariants)})" if departure.first.invariants else ""
        found = departure.first
        screen.say(f"{name}:{found.line}: {found.event}; explained by {rules}{invariants}, {departure.times:,} times")


def _told(change: Change, protocol: Protocol) -> str:
    rule = protocol.rules[change.rule]
    source = f" ({rule.source})" if rule.source else ""
    has, needs = rule.values.get(str(change.has), ""), rule.values.get(str(change.needs), "")
    return f"{change.rule} is {change.has} ({has}); {change.needs} ({needs}) would explain it{source}"


def as_object(name: str, verdict: Verdict, protocol: Protocol, line: str) -> dict[str, Any]:
    """A verdict as one JSON object."""
    ordered = sorted(verdict.departures.values(), key=lambda departure: departure.first.line)
    return {
        "trace": name,
        "format": verdict.format,
        "profile": verdict.profile,
        "verdict": "holds" if verdict.holds else "breaks",
        "explained": verdict.first is None,
        "complete": verdict.complete,
        "lines": verdict.lines,
        "steps": verdict.steps,
        "unexplained": verdict.unexplained,
        "first": None if verdict.first is None else _finding_object(verdict.first),
        "departures": [{**_finding_object(each.first), "times": each.times} for each in ordered],
        "violations": [
            {
                "invariant": invariant,
                "line": broken.line,
                "t": broken.violated.t,
                "node": broken.violated.node,
                "text": broken.violated.text,
                "event": broken.event,
                "context": [{"line": told.line, "text": told.text} for told in broken.context],
                "times": verdict.counts.get(invariant, 1),
            }
            for invariant, broken in sorted(verdict.broken.items(), key=lambda item: item[1].line)
        ],
        "open": [list(each) for each in verdict.open],
        "notes": verdict.notes,
        "repeat": line,
    }


def _finding_object(found: Finding) -> dict[str, Any]:
    return {
        "line": found.line,
        "t": found.t,
        "node": found.node,
        "event": found.event,
        "room": found.room,
        "before": found.before,
        "why": found.why,
        "allowed": list(found.allowed),
        "rules": [change._asdict() for change in found.changes],
        "invariants": list(found.invariants),
        "context": [{"line": told.line, "text": told.text} for told in found.context],
    }
