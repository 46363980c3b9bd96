"""Writing scenarios: a run in which nothing is drawn any more, as a value and as the text of a file.

A `Case` names every request and every fault of a run. Whoever changes runs (the reducer) or makes them up (a
stateful test) works on cases; the text of a case, read again, is the same run.
"""

from __future__ import annotations

import dataclasses
import json
import random
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvpoll.sim.faults import Fault
from kvpoll.sim.scenario import Expectation, Scenario, Timing
from kvpoll.sim.topology import Topology
from kvpoll.sim.workload import Arrival
from kvpoll.spec.protocol import Profile, Protocol, Value
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape

WIDTH = 116

FOR_EVER_S = 1e9
"""How long a fault of a file lasts that does not say; such a fault ends with the hostile phase."""


class Ask(NamedTuple):
    """One request of a case. leaves_at_s: when its client goes away, if it does."""

    at_s: float
    input_tokens: int
    output_tokens: int
    leaves_at_s: float | None = None


@dataclass(frozen=True)
class Case:
    """One run with nothing left to draw but what the cluster itself draws from ``seed``.

    asks are in order of time. profile is the name of one of kvpoll.toml; rules are those that the run sets otherwise.
    """

    topology: Topology
    timing: Timing
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    profile: str
    rules: Mapping[str, Value] = field(default_factory=dict)
    seed: int = 0

    def scenario(self, name: str = "case") -> Scenario:
        """The scenario that a file of this case would give, without the way through its text."""
        arrivals = [Arrival(*ask[:3]) for ask in self.asks]
        return Scenario(
            name=name,
            path=name,
            digest="",
            title=name,
            story="",
            upstream=None,
            race=None,
            topology=self.topology,
            timing=self.timing,
            workload=lambda chance, until_s: list(arrivals),
            faults=self.faults,
            expectations=(),
            seed=self.seed,
            leaves={f"r{n}": ask.leaves_at_s for n, ask in enumerate(self.asks) if ask.leaves_at_s is not None},
        )

    def rules_of(self, protocol: Protocol) -> Profile:
        """The profile of the run."""
        return protocol.profile(self.profile).with_rules(self.rules)

    @property
    def label(self) -> str:
        """What a file calls the profile: its name, and the rules that are set otherwise."""
        changes = ", ".join(f"{name}={value}" for name, value in sorted(self.rules.items()))
        return f"{self.profile} ({changes})" if changes else self.profile


def case_of(
    scenario: Scenario,
    faults: Iterable[Fault],
    profile: str,
    rules: Mapping[str, Value],
    seed: int,
    arrivals: Sequence[Arrival] | None = None,
) -> Case:
    """The case of a run: what its scenario and seed draw, drawn. ``arrivals`` replace the scenario's own."""
    whole = scenario.seed + seed
    leaves = scenario.leaves if arrivals is None else {}
    if arrivals is None:
        arrivals = scenario.workload(random.Random(f"{whole}/workload"), scenario.timing.hostile_s)
    asks = tuple(Ask(*arrival, leaves.get(f"r{number}")) for number, arrival in enumerate(arrivals))
    return Case(scenario.topology, scenario.timing, asks, tuple(faults), profile, rules, whole)


# ------------------------------------------------------------------------------------------------- the text


def write_case(
    case: Case, title: str, story: str, expectations: Iterable[Expectation] = (), remarks: Iterable[str] = ()
) -> str:
    """The scenario file of a case. ``remarks`` become comment lines at its head."""
    blocks = [
        [f"# {line}".rstrip() for remark in remarks for line in _wrapped(remark)],
        [f"title = {_value(title)}", *_story(story), *([f"seed = {case.seed}"] if case.seed else [])],
        _topology(case.topology),
        _workload(case.asks),
        _table("timing", _changed(case.timing, Timing())),
        *(_fault(fault) for fault in case.faults),
        *(_expectation(said) for said in expectations),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _story(story: str) -> list[str]:
    escaped = story.replace("\\", "\\\\").replace('"', '\\"')
    return ['story = """', *textwrap.wrap(escaped, WIDTH, break_long_words=False, break_on_hyphens=False), '"""']


def _wrapped(remark: str) -> list[str]:
    """A remark that is set in is a command, and stays on one line."""
    whole = remark.startswith(" ")
    return [remark] if whole else textwrap.wrap(remark, WIDTH, break_long_words=False, break_on_hyphens=False)


def _topology(topology: Topology) -> list[str]:
    flat = _changed(topology, Topology())
    sides = {side: _shape(flat.pop(side, EngineShape())) for side in ("prefill", "decode")}
    lines = _table("topology", flat)
    for side, entries in sides.items():
        lines += _table(f"topology.{side}", entries)
    return lines


def _shape(shape: EngineShape) -> dict[str, Any]:
    entries = _changed(shape, EngineShape())
    sizes = entries.pop("sizes", Sizes())
    plain = Sizes()._asdict()
    return {**{name: size for name, size in sizes._asdict().items() if size != plain[name]}, **entries}


def _workload(asks: Iterable[Ask]) -> list[str]:
    rows = ({name: value for name, value in ask._asdict().items() if value is not None} for ask in asks)
    return ["[workload]", 'kind = "requests"', "requests = [", *(f"  {_value(row)}," for row in rows), "]"]


def _fault(fault: Fault) -> list[str]:
    """A fault names every parameter, so that another default some day does not change it."""
    entries: dict[str, Any] = {"kind": fault.kind.name, "target": fault.target}
    if fault.trigger is not None:
        entries["trigger"] = fault.trigger
    if fault.at_s or fault.trigger is None:
        entries["at_s"] = fault.at_s
    if fault.for_s < FOR_EVER_S:
        entries["for_s"] = fault.for_s
    return _table("[fault]", {**entries, **fault.parameters})


def _expectation(said: Expectation) -> list[str]:
    entries: dict[str, Any] = {"profile": said.profile}
    if said.label != said.profile:
        entries["label"] = said.label
    lists = {
        "shows": said.shows,
        "follows": tuple(name for name in said.violates if name not in said.shows),
        "marks": said.marks,
        "causes": said.causes,
    }
    entries |= {"rules": said.rules} if said.rules else {}
    return _table("[expect]", {**entries, **{name: list(names) for name, names in lists.items() if names}})


def _changed(value: Any, plain: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are anyway."""
    names = [each.name for each in dataclasses.fields(value)]
    return {name: getattr(value, name) for name in names if getattr(value, name) != getattr(plain, name)}


def _table(name: str, entries: Mapping[str, Any]) -> list[str]:
    """Nothing, when there is nothing to say."""
    return [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in entries.items())] if entries else []


def _value(value: Any) -> str:
    """A value as TOML. Floats are written so that they are read as the same number."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)
