"""How a decode rank finds a request's prefill ranks: topology, DP rank, endpoints, with caches and retries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import simpy

from kvpoll.sim.topology import rank_name
from kvpoll.spec.trace import Stalled
from kvpoll.statemachine.dp_rank import entry_key
from kvpoll.statemachine.roles import Resolution
from kvpoll.statemachine.routes import gives_up, may_use

if TYPE_CHECKING:
    from kvpoll.sim.decode import DecodeRank, Entry


class Finder:
    """The set-up of one rank's receivers. All its HTTP is asynchronous, unless the rule says that it blocks.

    ``_asking``: for each engine whose topology is asked for, who waits for it, and how many answers there had been
    when it came. ``_unanswered``: for each engine, the requests whose DP rank its server did not know, and how often
    each has been asked for.
    """

    def __init__(self, rank: DecodeRank) -> None:
        self.rank = rank
        self.world = rank.world
        self.stall: simpy.Event | None = None
        self._endpoints: dict[str, dict[str, int]] = {}
        self._topology: set[str] = set()
        self._asking: dict[str, dict[Entry, int]] = {}
        self._attempts: dict[str, int] = {}
        self._names: dict[tuple[int, int], list[str]] = {}
        self._unanswered: dict[str, dict[Entry, tuple[Resolution, int]]] = {}
        self._asks_again = False

    def drop(self, engine: str) -> None:
        """Forget what is cached of an engine."""
        self._endpoints.pop(engine, None)
        self._topology.discard(engine)

    def find(self, entry: Entry) -> None:
        """Start the set-up of a receiver."""
        engine = f"P{entry.request.prefill}"
        if engine in self._topology:
            self._resolve(engine, [entry])
        elif engine in self._asking:
            self._asking[engine][entry] = self._attempts[engine]
        else:
            self._asking[engine] = {entry: 0}
            self._ask_topology(engine, 1)

    def give_up(self, rid: str, cause: str) -> None:
        """An abort for a request that has not joined the queue yet (decode_enqueue = after_resolution)."""
        for entry in list(self.rank.by_pair.values()):
            if entry.request.rid == rid:
                self.rank.deliver("AbortRequested", entry.incarnation, cause)
                self._end_unqueued(entry, cause)

    def _end_unqueued(self, entry: Entry, cause: str) -> None:
        self.rank.deliver("Cleared", entry.incarnation)
        self.rank.by_pair.pop(entry.request.pair, None)
        self.rank.report_failure(entry.request, cause)

    # -- topology

    def _ask_topology(self, engine: str, attempt: int) -> None:
        self._attempts[engine] = attempt
        self._request(
            engine,
            "GET /route",
            None,
            attempt - 1,
            lambda status, body: self._topology_answered(engine, attempt, status),
        )

    def _topology_answered(self, engine: str, attempt: int, status: int | str) -> None:
        if self.rank.is_over():
            return
        profile = self.world.profile
        asking = {entry: since for entry, since in self._asking.pop(engine).items() if self._is_wanted(entry)}
        if status == 200:
            self._topology.add(engine)
            self._resolve(engine, list(asking))
            return
        waiting = {entry: since for entry, since in asking.items() if not gives_up(profile, attempt - since, attempt)}
        if waiting:
            self._asking[engine] = waiting
            self.world.after(profile.number("topology_retry_s"), self._ask_topology, engine, attempt + 1)
        for entry in asking:
            if entry not in waiting:
                self._fail(entry, f"topology_{status}")

    def _is_wanted(self, entry: Entry) -> bool:
        room = self.rank.rooms.get(entry.incarnation.room)
        return (
            room is not None and room.incarnation.pair == entry.incarnation.pair and room.local.poll == "Bootstrapping"
        )

    # -- DP rank

    def _resolve(self, engine: str, entries: list[Entry]) -> None:
        asking: dict[Entry, Resolution] = {}
        follows = self.world.topology.follows_room
        dp_ranks = self.rank.decode_engine.cluster.prefill[int(engine[1:])].dp_ranks
        for entry in entries:
            facts = (dp_ranks, follows, entry.request.pair[0] % dp_ranks)
            state, orders = self.world.machines.resolution.step(Resolution(), "TopologyLearned", facts)
            if orders:
                asking[entry] = state
            else:
                self._fetch(entry, state.rank)
        self._query(engine, asking, 0)

    def _query(self, engine: str, asking: dict[Entry, Resolution], repeat: int) -> None:
        """Ask a server for the DP ranks of all these requests in one batch."""
        asking = {entry: state for entry, state in asking.items() if self._is_wanted(entry)}
        if not asking or self.rank.is_over():
            return
        keys = {entry: entry_key(self.world.profile, entry.request.pair) for entry in asking}

        def answered(status: int | str, body: Any) -> None:
            known = body if status == 200 else {}
            for entry, state in asking.items():
                self._dp_rank_answered(engine, entry, state, known.get(keys[entry]), repeat)

        self._request(engine, "POST /query_dp_ranks", tuple(keys.values()), repeat, answered)

    def _dp_rank_answered(self, engine: str, entry: Entry, state: Resolution, rank: int | None, repeat: int) -> None:
        after, orders = self.world.machines.resolution.step(state, "DpRankAnswered", rank)
        if orders:
            self._unanswered.setdefault(engine, {})[entry] = (after, repeat + 1)
            self._arm_retry()
        else:
            self.world.mark(self.rank.node, "dp_rank_queried")
            self._fetch(entry, after.rank)

    def _arm_retry(self) -> None:
        """One clock for the whole rank. With one for each request, every registration that a server's outage swallows
        would add its own five repeats a second to those of the others (R3).
        """
        if self._unanswered and not self._asks_again:
            self._asks_again = True
            self.world.after(self.world.profile.number("dp_query_retry_s"), self._ask_again)

    def _ask_again(self) -> None:
        """Repeat what one server has not answered, all requests in one batch; the servers take turns."""
        self._asks_again = False
        engine = next(iter(self._unanswered))
        waiting = self._unanswered.pop(engine)
        asking: dict[Entry, Resolution] = {}
        for entry, (state, _) in waiting.items():
            after, orders = self.world.machines.resolution.step(state, "RetryDue")
            if orders:
                asking[entry] = after
        self._query(engine, asking, max(repeat for _, repeat in waiting.values()))
        self._arm_retry()

    # -- endpoints

    def _targets(self, entry: Entry, dp: int) -> list[str]:
        topology, mapping = self.world.topology, self.rank.mapping
        sizes = topology.prefill.sizes
        key = (entry.request.prefill, dp)
        if key in self._names:
            return self._names[key]
        names = self._names[key] = [
            rank_name("P", entry.request.prefill, sizes, dp, pp, tp, cp)
            for pp in mapping.pp_ranks for tp in mapping.tp_ranks for cp in mapping.cp_ranks
        ]  # fmt: skip
        return names

    def _fetch(self, entry: Entry, dp: int | None, repeat: int = 0) -> None:
        if not self._is_wanted(entry) or self.rank.is_over() or dp is None:
            return
        engine = f"P{entry.request.prefill}"
        known = self._endpoints.setdefault(engine, {})
        missing = [node for node in self._targets(entry, dp) if node not in known]
        if not missing:
            self._finish(entry, dp)
            return
        node = missing[0]

        def answered(status: int | str, body: Any) -> None:
            if status == 200 and not may_use(self.world.profile, body[node], self._believed_epoch(engine)):
                self.world.mark(self.rank.node, "stale_route_refused")
                self.world.after(self.world.profile.number("topology_retry_s"), self._fetch, entry, dp, repeat + 1)
            elif status == 200:
                self._endpoints.setdefault(engine, {})[node] = body[node]
                self._fetch(entry, dp)
            elif self._is_wanted(entry):
                self.drop(engine)
                self._fail(entry, f"route_{status}")

        self._request(engine, "GET /route", node, repeat, answered)

    def _believed_epoch(self, engine: str) -> int | None:
        """The engine's process epoch as this rank's failure detector last saw it."""
        detectors = self.rank.decode_engine.detectors
        return next((d.state.epoch for d in detectors if d.rank is self.rank and d.target == engine), None)

    def _real_tp(self) -> str | None:
        """Where others are dummies, the tensor rank that is real."""
        mapping = self.rank.mapping
        return f"/tp{mapping.tp_ranks[0]}" if mapping.has_dummies else None

    def _finish(self, entry: Entry, dp: int) -> None:
        from kvpoll.sim.decode import PeerRank

        rank = self.rank
        known = self._endpoints[f"P{entry.request.prefill}"]
        ranks = rank.decode_engine.cluster.unique_indices
        real = self._real_tp()
        peers = tuple(
            PeerRank(ranks[node], node, known[node], real is not None and not node.endswith(real))
            for node in self._targets(entry, dp)
        )
        rank.peers[rank.key(entry.incarnation)] = peers
        mask = sum(1 << peer.bit for peer in peers)
        rank.deliver("RoutesResolved", entry.incarnation, (mask, rank.mapping.responses_required))
        rank.deliver("SetupFinished", entry.incarnation)
        self._join(entry)

    def _fail(self, entry: Entry, cause: str) -> None:
        """The set-up call of the receiver fails, and then returns; what the return does is a rule (sglang#24772)."""
        self.world.mark(self.rank.node, "setup_failed")
        self.rank.deliver("RouteUnavailable", entry.incarnation, cause)
        self.rank.deliver("SetupFinished", entry.incarnation)
        self._join(entry)

    def _join(self, entry: Entry) -> None:
        if entry.request.rid not in self.rank.entries and self.rank.by_pair.get(entry.request.pair) is entry:
            self.rank.enqueue(entry)
            self.rank.group.wake()

    # -- HTTP

    def _request(self, engine: str, route: str, detail: Any, repeat: int, reply: Any) -> None:
        """Send one request; under http_calls = "blocking" the scheduler stands still until the answer."""
        server = self.rank.decode_engine.cluster.server_of(engine)
        world, began = self.world, self.world.now
        if world.profile["http_calls"] == "asynchronous" or route.startswith("POST"):
            server.request(self.rank.node, route, detail, repeat, reply)
            return
        stall = self.stall = simpy.Event(world.env)

        def answered(status: int | str, body: Any) -> None:
            if not self.rank.is_over():
                world.emit(Stalled(world.now, self.rank.node, world.now - began, route))
            if self.stall is stall:
                self.stall = None
            stall.succeed()
            reply(status, body)

        server.request(self.rank.node, route, detail, repeat, answered)
