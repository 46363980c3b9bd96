"""Hypothesis makes up the story: requests, clients that leave, and every kind of fault, at moments of its choosing.

One rule for each kind of `spec/faults.toml`, with values from the ranges that the kind declares; time passes by a
rule, too. All invariants are asked after every rule, and at the end the cluster is healed, left alone and surveyed.

What happened is at any moment a `Case`. A failure writes it as a scenario and names the `kvpoll run` line that
repeats it. Times are multiples of 1/64 s, which floats hold exactly, so the scenario repeats every moment exactly.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvpoll.cli import main
from kvpoll.sim.cluster import Cluster
from kvpoll.sim.faults import Fault, Injector, Kind, kinds
from kvpoll.sim.run import settle
from kvpoll.sim.scenario import Timing
from kvpoll.sim.scenario_text import Ask, Case, write_case
from kvpoll.sim.shrink_case import expectation_of
from kvpoll.sim.topology import Topology, rank_names
from kvpoll.sim.world import World
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import Stream
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape

PROTOCOL = load()
TOPOLOGY = Topology(
    prefill=EngineShape(sizes=Sizes(dp=2, pp=2)),
    decode=EngineShape(count=2, sizes=Sizes(tp=1), kv_pages=128, rows=8),
)
TICK_S = 1 / 64
"""Between any two things that happen, so that none of them share a moment and their order cannot be lost."""

RANKS = {side: list(rank_names(side, getattr(TOPOLOGY, name))) for side, name in (("P", "prefill"), ("D", "decode"))}
PREFILL, DECODE = ["P0"], ["D0", "D1"]
TARGETS = {
    "server": ["B0"],
    "prefill_engine": PREFILL,
    "decode_engine": DECODE,
    "any_engine": PREFILL + DECODE,
    "prefill_rank": RANKS["P"],
    "decode_rank": RANKS["D"],
    "any_rank": RANKS["P"] + RANKS["D"],
    "router": ["R"],
    "link": PREFILL,
}


class ClusterMachine(RuleBasedStateMachine):
    """A cluster under the reference; subclasses name another profile."""

    profile = "reference"

    def __init__(self) -> None:
        super().__init__()
        self.world = World(PROTOCOL, PROTOCOL.profile(self.profile), TOPOLOGY, 0, Stream())
        self.cluster = Cluster(self.world)
        self.injector = Injector(self.cluster, [])
        self.faults: list[Fault] = []
        self.asks: list[Ask] = []
        self.started = False
        self.hostile_s: float | None = None

    # -- time, requests, clients

    def begin(self) -> None:
        """Bring the cluster up, once it is settled which servers are late."""
        if not self.started:
            self.started = True
            self.cluster.start({fault.target for fault in self.faults})
            self.pass_time(TICK_S)

    def pass_time(self, for_s: float) -> None:
        self.world.env.run(until=self.world.now + for_s)

    @rule(ticks=st.one_of(st.integers(1, 8), st.integers(8, 64), st.integers(64, 640)))
    def advance(self, ticks: int) -> None:
        self.begin()
        self.pass_time(ticks * TICK_S)

    @rule(input_tokens=st.integers(1, 40_000), output_tokens=st.integers(1, 64), more=st.integers(0, 3))
    def submit(self, input_tokens: int, output_tokens: int, more: int) -> None:
        """A request, or several in quick succession."""
        self.begin()
        for _ in range(1 + more):
            self.asks.append(Ask(self.world.now, input_tokens, output_tokens))
            self.cluster.router.submit(f"r{len(self.asks) - 1}", input_tokens, output_tokens)
            self.pass_time(TICK_S)

    @precondition(lambda self: self.cluster.router.active)
    @rule(which=st.integers(0, 10_000))
    def client_leaves(self, which: int) -> None:
        active = list(self.cluster.router.active)
        number = int(active[which % len(active)].removeprefix("r"))
        self.asks[number] = self.asks[number]._replace(leaves_at_s=self.world.now)
        assert self.cluster.router.client_leaves(f"r{number}")
        self.pass_time(TICK_S)

    def strike(self, kind: Kind, node: str, values: dict[str, Any]) -> None:
        """A fault begins now; one whose moment is fixed begins with the run, before anything is up."""
        given = {name: value for name, value in values.items() if name in kind.parameters}
        if "at_s" not in kind.draw:
            self.begin()
        name = f"{kind.name}-{len(self.faults)}"
        fault = Fault(name, kind, node, self.world.now, values["for_s"], {**kind.parameters, **given})
        self.faults.append(fault)
        if "at_s" in kind.draw:
            self.world.after(fault.at_s, self.injector.begin, fault)
            return
        self.injector.begin(fault)
        self.pass_time(TICK_S)

    # -- what must hold

    @invariant()
    def every_invariant_holds(self) -> None:
        if self.world.watch.first:
            self.fail()

    def teardown(self) -> None:
        """Heal, let everything come to rest, survey, and judge what had to come true in the end."""
        STRUCK.update(mark.removeprefix("fault:") for mark in self.world.marks if mark.startswith("fault:"))
        if self.started and not self.world.watch.first:
            self.hostile_s = self.world.now
            settle(self.world, self.cluster, self.injector, Timing(), lambda t: self.world.env.run(until=t))
            self.every_invariant_holds()

    def fail(self) -> None:
        """Write down what happened, and say how to repeat it."""
        violated = next(iter(self.world.watch.first.values()))
        timing = Timing(hostile_s=self.hostile_s or self.world.now)
        case = Case(TOPOLOGY, timing, tuple(self.asks), tuple(self.faults), self.profile)
        expected = expectation_of(case, PROTOCOL, violated.invariant)
        path = Path(tempfile.gettempdir()) / f"kvpoll-stateful-{self.profile}-{os.getpid()}.toml"
        title = f"{violated.invariant} breaks under {self.profile}"
        path.write_text(write_case(case, title, violated.text, [expected]), encoding="utf-8")
        line = shlex.join(["kvpoll", "run", str(path), "--profile", self.profile])
        raise AssertionError(f"{violated.invariant} broke at {violated.t!r} s: {violated.text}; to repeat it:\n{line}")


STRUCK: set[str] = set()
"""Kinds of fault that really did something, in any example."""


def drawn(value: Any) -> st.SearchStrategy[Any]:
    """The values that a kind declares for one of its parameters."""
    if value == "stage":
        return st.integers(0, TOPOLOGY.prefill.sizes.pp - 1)
    if not isinstance(value, list):
        return st.just(value)
    low, high = value
    if isinstance(low, int):
        return st.integers(low, high)
    return st.floats(low, high).map(lambda number: min(max(round(number, 3), low), high))


def fault_rule(kind: Kind) -> Callable[..., None]:
    """The rule of one kind: it strikes, and now and then there are requests for it to strike at.

    Whether a kind that can only begin with the run is there is drawn at the beginning.
    """
    values = {name: drawn(value) for name, value in kind.draw.items() if name != "target"}
    if kind.parameters.get("peer") == "required":
        values["peer"] = st.sampled_from(DECODE)

    def strike(self: ClusterMachine, node: str, values: dict[str, Any], there: bool, asked: int) -> None:
        if there:
            self.strike(kind, node, values)
        if asked:
            self.submit(4000, 8, asked - 1)

    strike.__name__ = f"fault_{kind.name}"
    nodes = st.sampled_from(TARGETS[kind.draw["target"]])
    at_first = "at_s" in kind.draw
    there = st.booleans() if at_first else st.just(True)
    made: Callable[..., None] = (initialize if at_first else rule)(
        node=nodes,
        values=st.fixed_dictionaries(values),
        there=there,
        asked=st.just(0) if at_first else st.integers(0, 4),
    )(strike)
    return made


for each in kinds().values():
    setattr(ClusterMachine, f"fault_{each.name}", fault_rule(each))


class ShippedMachine(ClusterMachine):
    """The same under what SGLang ships."""

    profile = "sglang-0.5.23"


BOUNDED = settings(
    max_examples=40,
    stateful_step_count=25,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def test_the_reference_holds_whatever_happens() -> None:
    """And nearly every kind of fault did something meanwhile; a pipeline stage, say, is not aborted in each story."""
    STRUCK.clear()
    run_state_machine_as_test(ClusterMachine, settings=BOUNDED)
    assert len(STRUCK) >= 20, sorted(kinds().keys() - STRUCK)


def test_what_is_shipped_breaks_and_the_printed_line_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    found_only = settings(BOUNDED, phases=[Phase.generate])
    with pytest.raises(AssertionError) as failure:
        run_state_machine_as_test(ShippedMachine, settings=found_only)
    told = re.match(r"(\w+) broke at (\S+) s: .*; to repeat it:\n(kvpoll run .*)", str(failure.value))
    assert told is not None
    name, t, line = told.groups()
    capsys.readouterr()
    assert main([*shlex.split(line)[1:], "--json"]) == 1
    first = json.loads(capsys.readouterr().out)["violations"][0]
    assert (first["invariant"], first["t"]) == (name, float(t))
