"""Ranks that run in lockstep: collectives that really block, and schedulers that cost nothing when idle.

A scheduler loop that turns without anything new to see changes nothing, so the simulation skips those turns:
a rank sleeps until something wakes its group, then acts at its own next loop boundary. Boundaries differ by rank
(``skew``), which is where drift comes from; nobody ticks.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import simpy

from kvpoll.spec.trace import CollectiveEntered
from kvpoll.statemachine.roles import Collective

if TYPE_CHECKING:
    from kvpoll.sim.world import World

Waiting = Generator[simpy.Event, Any, Any]


class Collectives:
    """The sequence of collectives of one group. Rank i's k-th entry meets every other rank's k-th entry."""

    def __init__(self, world: World, name: str, size: int) -> None:
        self.world = world
        self.name = name
        self.size = size
        self.blocked = False
        self._next = [0] * size
        self._open: dict[int, tuple[Collective, list[Any], simpy.Event]] = {}

    def enter(self, index: int, node: str, kind: str, shape: Any, payload: Any) -> Waiting:
        """Enter the next collective; yields until every rank has entered one of the same kind and shape.

        Returns the payloads of all ranks in order of rank. Never returns when the ranks disagree.
        """
        if self.size == 1:
            return [payload]
        sequence = self._next[index]
        self._next[index] += 1
        world = self.world
        world.emit(CollectiveEntered(world.now, node, self.name, sequence, kind, shape))
        state, payloads, event = self._open.get(sequence) or (Collective(), [None] * self.size, simpy.Event(world.env))
        payloads[index] = payload
        state, orders = world.machines.collective.step(state, "RankEntered", (index, self.size, (kind, shape)))
        self._open[sequence] = (state, payloads, event)
        for order, _ in orders:
            if order == "DeliverDecision":
                del self._open[sequence]
                event.succeed(payloads)
            elif order == "BlockRanks":
                self.blocked = True
                world.mark(node, "collective_mismatch")
        result: list[Any] = yield event
        return result


class Loop:
    """The scheduler loop of one rank, asleep while there is nothing to see."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._awake = False
        self._sleep: simpy.Event | None = None

    def wake(self) -> None:
        """Something changed; take a turn at the next boundary."""
        self._awake = True
        if self._sleep is not None:
            sleep, self._sleep = self._sleep, None
            sleep.succeed()

    def rest(self) -> Waiting:
        """Sleep until woken (returns at once when already woken)."""
        if not self._awake:
            self._sleep = simpy.Event(self.world.env)
            yield self._sleep
        self._awake = False
