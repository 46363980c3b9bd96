"""``kvpoll explore``: every interleaving of a small cluster, judged by every invariant."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpoll.commands.options import Verbs, add_profile, add_spec, add_verb, counted, lasting, open_to_write
from kvpoll.commands.plan import changed_profile, read_spec
from kvpoll.commands.screen import Screen, plural
from kvpoll.commands.status import HOLDS, INTERRUPTED, VIOLATED
from kvpoll.sim.explorer.checkpoint import resume, save
from kvpoll.sim.explorer.explore import Counterexample, Limits, Report, explore, replay
from kvpoll.sim.explorer.model import ModelFile, load_model, names_available
from kvpoll.sim.explorer.search import Progress, Search, Taken, TooLarge
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput, nearest

SHOWN_MOVES = 60


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Explore every interleaving of a model and print the shortest counterexample to each invariant."
    parser = add_verb(verbs, "explore", says, act)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models, by name or path (default: all)")
    add_profile(parser, "reference", "a profile (default reference)")
    parser.add_argument(
        "--set", metavar="RULE=VALUE", action="append", default=[], dest="changes", help="change a rule"
    )
    parser.add_argument("--invariant", metavar="ID", action="append", dest="only", help="judge only this one")
    parser.add_argument("--show", metavar="ID", help="print this counterexample (default: the shortest)")
    parser.add_argument("--out", metavar="DIR", help="write every counterexample: scenario, trace and picture")
    parser.add_argument("--max-states", metavar="N", type=counted, help="stop after this many states")
    parser.add_argument("--max-depth", metavar="N", type=counted, help="stop at this depth")
    parser.add_argument("--first", action="store_true", help="stop at the first level that breaks anything")
    parser.add_argument("--memory", metavar="GIB", type=lasting, default=8.0, help="memory it may take (default 8)")
    parser.add_argument("--workers", metavar="N", type=counted, help="threads (default: one for each core)")
    parser.add_argument("--no-symmetry", action="store_true", help="tell interchangeable rooms apart")
    parser.add_argument(
        "--liveness",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="judge what must come true (default: when the model is small enough)",
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="on Ctrl-C or a limit write the search here; go on from here if it exists"
    )
    add_spec(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Explore each model; the worst result is the exit status."""
    protocol = read_spec(arguments.spec)
    profile = changed_profile(protocol, arguments.profile, tuple(arguments.changes))
    _check_ids(arguments)
    models = [load_model(name, protocol) for name in arguments.models or names_available()]
    if arguments.checkpoint is not None and len(models) != 1:
        raise BadInput("--checkpoint is for one model; name it")
    worst = HOLDS
    for model in models:
        status = _one(model, protocol, profile, arguments, screen)
        if status == INTERRUPTED:
            return INTERRUPTED
        worst = max(worst, status)
    return worst


def _check_ids(arguments: argparse.Namespace) -> None:
    for name in [*(arguments.only or ()), *([arguments.show] if arguments.show else ())]:
        if name not in INVARIANTS:
            raise BadInput(f"{name!r} is not an invariant{nearest(name.upper(), INVARIANTS)}")


def _one(model: ModelFile, protocol: Protocol, profile: Profile, arguments: argparse.Namespace, screen: Screen) -> int:
    limits = Limits(
        int(arguments.memory * 2**30),
        arguments.max_states,
        arguments.max_depth,
        arguments.workers or os.cpu_count() or 1,
        not arguments.no_symmetry,
        arguments.liveness,
        arguments.first,
    )
    only = None if arguments.only is None else tuple(arguments.only)
    base = protocol.profile(arguments.profile)
    changes = {name: value for name, value in profile.rules.items() if base[name] != value}
    checkpoint = None if arguments.checkpoint is None else Path(arguments.checkpoint)
    searches: list[Search] = []
    digests = (protocol.digest, model.digest, repr(sorted(profile.rules.items())))
    with _progress(model, screen) as tell, _interruptible() as prepare:

        def ready(search: Search) -> None:
            prepare(search)
            searches.append(search)
            if checkpoint is not None and checkpoint.exists():
                resume(search, checkpoint, digests)

        try:
            report = explore(model, protocol, profile, changes, only, limits, tell, ready)
        except TooLarge as error:
            if checkpoint is None:
                raise
            _save(searches[0], checkpoint, digests)
            raise TooLarge(f"{error}; it is kept in {checkpoint}, and the same command goes on") from None
    if checkpoint is not None:
        _keep(report, checkpoint, digests)
    line = _line(arguments, model)
    results = [_written(report, found, protocol, arguments, line) for found in _by_depth(report)]
    if arguments.json:
        screen.json(as_object(report, line))
    else:
        _show(report, arguments, results, line, screen)
    if report.safety.stopped == "interrupted":
        return INTERRUPTED
    return VIOLATED if report.broken or _is_vacuous(report) else HOLDS


def _is_vacuous(report: Report) -> bool:
    """Did `reference` hold without some fault ever having happened?"""
    return report.profile.name == "reference" and bool(report.unwitnessed)


def _by_depth(report: Report) -> list[Counterexample]:
    return sorted(report.broken.values(), key=lambda found: (found.depth, found.invariant))


def _keep(report: Report, checkpoint: Path, digests: tuple[str, ...]) -> None:
    if report.complete:
        checkpoint.unlink(missing_ok=True)
    else:
        _save(report.safety.search, checkpoint, digests)


def _save(search: Search, checkpoint: Path, digests: tuple[str, ...]) -> None:
    try:
        save(search, checkpoint, digests)
    except OSError as error:
        raise BadInput(f"{checkpoint}: cannot be written: {error.strerror}; choose another place") from None


@contextlib.contextmanager
def _interruptible() -> Iterator[Any]:
    """Ctrl-C stops a search between two blocks, so that it can be kept; a second one ends it at once."""
    searches: list[Search] = []

    def interrupt(number: int, frame: object) -> None:
        if not searches or searches[-1].stop or searches[-1].explored.complete:
            raise KeyboardInterrupt
        searches[-1].stop = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield searches.append
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _progress(model: ModelFile, screen: Screen) -> Iterator[Any]:
    with screen.status(f"{model.name}: beginning") as say:

        def tell(phase: str, seen: Progress) -> None:
            rate = seen.states / max(seen.seconds, 1e-9)
            say(
                f"{model.name}: {seen.states:,} {phase}, {rate:,.0f}/s, depth {seen.depth}, "
                f"{seen.frontier:,} to expand, {seen.bytes / 2**20:,.0f} MiB"
            )

        yield tell


def _line(arguments: argparse.Namespace, model: ModelFile) -> str:
    """The command that repeats this exploration."""
    words = ["kvpoll", "explore", model.name if model.is_shipped else model.path, "--profile", arguments.profile]
    for change in arguments.changes:
        words += ["--set", change]
    for name in arguments.only or ():
        words += ["--invariant", name]
    for option, value in (("--max-states", arguments.max_states), ("--max-depth", arguments.max_depth)):
        words += [] if value is None else [option, str(value)]
    words += ["--first"] * arguments.first + ["--no-symmetry"] * arguments.no_symmetry
    if arguments.liveness is not None:
        words.append("--liveness" if arguments.liveness else "--no-liveness")
    if arguments.spec is not None:
        words += ["--spec", arguments.spec]
    return shlex.join(words)


def _written(
    report: Report, found: Counterexample, protocol: Protocol, arguments: argparse.Namespace, line: str
) -> tuple[Counterexample, bool, str]:
    """(counterexample, does it replay, the line that runs its scenario if it was written)."""
    if arguments.out is None:
        _, result, _ = replay(report, found, protocol, line)
        return found, found.invariant in result.violations, ""
    name = f"{report.model.name}-{arguments.profile}-{found.invariant}"
    place = Path(arguments.out) / f"{name}.toml"
    with open_to_write(place.with_suffix(".jsonl")) as trace:
        text, result, events = replay(report, found, protocol, line, str(place), trace)
    with open_to_write(place) as file:
        file.write(text)
    _picture(f"{report.model.name}, {report.profile.name}", found, events, place.with_suffix(".png"))
    return found, found.invariant in result.violations, result.line


def _picture(title: str, found: Counterexample, events: list[Any], place: Path) -> None:
    """The space-time diagram of a counterexample, where matplotlib is installed."""
    try:
        from kvpoll.reports.behaviours import draw_behaviour
    except ImportError:
        return
    draw_behaviour(place, found.text, title, f"{found.invariant} after {plural(found.depth, 'move')}", events)


def as_object(report: Report, line: str) -> dict[str, Any]:
    """A report as one JSON object."""
    safety, liveness = report.safety, report.liveness
    return {
        "model": report.model.name,
        "profile": report.profile.name,
        "verdict": "breaks" if report.broken else "holds",
        "complete": report.complete,
        "states": safety.states,
        "edges": safety.edges,
        "depth": safety.depth,
        "seconds": round(safety.seconds, 3),
        "bytes": safety.bytes,
        "liveness_states": None if liveness is None else liveness.states,
        "broken": [
            {
                "invariant": found.invariant,
                "length": found.depth,
                "cycle": len(found.cycle),
                "text": found.text,
                "moves": [taken.outcome.label for taken in found.path],
            }
            for found in _by_depth(report)
        ],
        "exercised": sorted(report.exercised),
        "marks": sorted(safety.marks),
        "not_witnessed": report.unwitnessed,
        "repeat": line,
    }


def _show(
    report: Report,
    arguments: argparse.Namespace,
    results: list[tuple[Counterexample, bool, str]],
    line: str,
    screen: Screen,
) -> None:
    safety = report.safety
    screen.prose(f"{report.model.name}: {report.model.title}")
    rate = safety.states / max(safety.seconds, 1e-9)
    screen.say(
        f"profile {report.profile.name}: {safety.states:,} states, {safety.edges:,} moves, depth {safety.depth}, "
        f"{safety.seconds:.1f} s ({rate:,.0f} states/s), {safety.bytes / 2**20:,.0f} MiB"
        + (f"; symmetry {1 + len(safety.search.renames)}" if safety.search.renames else "")
    )
    _show_extent(report, arguments, screen)
    if results:
        rows = [
            [found.invariant, INVARIANTS[found.invariant].name, str(found.depth), "yes" if again else "NO", found.text]
            for found, again, _ in results
        ]
        screen.table(["broken", "name", "moves", "replays", "what was seen"], rows, right=["moves"])
        chosen = next((found for found, _, _ in results if found.invariant == arguments.show), results[0][0])
        _show_path(chosen, screen)
        for _, _, run in results:
            if run:
                screen.say(run)
    else:
        judged = ", ".join(name for name in INVARIANTS if name in report.exercised)
        screen.say(f"holds: {judged}", "green")
    screen.say(line)


def _show_extent(report: Report, arguments: argparse.Namespace, screen: Screen) -> None:
    """What was not seen, so that nobody takes silence for proof."""
    if not report.complete:
        left = f"; `--checkpoint {arguments.checkpoint}` goes on" if arguments.checkpoint else ""
        screen.say(f"NOT complete ({report.safety.stopped}): what follows is of that part{left}", "bold")
    elif report.liveness is None:
        screen.say("what must come true was not judged (the graph is large; --liveness judges it all the same)")
    else:
        screen.say(f"what must come true: judged on {plural(report.liveness.states, 'state')} and their moves")
    if report.unwitnessed:
        screen.say(f"NOT witnessed: {', '.join(report.unwitnessed)}", "yellow")


def _show_path(found: Counterexample, screen: Screen) -> None:
    screen.say(f"{found.invariant}, shortest counterexample ({plural(found.depth, 'move')}):", "bold")
    _show_moves(found.path, 1, screen)
    if found.cycle:
        screen.say("and then for ever:", "bold")
        _show_moves(found.cycle, found.depth + 1, screen)
    elif found.ends == "for ever":
        screen.say("and nothing that is owed can happen any more")
    elif found.ends == "idle":
        screen.say("and every node is idle")


def _show_moves(path: list[Taken], first: int, screen: Screen) -> None:
    for number, taken in enumerate(path[:SHOWN_MOVES], first):
        mark = {"fault": "!", "deadline": "~"}.get(taken.move.kind, " ")
        screen.say(f"  {number:3d} {mark} {taken.outcome.label}")
    if len(path) > SHOWN_MOVES:
        screen.say(f"  ... {len(path) - SHOWN_MOVES} more")
