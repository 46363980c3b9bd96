"""What the judge knows of one room of an instrumented SGLang, and which facts may lead to its next table value.

The status table says what a room's poll became, not why. The *ways* to a value are the facts that SGLang's code
would have had to see (PROTOCOL 4.1 and 4.2), each offered only where the trace holds its evidence: a message that
was received, a method that was called, the thread that wrote. Where a recorder does not see a kind of evidence (so
far it has shown none of that kind for the node), it is taken on trust; if it turns up afterwards, it came too late.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from kvpoll.spec.sglang_trace import Put
from kvpoll.spec.vocabulary import TERMINAL_POLLS, Incarnation
from kvpoll.statemachine.machine import Local, Room

UNKNOWN: Final = 64
"""Responses that a decode rank waits for, as long as the trace has not shown how many it needed."""

REPORTS_MAX: Final = 4096
"""Reports of one room that are kept until the table shows what came of them."""


class Offer(NamedTuple):
    """A fact to be offered: kind, detail, and whom it was meant for (None: the room itself)."""

    kind: str
    detail: Any = None
    meant_for: Incarnation | None = None


class Pending(NamedTuple):
    """A message that was received; what came of it shows in the table when its thread has gone on."""

    thread: str
    offer: Offer


class Entry:
    """One room on one node: the machine's room, what the table shows of it, and evidence not used yet.

    shown: the table's value; line: where it was put. chunks: handed over and not yet written. last: the last chunk
    is among those handed over. concluded: outcome of the transfer that a worker has announced. reports: (prefill
    rank, outcome) applied since the last put. frames: status messages heard and not applied. failure: the recorded
    reason. trusted: kinds of evidence that this room was believed without. attempt of the room:
    ``room.incarnation.attempt``.
    """

    __slots__ = (
        "ack_frames", "chunks", "concluded", "failure", "frames", "last", "line", "pending", "reports", "room", "shown",
        "trusted",
    )  # fmt: skip

    def __init__(self, room: Room) -> None:
        self.room = room
        self.shown: str | None = None
        self.line = 0
        self.pending: Pending | None = None
        self.chunks = 0
        self.last = False
        self.concluded: str | None = None
        self.reports: list[tuple[int, str, Incarnation]] = []
        self.frames: list[tuple[int, str | None]] = []
        self.ack_frames: set[int | None] = set()
        self.failure: str | None = None
        self.trusted: set[str] = set()

    def used(self) -> None:
        """A put has shown what the evidence led to."""
        self.concluded = self.failure = None
        self.reports.clear()


class Node:
    """One rank: its entries, and which kinds of evidence its recorder can see."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.role = "sender" if name[0] == "P" else "receiver"
        self.entries: dict[int, Entry] = {}
        self.hears = False
        self.calls = False
        self.schedulers: set[str] = set()
        self.loses: str | None = None


class Pairing:
    """What both sides of one room number have shown each other.

    attempt: of the latest opening on a decode rank (None: no decode rank of the trace has opened it). senders: who
    has published pages for that attempt, in order; an entry's index is its bit. published: decode node -> sender.
    ended: (attempt, outcome) -> prefill ranks that have told decode so. held: prefill ranks that ever held the room.
    acks: prefill rank -> acknowledgements that the machine has ordered and the trace has not shown. sent: those shown.
    recorded: prefill rank -> attempt of its first failure on record. SGLang keys that record by the room number and
    keeps it when the room is cleared, so it may fail a later attempt (PROTOCOL 3.2).
    """

    __slots__ = ("acks", "attempt", "ended", "held", "opened", "published", "recorded", "senders", "sent")

    def __init__(self) -> None:
        self.attempt: int | None = None
        self.opened: dict[str, int] = {}
        self.senders: list[str] = []
        self.published: dict[str, str] = {}
        self.ended: dict[tuple[int, str], set[str]] = {}
        self.held: set[str] = set()
        self.acks: dict[str, int] = {}
        self.sent = 0
        self.recorded: dict[str, int] = {}

    def open(self, node: Node, at_least: int) -> int:
        """Another opening of the room on a node: its attempt, counted from 0, ``at_least`` that of who holds it."""
        attempt = self.opened[node.name] = max(self.opened.get(node.name, -1) + 1, at_least)
        if node.role == "receiver" and attempt != self.attempt:
            self.attempt = attempt
            self.senders, self.published = [], {}
        return attempt

    def bit_of(self, sender: str) -> int:
        """The index of who published pages, in order of first appearance."""
        if sender not in self.senders:
            self.senders.append(sender)
        return self.senders.index(sender)

    def has_published(self, node: str) -> bool:
        """May this decode rank have published its pages? Binds it to a sender that no other rank has claimed."""
        if node in self.published:
            return True
        free = [sender for sender in self.senders if sender not in self.published.values()]
        if free:
            self.published[node] = free[0]
        return bool(free)


class Pairings(OrderedDict[int, Pairing]):
    """Pairings by room number; the oldest are forgotten."""

    LIMIT: Final = 16_384

    def of(self, room: int) -> Pairing:
        """The pairing of a room number, made when it is new."""
        pairing = self.get(room)
        if pairing is None:
            if len(self) >= self.LIMIT:
                self.popitem(last=False)
            pairing = self[room] = Pairing()
        return pairing


def fits(local: Local, shown: str | None) -> bool:
    """May the table show this for a room in that state?

    An entry is gone when the machine knows nothing, has only heard of the room, or was told that its owner is done
    with it and waits for its memory. Mooncake never stores Transferring (PROTOCOL 2), so it is optional.
    """
    if shown is None:
        return local.poll in ("Absent", "Announced") or (local.cleared and local.poll != "Retired")
    if shown == "WaitingForInput" and local.poll == "Transferring":
        return True
    return local.poll == shown and not local.cleared


def sender_ways(node: Node, entry: Entry, put: Put, own: Incarnation, recorded: int | None) -> Iterator[list[Offer]]:
    """The facts that may lead a prefill rank's room to the value that was put, those of pending messages left out.

    recorded: the attempt whose failure is on record for the room number, if there is one.
    """
    local, before, after = entry.room.local, put.before, put.after
    by_scheduler = not node.schedulers or put.thread in node.schedulers or before is None
    if before is None and after is None:
        return  # what is not there cannot be taken away
    if after is None:
        yield from _ends(entry, before)
    elif before is None and after == "Bootstrapping":
        yield [Offer("RequestOpened", 1, own)]
    elif before is None and after == "WaitingForInput":
        if entry.pending is not None:
            yield []
        elif put.thread in node.schedulers or not node.schedulers:
            yield [Offer("RequestOpened", 0, own)]
        elif not node.hears:
            yield [Offer("DestinationRegistered", (0, 1), own)]
    elif after == before and after != "Transferring":
        if not local.owned and after != "Bootstrapping":
            yield [Offer("RequestOpened", 1, entry.room.incarnation)]
        yield []
    elif after == "WaitingForInput" and before == "Bootstrapping":
        yield [] if node.hears else [Offer("DestinationRegistered", (0, 1))]
    elif after == "Transferring" and before in ("WaitingForInput", "Transferring"):
        if entry.chunks or not node.calls:
            yield _writes(entry, 1)
        elif after == before:
            yield []
    elif after == "Success":
        yield from _successes(node, entry)
    elif after == "Failed":
        yield from _sender_failures(entry, by_scheduler, recorded)


def _ends(entry: Entry, before: str | None) -> Iterator[list[Offer]]:
    """The owner clears the room; one that had not ended is given up with it."""
    if before in TERMINAL_POLLS:
        yield [Offer("Cleared")]
    else:
        yield [Offer("AbortRequested", entry.failure or "cleared"), Offer("Cleared")]


def _writes(entry: Entry, number: int) -> list[Offer]:
    """The next chunks are handed to the transport; the last of all carries the aux row."""
    reserved = [Offer("PagesReserved")] if entry.room.local.lease == "Unreserved" else []
    are_last = entry.last and number >= entry.chunks
    return [
        *reserved,
        *(Offer("WritePosted", False) for _ in range(number - 1)),
        Offer("WritePosted", are_last),
    ]


def _successes(node: Node, entry: Entry) -> Iterator[list[Offer]]:
    """Every chunk is written, the last one too, and a worker has said so; a dummy rank has nothing to write."""
    local = entry.room.local
    if local.expected == 0 and local.owned:
        yield [Offer("PagesReserved"), Offer("WritePosted", True), Offer("WriteCompleted")]
        return
    if entry.concluded != "Success" and node.calls:
        return
    open_writes, posts = local.outstanding, list[Offer]()
    if entry.chunks:
        posts = _writes(entry, entry.chunks)
    elif not node.calls and not local.last:
        posts = [*_writes(entry, 1)[:-1], Offer("WritePosted", True)]
    open_writes += sum(offer.kind == "WritePosted" for offer in posts)
    yield [*posts, *(Offer("WriteCompleted") for _ in range(open_writes))]


def _sender_failures(entry: Entry, by_scheduler: bool, recorded: int | None) -> Iterator[list[Offer]]:
    if entry.pending is not None and entry.pending.offer.kind == "PeerAborted":
        yield []
    if entry.concluded == "Failed" or (entry.concluded is not None and recorded is not None):
        posts = _writes(entry, max(entry.chunks, 1)) if entry.shown == "WaitingForInput" or entry.chunks else []
        whose = None
        if entry.concluded != "Failed" and recorded is not None:
            whose = entry.room.incarnation._replace(attempt=recorded)
        yield [*posts, Offer("WriteFailed", None, whose)]
    if by_scheduler:
        reason = entry.failure or "given_up"
        if _says(reason, "timed out", "timeout"):
            yield [Offer("DeadlineReached", "bootstrap")]
        if _says(reason, "conflict"):
            yield [Offer("DpConflictFound", reason)]
        yield [Offer("AbortRequested", reason)]


def receiver_ways(node: Node, entry: Entry, put: Put, own: Incarnation, published: bool) -> Iterator[list[Offer]]:
    """The facts that may lead a decode rank's room to the value that was put."""
    before, after, local = put.before, put.after, entry.room.local
    publish = published and local.poll == "WaitingForInput" and local.lease in ("Unreserved", "Reserved")
    first = [Offer("PagesReserved"), Offer("MetadataSent")] if publish else []
    if before is None and after is None:
        return
    if after is None:
        yield from ([*first, *way] for way in _ends(entry, before))
    elif before is None and after == "Bootstrapping":
        yield [Offer("RequestOpened", None, own)]
    elif after == before:
        yield []
    elif after == "WaitingForInput" and before == "Bootstrapping":
        yield [Offer("RoutesResolved", (1, UNKNOWN)), Offer("SetupFinished")]
    elif after == "WaitingForInput" and before == "Failed":
        yield [Offer("SetupFinished")]
    elif after == "Success":
        good = [report for report in entry.reports if report[1] == "Success"]
        if good:
            yield [*first, *(Offer("StatusReceived", report[:2], report[2]) for report in good)]
    elif after == "Failed":
        yield from ([*first, *way] for way in _receiver_failures(node, entry, put))


def _receiver_failures(node: Node, entry: Entry, put: Put) -> Iterator[list[Offer]]:
    bad = [report for report in entry.reports if report[1] == "Failed"]
    if bad:
        yield [Offer("StatusReceived", bad[0][:2], bad[0][2])]
    if node.loses == put.thread:
        yield [Offer("PeerSuspected")]
    if node.schedulers and put.thread not in node.schedulers:
        return
    reason = entry.failure or "given_up"
    if _says(reason, "timed out", "timeout"):
        yield [Offer("DeadlineReached", "waiting")]
    if put.before == "Bootstrapping" and not _says(reason, "abort"):
        yield [Offer("RouteUnavailable", reason)]
    yield [Offer("AbortRequested", reason)]


def _says(reason: str, *words: str) -> bool:
    return any(word in reason.lower() for word in words)
