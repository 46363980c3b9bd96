"""Options that several verbs share, declared once so that they mean the same everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import IO, Any, NoReturn

from kvpoll.spec.source import BadInput, nearest

Verbs = Any  # what argparse calls _SubParsersAction


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest valid name, and leaves the exit to main."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "".join(action.option_strings[:1]) or action.dest
            names = [str(choice) for choice in action.choices]
            raise BadInput(f"unknown {what} {value!r}{nearest(value, names)}")


def add_verb(verbs: Verbs, name: str, says: str, act: Any, more: str = "") -> argparse.ArgumentParser:
    """Declare a verb and the option that all have."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=says, description=f"{says} {more}".strip())
    parser.set_defaults(act=act, parser=parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def add_spec(parser: argparse.ArgumentParser) -> None:
    """--spec FILE"""
    parser.add_argument("--spec", metavar="FILE", help="another kvpoll.toml than the one that comes with kvpoll")


def add_profile(parser: argparse.ArgumentParser, default: str | None, says: str) -> None:
    """--profile NAME"""
    parser.add_argument("--profile", metavar="NAME", default=default, help=says)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """--seed N"""
    parser.add_argument("--seed", metavar="N", type=whole, default=0, help="seed of all chance (default 0)")


def whole(text: str) -> int:
    """A whole number, for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def counted(text: str) -> int:
    """A whole number above zero, for argparse."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}")
    return number


def lasting(text: str) -> float:
    """A length of time above zero, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def open_to_write(path: Path) -> IO[str]:
    """A text file for writing, its folder made if need be. Raises BadInput."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}; choose another place") from None
