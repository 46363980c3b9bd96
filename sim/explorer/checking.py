"""TLC as a second opinion on a model: the same states, the same verdicts, counterexamples of the same length.

Both sides are told the same model and profile, and nothing of each other: ``search.py`` explores cells and moves,
TLC the module of the model's kind. Then three things are compared. *States*: ``System.view`` maps each state of ours to
variables of the module; TLC dumps its states; both become one digest a state, and the two sets must be equal. What a
module keeps besides those variables (what has happened, for its invariants) is left out. *Verdicts*: the module states
some invariants under their ids; those must be broken on both sides or on none. *Lengths*: with one worker TLC searches
breadth first, so the level at which it first sees an invariant broken is the length of a shortest counterexample.
What must come true (``L1``) is checked by a run of its own, on models that are small enough.

What a kind offers, so that its models can be checked:

* ``spec/tla/<Kind>.tla`` with ``Spec`` (and ``FairSpec``, if fairness stands there); an invariant is a definition
  without parameters named by its id (``S1 == ...``), there or in a module it extends; one with ``~>`` is a promise;
* ``System.view``;
* ``constants(content)``, in ``sim/explorer/<kind>.py`` or ``<kind>_view.py``: the module's constants but for Rules, as
  TLA+ expressions. If ``Watched`` is among them, it is replaced by the set of ids that the run is about;
* if the explorer changes the profile to suit the model, ``scaled(content, profile)`` in ``sim/explorer/<kind>.py``.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvpoll.sim.explorer.judges import NOT_JUDGED, judges
from kvpoll.sim.explorer.model import ModelFile
from kvpoll.sim.explorer.properties import PROMPT, broken_promises
from kvpoll.sim.explorer.search import Search
from kvpoll.sim.explorer.tla_values import parse, to_tla
from kvpoll.sim.explorer.tlc import TLA_FOLDER, Answer, Checker, Job, check
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput
from kvpoll.spec.tables_tla import rules_record

LIVENESS_STATES: Final = 2_000
"""Above this many states TLC needs minutes for what must come true."""

MEMORY_BYTES: Final = 2 << 30
NOTED: Final = "Noted"
REGISTER: Final = 7
"""TLC's register in which the ids that were found broken are kept."""

_DEFINITION = re.compile(r"^([SLRO]\d+) ==(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_EXTENDS = re.compile(r"^EXTENDS (.*)$", re.MULTILINE)
_VARIABLE = re.compile(r"(?:/\\ )?([A-Za-z_][A-Za-z0-9_]*) = ")
_NOTE = re.compile(r'<<"broken", "(\w+)", (\d+)>>')


class CheckerFailed(BadInput):
    """TLC itself went wrong, or was stopped; the text is its own."""


@dataclass(frozen=True)
class Statements:
    """Ids that a module states: as predicates of a state, and as what must come true."""

    invariants: tuple[str, ...]
    promises: tuple[str, ...]


@dataclass
class Side:
    """What one side says. states: digests; broken: invariant -> length of the shortest counterexample found.

    promises: of those checked, whether each is kept. variables: of the module, that were compared. example: the text of
    a state that the other side does not have, by its digest.
    """

    states: set[int] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    promises: dict[str, bool] = field(default_factory=dict)
    seconds: float = 0.0
    variables: tuple[str, ...] = ()
    example: Callable[[int], str] = str

    @property
    def digest(self) -> str:
        """The set of states in sixteen letters, whatever their order."""
        return f"{sum(self.states) & (1 << 64) - 1:016x}"


@dataclass
class Compared:
    """Both sides of one model under one profile. differences: a sentence each; none when they agree."""

    model: str
    profile: str
    ours: Side
    theirs: Side
    differences: list[str]

    @property
    def examples(self) -> dict[str, str]:
        """One state that only this side has, for each side that has one."""
        strange = {
            "explorer": (self.ours, self.ours.states - self.theirs.states),
            "TLC": (self.theirs, self.theirs.states - self.ours.states),
        }
        texts = {name: next(filter(None, map(side.example, states)), "") for name, (side, states) in strange.items()}
        return {name: text for name, text in texts.items() if text}


# -- what the module states


def statements(module: str, modules: Mapping[str, str]) -> Statements:
    """The invariants of a module and of those that it extends. Raises BadInput when there is no such module."""
    found: dict[str, str] = {}
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        text = _text_of(name, modules)
        if name in seen or text is None:
            continue
        seen.add(name)
        found |= {each[1]: each[2] for each in _DEFINITION.finditer(text) if each[1] in INVARIANTS}
        for extended in _EXTENDS.findall(text):
            todo += [each.strip() for each in extended.split(",")]
    if not seen:
        raise BadInput(f"there is no module {module} in spec/tla; check the kind of the model")
    judged = [name for name in INVARIANTS if name in found and name not in NOT_JUDGED]
    promises = tuple(name for name in judged if "~>" in found[name])
    return Statements(tuple(name for name in judged if name not in promises), promises)


def _text_of(name: str, modules: Mapping[str, str]) -> str | None:
    path = TLA_FOLDER / f"{name}.tla"
    if name in modules:
        return modules[name]
    return path.read_text(encoding="utf-8") if path.is_file() else None


def noted(module: str, invariants: Iterable[str]) -> str:
    """A module whose one invariant always holds, and says at which level each of these is first seen broken."""
    said = " /\\ ".join(f'Say("{name}", {name})' for name in invariants) or "TRUE"
    note = f'PrintT(<<"broken", id, TLCGet("level")>>) /\\ TLCSet({REGISTER}, TLCGet({REGISTER}) \\union {{id}})'
    return "\n".join([
        f"---- MODULE {NOTED} ----", f"EXTENDS {module}", f"ASSUME TLCSet({REGISTER}, {{}})",
        f"Say(id, holds) == holds \\/ id \\in TLCGet({REGISTER}) \\/ ({note})", f"{NOTED} == {said}", "=" * 20, "",
    ])  # fmt: skip


# -- digests


class Digests:
    """A state as a number of 64 bits; equal states have equal numbers on both sides, and from run to run.

    A variable has far fewer values than there are states, so each is written down once.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, Any], bytes] = {}
        self._texts: dict[tuple[str, str], bytes] = {}

    def of_value(self, variable: str, value: Any) -> bytes:
        """The digest of a canonical value."""
        known = self._values.get((variable, value))
        if known is None:
            text = f"{variable} = {to_tla(value)}"
            known = self._values[variable, value] = blake2b(text.encode(), digest_size=8).digest()
        return known

    def of_text(self, variable: str, text: str) -> bytes:
        """The digest of a value that TLC has printed."""
        known = self._texts.get((variable, text))
        if known is None:
            known = self._texts[variable, text] = self.of_value(variable, parse(text))
        return known

    @staticmethod
    def of_state(parts: Iterable[bytes]) -> int:
        """The digest of a state, from those of its variables in the order of their names."""
        return int.from_bytes(blake2b(b"".join(parts), digest_size=8).digest(), "big")


# -- both sides


def compare(
    model: ModelFile, protocol: Protocol, profile: Profile, checker: Checker,
    limit_s: float | None = None, modules: Mapping[str, str] | None = None,
) -> Compared:  # fmt: skip
    """Explore the model, let TLC check it, and say where they differ.

    modules: texts that replace modules of ``spec/tla``. limit_s: for each run of TLC. Raises BadInput when the kind of
    the model offers no comparison, and CheckerFailed when TLC does not come to an answer.
    """
    task = _Task(model, protocol, profile, dict(modules or {}))
    digests = Digests()
    ours = _explored(task, digests)
    theirs = _checked(task, digests, ours, checker, limit_s)
    return Compared(model.name, profile.name, ours, theirs, list(_differences(ours, theirs)))


def job_of(model: ModelFile, protocol: Protocol, profile: Profile) -> Job:
    """TLC's job of counting the states of a model, with nothing to judge."""
    return Job(model.module, _definitions(_Task(model, protocol, profile, {}), ()))


@dataclass(frozen=True)
class _Task:
    """What is compared."""

    model: ModelFile
    protocol: Protocol
    profile: Profile
    modules: dict[str, str]

    @property
    def ids(self) -> Statements:
        """What the module states."""
        return statements(self.model.module, self.modules)


def _differences(ours: Side, theirs: Side) -> Iterator[str]:
    more, fewer = len(ours.states - theirs.states), len(theirs.states - ours.states)
    if more or fewer:
        yield (
            f"states: {more:,} of {len(ours.states):,} only in the explorer, "
            f"{fewer:,} of {len(theirs.states):,} only in TLC"
        )
    for name in INVARIANTS:
        here, there = ours.broken.get(name), theirs.broken.get(name)
        if here != there:
            yield f"{name}: {_said(here)} in the explorer, {_said(there)} in TLC"
    for name, kept in theirs.promises.items():
        if ours.promises[name] != kept:
            yield f"{name}: {_kept(ours.promises[name])} in the explorer, {_kept(kept)} in TLC"


def _said(length: int | None) -> str:
    return "holds" if length is None else f"is broken after {length} moves"


def _kept(is_kept: bool) -> str:
    return "comes true" if is_kept else "does not come true"


# -- our side


def _explored(task: _Task, digests: Digests) -> Side:
    """Explore the model, without symmetry; its states as the module sees them."""
    began = time.monotonic()
    model, protocol = task.model, task.protocol
    system = model.build(protocol, task.profile)
    view = system.view
    if view is None:
        raise BadInput(f"model {model.name!r}: kind {model.kind!r} cannot be compared with TLC; it has no view")
    judged = judges(protocol.bounds, (*task.ids.invariants, *task.ids.promises))
    search = Search(system, judged, symmetry=False, keep_graph=True, memory_bytes=MEMORY_BYTES)
    search.run()
    side = Side(variables=tuple(sorted(view(system.initial()))))
    _judge(side, search, task.ids)
    rows = np.unique(np.concatenate(search.rows)[:, : len(system.cells)], axis=0)
    places: dict[int, int] = {}
    for place, row in enumerate(rows):
        values = view(_cells_of(search, row))
        places[digests.of_state(digests.of_value(name, values[name]) for name in side.variables)] = place
    side.states = set(places)
    side.example = lambda digest: _as_text(view(_cells_of(search, rows[places[digest]])))
    side.seconds = time.monotonic() - began
    return side


def _cells_of(search: Search, row: Any) -> dict[str, Any]:
    """The values of a row that has no judges, by cell."""
    return {values.cell.name: values.values[number] for values, number in zip(search.values, row, strict=False)}


def _judge(side: Side, search: Search, ids: Statements) -> None:
    found = search.explored.found
    for name, each in found.items():
        # A node at rest is looked at in a step of its own, which changes nothing.
        side.broken[name] = each.depth - (each.path[-1].move.name == "survey")
    promises = broken_promises(search)
    side.promises = {name: name not in promises for name in ids.promises}
    # Within seconds means that no deadline is waited for, so a predicate can say it. Of a longer bound (L4) a predicate
    # says only what breaks it at once.
    side.broken |= {name: promises[name].depth for name in PROMPT if name in promises and name in ids.invariants}


def _as_text(variables: Mapping[str, Any]) -> str:
    return "\n".join(f"/\\ {name} = {to_tla(variables[name])}" for name in sorted(variables))


# -- TLC's side


def _checked(task: _Task, digests: Digests, ours: Side, checker: Checker, limit_s: float | None) -> Side:
    """Let TLC check the module of the model's kind. Raises CheckerFailed when it does not come to an answer."""
    side = Side(variables=ours.variables)
    strange: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="kvpoll-check-") as name:
        dump = Path(name) / "states.dump"
        answer = _run(task, NOTED, task.ids.invariants, checker, limit_s, dump)
        for values, text in _dumped(dump, side.variables):
            digest = digests.of_state(digests.of_text(each, values[each]) for each in side.variables)
            side.states.add(digest)
            if digest not in ours.states and not strange:
                strange[digest] = text
    side.broken = {found[1]: int(found[2]) for said in answer.said if (found := _NOTE.fullmatch(said))}
    side.seconds = answer.seconds
    side.example = lambda digest: strange.get(digest, "")
    if len(ours.states) <= LIVENESS_STATES:
        for promise in task.ids.promises:
            answer = _run(task, task.model.module, (promise,), checker, limit_s)
            side.promises[promise] = answer.verdict == "ok"
            side.seconds += answer.seconds
    return side


def _run(
    task: _Task, module: str, ids: tuple[str, ...], checker: Checker, limit_s: float | None, dump: Path | None = None
) -> Answer:
    """Safety, with a dump, when the module is the one that takes notes; else a promise."""
    is_safety = module == NOTED
    modules = {**task.modules, NOTED: noted(task.model.module, ids)} if is_safety else task.modules
    job = Job(
        module, _definitions(task, ids), specification="Spec" if is_safety else _fair(task),
        invariants=(NOTED,) if is_safety else (), properties=() if is_safety else ids, modules=modules,
    )  # fmt: skip
    answer = check(job, checker, dump=dump, limit_s=limit_s)
    if answer.verdict not in (("ok",) if is_safety else ("ok", "property")):
        why = f"it was stopped after {limit_s:g} s" if limit_s and answer.verdict == "stopped" else answer.message
        raise CheckerFailed(f"TLC on {task.model.name} under {task.profile.name}: {why}; see spec/tla/README.md")
    return answer


def _fair(task: _Task) -> str:
    text = _text_of(task.model.module, task.modules) or ""
    return "FairSpec" if re.search(r"^FairSpec ==", text, re.MULTILINE) else "Spec"


def _definitions(task: _Task, ids: tuple[str, ...]) -> dict[str, str]:
    """The module's constants for a run about these ids."""
    kind, content = import_module(f"{__package__}.{task.model.kind}"), task.model.content
    beside = f"{__package__}.{task.model.kind}_view"
    places = [kind, *([import_module(beside)] if find_spec(beside) else [])]
    offering = next((each for each in places if hasattr(each, "constants")), None)
    if offering is None:
        raise BadInput(f"model {task.model.name!r}: kind {task.model.kind!r} gives TLC no constants")
    profile = kind.scaled(content, task.profile) if hasattr(kind, "scaled") else task.profile
    definitions: dict[str, str] = {"Rules": rules_record(task.protocol, profile), **offering.constants(content)}
    if "Watched" in definitions:
        definitions["Watched"] = to_tla(set(ids))
    return definitions


def _dumped(path: Path, wanted: Iterable[str]) -> Iterator[tuple[dict[str, str], str]]:
    """The states of a dump: {variable: text} of those wanted, and the whole text of these."""
    names = set(wanted)
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("State "):
                if lines:
                    yield _split(lines, names)
                lines = []
            elif line.strip():
                lines.append(line)
    if lines:
        yield _split(lines, names)


def _split(lines: list[str], names: set[str]) -> tuple[dict[str, str], str]:
    """A value may go on over lines; those begin with a space."""
    parts: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if line[0] != " " and (found := _VARIABLE.match(line)):
            current = [line[found.end() :]]
            if found[1] in names:
                parts[found[1]] = current
        else:
            current.append(line)
    values = {name: "".join(part) for name, part in parts.items()}
    return values, "".join(f"/\\ {name} = {text}" for name, text in sorted(values.items()))
