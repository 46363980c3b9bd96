"""What came of a run: whether it is what the scenario says, and the numbers that people ask for."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from kvpoll.sim.faults import Fault
from kvpoll.sim.run import Outcome
from kvpoll.sim.scenario import Expectation

FOR_EVER_S = 1e8
"""A fault that lasts longer than this ends with the hostile phase."""


def deviations(outcome: Outcome, said: Expectation) -> list[str]:
    """How an outcome differs from what its scenario says: a sentence each, none when it is as expected."""
    seen, wanted = set(outcome.violations), set(said.violates)
    unseen = [mark for mark in said.marks if not outcome.marks.get(mark)]
    causes = [cause for cause in said.causes if not outcome.causes.get(cause)]
    return [
        *(f"{name} broke and was not expected to" for name in sorted(seen - wanted)),
        *(f"{name} was expected to break and did not" for name in sorted(wanted - seen)),
        *(f"mark {mark!r} was never seen" for mark in unseen),
        *(f"no request failed with cause {cause!r}" for cause in causes),
        *(f"fault {kind!r} never did anything" for kind in outcome.unfired),
    ]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value with at least that share of all values at or below it; None without values."""
    ordered = sorted(values)
    return ordered[max(ceil(share * len(ordered) - 1e-9) - 1, 0)] if ordered else None


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99, to the microsecond."""
    found = {name: percentile(values, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {name: None if value is None else round(value, 6) for name, value in found.items()}


def by_count(counts: dict[str, int]) -> dict[str, int]:
    """Largest first; equal counts by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def first_violation_s(outcome: Outcome) -> float | None:
    """When the first invariant broke."""
    return min((violated.t for violated in outcome.violations.values()), default=None)


def in_order(outcome: Outcome, said: Expectation | None) -> tuple[list[str], list[str]]:
    """The broken invariants: those that the race is about, then those that follow, each in order of time."""
    names = sorted(outcome.violations, key=lambda name: (outcome.violations[name].t, name))
    shown = said.shows if said is not None else ()
    return [name for name in names if name in shown], [name for name in names if name not in shown]


def as_object(outcome: Outcome, said: Expectation | None) -> dict[str, Any]:
    """An outcome as one JSON object. Wall-clock times apart, the same seed gives the same object."""
    judged = (
        {} if said is None else {"as_expected": not deviations(outcome, said), "deviations": deviations(outcome, said)}
    )
    return {
        "scenario": outcome.scenario,
        "profile": outcome.profile,
        "seed": outcome.seed,
        "verdict": "holds" if outcome.holds else "breaks",
        "interrupted": outcome.interrupted,
        **judged,
        "violations": [
            {"invariant": name, **found, "times": outcome.counts[name]}
            for name, found in violation_objects(outcome).items()
        ],
        "faults": [fault_object(fault, outcome) for fault in by_time(outcome.faults)],
        "requests": outcome.requests,
        "succeeded": outcome.succeeded,
        "failed_by_first_cause": by_count(outcome.causes),
        "ttft_s": percentiles(outcome.ttft_s),
        "marks": dict(sorted(outcome.marks.items())),
        "events": outcome.events,
        "simulated_s": outcome.simulated_s,
        "wall_s": round(outcome.wall_s, 3),
        "events_per_s": round(outcome.events / outcome.wall_s),
        "simulated_per_real": round(outcome.simulated_s / outcome.wall_s, 1),
        "digest": outcome.digest,
        "repeat": outcome.line,
    }  # fmt: skip


def violation_objects(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Invariant -> its first violation (t, node, text), in order of time."""
    ordered = sorted(outcome.violations.items(), key=lambda item: (item[1].t, item[0]))
    return {name: {"t": found.t, "node": found.node, "text": found.text} for name, found in ordered}


def by_time(faults: Sequence[Fault]) -> list[Fault]:
    """Faults in order of their beginning; those that wait for an event come last."""
    return sorted(faults, key=lambda fault: (fault.trigger is not None, fault.at_s, fault.id))


def fault_object(fault: Fault, outcome: Outcome) -> dict[str, Any]:
    """One fault of a schedule; for_s is None when it lasts to the end of the hostile phase."""
    return {
        "kind": fault.kind.name,
        "target": fault.target,
        "at_s": fault.at_s,
        "for_s": None if fault.for_s > FOR_EVER_S else fault.for_s,
        "trigger": fault.trigger,
        "parameters": dict(fault.parameters),
        "fired": fault.kind.name not in outcome.unfired,
    }
