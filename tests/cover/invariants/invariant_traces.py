"""Words for short traces: two sides, a few requests, and one builder for each event that a story needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from kvpoll.spec import trace
from kvpoll.spec.invariants import PAUSE, Bounds, Watch
from kvpoll.spec.trace import PageTag, Pair
from kvpoll.spec.vocabulary import Incarnation

BOUNDS = Bounds(
    end_s=100.0,
    propagate_s=2.0,
    recover_s=30.0,
    step_s=0.5,
    repeats_per_s=3.0,
    ownerless_s=10.0,
    ownerless_rooms=2,
)

A: Pair = (7, 0)
"""The request that most stories are about."""
B: Pair = (8, 0)
"""Another request."""
A_AGAIN: Pair = (7, 1)
"""Another attempt at the room of A."""

Found = tuple[str, float, str, Pair | None]
"""(invariant id, time, node, pair) of a violation."""


class Story(NamedTuple):
    """A trace and the violations that it must yield: none for a near miss."""

    name: str
    events: list[Any]
    found: list[Found]


def found(watch: Watch) -> list[Found]:
    return [(v.invariant, v.t, v.node, v.pair) for v in watch.violations]


def incarnation(pair: Pair, epoch: int = 0) -> Incarnation:
    return Incarnation(*pair, epoch)


def step(
    t: float,
    node: str,
    pair: Pair,
    fact: str,
    before: str,
    after: str,
    *,
    epoch: int = 0,
    meant: Incarnation | None = None,
    detail: Any = None,
    leases: tuple[str, str] = ("Reserved", "Reserved"),
    cause: str | None = None,
    actions: tuple[str, ...] = (),
) -> trace.Stepped:
    role = "receiver" if node.startswith("D") else "sender"
    own = incarnation(pair, epoch)
    return trace.Stepped(t, node, role, own, fact, meant or own, detail, before, after, *leases, cause, actions)


def fenced(t: float, node: str, pair: Pair) -> trace.Fenced:
    return trace.Fenced(t, node, incarnation(pair))


def opened(t: float, node: str, pair: Pair = A, before: str = "Absent") -> trace.Stepped:
    return step(t, node, pair, "RequestOpened", before, "Bootstrapping")


def failed(t: float, node: str, pair: Pair = A, cause: str = "PeerDied") -> trace.Stepped:
    return step(t, node, pair, cause, "Bootstrapping", "Failed", cause=cause)


def succeeded(t: float, node: str, pair: Pair = A) -> trace.Stepped:
    return step(t, node, pair, "WriteCompleted", "Transferring", "Success")


def announced(t: float, node: str, pair: Pair) -> trace.Stepped:
    return step(t, node, pair, "DestinationRegistered", "Absent", "Announced")


def taken(
    t: float, node: str, before: str, after: str, meant_epoch: int = 0, epoch: int = 0, **others: Any
) -> trace.Stepped:
    """Decode's pages reach ``node``; it is in ``epoch``, decode meant it in ``meant_epoch``."""
    meant = incarnation(A, meant_epoch)
    return step(t, node, A, "DestinationRegistered", before, after, epoch=epoch, meant=meant, **others)


def rival(t: float, fact: str = "RivalOpened", meant: Pair = A_AGAIN, **others: Any) -> trace.Stepped:
    """Another attempt asks for the room of A on D0; nothing moves."""
    return step(t, "D0", A, fact, "Bootstrapping", "Bootstrapping", meant=incarnation(meant), **others)


def forgotten(t: float, node: str, pair: Pair) -> trace.Stepped:
    return step(t, node, pair, "DeadlineReached", "Announced", "Absent")


def resolved(t: float, node: str, pair: Pair) -> trace.Stepped:
    return step(t, node, pair, "PeerResolved", "Bootstrapping", "WaitingForInput")


def cleared(t: float, node: str, pair: Pair, before: str, after: str) -> trace.Stepped:
    return step(t, node, pair, "Cleared", before, after)


def timed_out(t: float, node: str, pair: Pair, before: str, what: str) -> trace.Stepped:
    return step(t, node, pair, "DeadlineReached", before, "Failed", detail=what)


def admitted(
    t: float, pair: Pair = A, prefill: tuple[str, ...] = ("P0",), decode: tuple[str, ...] = ("D0",)
) -> trace.Admitted:
    return trace.Admitted(t, "R", f"rid-{pair[0]}", pair, prefill, decode)


def resulted(t: float, ok: bool, cause: str | None = None, pair: Pair = A) -> trace.Resulted:
    return trace.Resulted(t, "R", f"rid-{pair[0]}", pair, ok, cause, 0.5 if ok else None)


def reserved(t: float, node: str, pair: Pair, *pages: int, pool: str = "kv") -> trace.Reserved:
    return trace.Reserved(t, node, pool, incarnation(pair), pages)


def released(t: float, node: str, pair: Pair, *pages: int, free: int, pool: str = "kv") -> trace.Released:
    return trace.Released(t, node, pool, incarnation(pair), pages, free)


def posted(
    t: float,
    write: int,
    pair: Pair = A,
    *,
    source: tuple[int, ...] = (1, 2),
    target: tuple[int, ...] = (11, 12),
    row: int | None = None,
    chunk: int = 0,
    node: str = "P0",
) -> trace.WritePosted:
    return trace.WritePosted(t, node, write, incarnation(pair), "D0", chunk, row is not None, source, target, row)


def landed(t: float, write: int, pair: Pair, *pages: int) -> trace.WriteLanded:
    return trace.WriteLanded(t, "D0", write, incarnation(pair), pages)


def settled(t: float, write: int) -> trace.WriteSettled:
    return trace.WriteSettled(t, "P0", write, True)


def addressed(t: float, peer: str = "P0", epochs: tuple[int, int] = (0, 0)) -> trace.Addressed:
    return trace.Addressed(t, "D0", incarnation(A), peer, *epochs)


def committed(
    t: float, contents: Iterable[dict[str, PageTag]] = (), row_pair: Pair | None = A, node: str = "D0"
) -> trace.Committed:
    return trace.Committed(t, node, incarnation(A), ("P0/tp0", "P0/tp1"), tuple(contents), row_pair)


def page(part: int, pair: Pair = A, second: str = "P0/tp1") -> dict[str, PageTag]:
    return {"P0/tp0": PageTag(A, "P0/tp0", part, 0), "P0/tp1": PageTag(pair, second, part, 0)}


def entered(t: float, node: str, sequence: int, kind: str = "all_reduce", shape: Any = (4,)) -> Any:
    return trace.CollectiveEntered(t, node, "D0/polls", sequence, kind, shape)


def decided(t: float, node: str, rid: str, outcome: str = "admit") -> trace.Decided:
    return trace.Decided(t, node, "P0/pp", rid, outcome)


def stopped(t: float, node: str) -> trace.NodeStopped:
    return trace.NodeStopped(t, node, 0)


def started(t: float, node: str) -> trace.NodeStarted:
    return trace.NodeStarted(t, node, 1)


def severed(t: float, *severs: str) -> trace.FaultBegan:
    return trace.FaultBegan(t, "P0", "cut", "partition", severs)


def restored(t: float) -> trace.FaultEnded:
    return trace.FaultEnded(t, "P0", "cut", "partition")


def paused(t: float, node: str = "D0") -> trace.FaultBegan:
    return trace.FaultBegan(t, node, "stands still", PAUSE, (node,))


def went_on(t: float, node: str = "D0") -> trace.FaultEnded:
    return trace.FaultEnded(t, node, "stands still", PAUSE)


def surveyed(
    t: float,
    tables: tuple[tuple[str, int], ...] = (),
    gauges: tuple[tuple[str, float], ...] = (),
    overdue: int = 0,
) -> trace.Surveyed:
    return trace.Surveyed(t, "D0", tables, gauges, overdue)


def queued(t: float, delta: int, node: str = "D0") -> trace.Queued:
    return trace.Queued(t, node, "num_prealloc", "rid-7", delta)


def repeated(t: float, node: str = "D0", repeat: int = 1) -> trace.Requested:
    return trace.Requested(t, node, "B0", "/route", repeat)


def end(t: float) -> trace.Marked:
    """Nothing happens, but time passes."""
    return trace.Marked(t, "R", "end")
