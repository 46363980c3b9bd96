"""What a run is to be: the words of the command line, checked, and the one line that repeats them.

A `Plan` is plain text, so it travels to worker processes and back into a line. ``prepare`` reads every file
that it names and raises BadInput or WorkloadError; after that nothing about the input can go wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpoll.sim.explorer.schedule import ScheduledRun
from kvpoll.sim.faults import Fault, draw_faults
from kvpoll.sim.run import Run
from kvpoll.sim.scenario import Expectation, Scenario, chosen_profile, find, load_scenario
from kvpoll.sim.swarm import draw_swarm
from kvpoll.sim.workload import Arrival, read_mooncake
from kvpoll.spec.protocol import Profile, Protocol, Rule, Value, load
from kvpoll.spec.source import BadInput, nearest

MAIN = "main"
"""The scenario of `kvpoll run` without a name; the only one whose faults are drawn unless told otherwise."""

FAULT_MODES = ("all", "none", "scenario")

SWARM = "swarm"
"""The fault mode of --swarm: the seed draws which kinds there are."""


@dataclass(frozen=True)
class Plan:
    """One run but for its seed, as given: a scenario by name or path, a profile by name or its label there.

    changes: "rule=value" each. trace: path of a workload in the Mooncake format. minutes: length of the
    hostile phase. faults: one of FAULT_MODES, or SWARM. spec: path of another kvpoll.toml. None means the default.
    """

    scenario: str = MAIN
    profile: str = "reference"
    changes: tuple[str, ...] = ()
    trace: str | None = None
    minutes: float | None = None
    faults: str | None = None
    spec: str | None = None

    @property
    def fault_mode(self) -> str:
        """Where the faults come from: drawn for `main`, from the file for every other scenario."""
        return self.faults or ("all" if self.scenario == MAIN else "scenario")

    def line(self, seed: int, *more: str) -> str:
        """The command that repeats this run exactly; defaults are left out, profile and seed never."""
        words = ["kvpoll", "run", self.scenario, "--profile", self.profile]
        for change in self.changes:
            words += ["--set", change]
        if self.trace is not None:
            words += ["--trace", self.trace]
        if self.minutes is not None:
            words += ["--minutes", f"{self.minutes:g}"]
        if self.fault_mode != Plan(self.scenario).fault_mode:
            words += ["--swarm"] if self.fault_mode == SWARM else ["--faults", self.fault_mode]
        if self.spec is not None:
            words += ["--spec", self.spec]
        return shlex.join([*words, "--seed", str(seed), *more])


@dataclass(frozen=True)
class Prepared:
    """A plan whose files have been read. ``expectation``: what the scenario says of this run, if so."""

    plan: Plan
    protocol: Protocol
    scenario: Scenario
    profile: Profile
    expectation: Expectation | None
    arrivals: list[Arrival] | None

    def run(self, seed: int, **more: Any) -> Run | ScheduledRun:
        """The run of one seed; ``more`` are further fields of Run (trace, record, collect, progress)."""
        line = self.plan.line(seed)
        if self.scenario.schedule is not None:
            return ScheduledRun(self.protocol, self.scenario, self.profile, seed, line, **more)
        faults = self.faults(seed)
        return Run(
            self.protocol,
            self.scenario,
            self.profile,
            seed,
            line,
            arrivals=self.arrivals,
            faults=faults,
            **more,
        )

    def faults(self, seed: int) -> tuple[Fault, ...]:
        """The fault schedule of one seed."""
        mode = self.plan.fault_mode
        if mode == "scenario":
            return self.scenario.faults
        if mode == "none":
            return ()
        if mode == SWARM:
            return draw_swarm(seed, self.scenario).faults
        chance = random.Random(f"{seed}/draw")
        return tuple(draw_faults(chance, self.scenario.topology, self.scenario.timing.hostile_s))

    @property
    def identity(self) -> str:
        """Digest of all that decides the outcome but the seed: do two results belong together?"""
        timing, rules = self.scenario.timing, sorted(self.profile.rules.items())
        text = (
            self.protocol.digest,
            self.scenario.digest,
            rules,
            timing,
            self.plan.fault_mode,
            self.arrivals,
        )
        return hashlib.sha256(repr(text).encode()).hexdigest()[:12]


def draw_digest(faults: Iterable[Fault]) -> str:
    """Eight hex digits that tell two fault schedules apart."""
    drawn = [
        (fault.kind.name, fault.target, fault.at_s, fault.for_s, sorted(fault.parameters.items())) for fault in faults
    ]
    return hashlib.sha256(repr(drawn).encode()).hexdigest()[:8]


def prepare(plan: Plan) -> Prepared:
    """Read and check all that a plan names. Raises BadInput or WorkloadError."""
    protocol = read_spec(plan.spec)
    scenario = load_scenario(find(plan.scenario), protocol)
    if plan.minutes is not None:
        timing = dataclasses.replace(scenario.timing, hostile_s=plan.minutes * 60)
        scenario = dataclasses.replace(scenario, timing=timing)
    profile = _profile(plan, protocol, scenario)
    arrivals = None if plan.trace is None else read_mooncake(Path(plan.trace), scenario.timing.hostile_s)
    return Prepared(plan, protocol, scenario, profile, _expectation(plan, protocol, scenario, profile), arrivals)


def read_spec(path: str | None) -> Protocol:
    """The protocol that comes with kvpoll, or the one in a file."""
    return load() if path is None else load(Path(path))


def changed_profile(protocol: Protocol, name: str, changes: Iterable[str]) -> Profile:
    """The profile of that name with the rules of --set changed. Raises BadInput."""
    base = protocol.profile(name)
    return base.with_rules(_changes(changes, protocol.rules, base.rules))


def _profile(plan: Plan, protocol: Protocol, scenario: Scenario) -> Profile:
    """The profile of that name, or what the scenario calls so, with the rules of --set changed."""
    labels = {expectation.label: expectation for expectation in scenario.expectations}
    if plan.profile in labels:
        said = labels[plan.profile]
        base, rules = protocol.profile(said.profile), dict(said.rules)
    elif plan.profile in protocol.profiles:
        base, rules = protocol.profile(plan.profile), {}
    else:
        names = {*protocol.profiles, *labels}
        raise BadInput(f"--profile: unknown profile {plan.profile!r}{nearest(plan.profile, names)}")
    return base.with_rules({**rules, **_changes(plan.changes, protocol.rules, {**base.rules, **rules})})


def _changes(given: Iterable[str], rules: Mapping[str, Rule], now: Mapping[str, Value]) -> dict[str, Value]:
    """The rules of --set that really change something."""
    wanted = dict(_change(text, rules) for text in given)
    return {name: value for name, value in wanted.items() if now[name] != value}


def _change(text: str, rules: Mapping[str, Rule]) -> tuple[str, Value]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"--set {text}: write rule=value; `kvpoll list rules` shows both")
    if name not in rules:
        raise BadInput(f"--set {text}: unknown rule {name!r}{nearest(name, rules)}")
    rule = rules[name]
    if rule.kind == "number":
        return name, _number(text, rule, value)
    if value not in rule.values:
        raise BadInput(f"--set {text}: rule {name!r} has no value {value!r}{nearest(value, rule.values)}")
    return name, value


def _number(text: str, rule: Rule, value: str) -> Value:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise BadInput(f"--set {text}: rule {rule.name!r} is a number of {rule.unit} and not negative, got {value!r}")
    return int(number) if number.is_integer() else number


def _expectation(plan: Plan, protocol: Protocol, scenario: Scenario, profile: Profile) -> Expectation | None:
    """What the file says of this run; nothing, if workload, length or faults are not the file's own."""
    changed = plan.trace is not None or plan.minutes is not None
    if changed or plan.fault_mode != "scenario":
        return None
    same = [said for said in scenario.expectations if chosen_profile(protocol, said).name == profile.name]
    return next((said for said in same if said.label == plan.profile), same[0] if same else None)
