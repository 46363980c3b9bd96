"""``kvpoll report``: the figures."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from kvpoll.commands.options import Verbs, add_verb
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import HOLDS
from kvpoll.spec.source import BadInput


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(verbs, "report", "Draw every race, before and after its repair.", act)
    parser.add_argument("--out", metavar="DIR", default="reports/figures", help="folder (default reports/figures)")


def drawing_module(name: str) -> Any:
    """A module that draws, imported when it is needed: matplotlib is an extra, and slow to load."""
    try:
        return import_module(name)
    except ImportError as error:
        if "matplotlib" not in str(error):
            raise
        raise BadInput("figures need matplotlib, which is missing: pip install 'kvpoll[reports]'") from None


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Draw, and name what was drawn."""
    races = drawing_module("kvpoll.reports.races")
    with screen.status("drawing") as tell:
        paths = races.draw_all(Path(arguments.out), tell)
    if arguments.json:
        screen.json({"figures": [str(path) for path in paths], "repeat": f"kvpoll report --out {arguments.out}"})
        return HOLDS
    for path in paths:
        screen.say(str(path))
    screen.say(f"kvpoll report --out {arguments.out}")
    return HOLDS
