"""Profiles against invariants: what every model says of every profile, and the shortest trace of what breaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import joblib

from kvpoll.sim.explorer.explore import Limits, explore, replay
from kvpoll.sim.explorer.model import load_model
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Value, load

REFERENCE: Final = "reference"
MEMORY_BYTES: Final = 6 << 30
"""What one exploration may take."""


class Shortest(NamedTuple):
    """The shortest counterexample that one model has: its length and cycle in moves, and its scenario's text."""

    length: int
    cycle: int
    text: str
    moves: tuple[str, ...]
    scenario: str
    replays: bool


class Verdict(NamedTuple):
    """What one model says of one profile. exercised: ids whose monitors heard enough.

    depth: how deep it went; complete: to the end. liveness: was what must come true judged?
    """

    profile: str
    model: str
    digest: str
    states: int
    depth: int
    complete: bool
    seconds: float
    liveness: bool
    exercised: tuple[str, ...]
    unwitnessed: tuple[str, ...]
    broken: dict[str, Shortest]


class Cell(NamedTuple):
    """One profile and one invariant. verdict: "holds", "holds so far" (to ``length`` moves: a model was too large to
    be finished), "broken" (after ``length`` moves) or "not exercised".
    """

    profile: str
    invariant: str
    verdict: str
    length: int | None = None
    model: str | None = None
    found: Shortest | None = None


def judge(
    profile_name: str,
    model_name: str,
    most: int | None = None,
    rules: Mapping[str, Value] | None = None,
) -> Verdict:
    """Explore one model under one profile, with some rules switched, and replay what it finds."""
    protocol, rules = load(), rules or {}
    model, profile = load_model(model_name, protocol), protocol.profile(profile_name).with_rules(rules)
    limits = Limits(memory_bytes=MEMORY_BYTES, states=most, liveness=True if rules else None)
    report = explore(model, protocol, profile, rules, limits=limits)
    broken = {}
    for found in report.broken.values():
        origin = f"kvpoll explore {model_name} --profile {profile_name}"
        text, result, _ = replay(report, found, protocol, origin)
        moves = tuple(taken.outcome.label for taken in (*found.path, *found.cycle))
        again = found.invariant in result.violations
        broken[found.invariant] = Shortest(found.depth, len(found.cycle), found.text, moves, text, again)
    return Verdict(
        profile_name,
        model_name,
        model.digest,
        report.safety.states,
        report.safety.depth,
        report.complete,
        round(report.safety.seconds, 2),
        report.liveness is not None,
        tuple(sorted(report.exercised)),
        tuple(report.unwitnessed),
        broken,
    )


def judge_all(profiles: Sequence[str], models: Sequence[str], workers: int, most: int | None) -> Iterator[Verdict]:
    """Every model under every profile, as they are done, in several processes."""
    jobs = [(profile, model) for model in models for profile in profiles]
    parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
    yield from parallel(joblib.delayed(judge)(*job) for job in jobs)


def blame(model_name: str, rules: Mapping[str, Value], invariant: str) -> Shortest | None:
    """What these rules alone, switched in `reference`, do to one invariant on one model."""
    return judge(REFERENCE, model_name, None, rules).broken.get(invariant)


def cells(verdicts: Iterable[Verdict], profiles: Sequence[str]) -> dict[tuple[str, str], Cell]:
    """The matrix: for every profile and invariant the shortest counterexample over all models."""
    known = list(verdicts)
    return {
        (profile, invariant): _cell(profile, invariant, [each for each in known if each.profile == profile])
        for profile in profiles
        for invariant in INVARIANTS
    }


def _cell(profile: str, invariant: str, verdicts: list[Verdict]) -> Cell:
    broken = [(each.broken[invariant], each.model) for each in verdicts if invariant in each.broken]
    if broken:
        found, model = min(broken, key=lambda each: (each[0].length, each[1]))
        return Cell(profile, invariant, "broken", found.length, model, found)
    heard = [each for each in verdicts if invariant in each.exercised]
    unfinished = [each.depth for each in heard if not each.complete]
    if unfinished:
        return Cell(profile, invariant, "holds so far", min(unfinished))
    return Cell(profile, invariant, "holds" if heard else "not exercised")


def as_object(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON, without the scenarios' texts."""
    broken = {
        name: {"length": found.length, "cycle": found.cycle, "text": found.text, "replays": found.replays}
        for name, found in sorted(verdict.broken.items())
    }
    return {**verdict._asdict(), "broken": broken}
