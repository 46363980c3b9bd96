"""Who is believed alive: failure detection of ranks by asking the rank itself, not the server in front of it.

Each watched peer has one ``Peer`` machine (``spec/kvpoll.toml``, role peer). This driver only keeps the time: once in
``heartbeat_interval_s`` it asks, and offers the machine ProbeAnswered(epoch) or ProbeMissed. What follows from them
is the machine's: DeclareSuspected, DeclareDead. Any message from a peer answers, since the rank's loop sent it.

A process that was itself stopped, or whose loop stood still, has heard nobody and may not blame the others. It finds
that out from its own clock: between two ticks of a healthy loop lies less than an interval. After such a gap every
open question is asked again instead of being counted as missed. Once: a loop whose every step is longer than an
interval would otherwise never find anybody dead.

No I/O and no clock here: ``now`` is any monotonic number of seconds, and asking is a callback. Receive before you
tick, so that an answer that is already here is heard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvpoll.spec.protocol import Profile
from kvpoll.statemachine.roles import Machines, Peer

TICKS_AN_INTERVAL: Final = 4
"""How often a tick is wanted, so that one that comes late by a moment is not mistaken for a gap."""


class _Watched:
    """One peer: what is believed, when it is asked next, and whether a question of ours is open or was excused."""

    __slots__ = ("asked", "due", "excused", "state")

    def __init__(self, state: Peer, due: float) -> None:
        self.state = state
        self.due = due
        self.asked = False
        self.excused = False


class Heartbeats:
    """One process's failure detector of all peers that it watches. ``gaps`` counts how often it slept itself."""

    def __init__(
        self,
        machines: Machines,
        profile: Profile,
        now: float,
        send_ping: Callable[[str, int], None],
        on_suspected: Callable[[str], None],
        on_dead: Callable[[str, int], None],
        on_restored: Callable[[str], None],
    ) -> None:
        """send_ping(node, serial): ask, addressed to no epoch, so that a new life answers with its own.
        on_suspected(node): it does not answer, and may still be writing. on_dead(node, epoch): that life is over,
        proven by a newer one. on_restored(node): it answers again after silence; something may have been lost.
        """
        self.gaps = 0
        self._machine = machines.peer
        self._interval_s = profile.number("heartbeat_interval_s")
        self._send_ping = send_ping
        self._on_suspected = on_suspected
        self._on_dead = on_dead
        self._on_restored = on_restored
        self._watched: dict[str, _Watched] = {}
        self._ticked = now
        self._serial = 0

    def watch(self, node: str, epoch: int | None = None) -> None:
        """Begin to ask a peer, at the next tick; ``epoch`` is its life if that is known already. Once is enough."""
        if node not in self._watched:
            self._watched[node] = _Watched(Peer("Alive", epoch), self._ticked)

    def unwatch(self, node: str) -> None:
        """Ask no more and forget it: it said Goodbye, or nothing here concerns it any more."""
        self._watched.pop(node, None)

    def state_of(self, node: str) -> Peer | None:
        """What is believed of a peer; None when it is not watched."""
        watched = self._watched.get(node)
        return None if watched is None else watched.state

    def pong(self, node: str, epoch: int) -> None:
        """A message came from a peer in this life. Of a life before the believed one it answers nothing."""
        watched = self._watched.get(node)
        if watched is None:
            return
        before = watched.state
        if before.epoch is not None and epoch < before.epoch:
            return
        watched.asked = watched.excused = False
        self._step(node, watched, "ProbeAnswered", epoch)
        if before.state != "Alive" and self._watched.get(node) is watched:
            self._on_restored(node)

    heard = pong

    def tick(self, now: float) -> float:
        """Judge the questions that are due, ask again, and return when the next tick is wanted.

        Callbacks may watch and unwatch. Clocks that go backwards are taken as standing still.
        """
        now = max(now, self._ticked)
        slept = now - self._ticked > self._interval_s
        self._ticked = now
        self.gaps += slept
        for node, watched in list(self._watched.items()):
            if self._watched.get(node) is not watched:
                continue  # a callback of this round has unwatched it
            if slept and watched.asked and not watched.excused:
                watched.excused = True
                self._ask(node, watched, now)
            elif watched.due <= now:
                if watched.asked:
                    self._step(node, watched, "ProbeMissed", None)
                if self._watched.get(node) is watched:
                    watched.excused = False
                    self._ask(node, watched, now)
        soonest = min((watched.due for watched in self._watched.values()), default=now + self._interval_s)
        return min(soonest, now + self._interval_s / TICKS_AN_INTERVAL)

    def _ask(self, node: str, watched: _Watched, now: float) -> None:
        self._serial += 1
        watched.asked = True
        watched.due = now + self._interval_s
        self._send_ping(node, self._serial)

    def _step(self, node: str, watched: _Watched, fact: str, epoch: int | None) -> None:
        former = watched.state.epoch
        watched.state, orders = self._machine.step(watched.state, fact, epoch)
        for order, _ in orders:
            if order == "DeclareSuspected":
                self._on_suspected(node)
            elif order == "DeclareDead":
                assert former is not None
                self._on_dead(node, former)
