"""What the cells of a transfer model hold, how effects change them, and what orders mean on either side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from kvpoll.sim.explorer.process import Pen, Process
from kvpoll.sim.explorer.system import Sorted, send
from kvpoll.spec.trace import (
    Addressed,
    Pair,
)
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.roles import Routed

GAUGES = {
    "Bootstrap": "num_prefill_bootstrap_queue_reqs",
    "Waiting": "num_queue_reqs",
    "Inflight": "num_prefill_inflight_queue_reqs",
    "Preallocation": "num_decode_prealloc_queue_reqs",
    "Transfer": "num_decode_transfer_queue_reqs",
    "Running": "num_running_reqs",
}
LINK_RESTORED = ("LinkRestored",)
DEADLINES = {
    "prefill": ("bootstrap", "transfer", "announced"),
    "decode": ("bootstrap", "admission", "waiting", "drain"),
}


class Asked(NamedTuple):
    """A request of the model: who serves it. healed: dispatched only after the last fault; its timers never ring."""

    rid: str
    pair: Pair
    prefill: str
    decode: str
    healed: bool = False


class Life(NamedTuple):
    """What others can find out about a process: does it live, in which life, and which life is listed for it."""

    up: bool = True
    epoch: int = 0
    listed: int = 0


class Write(NamedTuple):
    """A posted write: whose it is on prefill, whose pages it fills on decode, from and to which page.

    state: "posted"; "failed" (the writer knows, bytes may still land); "cut" (its target's process is gone).
    """

    own: Incarnation
    theirs: Incarnation
    source: int
    target: int
    state: str = "posted"


class Wire(NamedTuple):
    """Writes between two engines, and the life of the target that they can reach."""

    up: bool = True
    epoch: int = 0
    writes: tuple[Write, ...] = ()


class Routing(NamedTuple):
    """The router: (rid, state) of what it has dispatched, how many processes have died so far, and the (node, rid)
    whose connections were reset by a death and that it has not looked at yet."""

    deaths: int = 0
    healed: bool = False
    requests: tuple[tuple[str, Routed], ...] = ()
    resets: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Transfer:
    """What a model file of this kind says."""

    name: str
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    pages: int
    asked: tuple[Asked, ...]
    faults: dict[str, int]


def apply_wire(wire: Wire, operation: tuple[Any, ...]) -> Wire:
    kind, *rest = operation
    if kind == "post":
        reachable = wire.up and wire.epoch == rest[0].theirs.epoch
        write = rest[0] if reachable else rest[0]._replace(state="cut")
        return wire._replace(writes=Sorted(sorted((*wire.writes, write))))
    if kind == "writer gone":
        return wire._replace(writes=())
    if kind == "target gone":
        cut = Sorted(sorted(write._replace(state="cut") for write in wire.writes))
        return Wire(False, wire.epoch, cut)
    return Wire(True, wire.epoch + 1, wire.writes)


def apply_life(life: Life, operation: str) -> Life:
    if operation == "down":
        return life._replace(up=False)
    return life._replace(up=True, epoch=life.epoch + 1)


def apply_channel(channel: tuple[Any, ...], message: Any) -> tuple[Any, ...]:
    return () if message is None else send(channel, (message,))


def apply_router(router: Routing, resets: tuple[tuple[str, str], ...]) -> Routing:
    """A process died: the connections of these (node, rid) break, as far as there are any."""
    open_now = {rid for rid, state in router.requests if state.state != "Answered"}
    broken = {(node, rid) for node, rid in resets if rid in open_now}
    return router._replace(deaths=router.deaths + 1, resets=router.resets | broken)


def apply_decode(process: Process, operation: tuple[Any, ...]) -> Process:
    """Bytes arrive: the page holds what was written last, whoever owns it now."""
    page, theirs = operation
    if not process.up or process.epoch != theirs.epoch:
        return process
    return process._replace(contents=Sorted(sorted({**dict(process.contents), page: theirs.pair}.items())))


class PrefillPen(Pen):
    """The orders that a sender gives. ``known``: key -> (destination or None, asker or None)."""

    role = "sender"

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        destination, asker = self.known.get(self.key(own), (None, None))
        if kind == "NotifyDecode" and destination is not None:
            self.send(destination[0], ("Status", destination[1], 0, detail))
        elif kind == "AnswerDecode" and origin is not None:
            self.send(origin[0], ("Status", origin[1], 0, detail[0]))
        elif kind == "AcknowledgeAbort":
            chosen = asker if detail is None else origin
            if chosen is not None:
                self.send(chosen[0], ("Acknowledged", chosen[1], 0))

    def note(self, incarnation: Incarnation, destination: Any = None, asker: Any = None) -> None:
        """Remember where to write and whom to acknowledge, for as long as there is a room."""
        before = self.known.get(self.key(incarnation), (None, None))
        self.known[self.key(incarnation)] = (destination or before[0], asker or before[1])

    def tidy(self, incarnation: Incarnation) -> None:
        """No room, nothing to remember for it."""
        room = self.rooms.get(incarnation.room)
        if room is None or self.key(room.incarnation) != self.key(incarnation):
            self.known.pop(self.key(incarnation), None)


class DecodePen(Pen):
    """The orders that a receiver gives. ``known``: key -> (prefill node, its epoch as known)."""

    role = "receiver"
    pools = ("kv", "aux")

    def order(self, kind: str, own: Incarnation, detail: Any, origin: Any) -> None:
        peer = self.known.get(self.key(own))
        if kind == "NotifyPrefill" and peer is not None:
            self.send(peer[0], ("Abort", Incarnation(own.room, own.attempt, peer[1]), own))
        elif kind == "SendMetadata":
            self.publish(own)

    def publish(self, own: Incarnation) -> None:
        """Tell prefill where to write."""
        peer, page = self.known.get(self.key(own)), self.held.get(own.pair)
        if peer is None or page is None:
            return
        node, epoch = peer
        self.events.append(Addressed(0, self.node, own, node, epoch, epoch))
        self.send(node, ("Metadata", Incarnation(own.room, own.attempt, epoch), own, page))


def wire_name(node: str, other: str, side: str) -> str:
    return f"wire {node} {other}" if side == "prefill" else f"wire {other} {node}"


def without(wire: Wire, write: Write) -> Wire:
    return wire._replace(writes=Sorted(each for each in wire.writes if each != write))


def write_number(own: Incarnation, theirs: Incarnation) -> int:
    """A write's name in the trace: made of whom it belongs to, so that equal histories have equal names."""
    return ((own.room * 16 + own.attempt) * 16 + own.epoch) * 16 + theirs.epoch
