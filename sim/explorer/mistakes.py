"""What a mutant may change, how that is undone, and the mistakes that functions may have.

Changes of the data are made on a copy. Guards, updates and functions are replaced where they are looked up, for the
length of one search, and put back whatever happens; so mutants live one at a time. Replacements of functions are
written down here, since a file of data cannot hold them; each is made from the function that it replaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from kvpoll.spec.protocol import Joint, Profile, Protocol, Row, Table
from kvpoll.statemachine.agreement import SUCCESS, WAITING, Decision, Report

Patch = tuple[Any, Any, Any]
"""(dictionary or object, name in it, what stands there meanwhile)."""


class Change:
    """What a mutant does to the protocol. The default does nothing."""

    said = ""
    """In a few words, for people."""

    def protocol(self, protocol: Protocol) -> Protocol:
        """The protocol with the mistake in its tables."""
        return protocol

    def profile(self, profile: Profile) -> Profile:
        """The profile with the mistake in its rules."""
        return profile

    def patches(self) -> list[Patch]:
        """What is replaced while the mutant lives."""
        return []


@dataclass(frozen=True)
class RowChange(Change):
    """A row, or a joint row, by its place in its table, and what it becomes: None if it is dropped."""

    role: str
    table: str
    place: int
    becomes: Row | Joint | None
    said: str

    def protocol(self, protocol: Protocol) -> Protocol:
        role = protocol.roles[self.role]
        if self.table == "joint":
            changed = dataclasses.replace(role, joint=self._swap(role.joint))
        elif self.table == "lease":
            assert role.lease is not None
            changed = dataclasses.replace(role, lease=self._swap_in(role.lease))
        else:
            changed = dataclasses.replace(role, table=self._swap_in(role.table))
        digest = f"{protocol.digest}+{self.said}"
        return dataclasses.replace(protocol, digest=digest, roles={**protocol.roles, self.role: changed})

    def _swap_in(self, table: Table) -> Table:
        return dataclasses.replace(table, rows=self._swap(table.rows))

    def _swap(self, rows: tuple[Any, ...]) -> tuple[Any, ...]:
        instead = () if self.becomes is None else (self.becomes,)
        return (*rows[: self.place], *instead, *rows[self.place + 1 :])


@dataclass(frozen=True)
class NameChange(Change):
    """A guard or an update that rows name, replaced wherever they name it."""

    table: Mapping[str, Any]
    name: str
    replacement: Callable[..., Any]
    said: str

    def patches(self) -> list[Patch]:
        return [(self.table, self.name, self.replacement)]


@dataclass(frozen=True)
class FunctionChange(Change):
    """A function or method, replaced in every module that has it by name."""

    name: str
    becomes: str
    said: str

    def patches(self) -> list[Patch]:
        module, _, path = self.name.partition(":")
        *owners, last = path.split(".")
        holder: Any = import_module(f"kvpoll.{module}")
        for owner in owners:
            holder = getattr(holder, owner)
        original = getattr(holder, last)
        replacement = FUNCTIONS[self.name][self.becomes](original)
        if owners:
            return [(holder, last, replacement)]
        return [(each, name, replacement) for each, name in _holders(original)]


def _holders(original: Any) -> list[tuple[Any, str]]:
    """(module, name) wherever this function was imported to."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("kvpoll.")]
    return [(module, name) for module in modules for name, value in vars(module).items() if value is original]


@dataclass(frozen=True)
class RuleChange(Change):
    """Other values of some rules: for what drivers do as a rule tells them, and no table says."""

    rules: Mapping[str, Any]
    said: str

    def profile(self, profile: Profile) -> Profile:
        return profile.with_rules(self.rules)


@contextlib.contextmanager
def replaced(patches: Iterable[Patch]) -> Iterator[None]:
    """Other values in dictionaries and attributes while the body runs; the old ones afterwards, whatever happens."""
    undo: list[Patch] = []
    try:
        for holder, name, value in patches:
            undo.append((holder, name, holder[name] if isinstance(holder, dict) else vars(holder)[name]))
            _put(holder, name, value)
        yield
    finally:
        for holder, name, value in reversed(undo):
            _put(holder, name, value)


def _put(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


# -- of guards, updates and functions


def nothing(state: Any, detail: Any) -> Any:
    """An update that forgets to do anything."""
    return state


GUARD_MISTAKES: Final[dict[str, Callable[[Any], Any]]] = {
    "always": lambda guard: lambda state, detail, profile: True,
    "never": lambda guard: lambda state, detail, profile: False,
    "negated": lambda guard: lambda state, detail, profile: not guard(state, detail, profile),
}
"""What a guard may become: made from the guard that it was."""


def _healthy(original: Any) -> Any:
    return lambda profile, process_alive, registered, loops_running: process_alive


def _attention_rank(original: Any) -> Any:
    return lambda profile, replica, dp_attention: replica if dp_attention else 0


def _no_conflict(original: Any) -> Any:
    return lambda *arguments: None


def _largest(original: Any) -> Any:
    """Ranks agree on the report of the rank that is farthest ahead."""

    def merge(contributions: Sequence[Mapping[str, Report]]) -> dict[str, Report]:
        first, *others = contributions
        return {rid: max([report, *(each.get(rid, report) for each in others)]) for rid, report in first.items()}

    return merge


def _concludes_early(original: Any) -> Any:
    """A transfer counts as over once the pages are published."""

    def decide(rid: str, report: Report) -> Any:
        return original(rid, report._replace(poll=SUCCESS) if report.poll >= WAITING else report)

    return decide


def _drops_what_failed_here(original: Any) -> Any:
    def decisions(profile: Any, ring: Any, queue: Any, failed: Any) -> list[Decision]:
        dropped = [Decision(rid, "drop", failed[rid]) for rid in queue if rid in failed]
        return [*dropped, *original(profile, ring, queue, failed)]

    return decisions


def _act_for_another(original: Any) -> Any:
    """Whatever was meant for another incarnation moves the one that is there."""

    def step_foreign(self: Any, room: Any, fact: Any) -> Any:
        return self.step_room(room, fact._replace(incarnation=room.incarnation))

    return step_foreign


def _page_stays_free(original: Any) -> Any:
    def reserve(self: Any, own: Any) -> Any:
        page = original(self, own)
        if page is not None:
            self.free.add(page)
        return page

    return reserve


def _page_is_lost(original: Any) -> Any:
    def release(self: Any, own: Any) -> None:
        first = min(self.free, default=None)
        if first is not None:
            self.free.discard(first)
        original(self, own)

    return release


def _post_first(original: Any) -> Any:
    """The write is handed to the transport before the forward pass is over."""

    def send(self: Any, *arguments: Any) -> Iterator[Any]:
        for outcome in original(self, *arguments):
            late = [event for event in outcome.events if type(event).__name__ == "Computed"]
            rest = [event for event in outcome.events if type(event).__name__ != "Computed"]
            yield outcome._replace(events=(*rest, *late))

    return send


def _by_own_reports(original: Any) -> Any:
    """A rank decides by what it knows itself instead of what the ranks have agreed on."""
    own_reports = import_module("kvpoll.sim.explorer.group_rank").own_reports

    def carry_out(self: Any, turn: Any) -> None:
        original(self, turn._replace(merged=own_reports(self)))

    return carry_out


FUNCTIONS: Final[dict[str, dict[str, Callable[[Any], Any]]]] = {
    "statemachine.health:reports_healthy": {"process_alive": _healthy},
    "statemachine.agreement:merge_by_request": {"largest": _largest},
    "statemachine.agreement:decide_transfer": {"concludes_early": _concludes_early},
    "statemachine.agreement:stage_decisions": {"drops_what_failed_here": _drops_what_failed_here},
    "statemachine.dp_rank:known_rank": {"attention_rank": _attention_rank},
    "statemachine.dp_rank:conflict": {"unseen": _no_conflict},
    "statemachine.machine:RoomMachine._step_foreign": {"acts_for_another": _act_for_another},
    "sim.explorer.process:Pen.reserve": {"page_stays_free": _page_stays_free},
    "sim.explorer.process:Pen.release": {"page_is_lost": _page_is_lost},
    "sim.explorer.transfer_engines:Engines._send": {"posts_first": _post_first},
    "sim.explorer.group_rank:RankPen.carry_out": {"by_own_reports": _by_own_reports},
}
"""The functions that a mutant may alter, and the mistakes that each may have, made from the function that it was."""
