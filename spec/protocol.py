"""Loads ``kvpoll.toml`` and refuses a protocol that leaves anything unsaid.

``load()`` returns the one `Protocol` that everything else works from. What is checked: every name is declared;
every state can be reached in some profile; a terminal state has no exit that `reference` could take; and every
(role, state, fact) is a transition, ignored, or illegal in every profile. An error names file, line and mend.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpoll.spec.invariants import Bounds
from kvpoll.spec.source import BadInput, Rows, Source, nearest
from kvpoll.spec.vocabulary import POLL_NUMBERS, UNPOLLED

SPEC_PATH = Path(__file__).with_name("kvpoll.toml")
SAME = "="

Value = str | int | float

_TABLES = dict.fromkeys(("poll", "action", "rule", "profile", "bounds", "role"), dict)
_RULE = {"kind": str, "values": dict, "unit": str, "env": str, "source": str}
_PROFILE = {"title": str, "base": str, "upstream": str, "rules": dict}
_MACHINE = {"states": list, "initial": str, "transition": Rows, "ignored": dict, "illegal": dict}
_ROLE = {"title": str, "terminal": list, "facts": dict, "lease": dict, "stale": dict, **_MACHINE}
_LEASE = {"facts": list, "joint": Rows, **_MACHINE}
_ORDERS = {"guards": list, "update": list, "actions": list, "when": dict, "defect": list, "source": str}
_ROW = {"from": list, "fact": str, "to": str, "cause": str, **_ORDERS}
_JOINT = {"poll": list, "lease": list, "to_poll": str, "to_lease": str, **_ORDERS}


@dataclass(frozen=True)
class Rule:
    """A named switch of the protocol. Choices have ``values`` (name -> meaning); numbers have a ``unit``."""

    name: str
    kind: str
    values: Mapping[str, str] = field(default_factory=dict)
    unit: str | None = None
    env: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Profile:
    """A named choice of every rule."""

    name: str
    title: str
    rules: Mapping[str, Value]
    base: str | None = None
    upstream: str | None = None

    def __getitem__(self, rule: str) -> Value:
        return self.rules[rule]

    def number(self, rule: str) -> float:
        """The value of a numeric rule."""
        return float(self.rules[rule])

    def with_rules(self, changes: Mapping[str, Value]) -> Profile:
        """This profile with some rules set otherwise (a scenario's switch). Names must have been checked."""
        if not changes:
            return self
        label = ",".join(f"{name}={value}" for name, value in sorted(changes.items()))
        return Profile(f"{self.name}+{label}", self.title, {**self.rules, **changes}, self.name, self.upstream)


@dataclass(frozen=True)
class Row:
    """One line of a table: in these states, on this fact, under these guards, do this."""

    states: tuple[str, ...]
    fact: str
    guards: tuple[str, ...]
    to: str
    update: tuple[str, ...]
    actions: tuple[tuple[str, str | None], ...]
    when: Mapping[str, tuple[str, ...]]
    cause: str | None
    defect: tuple[str, ...]
    source: str | None
    line: int

    def exists_in(self, profile: Profile) -> bool:
        """Do the profile's rules choose this row?"""
        return all(profile.rules[rule] in values for rule, values in self.when.items())


@dataclass(frozen=True)
class Joint:
    """A row triggered by a pair of states: when poll and lease stand like this, move on."""

    polls: tuple[str, ...]
    leases: tuple[str, ...]
    to_poll: str
    to_lease: str
    row: Row


@dataclass(frozen=True)
class Table:
    """One machine: its states, the facts it hears, its rows and what it says of all other cells."""

    states: tuple[str, ...]
    initial: str
    terminal: tuple[str, ...]
    facts: Mapping[str, str]
    rows: tuple[Row, ...]
    ignored: Mapping[str, tuple[str, ...]]
    illegal: Mapping[str, tuple[str, ...]]

    def cell(self, state: str, fact: str, profile: Profile) -> list[Row]:
        """The rows that may be taken in ``state`` on ``fact`` under ``profile``, in order of trial."""
        return [row for row in self.rows if row.fact == fact and state in row.states and row.exists_in(profile)]


@dataclass(frozen=True)
class Role:
    """A role of the protocol: its main table and, where it holds pages, its lease table and joint rows."""

    name: str
    title: str
    table: Table
    lease: Table | None
    joint: tuple[Joint, ...]
    stale: Mapping[str, tuple[tuple[str, str | None], ...]]


@dataclass(frozen=True)
class Protocol:
    """Everything that ``kvpoll.toml`` says. ``digest`` identifies it in traces."""

    path: str
    digest: str
    actions: Mapping[str, str]
    rules: Mapping[str, Rule]
    profiles: Mapping[str, Profile]
    roles: Mapping[str, Role]
    bounds: Bounds

    def profile(self, name: str) -> Profile:
        """The profile of that name. Raises BadInput with the nearest name."""
        if name not in self.profiles:
            raise BadInput(f"unknown profile {name!r}{nearest(name, self.profiles)}")
        return self.profiles[name]


@functools.lru_cache(maxsize=4)
def load(path: Path = SPEC_PATH) -> Protocol:
    """Read and check the protocol. Raises BadInput."""
    return parse(Source(path))


def parse(source: Source) -> Protocol:
    """Check a parsed file and build the Protocol it describes. Raises BadInput."""
    top = ("version", "poll", "action", "rule", "profile", "bounds", "role")
    source.require_known((), source.data, top, "section")
    for section in top:
        if section not in source.data:
            raise source.error((), f"section [{section}] is missing")
    for section, form in _TABLES.items():
        source.require_form((section,), section, source.data[section], form)
    if source.data["poll"] != POLL_NUMBERS:
        raise source.error(("poll",), f"the poll numbers are fixed by every engine: {POLL_NUMBERS}")
    actions = source.data["action"]
    rules = {name: _rule(source, name) for name in source.data["rule"]}
    profiles: dict[str, Profile] = {}
    for name in source.data["profile"]:
        profiles[name] = _profile(source, name, rules, profiles)
    if "reference" not in profiles:
        raise source.error(("profile",), "the profile 'reference' is missing")
    reader = _RoleReader(source, actions, rules)
    roles = {name: reader.role(name) for name in source.data["role"]}
    for role in roles.values():
        _check_role(source, role, profiles)
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:12]
    return Protocol(source.name, digest, actions, rules, profiles, roles, _bounds(source))


def _rule(source: Source, name: str) -> Rule:
    path = ("rule", name)
    entry = source.data["rule"][name]
    source.require_forms(path, entry, _RULE)
    kind = entry.get("kind")
    if kind not in ("choice", "number"):
        raise source.error(path, f'rule {name!r} needs kind = "choice" or "number"')
    if (kind == "choice") != ("values" in entry) or (kind == "number") != ("unit" in entry):
        raise source.error(path, f"rule {name!r}: a choice has `values`, a number has a `unit`")
    return Rule(name, **entry)


def _profile(source: Source, name: str, rules: Mapping[str, Rule], known: Mapping[str, Profile]) -> Profile:
    path = ("profile", name)
    entry = source.data["profile"][name]
    source.require_forms(path, entry, _PROFILE)
    base = entry.get("base")
    if base is not None and base not in known:
        raise source.error((*path, "base"), f"unknown base profile {base!r}{nearest(base, known)}; it must stand above")
    given = entry.get("rules", {})
    check_rule_values(source, (*path, "rules"), given, rules)
    merged = {**(known[base].rules if base else {}), **given}
    missing = rules.keys() - merged.keys()
    if missing:
        raise source.error(
            path, f"profile {name!r} does not choose rule {sorted(missing)[0]!r} and has no base that does"
        )
    return Profile(name, entry.get("title", ""), merged, base, entry.get("upstream"))


def check_rule_values(
    source: Source, path: tuple[str | int, ...], given: Mapping[str, Any], rules: Mapping[str, Rule]
) -> None:
    """Every rule named is declared and has a legal value. Raises BadInput at the offending line."""
    source.require_known(path, given, rules, "rule")
    for name, value in given.items():
        rule = rules[name]
        if rule.kind == "choice" and not isinstance(value, str):
            raise source.error((*path, name), f"rule {name!r} must be one of {', '.join(rule.values)}, got {value!r}")
        if rule.kind == "choice" and value not in rule.values:
            raise source.error((*path, name), f"rule {name!r} has no value {value!r}{nearest(value, rule.values)}")
        if rule.kind == "number" and (type(value) not in (int, float) or not 0 <= value < float("inf")):
            raise source.error(
                (*path, name), f"rule {name!r} is a number of {rule.unit} and not negative, got {value!r}"
            )


def _bounds(source: Source) -> Bounds:
    entry = source.data["bounds"]
    source.require_known(("bounds",), entry, Bounds._fields, "bound")
    for name in Bounds._fields:
        if not isinstance(entry.get(name), int | float) or entry[name] < 0:
            raise source.error(("bounds", name), f"bound {name!r} must be a number that is not negative")
    return Bounds(**entry)


class _RoleReader:
    """Turns the [role.*] sections into Roles; knows the names that rows may use."""

    def __init__(self, source: Source, actions: Mapping[str, str], rules: Mapping[str, Rule]) -> None:
        self.source = source
        self.actions = actions
        self.rules = rules

    def role(self, name: str) -> Role:
        path = ("role", name)
        entry = self.source.data["role"][name]
        self.source.require_forms(path, entry, _ROLE)
        needed = ("title", "states", "initial", "terminal", "facts", "transition")
        self.source.require_all(path, entry, needed, f"role {name!r}")
        table = self._table(path, entry, entry["facts"])
        self.source.require_known((*path, "stale"), entry.get("stale", {}), entry["facts"], "fact")
        for fact, texts in entry.get("stale", {}).items():
            self.source.require_form((*path, "stale", fact), fact, texts, list)
        stale = {
            fact: tuple(self._action((*path, "stale", fact), text) for text in texts)
            for fact, texts in entry.get("stale", {}).items()
        }
        if "lease" not in entry:
            return Role(name, entry["title"], table, None, (), stale)
        lease_entry = entry["lease"]
        lease_path = (*path, "lease")
        self.source.require_forms(lease_path, lease_entry, _LEASE)
        self.source.require_all(lease_path, lease_entry, ("states", "initial", "facts", "transition"), "a lease")
        self.source.require_known((*lease_path, "facts"), lease_entry["facts"], entry["facts"], "fact")
        facts = {fact: entry["facts"][fact] for fact in lease_entry["facts"]}
        lease = self._table(lease_path, lease_entry, facts)
        joint = tuple(
            self._joint((*lease_path, "joint", index), row, table, lease)
            for index, row in enumerate(lease_entry.get("joint", []))
        )
        return Role(name, entry["title"], table, lease, joint, stale)

    def _table(self, path: tuple[str | int, ...], entry: Mapping[str, Any], facts: Mapping[str, str]) -> Table:
        states = tuple(entry["states"])
        self.source.require_known((*path, "initial"), [entry["initial"]], states, "state")
        self.source.require_known((*path, "terminal"), entry.get("terminal", []), states, "state")
        rows = tuple(
            self._row((*path, "transition", index), row, states, facts) for index, row in enumerate(entry["transition"])
        )
        said = {kind: self._cells((*path, kind), entry.get(kind, {}), states, facts) for kind in ("ignored", "illegal")}
        terminal = tuple(entry.get("terminal", ()))
        return Table(states, entry["initial"], terminal, facts, rows, said["ignored"], said["illegal"])

    def _cells(
        self,
        path: tuple[str | int, ...],
        entry: Mapping[str, Any],
        states: tuple[str, ...],
        facts: Mapping[str, str],
    ) -> dict[str, tuple[str, ...]]:
        self.source.require_known(path, entry, facts, "fact")
        for fact, names in entry.items():
            self.source.require_form((*path, fact), fact, names, list)
            for name in names:
                if name not in states:
                    raise self.source.error((*path, fact), f"unknown state {name!r}{nearest(name, states)}")
        return {fact: tuple(names) for fact, names in entry.items()}

    def _row(
        self,
        path: tuple[str | int, ...],
        entry: Mapping[str, Any],
        states: tuple[str, ...],
        facts: Mapping[str, str],
    ) -> Row:
        fail = self.source.error
        self.source.require_forms(path, entry, _ROW)
        self.source.require_all(path, entry, ("from", "fact", "to"), "a row")
        for name in entry["from"]:
            if name not in states:
                raise fail(path, f"unknown state {name!r}{nearest(name, states)}")
        if entry["fact"] not in facts:
            raise fail(path, f"unknown fact {entry['fact']!r}{nearest(entry['fact'], facts)}")
        if entry["to"] != SAME and entry["to"] not in states:
            raise fail(path, f"unknown state {entry['to']!r}{nearest(entry['to'], states)}")
        return self._build(path, entry, tuple(entry["from"]), entry["fact"], entry["to"])

    def _build(
        self,
        path: tuple[str | int, ...],
        entry: Mapping[str, Any],
        states: tuple[str, ...],
        fact: str,
        to: str,
    ) -> Row:
        return Row(
            states=states,
            fact=fact,
            guards=tuple(entry.get("guards", ())),
            to=to,
            update=tuple(entry.get("update", ())),
            actions=tuple(self._action(path, text) for text in entry.get("actions", ())),
            when=self._when(path, entry.get("when", {})),
            cause=entry.get("cause"),
            defect=tuple(entry.get("defect", ())),
            source=entry.get("source"),
            line=self.source.line_of(path),
        )

    def _action(self, path: tuple[str | int, ...], text: str) -> tuple[str, str | None]:
        parts = re.fullmatch(r"(\w+)(?:\((\w+)\))?", text)
        if parts is None or parts.group(1) not in self.actions:
            raise self.source.error(path, f"unknown action {text!r}{nearest(text.split('(')[0], self.actions)}")
        return parts.group(1), parts.group(2)

    def _when(self, path: tuple[str | int, ...], entry: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        wanted = {name: value if isinstance(value, list) else [value] for name, value in entry.items()}
        for name, values in wanted.items():
            if name not in self.rules:
                raise self.source.error(path, f"unknown rule {name!r}{nearest(name, self.rules)}")
            for value in map(str, values):
                if value not in self.rules[name].values:
                    raise self.source.error(
                        path, f"rule {name!r} has no value {value!r}{nearest(value, self.rules[name].values)}"
                    )
        return {name: tuple(values) for name, values in wanted.items()}

    def _joint(self, path: tuple[str | int, ...], entry: Mapping[str, Any], poll: Table, lease: Table) -> Joint:
        self.source.require_forms(path, entry, _JOINT)
        self.source.require_all(path, entry, ("poll", "lease"), "a joint row")
        for key, states in (("poll", poll.states), ("lease", lease.states)):
            for name in [*entry[key], entry.get(f"to_{key}", SAME)]:
                if name != SAME and name not in states:
                    raise self.source.error(path, f"unknown state {name!r}{nearest(name, states)}")
        row = self._build(path, entry, (), "", SAME)
        to_poll, to_lease = entry.get("to_poll", SAME), entry.get("to_lease", SAME)
        return Joint(tuple(entry["poll"]), tuple(entry["lease"]), to_poll, to_lease, row)


def _check_role(source: Source, role: Role, profiles: Mapping[str, Profile]) -> None:
    where = ("role", role.name)
    for table in filter(None, (role.table, role.lease)):
        for profile in profiles.values():
            _check_cells(source, role, table, profile)
    for row in [*_all_rows(role), *(joint.row for joint in role.joint)]:
        if row.defect and row.exists_in(profiles["reference"]):
            raise BadInput(
                f"{source.name}:{row.line}: a row that breaks {row.defect[0]} exists in 'reference'; give it a `when`"
            )
    _check_exits(source, role, profiles["reference"])
    unreached = _unreached(role)
    if unreached:
        raise source.error((*where, "states"), f"no row of role {role.name!r} ever leads to state {unreached[0]!r}")


def _all_rows(role: Role) -> Iterator[Row]:
    yield from role.table.rows
    if role.lease is not None:
        yield from role.lease.rows


def _check_cells(source: Source, role: Role, table: Table, profile: Profile) -> None:
    for fact in table.facts:
        for state in table.states:
            rows = table.cell(state, fact, profile)
            ignored = state in table.ignored.get(fact, ())
            illegal = state in table.illegal.get(fact, ())
            if ignored and illegal:
                raise source.error(
                    ("role", role.name), f"role {role.name!r}: {fact} in {state} is both ignored and illegal"
                )
            if not ignored and not illegal and not any(not row.guards for row in rows):
                raise source.error(
                    ("role", role.name, "facts"),
                    f"role {role.name!r}, profile {profile.name!r}: nothing is said of {fact} in {state}"
                    f"{' when no guard holds' if rows else ''}; add a transition, or list it as ignored or illegal",
                )


def _check_exits(source: Source, role: Role, reference: Profile) -> None:
    for row in role.table.rows:
        for state in row.states:
            leaves = row.to not in (SAME, *UNPOLLED, state)
            if state in role.table.terminal and leaves and row.exists_in(reference):
                raise BadInput(
                    f"{source.name}:{row.line}: terminal state {state!r} has an exit to {row.to!r} in 'reference'"
                )


def _unreached(role: Role) -> list[str]:
    reached = {role.table.initial} | {row.to for row in role.table.rows} | {joint.to_poll for joint in role.joint}
    missing = [state for state in role.table.states if state not in reached]
    if role.lease is not None:
        held = {role.lease.initial} | {row.to for row in role.lease.rows} | {joint.to_lease for joint in role.joint}
        missing += [state for state in role.lease.states if state not in held]
    return missing
