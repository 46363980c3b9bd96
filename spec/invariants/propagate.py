"""A failure reaches the other side: L2 propagate."""

from __future__ import annotations

import math

from kvpoll.spec import trace
from kvpoll.spec.invariants.monitor import LIVE_POLLS, Recent, TimedMonitor, matches
from kvpoll.spec.trace import Pair


class Propagate(TimedMonitor):
    """L2. Within ``propagate_s`` of the first Failed on one side, every rank of the other side that holds the
    pair in a live poll has left it. The violation is at the deadline, on the rank that still holds it.

    A rank that opens the room after the failure has ``propagate_s`` from its opening. While a fault severs
    any rank of the pair, nothing is due; when it ends the clock starts again, as it does when such a rank
    stops or starts. (Ranks of a pair: those it was admitted to, that hold it or that failed it.) A stopped
    node owes nothing; a failure known only to stopped nodes cannot be told and obliges nobody (L1 remains).
    """

    invariant = "L2"

    def begin(self) -> None:
        self._admitted: Recent[Pair, tuple[str, ...]] = Recent()
        self._holders: dict[Pair, dict[str, str]] = {}
        self._failed: Recent[Pair, dict[str, set[str]]] = Recent()
        self._owed: dict[tuple[Pair, str], float] = {}
        self._severing: dict[tuple[str, str], tuple[str, ...]] = {}

    def on_admitted(self, event: trace.Admitted) -> None:
        """These are the ranks between which a failure has to travel."""
        self._admitted.remember(event.pair, event.prefill + event.decode)

    def on_stepped(self, event: trace.Stepped) -> None:
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        if after in LIVE_POLLS:
            if before not in LIVE_POLLS:
                self._open(event)
            return
        if after == "Failed":
            self._fail(event)
        if before in LIVE_POLLS:
            self._let_go(event.incarnation.pair, event.node)

    def _open(self, event: trace.Stepped) -> None:
        pair = event.incarnation.pair
        self._holders.setdefault(pair, {})[event.node] = event.role
        if any(role != event.role for role in self._failed.get(pair, ())):
            self._owe(event.t, pair, event.node)

    def _let_go(self, pair: Pair, node: str) -> None:
        self._owed.pop((pair, node), None)
        holders = self._holders.get(pair, {})
        holders.pop(node, None)
        if not holders:
            self._holders.pop(pair, None)
            if pair not in self._failed:
                self._admitted.pop(pair, None)

    def _fail(self, event: trace.Stepped) -> None:
        pair = event.incarnation.pair
        failed = self._failed.get(pair)
        if failed is None:
            failed = {}
            self._failed.remember(pair, failed)
        if event.role in failed:
            failed[event.role].add(event.node)
            return
        failed[event.role] = {event.node}
        for node, role in self._holders.get(pair, {}).items():
            if role != event.role and (pair, node) not in self._owed:
                self._owe(event.t, pair, node)

    def _owe(self, t: float, pair: Pair, node: str) -> None:
        deadline = t + self.bounds.propagate_s
        self._owed[pair, node] = deadline
        self.expect(deadline, (pair, node))

    def lapse(self, deadline: float, debt: tuple[Pair, str]) -> None:
        """Report the rank that still holds the pair, unless the link is down."""
        if self._owed.get(debt) != deadline:
            return
        pair, node = debt
        if any(self._touches(severs, pair) for severs in self._severing.values()):
            self._owed[debt] = math.inf
            return
        del self._owed[debt]
        failed = ", ".join(sorted(set().union(*self._failed.get(pair, {}).values())))
        text = f"still live {self.bounds.propagate_s:g} s after it could know that {failed} failed"
        self.violate(deadline, node, pair, text)

    def _ranks(self, pair: Pair) -> set[str]:
        ranks = {*self._admitted.get(pair, ()), *self._holders.get(pair, ())}
        return ranks.union(*self._failed.get(pair, {}).values())

    def _touches(self, severs: tuple[str, ...], pair: Pair) -> bool:
        return any(matches(prefix, node) for node in self._ranks(pair) for prefix in severs)

    def on_fault_began(self, event: trace.FaultBegan) -> None:
        if event.severs:
            self._severing[event.node, event.fault] = event.severs

    def on_fault_ended(self, event: trace.FaultEnded) -> None:
        """Whoever was cut off has the whole bound again."""
        severs = self._severing.pop((event.node, event.fault), ())
        for pair, node in [debt for debt in self._owed if self._touches(severs, debt[0])]:
            self._owe(event.t, pair, node)

    def on_node_started(self, event: trace.NodeStarted) -> None:
        """A new life of a rank has to hear of it, or to find it out, first."""
        self._start_again(event)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """It owes nothing, and it can tell nothing."""
        self._start_again(event)
        node = event.node
        for pair in [pair for pair, holders in self._holders.items() if node in holders]:
            self._let_go(pair, node)
        for pair, failed in self._failed.items():
            for role in [role for role, nodes in failed.items() if nodes == {node}]:
                del failed[role]
                self._forgive(pair, role)
            for nodes in failed.values():
                nodes.discard(node)

    def _start_again(self, event: trace.NodeStarted | trace.NodeStopped) -> None:
        for pair, node in [debt for debt in self._owed if event.node in self._ranks(debt[0])]:
            self._owe(event.t, pair, node)

    def _forgive(self, pair: Pair, failed_role: str) -> None:
        for node, role in self._holders.get(pair, {}).items():
            if role != failed_role:
                self._owed.pop((pair, node), None)
