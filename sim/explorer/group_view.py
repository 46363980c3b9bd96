"""A state of a group model in the form in which ``spec/tla/Group.tla`` says the same."""

from __future__ import annotations

from typing import Any, Final

from kvpoll.sim.explorer.group_rank import GROUP, Group, Rank, Turn
from kvpoll.sim.explorer.tla_values import canonical, of_room, of_state
from kvpoll.statemachine.agreement import Report
from kvpoll.statemachine.machine import Room

UNSENT: Final = {"state": "Unsent", "cause": "None"}
UNKNOWN: Final = {"state": "None", "asked": False}
NO_ENTRY: Final = {"state": "None", "aborted": ""}
NO_TURN: Final = Turn("None", waiting=False)


def view(group: Group, prefill: tuple[str, ...], answers: str, cells: dict[str, Any]) -> dict[str, Any]:
    """{variable: canonical value}: the variables of the protocol, without the module's history."""
    meeting, routed = cells[GROUP], dict(cells["R"])
    sending = {index: dict(cells[node]) for index, node in enumerate(prefill)}
    told = {
        index: {rid: _asked(table[rid]) if rid in table else UNKNOWN for rid in group.pairs}
        for index, table in sending.items()
    }
    return {
        "router": canonical({rid: of_state(routed[rid]) if rid in routed else UNSENT for rid in group.pairs}),
        "answers": canonical(cells[answers]),
        "rank": canonical({index: _rank(group, cells[node]) for index, node in enumerate(group.nodes)}),
        "prefill": canonical(told),
        "woken": meeting.woken,
        "collective": of_state(meeting.collective),
        "payload": _payload(meeting),
        "faults": canonical(dict(cells["faults"])),
    }


def _asked(sending: Any) -> dict[str, Any]:
    return {"state": sending.state, "asked": sending.asked}


def _rank(group: Group, rank: Rank) -> dict[str, Any]:
    process = rank.process
    rid_of = {pair: rid for rid, pair in group.pairs.items()}
    rooms = {rid: of_room(group.machines.receiver.absent(group.own(rid))) for rid in group.pairs}
    rooms |= {_whose(group, room): of_room(room) for room in process.rooms}
    entries = dict.fromkeys(group.pairs, NO_ENTRY)
    entries |= {entry.rid: {"state": entry.state, "aborted": entry.aborted} for entry in process.entries}
    held = {rid_of[pair]: page for pair, page in process.held}
    known = {key[0] for key, *_ in process.known}
    return {
        "rooms": rooms,
        "timers": frozenset((rid_of[own.pair], name) for own, name in process.timers),
        "entries": entries,
        "order": rank.order,
        "page": {rid: (held[rid],) if rid in held else () for rid in group.pairs},
        "filled": frozenset(rid_of[pair] for _, pair in process.contents),
        "routed": frozenset(rid for rid, pair in group.pairs.items() if pair[0] in known),
        "stopped": process.stopped,
        "commands": rank.commands,
        "turn": _turn(rank.turn or NO_TURN),
    }


def _whose(group: Group, room: Room) -> str:
    return next(rid for rid, pair in group.pairs.items() if pair == room.incarnation.pair)


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "stage": turn.stage,
        "waiting": turn.waiting,
        "commands": turn.commands,
        "merged": _reports(turn.merged),
        "memory": () if turn.memory is None else turn.memory,
        "mine": _reports(turn.mine),
        "queue": turn.queue,
    }


def _reports(reports: frozenset[tuple[str, Report]]) -> frozenset[Any]:
    return frozenset((rid, report.poll, canonical(report.cause)) for rid, report in reports)


def _payload(meeting: Any) -> Any:
    """<<kind, what>> that waits in a collective: a step message, commands, or a vector of polls."""
    if meeting.payload is None:
        return ()
    kind = meeting.collective.shape[0]
    if kind != "step":
        return canonical((kind, meeting.payload))
    commands, reports, memory = meeting.payload
    return canonical((kind, (commands, _reports(reports), tuple(memory))))
