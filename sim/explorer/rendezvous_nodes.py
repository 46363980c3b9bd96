"""Who takes part in a rendezvous: the bootstrap server, registering ranks, and pens for both sides' rooms.

What makes these processes smaller than those of ``transfer.py``: nobody but the bootstrap server dies, so every
incarnation is (room, 0, 0) and the same on both sides; one decode rank, so whoever has a destination or owes an
acknowledgement has it from there, or owes it there; no pages, because what they hold is the transfer models' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from kvpoll.sim.explorer.process import Pen, Process
from kvpoll.sim.explorer.system import Outcome
from kvpoll.spec.trace import Addressed, Answered, HealthReported, Pair, Requested
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.health import reports_healthy
from kvpoll.statemachine.roles import DpEntry, Machines, Peer, Registration, Registry, Resolution, Routed
from kvpoll.statemachine.routes import still_looks

SERVER: Final = "B0"
ENGINE: Final = "P0"
DECODE: Final = "D0"

OVER: Final = ("over", 1)
"""Stands in the budget once no fault comes any more."""

PUT: Final = "PUT /route"
GET: Final = "GET /route"
REGISTER: Final = "POST /register_dp_rank"
QUERY: Final = "POST /query_dp_ranks"

Message = tuple[Any, ...]
Flight = frozenset[Message]
"""HTTP requests, or answers, under way: each on a connection of its own, so in no order."""


class Asked(NamedTuple):
    """A request of the model. healed: dispatched only after the last fault; the timers of its rooms never ring."""

    rid: str
    pair: Pair
    healed: bool = False


@dataclass(frozen=True)
class Rendezvous:
    """What a model file of this kind says.

    prefill: DP ranks of the one prefill engine. dp_attention: data-parallel attention, or plain replicas. start: is
    everybody "registered", or does the server start "late"? register_attempts: what is left of the profile's number
    of attempts, if that is larger; one attempt, or more than one, is what makes a difference.
    """

    name: str
    prefill: int
    dp_attention: bool
    start: str
    register_attempts: int
    asked: tuple[Asked, ...]
    faults: dict[str, int]


class Routing(NamedTuple):
    """The router: (rid, prefill rank, state) of what it has dispatched."""

    healed: bool = False
    requests: tuple[tuple[str, str, Routed], ...] = ()


class Server(NamedTuple):
    """The bootstrap server: its life, its ranks, and (room, entry) of the DP ranks that it was told."""

    up: bool = True
    epoch: int = 0
    registry: Registry = Registry()
    rooms: tuple[tuple[int, DpEntry], ...] = ()


class Enlisting(NamedTuple):
    """One rank's registration. retry: its back-off runs. server: what its failure detector believes of the server."""

    node: str
    registration: Registration = Registration()
    retry: bool = False
    server: Peer = Peer("Alive", 0)


class Find(NamedTuple):
    """How far the set-up of a receiver has come.

    asks: "topology", "rank" or "endpoint" while a request is out; with " again" while it waits to ask once more.
    node: the prefill rank whose endpoint is asked for.
    """

    rid: str
    asks: str
    resolution: Resolution = Resolution()
    node: str = ""


class Decode(NamedTuple):
    """The decode rank: its rooms, what it has cached of the prefill engine, and the set-ups that are not over."""

    process: Process = Process()
    topology: bool = False
    endpoints: frozenset[str] = frozenset()
    finds: tuple[Find, ...] = ()


def put_in_flight(flight: Flight, message: Message) -> Flight:
    """The ``apply`` of requests and answers."""
    return flight | {message}


# -- the server


class Desk:
    """The bootstrap server's side of HTTP: what each request does to its tables, and what is answered."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    def serve(self, server: Server, request: Message) -> tuple[Server, Message | None, tuple[Any, ...]]:
        """The server afterwards, the answer (None where the client does not care), and events."""
        route, *rest = request
        if route == PUT:
            return self._enter(server, tuple(rest))
        if route == GET:
            rid, target = rest
            _, orders = self._machines.registry.step(server.registry, "RouteRequested", target or None)
            status = {"AnswerRoute": "200", "AnswerNotReady": "503", "AnswerUnknownRank": "404"}[orders[0][0]]
            return server, (GET, rid, target, status), ()
        if route == REGISTER:
            room, rank = rest
            entry, _ = self._machines.dp_entry.step(self._entry(server, room), "DpRankRegistered", rank)
            return server._replace(rooms=tuple(sorted({**dict(server.rooms), room: entry}.items()))), None, ()
        rid, room = rest
        return server, (QUERY, rid, "200", self.dp_rank(server, room)), ()

    def lists(self, server: Server, node: str) -> bool:
        """Would a request for this rank's endpoint be answered with it?"""
        return self.serve(server, (GET, "", node))[1] == (GET, "", node, "200")

    def dp_rank(self, server: Server, room: int) -> tuple[int, ...]:
        """What the server knows of a room's DP rank; empty if nothing."""
        entry = self._entry(server, room)
        _, orders = self._machines.dp_entry.step(entry, "DpRankQueried")
        return (entry.rank,) if orders and entry.rank is not None else ()

    def _entry(self, server: Server, room: int) -> DpEntry:
        return dict(server.rooms).get(room, DpEntry())

    def _enter(self, server: Server, detail: tuple[Any, ...]) -> tuple[Server, Message, tuple[Any, ...]]:
        registry, _ = self._machines.registry.step(server.registry, "RankRegistered", detail)
        events: tuple[Any, ...] = ()
        if registry.state == "Ready" != server.registry.state:
            events = (HealthReported(0, SERVER, True, len(registry.ranks) >= detail[2]),)
        return server._replace(registry=registry), (PUT, "200"), events


def unheard(request: Message, status: str) -> Message | None:
    """What the client learns when the server does not answer: "refused", "timeout", or an error."""
    route, *rest = request
    if route == PUT:
        return (PUT, status)
    if route == GET:
        return (GET, *rest, status)
    return (QUERY, rest[0], status, ()) if route == QUERY else None


def told(client: str, answer: Message) -> Answered:
    """The event that goes with an answer."""
    status = answer[-2] if answer[0] == QUERY else answer[-1]
    return Answered(0, client, SERVER, answer[0], int(status) if status.isdigit() else status)


def status_of(answer: tuple[Any, ...] | None) -> str:
    """What an answer says, for people."""
    """What an answer says, for people."""
    if answer is None:
        return "nobody waits for an answer"
    if answer[0] == QUERY and answer[2] == "200":
        return f"dp{answer[3][0]}" if answer[3] else "unknown"
    return str(answer[1] if answer[0] == PUT else answer[-1] if answer[0] == GET else answer[2])


# -- registration


class Roll:
    """The prefill engine's ranks as they register. One cell holds them all, because health is the engine's."""

    def __init__(self, machines: Machines, ranks: tuple[Enlisting, ...]) -> None:
        self._machines = machines
        self._ranks = {rank.node: rank for rank in ranks}
        self.effects: list[tuple[str, Any]] = []
        self.events: list[Any] = []

    def step(self, node: str, fact: str) -> None:
        """Offer a fact to one rank's registration and carry out what is ordered."""
        rank = self._ranks[node]
        before = rank.registration.state
        registration, orders = self._machines.registration.step(rank.registration, fact)
        rank = rank._replace(registration=registration)
        for order, _ in orders:
            if order == "SendRegistration":
                self.events.append(Requested(0, node, SERVER, PUT, registration.attempt - 1))
                self.effects.append((f"requests {node}", (PUT, node, 0, len(self._ranks))))
            elif order == "ArmRetry":
                rank = rank._replace(retry=True)
        self._ranks[node] = rank
        if before != registration.state and "Exhausted" in (before, registration.state):
            self._report_health()

    def change(self, node: str, **changes: Any) -> None:
        """Set some fields of one rank."""
        self._ranks[node] = self._ranks[node]._replace(**changes)

    def _report_health(self) -> None:
        registered = all(rank.registration.state == "Registered" for rank in self._ranks.values())
        healthy = reports_healthy(self._machines.profile, True, registered, True)
        self.events.append(HealthReported(0, ENGINE, healthy, registered))

    def done(self, label: str, *others: Any, marks: tuple[str, ...] = ()) -> Outcome:
        """The outcome of a move on the cell of the roll and these others."""
        return Outcome((tuple(self._ranks.values()), *others), label, tuple(self.effects), tuple(self.events), marks)


# -- rooms


class PrefillPen(Pen):
    """The orders that a sender gives; all go to the one decode rank."""

    role = "sender"

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        room = self.rooms.get(own.room)
        if kind == "NotifyDecode" and room is not None and room.local.arrived:
            self.send(DECODE, ("Status", own, detail))
        elif kind == "AnswerDecode":
            self.send(DECODE, ("Status", own, detail[0]))
        elif kind == "AcknowledgeAbort":
            self.send(DECODE, ("Acknowledged", own))


class DecodePen(Pen):
    """The orders that a receiver gives. ``known``: key -> (prefill rank)."""

    role = "receiver"

    def __init__(self, decode: Decode, machines: Machines, illegal_stops: bool) -> None:
        super().__init__(DECODE, decode.process, machines.receiver, illegal_stops)
        self.topology = decode.topology
        self.endpoints = set(decode.endpoints)
        self.finds = {find.rid: find for find in decode.finds}
        self.pairs: dict[str, Pair] = {}

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        if kind == "NotifyPrefill" and (peer := self.known.get(self.key(own))) is not None:
            self.send(peer[0], ("Abort", own))

    def publish(self, own: Incarnation) -> None:
        """Tell prefill where to write."""
        node = self.known[self.key(own)][0]
        self.events.append(Addressed(0, self.node, own, node, 0, 0))
        self.send(node, ("Metadata", own))

    def ask(self, *request: Any, repeat: int = 0) -> None:
        """Send a request to the bootstrap server."""
        self.events.append(Requested(0, DECODE, SERVER, request[0], repeat))
        self.effects.append((f"requests {DECODE}", request))

    def drop_routes(self) -> None:
        """Forget what is cached of the prefill engine."""
        self.topology = False
        self.endpoints.clear()

    def done(self, label: str, *others: Any, first: tuple[Any, ...] = ()) -> Outcome:
        """The outcome; nobody looks for the prefill rank of other rooms any more."""
        outcome = super().done(label, *others, first=first)
        profile = self.machine.profile
        seeking = {number for number, room in self.rooms.items() if still_looks(profile, room.local)}
        finds = tuple(find for rid, find in sorted(self.finds.items()) if self.pairs[rid][0] in seeking)
        decode = Decode(outcome.after[0], self.topology, frozenset(self.endpoints), finds)
        return outcome._replace(after=(decode, *outcome.after[1:]))
