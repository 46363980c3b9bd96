"""``kvpoll shrink`` for the explorer's counterexamples, or any other schedule of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvpoll.commands.options import open_to_write
from kvpoll.commands.plan import Prepared
from kvpoll.commands.screen import Screen, plural
from kvpoll.commands.status import HOLDS, INTERRUPTED
from kvpoll.sim.explorer.schedule_text import Schedule, write_schedule
from kvpoll.sim.explorer.shrinking import Question, shrink_schedule
from kvpoll.sim.shrink import INTERRUPTED as BY_CTRL_C
from kvpoll.spec.source import BadInput


def act(prepared: Prepared, wanted: str | None, arguments: argparse.Namespace, screen: Screen) -> int:
    """Reduce the schedule, write it, and say how far that came."""
    scenario, line = prepared.scenario, prepared.plan.line(0)
    broken = sorted(prepared.run(0)().violations.values(), key=lambda violated: violated.t)
    invariant = wanted or (broken[0].invariant if broken else None)
    if invariant is None or invariant not in {violated.invariant for violated in broken}:
        raise BadInput(f"nothing to shrink: {wanted or 'every invariant'} holds in `{line}`; give a run that breaks it")
    path = Path(arguments.out or f"shrunk-{scenario.name}-{invariant}.toml")
    if path.suffix != ".toml" or path.resolve() == Path(scenario.path).resolve():
        raise BadInput(f"--out {path}: give another file, with a name that ends in .toml")
    question = Question(prepared.protocol, scenario, prepared.profile, invariant)
    with screen.status(f"shrinking {invariant}") as tell:

        def progress(what: str, tried: int, best: Schedule) -> None:
            tell(f"{what}; {plural(len(best.moves), 'move')} left after {plural(tried, 'run')}")

        found = shrink_schedule(question, progress, arguments.budget)
    before, after = len(scenario.schedule.moves), len(found.case.moves)  # type: ignore[union-attr]
    plain = prepared.protocol.profile(prepared.profile.base or prepared.profile.name)
    name = prepared.profile.name if prepared.profile.name in prepared.protocol.profiles else plain.name
    rules = prepared.protocol.profile(name).rules
    changes = {rule: value for rule, value in prepared.profile.rules.items() if rules[rule] != value}
    text = write_schedule(scenario.title, f"Shrunk from: {line}", found.case, name, changes, (invariant,))
    with open_to_write(path) as file:
        file.write(text)
    again = f"kvpoll run {path} --profile {name}"
    if arguments.json:
        screen.json({"invariant": invariant, "before": before, "after": after, "tried": found.tried, "repeat": again})
    else:
        screen.say(f"{invariant}: moves {before} -> {after}, written to {path} after {plural(found.tried, 'run')}")
        screen.say(again)
    return INTERRUPTED if found.ended == BY_CTRL_C else HOLDS
