"""Models of kind "transfer": whole requests between one-rank engines, from dispatch to the last page's release.

Cells: the router "R", every engine ("P0", "D0"), its life ("life P0"), the ordered control channels
("chan D0 P0"), the writes on each wire ("wire P0 D0") and what is left of the fault budget. Each move is one fact of
the protocol, or one thing that the environment does. ``spec/tla/Transfer.tla`` says the same in TLA+.

Assumptions: channels keep order and lose nothing but on a disconnect, of which both ends learn; a deadline passes
when nothing else is left to happen, or early, which costs a fault ("slowness": whatever it waited for took longer);
tombstones outlive every message; one page a request; one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.model import FAULTS_MOST, HEAD, read_faults
from kvpoll.sim.explorer.process import Process
from kvpoll.sim.explorer.system import ROOMS_FROM, Cell, Outcome, Sorted, System, refuse
from kvpoll.sim.explorer.transfer_cells import (
    GAUGES,
    Asked,
    Life,
    Routing,
    Transfer,
    Wire,
    apply_channel,
    apply_decode,
    apply_life,
    apply_router,
    apply_wire,
    write_number,
)
from kvpoll.sim.explorer.transfer_engines import Engines
from kvpoll.sim.explorer.transfer_view import view
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import Source
from kvpoll.spec.trace import (
    Admitted,
    Healed,
    NodeStarted,
    Resulted,
    Surveyed,
)
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.roles import Machines, Routed

FAULTS = (
    "slowness", "client_abort", "prefill_abort", "decode_abort", "prefill_crash", "decode_crash", "message_duplicate",
    "disconnect", "write_fail", "route_failure", "allocation_failure", "clock_offset",
)  # fmt: skip
_MODEL = {**HEAD, "prefill": list, "decode": list, "pages": int}
_REQUEST = {"rid": str, "room": int, "attempt": int, "prefill": str, "decode": str, "when": str}


def read(name: str, source: Source) -> Transfer:
    """Read the parts of a model file that this kind has. Raises BadInput at the offending line."""
    source.require_known((), source.data, ("model", "faults", "request"), "section")
    head = source.data["model"]
    source.require_known(("model",), head, _MODEL, "key")
    source.require_all(("model",), head, ("prefill", "decode", "pages"), "a transfer model")
    for key in ("prefill", "decode", "pages"):
        source.require_form(("model", key), key, head[key], _MODEL[key])
    if not 1 <= head["pages"] <= 8:
        raise source.error(("model", "pages"), f"`pages` must be from 1 to 8, got {head['pages']}")
    asked = tuple(_request(source, place, entry, head) for place, entry in enumerate(source.data.get("request", ())))
    if not asked:
        raise source.error((), "a model needs at least one [[request]]")
    if len({each.rid for each in asked}) < len(asked) or len({each.pair for each in asked}) < len(asked):
        raise source.error(("request", 0), "each request needs a rid, and a (room, attempt), of its own")
    faults = read_faults(source, FAULTS)
    deaths = faults.get("prefill_crash", 0) + faults.get("decode_crash", 0)
    if min(deaths, faults.get("total", deaths)) > 1:
        raise source.error(("faults",), "one death at most: monitors could not tell two apart; set `total = 1`")
    prefill, decode = tuple(head["prefill"]), tuple(head["decode"])
    return Transfer(name, prefill, decode, head["pages"], asked, faults)


def _request(source: Source, place: int, entry: Any, head: dict[str, Any]) -> Asked:
    path = ("request", place)
    source.require_forms(path, entry, _REQUEST)
    source.require_all(path, entry, ("rid", "room"), "a request")
    if entry["room"] <= ROOMS_FROM:
        raise source.error((*path, "room"), f"room numbers of models are above {ROOMS_FROM}, got {entry['room']}")
    when = entry.get("when", "start")
    if when not in ("start", "healed"):
        raise source.error((*path, "when"), f'`when` must be "start" or "healed", got {when!r}')
    served = {}
    for side in ("prefill", "decode"):
        served[side] = entry.get(side, head[side][0])
        source.require_known((*path, side), [served[side]], head[side], f"{side} engine")
    pair = (entry["room"], entry.get("attempt", 0))
    return Asked(entry["rid"], pair, served["prefill"], served["decode"], when == "healed")


def build(model: Transfer, protocol: Protocol, profile: Profile) -> System:
    """The model under one profile, ready to be explored."""
    return _Builder(model, Machines(protocol, profile)).system()


class _Builder(Engines):
    """Puts the cells and moves of one model together."""

    def system(self) -> System:
        model = self.model
        cells = [Cell("R", Routing(), apply_router), Cell(budget.CELL, budget.budget(model.faults), refuse)]
        for node in (*model.prefill, *model.decode):
            cells.append(Cell(node, self.fresh(node), apply_decode if node in model.decode else refuse))
            cells.append(Cell(f"life {node}", Life(), apply_life))
            cells += [Cell(f"chan R {node}", (), apply_channel), Cell(f"chan {node} R", (), apply_channel)]
        for left in model.prefill:
            for right in model.decode:
                cells += [
                    Cell(f"chan {left} {right}", (), apply_channel),
                    Cell(f"chan {right} {left}", (), apply_channel),
                ]
                cells.append(Cell(f"wire {left} {right}", Wire(), apply_wire))
        self._router_moves()
        for node in model.prefill:
            self.prefill_moves(node)
        for node in model.decode:
            self.decode_moves(node)
        for left in model.prefill:
            for right in model.decode:
                self.wire_moves(left, right)
                self.link_moves(left, right)
        start = tuple(NodeStarted(0, node, 0) for node in (*model.prefill, *model.decode))
        return System(model.name, cells, self.moves, start, self._survey, self._renames(), view)

    # -- the router

    def _router_moves(self) -> None:
        for asked in self.model.asked:
            self.move(
                f"R dispatches {asked.rid}", "step", ("R",), lambda router, asked=asked: self._dispatch(router, asked)
            )
            self.fault(
                f"the client of {asked.rid} leaves",
                "client_abort",
                ("R",),
                lambda router, asked=asked: self._leave(router, asked),
            )
        for node in (*self.model.prefill, *self.model.decode):
            self.move(
                f"R hears {node}",
                "step",
                ("R", f"chan {node} R"),
                lambda router, channel, node=node: self._answer(router, channel, node),
            )
            if self.model.faults.get("prefill_crash", 0) + self.model.faults.get("decode_crash", 0):
                self.move(f"R is cut off from {node}", "step", ("R",), partial(self._reset, node=node))
        if any(asked.healed for asked in self.model.asked):
            self.move("the faults are over", "deadline", ("R", budget.CELL), self._heal)

    def _dispatch(self, router: Routing, asked: Asked) -> Iterator[Outcome]:
        if asked.rid in dict(router.requests) or (asked.healed and not router.healed):
            return
        after = router._replace(requests=Sorted(sorted((*router.requests, (asked.rid, Routed())))))
        admitted = Admitted(router.deaths, "R", asked.rid, asked.pair, (asked.prefill,), (asked.decode,))
        effects = tuple((f"chan R {node}", ("Open", asked.rid)) for node in (asked.prefill, asked.decode))
        yield Outcome((after,), f"the router sends both legs of {asked.rid}", effects, (admitted,))

    def _heal(self, router: Routing, left: budget.Budget) -> Iterator[Outcome]:
        """Patient, like a deadline: restarts are done, and whoever could notice a fault has had the time to."""
        if router.healed:
            return
        none = tuple((kind, 0) for kind, _ in left)
        yield Outcome((router._replace(healed=True), none), "the last fault is over", (), (Healed(0, "R"),))

    def _leave(self, router: Routing, asked: Asked) -> Iterator[Outcome]:
        yield from self._route(router, asked.rid, "ClientLeft", None, f"the client of {asked.rid} leaves", ())

    def _answer(self, router: Routing, channel: tuple[Any, ...], node: str) -> Iterator[Outcome]:
        if not channel:
            return
        kind, *rest = channel[0]
        if kind == "FirstToken":
            yield from self._route(
                router, rest[0], "DecodeAnswered", None, f"the first token of {rest[0]}", (channel[1:],)
            )
            return
        rid, side, cause = rest
        label = f"the {side} leg of {rid} failed"
        yield from self._route(router, rid, "LegFailed", (side, cause), label, (channel[1:],))

    def _reset(self, router: Routing, node: str) -> Iterator[Outcome]:
        side = "prefill" if node in self.model.prefill else "decode"
        for where, rid in sorted(router.resets):
            if where == node:
                after = router._replace(resets=router.resets - {(where, rid)})
                label = f"the connection of {rid} to {node} is reset"
                yield from self._route(after, rid, "LegFailed", (side, "engine_crashed"), label, ())

    def _route(
        self, router: Routing, rid: str, fact: str, detail: Any, label: str, rest: tuple[Any, ...]
    ) -> Iterator[Outcome]:
        """Step the router's view of a request. ``rest``: what remains on the channel, if one was read."""
        requests = dict(router.requests)
        if rid not in requests:
            return
        asked, before = self.asked[rid], requests[rid]
        requests[rid], orders = self.machines.router.step(before, fact, detail)
        effects, events = [], []
        for order, argument in orders:
            if order == "AnswerClient":
                ok = argument == "ok"
                events.append(Resulted(0, "R", rid, asked.pair, ok, requests[rid].cause, 0.0 if ok else None))
            elif order == "CancelLeg":
                legs = {"prefill": (asked.prefill,), "decode": (asked.decode,)}.get(
                    argument, (asked.prefill, asked.decode)
                )
                cause = requests[rid].cause or "cancelled"
                effects += [(f"chan R {node}", ("Cancel", rid, cause)) for node in legs]
        after = router._replace(requests=Sorted(sorted(requests.items())))
        yield Outcome((after, *rest), label, tuple(effects), tuple(events))

    # -- nodes at rest

    def _survey(self, cell: str, value: Any) -> Iterator[Any]:
        if not isinstance(value, Process) or not value.up:
            return
        tables = (
            ("rooms", sum(room.local.poll != "Retired" for room in value.rooms)),
            ("requests", len(value.entries)),
            ("timers", len(value.timers)),
            ("pages", len(value.held)),
        )
        gauges: dict[str, float] = {}
        for entry in value.entries:
            gauges[GAUGES[entry.state]] = gauges.get(GAUGES[entry.state], 0) + 1
        yield Surveyed(0, cell, tables, Sorted(sorted(gauges.items())), 0)

    def _renames(self) -> tuple[dict[Any, Any], ...]:
        """Requests with the same engines, different rooms and the same attempt may trade places."""
        renames = []
        for place, one in enumerate(self.model.asked):
            for other in self.model.asked[place + 1 :]:
                same = one._replace(rid="", pair=(0, one.pair[1])) == other._replace(rid="", pair=(0, other.pair[1]))
                alone = sum(asked.pair[0] in (one.pair[0], other.pair[0]) for asked in self.model.asked) == 2
                if same and alone:
                    renames.append(_trade(one, other))
        return tuple(renames)


def _trade(one: Asked, other: Asked) -> dict[Any, Any]:
    """Two requests trade places: their ids, their rooms, and the names of their writes."""
    trade: dict[Any, Any] = {one.rid: other.rid, one.pair[0]: other.pair[0]}
    for epochs in product(range(FAULTS_MOST), repeat=2):
        numbers = [
            write_number(Incarnation(*asked.pair, epochs[0]), Incarnation(*asked.pair, epochs[1]))
            for asked in (one, other)
        ]
        trade[numbers[0]] = numbers[1]
    return trade | {there: here for here, there in trade.items()}
