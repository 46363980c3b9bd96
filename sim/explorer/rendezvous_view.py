"""States of a rendezvous as TLC prints them, and the constants of ``spec/tla/Rendezvous.tla``."""

from __future__ import annotations

from typing import Any

from kvpoll.sim.explorer import budget
from kvpoll.sim.explorer.process import Process
from kvpoll.sim.explorer.rendezvous_nodes import DECODE, ENGINE, OVER, SERVER, Decode, Rendezvous
from kvpoll.sim.explorer.tla_values import canonical, function_of, of_room, of_state, to_tla


def view(cells: dict[str, Any]) -> dict[str, Any]:
    """{variable: canonical value} of one state."""
    router, server, decode = cells["R"], cells[SERVER], cells[DECODE]
    ranks = {rank.node: rank for rank in cells[ENGINE]}
    requests = {rid: function_of({"node": node, "state": of_state(state)}) for rid, node, state in router.requests}
    registrations = {
        node: function_of({
            "registration": of_state(rank.registration), "retry": rank.retry, "server": of_state(rank.server),
        })
        for node, rank in ranks.items()
    }  # fmt: skip
    seen = {
        "router": function_of({"healed": router.healed, "requests": function_of(requests)}),
        "server": function_of({
            "up": server.up, "epoch": server.epoch, "registry": of_state(server.registry),
            "rooms": function_of({room: of_state(entry) for room, entry in server.rooms}),
        }),
        "registrations": function_of(registrations),
        "prefill": function_of({node: function_of(_process(cells[node])) for node in ranks}),
        "decode": function_of(_decode(decode)),
        "faults": canonical({kind: left for kind, left in cells[budget.CELL] if (kind, left) != OVER}),
    }  # fmt: skip
    for name, prefix in (("chan", "chan "), ("requests", "requests "), ("answers", "answers ")):
        ends = {cell.removeprefix(prefix): value for cell, value in cells.items() if cell.startswith(prefix)}
        seen[name] = function_of({_end(name, end): canonical(value) for end, value in ends.items()})
    return seen


def _end(name: str, end: str) -> Any:
    return tuple(end.split(" ")) if name == "chan" else end


def _process(process: Process) -> dict[str, Any]:
    entries = {
        entry.rid: function_of({"state": entry.state, "aborted": entry.aborted, "rejected": entry.rejected})
        for entry in process.entries
    }
    return {
        "stopped": process.stopped,
        "rooms": function_of({room.incarnation.room: of_room(room) for room in process.rooms}),
        "timers": canonical(process.timers),
        "entries": function_of(entries),
        "known": function_of({key[0]: node for key, node in process.known}),
    }


def _decode(decode: Decode) -> dict[str, Any]:
    finds = {
        find.rid: function_of({"asks": find.asks, "resolution": of_state(find.resolution), "node": find.node})
        for find in decode.finds
    }
    cached = {"topology": decode.topology, "endpoints": decode.endpoints, "finds": function_of(finds)}
    return {**_process(decode.process), **cached}


def constants(model: Rendezvous) -> dict[str, str]:
    """The constants of the module, but for Rules, as TLA+ expressions."""
    asked = {each.rid: {"room": each.pair[0], "healed": each.healed} for each in model.asked}
    return {
        "Requests": to_tla(asked),
        "DpRanks": to_tla(model.prefill),
        "DpAttention": to_tla(model.dp_attention),
        "StartsLate": to_tla(model.start == "late"),
        "Budget": to_tla(dict(budget.budget(model.faults))),
    }
