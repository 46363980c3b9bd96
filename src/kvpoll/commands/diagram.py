"""``kvpoll diagram``: a role's machine as a Mermaid state diagram, for one profile."""

from __future__ import annotations

import argparse

from kvpoll.commands.options import Verbs, add_profile, add_spec, add_verb
from kvpoll.commands.plan import read_spec
from kvpoll.commands.report import drawing_module
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import HOLDS
from kvpoll.spec.source import BadInput, nearest


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(verbs, "diagram", "Print the state machine of a role in Mermaid.", act)
    parser.add_argument("roles", nargs="*", metavar="ROLE", help="sender, receiver, ... (default: all roles)")
    add_profile(parser, "reference", "whose rows are drawn (default reference)")
    add_spec(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Print one diagram after the other, each under a Mermaid comment that names it."""
    protocol = read_spec(arguments.spec)
    profile = protocol.profile(arguments.profile)
    for name in arguments.roles:
        if name not in protocol.roles:
            raise BadInput(f"unknown role {name!r}{nearest(name, protocol.roles)}")
    names = arguments.roles or list(protocol.roles)
    mermaid = drawing_module("kvpoll.reports.diagrams").mermaid
    drawn = {name: mermaid(protocol.roles[name], profile) for name in names}
    if arguments.json:
        screen.json(drawn)
        return HOLDS
    for name, text in drawn.items():
        repeat = f"kvpoll diagram {name} --profile {profile.name}"
        # The line to repeat is a comment on top, so that what is printed can be pasted into a page as it is.
        screen.say(f"%% {repeat}\n{text}".rstrip())
    return HOLDS
