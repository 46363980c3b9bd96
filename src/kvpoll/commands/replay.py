"""``kvpoll replay``: does a run repeat byte for byte? Compared with its recording, or with itself."""

from __future__ import annotations

import argparse
import io
import json
import shlex
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from kvpoll.commands.options import Parser, Verbs, add_verb
from kvpoll.commands.plan import prepare
from kvpoll.commands.run import add_arguments, plan_of
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import HOLDS, INTERRUPTED, VIOLATED
from kvpoll.sim.run import Outcome
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import read_header

SHOWN = 300
"""Characters of a differing line that are shown."""


class Difference(NamedTuple):
    """The first line that is not the same; None where one side has ended."""

    number: int
    recorded: str | None
    repeated: str | None


class Comparison(io.TextIOBase):
    """A trace file that is not written but compared, line by line, with one that was."""

    def __init__(self, recorded: IO[str]) -> None:
        self._recorded = recorded
        self._line = ""
        self.lines = 0
        self.first: Difference | None = None

    def write(self, text: str) -> int:
        """Take what the run writes; compare at every end of line."""
        self._line += text
        if text.endswith("\n"):
            self._compare(self._line)
            self._line = ""
        return len(text)

    def _compare(self, repeated: str) -> None:
        if self.first is not None:
            return
        self.lines += 1
        recorded = self._recorded.readline()
        if recorded != repeated:
            self.first = Difference(self.lines, recorded.rstrip("\n") if recorded else None, repeated.rstrip("\n"))

    def finish(self) -> Difference | None:
        """The first difference, now that the run has ended: has the recording ended too?"""
        rest = self._recorded.readline() if self.first is None else ""
        if rest:
            self.first = Difference(self.lines + 1, rest.rstrip("\n"), None)
        return self.first


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Repeat a run and compare it byte for byte, with its recorded trace or with itself."
    parser = add_verb(verbs, "replay", says, act)
    parser.add_argument(
        "what", metavar="TRACE-OR-LINE", help="a file of `kvpoll run --record`, or a quoted `kvpoll run ...`"
    )


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Say whether the repeat is identical, or show the first line that differs."""
    what = arguments.what
    if what.split()[:2] == ["kvpoll", "run"]:
        return _replay_line(what, arguments.json, screen)
    path = Path(what)
    with _open(path) as file:
        header = read_header(_first_line(file, path), f"{path}:1")
        line = header.get("repeat")
        if not isinstance(line, str) or not line:
            raise BadInput(f"{path}:1: the header has no line to repeat; only what kvpoll recorded can be replayed")
        file.seek(0)
        comparison = Comparison(file)
        outcome = _repeat(line, f"{path}:1", cast(IO[str], comparison), screen)
        if outcome.interrupted:
            screen.say(
                f"interrupted: identical for the {comparison.lines:,} lines so far"
                if not comparison.first
                else "interrupted"
            )
            return INTERRUPTED
        difference = comparison.finish()
    _tell(path, comparison.lines, difference, outcome, arguments.json, screen)
    return HOLDS if difference is None else VIOLATED


def _open(path: Path) -> IO[str]:
    try:
        return path.open(encoding="utf-8", newline="\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; give a recorded trace or a quoted line") from None


def _first_line(file: IO[str], path: Path) -> str:
    try:
        return file.readline()
    except UnicodeDecodeError:
        raise BadInput(f"{path}:1: is not text; a kvpoll trace was expected") from None


def _repeat(line: str, where: str, file: IO[str] | None, screen: Screen) -> Outcome:
    """Run what a line says. It is parsed, never handed to a shell."""
    arguments = parse_line(line, where)
    prepared = prepare(plan_of(arguments))
    with screen.progress("replaying", " simulated s") as advance:
        run = prepared.run(arguments.seed, trace=file, record=True, progress=advance)
        run.line = line  # the header holds it, so it must be the same to the last blank
        return run()


def parse_line(line: str, where: str) -> argparse.Namespace:
    """The options in a `kvpoll run ...` line, found at ``where``. Raises BadInput."""
    parser = Parser(prog="kvpoll run", add_help=False)
    add_arguments(parser)
    try:
        words = shlex.split(line)
        if words[:2] != ["kvpoll", "run"]:
            raise BadInput("it does not begin with `kvpoll run`")
        return parser.parse_args(words[2:])
    except ValueError as error:  # BadInput is one; shlex raises another for an open quote
        raise BadInput(f"{where}: cannot repeat {line!r}: {error}") from None


def _replay_line(line: str, as_json: bool, screen: Screen) -> int:
    first, second = (_repeat(line, "replay", None, screen) for _ in range(2))
    if first.interrupted or second.interrupted:
        screen.say("interrupted")
        return INTERRUPTED
    same = first.digest == second.digest
    if as_json:
        screen.json({"identical": same, "digests": [first.digest, second.digest], "repeat": line})
    else:
        told = (
            f"identical: digest {first.digest} both times"
            if same
            else f"differs: digests {first.digest}, {second.digest}"
        )
        screen.say(told, "green" if same else "red")
        screen.say(line)
    return HOLDS if same else VIOLATED


def _tell(
    path: Path, lines: int, difference: Difference | None, outcome: Outcome, as_json: bool, screen: Screen
) -> None:
    if as_json:
        found = None if difference is None else difference._asdict()
        screen.json(
            {
                "identical": difference is None,
                "difference": found,
                "digest": outcome.digest,
                "repeat": outcome.line,
            }
        )
        return
    if difference is None:
        screen.say(f"identical: {lines:,} lines, digest {outcome.digest}", "green")
    else:
        screen.say(f"{path}:{difference.number}: differs", "red")
        screen.say(f"  recorded: {_shown(difference.recorded)}")
        screen.say(f"  repeated: {_shown(difference.repeated)}")
        _explain(difference, screen)
    screen.say(outcome.line)


def _shown(line: str | None) -> str:
    return "(has ended)" if line is None else line if len(line) <= SHOWN else line[:SHOWN] + " ..."


def _explain(difference: Difference, screen: Screen) -> None:
    """A header that differs says why nothing else can be the same."""
    if difference.number != 1 or difference.recorded is None or difference.repeated is None:
        return
    old: dict[str, Any] = json.loads(difference.recorded)
    new: dict[str, Any] = json.loads(difference.repeated)
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    meanings = {"spec": "kvpoll.toml has changed", "scenario_digest": "the scenario file has changed"}
    told = "; ".join(meanings.get(name, f"{name} is another") for name in changed)
    screen.say(f"  since the recording: {told or 'the header was written differently'}")
