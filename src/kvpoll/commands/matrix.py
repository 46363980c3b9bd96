"""``kvpoll matrix``: every profile against every invariant, over all models."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from kvpoll.commands.options import Verbs, add_verb, counted
from kvpoll.commands.screen import Screen, plural
from kvpoll.commands.status import HOLDS, VIOLATED
from kvpoll.sim.explorer.matrix import Cell, Verdict, as_object, cells, judge_all
from kvpoll.sim.explorer.model import load_model, names_available
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Explore every model under every profile: what holds, what breaks, and after how many moves."
    parser = add_verb(verbs, "matrix", says, act, "Exit status 1 when `reference` has a broken cell.")
    parser.add_argument("--profile", metavar="NAME", action="append", dest="profiles", help="only this (repeatable)")
    parser.add_argument("--model", metavar="NAME", action="append", dest="models", help="only this (repeatable)")
    parser.add_argument("--workers", metavar="N", type=counted, help="processes (default: one for each core)")
    parser.add_argument(
        "--max-states",
        metavar="N",
        type=counted,
        help="leave a model unfinished after this many (never under reference)",
    )
    parser.add_argument("--out", metavar="DIR", help="write matrix.md, matrix.json and pictures here")


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Explore, show the matrix, write the page."""
    protocol = load()
    profiles = [protocol.profile(name).name for name in arguments.profiles or protocol.profiles]
    models = [load_model(name, protocol).name for name in arguments.models or names_available()]
    workers = arguments.workers or os.cpu_count() or 1
    verdicts: list[Verdict] = []
    with screen.progress("exploring", " models x profiles") as advance:
        for verdict in judge_all(profiles, models, workers, arguments.max_states):
            verdicts.append(verdict)
            advance(len(verdicts), len(profiles) * len(models))
    matrix = cells(verdicts, profiles)
    if arguments.out is not None:
        _write(Path(arguments.out), profiles, verdicts, matrix, screen)
    if arguments.json:
        screen.json({"spec": protocol.digest, "verdicts": [as_object(verdict) for verdict in verdicts]})
    else:
        _show(profiles, verdicts, matrix, screen)
    broken = [cell for cell in matrix.values() if cell.profile == "reference" and cell.verdict == "broken"]
    vacuous = [each for each in verdicts if each.profile == "reference" and each.unwitnessed]
    unplayed = [each for each in verdicts if not all(found.replays for found in each.broken.values())]
    return VIOLATED if broken or vacuous or unplayed else HOLDS


def _write(
    folder: Path, profiles: list[str], verdicts: list[Verdict], matrix: dict[tuple[str, str], Cell], screen: Screen
) -> None:
    try:
        from kvpoll.reports.matrix import write
    except ImportError:
        raise BadInput("--out draws pictures and needs matplotlib: pip install 'kvpoll[reports]'") from None
    with screen.status("drawing") as tell:
        write(folder, load(), profiles, verdicts, matrix, tell)


def _show(profiles: list[str], verdicts: list[Verdict], matrix: dict[tuple[str, str], Cell], screen: Screen) -> None:
    rows = [
        [name, invariant.name, *(_shown(matrix[profile, name]) for profile in profiles)]
        for name, invariant in INVARIANTS.items()
    ]
    screen.table(["", "invariant", *profiles], rows, right=profiles)
    for each in verdicts:
        for name, found in each.broken.items():
            if not found.replays:
                screen.say(f"does NOT replay: {name} of {each.model} under {each.profile}", "red")
        if each.profile == "reference" and each.unwitnessed:
            screen.say(f"NOT witnessed under reference: {each.model}: {', '.join(each.unwitnessed)}", "yellow")
    states = sum(verdict.states for verdict in verdicts)
    screen.say(f"{plural(len(verdicts), 'exploration')}, {states:,} states")


def _shown(cell: Cell) -> str:
    if cell.found is None:
        return {"holds": "holds", "not exercised": "-"}.get(cell.verdict, f"to {cell.length}")
    return f"{cell.length}{'+' if cell.found.cycle else ''}"
