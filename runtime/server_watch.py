"""Asks a bootstrap server once in a while whether it lives, and in which life (C5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpoll.runtime.bootstrap import Reply
from kvpoll.statemachine.roles import Peer

if TYPE_CHECKING:
    from kvpoll.runtime.host import Host


class ServerWatch:
    """A failure detector of one bootstrap server, the peer machine driven by GET /health."""

    def __init__(
        self,
        host: Host,
        engine: str,
        restarted: Callable[[], Any] = lambda: None,
        suspect: Callable[[], Any] = lambda: None,
    ) -> None:
        """restarted: the server is in another life. suspect: it does not answer."""
        self.host = host
        self.state = Peer("Alive", None)
        self._server = host.servers[engine]
        self._restarted = restarted
        self._suspect = suspect
        self._interval_s = host.profile.number("heartbeat_interval_s")
        self._ask()

    def _ask(self) -> None:
        self.host.after(self._interval_s, self._ask)
        self.host.call(self._server, self._server.client.health, self._heard)

    def _heard(self, reply: Reply) -> None:
        if reply.status == 200:
            self._step("ProbeAnswered", reply.body if isinstance(reply.body, int) else 0)
        else:
            self._step("ProbeMissed", None)

    def answered(self, epoch: int) -> None:
        """The server has answered something else (a registration), in this life. Without it, a server that lives
        for less than an interval would go unnoticed, and its successor be taken for the one that knows this rank.
        """
        self._step("ProbeAnswered", epoch)

    def _step(self, fact: str, epoch: int | None) -> None:
        self.state, orders = self.host.machines.peer.step(self.state, fact, epoch)
        for order, _ in orders:
            if order == "DeclareSuspected":
                self._suspect()
            elif order == "DeclareDead":
                self._restarted()
