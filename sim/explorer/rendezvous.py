"""Models of kind "rendezvous": prefill ranks that register, a server that may fail, a decode rank that finds its way.

Cells: the router "R", the bootstrap server "B0", the registrations of the prefill engine "P0", its ranks ("P0/dp0",
...), the decode rank "D0", ordered control channels ("chan D0 P0/dp0"), and HTTP: what each client has asked
("requests D0") and what is on its way back ("answers D0"). A request is applied in one move and answered in another,
so it can be applied although its client gives up (C1). ``spec/tla/Rendezvous.tla`` says the same in TLA+.

Assumptions: prefill and decode live; control channels keep order and lose nothing; a transfer succeeds as soon as the
rank that runs the request knows where to write (what can go wrong there, ``transfer.py`` explores); a decode rank asks
again only where the answer would be another one, so that polling is no step; a deadline passes when nothing else is
left to happen, or early, which costs a fault ("slowness").
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.model import HEAD, read_faults
from kvpoll.sim.explorer.process import Process
from kvpoll.sim.explorer.rendezvous_nodes import (
    DECODE,
    ENGINE,
    OVER,
    SERVER,
    Asked,
    Decode,
    Enlisting,
    Flight,
    Rendezvous,
    Roll,
    Routing,
    Server,
    put_in_flight,
    status_of,
    told,
    unheard,
)
from kvpoll.sim.explorer.rendezvous_ranks import GAUGES, DecodeSide, PrefillSide, Scene
from kvpoll.sim.explorer.rendezvous_view import view
from kvpoll.sim.explorer.system import ROOMS_FROM, Cell, Outcome, System, refuse, send
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import Source
from kvpoll.spec.trace import Admitted, Healed, NodeStarted, NodeStopped, Resulted, Surveyed
from kvpoll.statemachine.conduct import watches_server
from kvpoll.statemachine.roles import Machines, Registration, Registry, Routed

FAULTS = ("slowness", "dp_override", "bootstrap_crash", "answer_lost", "http_error")
STARTS = ("registered", "late")


_MODEL = {**HEAD, "prefill": int, "dp_attention": bool, "start": str, "register_attempts": int}
_REQUEST = {"rid": str, "room": int, "when": str}


def read(name: str, source: Source) -> Rendezvous:
    """Read the parts of a model file that this kind has. Raises BadInput at the offending line."""
    source.require_known((), source.data, ("model", "faults", "request"), "section")
    head = source.data["model"]
    source.require_known(("model",), head, _MODEL, "key")
    source.require_all(("model",), head, ("prefill", "start"), "a rendezvous model")
    for key in ("prefill", "start", "register_attempts"):
        if key in head:
            source.require_form(("model", key), key, head[key], _MODEL[key])
    if not isinstance(head.get("dp_attention", True), bool):
        raise source.error(
            ("model", "dp_attention"), f"`dp_attention` must be true or false, got {head['dp_attention']!r}"
        )
    for key, most in (("prefill", 4), ("register_attempts", 9)):
        if not 1 <= head.get(key, 1) <= most:
            raise source.error(("model", key), f"`{key}` must be from 1 to {most}, got {head[key]}")
    source.require_known(("model", "start"), [head["start"]], STARTS, "start")
    asked = tuple(_request(source, place, entry) for place, entry in enumerate(source.data.get("request", ())))
    if not asked:
        raise source.error((), "a model needs at least one [[request]]")
    if len({each.rid for each in asked}) < len(asked) or len({each.pair for each in asked}) < len(asked):
        raise source.error(("request", 0), "each request needs a rid and a room of its own")
    return Rendezvous(
        name, head["prefill"], head.get("dp_attention", True), head["start"], head.get("register_attempts", 9), asked,
        read_faults(source, FAULTS),
    )  # fmt: skip


def _request(source: Source, place: int, entry: Any) -> Asked:
    path = ("request", place)
    source.require_forms(path, entry, _REQUEST)
    source.require_all(path, entry, ("rid", "room"), "a request")
    if entry["room"] <= ROOMS_FROM:
        raise source.error((*path, "room"), f"room numbers of models are above {ROOMS_FROM}, got {entry['room']}")
    when = entry.get("when", "start")
    if when not in ("start", "healed"):
        raise source.error((*path, "when"), f'`when` must be "start" or "healed", got {when!r}')
    return Asked(entry["rid"], (entry["room"], 0), when == "healed")


def build(model: Rendezvous, protocol: Protocol, profile: Profile) -> System:
    """The model under one profile, ready to be explored."""
    return _Builder(Scene(model, Machines(protocol, scaled(model, profile)))).system()


def scaled(model: Rendezvous, profile: Profile) -> Profile:
    """The profile with no more attempts to register than the model has."""
    attempts = min(int(profile.number("register_attempts")), model.register_attempts)
    return profile.with_rules({"register_attempts": attempts})


def _apply_channel(channel: tuple[Any, ...], message: Any) -> tuple[Any, ...]:
    return send(channel, (message,))


def _apply_router(router: Routing, operation: str) -> Routing:
    return router._replace(healed=True)


class _Builder:
    """Puts the cells and moves of one model together."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.model = scene.model
        self.machines = scene.machines
        self.profile = scene.profile

    def system(self) -> System:
        model = self.model
        late = model.start == "late"
        registration = Registration() if late else Registration("Registered", 1)
        registry = (
            Registry()
            if late
            else Registry("Ready", tuple((node, 0) for node in self.scene.ranks), len(self.scene.ranks))
        )
        cells = [
            Cell("R", Routing(), _apply_router),
            Cell(budget.CELL, budget.budget(model.faults), refuse),
            Cell(SERVER, Server(not late, -1 if late else 0, registry), refuse),
            Cell(ENGINE, tuple(Enlisting(node, registration) for node in self.scene.ranks), refuse),
            Cell(DECODE, Decode(), refuse),
        ]
        for node in (*self.scene.ranks, DECODE):
            ends = [("R", node), (node, "R")] + ([(node, DECODE), (DECODE, node)] if node != DECODE else [])
            cells += [Cell(f"chan {left} {right}", (), _apply_channel) for left, right in ends]
            cells += [Cell(f"{way} {node}", frozenset(), put_in_flight) for way in ("requests", "answers")]
        cells += [Cell(node, Process(), refuse) for node in self.scene.ranks]
        prefill = PrefillSide(self.scene)
        self._router_moves()
        self._server_moves()
        for node in self.scene.ranks:
            self._registration_moves(node)
            prefill.add_moves(node)
        DecodeSide(self.scene).add_moves()
        alive = (*self.scene.ranks, DECODE) if late else (*self.scene.ranks, DECODE, SERVER)
        start = tuple(NodeStarted(0, node, 0) for node in alive)
        return System(model.name, cells, self.scene.moves, start, self._survey, view=view)

    # -- the router

    def _router_moves(self) -> None:
        for asked in self.model.asked:
            home = self.scene.home(asked.pair[0])
            dispatch = partial(self._dispatch, asked=asked)
            self.scene.step(f"R dispatches {asked.rid}", ("R",), partial(dispatch, dp=home))
            for dp in range(self.model.prefill):
                if dp != home:
                    self.scene.fault(
                        f"R dispatches {asked.rid} to dp{dp}", "dp_override", ("R",), partial(dispatch, dp=dp)
                    )
        for node in (*self.scene.ranks, DECODE):
            self.scene.step(f"R hears {node}", ("R", f"chan {node} R"), self._answer)
        if any(asked.healed for asked in self.model.asked):
            self.scene.step("the faults are over", (budget.CELL, SERVER, ENGINE), self._heal)

    def _dispatch(self, router: Routing, asked: Asked, dp: int) -> Iterator[Outcome]:
        if any(rid == asked.rid for rid, _, _ in router.requests) or (asked.healed and not router.healed):
            return
        node = self.scene.ranks[dp]
        after = router._replace(requests=tuple(sorted((*router.requests, (asked.rid, node, Routed())))))
        admitted = Admitted(0, "R", asked.rid, asked.pair, (node,), (DECODE,))
        effects = tuple((f"chan R {leg}", ("Open", asked.rid)) for leg in (node, DECODE))
        yield Outcome((after,), f"the router sends {asked.rid} to {node} and {DECODE}", effects, (admitted,))

    def _heal(self, left: budget.Budget, server: Server, ranks: tuple[Enlisting, ...]) -> Iterator[Outcome]:
        """No fault comes any more, and restarts are done: the server listens, whoever watches it knows which life of
        it that is, and every rank has registered or has given that up.
        """
        settled = {"Registered"}
        if self.profile["register_exhausted"] == "continue_unregistered":
            settled.add("Exhausted")
        watched = watches_server(self.profile)
        if OVER in left or not server.up or any(rank.registration.state not in settled for rank in ranks):
            return
        if watched and any(rank.server.epoch != server.epoch for rank in ranks):
            return
        none = (*((kind, 0) for kind, _ in left), OVER)
        yield Outcome((none, server, ranks), "the last fault is over", (("R", "healed"),), (Healed(0, "R"),))

    def _answer(self, router: Routing, channel: tuple[Any, ...]) -> Iterator[Outcome]:
        if not channel:
            return
        kind, rid, *detail = channel[0]
        if kind == "FirstToken":
            yield from self._route(router, rid, "DecodeAnswered", None, f"the first token of {rid}", (channel[1:],))
        else:
            label = f"the {detail[0]} leg of {rid} failed"
            yield from self._route(router, rid, "LegFailed", tuple(detail), label, (channel[1:],))

    def _route(
        self, router: Routing, rid: str, fact: str, detail: Any, label: str, rest: tuple[Any, ...]
    ) -> Iterator[Outcome]:
        """Step the router's view of a request. ``rest``: what remains on the channel, if one was read."""
        requests = {each[0]: each for each in router.requests}
        if rid not in requests:
            return
        _, node, before = requests[rid]
        state, orders = self.machines.router.step(before, fact, detail)
        requests[rid] = (rid, node, state)
        effects: list[tuple[str, Any]] = []
        events: list[Any] = []
        for order, argument in orders:
            if order == "AnswerClient":
                ok = argument == "ok"
                events.append(Resulted(0, "R", rid, self.scene.asked[rid].pair, ok, state.cause, 0.0 if ok else None))
            elif order == "CancelLeg":
                legs = {"prefill": (node,), "decode": (DECODE,)}.get(argument, (node, DECODE))
                effects += [(f"chan R {leg}", ("Cancel", rid, state.cause or "cancelled")) for leg in legs]
        after = router._replace(requests=tuple(sorted(requests.values())))
        yield Outcome((after, *rest), label, tuple(effects), tuple(events))

    # -- the bootstrap server

    def _server_moves(self) -> None:
        self.scene.step(f"{SERVER} begins to listen", (SERVER,), self._listen)
        self.scene.fault(f"{SERVER} dies", "bootstrap_crash", (SERVER,), self._die)
        for node in (*self.scene.ranks, DECODE):
            requests = f"requests {node}"
            self.scene.step(f"{SERVER} answers {node}", (SERVER, requests), partial(self._serve, node, "200"))
            lost, error = partial(self._serve, node, "timeout"), partial(self._serve, node, "500")
            self.scene.fault(f"{SERVER}'s answer to {node} is lost", "answer_lost", (SERVER, requests), lost)
            self.scene.fault(f"{SERVER} has an error for {node}", "http_error", (SERVER, requests), error)

    def _listen(self, server: Server) -> Iterator[Outcome]:
        if not server.up:
            after = Server(True, server.epoch + 1)
            yield Outcome((after,), f"{SERVER} begins to listen", (), (NodeStarted(0, SERVER, after.epoch),))

    def _die(self, server: Server) -> Iterator[Outcome]:
        """With the process goes its memory."""
        if server.up:
            after = Server(False, server.epoch)
            yield Outcome((after,), f"{SERVER} dies", (), (NodeStopped(0, SERVER, server.epoch),))

    def _serve(self, client: str, outcome: str, server: Server, requests: Flight) -> Iterator[Outcome]:
        """One request is applied and answered; or applied and the answer lost; or not applied at all."""
        for request in sorted(requests):
            after, answer, events = server, unheard(request, outcome), ()
            if not server.up:
                if outcome != "200":
                    continue
                answer = unheard(request, "refused")
            elif outcome != "500":
                after, heard, events = self.scene.desk.serve(server, request)
                answer = heard if outcome == "200" else answer
            if outcome == "timeout" and answer is None:
                continue
            effects = ((f"answers {client}", answer),) if answer is not None else ()
            marks = ("request_applied_unheard",) if outcome == "timeout" else ()
            label = f"{SERVER} answers {' '.join(map(str, request))} of {client}: {status_of(answer)}"
            yield Outcome((after, requests - {request}), label, effects, events, marks)

    # -- registration

    def _registration_moves(self, node: str) -> None:
        self.scene.step(f"{node} begins to register", (ENGINE,), partial(self._begin, node))
        self.scene.step(f"{node} hears {SERVER}", (ENGINE, f"answers {node}"), partial(self._registered, node))
        self.scene.timer(f"{node} registers again", (ENGINE,), partial(self._register_again, node))
        if watches_server(self.profile):
            self.scene.step(f"{node} probes {SERVER}", (ENGINE, SERVER), partial(self._probe, node))

    def _begin(self, node: str, ranks: tuple[Enlisting, ...]) -> Iterator[Outcome]:
        if _rank(ranks, node).registration.state == "Unregistered":
            roll = Roll(self.machines, ranks)
            roll.step(node, "Started")
            yield roll.done(f"{node} begins to register")

    def _registered(self, node: str, ranks: tuple[Enlisting, ...], answers: Flight) -> Iterator[Outcome]:
        for answer in sorted(answers):
            roll = Roll(self.machines, ranks)
            roll.events.append(told(node, answer))
            roll.step(node, "RegistrationAccepted" if answer[1] == "200" else "RegistrationFailed")
            yield roll.done(f"{node} hears {answer[1]}", answers - {answer})

    def _register_again(self, node: str, ranks: tuple[Enlisting, ...]) -> Iterator[Outcome]:
        if _rank(ranks, node).retry:
            roll = Roll(self.machines, ranks)
            roll.change(node, retry=False)
            roll.step(node, "RetryDue")
            yield roll.done(f"{node} registers again", marks=("registration_retried",))

    def _probe(self, node: str, ranks: tuple[Enlisting, ...], server: Server) -> Iterator[Outcome]:
        """The failure detector hears of another life of the server. Probes that bring no news are no steps."""
        belief = _rank(ranks, node).server
        if not server.up or belief.epoch == server.epoch:
            return
        roll = Roll(self.machines, ranks)
        belief, orders = self.machines.peer.step(belief, "ProbeAnswered", server.epoch)
        roll.change(node, server=belief)
        if any(order == "DeclareDead" for order, _ in orders):
            roll.step(node, "ServerRestarted")
        yield roll.done(f"{node} finds another life of {SERVER}", server)

    # -- nodes at rest

    def _survey(self, cell: str, value: Any) -> Iterator[Any]:
        process = value.process if isinstance(value, Decode) else value
        if not isinstance(process, Process):
            return
        # A tombstone is looked for until it is forgotten, and tombstones are not counted.
        kept = {room.incarnation.room for room in process.rooms if room.local.poll != "Retired"}
        finds = value.finds if isinstance(value, Decode) else ()
        tables = (
            ("rooms", len(kept)),
            ("requests", len(process.entries)),
            ("timers", len(process.timers)),
            ("finds", sum(self.scene.own(find.rid).room in kept for find in finds)),
        )
        gauges: dict[str, float] = {}
        for entry in process.entries:
            gauges[GAUGES[entry.state]] = gauges.get(GAUGES[entry.state], 0) + 1
        yield Surveyed(0, cell, tables, tuple(sorted(gauges.items())), 0)


def _rank(ranks: tuple[Enlisting, ...], node: str) -> Enlisting:
    return next(rank for rank in ranks if rank.node == node)
