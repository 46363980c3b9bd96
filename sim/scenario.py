"""Scenario files: a cluster, a workload, faults and what must come of it, as readable text.

A scenario reads like an incident report. It is checked completely before it runs; an error names file, line,
cause and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpoll.sim.explorer.schedule_text import Schedule, read_schedule
from kvpoll.sim.faults import Fault, Kind, kinds
from kvpoll.sim.topology import Topology, rank_names
from kvpoll.sim.workload import Arrival, Fixed, Lengths, Lognormal, bursts, poisson, read_mooncake, synthetic
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Profile, Protocol, Value, check_rule_values
from kvpoll.spec.source import BadInput, Source, nearest
from kvpoll.spec.trace import EVENTS
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape

SCENARIOS = Path(__file__).with_name("scenarios")
RANKS_MAX = 1024
PAGES_MAX = 10_000_000

SHARES = ("share", "places")
"""Parameters that are a fraction of something."""

WHOLE = ("stage", "count", "shift")
"""Parameters that count something."""

KIND_NAMES = {bool: "true or false", str: "text in quotes", int: "a whole number", float: "a number"}

SIDES = ("client", "prefill", "decode", "both")


@dataclass(frozen=True)
class Expectation:
    """Under this profile (with these rules changed), exactly these invariants break, and these marks are seen.

    In a file `shows` lists what the race is about and `follows` what else breaks in its wake; both together are
    ``violates``. Neither means that every invariant holds.
    """

    profile: str
    label: str
    rules: Mapping[str, Value]
    shows: tuple[str, ...]
    violates: tuple[str, ...]
    marks: tuple[str, ...]
    causes: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """hostile_s: how long requests and faults come. grace_s: from the heal to the probes. probes: requests then.

    quiet_s: after the last probe, with no traffic, before the cluster is surveyed. real_speed: how much faster than
    the wall time may run where it is staged on real processes, so that the race is still one.
    """

    hostile_s: float = 30.0
    grace_s: float = 15.0
    probes: int = 4
    quiet_s: float = 450.0
    real_speed: float = 20.0


@dataclass(frozen=True)
class Scenario:
    """One checked scenario file. ``digest`` identifies its text in traces.

    seed: added to the seed of a run, so that a file can name the chance it needs. leaves: when a client goes away,
    by request; a fault of the file that strikes one request and no other.
    """

    name: str
    path: str
    digest: str
    title: str
    story: str
    upstream: str | None
    race: str | None
    topology: Topology
    timing: Timing
    workload: Callable[[random.Random, float], list[Arrival]]
    faults: tuple[Fault, ...]
    expectations: tuple[Expectation, ...]
    schedule: Schedule | None = None
    seed: int = 0
    leaves: Mapping[str, float] = field(default_factory=dict)

    def expectation(self, profile: str) -> Expectation | None:
        """What the file says of a profile, by its name or label."""
        return next((e for e in self.expectations if profile in (e.label, e.profile)), None)


def find(name: str) -> Path:
    """The path of a scenario given as a path or as the name of one that comes with kvpoll. Raises BadInput."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    names = names_available()
    if name not in names:
        raise BadInput(f"unknown scenario {name!r}{nearest(name, names)}")
    return SCENARIOS / f"{name}.toml"


def names_available() -> list[str]:
    """The scenarios that come with kvpoll."""
    return sorted(path.stem for path in SCENARIOS.glob("*.toml"))


def load_scenario(path: Path, protocol: Protocol) -> Scenario:
    """Read and check one scenario file. Raises BadInput."""
    return parse_scenario(Source(path), protocol, path.stem)


def parse_scenario(source: Source, protocol: Protocol, name: str) -> Scenario:
    """Check a parsed scenario. Raises BadInput at the offending line."""
    data = source.data
    source.require_known((), data, (*SHAPES, "seed"), "key")
    for key in ("title",) if "schedule" in data else ("title", "workload"):
        if key not in data:
            raise source.error((), f"a scenario needs `{key}`")
    _check_shapes(source, (), data, SHAPES)
    for key, shapes in (("fault", FAULT_SHAPES), ("expect", EXPECT_SHAPES)):
        for index, entry in enumerate(data.get(key, [])):
            _check_shapes(source, (key, index), entry, shapes)
    topology = _topology(source)
    timing = _filled(source, ("timing",), data.get("timing", {}), Timing)
    _check_scalar(source, ("seed",), "seed", data.get("seed", 0), 0)
    faults = tuple(_fault(source, index, entry, topology) for index, entry in enumerate(data.get("fault", [])))
    expectations = tuple(
        _expectation(source, index, entry, protocol) for index, entry in enumerate(data.get("expect", []))
    )
    return Scenario(
        name=name,
        path=source.name,
        digest=hashlib.sha256(source.text.encode()).hexdigest()[:12],
        title=data["title"],
        story=data.get("story", "").strip(),
        upstream=data.get("upstream"),
        race=data.get("race"),
        topology=topology,
        timing=timing,
        workload=_workload(source, data["workload"]) if "workload" in data else lambda chance, until_s: [],
        schedule=read_schedule(source) if "schedule" in data else None,
        faults=faults,
        expectations=expectations,
        seed=data.get("seed", 0),
        leaves=_leaves(data.get("workload", {}).get("requests", [])),
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _tables(value: Any) -> bool:
    return isinstance(value, list) and all(map(_table, value))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


Shape = tuple[Callable[[Any], bool], str]
TEXT: Shape = (_text, "text in quotes")
TABLE: Shape = (_table, "a table")
TABLES: Shape = (_tables, "a list of tables ([[...]])")
TEXTS: Shape = (_texts, "a list of texts")

SHAPES = {
    "title": TEXT, "story": TEXT, "upstream": TEXT, "race": TEXT, "topology": TABLE, "workload": TABLE,
    "timing": TABLE, "schedule": TABLE, "fault": TABLES, "expect": TABLES,
}  # fmt: skip
FAULT_SHAPES = {"kind": TEXT, "target": TEXT, "trigger": TABLE}
EXPECT_SHAPES = {
    "profile": TEXT, "label": TEXT, "rules": TABLE, "shows": TEXTS, "follows": TEXTS, "marks": TEXTS, "causes": TEXTS,
}  # fmt: skip


def _check_shapes(
    source: Source, path: tuple[str | int, ...], entry: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> None:
    for name, (fits, wanted) in shapes.items():
        if name in entry and not fits(entry[name]):
            raise source.error((*path, name), f"{name} must be {wanted}, got {entry[name]!r}")


def _filled(source: Source, path: tuple[str | int, ...], entry: Mapping[str, Any], kind: type[Any]) -> Any:
    """A dataclass of scalars from a table: known keys only, the right types, nothing negative."""
    fields = {field.name: field.default for field in dataclasses.fields(kind) if not callable(field.default_factory)}
    source.require_known(path, entry, fields, "key")
    for name, value in entry.items():
        _check_scalar(source, (*path, name), name, value, fields[name])
    return kind(**entry)


def _check_scalar(source: Source, path: tuple[str | int, ...], name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool | str):
        if not isinstance(value, type(default)):
            raise source.error(path, f"{name} must be a {type(default).__name__}, got {value!r}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise source.error(path, f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise source.error(path, f"{name} must be a finite number, got {value!r}")
    if value < 0:
        raise source.error(path, f"{name} must not be negative, got {value!r}")
    if isinstance(default, int) and not isinstance(value, int):
        raise source.error(path, f"{name} must be a whole number, got {value!r}")


def _topology(source: Source) -> Topology:
    entry = dict(source.data.get("topology", {}))
    _check_shapes(source, ("topology",), entry, {"prefill": TABLE, "decode": TABLE})
    shapes = {side: _shape(source, side, entry.pop(side, {})) for side in ("prefill", "decode")}
    base = {field.name: field.default for field in dataclasses.fields(Topology) if field.name not in shapes}
    source.require_known(("topology",), entry, [*base, *shapes], "key")
    for name, value in entry.items():
        _check_scalar(source, ("topology", name), name, value, base[name])
        if value == 0 and not isinstance(value, bool) and name not in ("latency_s", "http_latency_s", "jitter"):
            raise source.error(("topology", name), f"this cluster cannot exist: {name} is 0")
    balances = ("follow_bootstrap_room", "total_requests", "total_tokens")
    if entry.get("load_balance", balances[0]) not in balances:
        raise source.error(
            ("topology", "load_balance"),
            f"unknown load_balance {entry['load_balance']!r}{nearest(entry['load_balance'], balances)}",
        )
    topology = Topology(prefill=shapes["prefill"], decode=shapes["decode"], **entry)
    problem = topology.check()
    if problem is not None:
        raise source.error(_first_topology(source), f"this cluster cannot exist: {problem}")
    return topology


def _first_topology(source: Source) -> tuple[str | int, ...]:
    """Where a file speaks of its cluster as a whole: [topology], or the first table below it."""
    return ("topology", *list(source.data["topology"])[:1]) if source.line_of(("topology",)) == 1 else ("topology",)


def _shape(source: Source, side: str, entry: Mapping[str, Any]) -> EngineShape:
    path = ("topology", side)
    sizes = {name: entry[name] for name in Sizes._fields if name in entry}
    rest = {name: value for name, value in entry.items() if name not in sizes}
    fields = {field.name: field.default for field in dataclasses.fields(EngineShape) if field.name != "sizes"}
    source.require_known(path, rest, [*fields, *Sizes._fields], "key")
    for name, value in {**sizes, **rest}.items():
        _check_scalar(source, (*path, name), name, value, fields.get(name, 1))
        most = PAGES_MAX if name in ("kv_pages", "rows", "slots") else RANKS_MAX
        if isinstance(fields.get(name, 1), int) and value > most:
            raise source.error((*path, name), f"{side} {name} is {value}; at most {most} are simulated")
        if value == 0 and name != "skew":
            raise source.error((*path, name), f"this cluster cannot exist: {side} {name} is 0")
    shape = EngineShape(sizes=Sizes(**sizes), **rest)
    ranks = shape.count * math.prod(shape.sizes)
    if ranks > RANKS_MAX:
        raise source.error(path, f"{side} has {ranks} ranks; at most {RANKS_MAX} are simulated")
    return shape


def _fault(source: Source, index: int, entry: Mapping[str, Any], topology: Topology) -> Fault:
    path = ("fault", index)
    known = kinds()
    _check_named(source, path, entry, "kind", "a fault")
    kind = known.get(entry.get("kind", ""))
    if kind is None:
        raise source.error((*path, "kind"), f"unknown fault {entry.get('kind')!r}{nearest(entry.get('kind'), known)}")
    source.require_known(path, entry, ("kind", "target", "at_s", "for_s", "trigger", *kind.parameters), "parameter")
    for name in ("at_s", "for_s"):
        _check_scalar(source, (*path, name), name, entry.get(name, 0.0), 0.0)
    parameters = {name: entry.get(name, default) for name, default in kind.parameters.items()}
    for name, value in parameters.items():
        if value == "required":
            raise source.error(path, f"fault {kind.name!r} needs the parameter {name!r}")
        if name != "offset_s" and isinstance(value, int | float) and value < 0:
            raise source.error((*path, name), f"{name} must not be negative, got {value!r}")
        if name in entry:
            _check_parameter(source, (*path, name), name, value, kind.parameters[name])
    stages = topology.prefill.sizes.pp
    if parameters.get("stage", 0) >= stages:
        raise source.error((*path, "stage"), f"stage must be below {stages}, prefill's stages, got {entry['stage']!r}")
    target = entry.get("target", "R")
    if "peer" in parameters:
        _check_target(source, (*path, "peer"), parameters["peer"], topology)
    _check_target(source, (*path, "target"), target, topology)
    _check_victim(source, path, kind, target)
    trigger = entry.get("trigger")
    if trigger is not None:
        _check_trigger(source, (*path, "trigger"), trigger)
    return Fault(
        f"{kind.name}-{index}",
        kind,
        target,
        entry.get("at_s", 0.0),
        entry.get("for_s", 1e9),
        parameters,
        trigger,
    )


def _check_parameter(source: Source, path: tuple[str | int, ...], name: str, value: Any, default: Any) -> None:
    """A parameter has the type of its default; one that is required is a number, but for the name `peer`."""
    wanted: tuple[type, ...] = (int, float)
    if isinstance(default, bool):
        wanted = (bool,)
    elif name in ("peer", "side"):
        wanted = (str,)
    elif name in WHOLE:
        wanted = (int,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise source.error(path, f"{name} must be {KIND_NAMES[wanted[-1]]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise source.error(path, f"{name} must be a finite number, got {value!r}")
    if name in SHARES and isinstance(value, int | float) and value > 1:
        raise source.error(path, f"{name} must be between 0 and 1, got {value!r}")
    if name == "side" and value not in SIDES:
        raise source.error(path, f"unknown side {value!r}{nearest(value, SIDES)}")


def _check_victim(source: Source, path: tuple[str | int, ...], kind: Kind, target: str) -> None:
    """A fault of servers, engines or writers needs one of them as its target."""
    wanted = {"server": "B", "any_engine": "PD", "prefill_engine": "PR", "prefill_rank": "P*"}.get(
        kind.draw.get("target", ""), ""
    )
    if wanted and target[0] not in wanted:
        what = {"B": "a bootstrap server (B0)", "PD": "an engine or rank (P0, D0)"}.get(wanted, "a prefill node (P0)")
        raise source.error((*path, "target"), f"fault {kind.name!r} needs {what} as its target, got {target!r}")


def _check_target(source: Source, path: tuple[str | int, ...], target: str, topology: Topology) -> None:
    ranks = [*rank_names("P", topology.prefill), *rank_names("D", topology.decode)]
    valid = {"R", "*", *ranks, *(f"B{number}" for number in range(topology.prefill.count))}
    for rank in ranks:
        parts = rank.split("/")
        valid |= {"/".join(parts[:end]) for end in range(1, len(parts))}
    if target not in valid:
        raise source.error(path, f"no node {target!r} in this cluster{nearest(target, valid)}")


def _check_named(source: Source, path: tuple[str | int, ...], entry: Mapping[str, Any], key: str, what: str) -> None:
    if key not in entry:
        raise source.error(path, f"{what} needs `{key}`")


def _check_trigger(source: Source, path: tuple[str | int, ...], trigger: Mapping[str, Any]) -> None:
    _check_named(source, path, trigger, "event", "a trigger")
    if not isinstance(trigger.get("event"), str) or trigger["event"] not in EVENTS:
        raise source.error(path, f"unknown trace event {trigger.get('event')!r}{nearest(trigger.get('event'), EVENTS)}")
    source.require_known(path, trigger, ("event", *EVENTS[trigger["event"]]._fields), "field")


def _expectation(source: Source, index: int, entry: Mapping[str, Any], protocol: Protocol) -> Expectation:
    path = ("expect", index)
    source.require_known(path, entry, ("profile", "label", "rules", "shows", "follows", "marks", "causes"), "key")
    _check_named(source, path, entry, "profile", "an expectation")
    profile = entry.get("profile")
    if profile not in protocol.profiles:
        raise source.error((*path, "profile"), f"unknown profile {profile!r}{nearest(profile, protocol.profiles)}")
    check_rule_values(source, (*path, "rules"), entry.get("rules", {}), protocol.rules)
    for key in ("shows", "follows"):
        for name in entry.get(key, []):
            if name not in INVARIANTS:
                raise source.error((*path, key), f"unknown invariant {name!r}{nearest(name.upper(), INVARIANTS)}")
    shows = tuple(entry.get("shows", ()))
    assert isinstance(profile, str)
    return Expectation(
        profile, entry.get("label", profile), entry.get("rules", {}), shows, (*shows, *entry.get("follows", ())),
        tuple(entry.get("marks", ())), tuple(entry.get("causes", ())),
    )  # fmt: skip


def chosen_profile(protocol: Protocol, expectation: Expectation) -> Profile:
    """The profile of an expectation, with the rules that it changes."""
    return protocol.profile(expectation.profile).with_rules(expectation.rules)


# ---------------------------------------------------------------------------------------------------- workloads

WORKLOAD_KEYS: dict[str, tuple[str, ...]] = {
    "requests": ("kind", "requests"),
    "poisson": ("kind", "rate_per_s", "input_tokens", "output_tokens", "until_s"),
    "bursts": (
        "kind",
        "rate_per_s",
        "burst_rate_per_s",
        "burst_s",
        "period_s",
        "input_tokens",
        "output_tokens",
        "until_s",
    ),
    "synthetic": ("kind",),
    "mooncake": ("kind", "path"),
}


def _workload(source: Source, entry: Mapping[str, Any]) -> Callable[[random.Random, float], list[Arrival]]:
    _check_named(source, ("workload",), entry, "kind", "a workload")
    kind = entry["kind"]
    if not isinstance(kind, str) or kind not in WORKLOAD_KEYS:
        raise source.error(("workload", "kind"), f"unknown workload {kind!r}{nearest(kind, WORKLOAD_KEYS)}")
    source.require_known(("workload",), entry, WORKLOAD_KEYS[kind], "key")
    for key in WORKLOAD_KEYS[kind]:
        if key not in entry and key != "until_s":
            raise source.error(("workload",), f"workload {kind!r} needs `{key}`")
        if key not in ("kind", "path", "requests") and key in entry:
            whole = key.endswith("_tokens")
            _check_scalar(source, ("workload", key), key, entry[key], 0 if whole else 0.0)
            if entry[key] == 0 and not (kind == "bursts" and key == "rate_per_s"):
                raise source.error(("workload", key), f"{key} must be above 0")
    _check_shapes(source, ("workload",), entry, {"path": TEXT, "requests": TABLES})
    if kind == "requests":
        return _listed(source, entry["requests"])
    if kind == "synthetic":
        return lambda chance, until_s: synthetic(chance, until_s)
    if kind == "mooncake":
        if not Path(entry["path"]).is_file():
            raise source.error(("workload", "path"), f"path {entry['path']!r} is no file; give a Mooncake-format trace")
        return lambda chance, until_s: read_mooncake(Path(entry["path"]), until_s)
    lengths = Lengths(_lengths(entry["input_tokens"]), _lengths(entry["output_tokens"]))
    limit = entry.get("until_s", float("inf"))
    if kind == "bursts" and entry["period_s"] <= entry["burst_s"]:
        raise source.error(("workload", "period_s"), f"period_s must be above burst_s ({entry['burst_s']!r})")
    if kind == "poisson":
        return lambda chance, until_s: poisson(chance, entry["rate_per_s"], min(until_s, limit), lengths)
    return lambda chance, until_s: bursts(
        chance, entry["rate_per_s"], entry["burst_rate_per_s"], entry["burst_s"], entry["period_s"],
        min(until_s, limit), lengths,
    )  # fmt: skip


def _lengths(value: int) -> Fixed | Lognormal:
    return Fixed(value)


def _listed(source: Source, entries: list[Mapping[str, Any]]) -> Callable[[random.Random, float], list[Arrival]]:
    arrivals = []
    for index, entry in enumerate(entries):
        path = ("workload", "requests", index)
        source.require_known(path, entry, ("at_s", "input_tokens", "output_tokens", "leaves_at_s"), "key")
        for name in ("at_s", "input_tokens", "output_tokens"):
            if name not in entry:
                raise source.error(path, f"a request needs `{name}`")
            _check_scalar(source, path, name, entry[name], 0.0 if name == "at_s" else 0)
            if entry[name] == 0 and name != "at_s":
                raise source.error(path, f"{name} must be above 0")
        _check_scalar(source, (*path, "leaves_at_s"), "leaves_at_s", entry.get("leaves_at_s", 0.0), 0.0)
        if entry.get("leaves_at_s", math.inf) < entry["at_s"]:
            raise source.error((*path, "leaves_at_s"), "leaves_at_s must not be before at_s")
        arrivals.append(_arrival(entry))
    return lambda chance, until_s: sorted(arrivals, key=_moment)


def _arrival(entry: Mapping[str, Any]) -> Arrival:
    return Arrival(float(entry["at_s"]), entry["input_tokens"], entry["output_tokens"])


def _moment(arrival: Arrival) -> float:
    """Requests of one moment stay in the order of the file."""
    return arrival.t


def _leaves(entries: list[Mapping[str, Any]]) -> dict[str, float]:
    """Request -> when its client leaves. Requests are numbered in the order in which they arrive."""
    asked = sorted(entries, key=lambda entry: float(entry["at_s"]))
    return {f"r{number}": float(entry["leaves_at_s"]) for number, entry in enumerate(asked) if "leaves_at_s" in entry}
