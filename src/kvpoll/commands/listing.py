"""``kvpoll list``: what there is to name, so that nobody has to guess."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from kvpoll.commands.options import Verbs, add_profile, add_spec, add_verb
from kvpoll.commands.plan import read_spec
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import HOLDS
from kvpoll.sim.explorer.model import load_model
from kvpoll.sim.explorer.model import names_available as model_names
from kvpoll.sim.faults import kinds
from kvpoll.sim.scenario import find, load_scenario, names_available
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Protocol, Rule
from kvpoll.spec.source import BadInput, nearest

Entry = dict[str, Any]


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(verbs, "list", "Show scenarios, models, profiles, invariants, faults and rules.", act)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)} (default: all)")
    add_profile(parser, "reference", "whose values `rules` shows (default reference)")
    add_spec(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Print the sections that were asked for."""
    for name in arguments.sections:
        if name not in SECTIONS:
            raise BadInput(f"there is no list of {name!r}{nearest(name, SECTIONS)}")
    protocol = read_spec(arguments.spec)
    names = arguments.sections or list(SECTIONS)
    found = {name: SECTIONS[name](protocol, arguments.profile) for name in names}
    if arguments.json:
        screen.json(found)
        return HOLDS
    for name, entries in found.items():
        screen.say(name.upper(), "bold")
        screen.table(list(entries[0]), [[_cell(value) for value in entry.values()] for entry in entries])
        screen.say()
    words = ["kvpoll", "list", *arguments.sections, "--profile", arguments.profile]
    screen.say(" ".join(words))
    return HOLDS


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else "-" if value is None else str(value)


def _scenarios(protocol: Protocol, profile: str) -> list[Entry]:
    del profile
    loaded = [load_scenario(find(name), protocol) for name in names_available()]
    return [
        {
            "name": scenario.name,
            "race": scenario.race,
            "title": scenario.title,
            "profiles": [expectation.label for expectation in scenario.expectations],
        }
        for scenario in loaded
    ]


def _models(protocol: Protocol, profile: str) -> list[Entry]:
    del profile
    loaded = [load_model(name, protocol) for name in model_names()]
    return [
        {
            "name": model.name,
            "kind": model.kind,
            "title": model.title,
            "faults": [f"{kind} {count}" for kind, count in sorted(model.faults.items())],
            "TLC": "yes" if model.checked else "no",
        }
        for model in loaded
    ]


def _profiles(protocol: Protocol, profile: str) -> list[Entry]:
    del profile
    return [
        {"name": entry.name, "title": entry.title, "base": entry.base, "upstream": entry.upstream}
        for entry in protocol.profiles.values()
    ]


def _invariants(protocol: Protocol, profile: str) -> list[Entry]:
    del protocol, profile
    return [
        {
            "id": entry.id,
            "name": entry.name,
            "class": entry.klass,
            "what must hold": entry.sentence,
            "waits for": entry.waits_for,
        }
        for entry in INVARIANTS.values()
    ]


def _faults(protocol: Protocol, profile: str) -> list[Entry]:
    del protocol, profile
    return [
        {
            "kind": kind.name,
            "what it does": kind.says,
            "parameters": [f"{name}={value}" for name, value in kind.parameters.items()],
        }
        for kind in kinds().values()
    ]


def _rules(protocol: Protocol, profile: str) -> list[Entry]:
    chosen = protocol.profile(profile)
    return [
        {
            "rule": rule.name,
            profile: chosen[rule.name],
            "values": _values(rule),
            "source": rule.source or rule.env,
        }
        for rule in protocol.rules.values()
    ]


def _values(rule: Rule) -> list[str]:
    return list(rule.values) if rule.kind == "choice" else [f"a number of {rule.unit}"]


SECTIONS: dict[str, Callable[[Protocol, str], list[Entry]]] = {
    "scenarios": _scenarios,
    "models": _models,
    "profiles": _profiles,
    "invariants": _invariants,
    "faults": _faults,
    "rules": _rules,
}
