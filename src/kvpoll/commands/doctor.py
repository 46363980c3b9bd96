"""``kvpoll doctor``: which transports work on this machine, and what is missing for those that do not."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from kvpoll.commands.options import Verbs, add_verb, lasting
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import HOLDS, VIOLATED
from kvpoll.spec.source import BadInput, nearest

if TYPE_CHECKING:
    from kvpoll.runtime.transports.doctor import Finding

COLUMNS = ("name", "installed", "importable", "usable", "missing, or good to know")


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Try every transport and dependency in a process of its own; say what is missing and the mend."
    more = "Exit status 0 when the default transports (memory, shm, tcp) work, 1 otherwise."
    parser = add_verb(verbs, "doctor", says, act, more)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (default: everything)")
    parser.add_argument("--limit-s", metavar="S", type=lasting, help="seconds that one may take (default 60)")


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Examine, show, judge."""
    for needed in ("numpy", "msgspec"):
        # Without these there is no runtime to ask; everything else is asked in a child.
        if importlib.util.find_spec(needed) is None:
            raise BadInput(f"{needed} is not installed, and the runtime needs it; pip install 'kvpoll[runtime]'")
    from kvpoll.runtime.transports import NAMES
    from kvpoll.runtime.transports.doctor import DEPENDENCIES, LIMIT_S, examine, healthy

    known = (*NAMES, *DEPENDENCIES)
    for name in arguments.names:
        if name not in known:
            raise BadInput(f"doctor does not know {name!r}{nearest(name, known)}")
    names = arguments.names or known
    with screen.progress("trying") as advance:
        findings = examine(names, arguments.limit_s or LIMIT_S, lambda number: advance(number, len(names)))
    works = healthy(findings)
    if arguments.json:
        screen.json({"healthy": works, "findings": [finding._asdict() for finding in findings]})
    else:
        _show(findings, works, screen)
        screen.say(" ".join(["kvpoll", "doctor", *arguments.names]))
    return HOLDS if works else VIOLATED


def _show(findings: list[Finding], works: bool, screen: Screen) -> None:
    for kind in ("transport", "dependency"):
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            screen.say({"transport": "TRANSPORTS", "dependency": "DEPENDENCIES"}[kind], "bold")
            screen.table(COLUMNS, [_row(finding) for finding in of_kind])
            screen.say()
    broken = [finding.name for finding in findings if finding.kind == "transport" and not finding.usable]
    said = f"not usable here: {', '.join(broken)}" if broken else "every transport that was tried works"
    screen.say(said if works else f"a default transport does not work; {said}", None if works else "red")


def _row(finding: Finding) -> list[str]:
    return [
        finding.name, finding.installed or "-", _word(finding.importable), _word(finding.usable), finding.note or "-",
    ]  # fmt: skip


def _word(answer: bool | None) -> str:
    return "-" if answer is None else "yes" if answer else "no"
