"""How a decode rank finds a request's prefill ranks: topology, DP rank, endpoints, with caches and retries.

A request that fails meanwhile may still be looked for, so that its prefill ranks hear of it (``routes.still_looks``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpoll.spec.trace import Stalled
from kvpoll.statemachine.conduct import waits_for_http
from kvpoll.statemachine.dp_rank import entry_key
from kvpoll.statemachine.ranks.host import Happening, Reply, rank_name, unique_index
from kvpoll.statemachine.roles import Resolution
from kvpoll.statemachine.routes import MISMATCH, asks_together, gives_up, gives_up_endpoint, may_use, still_looks

if TYPE_CHECKING:
    from kvpoll.statemachine.machine import Local
    from kvpoll.statemachine.ranks.receiver import Entry, ReceiverRank


Wanted = tuple[str, "Entry | None"]


class Finder:
    """The set-up of one rank's receivers. All its HTTP is asynchronous, unless the rule says that it blocks.

    ``_asking``: for each engine whose topology is asked for, who waits for it, and how many answers there had been
    when it came. ``_unanswered``: for each engine, the requests whose DP rank its server did not know, and how often
    each has been asked for. ``_fetching``: for each prefill rank whose endpoint is asked for, or will be again, who
    waits for it, with the DP rank that each was told and how many answers have been of no use to it. Where requests do
    not ask together, each is a key of its own.
    """

    def __init__(self, rank: ReceiverRank) -> None:
        self.rank = rank
        self.host = rank.host
        self.stall: Happening | None = None
        self._endpoints: dict[str, dict[str, int]] = {}
        self._topology: set[str] = set()
        self._asking: dict[str, dict[Entry, int]] = {}
        self._attempts: dict[str, int] = {}
        self._names: dict[tuple[str, int], dict[str, int]] = {}
        self._unanswered: dict[str, dict[Entry, tuple[Resolution, int]]] = {}
        self._fetching: dict[Wanted, dict[Entry, tuple[int, int]]] = {}
        self._asks_again = False

    def drop(self, engine: str) -> None:
        """Forget what is cached of an engine."""
        self._endpoints.pop(engine, None)
        self._topology.discard(engine)
        for key in [key for key in self._names if key[0] == engine]:
            del self._names[key]

    def find(self, entry: Entry) -> None:
        """Start the set-up of a receiver."""
        engine = entry.engine
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
        self.rank.unqueued_failed(entry, cause)

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
        profile = self.host.profile
        asking = {entry: since for entry, since in self._asking.pop(engine).items() if self._is_wanted(entry)}
        if status == 200:
            self._topology.add(engine)
            self._resolve(engine, list(asking))
            return
        for entry, since in asking.items():
            if status == MISMATCH or (self._is_open(entry) and gives_up(profile, attempt - since, attempt)):
                self._fail(entry, f"topology_{status}")
        waiting = {entry: since for entry, since in asking.items() if self._is_wanted(entry)}
        if waiting and status != MISMATCH:
            self._asking[engine] = waiting
            self.host.after(profile.number("topology_retry_s"), self._ask_topology, engine, attempt + 1)

    def _room(self, entry: Entry) -> Local | None:
        room = self.rank.rooms.get(entry.incarnation.room)
        return room.local if room is not None and room.incarnation.pair == entry.incarnation.pair else None

    def _is_open(self, entry: Entry) -> bool:
        """Does its set-up wait? One that has failed and is only looked for has all the time that its room has."""
        room = self._room(entry)
        return room is not None and room.poll == "Bootstrapping"

    def _is_wanted(self, entry: Entry) -> bool:
        room = self._room(entry)
        return room is not None and still_looks(self.host.profile, room)

    # -- DP rank

    def _resolve(self, engine: str, entries: list[Entry]) -> None:
        asking: dict[Entry, Resolution] = {}
        plan = self.host.plan(engine)
        dp_ranks, follows = plan.sizes.dp, plan.follows_room
        for entry in entries:
            facts = (dp_ranks, follows, entry.request.pair[0] % dp_ranks)
            state, orders = self.host.machines.resolution.step(Resolution(), "TopologyLearned", facts)
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
        keys = {entry: entry_key(self.host.profile, entry.request.pair) for entry in asking}

        def answered(status: int | str, body: Any) -> None:
            known = body if status == 200 else {}
            for entry, state in asking.items():
                self._dp_rank_answered(engine, entry, state, known.get(keys[entry]), repeat)

        self._request(engine, "POST /query_dp_ranks", tuple(keys.values()), repeat, answered)

    def _dp_rank_answered(self, engine: str, entry: Entry, state: Resolution, rank: int | None, repeat: int) -> None:
        after, orders = self.host.machines.resolution.step(state, "DpRankAnswered", rank)
        if orders:
            self._unanswered.setdefault(engine, {})[entry] = (after, repeat + 1)
            self._arm_retry()
        else:
            self.host.mark(self.rank.node, "dp_rank_queried")
            self._fetch(entry, after.rank)

    def _arm_retry(self) -> None:
        """One clock for the whole rank. With one for each request, every registration that a server's outage swallows
        would add its own five repeats a second to those of the others (R3).
        """
        if self._unanswered and not self._asks_again:
            self._asks_again = True
            self.host.after(self.host.profile.number("dp_query_retry_s"), self._ask_again)

    def _ask_again(self) -> None:
        """Repeat what one server has not answered, all requests in one batch; the servers take turns."""
        self._asks_again = False
        engine = next(iter(self._unanswered))
        waiting = self._unanswered.pop(engine)
        asking: dict[Entry, Resolution] = {}
        for entry, (state, _) in waiting.items():
            after, orders = self.host.machines.resolution.step(state, "RetryDue")
            if orders:
                asking[entry] = after
        self._query(engine, asking, max(repeat for _, repeat in waiting.values()))
        self._arm_retry()

    # -- endpoints

    def _targets(self, entry: Entry, dp: int) -> dict[str, int]:
        """Prefill ranks that this one contacts for a request, by name, and their bits."""
        key = (entry.engine, dp)
        if key in self._names:
            return self._names[key]
        sizes, mapping = self.host.plan(entry.engine).sizes, self.rank.mapping(entry.engine)
        names = self._names[key] = {
            rank_name(entry.engine, sizes, dp, pp, tp, cp): unique_index(sizes, pp, tp, cp)
            for pp in mapping.pp_ranks for tp in mapping.tp_ranks for cp in mapping.cp_ranks
        }  # fmt: skip
        return names

    def _fetch(self, entry: Entry, dp: int | None, useless: int = 0) -> None:
        """Ask for the first endpoint that is missing."""
        if not self._is_wanted(entry) or self.rank.is_over() or dp is None:
            return
        engine, profile = entry.engine, self.host.profile
        known = self._endpoints.setdefault(engine, {})
        missing = [node for node in self._targets(entry, dp) if node not in known]
        if not missing:
            self._finish(entry, dp)
            return
        wanted = (missing[0], None if asks_together(profile) else entry)
        if wanted in self._fetching:
            self._fetching[wanted][entry] = (dp, useless)
            return
        self._fetching[wanted] = {entry: (dp, useless)}
        self._request(
            engine, "GET /route", missing[0], useless,
            lambda status, body: self._endpoint_answered(engine, wanted, status, body),
        )  # fmt: skip

    def _endpoint_answered(self, engine: str, wanted: Wanted, status: int | str, body: Any) -> None:
        if self.rank.is_over():
            return
        profile, node = self.host.profile, wanted[0]
        is_stale = status == 200 and not may_use(profile, body[node], self.host.believed_epoch(self.rank, engine))
        if is_stale:
            self.host.mark(self.rank.node, "stale_route_refused")
        elif status == 200:
            self._endpoints.setdefault(engine, {})[node] = body[node]
            self._go_on(wanted)
            return
        else:
            self.drop(engine)  # a server that has lost this rank may list another topology
        asking = self._fetching[wanted]
        for entry, (dp, useless) in list(asking.items()):
            asking[entry] = (dp, useless + 1)
            if not self._is_wanted(entry):
                del asking[entry]
            elif not is_stale and self._is_open(entry) and gives_up_endpoint(profile, useless + 1):
                self._fail(entry, f"route_{status}")
                if not self._is_wanted(entry):
                    del asking[entry]
        if asking:
            self.host.after(profile.number("topology_retry_s"), self._go_on, wanted)
        else:
            del self._fetching[wanted]

    def _go_on(self, wanted: Wanted) -> None:
        """Who waited for this endpoint looks what is missing now; who asked first asks first."""
        for entry, (dp, useless) in self._fetching.pop(wanted).items():
            self._fetch(entry, dp, useless)

    def _real_tp(self, engine: str) -> str | None:
        """Where others are dummies, the tensor rank that is real."""
        mapping = self.rank.mapping(engine)
        return f"/tp{mapping.tp_ranks[0]}" if mapping.has_dummies else None

    def _finish(self, entry: Entry, dp: int) -> None:
        from kvpoll.statemachine.ranks.receiver import PeerRank

        rank = self.rank
        known = self._endpoints[entry.engine]
        real = self._real_tp(entry.engine)
        peers = tuple(
            PeerRank(bit, node, known[node], real is not None and not node.endswith(real))
            for node, bit in self._targets(entry, dp).items()
        )
        rank.peers[rank.key(entry.incarnation)] = peers
        mask = sum(1 << peer.bit for peer in peers)
        rank.deliver("RoutesResolved", entry.incarnation, (mask, rank.mapping(entry.engine).responses_required))
        rank.deliver("SetupFinished", entry.incarnation)
        self.rank.join(entry)

    def _fail(self, entry: Entry, cause: str) -> None:
        """The set-up call of the receiver fails, and then returns; what the return does is a rule (sglang#24772)."""
        self.host.mark(self.rank.node, "setup_failed")
        self.rank.deliver("RouteUnavailable", entry.incarnation, cause)
        self.rank.deliver("SetupFinished", entry.incarnation)
        self.rank.join(entry)

    # -- HTTP

    def _request(self, engine: str, route: str, detail: Any, repeat: int, reply: Reply) -> None:
        """Send one request; under http_calls = "blocking" the scheduler stands still until the answer."""
        host, began = self.host, self.host.now
        if not waits_for_http(host.profile, route):
            host.request(self.rank.node, engine, route, detail, repeat, reply)
            return
        stall = self.stall = host.happening()

        def answered(status: int | str, body: Any) -> None:
            if not self.rank.is_over():
                host.emit(Stalled(host.now, self.rank.node, host.now - began, route))
            if self.stall is stall:
                self.stall = None
            stall.succeed()
            reply(status, body)

        host.request(self.rank.node, engine, route, detail, repeat, answered)
