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

        Returns the payloads of all ranks in order of rank. Never returns when the ranks disagree. A group of one
        has nobody to wait for; its rank skips the call.
        """
        sequence = self._next[index]
        self._next[index] += 1
        world = self.world
        world.emit(CollectiveEntered(world.now, node, self.name, sequence, kind, shape))
        state, payloads, event = self._open.get(sequence) or (
            Collective(),
            [None] * self.size,
            simpy.Event(world.env),
        )
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


class Turns:
    """The turns that the ranks of one group take together, asleep while there is nothing to see.

    Every rank takes every turn, so that their collectives pair up; who is early waits in the collective.
    """

    def __init__(self, world: World, size: int = 1) -> None:
        self.world = world
        self._wanted = 0
        self._begun = [0] * size
        self._sleepers: list[simpy.Event | None] = [None] * size

    def wake(self) -> None:
        """Something changed: one more turn for everybody, after any that a rank has already begun."""
        self._want(max(self._begun) + 1)

    def again(self, index: int) -> None:
        """The turn that rank ``index`` has just taken changed something: one more after it."""
        self._want(self._begun[index] + 1)

    def _want(self, turn: int) -> None:
        if turn <= self._wanted:
            return
        self._wanted = turn
        for index, sleeper in enumerate(self._sleepers):
            if sleeper is not None:
                self._sleepers[index] = None
                sleeper.succeed()

    def rest(self, index: int) -> Waiting:
        """Sleep until a turn is wanted that rank ``index`` has not begun, then begin it."""
        if self._begun[index] >= self._wanted:
            sleeper = self._sleepers[index] = simpy.Event(self.world.env)
            yield sleeper
        self._begun[index] += 1
