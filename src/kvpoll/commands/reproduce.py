"""``kvpoll reproduce``: every known race, under every profile that its scenario speaks of, in one table."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvpoll.commands import real
from kvpoll.commands.options import Verbs, add_profile, add_seed, add_spec, add_verb, open_to_write
from kvpoll.commands.plan import Plan, Prepared, prepare, read_spec
from kvpoll.commands.screen import Advance, Screen, plural, seconds
from kvpoll.commands.status import HOLDS, INTERRUPTED, VIOLATED
from kvpoll.commands.verdict import as_object, deviations, first_violation_s, in_order
from kvpoll.sim.run import Outcome
from kvpoll.sim.scenario import Expectation, find, load_scenario, names_available
from kvpoll.spec.protocol import Protocol
from kvpoll.spec.source import BadInput, nearest


class Row(NamedTuple):
    """One scenario under one profile, and what came of it."""

    race: str
    said: Expectation
    outcome: Outcome

    @property
    def deviations(self) -> list[str]:
        """How it differs from what the scenario says."""
        return deviations(self.outcome, self.said)


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Run known races and say which invariants break under which profile."
    parser = add_verb(verbs, "reproduce", says, act, "Exit status 0 when every row is exactly as its scenario says.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="scenarios, by name or path (default: all known races)"
    )
    add_profile(parser, None, "only rows of this profile")
    add_seed(parser)
    parser.add_argument("--trace-dir", metavar="DIR", help="write the trace of every run into this folder")
    real.add_arguments(parser)
    add_spec(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run, print the table, and say whether all is as expected."""
    folder = None if arguments.trace_dir is None else Path(arguments.trace_dir)
    chosen = choose(arguments.names, arguments.profile, arguments.spec)
    if arguments.real:
        return act_real(chosen, folder, arguments, screen)
    real.check_alone(arguments)
    with screen.progress("reproducing") as advance:
        rows = play(chosen, arguments.seed, folder, advance)
    line = _line(arguments)
    if arguments.json:
        screen.json({"rows": [as_row(row) for row in rows], "repeat": line})
    else:
        show(rows, screen)
        screen.say(line)
    return status(rows)


def status(rows: Sequence[Row]) -> int:
    """0 when every row is exactly as its scenario says."""
    if any(row.outcome.interrupted for row in rows):
        return INTERRUPTED
    return VIOLATED if any(row.deviations for row in rows) else HOLDS


# ---------------------------------------------------------------------------------------------- what to run


def choose(names: Sequence[str], profile: str | None, spec: str | None) -> list[Prepared]:
    """One prepared run for each expectation of these scenarios; without names, of all that have a race."""
    protocol = read_spec(spec)
    given = [] if list(names) == ["all"] else names
    chosen = [plan for name in given or _races(protocol) for plan in _plans(name, protocol, spec)]
    if profile is not None:
        known = {plan.profile for plan in chosen}
        chosen = [plan for plan in chosen if plan.profile == profile]
        if not chosen:
            raise BadInput(f"--profile: none of these scenarios speaks of {profile!r}{nearest(profile, known)}")
    return [prepare(plan) for plan in chosen]


def _races(protocol: Protocol) -> list[str]:
    """Scenarios with a race, in order of its name, so that a neighbour stands beside its race."""
    races = {name: load_scenario(find(name), protocol).race for name in names_available()}
    return [name for _, name in sorted((race, name) for name, race in races.items() if race is not None)]


def _plans(name: str, protocol: Protocol, spec: str | None) -> list[Plan]:
    scenario = load_scenario(find(name), protocol)
    if not scenario.expectations:
        raise BadInput(f"{scenario.path}: says of no profile what must come of it; add [[expect]], or use `kvpoll run`")
    # What a file says is true of the faults that it lists, so `main`, too, runs here without drawn ones.
    return [Plan(name, said.label, faults="scenario", spec=spec) for said in scenario.expectations]


def play(chosen: Sequence[Prepared], seed: int, folder: Path | None, advance: Advance) -> list[Row]:
    """Run them one after the other. An interrupt ends with the run that it hit, marked as interrupted."""
    rows: list[Row] = []
    for number, prepared in enumerate(chosen):
        advance(number, len(chosen))
        assert prepared.expectation is not None
        outcome = _one(prepared, seed, folder)
        rows.append(Row(prepared.scenario.race or prepared.scenario.name, prepared.expectation, outcome))
        if outcome.interrupted:
            break
    return rows


def _one(prepared: Prepared, seed: int, folder: Path | None) -> Outcome:
    with contextlib.ExitStack() as stack:
        file = None if folder is None else stack.enter_context(open_to_write(folder / _file_name(prepared, seed)))
        return prepared.run(seed, trace=file, progress=lambda done, whole: None)()


def _file_name(prepared: Prepared, seed: int) -> str:
    label = re.sub(r"[^A-Za-z0-9.+-]+", "-", prepared.plan.profile).strip("-")
    return f"{prepared.scenario.name}.{label}.seed{seed}.jsonl"


# ---------------------------------------------------------------------------------------------- for real


def act_real(chosen: Sequence[Prepared], folder: Path | None, arguments: argparse.Namespace, screen: Screen) -> int:
    """Simulate each row and stage it on real processes; one table, both verdicts side by side."""
    stageable = []
    for prepared in chosen:
        try:
            stageable.append((prepared, real.staged(prepared, arguments)))
        except BadInput:
            if arguments.names:
                raise
    rows: list[Row] = []
    simulated: list[Outcome] = []
    with screen.progress("reproducing for real") as advance:
        for number, (prepared, staging) in enumerate(stageable):
            assert prepared.expectation is not None
            advance(number, len(stageable))
            simulated.append(_one(prepared, arguments.seed, None))
            with contextlib.ExitStack() as stack:
                if folder is not None:
                    name = _file_name(prepared, arguments.seed)
                    staging.trace = stack.enter_context(open_to_write(folder / name))
                rows.append(Row(prepared.scenario.race or prepared.scenario.name, prepared.expectation, staging()))
            if rows[-1].outcome.interrupted:
                break
    line = _line(arguments)
    if arguments.json:
        told = [
            {**as_row(row), "simulated": sorted(before.violations)} for row, before in zip(rows, simulated, strict=True)
        ]
        screen.json({"rows": told, "repeat": line})
    else:
        _show_real(rows, simulated, screen)
        screen.say(line)
    return status(rows)


def _show_real(rows: Sequence[Row], simulated: Sequence[Outcome], screen: Screen) -> None:
    columns = ["race", "profile", "simulated", "for real", "expected", "seed line"]
    cells = [
        [row.race, row.said.label, _broken(before), _broken(row.outcome), _is_expected(row), row.outcome.line]
        for row, before in zip(rows, simulated, strict=True)
    ]
    screen.table(columns, cells, line="seed line")
    screen.say()
    _show_surprises(rows, screen)


def _is_expected(row: Row) -> str:
    return "NO" if row.deviations else "yes"


def _broken(outcome: Outcome) -> str:
    return " ".join(sorted(outcome.violations)) or "holds"


# ---------------------------------------------------------------------------------------------- what to show


def show(rows: Sequence[Row], screen: Screen) -> None:
    """The table, and a line for every surprise."""
    columns = ["race", "profile", "verdict", "invariants", "first at", "expected", "seed line"]
    screen.table(columns, [_cells(row) for row in rows], right=["first at"], line="seed line")
    screen.say()
    _show_surprises(rows, screen)


def _show_surprises(rows: Sequence[Row], screen: Screen) -> None:
    surprises = [row for row in rows if row.deviations]
    for row in surprises:
        screen.prose(f"{row.outcome.scenario} under {row.said.label}: {'; '.join(row.deviations)}")
    if rows and rows[-1].outcome.interrupted:
        screen.say("interrupted: the last row is incomplete, and what would follow is missing")
    elif surprises:
        screen.say(f"{len(surprises)} of {plural(len(rows), 'row')} not as expected", "bold red")
    else:
        screen.say(f"all {plural(len(rows), 'row')} exactly as expected", "green")


def _cells(row: Row) -> list[str]:
    outcome = row.outcome
    shown, following = in_order(outcome, row.said)
    names = " ".join(shown) + (f" (+{' '.join(following)})" if following else "")
    return [
        row.race,
        row.said.label,
        "holds" if outcome.holds else "breaks",
        names.strip() or "-",
        seconds(first_violation_s(outcome)),
        _is_expected(row),
        outcome.line,
    ]


def as_row(row: Row) -> dict[str, Any]:
    """One row as a JSON object."""
    return {"race": row.race, "label": row.said.label, **as_object(row.outcome, row.said)}


def _line(arguments: argparse.Namespace) -> str:
    words = ["kvpoll", "reproduce", *arguments.names]
    for option in ("profile", "spec"):
        if getattr(arguments, option) is not None:
            words += [f"--{option}", getattr(arguments, option)]
    words += ["--real"] * arguments.real
    for option in real.ALONE:
        value = getattr(arguments, option)
        if value is not None:
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else value]
    return shlex.join([*words, "--seed", str(arguments.seed)])
