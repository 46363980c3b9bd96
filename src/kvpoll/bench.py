"""``kvpoll bench``: the figures of docs/benchmarks.md, each beside a named peer, from one run.

Speeds of one machine say little about another, ratios more; so every round measures all subjects in turn, and each
figure is the median of the rounds. Nothing here fails because a machine is slow: a figure below its bar is shown
as such. The exit status is 1 only when a simulation broke an invariant, and 2 when a peer of the runtime is not here
and its figures stay open.
"""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from kvpoll import __version__, bench_explore, bench_runtime
from kvpoll.bench_children import ChildFailed
from kvpoll.bench_simulation import Job, bare_s, idle_events, lone_pair_job, main_job, timed, ttft_p50_s
from kvpoll.bench_step import blocks_kept_by_quiet_steps, quiet_steps_per_s, subjects
from kvpoll.commands.options import Parser, counted, open_to_write
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import BAD_INPUT, HOLDS, VIOLATED
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Protocol, load
from kvpoll.spec.source import BadInput

PARTS: Final = ("step", "room", "simulation", "explore", "runtime")
PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: written by kvpoll bench --docs -->", "<!-- end of figures -->"
RUNTIME_BEGIN, RUNTIME_END = (
    "<!-- figures of the runtime: written by kvpoll bench runtime --docs -->", "<!-- end of figures of the runtime -->"
)  # fmt: skip
OURS: Final = "kvpoll"

Result = dict[str, Any]
Tell = Callable[[str], None]


class Row(NamedTuple):
    """One figure as people see it. bar: what it has to reach, "" when nothing; beside: how it stands to kvpoll."""

    what: str
    figure: str
    bar: str = ""
    beside: str = ""


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write what was asked for. Raises BadInput; returns the exit status.

    ``kvpoll bench soak`` is no measurement that ends in a table: it has options of its own (``kvpoll.soak``).
    """
    if argv[:1] == ["soak"]:
        return int(import_module("kvpoll.soak").main(list(argv[1:])))
    given = _parser().parse_args(list(argv))
    given.only = given.only or given.part
    if given.docs and given.only not in (None, "runtime"):
        told = f"--docs needs every figure, and --only {given.only} leaves some out"
        raise BadInput(f"{told}: leave out one of them; the runtime has a table of its own, so `runtime --docs` works")
    screen = Screen()
    with screen.status("measuring") as tell:
        result = measure(load(), (given.only,) if given.only else PARTS, given.rounds, given.trace, tell)
    if given.json:
        screen.json(result)
    else:
        screen.table(["figure", "measured", "bar", "beside kvpoll"], rows(result), right=["measured"])
        screen.say(f"Medians of {given.rounds}, {machine_line(result['machine'])}.")
    if given.out:
        with open_to_write(Path(given.out)) as file:
            file.write(json.dumps(result, indent=2) + "\n")
    if given.docs:
        write_page(Path(given.docs), result)
    if violations(result):
        return VIOLATED
    return HOLDS if "runtime" not in result or bench_runtime.is_complete(result["runtime"]) else BAD_INPUT


def _parser() -> Parser:
    parser = Parser(prog="kvpoll bench", description="Measure kvpoll beside its peers, in one run on this machine.")
    parser.add_argument("part", nargs="?", choices=PARTS, metavar="PART", help="only this part, as with --only")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--out", metavar="FILE", help="also write the figures to FILE, as JSON")
    parser.add_argument(
        "--docs", metavar="FILE", nargs="?", const=str(PAGE), help="also rewrite the tables in docs/benchmarks.md"
    )
    parser.add_argument("--trace", metavar="FILE", help="a recorded workload in the Mooncake format (JSON lines)")
    parser.add_argument("--rounds", metavar="N", type=counted, default=3, help="each figure is a median of N (3)")
    parser.add_argument("--only", choices=PARTS, help="measure only this part")
    return parser


# -- measuring


def measure(
    protocol: Protocol, parts: Sequence[str], rounds: int, trace: str | None, tell: Tell = lambda text: None
) -> Result:
    """All figures of the chosen parts. ``tell`` hears what is being measured. Raises BadInput or WorkloadError."""
    jobs = [lone_pair_job(protocol, trace), main_job(trace)] if "simulation" in parts else []
    result: Result = {"kvpoll": __version__, "rounds": rounds, "trace": _trace_name(trace), "machine": machine()}
    if "step" in parts:
        result["step"] = _measure_steps(protocol, rounds, tell)
    if "room" in parts:
        result["room"] = _measure_rooms(protocol, tell)
    if jobs:
        result["simulation"] = {job.name: _measure_job(job, rounds, tell) for job in jobs}
        tell("an idle cluster")
        hours = [idle_events(protocol, hours * 3600.0) for hours in (1, 2)]
        result["idle"] = {"events_an_hour": hours[1] - hours[0]}
    if "explore" in parts:
        result["explore"] = bench_explore.measure(protocol, rounds, tell)
    if "runtime" in parts:
        result["runtime"] = _measure_runtime(rounds, tell)
    return result


def _measure_runtime(rounds: int, tell: Tell) -> Result:
    try:
        return bench_runtime.measure(rounds, tell)
    except ChildFailed as error:
        raise BadInput(f"kvpoll bench runtime: {error}") from None


def _measure_steps(protocol: Protocol, rounds: int, tell: Tell) -> Result:
    speeds: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for subject in subjects(protocol):
            tell(f"steps of {subject.name}, round {number + 1} of {rounds}")
            speeds[subject.name].append(subject.steps_per_s())
        speeds["no change"].append(quiet_steps_per_s(protocol))
    quiet = speeds.pop("no change")
    return {
        "steps_per_s": {name: _figure(values) for name, values in speeds.items()},
        "quiet_steps_per_s": _figure(quiet),
        "blocks_kept_by_quiet_steps": blocks_kept_by_quiet_steps(protocol),
    }


def _measure_rooms(protocol: Protocol, tell: Tell) -> Result:
    """Bytes are the same every time, so once is enough."""
    sizes = {}
    for subject in subjects(protocol):
        tell(f"rooms of {subject.name}")
        sizes[subject.name] = round(subject.bytes_a_room(), 1)
    return {"bytes_a_room": sizes}


def _measure_job(job: Job, rounds: int, tell: Tell) -> Result:
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        tell(f"{job.name}, round {number + 1} of {rounds}")
        checked = timed(job, check=True)
        spent["checked"].append(checked.traffic_core_s)
        spent["tail"].append(checked.tail_core_s)
        spent["unchecked"].append(timed(job, check=False).traffic_core_s)
        spent["bare"].append(bare_s(job, checked.outcome))
    outcome = checked.outcome
    return {
        "traffic_s": job.traffic_s,
        "whole_s": round(outcome.simulated_s, 1),
        "traffic_core_s": _figure(spent["checked"]),
        "tail_core_s": _figure(spent["tail"]),
        "times_real_time": _figure([job.traffic_s / core_s for core_s in spent["checked"]]),
        "times_real_time_unchecked": _figure([job.traffic_s / core_s for core_s in spent["unchecked"]]),
        "bare_simpy_core_s": _figure(spent["bare"]),
        "events": outcome.events,
        "requests": outcome.requests,
        "succeeded": outcome.succeeded,
        "ttft_p50_s": round(ttft_p50_s(outcome), 3),
        "faults": len(outcome.faults),
        "invariants": sum(invariant.monitor is not None for invariant in INVARIANTS.values()),
        "violated": sorted(outcome.violations),
    }


def _figure(values: Sequence[float]) -> float:
    """The median, to four significant digits: the rest is noise."""
    return float(f"{median(values):.4g}")


def _trace_name(trace: str | None) -> str | None:
    return None if trace is None else Path(trace).name


def machine() -> Result:
    """What the figures were measured on, and beside which versions."""
    peers = ("simpy", "transitions", "python-statemachine")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "peers": {name: _version(name) for name in peers},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def violations(result: Result) -> list[str]:
    """Invariants that a simulation broke: "1P1D S1"."""
    jobs = result.get("simulation", {})
    return [f"{name} {invariant}" for name, job in jobs.items() for invariant in job["violated"]]


# -- showing


def rows(result: Result) -> list[Row]:
    """The table, on the screen and (without the runtime, which has its own there) in docs/benchmarks.md."""
    found = list(_step_rows(result["step"])) if "step" in result else []
    found += _room_rows(result["room"]) if "room" in result else []
    for name, job in result.get("simulation", {}).items():
        found += _job_rows(name, job)
    if "idle" in result:
        found.append(_idle_row(result["idle"]))
    if "explore" in result:
        found += [Row(*cells) for cells in bench_explore.table(result["explore"], reached)]
    if "runtime" in result:
        found += [Row(*cells) for cells in bench_runtime.table(result["runtime"], reached)]
    return found


def _step_rows(step: Result) -> Iterator[Row]:
    speeds = step["steps_per_s"]
    ours = speeds[OURS]
    yield Row("checked step", f"{ours:,.0f}/s", reached("1 M/s", ours >= 1e6))
    yield Row("checked step that changes nothing", f"{step['quiet_steps_per_s']:,.0f}/s")
    kept = step["blocks_kept_by_quiet_steps"]
    yield Row("memory kept by 100,000 of those", f"{kept:,} blocks", reached("0", kept <= 0))
    for name, speed in speeds.items():
        if name != OURS:
            yield Row(f"step of {name}", f"{speed:,.0f}/s", "", _times(ours / speed, "the speed"))


def _room_rows(room: Result) -> Iterator[Row]:
    sizes = room["bytes_a_room"]
    ours = sizes[OURS]
    yield Row("a room", f"{ours:,.0f} bytes", reached("200 bytes", ours <= 200))
    for name, size in sizes.items():
        if name != OURS:
            yield Row(f"a room of {name}", f"{size:,.0f} bytes", "", _times(size / ours, "the memory", "kvpoll's"))


def _job_rows(name: str, job: Result) -> Iterator[Row]:
    bar = {"1P1D": 1000, "2P2D": 100}[name]
    speed, unjudged, core_s = job["times_real_time"], job["times_real_time_unchecked"], job["traffic_core_s"]
    share = f"{job['succeeded'] / max(1, job['requests']):.1%}"
    load = f"{job['requests']:,} requests, {share} served, TTFT p50 {job['ttft_p50_s']:.2f} s"
    title = f"{name}, {job['traffic_s']:,.0f} s"
    judged = f"{title}, {job['invariants']} invariants on every event"
    broken = f", broke {', '.join(job['violated'])}" if job["violated"] else ""
    faults = f", {job['faults']} faults" if job["faults"] else ""
    yield Row(judged, f"{speed:,.0f}x real time", reached(f"{bar:,}x", speed >= bar), f"{load}{faults}{broken}")
    yield Row(f"{title}, invariants off", f"{unjudged:,.0f}x real time", reached(f"{bar:,}x", unjudged >= bar))
    bare_core_s = job["bare_simpy_core_s"]
    events = f"{job['events']:,} events in {bare_core_s:.2f} s"
    yield Row(f"{name}, bare SimPy loop", events, "", f"kvpoll takes {core_s / bare_core_s:.1f}x as long")


def _idle_row(idle: Result) -> Row:
    events = idle["events_an_hour"]
    return Row("an idle hour of 1P1D", f"{events:,} events", reached("0", events == 0))


def reached(bar: str, holds: bool) -> str:
    """The bar, and whether it was reached."""
    return f"{bar}: {'reached' if holds else 'NOT reached'}"


def _times(ratio: float, what: str, whose: str = "") -> str:
    """ "kvpoll has 7.4x the speed", "60x the memory of kvpoll's": never more digits than the noise allows."""
    number = f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"
    return f"{number} {whose} {what.removeprefix('the ')}" if whose else f"kvpoll has {number} {what}"


def machine_line(facts: Result) -> str:
    """The machine in half a sentence."""
    peers = ", ".join(f"{name} {version}" for name, version in facts["peers"].items())
    cores = f"{facts['cores']} core" + ("" if facts["cores"] == 1 else "s")
    return f"one process on {facts['processor']} ({cores}), {facts['python']}, {peers}"


# -- docs/benchmarks.md


def page_table(result: Result) -> str:
    """The part of docs/benchmarks.md that is written from figures of one process."""
    workload = f"the recorded trace {result['trace']}" if result["trace"] else "the synthetic workload"
    said = f"Medians of {result['rounds']} rounds, {workload}, {machine_line(result['machine'])}."
    return _page_rows(_of_one_process(result), "beside kvpoll") + said


def runtime_table(result: Result) -> str:
    """The part that is written from figures of the runtime."""
    facts = result["machine"]
    said = f"Medians of {result['rounds']} rounds, {facts['processor']} ({facts['cores']} cores), {facts['python']}."
    return _page_rows({"runtime": result["runtime"]}, "beside") + said


def _of_one_process(result: Result) -> Result:
    return {part: figures for part, figures in result.items() if part != "runtime"}


def _page_rows(result: Result, last: str) -> str:
    lines = [f"| figure | measured | bar | {last} |", "|---|---:|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(result)), "", ""])


def with_tables(page: str, result: Result, where: str) -> str:
    """A page with the tables replaced for which there are figures. Raises BadInput when it has no place for one."""
    if rows(_of_one_process(result)):
        page = _with(page, BEGIN, END, page_table(result), where)
    if "runtime" in result:
        page = _with(page, RUNTIME_BEGIN, RUNTIME_END, runtime_table(result), where)
    return page


def _with(page: str, begin: str, end: str, table: str, where: str) -> str:
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise BadInput(f"{where}: has no place for the table; put the lines {begin!r} and {end!r} around it")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def write_page(path: Path, result: Result) -> None:
    """Rewrite the tables of a page. Raises BadInput."""
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; --docs FILE names another page") from None
    text = with_tables(page, result, str(path))
    with open_to_write(path) as file:
        file.write(text)
