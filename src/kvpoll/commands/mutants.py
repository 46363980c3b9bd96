"""``kvpoll mutants``: does the explorer notice when the protocol is wrong?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpoll.commands.options import Verbs, add_verb
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import HOLDS, VIOLATED
from kvpoll.sim.explorer.mutants import JUDGED, PATH, Examiner, Mutant, Verdict, load_mutants
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput, nearest

COLUMNS = ["mutant", "invariant", "model", "caught", "depth", "states", "seconds"]
NUMBERS = ["depth", "states", "seconds"]


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(verbs, "mutants", "Make single mistakes in the protocol; the explorer must find each.", act)
    parser.add_argument("ids", nargs="*", metavar="ID", help="mutants to make (default: all)")
    parser.add_argument("--invariant", metavar="ID", help="only those that must break this invariant, such as S1")
    parser.add_argument("--file", metavar="FILE", help="another mutants.toml than the one that comes with kvpoll")


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Examine the mutants that were asked for and say what became of each."""
    protocol = load()
    path = PATH if arguments.file is None else Path(arguments.file)
    mutants = _chosen(load_mutants(protocol, path), arguments.ids, arguments.invariant)
    is_all = not arguments.ids and arguments.invariant is None
    wanted = JUDGED if is_all and arguments.file is None else sorted({mutant.invariant for mutant in mutants})
    examine = Examiner(protocol)
    verdicts: list[Verdict] = []
    with screen.progress("mutants") as advance:
        for mutant in mutants:
            advance(len(verdicts), len(mutants))
            verdicts.append(examine(mutant))
    caught = {verdict.mutant.invariant for verdict in verdicts if verdict.caught}
    missed = [name for name in wanted if name not in caught]
    if arguments.json:
        screen.json(_object(verdicts, wanted, missed))
    else:
        _show(verdicts, wanted, missed, screen)
    return HOLDS if all(verdict.caught for verdict in verdicts) and not missed else VIOLATED


def _chosen(mutants: Sequence[Mutant], ids: Sequence[str], invariant: str | None) -> list[Mutant]:
    known = {mutant.id: mutant for mutant in mutants}
    for name in ids:
        if name not in known:
            raise BadInput(f"there is no mutant {name!r}{nearest(name, known)}")
    if invariant is not None and invariant not in JUDGED:
        raise BadInput(f"{invariant!r} is no invariant that the explorer judges{nearest(invariant.upper(), JUDGED)}")
    found = [known[name] for name in dict.fromkeys(ids)] or list(mutants)
    found = [mutant for mutant in found if invariant in (None, mutant.invariant)]
    if not found:
        raise BadInput(f"none of these mutants is made to break {invariant}")
    return found


def _show(verdicts: Sequence[Verdict], wanted: Sequence[str], missed: Sequence[str], screen: Screen) -> None:
    screen.table(COLUMNS, [_row(verdict) for verdict in verdicts], right=NUMBERS)
    screen.say()
    for verdict in verdicts:
        if not verdict.caught:
            mutant = verdict.mutant
            screen.prose(f"{mutant.id} ({mutant.title}), mutants.toml:{mutant.line}: {verdict.why}")
    if missed:
        screen.prose(f"no mutant shows that these can be broken: {', '.join(missed)}")
    caught = sum(verdict.caught for verdict in verdicts)
    shown = len(wanted) - len(missed)
    told = f"caught {caught} of {len(verdicts)} mutants, {shown} of {len(wanted)} invariants"
    screen.say(told, "green" if caught == len(verdicts) and not missed else "red")


def _row(verdict: Verdict) -> list[str]:
    mutant = verdict.mutant
    depth = "-" if verdict.depth is None else f"{verdict.depth:,}"
    caught = "yes" if verdict.caught else "NO"
    return [
        mutant.id, mutant.invariant, mutant.model, caught, depth, f"{verdict.states:,}", f"{verdict.seconds:.2f}",
    ]  # fmt: skip


def _object(verdicts: Sequence[Verdict], wanted: Sequence[str], missed: Sequence[str]) -> dict[str, Any]:
    return {
        "mutants": [
            {
                "mutant": verdict.mutant.id,
                "title": verdict.mutant.title,
                "change": verdict.mutant.change.said,
                "invariant": verdict.mutant.invariant,
                "model": verdict.mutant.model,
                "caught": verdict.caught,
                "why_not": verdict.why or None,
                "depth": verdict.depth,
                "states": verdict.states,
                "seconds": round(verdict.seconds, 3),
                "text": verdict.text or None,
                "also_broken": list(verdict.also),
            }
            for verdict in verdicts
        ],
        "caught": sum(verdict.caught for verdict in verdicts),
        "invariants": list(wanted),
        "invariants_missed": list(missed),
    }
