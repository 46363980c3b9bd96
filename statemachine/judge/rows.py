"""Rows of the table in words: which were taken in a step, and what a profile allows in a state."""

from __future__ import annotations

from typing import Any, Final

from kvpoll.spec.protocol import SAME, Joint, Profile, Role, Row
from kvpoll.statemachine.guards import GUARDS
from kvpoll.statemachine.machine import IllegalFact, Local, Machine

UNFIT = (TypeError, ValueError, IndexError, AttributeError, OverflowError)
"""What a guard or an update raises when a trace gives a fact a detail that it cannot have."""

BITS_MAX: Final = 4096
"""Largest index of a peer rank; a trace that names a higher one is not worth the memory of its mask."""

KNOWN_MAX: Final = 10_000
"""Steps of which a witness remembers the rows."""

INDEXED: Final = frozenset({"DestinationRegistered", "StatusReceived", "PeerAborted", "AbortAcknowledged"})
"""Facts whose detail begins with the index of a peer rank; a mask, or a count, begins the others."""


def is_fit(fact: str, detail: Any) -> bool:
    """May a detail that somebody else wrote be offered to guards and updates? They count bits, and trust numbers."""
    parts = detail if isinstance(detail, tuple) else (detail,)
    numbers = [part for part in parts if isinstance(part, int)]
    if any(isinstance(part, float | list | dict) for part in parts) or any(number < 0 for number in numbers):
        return False
    if not numbers:
        return True
    return numbers[0] <= BITS_MAX if fact in INDEXED else numbers[0].bit_length() <= BITS_MAX


class Witness(Machine):
    """A machine that notes which rows it takes."""

    def __init__(self, role: Role, profile: Profile) -> None:
        super().__init__(role, profile)
        self.rows: list[Row] = []
        self._known: dict[tuple[Local, str, Any], list[Row]] = {}

    def rows_of_step(self, local: Local, fact: str, detail: Any) -> list[Row]:
        """The rows that one step takes, in order; empty when the fact is ignored, illegal or unfit."""
        if not is_fit(fact, detail):
            return []
        key = (local, fact, detail)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            known = self._known[key] = self._look(local, fact, detail)
        return known

    def _look(self, local: Local, fact: str, detail: Any) -> list[Row]:
        self.rows = []
        try:
            self._step(local, fact, detail)
        except (IllegalFact, *UNFIT):
            return []
        return self.rows

    def _take(self, table: Any, state: Any, fact: str, detail: Any, place: int) -> Any:
        cell = table.get((state[place], fact))
        for row in cell.rows if cell is not None else ():
            if all(GUARDS[guard](state, detail, self.profile) for guard in row.guards):
                self.rows.append(row)
                break
        return super()._take(table, state, fact, detail, place)

    def _triggered(self, state: Any, detail: Any) -> Joint | None:
        joint = super()._triggered(state, detail)
        if joint is not None:
            self.rows.append(joint.row)
        return joint


def said_of_fact(role: Role, profile: Profile, local: Local, fact: str, detail: Any) -> str:
    """What the profile makes of a fact in a state: one line."""
    if fact not in role.table.facts:
        return f"{fact}: a {role.name} knows no such fact"
    if not is_fit(fact, detail):
        return f"{fact}: cannot have such a detail"
    machine = Machine(role, profile)
    try:
        after, orders = machine.step(local, fact, detail)
    except IllegalFact:
        return f"{fact}: illegal in {state_of(local)}"
    except UNFIT:
        return f"{fact}: cannot have the detail {detail!r}"
    rows = Witness(role, profile).rows_of_step(local, fact, detail)
    where = f" ({', '.join(f'kvpoll.toml:{row.line}' for row in rows)})" if rows else ""
    if after == local and not orders:
        return f"{fact}: ignored in {state_of(local)}{where}"
    return f"{fact}: -> {state_of(after)}{ordered(tuple(name for name, _ in orders))}{where}"


def ways_on(role: Role, profile: Profile, local: Local) -> tuple[str, ...]:
    """Every row that leads out of this poll under the profile: fact, guards, target, source."""
    found = []
    for row in role.table.rows:
        if local.poll in row.states and row.to not in (SAME, local.poll) and row.exists_in(profile):
            guards = f" if {' and '.join(row.guards)}" if row.guards else ""
            source = f" ({row.source})" if row.source else ""
            found.append(f"{row.fact}{guards}: -> {row.to}{source}")
    return tuple(found)


def state_of(local: Local) -> str:
    """Poll and lease, and the first cause of a failure."""
    cause = f" ({local.cause})" if local.cause is not None else ""
    return f"{local.poll}/{local.lease}{cause}"


def ordered(actions: tuple[str, ...]) -> str:
    """Actions for people."""
    return f" [{', '.join(actions)}]" if actions else ""
