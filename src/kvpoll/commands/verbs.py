"""All verbs, and the one place where whatever goes wrong in them becomes a line and an exit status.

Nothing that a user does ends in a traceback. What they gave wrong is one line with place, cause and mend, and
status 2; a defect of kvpoll is one line too, and status 3, with the details behind KVPOLL_DEBUG=1.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from kvpoll import __version__
from kvpoll.commands.options import Parser
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import BAD_INPUT, DEFECT, INTERRUPTED
from kvpoll.sim.workload import WorkloadError
from kvpoll.spec.source import BadInput, nearest

VERBS = {
    "list": "listing", "reproduce": "reproduce", "run": "run", "campaign": "campaign", "replay": "replay",
    "shrink": "shrink", "explore": "explore", "check": "check", "matrix": "matrix", "mutants": "mutants",
    "report": "report", "demo": "demo", "diagram": "diagram", "up": "up", "serve": "serve", "doctor": "doctor",
    "validate": "validate",
}  # fmt: skip
"""The module of every verb. Only that of the verb that was given is loaded: some need a second for it."""

EPILOG = "Exit status: 0 holds, 1 violated, 2 bad input, 3 a defect of kvpoll, 130 interrupted."


def perform(words: list[str]) -> int:
    """Do what a command line says and return the exit status. Lets only KeyboardInterrupt through."""
    try:
        return _act(words)
    except (BadInput, WorkloadError) as error:
        return _complain(_one_line(error), BAD_INPUT)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("KVPOLL_DEBUG"):
            traceback.print_exc()
        told = f"a defect of kvpoll: {type(error).__name__}: {_one_line(error)}"
        return _complain(f"{told}; please report it, with what KVPOLL_DEBUG=1 prints", DEFECT)


def _act(words: list[str]) -> int:
    if not words:
        parser().print_help(sys.stderr)
        return BAD_INPUT
    if words[0] == "bench":  # has options of its own
        return int(import_module("kvpoll.bench").main(words[1:]) or 0)
    arguments = read(words)
    return int(arguments.act(arguments, Screen()))


def parser(verb: str | None = None) -> Parser:
    """This verb and its options; all of them when it is none that is known."""
    top = Parser(prog="kvpoll", description="The prefill/decode KV-transfer protocol under test.", epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"kvpoll {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in [verb] if verb in VERBS else VERBS:
        import_module(f"kvpoll.commands.{VERBS[name]}").add(verbs)
    verbs.add_parser("bench", help="Measure kvpoll beside its peers.", add_help=False)
    return top


def read(words: Sequence[str]) -> argparse.Namespace:
    """The options of one command line. Raises BadInput; an unknown option is told with the nearest one."""
    arguments, rest = parser(next(iter(words), None)).parse_known_args(words)
    if rest:
        verb: argparse.ArgumentParser = arguments.parser
        if not rest[0].startswith("-"):
            raise BadInput(f"{verb.prog} does not know what to do with {rest[0]!r}; see `{verb.prog} --help`")
        given = rest[0].partition("=")[0]
        options = [name for action in verb._actions for name in action.option_strings if name.startswith("--")]
        raise BadInput(f"{verb.prog} has no option {given!r}{nearest(given, options)}")
    return arguments


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _complain(message: str, status: int) -> int:
    print(f"kvpoll: {message}", file=sys.stderr)
    return status
