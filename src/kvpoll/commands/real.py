"""``kvpoll run --real``: the same scenario, the same options and the same verdict, on real processes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvpoll.commands.options import lasting, open_to_write
from kvpoll.commands.plan import Plan, Prepared, prepare
from kvpoll.commands.screen import Screen, plural
from kvpoll.commands.verdict import as_object
from kvpoll.sim.run import PROBE_GAP_S, Outcome
from kvpoll.sim.topology import Topology, rank_names
from kvpoll.sim.workload import Arrival
from kvpoll.spec.source import BadInput

if TYPE_CHECKING:
    from kvpoll.staging import Staging

SPEED_MAX: Final = 200.0
"""Faster than this, the bounds of the invariants (L2: 2 s) are shorter than a process is late on a busy machine."""

TRANSPORTS: Final = ("shm", "tcp")
ALONE: Final = ("speed", "transport")
"""Options that say nothing to a simulation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run on real processes."""
    parser.add_argument("--real", action="store_true", help="stage it on real processes, sockets and memory")
    parser.add_argument(
        "--speed",
        metavar="X",
        type=lasting,
        help="with --real: how much faster its time runs (default 20, or as the file says)",
    )
    parser.add_argument("--transport", choices=TRANSPORTS, help="with --real: what moves the pages (default shm)")


def check_alone(arguments: argparse.Namespace) -> None:
    """Options of --real without it are a mistake. Raises BadInput."""
    for option in ALONE:
        if getattr(arguments, option) is not None:
            raise BadInput(f"--{option} is for real processes; add --real")


def act(plan: Plan, arguments: argparse.Namespace, screen: Screen, show: Callable[..., None]) -> Outcome:
    """Stage one seed. ``show(prepared, outcome, recorded, screen)`` prints what came of it. Raises BadInput."""
    for option in ("seeds", "jobs"):
        if getattr(arguments, option) is not None:
            raise BadInput(f"--{option} is for simulations; a real run has one seed")
    prepared = prepare(plan)
    staging = staged(prepared, arguments)
    if not arguments.json:
        screen.say(_announcement(staging))
    record = None if arguments.record is None else Path(arguments.record)
    timing = staging.scenario.timing
    whole = timing.hostile_s + timing.grace_s + timing.probes * PROBE_GAP_S + timing.quiet_s
    with contextlib.ExitStack() as stack:
        staging.trace = None if record is None else stack.enter_context(open_to_write(record))
        advance = stack.enter_context(screen.progress(f"{prepared.scenario.name}, real", " s of its time"))
        staging.progress = lambda done, _: advance(done, whole)
        outcome = staging()
    if arguments.json:
        screen.json({**as_object(outcome, prepared.expectation), "real": _real(staging)})
    else:
        show(prepared, outcome, _recorded(record, outcome), screen)
    return outcome


def staged(prepared: Prepared, arguments: argparse.Namespace) -> Staging:
    """The staging of a prepared plan, checked: what cannot be staged is told before anything starts."""
    try:
        from kvpoll.staging import STAGEABLE, Staging
    except ModuleNotFoundError as error:
        raise BadInput(f"--real needs {error.name}, which is not installed: pip install 'kvpoll[runtime]'") from None
    speed = prepared.scenario.timing.real_speed if arguments.speed is None else arguments.speed
    if speed > SPEED_MAX:
        raise BadInput(f"--speed {speed:g}: at most {SPEED_MAX:g}; faster, messages would seem to take seconds")
    seed, scenario = arguments.seed, prepared.scenario
    scenario = dataclasses.replace(scenario, faults=prepared.faults(seed))
    unstaged = sorted({fault.kind.name for fault in scenario.faults if fault.kind.effect not in STAGEABLE})
    if unstaged and prepared.plan.fault_mode != "scenario":
        raise BadInput(f"--real: {', '.join(unstaged)} cannot be staged on real processes; give --faults none")
    if prepared.arrivals is not None:
        scenario = dataclasses.replace(scenario, workload=_given(prepared.arrivals), leaves={})
    transport = arguments.transport or "shm"
    more = ["--real", "--speed", f"{speed:g}"] + (["--transport", transport] if transport != "shm" else [])
    base, rules = origin_of(prepared)
    staging = Staging(
        prepared.protocol, scenario, prepared.profile, seed, prepared.plan.line(seed, *more), speed, transport,
        folder=_folder(getattr(arguments, "out", None)), spec=prepared.plan.spec, rules=rules, base=base,
    )  # fmt: skip
    staging.check()
    return staging


def origin_of(prepared: Prepared) -> tuple[str, dict[str, Any]]:
    """The profile that a process can look up by name, and the rules in which the run's profile differs from it."""
    labels = {said.label: said.profile for said in prepared.scenario.expectations}
    base = prepared.protocol.profile(labels.get(prepared.plan.profile, prepared.plan.profile))
    return base.name, {name: value for name, value in prepared.profile.rules.items() if base.rules[name] != value}


def _given(arrivals: list[Arrival]) -> Callable[..., list[Arrival]]:
    return lambda chance, until_s: arrivals


def _folder(out: str | None) -> Path | None:
    """Where the trace of each process is kept, when somebody wants them. Raises BadInput."""
    if out is None:
        return None
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made: {error.strerror}; choose another place") from None
    return Path(out)


def process_count(topology: Topology) -> tuple[int, int, int]:
    """Bootstrap servers, prefill ranks and decode ranks."""
    sides = (("P", topology.prefill), ("D", topology.decode))
    prefill, decode = (sum(1 for _ in rank_names(name, shape)) for name, shape in sides)
    return topology.prefill.count, prefill, decode


def _announcement(staging: Staging) -> str:
    servers, prefill, decode = process_count(staging.scenario.topology)
    processes = ", ".join(
        (plural(servers, "bootstrap server"), plural(prefill, "prefill rank"), plural(decode, "decode rank"))
    )
    timing = staging.scenario.timing
    lasts_s = (timing.hostile_s + timing.grace_s + timing.probes * PROBE_GAP_S + timing.quiet_s) / staging.speed
    told = f"for real: {processes}, a process each, over {staging.transport}; time runs {staging.speed:g} times as fast"
    return f"{told}, so this takes up to {lasts_s:,.0f} s"


def _real(staging: Staging) -> dict[str, Any]:
    servers, prefill, decode = process_count(staging.scenario.topology)
    processes = {"bootstrap_servers": servers, "prefill_ranks": prefill, "decode_ranks": decode}
    return {"processes": processes, "speed": staging.speed, "transport": staging.transport}


def _recorded(record: Path | None, outcome: Outcome) -> str | None:
    if record is None:
        return None
    return f"trace of all processes written to {record}; `kvpoll validate {record}` judges it step by step"
