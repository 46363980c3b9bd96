"""What happened, one event at a time: the format that explorer, simulator, runtime and validator share.

A trace is JSON lines. The first line is a header object (``{"kvpoll_trace": 1, ...}``: spec, scenario and
profile identity, seed, topology); each later line is one event, ``{"t": seconds, "event": "Stepped", ...}``.
Times are seconds since the start of the trace. Nodes are named by what they are: ``R`` the router, ``B0`` the
bootstrap server of prefill engine 0, ``P0/dp1/pp0/tp1`` a prefill rank, ``D0/dp0/tp1`` a decode rank
(dimensions of size one are left out, so a lone rank is ``P0``).

Invariants (``spec/invariants/``) read these events and nothing else, which is why one set of them can judge a
simulation, an exhaustive search and a production log alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Final, NamedTuple

from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Incarnation

Pair = tuple[int, int]
"""(room, attempt): what both sides of one request have in common."""


class Admitted(NamedTuple):
    """The router accepted a request and dispatched it to these ranks (node names), which must all finish it."""

    t: float
    node: str
    rid: str
    pair: Pair
    prefill: tuple[str, ...]
    decode: tuple[str, ...]


class Stepped(NamedTuple):
    """A room machine took a step that changed something or ordered something.

    role: "sender" (prefill) or "receiver" (decode). incarnation: the room's own, before the step (after it, if
    the step opened the room). fact_incarnation: the one the fact was meant for; they differ when the fact is
    stale. poll/lease: machine states by name; cause: first failure cause once Failed, else None.
    """

    t: float
    node: str
    role: str
    incarnation: Incarnation
    fact: str
    fact_incarnation: Incarnation
    detail: Any
    poll_before: str
    poll_after: str
    lease_before: str
    lease_after: str
    cause: str | None
    actions: tuple[str, ...]


class IllegalFactRaised(NamedTuple):
    """A machine was offered a fact that its table declares illegal in that state; nothing moved."""

    t: float
    node: str
    role: str
    incarnation: Incarnation
    fact: str
    state: str


class LoopStopped(NamedTuple):
    """A scheduler or listener loop ended although its process lives (``cause`` says what stopped it)."""

    t: float
    node: str
    loop: str
    cause: str


class Sent(NamedTuple):
    """A control message left ``node`` for ``to``. ``serial`` pairs it with its Delivered or Lost."""

    t: float
    node: str
    to: str
    message: str
    incarnation: Incarnation
    serial: int


class Delivered(NamedTuple):
    """A control message arrived at ``node`` from ``sender``."""

    t: float
    node: str
    sender: str
    message: str
    incarnation: Incarnation
    serial: int


class Lost(NamedTuple):
    """A control message meant for ``node`` was lost (disconnect, crash, partition)."""

    t: float
    node: str
    sender: str
    message: str
    incarnation: Incarnation
    serial: int


class Requested(NamedTuple):
    """``node`` sent an HTTP request to ``server``. ``repeat`` counts earlier tries for the same purpose."""

    t: float
    node: str
    server: str
    route: str
    repeat: int


class Answered(NamedTuple):
    """The HTTP request of ``node`` ended: status code, or "refused", or "timeout"."""

    t: float
    node: str
    server: str
    route: str
    status: int | str


class Reserved(NamedTuple):
    """Pages of ``pool`` ("kv" or "aux") on ``node`` were handed to an incarnation."""

    t: float
    node: str
    pool: str
    incarnation: Incarnation
    pages: tuple[int, ...]


class Released(NamedTuple):
    """Pages went back to the free list of ``pool`` on ``node``; ``free`` is the pool's own count after it."""

    t: float
    node: str
    pool: str
    incarnation: Incarnation
    pages: tuple[int, ...]
    free: int


class Computed(NamedTuple):
    """The forward pass that fills ``chunk`` of the incarnation's KV on prefill rank ``node`` has finished."""

    t: float
    node: str
    incarnation: Incarnation
    chunk: int


class WritePosted(NamedTuple):
    """A one-sided write was posted: from ``source_pages`` of ``node`` to ``target_pages`` of ``target``.

    incarnation: the *decode-side* incarnation whose pages were addressed. ``row`` is the aux row that the write
    also fills, or None. From here until WriteSettled bytes may be read at the source and placed at the target.
    """

    t: float
    node: str
    write: int
    incarnation: Incarnation
    target: str
    chunk: int
    last: bool
    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]
    row: int | None


class WriteLanded(NamedTuple):
    """Bytes of a write reached these pages of ``node`` (all of them, or a part of a partial write)."""

    t: float
    node: str
    write: int
    incarnation: Incarnation
    pages: tuple[int, ...]


class WriteSettled(NamedTuple):
    """No byte of this write will be read or placed any more. ``ok``: everything was placed."""

    t: float
    node: str
    write: int
    ok: bool


class Fenced(NamedTuple):
    """``node`` places what arrives itself, and refuses from now on what comes for its incarnation: no byte of a write
    to it will be placed any more, whether that write has settled or not.
    """

    t: float
    node: str
    incarnation: Incarnation


class Addressed(NamedTuple):
    """Decode rank ``node`` published its pages to prefill rank ``peer``.

    peer_epoch: process epoch of the peer as the decode rank knew it; current_epoch: as it really was.
    """

    t: float
    node: str
    incarnation: Incarnation
    peer: str
    peer_epoch: int
    current_epoch: int


class PageTag(NamedTuple):
    """What a page holds, as data: who wrote it, for whom, and which page of the prompt it is (``part``)."""

    pair: Pair
    source: str
    part: int
    chunk: int


class Committed(NamedTuple):
    """Decode rank ``node`` started decoding from its pages.

    components: the prefill ranks that each had to fill their share of every page.
    contents: for each page, in prompt order, a mapping component -> PageTag of what really is there.
    row_pair: the owner id found in the aux row.
    """

    t: float
    node: str
    incarnation: Incarnation
    components: tuple[str, ...]
    contents: tuple[dict[str, PageTag], ...]
    row_pair: Pair | None


class CollectiveEntered(NamedTuple):
    """Rank ``node`` entered its ``sequence``-th collective of ``group``; all ranks must agree on kind and shape."""

    t: float
    node: str
    group: str
    sequence: int
    kind: str
    shape: Any


class Decided(NamedTuple):
    """Rank ``node`` applied a decision of its agreement group about a request: "admit" or "drop"."""

    t: float
    node: str
    group: str
    rid: str
    outcome: str


class Queued(NamedTuple):
    """A request entered (``delta`` = 1) or left (-1) a scheduler queue; queue names are SGLang's metric names."""

    t: float
    node: str
    queue: str
    rid: str
    delta: int


class Stalled(NamedTuple):
    """A scheduler step of ``node`` waited ``blocked_s`` seconds for a peer (``on`` says for what)."""

    t: float
    node: str
    blocked_s: float
    on: str


class Resulted(NamedTuple):
    """The client got its answer. cause: what it was told when not ok. ttft_s: seconds to the first token."""

    t: float
    node: str
    rid: str
    pair: Pair
    ok: bool
    cause: str | None
    ttft_s: float | None


class FaultBegan(NamedTuple):
    """An injected fault took effect on ``node``. ``severs`` names node prefixes that it cuts off meanwhile."""

    t: float
    node: str
    fault: str
    kind: str
    severs: tuple[str, ...]


class FaultEnded(NamedTuple):
    """An injected fault stopped acting."""

    t: float
    node: str
    fault: str
    kind: str


class Marked(NamedTuple):
    """Something that a scenario wants to have witnessed (a `sometimes` mark)."""

    t: float
    node: str
    mark: str


class NodeStopped(NamedTuple):
    """A process died; nothing is expected from it any more."""

    t: float
    node: str
    epoch: int


class NodeStarted(NamedTuple):
    """A process began a life; ``epoch`` counts its lives from 0."""

    t: float
    node: str
    epoch: int


class HealthReported(NamedTuple):
    """What the health endpoint of an engine says, and whether a request could in fact finish on it."""

    t: float
    node: str
    healthy: bool
    able: bool


class Healed(NamedTuple):
    """The hostile phase is over: faults have stopped, restarts are done. Liveness must now come true."""

    t: float
    node: str


class Surveyed(NamedTuple):
    """The state of an idle node at the end of the healed phase.

    tables: (name, entries) of every per-room table, queue, pool in use. gauges: (metric name, reported value).
    overdue: entries whose expiry time has passed although nobody removed them.
    """

    t: float
    node: str
    tables: tuple[tuple[str, int], ...]
    gauges: tuple[tuple[str, float], ...]
    overdue: int


class Violated(NamedTuple):
    """An invariant does not hold: ``invariant`` is its id, ``text`` says what was seen."""

    t: float
    node: str
    invariant: str
    pair: Pair | None
    text: str


Event = NamedTuple
EVENTS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Admitted, Stepped, IllegalFactRaised, LoopStopped, Sent, Delivered, Lost, Requested, Answered, Reserved,
        Released, Computed, WritePosted, WriteLanded, WriteSettled, Fenced, Addressed, Committed, CollectiveEntered,
        Decided, Queued, Stalled, Resulted, FaultBegan, FaultEnded, Marked, NodeStopped, NodeStarted,
        HealthReported, Healed, Surveyed, Violated,
    )
}  # fmt: skip


new_event: Final[Any] = tuple.__new__
"""``new_event(Stepped, (t, node, ...))``: an event without the cost of argument names, for the busiest producers."""


class Stream:
    """Hands each event to those who asked for its type: invariant monitors, gauges, a recorder.

    An event type that nobody asked for costs its producer one look (``wants``), so a run that is not recorded
    does not pay for its trace.
    """

    def __init__(self) -> None:
        self.observers: dict[type[Any], list[Callable[[Any], None]]] = {cls: [] for cls in EVENTS.values()}
        self.recording = False

    def subscribe(self, event_type: type[Any], observer: Callable[[Any], None]) -> None:
        """Call ``observer`` with every later event of this type, in order of subscription."""
        self.observers[event_type].append(observer)

    def subscribe_all(self, observer: Callable[[Any], None]) -> None:
        """Call ``observer`` with every later event of any type, before the observers of that type."""
        self.recording = True
        for observers in self.observers.values():
            observers.insert(0, observer)

    def wants(self, event_type: type[Any]) -> bool:
        """Is anybody listening for this type?"""
        return bool(self.observers[event_type])

    def emit(self, event: Any) -> None:
        """Deliver one event."""
        for observer in self.observers[type(event)]:
            observer(event)


class TraceError(BadInput):
    """A trace cannot be read; the message names the file, the line and the mend."""


def encode(event: Any) -> str:
    """One event as one JSON line (no newline). Tuples become lists; ``decode`` turns them back."""
    return json.dumps({"t": event.t, "event": type(event).__name__, **_plain_fields(event)}, separators=(",", ":"))


def _plain_fields(event: Any) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event._fields if name != "t"}


def decode(line: str, where: str = "trace") -> Any:
    """The event that one JSON line holds. Raises TraceError naming ``where`` when it is not one."""
    try:
        fields = json.loads(line)
        event_type = EVENTS[fields.pop("event")]
    except (json.JSONDecodeError, AttributeError) as error:
        raise TraceError(f"{where}: not a JSON object ({error}); the line may be cut off") from None
    except KeyError as error:
        raise TraceError(f"{where}: {error} is not an event of the kvpoll trace format") from None
    unknown = fields.keys() ^ set(event_type._fields)
    if unknown:
        raise TraceError(f"{where}: {event_type.__name__} lacks or does not have the field {sorted(unknown)[0]!r}")
    return event_type(**{name: _restore(name, value) for name, value in fields.items()})


def _restore(name: str, value: Any) -> Any:
    if name in ("incarnation", "fact_incarnation"):
        return Incarnation(*value)
    if name == "contents":
        return tuple({source: PageTag(tuple(tag[0]), *tag[1:]) for source, tag in page.items()} for page in value)
    return _tuples(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read_header(line: str, where: str = "trace") -> dict[str, Any]:
    """The header object of a trace. Raises TraceError when the line is not one."""
    try:
        header = json.loads(line)
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.get("kvpoll_trace") != 1:
        raise TraceError(f'{where}: a kvpoll trace starts with a header line {{"kvpoll_trace": 1, ...}}')
    return header


def read_trace(file: IO[str], name: str) -> tuple[dict[str, Any], Iterator[Any]]:
    """Header and events of an open trace file, streaming. Errors name ``name`` and the line."""
    header = read_header(file.readline(), f"{name}:1")
    return header, _events(file, name)


def _events(lines: Iterable[str], name: str) -> Iterator[Any]:
    last = float("-inf")
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        event = decode(line, f"{name}:{number}")
        if event.t < last:
            raise TraceError(f"{name}:{number}: time {event.t} is before {last}; a trace is in order of time")
        last = event.t
        yield event
