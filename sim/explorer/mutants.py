"""Mutants: single mistakes, each of which must break the invariant that it names, and be found (``spec/mutants.toml``).

A checker that has never said no may be asleep. A mutant is one change of the protocol as data (a row dropped or
altered), of a guard or an update that rows name, or, where only drivers carry out what an invariant is about, of one
named function. It is *caught* when the explorer finds its invariant broken on its model, and the same model without
the mistake keeps it.

A row that is dropped leaves its cell to the rows after it; if there are none, the fact is ignored there (or illegal
where the table says so). ``mistakes.py`` holds what else may be changed, and how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import kvpoll.spec
from kvpoll.sim.explorer.judges import NOT_JUDGED, judges
from kvpoll.sim.explorer.mistakes import (
    FUNCTIONS,
    GUARD_MISTAKES,
    Change,
    FunctionChange,
    NameChange,
    RowChange,
    RuleChange,
    nothing,
    replaced,
)
from kvpoll.sim.explorer.model import ModelFile, load_model
from kvpoll.sim.explorer.properties import broken_promises
from kvpoll.sim.explorer.search import Search
from kvpoll.sim.explorer.system import System
from kvpoll.spec.invariants import INVARIANTS, TimedMonitor
from kvpoll.spec.protocol import SAME, Joint, Profile, Protocol, Role, Row, Table, check_rule_values
from kvpoll.spec.source import BadInput, Source, nearest
from kvpoll.statemachine.guards import GUARDS
from kvpoll.statemachine.machine import IllegalFact
from kvpoll.statemachine.updates import UPDATES

PATH: Final = Path(str(kvpoll.spec.__path__[0])) / "mutants.toml"

LIMIT: Final = 200_000
DEEPEST: Final = 100
"""States, and depth, after which a mutant that has not been caught is given up: a mistake may make a finite model
infinite. No sound model is half as deep."""

JUDGED: Final = tuple(
    name for name, invariant in INVARIANTS.items() if invariant.monitor is not None and name not in NOT_JUDGED
)
"""The invariants that the explorer judges; each needs a mutant."""

DROPPED: Final = "dropped"
TABLES: Final = ("poll", "lease", "joint")
_MUTANT = {
    "id": str, "title": str, "invariant": str, "model": str, "profile": str, "faults": dict, "given": dict,
    "row": dict, "guard": str, "update": str, "function": str, "rules": dict, "becomes": object,
}  # fmt: skip
_KINDS: Final = ("row", "guard", "update", "function", "rules")
_SHARED = {"guards": list, "update": list, "actions": list, "cause": str}
_SELECT: Final = {
    "row": {"role": str, "table": str, "from": list, "fact": str, "to": str, "when": dict, **_SHARED},
    "joint": {
        "role": str, "table": str, "poll": list, "lease": list, "to_poll": str, "to_lease": str, "when": dict,
        **_SHARED,
    },
}  # fmt: skip
_ALTER: Final = {"row": {"to": str, **_SHARED}, "joint": {"to_poll": str, "to_lease": str, **_SHARED}}


@dataclass(frozen=True)
class Mutant:
    """One mistake: the invariant that must catch it, and where it shows.

    faults: how many of each kind the model may have, if fewer than it says. given: rules that are set otherwise with
    and without the mistake. line: where it stands in its file.
    """

    id: str
    title: str
    invariant: str
    model: str
    profile: str
    faults: Mapping[str, int] | None
    given: Mapping[str, Any]
    change: Change
    line: int

    @property
    def stage(self) -> tuple[Any, ...]:
        """Where, and for what, it is examined; mutants with the same stage are compared with the same sound run."""
        faults = None if self.faults is None else tuple(sorted(self.faults.items()))
        return self.invariant, self.model, faults, self.profile, tuple(sorted(self.given.items()))


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    depth: moves to where its invariant is broken, None if it survived. states, seconds: of the search for it.
    text: what the monitor says; why: what is wrong if it was not caught. also: other invariants found broken.
    """

    mutant: Mutant
    depth: int | None
    states: int
    seconds: float
    text: str = ""
    why: str = ""
    also: tuple[str, ...] = ()

    @property
    def caught(self) -> bool:
        """Is its invariant broken with the mistake, and kept without?"""
        return self.depth is not None and not self.why


# ------------------------------------------------------------------------------------------------------ reading


def load_mutants(protocol: Protocol, path: Path = PATH) -> list[Mutant]:
    """Read and check a file of mutants. Raises BadInput naming file and line."""
    return parse_mutants(Source(path), protocol)


def parse_mutants(source: Source, protocol: Protocol) -> list[Mutant]:
    """Check a parsed file. Raises BadInput at the offending line."""
    source.require_known((), source.data, ("mutant",), "section")
    entries = source.data.get("mutant", [])
    if not isinstance(entries, list) or not entries:
        raise source.error((), "a file of mutants needs at least one [[mutant]]")
    mutants = [_Reader(source, protocol, place, entry).mutant() for place, entry in enumerate(entries)]
    known: set[str] = set()
    for place, mutant in enumerate(mutants):
        if mutant.id in known:
            raise source.error(("mutant", place, "id"), f"there is another mutant {mutant.id!r} above")
        known.add(mutant.id)
    return mutants


class _Reader:
    """Reads one [[mutant]]."""

    def __init__(self, source: Source, protocol: Protocol, place: int, entry: Any) -> None:
        self.source = source
        self.protocol = protocol
        self.path = ("mutant", place)
        self.entry = entry

    def mutant(self) -> Mutant:
        source, entry = self.source, self.entry
        source.require_forms(self.path, entry, _MUTANT)
        source.require_all(self.path, entry, ("id", "title", "invariant", "model"), "a mutant")
        self._require("invariant", entry["invariant"], JUDGED, "invariant that the explorer judges")
        profile = entry.get("profile", "reference")
        self._require("profile", profile, self.protocol.profiles, "profile")
        for key in ("given", "rules"):
            check_rule_values(source, (*self.path, key), entry.get(key, {}), self.protocol.rules)
        with self._placed("model"):
            model = load_model(entry["model"], self.protocol)
        return Mutant(
            entry["id"], entry["title"], entry["invariant"], entry["model"], profile, self._faults(model),
            entry.get("given", {}), self._change(self.protocol.profile(profile)), source.line_of(self.path),
        )  # fmt: skip

    @contextlib.contextmanager
    def _placed(self, key: str) -> Iterator[None]:
        try:
            yield
        except BadInput as error:
            raise self._error(key, str(error)) from None

    def _error(self, key: str, cause: str) -> BadInput:
        return self.source.error((*self.path, key), cause)

    def _require(self, key: str, name: str, valid: Iterable[str], what: str) -> None:
        if name not in valid:
            raise self._error(key, f"unknown {what} {name!r}{nearest(name, valid)}")

    def _faults(self, model: ModelFile) -> Mapping[str, int] | None:
        """Fewer faults than the model may have, so that the search is short; never more or others."""
        faults: dict[str, Any] | None = self.entry.get("faults")
        if faults is None:
            return None
        self.source.require_known((*self.path, "faults"), faults, model.faults, f"fault of model {model.name!r}")
        for kind, count in faults.items():
            if type(count) is not int or not 0 <= count <= model.faults[kind]:
                raise self._error(
                    "faults", f"`{kind}` must be from 0 to {model.faults[kind]}, as in the model, got {count!r}"
                )
        most = model.faults.get("total", sum(model.faults.values()))
        return {"total": min(most, sum(count for kind, count in faults.items() if kind != "total")), **faults}

    def _change(self, profile: Profile) -> Change:
        kinds = [kind for kind in _KINDS if kind in self.entry]
        if len(kinds) != 1:
            given = " and ".join(kinds) or "none"
            raise self.source.error(self.path, f"a mutant changes one of {', '.join(_KINDS)}; this one names {given}")
        kind = kinds[0]
        if (kind == "rules") == ("becomes" in self.entry):
            told = "has no" if kind == "rules" else "needs a"
            raise self._error(kind, f"a mutant of `{kind}` {told} `becomes`")
        read: dict[str, Callable[[Profile], Change]] = {
            "row": self._row, "guard": self._guard, "update": self._update, "function": self._function,
            "rules": self._rules,
        }  # fmt: skip
        return read[kind](profile.with_rules(self.entry.get("given", {})))

    def _rules(self, profile: Profile) -> Change:
        rules = self.entry["rules"]
        return RuleChange(rules, "rules " + ", ".join(f"{name} = {value}" for name, value in rules.items()))

    def _guard(self, profile: Profile) -> Change:
        name, becomes = self.entry["guard"], self.entry["becomes"]
        self._require("guard", name, GUARDS, "guard")
        self._require("becomes", becomes, GUARD_MISTAKES, "mistake of a guard")
        return NameChange(GUARDS, name, GUARD_MISTAKES[becomes](GUARDS[name]), f"guard {name}: {becomes}")

    def _update(self, profile: Profile) -> Change:
        name, becomes = self.entry["update"], self.entry["becomes"]
        self._require("update", name, UPDATES, "update")
        if becomes != "nothing":
            self._require("becomes", becomes, (*UPDATES, "nothing"), "update")
        instead = nothing if becomes == "nothing" else UPDATES[becomes]
        return NameChange(UPDATES, name, instead, f"update {name}: {becomes}")

    def _function(self, profile: Profile) -> Change:
        name, becomes = self.entry["function"], self.entry["becomes"]
        self._require("function", name, FUNCTIONS, "function with a mistake")
        self._require("becomes", becomes, FUNCTIONS[name], f"mistake of {name}")
        return FunctionChange(name, becomes, f"{name.partition(':')[2]}: {becomes}")

    # -- rows

    def _row(self, profile: Profile) -> Change:
        """Find the one row that is meant, by what it says."""
        chosen = self.entry["row"]
        path = (*self.path, "row")
        self._require("row", chosen.get("role", ""), self.protocol.roles, "role")
        role, name = self.protocol.roles[chosen["role"]], chosen.get("table", "poll")
        self._require("row", name, TABLES, "table")
        if name != "poll" and role.lease is None:
            raise self._error("row", f"role {role.name!r} has no {name} table")
        form = "joint" if name == "joint" else "row"
        self.source.require_forms(path, chosen, _SELECT[form])
        self._check_names(path, role, name, chosen)
        rows: Sequence[Any] = role.joint if form == "joint" else _table(role, name).rows
        found = [place for place, row in enumerate(rows) if _plain(row).exists_in(profile) and _fits(row, chosen)]
        if len(found) != 1:
            raise self._error("row", _puzzled(rows, found, chosen, role.name, profile))
        return self._altered(role, name, form, found[0], rows[found[0]])

    def _altered(self, role: Role, name: str, form: str, place: int, row: Any) -> Change:
        becomes = self.entry["becomes"]
        said = f"{role.name} {name}: {_said(row)}"
        if becomes == DROPPED:
            return RowChange(role.name, name, place, None, f"{said}: dropped")
        path = (*self.path, "becomes")
        if not isinstance(becomes, dict):
            raise self._error("becomes", f'a row becomes "{DROPPED}" or a table of what it says instead')
        self.source.require_forms(path, becomes, _ALTER[form])
        self._check_names(path, role, name, becomes)
        told = ", ".join(f"{key} = {value}" for key, value in becomes.items())
        return RowChange(role.name, name, place, _alter(row, becomes), f"{said}: {told}")

    def _check_names(self, path: tuple[str | int, ...], role: Role, table: str, entry: Mapping[str, Any]) -> None:
        """Every state, fact, guard, update and action that is named exists."""
        lease = role.lease or role.table
        own = lease if table == "lease" else role.table
        valid: dict[str, tuple[Iterable[str], str]] = {
            "from": (own.states, "state"), "to": ((*own.states, SAME), "state"), "fact": (own.facts, "fact"),
            "poll": (role.table.states, "state"), "lease": (lease.states, "state"),
            "to_poll": ((*role.table.states, SAME), "state"), "to_lease": ((*lease.states, SAME), "state"),
            "guards": (GUARDS, "guard"), "update": (UPDATES, "update"), "actions": (self.protocol.actions, "action"),
        }  # fmt: skip
        for key, value in entry.items():
            if key in valid:
                names = [value] if isinstance(value, str) else value
                plain = [name.partition("(")[0] for name in names]
                known, what = valid[key]
                unknown = next((each for each in plain if each not in known), None)
                if unknown is not None:
                    raise self.source.error((*path, key), f"unknown {what} {unknown!r}{nearest(unknown, known)}")


def _table(role: Role, name: str) -> Table:
    table = role.lease if name == "lease" else role.table
    assert table is not None
    return table


def _plain(row: Row | Joint) -> Row:
    return row.row if isinstance(row, Joint) else row


def _fits(row: Row | Joint, chosen: Mapping[str, Any]) -> bool:
    """Does a row say all that is asked for? What is not mentioned may be anything."""
    said = _fields(row)
    for key, value in chosen.items():
        if key in ("from", "poll", "lease"):
            if set(said[key]) != set(value):
                return False
        elif key == "when":
            if {name: [each] if isinstance(each, str) else each for name, each in value.items()} != said[key]:
                return False
        elif key in said and said[key] != value:
            return False
    return True


def _fields(row: Row | Joint) -> dict[str, Any]:
    """What a row says, as the file would have it."""
    plain = _plain(row)
    actions = [name if argument is None else f"{name}({argument})" for name, argument in plain.actions]
    said = {
        "guards": list(plain.guards), "update": list(plain.update), "actions": actions, "cause": plain.cause or "",
        "when": {name: list(values) for name, values in plain.when.items()},
    }  # fmt: skip
    if isinstance(row, Joint):
        return {"poll": row.polls, "lease": row.leases, "to_poll": row.to_poll, "to_lease": row.to_lease, **said}
    return {"from": row.states, "fact": row.fact, "to": row.to, **said}


def _said(row: Row | Joint) -> str:
    """A row in a few words."""
    said = _fields(row)
    guards = f" if {' and '.join(said['guards'])}" if said["guards"] else ""
    if isinstance(row, Joint):
        goal = "/".join(each for each in (row.to_poll, row.to_lease) if each != SAME) or SAME
        return f"{'|'.join(row.polls)} with {'|'.join(row.leases)}{guards} -> {goal}"
    return f"{'|'.join(row.states)} on {row.fact}{guards} -> {row.to}"


def _puzzled(
    rows: Sequence[Row | Joint], found: Sequence[int], chosen: Mapping[str, Any], role: str, profile: Profile
) -> str:
    """Why a row is not to be found, and what there is instead."""
    if found:
        lines = " and ".join(str(_plain(rows[place]).line) for place in found)
        return f"several rows of role {role!r} are meant (lines {lines} of kvpoll.toml); add guards, actions or when"
    here = [row for row in rows if _plain(row).exists_in(profile)]
    near = [row for row in here if _is_near(row, chosen)]
    there = f"; there are: {'; '.join(map(_said, near[:5]))}" if near else ""
    return f"role {role!r} has no such row in profile {profile.name!r}{there}"


def _is_near(row: Row | Joint, chosen: Mapping[str, Any]) -> bool:
    if isinstance(row, Joint):
        return bool(set(row.polls) & set(chosen.get("poll", ())))
    return row.fact == chosen.get("fact")


def _alter(row: Row | Joint, becomes: Mapping[str, Any]) -> Row | Joint:
    plain = _plain(row)
    changed = dataclasses.replace(
        plain,
        to=becomes.get("to", plain.to),
        guards=tuple(becomes.get("guards", plain.guards)),
        update=tuple(becomes.get("update", plain.update)),
        actions=tuple(map(_action, becomes["actions"])) if "actions" in becomes else plain.actions,
        cause=(becomes["cause"] or None) if "cause" in becomes else plain.cause,
    )
    if not isinstance(row, Joint):
        return changed
    to_poll, to_lease = becomes.get("to_poll", row.to_poll), becomes.get("to_lease", row.to_lease)
    return dataclasses.replace(row, row=changed, to_poll=to_poll, to_lease=to_lease)


def _action(text: str) -> tuple[str, str | None]:
    name, _, argument = text.rstrip(")").partition("(")
    return name, argument or None


# ---------------------------------------------------------------------------------------------------- examining


class Examiner:
    """Examines mutants of one protocol; remembers the sound runs that they are compared with."""

    def __init__(self, protocol: Protocol, limit: int = LIMIT) -> None:
        self.protocol = protocol
        self.limit = limit
        self._sound: dict[tuple[Any, ...], _Hunt] = {}

    def __call__(self, mutant: Mutant) -> Verdict:
        """Is it caught? Raises BadInput when the mistake makes the model itself fail."""
        model, profile = self._stage(mutant)
        change, began = mutant.change, time.monotonic()
        try:
            with replaced(change.patches()):
                system = model.build(change.protocol(self.protocol), change.profile(profile))
                hunt = _Hunt(system, mutant.invariant, self.protocol, self.limit)
                hunt.go_on()
        except (IllegalFact, AssertionError, LookupError, TypeError, ValueError, AttributeError) as error:
            told = f"{type(error).__name__} {error}".strip()
            where = f"mutant {mutant.id!r} (mutants.toml:{mutant.line})"
            raise BadInput(f"{where}: model {model.name!r} cannot make this mistake: {told}") from error
        seconds = time.monotonic() - began
        depth, text = hunt.broken.get(mutant.invariant, (None, ""))
        also = tuple(name for name in hunt.broken if name != mutant.invariant)
        why = self._why(mutant, hunt, model, profile)
        return Verdict(mutant, depth, hunt.explored.states, seconds, text, why, also)

    def _stage(self, mutant: Mutant) -> tuple[ModelFile, Profile]:
        model = load_model(mutant.model, self.protocol)
        if mutant.faults is not None:
            content = dataclasses.replace(model.content, faults=dict(mutant.faults))
            model = dataclasses.replace(model, faults=mutant.faults, content=content)
        return model, self.protocol.profile(mutant.profile).with_rules(mutant.given)

    def _why(self, mutant: Mutant, hunt: _Hunt, model: ModelFile, profile: Profile) -> str:
        """Why it does not count as caught; empty if it does."""
        invariant = mutant.invariant
        if invariant not in hunt.broken:
            seen = f"the first {hunt.explored.states:,} states, {hunt.explored.depth} moves deep"
            return "survives" if hunt.explored.complete else f"survives {seen}"
        sound = self._sound_run(mutant, model, profile)
        sound.go_on(hunt.broken[invariant][0])
        if invariant in sound.broken:
            return f"proves nothing: without the mistake, too, {sound.broken[invariant][1]}"
        if sound.timed and not sound.explored.complete:
            return f"proves nothing: without the mistake there are more than {self.limit:,} states, too many to judge"
        return ""

    def _sound_run(self, mutant: Mutant, model: ModelFile, profile: Profile) -> _Hunt:
        if mutant.stage not in self._sound:
            system = model.build(self.protocol, profile)
            self._sound[mutant.stage] = _Hunt(system, mutant.invariant, self.protocol, self.limit)
        return self._sound[mutant.stage]


class _Hunt:
    """A search for the state in which one invariant breaks, under all judges; one that has found it stops.

    For a promise (L1, L2, ...) that is the whole graph, under its own judge alone, and then its fair behaviours.
    broken: invariant -> (depth, text), of those too that were found broken on the way.
    """

    def __init__(self, system: System, invariant: str, protocol: Protocol, limit: int) -> None:
        self.invariant = invariant
        self.timed = _is_timed(invariant)
        self.limit = limit
        only = (invariant,) if self.timed else None
        self.search = Search(system, judges(protocol.bounds, only), keep_graph=self.timed)
        self.explored = self.search.explored
        self.broken: dict[str, tuple[int, str]] = {}

    def go_on(self, depth: int | None = None) -> None:
        """Search on: to this depth at least (a promise: to the end), or until there is nothing left to find."""
        while not self._is_over() and (self.timed or depth is None or self.explored.depth < depth):
            self.search.run(max_depth=self.explored.depth + 1)
            self.broken = {name: (found.depth, found.text) for name, found in self.explored.found.items()}
            if self.timed and self.explored.complete:
                promises = broken_promises(self.search)
                self.broken |= {name: (broken.depth, broken.text) for name, broken in promises.items()}

    def _is_over(self) -> bool:
        explored = self.explored
        given_up = explored.states >= self.limit or explored.depth >= DEEPEST
        return self.invariant in self.broken or explored.complete or given_up


def _is_timed(invariant: str) -> bool:
    monitor = INVARIANTS[invariant].monitor
    return monitor is not None and issubclass(monitor, TimedMonitor)
