"""One figure per race, from real runs: the same request before and after the mend, with what an operator sees.

`draw_all` runs every race scenario under the profiles named here, records the events, and draws them. Nothing in
a figure is typed in by hand but the choice of the request to follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpoll.reports.gauges import draw_success_curve, gauge_row
from kvpoll.reports.spacetime import Panel, draw
from kvpoll.sim import Run, find, load_scenario
from kvpoll.sim.scenario import Expectation, Scenario, chosen_profile
from kvpoll.sim.workload import Arrival
from kvpoll.spec.protocol import Protocol, load
from kvpoll.spec.trace import Admitted

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """What to draw of one scenario: the expectations side by side, the request to follow, a gauge below."""

    scenario: str
    labels: tuple[str, ...]
    rid: str
    gauge: str | None = None


FIGURES = (
    Figure("sglang-24772", ("before-sglang-24772", "after-sglang-24772"), "r0"),
    Figure(
        "sglang-26912",
        ("before-sglang-27028", "after-sglang-27028"),
        "r2",
        "num_prefill_bootstrap_queue_reqs",
    ),
    Figure("sglang-34572", ("after-sglang-27028", "reference"), "r52", "num_prefill_bootstrap_queue_reqs"),
    Figure("sglang-22901", ("before-sglang-22901", "after-sglang-22901", "after-sglang-22901 (query)"), "r1"),
    Figure("sglang-25125", ("before-sglang-25125", "after-sglang-25125"), "r0"),
    Figure("sglang-21299", ("before-sglang-21299", "after-sglang-21299"), "r7", "num_decode_prealloc_queue_reqs"),
    Figure("sglang-29725", ("sglang-0.5.23", "reference"), ""),
    Figure("bootstrap-double-put", ("sglang-0.5.23", "reference"), "r0"),
)

LATENESS_S = (0.0, 0.5, 1, 2, 3, 5, 7, 9, 11, 12, 13, 14, 15, 16, 18, 20, 25, 30, 40, 50, 60)
LATENESS_PROFILES = ("before-sglang-25125", "after-sglang-25125", "reference")


def draw_all(out: Path, progress: Progress = lambda line: None, trials: int = 40) -> list[Path]:
    """Run and draw every race; returns the files written under ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    protocol = load()
    drawn = []
    for figure in FIGURES:
        progress(f"{figure.scenario}: {' | '.join(figure.labels)}")
        drawn.append(draw_race(protocol, figure, out / f"{figure.scenario}.png"))
    progress(f"success against lateness: {trials} seeds at each of {len(LATENESS_S)} points")
    curve = out / "registration-lateness.png"
    draw_success_curve(
        lateness_points(protocol, trials), curve, "bootstrap server late by (s)",
        "requests that succeed once it listens", "sglang#25125: five attempts cover about 12 s, reference any lateness",
    )  # fmt: skip
    return [*drawn, curve]


def draw_race(protocol: Protocol, figure: Figure, out: Path) -> Path:
    """Run one scenario under the chosen expectations and draw one request's life under each."""
    scenario = load_scenario(find(figure.scenario), protocol)
    runs = [_recorded(protocol, scenario, _expectation(scenario, label)) for label in figure.labels]
    focus = _pair_to_follow(figure, runs[0])
    panels = [
        Panel(label, _said_of(_expectation(scenario, label), outcome), events, focus)
        for label, (events, outcome) in zip(figure.labels, runs, strict=True)
    ]
    title = f"{scenario.race or scenario.name}: {scenario.title}"
    return draw(panels, out, title, [gauge_row(figure.gauge)] if figure.gauge else None)


def _expectation(scenario: Scenario, label: str) -> Expectation:
    found = scenario.expectation(label)
    assert found is not None, f"{scenario.name} says nothing of {label}"
    return found


def _recorded(protocol: Protocol, scenario: Scenario, expectation: Expectation) -> tuple[list[Any], Any]:
    events: list[Any] = []
    outcome = Run(protocol, scenario, chosen_profile(protocol, expectation), 0, collect=events)()
    return sorted(events, key=lambda event: event.t), outcome


def _pair_to_follow(figure: Figure, run: tuple[list[Any], Any]) -> tuple[int, int] | None:
    """The named request; without a name, the first that an invariant complains about after the first complaint."""
    events, outcome = run
    if figure.rid:
        return next(event.pair for event in events if isinstance(event, Admitted) and event.rid == figure.rid)
    for violation in sorted(outcome.violations.values(), key=lambda violation: violation.t):
        if violation.pair is not None:
            return (violation.pair[0], violation.pair[1])
    return None


def _said_of(expectation: Expectation, outcome: Any) -> str:
    if not outcome.violations:
        return f"every invariant holds; {outcome.succeeded} of {outcome.requests} requests succeed"
    return f"breaks {', '.join(expectation.shows)}; {outcome.succeeded} of {outcome.requests} requests succeed"


def lateness_points(protocol: Protocol, trials: int) -> dict[str, list[tuple[float, int, int]]]:
    """(seconds late, requests that succeeded, requests) for each profile; requests come 45 s after it listens."""
    scenario = load_scenario(find("sglang-25125"), protocol)
    points: dict[str, list[tuple[float, int, int]]] = {}
    for label in LATENESS_PROFILES:
        profile = protocol.profile(label)
        points[label] = []
        for late_s in LATENESS_S:
            wins = sum(_succeeds_when_late(protocol, scenario, profile, late_s, seed) for seed in range(trials))
            points[label].append((float(late_s), wins, trials))
    return points


def _succeeds_when_late(protocol: Protocol, scenario: Scenario, profile: Any, late_s: float, seed: int) -> bool:
    timing = dataclasses.replace(scenario.timing, hostile_s=late_s + 80.0, probes=0, quiet_s=1.0)
    late = tuple(dataclasses.replace(fault, for_s=late_s) for fault in scenario.faults)
    run = Run(
        protocol, dataclasses.replace(scenario, timing=timing), profile, seed,
        arrivals=[Arrival(late_s + 45.0, 2000, 8)], faults=late,
    )  # fmt: skip
    return run().succeeded == 1
