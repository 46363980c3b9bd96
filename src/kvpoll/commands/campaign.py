"""``kvpoll campaign``: many seeds, each with a draw of faults of its own, into a store that outlives Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpoll.commands.options import Verbs, add_verb, counted
from kvpoll.commands.plan import SWARM, Plan, Prepared, prepare
from kvpoll.commands.run import add_arguments, plan_of
from kvpoll.commands.screen import Screen, plural, seconds
from kvpoll.commands.status import DEFECT, HOLDS, INTERRUPTED, VIOLATED
from kvpoll.sim.campaign import BACKENDS, check_backend, code_digest, crash_of, play, result_of, summarise
from kvpoll.sim.campaign_store import Campaign, Identity, Result, Store
from kvpoll.sim.faults import Fault, kinds
from kvpoll.sim.swarm import draw_swarm
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.source import BadInput

STORE = "campaign.sqlite"
SEEDS = 100
Found = dict[str, Any]


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Run many seeds, each with faults that it draws itself, and keep every result in a store."
    more = "The same command goes on where it stopped, and runs no seed twice."
    parser = add_verb(verbs, "campaign", says, act, more)
    add_arguments(parser)
    parser.add_argument(
        "--seeds", metavar="N", type=counted, default=SEEDS, help=f"how many, from --seed on (default {SEEDS})"
    )
    parser.add_argument("--store", metavar="FILE", default=STORE, help=f"SQLite file of results (default {STORE})")
    parser.add_argument("--workers", metavar="N", type=counted, help="runs at a time (default: one for each core)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default=BACKENDS[0], help="joblib: this machine (default); ray: a Ray cluster"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for every seed, not only for those that break")
    parser.add_argument("--summary", action="store_true", help="run nothing, show what every campaign in --store found")


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the seeds that are missing and tell what all of them say."""
    if arguments.summary:
        return _act_summary(Path(arguments.store), arguments.json, screen)
    check_backend(arguments.backend)
    arguments.swarm = arguments.swarm or arguments.faults is None
    plan = plan_of(arguments)
    prepared = prepare(plan)
    wanted = range(arguments.seed, arguments.seed + arguments.seeds)
    with Store(Path(arguments.store)) as store:
        campaign = store.campaign(identity_of(prepared))
        done = store.seeds(campaign)
        missing = [seed for seed in wanted if seed not in done]
        if len(missing) < len(wanted) and not arguments.json:
            screen.say(f"{plural(len(wanted) - len(missing), 'seed')} already in {store.path}")
        interrupted = not _play(store, campaign, prepared, missing, len(wanted), arguments, screen)
        results = [result for result in store.results(campaign) if result.seed in wanted]
    found = summarise(results)
    status = INTERRUPTED if interrupted else _status(found)
    line = _line(plan, arguments)
    if status == VIOLATED:
        line = next(result.repeat for result in results if result.verdict == "breaks")
    if arguments.json:
        more = {"wanted": len(wanted), "interrupted": interrupted, "repeat": line}
        screen.json({**found, **more, "runs": [dataclasses.asdict(result) for result in results]})
        return status
    screen.say()
    if interrupted:
        screen.say(f"interrupted: {len(results):,} of {plural(len(wanted), 'seed')} done; to go on:", "bold")
        screen.say(line)
        screen.say()
    _show(found, screen)
    screen.say(line)
    return status


def _status(found: Found) -> int:
    return DEFECT if found["crashed"] else VIOLATED if found["broken"] else HOLDS


def _line(plan: Plan, arguments: argparse.Namespace) -> str:
    """The command that repeats, or goes on with, the whole campaign."""
    base = dataclasses.replace(plan, faults=None).line(arguments.seed).replace("kvpoll run", "kvpoll campaign", 1)
    words = [] if plan.fault_mode == SWARM else ["--faults", plan.fault_mode]
    words += ["--seeds", str(arguments.seeds), "--store", arguments.store]
    if arguments.workers is not None:
        words += ["--workers", str(arguments.workers)]
    if arguments.backend != BACKENDS[0]:
        words += ["--backend", arguments.backend]
    return f"{base} {shlex.join(words)}"


def identity_of(prepared: Prepared) -> Identity:
    """What tells the results of a plan from those of another."""
    scenario, plan = prepared.scenario, prepared.plan
    workload = "" if plan.trace is None else hashlib.sha256(repr(prepared.arrivals).encode()).hexdigest()[:12]
    return Identity(
        scenario=scenario.name,
        scenario_digest=scenario.digest,
        spec_digest=prepared.protocol.digest,
        code_digest=code_digest(),
        profile=prepared.profile.name,
        rules=json.dumps(dict(prepared.profile.rules), sort_keys=True),
        swarm=plan.fault_mode == SWARM,
        minutes=scenario.timing.hostile_s / 60,
        workload=workload,
        plan=json.dumps(dataclasses.asdict(plan), sort_keys=True),
    )


# ------------------------------------------------------------------------------------------------- in workers


@functools.lru_cache(maxsize=1)
def _prepared(plan: Plan, key: str) -> Prepared:
    """The plan as this process reads it, which must be what the campaign was begun with: a file may have changed
    meanwhile, and another machine may have another kvpoll."""
    prepared = prepare(plan)
    if identity_of(prepared).key != key:
        raise BadInput("scenario, trace, spec or kvpoll itself are not the same in a worker; start the campaign again")
    return prepared


def run_seed(plan: Plan, key: str, seed: int) -> Result | None:
    """One seed in a worker; None when it was interrupted."""
    prepared = _prepared(plan, key)
    faults = prepared.faults(seed)
    draw = draw_swarm(seed, prepared.scenario).line if plan.fault_mode == SWARM else _draw_line(faults)
    try:
        outcome = prepared.run(seed, record=True)()
    except Exception as error:
        return crash_of(seed, error, faults, draw, plan.line(seed))
    return None if outcome.interrupted else result_of(seed, outcome, draw)


def _draw_line(faults: Sequence[Fault]) -> str:
    names = dict.fromkeys(fault.kind.name for fault in faults)
    return f"kinds {len(names)} of {len(kinds())}: {', '.join(names) or '-'}"


# -------------------------------------------------------------------------------------------------- in the parent


def _play(
    store: Store,
    campaign: int,
    prepared: Prepared,
    missing: Sequence[int],
    wanted: int,
    arguments: argparse.Namespace,
    screen: Screen,
) -> bool:
    """Run the missing seeds, each into the store as it ends. False when interrupted."""
    job = functools.partial(run_seed, prepared.plan, identity_of(prepared).key)
    done = wanted - len(missing)
    try:
        with (
            screen.progress(prepared.plan.scenario, " seeds") as advance,
            contextlib.closing(play(job, missing, arguments.workers, arguments.backend)) as results,
        ):
            advance(done, wanted)
            for result in results:
                store.add(campaign, result)
                done += 1
                advance(done, wanted)
                if not arguments.json:
                    _tell(result, arguments.verbose, screen)
    except KeyboardInterrupt:
        return False
    return True


def _tell(result: Result, verbose: bool, screen: Screen) -> None:
    """A line for a seed, and for one that broke what it drew and how to repeat it."""
    held = result.verdict == "holds"
    if held and not verbose:
        return
    failed = sum(result.causes.values())
    told = f"seed {result.seed:<6} {result.verdict:<7}  {result.requests:>6,} requests {failed:>5,} failed"
    if held:
        screen.say(f"{told}  {result.draw}")
        return
    if result.verdict == "crashed":
        screen.say(f"seed {result.seed:<6} crashed  {result.text}", "bold red")
    else:
        broken = " ".join(f"{name} x{count:,}" for name, count in result.counts.items())
        screen.say(f"{told}  {broken}", "red")
        screen.say(f"  {result.invariant} first, at {seconds(result.t)}, {result.node}: {result.text}")
    screen.say(f"  {result.draw}")
    screen.say(f"  {result.repeat}")


def _act_summary(path: Path, as_json: bool, screen: Screen) -> int:
    """Every campaign of a store, without running anything; the exit status is of the worst."""
    with Store(path, must_exist=True) as store:
        found = [(campaign, summarise(store.results(campaign.number))) for campaign in store.campaigns()]
    line = shlex.join(["kvpoll", "campaign", "--summary", "--store", str(path)])
    if as_json:
        campaigns = [{**dataclasses.asdict(campaign.identity), **summary} for campaign, summary in found]
        screen.json({"campaigns": [_unpacked(entry) for entry in campaigns], "repeat": line})
    else:
        for campaign, summary in found:
            _show_identity(campaign, screen)
            _show(summary, screen)
            screen.say()
        if not found:
            screen.say("no campaign yet")
        screen.say(line)
    return max((_status(summary) for _, summary in found), default=HOLDS)


def _unpacked(entry: Found) -> Found:
    return {**entry, "rules": json.loads(entry["rules"]), "plan": json.loads(entry["plan"])}


# ------------------------------------------------------------------------------------------------ what to show


def _show_identity(campaign: Campaign, screen: Screen) -> None:
    identity = campaign.identity
    faults = "faults drawn by swarm" if identity.swarm else f"faults: {Plan(**_plan(identity)).fault_mode}"
    told = f"{identity.scenario}, profile {identity.profile}, {identity.minutes:g} minutes, {faults}"
    screen.say(f"campaign {campaign.number}: {told}", "bold")
    digests = f"spec {identity.spec_digest}, scenario {identity.scenario_digest}, simulator {identity.code_digest}"
    screen.say(digests + (f", workload {identity.workload}" if identity.workload else ""))


def _plan(identity: Identity) -> Found:
    found: Found = json.loads(identity.plan)
    return found


def _show(found: Found, screen: Screen) -> None:
    if not found["seeds"]:
        screen.say("no seed is done")
        return
    _show_faults(found, screen)
    _show_causes(found, screen)
    _show_invariants(found, screen)
    for crash in found["crashes"]:
        screen.say(f"seed {crash['seed']} crashed the simulator: {crash['text']}", "bold red")
        screen.say(f"  {crash['repeat']}")
    all_hold = found["hold"] == found["seeds"]
    told = f"every invariant holds in {found['hold']:,} of {plural(found['seeds'], 'seed')}"
    screen.say(told, "green" if all_hold else "red")


def _show_faults(found: Found, screen: Screen) -> None:
    """Which kinds were there, which really did something, and with which of them runs break."""
    drawn = [entry for entry in found["by_fault"] if entry["drawn"]]
    columns = ["fault", "drawn in", "fired in", "broken with it", "broken without"]
    if drawn:
        rows = [[entry["kind"], *_fault_cells(entry, found["seeds"])] for entry in drawn]
        screen.table(columns, rows, right=columns[1:])
        screen.say()
    if found["never_fired"]:
        screen.say(f"WARNING: drawn, but never did anything: {', '.join(found['never_fired'])}", "yellow")
    if found["never_drawn"] and drawn:
        screen.prose(f"not drawn by any of these seeds: {', '.join(found['never_drawn'])}")


def _fault_cells(entry: Found, runs: int) -> list[str]:
    drawn = entry["drawn"]
    broken = [f"{entry['broken_with']:,} of {drawn:,}", f"{entry['broken_without']:,} of {runs - drawn:,}"]
    return [f"{drawn:,}", f"{entry['fired']:,}", *broken]


def _show_causes(found: Found, screen: Screen) -> None:
    failed = sum(entry["requests"] for entry in found["by_first_cause"])
    screen.say(f"{found['requests']:,} requests: {found['succeeded']:,} succeeded, {failed:,} failed")
    rows = [[entry["cause"], f"{entry['requests']:,}", f"{entry['runs']:,}"] for entry in found["by_first_cause"]]
    if rows:
        screen.table(["first cause of failure", "requests", "in seeds"], rows, right=["requests", "in seeds"])
    took, per_s = found["seconds"], found["events"] / max(found["seconds"], 1e-3)
    screen.say(f"{found['events']:,} events in {took:,.0f} s of cores: {per_s:,.0f} events/s on each")
    screen.say()


def _show_invariants(found: Found, screen: Screen) -> None:
    columns = ["invariant", "name", "broken in", "as the first in", "times", "first seed", "line"]
    rows = [
        [
            entry["invariant"],
            INVARIANTS[entry["invariant"]].name,
            *(f"{entry[name]:,}" for name in ("runs", "first_in", "times")),
            str(entry["first_seed"]),
            entry["repeat"],
        ]
        for entry in found["by_invariant"]
    ]
    if rows:
        screen.table(columns, rows, right=columns[2:6], line="line")
