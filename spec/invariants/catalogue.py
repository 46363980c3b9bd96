"""The invariants as values: id, class, one sentence, and the monitor that judges each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from kvpoll.spec.invariants.leak import BoundedMaps, QuiesceZero, RetryBudget
from kvpoll.spec.invariants.liveness import BoundedEnd, HonestTimer, NonBlocking, ReaperFree, Recover
from kvpoll.spec.invariants.memory import CompleteSuccess, Conservation, PageLifetime, ProducerReady
from kvpoll.spec.invariants.monitor import Monitor
from kvpoll.spec.invariants.observability import HealthTruth, MetricTruth
from kvpoll.spec.invariants.propagate import Propagate
from kvpoll.spec.invariants.ranks import RankAgreement, RightPeer
from kvpoll.spec.invariants.result import Containment, TruthfulResult
from kvpoll.spec.invariants.rooms import Generation, NoResurrection, RoomUnique, StickyTerminal

Klass = Literal["safety", "liveness", "leak", "observability"]


@dataclass(frozen=True, slots=True)
class Invariant:
    """One thing that must hold.

    monitor: the class that judges it. waits_for: where there is none, what the protocol would have to do
    before the invariant could break; else None.
    """

    id: str
    name: str
    klass: Klass
    monitor: type[Monitor] | None
    sentence: str
    waits_for: str | None = None


INVARIANTS: Final[dict[str, Invariant]] = {
    invariant.id: invariant
    for invariant in (
        Invariant("S1", "page-lifetime", "safety", PageLifetime,
            "A page is never handed to a new owner while a posted write on it is not proven terminal."),
        Invariant("S2", "generation", "safety", Generation,
            "Every message, timer and completion acts only on the incarnation that caused it."),
        Invariant("S3", "sticky-terminal", "safety", StickyTerminal,
            "After Success or Failed no event changes a room's state; states never move backwards."),
        Invariant("S4", "no-resurrection", "safety", NoResurrection,
            "After a room is cleared nothing re-creates its state unless a new incarnation is opened."),
        Invariant("S5", "complete-success", "safety", CompleteSuccess,
            "Decode commits a request only if every expected page of it landed and the aux row is its own."),
        Invariant("S6", "right-peer", "safety", RightPeer,
            "The prefill rank that decode talks to is the one that runs the request, in its current life."),
        Invariant("S7", "rank-agreement", "safety", RankAgreement,
            "Ranks of one group apply the same ordered decisions and enter the same collectives."),
        Invariant("S8", "conservation", "safety", Conservation,
            "Free plus held pages are the total of every pool; every holder releases exactly once."),
        Invariant("S9", "truthful-result", "safety", TruthfulResult,
            "A client sees success only if both sides succeeded, and else a cause that was really seen."),
        Invariant("S10", "containment", "safety", Containment,
            "One request's error or one bad message changes no other request and stops no loop."),
        Invariant("S11", "producer-ready", "safety", ProducerReady,
            "The transport reads a chunk only after the computation that writes it has finished."),
        Invariant("S12", "room-unique", "safety", RoomUnique,
            "At most one incarnation of a room is live on a node; a second one is rejected."),
        Invariant("L1", "bounded-end", "liveness", BoundedEnd,
            "Every admitted request ends on every rank of both sides within a stated bound."),
        Invariant("L2", "propagate", "liveness", Propagate,
            "If one side turns Failed and the link is up, the other side ends soon, not at its own timeout."),
        Invariant("L3", "no-cycle", "liveness", None,
            "No cycle of waits for pages, slots, credits or messages is broken only by a long timer.",
            "optimistic prefill: a prefill that holds pages before decode has admitted the request; without "
            "it prefill never holds pages while it waits for decode memory, so no cycle can close"),
        Invariant("L4", "recover", "liveness", Recover,
            "After faults have stopped and restarts are done, new requests succeed within a bound."),
        Invariant("L5", "reaper-free", "liveness", ReaperFree,
            "Cleanup needs no new work, not what it frees, and no unexpired entry out of its way."),
        Invariant("L6", "non-blocking", "liveness", NonBlocking,
            "One scheduler step has a bounded duration whatever a peer does."),
        Invariant("L7", "honest-timer", "liveness", HonestTimer,
            "A deadline starts only when the peer that it accuses could have acted."),
        Invariant("R1", "quiesce-zero", "leak", QuiesceZero,
            "Without traffic all per-room tables, queues, slots and pages are back at zero on every rank."),
        Invariant("R2", "bounded-maps", "leak", BoundedMaps,
            "Orphan or hostile input cannot make per-room state grow without bound."),
        Invariant("R3", "retry-budget", "leak", RetryBudget,
            "Repeated control-plane requests stay under a stated rate in every fault."),
        Invariant("O1", "metric-truth", "observability", MetricTruth,
            "Gauges of an idle node are zero, and gauges say what was counted."),
        Invariant("O2", "health-truth", "observability", HealthTruth,
            "Health is not OK while no request can finish."),
    )
}  # fmt: skip
"""Every invariant by its id."""
