"""Making a schedule small: fewest faults, then fewest moves out of order, then fewest moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvpoll.sim.explorer.model import load_model
from kvpoll.sim.explorer.schedule import ScheduledRun, Stepper
from kvpoll.sim.explorer.schedule_text import Schedule
from kvpoll.sim.explorer.system import Move, System
from kvpoll.sim.shrink import Progress, Reduction, Shrunk, Tier, drop, shrink
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput


@dataclass(frozen=True)
class Question:
    """Does a schedule of this scenario still break this invariant? One that cannot be played does not."""

    protocol: Protocol
    scenario: Any
    profile: Profile
    invariant: str

    def __call__(self, schedule: Schedule) -> bool:
        """Play it."""
        try:
            found = ScheduledRun(self.protocol, replace(self.scenario, schedule=schedule), self.profile)()
        except BadInput:
            return False
        return self.invariant in found.violations


def shrink_schedule(
    question: Question,
    progress: Progress = lambda what, tried, case: None,
    budget_s: float | None = None,
) -> Shrunk[Schedule]:
    """Reduce the schedule of a scenario that breaks the invariant."""
    schedule: Schedule = question.scenario.schedule
    system = load_model(schedule.model, question.protocol).build(question.protocol, question.profile)
    moves = {move.name: move for move in system.moves}

    def dropping(name: str, chosen: Callable[[Move], bool]) -> Tier[Schedule]:
        return Tier(name, (_dropping(name, moves, chosen, lambda schedule: _possible(schedule, system)),))

    tiers = (
        dropping("faults", lambda move: move.kind == "fault"),
        dropping("late moves", lambda move: move.kind == "deadline" or move.optional),
        dropping("moves", lambda move: True),
    )
    return shrink(schedule, tiers, question, progress, budget_s)


def _possible(schedule: Schedule, system: System) -> Schedule:
    """The schedule without the moves that are not possible any more: what a dropped move would have led to."""
    stepper, kept = Stepper(system), []
    for written in schedule.moves:
        with contextlib.suppress(BadInput):
            stepper.take(written)
            kept.append(written)
    return replace(schedule, moves=tuple(kept))


def _dropping(
    name: str,
    moves: dict[str, Move],
    chosen: Callable[[Move], bool],
    possible: Callable[[Schedule], Schedule],
) -> Reduction[Schedule]:
    """Keep as few of the chosen moves as possible, and all others that are still possible then."""

    def is_chosen(written: str) -> bool:
        move = moves.get(written.partition(" | ")[0])
        return move is not None and chosen(move)

    def take(schedule: Schedule) -> tuple[int, ...]:
        return tuple(place for place, written in enumerate(schedule.moves) if is_chosen(written))

    def put(schedule: Schedule, kept: tuple[int, ...]) -> Schedule:
        dropped = set(take(schedule)) - set(kept)
        rest = tuple(written for place, written in enumerate(schedule.moves) if place not in dropped)
        return possible(replace(schedule, moves=rest))

    return drop(name, take, put)
