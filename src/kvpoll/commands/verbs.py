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
from kvpoll.commands import (
    campaign,
    check,
    demo,
    diagram,
    explore,
    listing,
    matrix,
    mutants,
    replay,
    report,
    reproduce,
    run,
    shrink,
)
from kvpoll.commands.options import Parser
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import BAD_INPUT, DEFECT, INTERRUPTED
from kvpoll.sim.workload import WorkloadError
from kvpoll.spec.source import BadInput, nearest

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


def parser() -> Parser:
    """All verbs and their options."""
    top = Parser(prog="kvpoll", description="The prefill/decode KV-transfer protocol under test.", epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"kvpoll {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    running = (listing, reproduce, run, campaign, replay, shrink)
    exploring = (explore, check, matrix, mutants)
    for command in (*running, *exploring, report, demo, diagram):
        command.add(verbs)
    verbs.add_parser("bench", help="Measure kvpoll beside its peers.", add_help=False)
    return top


def read(words: Sequence[str]) -> argparse.Namespace:
    """The options of one command line. Raises BadInput; an unknown option is told with the nearest one."""
    arguments, rest = parser().parse_known_args(words)
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
