"""Which rules would have to be set otherwise, so that a machine explains what a trace says?

A departure is looked for in three places: the changes that earlier events have already asked for, then every
change of one single rule, then the profiles that kvpoll ships, from which each rule that is not needed is put back.
A departure that needs several changes which no shipped profile makes together is not found; the event then counts
as one that no rule explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Profile, Protocol, Role, Row, Value
from kvpoll.statemachine.machine import RoomMachine

Explained = TypeVar("Explained")

IDENTITY = "identity"
"""The one rule that a machine reads outside its rows (`RoomMachine.step_room` settles whose fact it is)."""


class Change(NamedTuple):
    """A rule, the value that the profile gives it, and the value that would explain the event."""

    rule: str
    has: Value
    needs: Value


class Departures:
    """The neighbours of a profile: the same machine with some rules set otherwise, each compiled once."""

    def __init__(self, protocol: Protocol, profile: Profile) -> None:
        self.protocol = protocol
        self.profile = profile
        self.taken: dict[str, Value] = {}
        self._machines: dict[tuple[str, tuple[tuple[str, Value], ...]], RoomMachine] = {}
        self._singles: dict[str, list[dict[str, Value]]] = {}

    def machine(self, role: str, changes: dict[str, Value] | None = None) -> RoomMachine:
        """The role's machine under the profile with these rules changed."""
        key = (role, tuple(sorted((changes or {}).items())))
        machine = self._machines.get(key)
        if machine is None:
            profile = self.profile.with_rules(changes or {})
            machine = self._machines[key] = RoomMachine(self.protocol.roles[role], profile)
        return machine

    def search(
        self, role: str, explains: Callable[[RoomMachine], Explained | None]
    ) -> tuple[tuple[Change, ...], Explained] | None:
        """The first set of changes under which ``explains`` says something, and what it says; None: there is none.

        The changes are remembered and tried first next time, so that one departure is told in the same words.
        """
        for changes in self._choices(role):
            explained = explains(self.machine(role, changes))
            if explained is not None:
                fewest, found = self._fewest(role, changes, explains, explained)
                self.taken |= fewest
                return self.told(fewest), found
        return None

    def told(self, changes: dict[str, Value]) -> tuple[Change, ...]:
        """Changes with the value that the profile has, in the order of the rules in kvpoll.toml."""
        rules = self.profile.rules
        return tuple(Change(name, rules[name], changes[name]) for name in self.protocol.rules if name in changes)

    def _choices(self, role: str) -> Iterator[dict[str, Value]]:
        if self.taken:
            yield dict(self.taken)
        yield from self._single(role)
        rules = self._rules(self.protocol.roles[role])
        for other in self.protocol.profiles.values():
            changes = {name: other[name] for name in rules if other[name] != self.profile[name]}
            if len(changes) > 1:
                yield changes

    def _single(self, role: str) -> list[dict[str, Value]]:
        """Every other value of every rule that this role's table knows; those already taken come first."""
        known = self._singles.get(role)
        if known is None:
            known = self._singles[role] = [
                {name: value}
                for name in self._rules(self.protocol.roles[role])
                for value in self.protocol.rules[name].values
                if value != self.profile[name]
            ]
        return sorted(known, key=lambda change: not change.items() <= self.taken.items())

    def _rules(self, role: Role) -> list[str]:
        named = {IDENTITY} | {name for row in rows_of(role) for name in row.when}
        return [name for name in self.protocol.rules if name in named]

    def _fewest(
        self,
        role: str,
        changes: dict[str, Value],
        explains: Callable[[RoomMachine], Explained | None],
        found: Explained,
    ) -> tuple[dict[str, Value], Explained]:
        """Put back each rule that is not needed. Not the smallest set there is, but none of it can be spared."""
        for name in list(changes):
            if len(changes) == 1:
                break
            fewer = {other: value for other, value in changes.items() if other != name}
            still = explains(self.machine(role, fewer))
            if still is not None:
                changes, found = fewer, still
        return changes, found

    def invariants(self, changes: Iterable[Change], rows: Iterable[Row]) -> tuple[str, ...]:
        """The invariants that a departure concerns: what the rows that were taken break, else what the rules name."""
        broken = {name for row in rows if not row.exists_in(self.profile) for name in row.defect}
        if not broken:
            broken = {name for change in changes for name in self._named(change)}
        return tuple(name for name in INVARIANTS if name in broken)

    def _named(self, change: Change) -> Iterator[str]:
        source = self.protocol.rules[change.rule].source or ""
        yield from (word for word in source.replace(",", " ").replace(";", " ").split() if word in INVARIANTS)


def rows_of(role: Role) -> Iterator[Row]:
    """Every row of a role: poll, lease, joint."""
    yield from role.table.rows
    if role.lease is not None:
        yield from role.lease.rows
    yield from (joint.row for joint in role.joint)
