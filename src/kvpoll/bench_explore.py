"""The explorer against the clock, and TLC on the same model, on one core each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any, Final

from kvpoll.sim.explorer.checking import job_of
from kvpoll.sim.explorer.judges import judges
from kvpoll.sim.explorer.model import ModelFile, load_model
from kvpoll.sim.explorer.search import Search
from kvpoll.sim.explorer.tlc import check, find_checker
from kvpoll.spec.protocol import Protocol
from kvpoll.spec.source import BadInput

LARGEST: Final = "two-rooms"
"""The largest of the committed models."""

SIDE_BY_SIDE: Final = "one-room"
"""The largest that TLC finishes in about a minute."""

TLC_LIMIT_S: Final = 240.0


def measure(protocol: Protocol, rounds: int, tell: Any) -> dict[str, Any]:
    """Distinct states a second of the explorer, one thread, all judges of safety; and of TLC, one worker, none."""
    tell(f"exploring {LARGEST}")
    largest = [_explored(load_model(LARGEST, protocol), protocol, True) for _ in range(rounds)]
    result: dict[str, Any] = {"model": LARGEST, **_figures(largest)}
    try:
        checker = find_checker()
    except BadInput as error:
        return {**result, "tlc": None, "why": str(error)}
    model = load_model(SIDE_BY_SIDE, protocol)
    ours, theirs = [], []
    for number in range(rounds):
        tell(f"{SIDE_BY_SIDE} in the explorer and in TLC, round {number + 1} of {rounds}")
        ours.append(_explored(model, protocol, False))
        answer = check(job_of(model, protocol, protocol.profile("reference")), checker, limit_s=TLC_LIMIT_S)
        if answer.verdict != "ok":
            raise BadInput(f"TLC on {SIDE_BY_SIDE}: {answer.verdict}: {answer.message}; see spec/tla/README.md")
        theirs.append((answer.distinct, answer.seconds, 0))
    result["beside"] = {"model": SIDE_BY_SIDE, **_figures(ours)}
    result["tlc"] = {"states": theirs[0][0], "seconds": _middle(theirs, 1), "states_per_s": _rate(theirs)}
    return result


def _explored(model: ModelFile, protocol: Protocol, symmetry: bool) -> tuple[int, float, int]:
    """(states, seconds of this thread's processor, bytes) of one exploration under `reference`."""
    prompt = [judge for judge in judges(protocol.bounds) if not judge.timed]
    system = model.build(protocol, protocol.profile("reference"))
    search = Search(system, prompt, symmetry=symmetry)
    began = time.process_time()
    explored = search.run()
    return explored.states, time.process_time() - began, explored.bytes


def _figures(runs: list[tuple[int, float, int]]) -> dict[str, Any]:
    return {
        "states": runs[0][0],
        "seconds": _middle(runs, 1),
        "states_per_s": _rate(runs),
        "bytes_a_state": round(runs[0][2] / runs[0][0], 1),
    }


def _middle(runs: list[tuple[int, float, int]], place: int) -> float:
    return float(f"{median(run[place] for run in runs):.4g}")


def _rate(runs: list[tuple[int, float, int]]) -> float:
    return float(f"{median(states / seconds for states, seconds, _ in runs):.4g}")


def table(found: dict[str, Any], reached: Any) -> Iterator[tuple[str, ...]]:
    """The rows of the table: (what, figure, bar, beside)."""
    speed = found["states_per_s"]
    told = f"{found['states']:,} states in {found['seconds']:.1f} s, {found['bytes_a_state']:.0f} bytes a state"
    yield f"exploring {found['model']}", f"{speed:,.0f} states/s", reached("100 k/s", speed >= 1e5), told
    if found["tlc"] is None:
        yield "TLC", "not measured", "", found["why"]
        return
    beside, tlc = found["beside"], found["tlc"]
    ratio = beside["states_per_s"] / tlc["states_per_s"]
    what = f"exploring {beside['model']}, no symmetry"
    told = f"{beside['states']:,} states in {beside['seconds']:.2f} s, every safety invariant judged"
    yield what, f"{beside['states_per_s']:,.0f} states/s", reached("5x TLC", ratio >= 5), told
    told = f"{tlc['states']:,} states in {tlc['seconds']:.1f} s, nothing judged; kvpoll has {ratio:.1f}x the speed"
    yield f"TLC on {beside['model']}, one worker", f"{tlc['states_per_s']:,.0f} states/s", "", told
