"""Swarm testing: each seed first draws which kinds of fault exist at all, and how many and how strong they are.

With one fault of every kind in every run, kinds hide each other: a crash every minute leaves nothing alive that a
lost message could hurt. Groce et al. (Swarm Testing, ISSTA 2012) found more defects by leaving features out at
random. So a seed draws a probability, and with it each kind is in or out: some seeds have two kinds, some twenty.
A kind that is in gets a strength, one third of every range that ``spec/faults.toml`` declares for it, and a number.

Every kind draws from chance of its own: a kind that is added to the vocabulary, or taken out of it, changes no
draw of the others.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpoll.sim.faults import Fault, Kind, draw_fault, kinds
from kvpoll.sim.scenario import Scenario

STRENGTHS = ("weak", "middling", "strong")
"""Thirds of a range, from the end where a fault does least."""

NUMBERS, WEIGHTS = (1, 2, 3), (6, 3, 1)
"""How many faults of a kind, and how often each number is drawn."""

SHARES = (0.05, 0.95)
"""The range of the probability with which a kind is in; drawn once a seed."""

MOMENTS = ("at_s", "after_s")
"""Ranges that say when, not how much: no strength narrows them."""


@dataclass(frozen=True)
class Pick:
    """One kind that exists in a run."""

    kind: str
    number: int
    strength: str

    def __str__(self) -> str:
        many = f" x{self.number}" if self.number > 1 else ""
        return f"{self.kind}{many} {self.strength}"


@dataclass(frozen=True)
class Swarm:
    """What one seed drew: the kinds, and the fault schedule made of them. ``of`` is how many kinds there are."""

    picks: tuple[Pick, ...]
    faults: tuple[Fault, ...]
    of: int

    @property
    def line(self) -> str:
        """The draw for people: ``kinds 2 of 26: abort_storm x2 strong, slow_link weak``."""
        return f"kinds {len(self.picks)} of {self.of}: {', '.join(map(str, self.picks))}"


def draw_swarm(seed: int | str, scenario: Scenario) -> Swarm:
    """The kinds, numbers, strengths and schedule of one seed. At least one kind is in."""
    drawable = [kind for kind in kinds().values() if kind.draw]
    chance = random.Random(f"{seed}/swarm")
    share, lonely = chance.uniform(*SHARES), chance.choice(drawable).name
    own = {kind.name: random.Random(f"{seed}/swarm/{kind.name}") for kind in drawable}
    chosen = [kind for kind in drawable if own[kind.name].random() < share]
    chosen = chosen or [kind for kind in drawable if kind.name == lonely]
    drawn = [_draw_kind(own[kind.name], kind, scenario) for kind in chosen]
    picks = tuple(pick for pick, _ in drawn)
    return Swarm(picks, tuple(fault for _, faults in drawn for fault in faults), len(drawable))


def _draw_kind(chance: random.Random, kind: Kind, scenario: Scenario) -> tuple[Pick, list[Fault]]:
    """How many and how strong, then that many faults. A kind whose moment is fixed comes once."""
    strength = chance.choice(STRENGTHS)
    [number] = chance.choices(NUMBERS, WEIGHTS)
    if "at_s" in kind.draw:
        number = 1
    faults = []
    for count in range(1, number + 1):
        narrow = dataclasses.replace(kind, draw=_narrowed(chance, kind.draw, strength))
        fault = draw_fault(chance, narrow, scenario.topology, scenario.timing.hostile_s)
        faults.append(dataclasses.replace(fault, kind=kind, id=kind.name if count == 1 else f"{kind.name}-{count}"))
    return Pick(kind.name, number, strength), faults


def _narrowed(chance: random.Random, draw: Mapping[str, Any], strength: str) -> dict[str, Any]:
    """The ranges of a kind, cut down to the third that is this strong."""
    return {
        name: value if name in MOMENTS or not isinstance(value, list) else _third(chance, value, strength)
        for name, value in draw.items()
    }


def _third(chance: random.Random, whole: list[Any], strength: str) -> list[Any]:
    """One third of a range. One on both sides of zero is cut by distance from zero, on a drawn side."""
    low, high = whole
    if low < 0 < high:
        side = high if chance.random() < 0.5 else low
        return sorted([side * edge for edge in _edges(strength)])
    start, end = (low + (high - low) * edge for edge in _edges(strength))
    if isinstance(low, int) and isinstance(high, int):
        return [math.floor(start), math.ceil(end)]
    return [start, end]


def _edges(strength: str) -> tuple[float, float]:
    third = STRENGTHS.index(strength)
    return third / len(STRENGTHS), (third + 1) / len(STRENGTHS)
