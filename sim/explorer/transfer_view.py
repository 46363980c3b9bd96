"""States of a transfer model as TLC prints them, and the constants of ``spec/tla/Transfer.tla``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.process import Process
from kvpoll.sim.explorer.tla_values import canonical, function_of, of_room, of_state, to_tla
from kvpoll.sim.explorer.transfer_cells import Life, Routing, Transfer, Wire

REMEMBERED: Final = 100_000
"""Values of single cells whose form is remembered: a search has far fewer of them than states."""


def view(cells: dict[str, Any]) -> dict[str, Any]:
    """{variable: canonical value} of one state."""
    processes, lives, channels, wires = {}, {}, {}, {}
    for name, value in cells.items():
        kind, _, ends = name.partition(" ")
        if kind == "chan":
            channels[tuple(ends.split(" "))] = value
        elif kind == "wire":
            wires[tuple(ends.split(" "))] = _wire(value)
        elif kind == "life":
            lives[ends] = _life(value)
        elif isinstance(value, Process):
            processes[name] = _process(value)
    return {
        "router": _router(cells["R"]),
        "engine": function_of(processes),
        "life": function_of(lives),
        "chan": function_of({ends: _messages(messages) for ends, messages in channels.items()}),
        "wire": function_of(wires),
        "left": function_of(dict(cells[budget.CELL])),
    }


def constants(model: Transfer) -> dict[str, str]:
    """The constants of the module, but for Rules, as TLA+ expressions. Nothing is watched."""
    asked = [
        {
            "rid": each.rid, "room": each.pair[0], "attempt": each.pair[1],
            "prefill": each.prefill, "decode": each.decode, "healed": each.healed,
        }
        for each in model.asked
    ]  # fmt: skip
    return {
        "Requests": to_tla({canonical(each) for each in asked}),
        "Prefill": to_tla(set(model.prefill)),
        "Decode": to_tla(set(model.decode)),
        "Pages": to_tla(model.pages),
        "Faults": to_tla(dict(budget.budget(model.faults))),
        "Watched": "{}",
    }


@lru_cache(REMEMBERED)
def _router(router: Routing) -> Any:
    return function_of({
        "deaths": router.deaths, "healed": router.healed, "resets": canonical(router.resets),
        "requests": function_of({rid: of_state(state) for rid, state in router.requests}),
    })  # fmt: skip


@lru_cache(REMEMBERED)
def _life(life: Life) -> Any:
    return canonical(life._asdict())


@lru_cache(REMEMBERED)
def _wire(wire: Wire) -> Any:
    writes = frozenset(canonical(write._asdict()) for write in wire.writes)
    return function_of({"up": wire.up, "epoch": wire.epoch, "writes": writes})


@lru_cache(REMEMBERED)
def _messages(messages: tuple[Any, ...]) -> Any:
    return canonical(messages)


@lru_cache(REMEMBERED)
def _process(process: Process) -> Any:
    is_decode = any(isinstance(rest[0], str) for _, *rest in process.known)
    entries = {
        entry.rid: function_of({"state": entry.state, "aborted": entry.aborted, "rejected": entry.rejected})
        for entry in process.entries
    }
    return function_of({
        "epoch": process.epoch, "up": process.up, "stopped": process.stopped,
        "rooms": function_of({room.incarnation.room: of_room(room) for room in process.rooms}),
        "timers": canonical(process.timers),
        "entries": function_of(entries),
        "held": function_of({canonical(pair): page for pair, page in process.held}),
        "free": process.free,
        "peers": function_of({node: of_state(peer) for node, peer in process.peers}),
        "known": function_of({canonical(key): _known(is_decode, rest) for key, *rest in process.known}),
        "contents": function_of({page: canonical(pair) for page, pair in process.contents}),
        "routes": function_of(dict(process.routes)),
    })  # fmt: skip


def _known(is_decode: bool, rest: list[Any]) -> Any:
    """On decode the peer and its epoch; on prefill the destination and the asker, each of which may be missing."""
    if is_decode:
        return canonical(rest)
    destination, asker = (() if each is None else canonical(each) for each in rest)
    return function_of({"destination": destination, "asker": asker})
