"""Each invariant as two short stories: a trace that breaks it, and its neighbour that does not."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError
from typing import Any, NamedTuple

import pytest

from kvpoll.spec import trace
from kvpoll.spec.invariants import (
    AGREEMENT_WINDOW,
    INVARIANTS,
    RECORDED,
    REMEMBERED,
    Bounds,
    InvariantError,
    Monitor,
    Recent,
    Watch,
    judge,
)
from kvpoll.spec.trace import PageTag, Pair, Stream, Violated
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
    meant: Incarnation | None = None,
    detail: Any = None,
    leases: tuple[str, str] = ("Reserved", "Reserved"),
    cause: str | None = None,
    actions: tuple[str, ...] = (),
) -> trace.Stepped:
    role = "receiver" if node.startswith("D") else "sender"
    own = incarnation(pair)
    return trace.Stepped(
        t, node, role, own, fact, meant or own, detail, before, after, *leases, cause, actions
    )


def opened(t: float, node: str, pair: Pair = A, before: str = "Absent") -> trace.Stepped:
    return step(t, node, pair, "RequestOpened", before, "Bootstrapping")


def failed(t: float, node: str, pair: Pair = A, cause: str = "PeerDied") -> trace.Stepped:
    return step(t, node, pair, cause, "Bootstrapping", "Failed", cause=cause)


def succeeded(t: float, node: str, pair: Pair = A) -> trace.Stepped:
    return step(t, node, pair, "WriteCompleted", "Transferring", "Success")


def announced(t: float, node: str, pair: Pair) -> trace.Stepped:
    return step(t, node, pair, "DestinationRegistered", "Absent", "Announced")


def forgotten(t: float, node: str, pair: Pair) -> trace.Stepped:
    return step(t, node, pair, "DeadlineReached", "Announced", "Absent")


def resolved(t: float, node: str, pair: Pair) -> trace.Stepped:
    return step(t, node, pair, "PeerResolved", "Bootstrapping", "WaitingForInput")


def cleared(t: float, node: str, pair: Pair, before: str, after: str) -> trace.Stepped:
    return step(t, node, pair, "Cleared", before, after)


def timed_out(t: float, node: str, pair: Pair, before: str, what: str) -> trace.Stepped:
    return step(t, node, pair, "DeadlineReached", before, "Failed", detail=what)


def admitted(
    t: float,
    pair: Pair = A,
    prefill: tuple[str, ...] = ("P0",),
    decode: tuple[str, ...] = ("D0",),
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
    return trace.WritePosted(
        t, node, write, incarnation(pair), "D0", chunk, row is not None, source, target, row
    )


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


def page(index: int, pair: Pair = A, second: str = "P0/tp1") -> dict[str, PageTag]:
    return {
        "P0/tp0": PageTag(A, "P0/tp0", index, 0),
        "P0/tp1": PageTag(pair, second, index, 0),
    }


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


STORIES: dict[str, list[Story]] = {
    "S1": [
        Story(
            "decode frees pages on abort and hands them on while prefill still writes (A01)",
            [
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                released(2, "D0", A, 11, 12, free=9),
                reserved(3, "D0", B, 12, 13),
            ],
            [("S1", 3, "D0", B)],
        ),
        Story(
            "the pages go on only after the write is settled",
            [
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                released(2, "D0", A, 11, 12, free=9),
                settled(2.5, 1),
                reserved(3, "D0", B, 12, 13),
            ],
            [],
        ),
        Story(
            "one of two writes on the same page is still out",
            [
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                posted(1, 2, node="P0/tp1"),
                settled(2, 2),
                released(2, "D0", A, 11, 12, free=9),
                reserved(3, "D0", B, 11),
            ],
            [("S1", 3, "D0", B)],
        ),
        Story(
            "other pages go on while the write is out",
            [
                reserved(0, "D0", A, 11, 12, 13),
                posted(1, 1),
                released(2, "D0", A, 13, free=9),
                reserved(3, "D0", B, 13),
            ],
            [],
        ),
        Story(
            "the source pages go on while the transport reads them",
            [
                reserved(0, "P0", A, 1, 2),
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                released(2, "P0", A, 1, 2, free=9),
                reserved(3, "P0", B, 2),
            ],
            [("S1", 3, "P0", B)],
        ),
        Story(
            "the aux row goes on while the write that fills it is out (A05)",
            [
                reserved(0, "D0", A, 5, pool="aux"),
                posted(1, 1, row=5),
                released(2, "D0", A, 5, free=9, pool="aux"),
                reserved(3, "D0", B, 5, pool="aux"),
            ],
            [("S1", 3, "D0", B)],
        ),
        Story(
            "a kv page with the number of the row is another page",
            [reserved(0, "D0", A, 5, pool="aux"), posted(1, 1, row=5), reserved(3, "D0", B, 5, pool="kv")],
            [],
        ),
        Story(
            "pages that the pair never owned are written and then handed out",
            [posted(1, 1), reserved(3, "D0", B, 11)],
            [("S1", 3, "D0", B)],
        ),
        Story(
            "a page is handed out twice at once, with a write out for its first owner",
            [reserved(0, "D0", A, 11, 12), posted(1, 1), reserved(2, "D0", B, 12)],
            [("S1", 2, "D0", B), ("S8", 2, "D0", B)],
        ),
        Story(
            "a write lands on a page that is somebody else's now",
            [
                reserved(0, "D0", A, 11),
                released(1, "D0", A, 11, free=9),
                reserved(2, "D0", B, 11),
                landed(3, 1, A, 11),
            ],
            [("S1", 3, "D0", A)],
        ),
        Story(
            "a write lands on a page that is free, and on its own",
            [
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                released(2, "D0", A, 11, free=9),
                landed(3, 1, A, 11, 12),
            ],
            [],
        ),
        Story(
            "a restarted decode rank has new memory",
            [
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                stopped(2, "D0"),
                reserved(3, "D0", B, 11, 12),
                settled(4, 1),
            ],
            [],
        ),
        Story(
            "a dead prefill rank writes no more, and reads no more",
            [
                reserved(0, "D0", A, 11, 12),
                reserved(0, "P0", A, 1, 2),
                posted(1, 1),
                stopped(2, "P0"),
                released(3, "D0", A, 11, 12, free=9),
                reserved(3, "D0", B, 11),
                reserved(4, "P0", B, 1),
            ],
            [],
        ),
        Story(
            "a write number that is used again stands for the new write only",
            [
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                posted(2, 1, B, target=(21,)),
                settled(3, 1),
                released(4, "D0", A, 11, 12, free=9),
                reserved(5, "D0", B, 11, 21),
            ],
            [],
        ),
        Story(
            "somebody releases the pages of another while a write is out on them",
            [
                reserved(0, "D0", A, 11, 12),
                posted(1, 1),
                released(2, "D0", B, 11, free=9),
                reserved(3, "D0", B, 11),
            ],
            [("S1", 3, "D0", B), ("S8", 2, "D0", B)],
        ),
    ],
    "S2": [
        Story(
            "a message for the last attempt fails this one",
            [step(1, "P0", A_AGAIN, "PeerFailed", "Transferring", "Failed", meant=incarnation(A))],
            [("S2", 1, "P0", A_AGAIN)],
        ),
        Story(
            "a message for the last life of the process moves a lease",
            [
                step(
                    1,
                    "P0",
                    A,
                    "QuiescenceProven",
                    "Failed",
                    "Failed",
                    meant=incarnation(A, 1),
                    leases=("Draining", "Free"),
                )
            ],
            [("S2", 1, "P0", A)],
        ),
        Story(
            "a message for the last attempt is answered, and that is all",
            [
                step(
                    1,
                    "P0",
                    A_AGAIN,
                    "PeerFailed",
                    "Transferring",
                    "Transferring",
                    meant=incarnation(A),
                    actions=("NotifyPeer",),
                )
            ],
            [],
        ),
        Story("a request opens the room for itself", [opened(1, "P0")], []),
    ],
    "S3": [
        Story(
            "failed set-up is overwritten by WaitingForInput (sglang 24772)",
            [failed(1, "P0"), step(2, "P0", A, "PeerResolved", "Failed", "WaitingForInput")],
            [("S3", 2, "P0", A)],
        ),
        Story(
            "success turns into failure",
            [succeeded(1, "D0"), step(2, "D0", A, "PeerDied", "Success", "Failed")],
            [("S3", 2, "D0", A)],
        ),
        Story(
            "a transfer goes back to waiting",
            [step(1, "D0", A, "PeerResolved", "Transferring", "WaitingForInput")],
            [("S3", 1, "D0", A)],
        ),
        Story(
            "the same attempt opens again over its own end",
            [failed(1, "P0"), opened(2, "P0", before="Failed")],
            [("S3", 2, "P0", A)],
        ),
        Story(
            "a transfer fails, is cleared, and another attempt begins",
            [
                step(1, "D0", A, "PeerDied", "Transferring", "Failed"),
                cleared(2, "D0", A, "Failed", "Absent"),
                opened(3, "D0", A_AGAIN),
            ],
            [],
        ),
        Story(
            "another attempt takes a room that is over",
            [failed(1, "P0"), opened(2, "P0", A_AGAIN, "Failed")],
            [],
        ),
    ],
    "S4": [
        Story(
            "a late message brings a cleared room back",
            [
                opened(0, "P0"),
                failed(1, "P0"),
                cleared(2, "P0", A, "Failed", "Absent"),
                announced(3, "P0", A),
            ],
            [("S4", 3, "P0", A)],
        ),
        Story(
            "a late message wakes a tombstone (A11)",
            [
                cleared(2, "P0", A, "Failed", "Retired"),
                step(3, "P0", A, "DestinationRegistered", "Retired", "WaitingForInput"),
            ],
            [("S4", 3, "P0", A)],
        ),
        Story(
            "the room comes back after its tombstone is gone",
            [
                cleared(2, "P0", A, "Failed", "Retired"),
                step(3, "P0", A, "TombstoneExpired", "Retired", "Absent"),
                opened(4, "P0"),
            ],
            [("S4", 4, "P0", A)],
        ),
        Story(
            "a message makes a room that nobody opened",
            [step(1, "P0", A, "DestinationRegistered", "Absent", "WaitingForInput")],
            [("S4", 1, "P0", A)],
        ),
        Story(
            "an early message is announced, forgotten, announced again and opened",
            [
                announced(1, "P0", A),
                forgotten(2, "P0", A),
                announced(3, "P0", A),
                opened(4, "P0", before="Announced"),
            ],
            [],
        ),
        Story(
            "another attempt opens over the tombstone, and another node opens the same pair",
            [cleared(2, "P0", A, "Failed", "Retired"), opened(3, "P0", A_AGAIN, "Retired"), opened(3, "D0")],
            [],
        ),
        Story(
            "a new process has cleared nothing",
            [cleared(2, "P0", A, "Failed", "Retired"), stopped(3, "P0"), opened(4, "P0")],
            [],
        ),
    ],
    "S5": [
        Story("a page of another request", [committed(1, [page(0), page(1, pair=B)])], [("S5", 1, "D0", A)]),
        Story(
            "a page that never came",
            [committed(1, [page(0), {"P0/tp0": PageTag(A, "P0/tp0", 1, 0)}])],
            [("S5", 1, "D0", A)],
        ),
        Story("two pages in each other's place", [committed(1, [page(1), page(0)])], [("S5", 1, "D0", A)]),
        Story("both shares from one rank", [committed(1, [page(0, second="P0/tp0")])], [("S5", 1, "D0", A)]),
        Story(
            "the aux row of another request (A05)",
            [committed(1, [page(0)], row_pair=B)],
            [("S5", 1, "D0", A)],
        ),
        Story(
            "an aux row that nobody filled", [committed(1, [page(0)], row_pair=None)], [("S5", 1, "D0", A)]
        ),
        Story("every page and the row in place", [committed(1, [page(0), page(1)])], []),
    ],
    "S6": [
        Story(
            "decode talks to a rank that does not run the request",
            [admitted(0), addressed(1, "P1")],
            [("S6", 1, "D0", A)],
        ),
        Story(
            "decode talks to the last life of the rank (A21)",
            [admitted(0), addressed(1, epochs=(0, 1))],
            [("S6", 1, "D0", A)],
        ),
        Story("decode talks to the right rank", [admitted(0), addressed(1, epochs=(1, 1))], []),
        Story("nobody says which ranks would be right", [addressed(1, "P1")], []),
    ],
    "S7": [
        Story(
            "one rank enters another collective",
            [
                entered(1, "D0/tp0", 0),
                entered(1, "D0/tp0", 1),
                entered(2, "D0/tp1", 0),
                entered(3, "D0/tp1", 1, "broadcast"),
            ],
            [("S7", 3, "D0/tp1", None)],
        ),
        Story(
            "one rank brings another shape because its queue differs (A14)",
            [entered(1, "D0/tp0", 0), entered(2, "D0/tp1", 0, shape=(3,))],
            [("S7", 2, "D0/tp1", None)],
        ),
        Story(
            "a stage drops what another admitted (A03)",
            [
                decided(1, "P0/pp0", "x"),
                decided(1, "P0/pp0", "y"),
                decided(2, "P0/pp1", "x", "drop"),
                decided(3, "P0/pp1", "z"),
            ],
            [("S7", 2, "P0/pp1", None)],
        ),
        Story(
            "stages decide the same in another order",
            [decided(1, "P0/pp0", "x"), decided(1, "P0/pp0", "y"), decided(2, "P0/pp1", "y")],
            [("S7", 2, "P0/pp1", None)],
        ),
        Story(
            "one rank lags behind, then leads",
            [
                entered(1, "D0/tp0", 0),
                entered(1, "D0/tp0", 1, "gather"),
                entered(2, "D0/tp1", 0),
                entered(2, "D0/tp1", 1, "gather"),
                decided(2, "P0/pp0", "x"),
                decided(2, "P0/pp1", "x"),
                decided(3, "P0/pp1", "y", "drop"),
                decided(4, "P0/pp0", "y", "drop"),
            ],
            [],
        ),
        Story(
            "a restarted engine begins new histories, and its dead rank spoils none",
            [
                entered(1, "D0/tp0", 0),
                decided(1, "P0/pp0", "x"),
                stopped(2, "P0/pp1"),
                stopped(2, "D0/tp1"),
                decided(2, "P0/pp0", "orphan"),
                entered(2, "D0/tp0", 1, "orphan"),
                started(3, "P0/pp1"),
                started(3, "D0/tp1"),
                entered(4, "D0/tp1", 0, "gather"),
                entered(4, "D0/tp0", 0, "gather"),
                entered(4, "D0/tp1", 1),
                decided(4, "P0/pp1", "y"),
                decided(5, "P0/pp0", "y"),
            ],
            [],
        ),
        Story(
            "after the restart it is judged again",
            [
                stopped(2, "P0/pp1"),
                started(3, "P0/pp1"),
                decided(4, "P0/pp0", "x"),
                decided(5, "P0/pp1", "y"),
            ],
            [("S7", 5, "P0/pp1", None)],
        ),
    ],
    "S8": [
        Story(
            "a page is handed out twice",
            [reserved(0, "D0", A, 1), reserved(1, "D0", B, 1)],
            [("S8", 1, "D0", B)],
        ),
        Story("a page is handed out twice in one go", [reserved(0, "D0", A, 1, 1)], [("S8", 0, "D0", A)]),
        Story(
            "pages are released twice (B46)",
            [reserved(0, "D0", A, 1), released(1, "D0", A, 1, free=4), released(2, "D0", A, 1, free=4)],
            [("S8", 2, "D0", A)],
        ),
        Story(
            "pages of another are released",
            [reserved(0, "D0", A, 1), released(1, "D0", B, 1, free=4)],
            [("S8", 1, "D0", B)],
        ),
        Story(
            "a page is lost on the way, and that is told once",
            [
                reserved(0, "D0", A, 1, 2),
                released(1, "D0", A, 1, 2, free=4),
                reserved(2, "D0", B, 1, 2),
                released(3, "D0", B, 1, 2, free=3),
                reserved(4, "D0", A, 1),
                released(5, "D0", A, 1, free=3),
            ],
            [("S8", 3, "D0", B)],
        ),
        Story(
            "pages go and come, in two pools, and through a restart",
            [
                reserved(0, "D0", A, 1, 2),
                reserved(0, "D0", A, 1, pool="aux"),
                reserved(1, "D0", B, 3),
                released(1, "D0", A, 1, free=2),
                released(1, "D0", A, 1, free=1, pool="aux"),
                released(2, "D0", A, 2, free=3),
                stopped(3, "D0"),
                reserved(4, "D0", B, 3),
                released(5, "D0", B, 3, free=8),
            ],
            [],
        ),
    ],
    "S9": [
        Story("success without a commit", [admitted(0), resulted(5, True)], [("S9", 5, "R", A)]),
        Story(
            "success although one of two decode ranks did not commit",
            [admitted(0, decode=("D0", "D1")), committed(1), resulted(5, True)],
            [("S9", 5, "R", A)],
        ),
        Story(
            "success although prefill failed (B33)",
            [admitted(0), failed(1, "P0"), committed(2), resulted(5, True)],
            [("S9", 5, "R", A)],
        ),
        Story(
            "failure with a cause that nobody saw",
            [admitted(0), failed(1, "P0", cause="PeerDied"), resulted(5, False, "Timeout")],
            [("S9", 5, "R", A)],
        ),
        Story("success, and committed", [admitted(0), committed(1), resulted(5, True)], []),
        Story(
            "failure with the cause of a failure",
            [
                admitted(0),
                failed(1, "P0", cause="PeerDied"),
                failed(2, "D0", cause="Told"),
                resulted(5, False, "Told"),
            ],
            [],
        ),
        Story("failure before any rank knew", [admitted(0), resulted(5, False, "refused")], []),
        Story(
            "ranks that stopped meanwhile are not judged",
            [
                admitted(0, decode=("D0", "D1")),
                failed(1, "P0"),
                stopped(2, "P0"),
                committed(2),
                stopped(3, "D1"),
                started(4, "D1"),
                resulted(5, True),
            ],
            [],
        ),
        Story(
            "a rank that stopped before the admission is judged once it runs",
            [stopped(0, "D0"), started(1, "D0"), admitted(2), resulted(5, True)],
            [("S9", 5, "R", A)],
        ),
        Story("answers to unknown requests are nobody's lie", [committed(1), resulted(5, True)], []),
    ],
    "S10": [
        Story(
            "a machine is offered what its table forbids",
            [trace.IllegalFactRaised(1, "P0", "sender", incarnation(A), "WriteCompleted", "Success")],
            [("S10", 1, "P0", A)],
        ),
        Story(
            "a bad message ends the listener (A04)",
            [trace.LoopStopped(1, "P0", "listener", "malformed frame")],
            [("S10", 1, "P0", None)],
        ),
        Story("a process dies, which is no loop that ends in a live one", [stopped(1, "P0")], []),
    ],
    "S11": [
        Story("a chunk is sent before it is computed (B35)", [posted(1, 1)], [("S11", 1, "P0", A)]),
        Story(
            "the next chunk is sent before it is computed",
            [trace.Computed(1, "P0", incarnation(A), 0), posted(1, 1), posted(2, 2, chunk=1)],
            [("S11", 2, "P0", A)],
        ),
        Story(
            "a restarted rank sends what its last life computed",
            [trace.Computed(1, "P0", incarnation(A), 0), stopped(2, "P0"), posted(3, 1)],
            [("S11", 3, "P0", A)],
        ),
        Story(
            "each chunk is sent once it is computed",
            [
                trace.Computed(1, "P0", incarnation(A), 0),
                trace.Computed(1, "P0", incarnation(A, 3), 1),
                posted(1, 1),
                posted(2, 2, chunk=1),
            ],
            [],
        ),
    ],
    "S12": [
        Story(
            "two attempts of a room are live on one node (A22)",
            [opened(1, "D0"), opened(2, "D0", A_AGAIN)],
            [("S12", 2, "D0", A_AGAIN)],
        ),
        Story(
            "the second attempt takes the machine of the first",
            [
                opened(1, "D0"),
                step(
                    2,
                    "D0",
                    A,
                    "RequestOpened",
                    "Bootstrapping",
                    "WaitingForInput",
                    meant=incarnation(A_AGAIN),
                ),
            ],
            [("S2", 2, "D0", A), ("S12", 2, "D0", A_AGAIN)],
        ),
        Story(
            "an attempt that nobody opened is live too",
            [
                step(1, "D0", A, "DestinationRegistered", "Announced", "WaitingForInput"),
                opened(2, "D0", A_AGAIN),
            ],
            [("S12", 2, "D0", A_AGAIN)],
        ),
        Story(
            "a rival shares a live room",
            [
                opened(1, "D0"),
                step(2, "D0", A, "RivalOpened", "Bootstrapping", "Bootstrapping", meant=incarnation(A_AGAIN)),
            ],
            [("S12", 2, "D0", A_AGAIN)],
        ),
        Story(
            "a rival is rejected, and one that is no rival is none",
            [
                opened(1, "D0"),
                step(
                    2,
                    "D0",
                    A,
                    "RivalOpened",
                    "Bootstrapping",
                    "Bootstrapping",
                    meant=incarnation(A_AGAIN),
                    actions=("RejectRequest",),
                ),
                step(3, "D0", A, "RivalOpened", "Bootstrapping", "Bootstrapping"),
            ],
            [],
        ),
        Story(
            "the second attempt is rejected",
            [
                opened(1, "D0"),
                step(
                    2,
                    "D0",
                    A,
                    "RequestOpened",
                    "Bootstrapping",
                    "Bootstrapping",
                    meant=incarnation(A_AGAIN),
                    actions=("RejectRequest",),
                ),
            ],
            [],
        ),
        Story(
            "the second attempt comes after the first, on another node, and in another process",
            [
                opened(1, "D0"),
                failed(2, "D0"),
                opened(3, "P0"),
                opened(3, "D0", A_AGAIN),
                stopped(4, "D0"),
                opened(5, "D0", (7, 2)),
            ],
            [],
        ),
    ],
    "L1": [
        Story(
            "one rank of two never ends",
            [admitted(0), opened(1, "P0"), opened(1, "D0"), failed(2, "P0"), end(101)],
            [("L1", 100.0, "D0", A), ("L2", 4.0, "D0", A)],
        ),
        Story(
            "a rank never hears of the request, and the client never hears anything",
            [admitted(0), opened(1, "P0"), succeeded(2, "P0"), end(100)],
            [("L1", 100.0, "D0", A)],
        ),
        Story(
            "a rank that never opened the room is excused by the answer, one that did is not",
            [
                admitted(0, prefill=("P0", "P1")),
                opened(1, "D0"),
                opened(2, "P0"),
                succeeded(3, "D0"),
                resulted(4, False),
                end(101),
            ],
            [("L1", 100.0, "P0", A)],
        ),
        Story(
            "an announcement that is forgotten is no end",
            [admitted(0, decode=()), announced(1, "P0", A), forgotten(2, "P0", A), end(101)],
            [("L1", 100.0, "P0", A)],
        ),
        Story(
            "both ranks end at the last moment",
            [
                admitted(0),
                opened(1, "P0"),
                opened(1, "D0"),
                succeeded(100, "P0"),
                succeeded(100, "D0"),
                end(101),
            ],
            [],
        ),
        Story("the trace ends before the deadline", [admitted(0), opened(1, "P0"), end(99)], []),
        Story(
            "rooms that are cleared or refused have ended too",
            [
                admitted(0),
                opened(1, "P0"),
                cleared(2, "P0", A, "Bootstrapping", "Absent"),
                step(2, "D0", A, "AbortRequested", "Absent", "Retired"),
                end(101),
            ],
            [],
        ),
        Story(
            "nothing is expected from ranks that are down or died meanwhile",
            [stopped(0, "P0"), admitted(1), opened(2, "D0"), stopped(3, "D0"), started(4, "D0"), end(102)],
            [],
        ),
        Story(
            "a rank that is back when the request comes is expected to end",
            [stopped(0, "P0"), started(1, "P0"), admitted(2, decode=()), end(103)],
            [("L1", 102.0, "P0", A)],
        ),
    ],
    "L2": [
        Story(
            "prefill fails and decode waits for its own timer (A02)",
            [opened(0, "P0"), opened(0, "D0"), failed(1, "P0"), failed(3.5, "D0")],
            [("L2", 3.0, "D0", A)],
        ),
        Story(
            "decode fails and both prefill ranks go on",
            [opened(0, "P0"), opened(0, "P1"), opened(0, "D0"), failed(1, "D0"), end(3)],
            [("L2", 3.0, "P0", A), ("L2", 3.0, "P1", A)],
        ),
        Story(
            "decode opens the room after the failure, and is not told",
            [opened(0, "P0"), failed(1, "P0"), opened(50, "D0"), end(53)],
            [("L2", 52.0, "D0", A)],
        ),
        Story(
            "the fault is over and still decode is not told",
            [
                opened(0, "P0"),
                opened(0, "D0"),
                severed(0.5, "D0"),
                failed(1, "P0"),
                end(4),
                restored(10),
                end(13),
            ],
            [("L2", 12.0, "D0", A)],
        ),
        Story(
            "a fault that cuts off somebody else is no excuse",
            [opened(0, "P0"), opened(0, "D0"), severed(0.5, "D01", "P1"), failed(1, "P0"), end(4)],
            [("L2", 3.0, "D0", A)],
        ),
        Story(
            "a fault that cuts off nobody is no excuse",
            [opened(0, "P0"), opened(0, "D0"), severed(0.5), failed(1, "P0"), end(4)],
            [("L2", 3.0, "D0", A)],
        ),
        Story(
            "the other side ends at the last moment, either way",
            [
                opened(0, "P0"),
                opened(0, "D0"),
                opened(0, "D1"),
                failed(1, "P0"),
                failed(3, "D0"),
                succeeded(3, "D1"),
                end(9),
            ],
            [],
        ),
        Story(
            "the other side is told once the link is back",
            [
                opened(0, "P0"),
                opened(0, "D0"),
                severed(0.5, "*"),
                failed(1, "P0"),
                end(4),
                restored(10),
                failed(12, "D0"),
                end(20),
            ],
            [],
        ),
        Story(
            "a short cut of the link starts the clock again",
            [
                opened(0, "P0"),
                opened(0, "D0"),
                failed(1, "P0"),
                severed(2, "P"),
                restored(2.5),
                failed(4, "D0"),
                end(20),
            ],
            [],
        ),
        Story(
            "a stopped rank owes nothing",
            [opened(0, "P0"), opened(0, "D0"), failed(1, "P0"), stopped(2, "D0"), end(20)],
            [],
        ),
        Story(
            "a dead rank can tell nobody that it had failed",
            [opened(0, "P0"), opened(0, "D0"), failed(1, "P0"), stopped(2, "P0"), opened(3, "D1"), end(20)],
            [],
        ),
        Story(
            "of two failed ranks one is left to tell",
            [
                opened(0, "P0"),
                opened(0, "P1"),
                opened(0, "D0"),
                failed(1, "P0"),
                failed(1, "P1"),
                stopped(2, "P0"),
                end(20),
            ],
            [("L2", 3.0, "D0", A)],
        ),
    ],
    "L4": [
        Story(
            "a request after the faults fails",
            [trace.Healed(0, "R"), admitted(1), resulted(2, False, "poisoned")],
            [("L4", 2, "R", A)],
        ),
        Story(
            "a request after the faults gets no answer in time",
            [trace.Healed(0, "R"), admitted(1), committed(2), resulted(32, True)],
            [("L4", 31.0, "R", A)],
        ),
        Story(
            "a request after the faults gets no answer at all",
            [trace.Healed(0, "R"), admitted(1), end(31)],
            [("L4", 31.0, "R", A)],
        ),
        Story(
            "a request after the faults succeeds at the last moment",
            [trace.Healed(0, "R"), admitted(1), committed(2), resulted(31, True), end(50)],
            [],
        ),
        Story(
            "requests of the hostile phase may fail, and the trace may end early",
            [admitted(0), trace.Healed(1, "R"), resulted(2, False, "fault"), admitted(3, B), end(32)],
            [],
        ),
    ],
    "L5": [
        Story("expired entries are left", [surveyed(1, overdue=2)], [("L5", 1, "D0", None)]),
        Story("nothing expired is left", [surveyed(1, overdue=0)], []),
    ],
    "L6": [
        Story(
            "a step waits for a hung peer (A19)", [trace.Stalled(1, "D0", 0.6, "P0")], [("L6", 1, "D0", None)]
        ),
        Story("a step waits as long as it may", [trace.Stalled(1, "D0", 0.5, "P0")], []),
    ],
    "L7": [
        Story(
            "decode gives up on a prefill that it has told nothing",
            [opened(0, "D0"), resolved(1, "D0", A), timed_out(9, "D0", A, "WaitingForInput", "waiting")],
            [("L7", 9, "D0", A)],
        ),
        Story(
            "prefill gives up on a decode that only waits for its own memory",
            [
                opened(0, "P0"),
                opened(0, "D0"),
                resolved(1, "D0", A),
                timed_out(9, "P0", A, "Bootstrapping", "bootstrap"),
            ],
            [("L7", 9, "P0", A)],
        ),
        Story(
            "decode gives up on a prefill that knows where to write",
            [
                opened(0, "D0"),
                resolved(1, "D0", A),
                addressed(2),
                timed_out(9, "D0", A, "WaitingForInput", "waiting"),
            ],
            [],
        ),
        Story(
            "prefill gives up on a decode that has told it where to write",
            [
                opened(0, "P0"),
                opened(0, "D0"),
                resolved(1, "D0", A),
                addressed(2),
                timed_out(9, "P0", A, "Bootstrapping", "bootstrap"),
            ],
            [],
        ),
        Story(
            "prefill gives up on a decode that has found nobody, that has ended, or that is dead",
            [
                opened(0, "D0"),
                timed_out(1, "P0", A, "Bootstrapping", "bootstrap"),
                opened(2, "D0", B),
                resolved(3, "D0", B),
                step(4, "D0", B, "PeerDied", "WaitingForInput", "Failed"),
                timed_out(5, "P0", B, "Bootstrapping", "bootstrap"),
                resolved(6, "D1", (9, 0)),
                stopped(7, "D1"),
                timed_out(8, "P0", (9, 0), "Bootstrapping", "bootstrap"),
            ],
            [],
        ),
        Story(
            "a timer that changes nothing accuses nobody, nor does one of another kind",
            [
                step(9, "D0", A, "DeadlineReached", "WaitingForInput", "WaitingForInput", detail="waiting"),
                timed_out(9, "D0", B, "Bootstrapping", "bootstrap"),
            ],
            [],
        ),
        Story(
            "what the last life of a decode rank published does not count for the next",
            [
                addressed(1),
                stopped(2, "D0"),
                opened(3, "D0"),
                timed_out(9, "D0", A, "Bootstrapping", "waiting"),
            ],
            [("L7", 9, "D0", A)],
        ),
    ],
    "R1": [
        Story(
            "a room is left in a table",
            [surveyed(1, tables=(("rooms", 1), ("kv", 0)))],
            [("R1", 1, "D0", None)],
        ),
        Story("nothing is left in any table", [surveyed(1, tables=(("rooms", 0), ("kv", 0)))], []),
    ],
    "R2": [
        Story(
            "orphans pile up (B49)",
            [announced(t, "P0", (t, 0)) for t in range(1, 5)],
            [("R2", 3, "P0", (3, 0))],
        ),
        Story(
            "an orphan stays too long, though a message moves it on",
            [announced(1, "P0", A), step(2, "P0", A, "PeerFailed", "Announced", "Failed"), end(12)],
            [("R2", 11.0, "P0", A)],
        ),
        Story(
            "orphans are opened, forgotten, or die with their node in time",
            [
                announced(1, "P0", A),
                announced(1, "P0", B),
                opened(2, "P0", before="Announced"),
                forgotten(11, "P0", B),
                announced(11, "P0", (9, 0)),
                stopped(12, "P0"),
                end(50),
            ],
            [],
        ),
        Story(
            "an owner comes, but the poll of the room that did without stays",
            [
                step(1, "P0", A, "DestinationRegistered", "Absent", "WaitingForInput"),
                step(2, "P0", A, "RequestOpened", "WaitingForInput", "WaitingForInput"),
                end(50),
            ],
            [],
        ),
        Story(
            "the owner of another attempt is none",
            [
                announced(1, "P0", A),
                step(2, "P0", A, "RequestOpened", "Announced", "Announced", meant=incarnation(A_AGAIN)),
                end(12),
            ],
            [("R2", 11.0, "P0", A)],
        ),
        Story(
            "a second announcement of a room has its own time",
            [announced(1, "P0", A), forgotten(9, "P0", A), announced(10, "P0", A), end(19)],
            [],
        ),
    ],
    "R3": [
        Story(
            "a node asks again and again (B43)",
            [repeated(t) for t in (1.0, 1.2, 1.4, 1.6, 1.8)],
            [("R3", 1.6, "D0", None)],
        ),
        Story(
            "as many repeats as allowed, in windows and nodes of their own",
            [repeated(t) for t in (1.1, 1.2, 1.3, 2.1, 2.2, 2.3)] + [repeated(2.3, "D1")],
            [],
        ),
        Story("first tries are no repeats", [repeated(1.0, repeat=0) for _ in range(9)], []),
    ],
    "O1": [
        Story(
            "an idle gauge is not zero",
            [surveyed(1, gauges=(("num_running", 2.0),))],
            [("O1", 1, "D0", None)],
        ),
        Story(
            "an idle gauge says zero while a request is in the queue",
            [queued(0, 1), surveyed(1, gauges=(("num_prealloc", 0.0),))],
            [("O1", 1, "D0", None)],
        ),
        Story("a request is in a queue without gauge", [queued(0, 1), surveyed(1)], [("O1", 1, "D0", None)]),
        Story(
            "all went that came",
            [queued(0, 1), queued(0, -1), surveyed(1, gauges=(("num_prealloc", 0.0),))],
            [],
        ),
        Story(
            "a queue of another node, or of another life",
            [
                queued(0, 1, "D1"),
                queued(0, 1),
                stopped(1, "D0"),
                surveyed(2, gauges=(("num_prealloc", 0.0),)),
            ],
            [],
        ),
    ],
    "O2": [
        Story(
            "a stuck engine says it is healthy",
            [trace.HealthReported(1, "D0", True, False)],
            [("O2", 1, "D0", None)],
        ),
        Story(
            "a stuck engine says so, a sound one says so too",
            [trace.HealthReported(1, "D0", False, False), trace.HealthReported(1, "D0", True, True)],
            [],
        ),
    ],
}

ALL = [
    pytest.param(ident, story, id=f"{ident}-{story.name}")
    for ident, them in STORIES.items()
    for story in them
]


@pytest.mark.parametrize(("ident", "story"), ALL)
def test_story(ident: str, story: Story) -> None:
    """The invariant alone says exactly what the story says of it: id, time, node and pair."""
    watch = judge(story.events, BOUNDS, only=[ident])
    assert found(watch) == [each for each in story.found if each[0] == ident]


@pytest.mark.parametrize(("ident", "story"), ALL)
def test_story_survives_the_file(ident: str, story: Story) -> None:
    """Read back from a recorded trace a story is judged as it was when it happened."""
    lines = "\n".join(['{"kvpoll_trace": 1}', *map(trace.encode, story.events)])
    _, events = trace.read_trace(io.StringIO(lines), "story")
    assert found(judge(events, BOUNDS)) == found(judge(story.events, BOUNDS))


def test_every_monitor_has_both_stories() -> None:
    """Nothing is trusted that was not seen to fail and to pass."""
    for ident, invariant in INVARIANTS.items():
        stories = STORIES.get(ident, [])
        verdicts = {any(each[0] == ident for each in story.found) for story in stories}
        assert verdicts == ({True, False} if invariant.monitor else set()), ident


# ---- the invariants as values ----


def test_all_ids_and_classes() -> None:
    """The catalogue, pinned: 24 ids, each in its class."""
    classes: dict[str, list[str]] = {}
    for ident, invariant in INVARIANTS.items():
        assert ident == invariant.id
        classes.setdefault(invariant.klass, []).append(ident)
    assert classes == {
        "safety": [f"S{number}" for number in range(1, 13)],
        "liveness": [f"L{number}" for number in range(1, 8)],
        "leak": ["R1", "R2", "R3"],
        "observability": ["O1", "O2"],
    }
    assert len(INVARIANTS) == 24


def test_values_are_complete() -> None:
    """Names are unique, sentences are sentences, monitors know their id, and only L3 has none."""
    assert len({invariant.name for invariant in INVARIANTS.values()}) == 24
    for invariant in INVARIANTS.values():
        assert invariant.sentence.endswith(".")
        assert (invariant.monitor is None) == (invariant.waits_for is not None) == (invariant.id == "L3")
        if invariant.monitor is not None:
            assert invariant.monitor.invariant == invariant.id
            assert (invariant.monitor.__doc__ or "").startswith(f"{invariant.id}. ")
    with pytest.raises(FrozenInstanceError):
        INVARIANTS["S1"].name = "other"  # type: ignore[misc]


def test_texts_name_what_was_seen() -> None:
    """A text alone tells an engineer where to look."""
    watch = judge([committed(1, [page(0), page(1, pair=B)])], BOUNDS)
    assert watch.first["S5"].text == (
        "page 1, component P0/tp1: expected room 7 (attempt 0), "
        "found page 1 of room 8 (attempt 0) from P0/tp1"
    )
    watch = judge(STORIES["S1"][0].events, BOUNDS)
    assert watch.first["S1"].text == (
        "kv page 12 went to room 8 (attempt 0) while write 1 of P0 for room 7 (attempt 0) was not settled"
    )
    watch = judge(STORIES["O1"][1].events, BOUNDS)
    assert watch.first["O1"].text == "on an idle node: num_prealloc says 0, counted 1"


# ---- the watch ----


def emitter(only: Iterable[str] | None = None) -> tuple[Stream, Watch, Callable[[Any], None]]:
    stream = Stream()
    return stream, Watch(stream, BOUNDS, only), stream.emit


def test_watch_subscribes_only_to_what_it_needs() -> None:
    """An event that no chosen monitor handles costs its producer one look."""
    stream, watch, _ = emitter(["S10"])
    wanted = {cls.__name__ for cls in trace.EVENTS.values() if stream.wants(cls)}
    assert wanted == {"IllegalFactRaised", "LoopStopped"}
    assert list(watch.monitors) == ["S10"]


def test_watch_of_everything_has_23_monitors() -> None:
    """L3 waits for a protocol that could break it."""
    _, watch, _ = emitter()
    assert list(watch.monitors) == [ident for ident in INVARIANTS if ident != "L3"]
    assert not emitter(["L3"])[1].monitors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s1", "'s1' is not an invariant; did you mean 'S1'?"),
        ("L77", "'L77' is not an invariant; did you mean 'L7'?"),
    ],
)
def test_wrong_id_is_told_with_the_nearest(name: str, message: str) -> None:
    """Bad input gives one clear line with the mend."""
    with pytest.raises(InvariantError) as caught:
        Watch(Stream(), BOUNDS, ["S2", name])
    assert str(caught.value) == message


def test_wrong_id_without_nearest_lists_all() -> None:
    """Where nothing is near, all are named."""
    with pytest.raises(InvariantError, match=r"'zzzz' is not an invariant; there are S1, S2, .*, O2$"):
        Watch(Stream(), BOUNDS, ["zzzz"])


def test_violations_are_emitted_once_each() -> None:
    """The first of each (invariant, pair, node) is kept and emitted; all are counted."""
    stream, watch, emit = emitter(["L6"])
    heard: list[Violated] = []
    stream.subscribe(Violated, heard.append)
    for t in range(3):
        emit(trace.Stalled(t, "D0", 9.0, "P0"))
    emit(trace.Stalled(3, "D1", 9.0, "P0"))
    assert found(watch) == [("L6", 0, "D0", None), ("L6", 3, "D1", None)]
    assert heard == watch.violations
    assert watch.counts == {"L6": 4}
    assert watch.first == {"L6": heard[0]}
    assert heard[0].text == "one step waited 9 s for P0 (at most 0.5 s)"


def test_violations_are_capped_for_each_invariant() -> None:
    """A flood of one invariant neither fills the memory nor hides another."""
    _, watch, emit = emitter(["L6", "L5"])
    for number in range(RECORDED + 5):
        emit(trace.Stalled(number, f"D{number}", 9.0, "P0"))
    emit(surveyed(9999, overdue=1))
    assert watch.counts == {"L6": RECORDED + 5, "L5": 1}
    assert len(watch.violations) == RECORDED + 1
    assert watch.violations[-1].invariant == "L5"


def test_deadlines_of_several_monitors_are_told_in_order_of_time() -> None:
    """One long silence, four old debts: they are recorded as they fell due."""
    events = [
        admitted(0),
        opened(0, "P0"),
        opened(0, "D0"),
        trace.Healed(1, "R"),
        admitted(1, B, (), ()),
        failed(60, "P0"),
        announced(61, "P0", (9, 0)),
        end(500),
    ]
    assert found(judge(events, BOUNDS)) == [
        ("L4", 31.0, "R", B),
        ("L2", 62.0, "D0", A),
        ("R2", 71.0, "P0", (9, 0)),
        ("L1", 100.0, "D0", A),
    ]


def test_advance_judges_only_what_time_has_passed() -> None:
    """A deadline may be met exactly on time; it is told once time is past it, and only once."""
    _, watch, emit = emitter(["L1"])
    emit(admitted(0))
    emit(admitted(5, B))
    watch.advance(100.0)
    assert found(watch) == []
    assert watch.monitors["L1"].due == 100.0
    watch.advance(100.5)
    assert found(watch) == [("L1", 100.0, "P0", A), ("L1", 100.0, "D0", A)]
    assert watch.monitors["L1"].due == 105.0
    watch.advance(101.0)
    watch.finish(105.0)
    watch.finish(105.0)
    assert watch.counts == {"L1": 4}
    assert watch.monitors["L1"].due == float("inf")


def test_monitor_without_bound_is_never_due() -> None:
    """Time alone changes nothing for a monitor that has no bound."""
    _, watch, _ = emitter(["S2"])
    watch.advance(1e9)
    watch.monitors["S2"].advance(1e9)
    watch.finish(1e9)
    assert watch.monitors["S2"].due == float("inf")
    assert watch.counts == {}


def test_judge_of_nothing_finds_nothing() -> None:
    """An empty trace holds."""
    assert judge([], BOUNDS).violations == []


def test_judge_reads_a_trace_that_already_names_violations() -> None:
    """What another judge wrote into the trace is no evidence."""
    assert judge([Violated(1, "D0", "L5", None, "old"), surveyed(2)], BOUNDS).violations == []


def test_misspelt_handler_is_refused() -> None:
    """A handler that names no event would silently never run."""
    with pytest.raises(TypeError, match=r"Wrong.on_steped handles no event; did you mean 'on_stepped'\?"):

        class Wrong(Monitor):
            def on_steped(self, event: trace.Stepped) -> None:
                """Never runs."""


# ---- memory ----


def test_debts_are_forgotten_once_told() -> None:
    """What was told at its deadline is neither kept nor told again when a fault ends."""
    events = [
        opened(0, "P0"),
        opened(0, "D0"),
        admitted(0, prefill=("P0",), decode=("D0",)),
        failed(1, "P0"),
        end(4),
        severed(5, "*"),
        restored(6),
        end(500),
    ]
    watch = judge(events, BOUNDS, ["L1", "L2"])
    assert watch.counts == {"L1": 1, "L2": 1}
    assert vars(watch.monitors["L1"])["_endings"] == {}
    assert vars(watch.monitors["L2"])["_owed"] == {}


def test_recent_forgets_its_oldest() -> None:
    """Bounded memory: the oldest entry goes first."""
    recent: Recent[int, str] = Recent(2)
    for number in (1, 2, 3):
        recent.remember(number, "x")
    assert list(recent) == [2, 3]


def test_s4_forgets_after_enough_others() -> None:
    """The memory of cleared rooms is bounded, and that is its limit."""

    def cleared_then_late(others: int) -> dict[str, int]:
        events = [step(0, "P0", (room, 0), "Cleared", "Failed", "Retired") for room in range(others + 1)]
        return judge([*events, opened(1, "P0", (0, 0), "Retired")], BOUNDS, ["S4"]).counts

    assert cleared_then_late(REMEMBERED - 1) == {"S4": 1}
    assert cleared_then_late(REMEMBERED) == {}


def test_s7_compares_within_its_window() -> None:
    """A rank that lags further than the window is not judged, one that lags less is."""

    def lag(decisions: int) -> dict[str, int]:
        events: list[Any] = [decided(0, "P0/pp0", str(number)) for number in range(decisions)]
        events += [entered(0, "D0/tp0", number) for number in range(decisions)]
        events += [decided(1, "P0/pp1", "other"), entered(1, "D0/tp1", 0, "other")]
        return judge(events, BOUNDS, ["S7"]).counts

    assert lag(AGREEMENT_WINDOW) == {"S7": 2}
    assert lag(AGREEMENT_WINDOW + 1) == {}


def request(number: int) -> list[Any]:
    """A whole request that keeps every rule, from admission to empty tables."""
    t, pair = float(number), (number, 0)
    own, one = incarnation(pair), (number % 50,)
    return [
        admitted(t, pair),
        opened(t, "P0", pair),
        opened(t, "D0", pair),
        reserved(t, "D0", pair, *one),
        reserved(t, "D0", pair, *one, pool="aux"),
        step(t, "D0", pair, "PeerResolved", "Bootstrapping", "WaitingForInput"),
        trace.Addressed(t, "D0", own, "P0", 0, 0),
        step(t, "P0", pair, "DestinationRegistered", "Bootstrapping", "WaitingForInput"),
        reserved(t, "P0", pair, *one),
        trace.Computed(t, "P0", own, 0),
        posted(t, number, pair, source=one, target=one, row=one[0]),
        landed(t, number, pair, *one),
        settled(t, number),
        step(t, "P0", pair, "WriteCompleted", "WaitingForInput", "Success"),
        step(t, "D0", pair, "WriteCompleted", "WaitingForInput", "Success"),
        trace.Committed(t, "D0", own, ("P0",), ({"P0": PageTag(pair, "P0", 0, 0)},), pair),
        released(t, "P0", pair, *one, free=50),
        step(t, "P0", pair, "Cleared", "Success", "Absent"),
        resulted(t, True, pair=pair),
        released(t, "D0", pair, *one, free=50),
        released(t, "D0", pair, *one, free=50, pool="aux"),
        step(t, "D0", pair, "Cleared", "Success", "Absent"),
    ]


def test_state_is_dropped_when_requests_are_over() -> None:
    """After a thousand good requests no monitor holds more than its stated memory of the past."""
    watch = judge([event for number in range(1000) for event in request(number)], BOUNDS)
    assert watch.violations == []
    remembered = {
        ("S4", "_cleared"),  # what S4 is for
        ("S11", "_computed"),  # late writes are not early ones
    }
    for ident, monitor in watch.monitors.items():
        for name, state in vars(monitor).items():
            if name in ("bounds", "_totals") or not hasattr(state, "__len__"):
                continue
            if (ident, name) in remembered:
                continue
            live = list(state.values()) if isinstance(state, dict) else list(state)
            held = sum(len(inner) if isinstance(inner, dict) else 1 for inner in live)
            limit = int(BOUNDS.end_s) + 1 if name == "_deadlines" else 0
            assert held <= limit, (ident, name, held)
