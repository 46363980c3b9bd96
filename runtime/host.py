"""The outside of a rank in a real process: clock, messages, HTTP, writes, failure detection, trace.

The real sibling of ``sim.world.World``; both are what ``statemachine.ranks.host.Host`` describes. It carries out what
a rank orders and hands it what happened. It decides nothing of the protocol.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from kvpoll.runtime.bootstrap import BootstrapClient, Caller, Coordinate, RankInfo, Topology
from kvpoll.runtime.bootstrap import Reply as HttpReply
from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.control.heartbeat import Heartbeats
from kvpoll.runtime.control.messages import Envelope, Message, pack_pages, unpack_pages
from kvpoll.runtime.control.plane import ControlPlane
from kvpoll.runtime.loop import Happening, Loop
from kvpoll.runtime.writes import Writes
from kvpoll.spec.invariants import Watch
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.trace import Answered, Delivered, Lost, Marked, Requested, Sent, Stream
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import Report
from kvpoll.statemachine.machine import Room
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.host import Destination, Lengths, Plan, Reply, Request, Waiting, engine_of
from kvpoll.statemachine.roles import Machines
from kvpoll.statemachine.routes import MISMATCH

TICK_S: Final = 0.05
CAUSES_MAX: Final = 4096
EARLY_MAX: Final = 4096
"""Messages kept for a rank that is not there yet; its group and its peers may begin a moment before it."""

_log = logging.getLogger("kvpoll.runtime")


class Address(NamedTuple):
    """Where a node listens, and in which life."""

    endpoint: str
    epoch: int


class Server(NamedTuple):
    """A prefill engine's bootstrap server."""

    address: str
    client: BootstrapClient


class Host:
    """The outside of one rank. All methods but ``loop.post`` belong to the loop's thread.

    rank: given by ``seat``, once; until then what arrives is kept waiting. info: what this rank registers as,
    for a prefill rank. servers: bootstrap servers by the name of their engine. memory: what a decode rank publishes
    with its pages, (descriptor, layout).
    """

    def __init__(
        self,
        protocol: Protocol,
        profile: Profile,
        plane: ControlPlane,
        loop: Loop,
        lengths: Lengths,
        servers: dict[str, str],
        seed: int | str = 0,
        token: str | None = None,
        mla: bool = False,
    ) -> None:
        self.protocol = protocol
        self.profile = profile
        self.machines = Machines(protocol, profile)
        self.stream = Stream()
        self.plane = plane
        self.loop = loop
        self.topology = lengths
        self.seed = seed
        self.node = plane.node
        self.epoch = plane.epoch
        self.rank: Any = None
        self.info: RankInfo | None = None
        self.memory: tuple[bytes, bytes] = (b"", b"")
        self.writes: Writes | None = None
        self.marks: dict[str, int] = {}
        self.directory: dict[str, Address] = {}
        self.mail: dict[type[Any], Callable[[Envelope, Any], None]] = {}
        self.peer_causes: dict[tuple[int, int], str] = {}
        self.reasons: dict[tuple[int, int], str] = {}
        self.misfits: dict[str, str] = {}
        self.fits: Callable[[Topology], str | None] = lambda topology: None
        self.watch_due: Watch | None = None
        self.last_answer: str | None = None
        self.moment: Callable[..., None] = lambda event, **fields: None
        self.emitted: list[Callable[[Any], None]] = []
        self.mla = mla
        self._token = token
        timely = profile.with_rules({"http_timeout_s": profile.number("http_timeout_s") / loop.speed})
        self.servers = {name: Server(where, BootstrapClient(where, timely, token)) for name, where in servers.items()}
        self._plans: dict[str, tuple[Plan, Topology]] = {}
        self._alive_since: dict[str, int] = {}
        self.server_answered: Callable[[int], None] = lambda epoch: None
        self._known_as: dict[str, str] = {}
        self._calls_itself: dict[str, str] = {}
        self._caller = Caller(lambda function: loop.post(function))
        self._heartbeats = Heartbeats(
            self.machines, profile, loop.now, self._ping, self._suspected, self._dead, self._restored
        )
        self._observers = self.stream.observers
        self._early: list[tuple[Envelope, Any]] = []
        self._tick()

    # -- telling

    @property
    def now(self) -> float:
        """Seconds since the start of the trace."""
        origin, speed = self.loop.clock
        return (monotonic() - origin) * speed

    def wants(self, event_type: type[Any]) -> bool:
        """Does a recorder, a monitor or a gauge listen for this type?"""
        return bool(self.emitted or self._observers[event_type])

    def emit(self, event: Any) -> None:
        """Tell recorder, monitors and gauges what happened here."""
        if self.watch_due is not None and event.t > self.watch_due.due:
            self.watch_due.advance(event.t)
        for listener in self.emitted:
            listener(event)
        for observer in self._observers[type(event)]:
            observer(event)

    def mark(self, node: str, mark: str) -> None:
        """Witness something that a scenario waits for."""
        self.marks[mark] = self.marks.get(mark, 0) + 1
        if self.marks[mark] == 1:
            self.emit(Marked(self.now, node, mark))

    # -- time and tasks

    def after(self, delay_s: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function later."""
        self.loop.after(delay_s, function, *arguments)

    def sleep(self, delay_s: float) -> Happening:
        """What a task yields to go on after this time."""
        return self.loop.sleep(delay_s)

    def happening(self) -> Happening:
        """What a task yields to go on when it succeeds."""
        return self.loop.happening()

    def spawn(self, task: Waiting) -> None:
        """Run a task."""
        self.loop.spawn(task)

    def chance(self, purpose: str) -> random.Random:
        """A generator of its own for every purpose."""
        return random.Random(f"{self.seed}/{purpose}")

    # -- messages to others

    def send(self, node: str, to: str, message: str, incarnation: Incarnation, *arguments: Any) -> None:
        """Send a control message to another rank."""
        self.tell(to, self._written(message.partition(" ")[0], incarnation, arguments), message, incarnation)

    def _written(self, kind: str, incarnation: Incarnation, arguments: tuple[Any, ...]) -> Message:
        if kind == "Metadata":
            destination, required = arguments
            pages = pack_pages(destination.pages)
            return wire.Metadata(
                incarnation, destination.bit, required, destination.incarnation, pages, destination.row, *self.memory
            )
        if kind == "Abort":
            index, _, own = arguments
            return wire.Abort(incarnation, index, own)
        if kind == "Status":
            index, outcome = arguments
            cause = self._cause_of(incarnation) if outcome == "Failed" else None
            return wire.Status(incarnation, index, outcome, cause)
        if kind == "AbortAck":
            return wire.AbortAck(incarnation, arguments[0])
        return self.written(kind, incarnation, arguments)

    def written(self, kind: str, incarnation: Incarnation, arguments: tuple[Any, ...]) -> Message:
        """A message between ranks of one engine; set by the group that knows how to write them."""
        raise AssertionError(f"{kind}: this rank has no group")

    def _cause_of(self, incarnation: Incarnation) -> str | None:
        """The first cause of a room of ours, for the peer to log."""
        room = self.rank.rooms.get(incarnation.room)
        return self.why(room) if room is not None and room.incarnation.pair == incarnation.pair else None

    def why(self, room: Room) -> str | None:
        """Why a room failed: its first cause, and what a transport or the peer said of it; None where it has none."""
        cause = room.local.cause
        if cause is None:
            return None
        more = self.reasons.get(room.incarnation.pair) or self.peer_causes.get(room.incarnation.pair)
        return cause if more is None else f"{cause}: {more}"

    def note(self, pair: tuple[int, int], reason: str, told: dict[tuple[int, int], str]) -> None:
        """Keep the first thing that was said of a room; the oldest are forgotten when there are many."""
        if pair not in told:
            if len(told) >= CAUSES_MAX:
                del told[next(iter(told))]
            told[pair] = reason

    def tell(self, to: str, message: Message, name: str, incarnation: Incarnation, any_life: bool = True) -> bool:
        """Hand a message to a node's channel. False when its address is unknown or the channel refuses it."""
        address = self.directory.get(to)
        epoch = None if any_life or address is None else address.epoch
        own_name = self._calls_itself.get(to, to)
        may_wait = not self.stream.recording  # a trace says of each message whether it was sent
        heard = address is not None and self.plane.send(address.endpoint, own_name, epoch, message, may_wait)
        if self.stream.recording:
            serial = self.plane.serial_of(address.endpoint) if address is not None else 0
            self.emit(Sent(self.now, self.node, to, name, incarnation, serial))
            if not heard:
                self.emit(Lost(self.now, to, self.node, name, incarnation, serial))
        return heard

    # -- messages from others

    def receive(self) -> None:
        """Take what the control plane has, and hand it to the rank."""
        for envelope, message in self.plane.receive():
            if envelope.node in self._known_as:
                envelope = replace(envelope, node=self._known_as[envelope.node])
            known = self.directory.get(envelope.node)
            if known is None or envelope.epoch >= known.epoch:
                self._moved(envelope.node, Address(envelope.endpoint, envelope.epoch))
            self._heartbeats.heard(envelope.node, envelope.epoch)
            self._dispatch(envelope, message)

    def _moved(self, node: str, address: Address) -> None:
        """A node listens here now. Nobody listens any more where its former life did: that channel is closed at once,
        and does not wait for the day on which idle ones are.
        """
        known = self.directory.get(node)
        if known is not None and known.endpoint != address.endpoint and known.epoch < address.epoch:
            self.plane.retire(known.endpoint)
        self.directory[node] = address

    def _dispatch(self, envelope: Envelope, message: Any) -> None:
        handler = self.mail.get(type(message))
        if handler is not None:
            handler(envelope, message)
        elif isinstance(message, wire.Missed):
            self._restored(envelope.node)
        elif isinstance(message, wire.Goodbye):
            self._left(envelope)
        elif isinstance(message, wire.Ping | wire.Pong):
            pass
        elif self.rank is not None:
            self._hand(envelope, message)
        elif len(self._early) < EARLY_MAX:
            self._early.append((envelope, message))

    def seat(self, rank: Any) -> None:
        """The rank is there: it gets what has arrived before it."""
        self.rank = rank
        early, self._early = self._early, []
        for envelope, message in early:
            self._dispatch(envelope, message)

    def _hand(self, envelope: Envelope, message: Any) -> None:
        """A message about a room. One of a side that this rank is not is nobody's, and dropped."""
        kind = type(message).__name__
        if kind not in self.rank.mail:
            return
        incarnation = message.incarnation
        if self.stream.recording:
            name = f"{kind} {message.outcome}" if kind == "Status" else kind
            self.emit(Delivered(self.now, self.node, envelope.node, name, incarnation, envelope.serial))
        if kind == "Metadata":
            self.watch(envelope.node, envelope.epoch)
            pages = unpack_pages(message.pages)
            memory = (message.descriptor, message.layout, envelope.epoch)
            destination = Destination(envelope.node, message.owner, message.index, pages, message.row, memory)
            self.rank.receive(kind, incarnation, destination, message.required)
        elif kind == "Abort":
            self.watch(envelope.node, envelope.epoch)
            self.rank.receive(kind, incarnation, message.index, envelope.node, message.owner)
        elif kind == "Status":
            if message.cause is not None:
                self.note(incarnation.pair, message.cause, self.peer_causes)
            self.rank.receive(kind, incarnation, message.index, message.outcome)
        elif kind == "AbortAck":
            self.rank.receive(kind, incarnation, message.index)
        else:
            self.rank.receive(kind, incarnation, message.stage, message.rid, Report(message.poll, message.cause))

    # -- who is alive

    def watch(self, node: str, epoch: int | None = None) -> None:
        """Begin to probe a rank of the other side."""
        self._heartbeats.watch(node, epoch)

    def _tick(self) -> None:
        due = self._heartbeats.tick(self.now)
        self.after(min(TICK_S * self.loop.speed, max(0.0, due - self.now)), self._tick)

    def _ping(self, node: str, serial: int) -> None:
        address = self.directory.get(node)
        if address is not None:
            self.plane.send(address.endpoint, self._calls_itself.get(node, node), None, wire.Ping(serial))

    def _suspected(self, node: str) -> None:
        self.mark(self.node, "peer_suspected")
        self.moment("peer_suspected", peer=node)
        if self.rank is not None:
            self.rank.suspect(engine_of(node))

    def _dead(self, node: str, former: int) -> None:
        """A later life of a peer has spoken: whatever the former one had posted is over."""
        state = self._heartbeats.state_of(node)
        self.bury(node, former + 1 if state is None or state.epoch is None else state.epoch)

    def bury(self, node: str, alive_since: int) -> None:
        """It is proven that every life of this node before ``alive_since`` is over."""
        self.mark(self.node, "peer_died")
        if alive_since > self._alive_since.get(engine_of(node), 0):
            self.moment("peer_died", peer=node, before_epoch=alive_since)
        self._alive_since[engine_of(node)] = max(alive_since, self._alive_since.get(engine_of(node), 0))
        if self.rank is not None:
            self.rank.bury(node, alive_since)

    def saw_end(self, node: str, epoch: int) -> None:
        """The operating system says that this life of a peer process is over (the transport's ``on_death``)."""
        self.bury(self._known_as.get(node, node), epoch + 1)

    def _left(self, envelope: Envelope) -> None:
        """A peer said goodbye: it had drained, and nothing more will come of it."""
        self.moment("peer_left", peer=envelope.node)
        self._heartbeats.unwatch(envelope.node)
        self.bury(envelope.node, envelope.epoch + 1)

    def _restored(self, node: str) -> None:
        if self.rank is not None:
            self.mark(self.node, "link_restored")
            self.moment("link_restored", peer=node)
            self.rank.restored(engine_of(node))

    def believed_epoch(self, rank: Any, engine: str) -> int | None:
        """Process epoch of an engine as this rank's failure detector last saw it, or the next one after a proven end:
        the bootstrap server may list the dead one for as long as its successor takes to register (A21).
        """
        epochs = [
            state.epoch
            for node in self.directory
            if engine_of(node) == engine and (state := self._heartbeats.state_of(node)) is not None
        ]
        return max((epoch for epoch in (*epochs, self._alive_since.get(engine)) if epoch is not None), default=None)

    def true_epoch(self, engine: str) -> int:
        """The best this process knows; whoever merges the traces of all processes knows better."""
        return max((a.epoch for node, a in self.directory.items() if engine_of(node) == engine), default=0)

    # -- HTTP

    def request(self, node: str, engine: str, route: str, detail: Any, repeat: int, reply: Reply) -> None:
        """Send an HTTP request to the bootstrap server of a prefill engine; a thread waits for the answer."""
        server = self.servers.get(engine)
        name = server_name(engine)
        self.emit(Requested(self.now, node, name, route, repeat))

        def answered(status: int | str, body: Any) -> None:
            self.emit(Answered(self.now, node, name, route, status))
            reply(status, body)

        if server is None:
            self.loop.soon(answered, "refused", None)
            return
        act = partial(self._act, server.client, engine, route, detail)
        if not self._caller.submit(server.address, act, partial(self._answered, engine, route, detail, answered)):
            self.loop.soon(answered, "timeout", None)

    def add_server(self, engine: str, address: str) -> None:
        """Know a prefill engine's bootstrap server, once. Raises BadInput for an address that is none. Any thread."""
        if engine not in self.servers:
            self.servers[engine] = Server(address, BootstrapClient(address, self.profile, self._token))

    def call(self, server: Server, act: Callable[[], HttpReply], then: Callable[[HttpReply], None]) -> None:
        """Have a thread make a call that is no request of a rank (a probe)."""
        self._caller.submit(server.address, act, then)

    def _act(self, client: BootstrapClient, engine: str, route: str, detail: Any) -> HttpReply:
        """Runs in a thread of the caller."""
        if route == "PUT /route":
            assert self.info is not None
            return client.register(self.info)
        if route == "DELETE /route":
            assert self.info is not None
            return client.unregister(self.info.coordinate, self.info.process_epoch)
        if route == "GET /route":
            return client.topology() if detail is None else client.endpoint(*coordinate(detail))
        if route == "POST /register_dp_rank":
            (room, *attempt), rank = _key(detail[0]), detail[1]
            return client.register_dp_rank(room, rank, attempt[0] if attempt else None)
        keys = [_key(key) for key in detail]
        attempts = [key[1] for key in keys] if keys and len(keys[0]) > 1 else None
        return client.query_dp_ranks([key[0] for key in keys], attempts)

    def _answered(self, engine: str, route: str, detail: Any, answered: Reply, reply: HttpReply) -> None:
        status: int | str = reply.status
        body = reply.body
        self.last_answer = f"{route} {status}" + (f": {body}" if isinstance(body, str) else "")
        if status == 200 and isinstance(body, Topology):
            self._plans[engine] = (plan_of(body, self.mla), body)
            problem = self.fits(body)
            if problem is not None:
                _log.error("%s: prefill engine %s cannot be used: %s", self.node, engine, problem)
                self.misfits[engine] = problem
                status = MISMATCH
        elif status == 200 and route == "GET /route":
            self._introduce(detail, body.rank_name)
            epoch = body.process_epoch or 0
            self._moved(detail, Address(f"tcp://{body.rank_ip}:{body.rank_port}", epoch))
            self.watch(detail, body.process_epoch)
            body = {detail: epoch}
        elif status == 200 and route == "PUT /route" and isinstance(body, int):
            self.server_answered(body)
        answered(status, body)

    def _introduce(self, node: str, own_name: str | None) -> None:
        """A rank may have another name for itself than we have: its engine is named by the address of its bootstrap
        server, and it may know that as 127.0.0.1 where we know it by host name. Messages bear the name that each
        rank gives itself; everything here speaks of it as we do. The last address by which it was found counts.
        """
        if own_name is not None and own_name != node:
            self._known_as[own_name], self._calls_itself[node] = node, own_name

    def plan(self, engine: str) -> Plan:
        """A prefill engine whose topology has been learned."""
        return self._plans[engine][0]

    # -- writes

    def post(self, rank: Any, destination: Destination, chunk: int, first: int, pages: tuple[int, ...], last: bool,
             done: Callable[[str], None]) -> None:  # fmt: skip
        """Write ``pages``, the prompt's pages from ``first`` on."""
        assert self.writes is not None
        self.writes.post(destination, chunk, first, pages, last, done)

    def problem(self, destination: Destination) -> str | None:
        """Why this process cannot write to a destination's memory, or None."""
        return None if self.writes is None else self.writes.problem(destination)

    def abandon(self, own: Incarnation) -> None:
        """Ask for the end of a failed room's writes."""
        if self.writes is not None:
            self.writes.abort(own.pair)

    def refuse(self, own: Incarnation) -> bool:
        """Place no byte any more that comes for a room, where this process itself places what comes (tcp)."""
        writes = self.writes
        return writes is not None and not writes.transport.caps.one_sided and writes.transport.revoke(own)

    def explain(self, own: Incarnation, reason: str) -> None:
        """What ``why`` says of a room, besides its cause."""
        self.note(own.pair, reason, self.reasons)

    # -- the router

    def leg_failed(self, rank: Any, request: Request, side: str, cause: str) -> None:
        """Answer the router's leg with an error."""
        which: Any = side
        self.tell("R", wire.Reply(request.rid, "failed", which, cause), "Error", Incarnation(*request.pair, 0))

    def first_token(self, rank: Any, request: Request) -> None:
        """Stream the first token to the router."""
        self.tell("R", wire.Reply(request.rid, "first_token", "decode"), "FirstToken", Incarnation(*request.pair, 0))

    def close(self) -> None:
        """End the threads that make HTTP calls."""
        self._caller.close()
        for server in self.servers.values():
            server.client.close()


def server_name(engine: str) -> str:
    """The bootstrap server of an engine, as traces name it: ``B0`` of ``P0``."""
    return "B" + engine[1:] if engine[:1] == "P" and engine[1:].isdigit() else f"B:{engine}"


def coordinate(node: str) -> Coordinate:
    """Which rank of its engine a node is, from its name."""
    given = {part[:2]: int(part[2:]) for part in node.split("/")[1:]}
    return Coordinate(*(given.get(label, 0) for label in ("dp", "cp", "tp", "pp")))


def plan_of(topology: Topology, mla: bool) -> Plan:
    """What decode computes its mapping from. Whether the model uses MLA it knows itself; no server says so."""
    sizes = Sizes(topology.dp_size, topology.pp_size, topology.attn_tp_size, topology.attn_cp_size)
    return Plan(sizes, topology.follow_bootstrap_room, mla)


def _key(key: Any) -> tuple[int, ...]:
    return key if isinstance(key, tuple) else (key,)
