"""What must hold, judged from a trace: one value and one monitor for each invariant.

The ids are those of the catalogue of known races: S safety, L liveness, R leak, O observability. A *monitor*
folds trace events (``spec/trace.py``) into a small state of its own and reports a ``Violated`` event where
its invariant breaks. It reads events and nothing else, so the same monitors judge a simulation while it runs,
an exhaustive search, and a production log line by line.

``Watch`` is the way in: it subscribes the monitors to a stream and collects what they report.

What this file will not do: it never looks into a machine, never changes what it watches, and never judges
what the trace does not say. Two habits keep the monitors cheap: a step that changes no poll returns at once,
and an ordinary page is only ever touched by set and dictionary operations. Memory is bounded by what is live
plus ``REMEMBERED`` entries of history for each monitor (and node) that must recognise late mail.

Throughout, a *pair* is (room, attempt): what both sides of a request have in common.
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from operator import eq
from typing import Any, ClassVar, Final, Generic, Literal, NamedTuple, TypeVar

from kvpoll.spec import trace
from kvpoll.spec.trace import EVENTS, PageTag, Pair, Stream, Violated
from kvpoll.spec.vocabulary import POLL_NUMBERS, TERMINAL_POLLS

LIVE_POLLS: Final[frozenset[str]] = frozenset(POLL_NUMBERS) - TERMINAL_POLLS
"""The numbered polls from which a room still has to come to an end."""

GONE: Final[frozenset[str]] = frozenset({"Absent", "Retired"})
"""Room states in which a node holds nothing that could act for the room."""

OPENING: Final = "RequestOpened"
"""The one fact by which an owner takes a room; every other fact finds a room or leaves it without owner."""

RIVALRY: Final = "RivalOpened"
"""Another request asked for a room that is taken; unless the step orders ``REJECTION`` it gets the room."""

REJECTION: Final = "RejectRequest"

REMEMBERED: Final = 16_384
"""How many past requests a monitor remembers where it must recognise something that comes late."""

AGREEMENT_WINDOW: Final = 4_096
"""How far (in collectives or decisions) one rank may lag behind its group and still be compared."""

RECORDED: Final = 1_000
"""How many violations of one invariant a Watch keeps; it counts the rest."""

Klass = Literal["safety", "liveness", "leak", "observability"]


class Bounds(NamedTuple):
    """The bounds that the invariants name, chosen by the caller.

    end_s: every admitted request has ended on every rank (L1). propagate_s: a failure has reached the other
    side (L2). recover_s: a request admitted after the faults has succeeded (L4). step_s: longest wait of one
    scheduler step (L6). repeats_per_s: repeated HTTP requests of one node in any second (R3). ownerless_s,
    ownerless_rooms: how long, and how many at once, rooms may exist that nobody opened (R2).
    """

    end_s: float
    propagate_s: float
    recover_s: float
    step_s: float
    repeats_per_s: float
    ownerless_s: float
    ownerless_rooms: int


class InvariantError(ValueError):
    """An invariant was asked for that does not exist; the message names the nearest one that does."""


# ----------------------------------------------------------------------------------------------------
# What all monitors share
# ----------------------------------------------------------------------------------------------------


def _handler_name(event_name: str) -> str:
    return "on_" + re.sub(r"(?<!^)(?=[A-Z])", "_", event_name).lower()


_EVENT_OF_HANDLER: Final[dict[str, type[Any]]] = {_handler_name(name): cls for name, cls in EVENTS.items()}


class Monitor:
    """Judges one invariant. A method ``on_write_posted(event)`` handles WritePosted, and so on.

    due: a monitor with a time bound must see ``advance(t)`` as soon as t is later than this (inf: nothing
    due).
    """

    invariant: ClassVar[str]
    handles: ClassVar[dict[type[Any], str]] = {}
    due: float = math.inf

    def __init_subclass__(cls) -> None:
        """Find the handlers by name. Raises TypeError for one that names no event, which would never run."""
        super().__init_subclass__()
        names = [name for name in dir(cls) if name.startswith("on_")]
        for name in names:
            if name not in _EVENT_OF_HANDLER:
                raise TypeError(f"{cls.__name__}.{name} handles no event{_nearest(name, _EVENT_OF_HANDLER)}")
        cls.handles = {_EVENT_OF_HANDLER[name]: name for name in names}

    def __init__(
        self, bounds: Bounds, report: Callable[[Violated], None], wake: Callable[[float], None]
    ) -> None:
        """report: takes each violation. wake: is told when ``due`` has become earlier."""
        self.bounds = bounds
        self._report = report
        self._wake = wake

    def violate(self, t: float, node: str, pair: Pair | None, text: str) -> None:
        """Report that the invariant does not hold at ``t`` on ``node``."""
        self._report(Violated(t, node, self.invariant, pair, text))

    def advance(self, t: float) -> None:
        """Everything before ``t`` has been seen: judge what had to happen before it."""

    def finish(self, t: float) -> None:
        """The trace ends at ``t``: judge what had to happen up to and including it."""


class TimedMonitor(Monitor, ABC):
    """A monitor with one constant bound, so that its deadlines come due in the order in which they were made.

    A deadline may be met exactly on time: it lapses when time has passed it, or when the trace ends on it.
    """

    def __init__(
        self, bounds: Bounds, report: Callable[[Violated], None], wake: Callable[[float], None]
    ) -> None:
        super().__init__(bounds, report, wake)
        self._deadlines: deque[tuple[float, Any]] = deque()

    def expect(self, deadline: float, debt: Any) -> None:
        """Have ``lapse(deadline, debt)`` called once time has passed ``deadline``."""
        self._deadlines.append((deadline, debt))
        if deadline < self.due:
            self.due = deadline
            self._wake(deadline)

    @abstractmethod
    def lapse(self, deadline: float, debt: Any) -> None:
        """The deadline has passed; judge whether the debt was still open then."""

    def advance(self, t: float) -> None:
        """Let every deadline before ``t`` lapse."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] < t:
            self.lapse(*deadlines.popleft())
        self.due = deadlines[0][0] if deadlines else math.inf

    def finish(self, t: float) -> None:
        """Let every deadline up to and including ``t`` lapse; those after it are nobody's fault."""
        self.advance(math.nextafter(t, math.inf))


Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(OrderedDict[Key, Value], Generic[Key, Value]):
    """A dictionary that forgets its oldest entry when it outgrows its limit."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        super().__init__()
        self._limit = limit

    def remember(self, key: Key, value: Value) -> None:
        """Set one entry, at the price of the oldest."""
        self[key] = value
        if len(self) > self._limit:
            self.popitem(last=False)


class Lives:
    """Which nodes are down, and when each stopped last: nothing is expected from a stopped process."""

    def __init__(self) -> None:
        self._down: set[str] = set()
        self._stopped_at: dict[str, float] = {}

    def stop(self, event: trace.NodeStopped) -> None:
        """A process died."""
        self._down.add(event.node)
        self._stopped_at[event.node] = event.t

    def start(self, event: trace.NodeStarted) -> None:
        """A process began a new life."""
        self._down.discard(event.node)

    def excuse(self, node: str, since: float) -> bool:
        """Is ``node`` down, or has it died at or after ``since``?"""
        return node in self._down or self._stopped_at.get(node, -math.inf) >= since


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _said(pair: Pair) -> str:
    return f"room {pair[0]} (attempt {pair[1]})"


# ----------------------------------------------------------------------------------------------------
# Safety
# ----------------------------------------------------------------------------------------------------

Place = tuple[str, str]
"""(node, pool): where a page number means something."""


def _places(write: trace.WritePosted) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Where a write may read or place bytes until it is settled."""
    yield (write.target, "kv"), write.target_pages
    yield (write.node, "kv"), write.source_pages
    if write.row is not None:
        yield (write.target, "aux"), (write.row,)


class PageLifetime(Monitor):
    """S1. On Reserved(node, pool, pages): none of them is the source or target of a WritePosted that has no
    WriteSettled. On WriteLanded: none of its pages is reserved by a pair other than the write's own.

    Targets are the ``kv`` pages (and the ``aux`` row) of ``target``, sources the ``kv`` pages of ``node``.
    The violation carries the pair of the event that breaks it: the new owner, or the write that landed late.
    A stopped node has lost its memory, so its pages are forgotten and writes from and to it count as settled.

    Looking up each page of each write would cost more than the rest of the watch. A page is only looked up
    once it *dangles*: a write is out on it and the write's own pair does not own it (any more).
    """

    invariant = "S1"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._owners: dict[Place, dict[int, Pair]] = {}
        self._writes: dict[int, trace.WritePosted] = {}
        self._touching: dict[tuple[str, Pair], set[int]] = {}
        self._dangling: dict[Place, dict[int, set[int]]] = {}

    def on_reserved(self, event: trace.Reserved) -> None:
        """Judge the hand-over, then remember the new owner."""
        place = (event.node, event.pool)
        owners = self._owners.get(place)
        if owners is None:
            owners = self._owners[place] = {}
        pages = event.pages
        if not owners.keys().isdisjoint(pages):
            for page in pages:
                if page in owners:
                    self._loosen(place, owners[page], (page,))
        pair = event.incarnation[:2]
        if place in self._dangling:
            self._judge_handover(event, pair, self._dangling[place])
        owners.update(dict.fromkeys(pages, pair))

    def _judge_handover(self, event: trace.Reserved, pair: Pair, dangling: dict[int, set[int]]) -> None:
        for page in event.pages:
            if page in dangling:
                write = self._writes[min(dangling[page])]
                text = (
                    f"{event.pool} page {page} went to {_said(pair)} while write {write.write} of "
                    f"{write.node} for {_said(write.incarnation.pair)} was not settled"
                )
                self.violate(event.t, event.node, pair, text)
                return

    def on_released(self, event: trace.Released) -> None:
        """Pages that a write is still out on begin to dangle."""
        place = (event.node, event.pool)
        pair = event.incarnation[:2]
        if (event.node, pair) in self._touching:
            self._loosen(place, pair, event.pages)
        owners = self._owners.get(place, {})
        for page in event.pages:
            owner = owners.pop(page, None)
            if owner != pair and owner is not None:
                self._loosen(place, owner, (page,))

    def _loosen(self, place: Place, pair: Pair, pages: tuple[int, ...]) -> None:
        for number in self._touching.get((place[0], pair), ()):
            for touched_place, touched in _places(self._writes[number]):
                if touched_place == place:
                    self._dangle(place, set(touched).intersection(pages), number)

    def _dangle(self, place: Place, pages: Iterable[int], number: int) -> None:
        for page in pages:
            self._dangling.setdefault(place, {}).setdefault(page, set()).add(number)

    def on_write_posted(self, event: trace.WritePosted) -> None:
        """Bytes may move from here on."""
        number, pair = event.write, event.incarnation[:2]
        self._settle(number)
        self._writes[number] = event
        self._touching.setdefault((event.node, pair), set()).add(number)
        self._touching.setdefault((event.target, pair), set()).add(number)
        for place, pages in _places(event):
            owner_of = self._owners.get(place, {}).get
            if not all(map(eq, map(owner_of, pages), repeat(pair))):
                self._dangle(place, [page for page in pages if owner_of(page) != pair], number)

    def on_write_landed(self, event: trace.WriteLanded) -> None:
        """Bytes reached pages: whose are they now?"""
        pair = event.incarnation[:2]
        owner_of = self._owners.get((event.node, "kv"), {}).get
        if all(map(eq, map(owner_of, event.pages), repeat(pair))):
            return
        for page in event.pages:
            owner = owner_of(page)
            if owner != pair and owner is not None:
                text = f"write {event.write} of {_said(pair)} landed on page {page}, now of {_said(owner)}"
                self.violate(event.t, event.node, pair, text)
                return

    def on_write_settled(self, event: trace.WriteSettled) -> None:
        """No byte of it moves any more."""
        self._settle(event.write)

    def _settle(self, number: int) -> None:
        write = self._writes.pop(number, None)
        if write is None:
            return
        pair = write.incarnation[:2]
        for node in {write.node, write.target}:
            touching = self._touching[node, pair]
            touching.discard(number)
            if not touching:
                del self._touching[node, pair]
        if self._dangling:
            self._tie_up(write)

    def _tie_up(self, write: trace.WritePosted) -> None:
        for place, pages in _places(write):
            dangling = self._dangling.get(place)
            if dangling is None:
                continue
            for page in dangling.keys() & set(pages):
                dangling[page].discard(write.write)
                if not dangling[page]:
                    del dangling[page]
            if not dangling:
                del self._dangling[place]

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Its memory is gone, and so is every write from it and to it."""
        node = event.node
        for number in [w.write for w in self._writes.values() if node in (w.node, w.target)]:
            self._settle(number)
        for place in [place for place in self._owners if place[0] == node]:
            del self._owners[place]


class Generation(Monitor):
    """S2. A Stepped whose fact was meant for another incarnation than the room's own changes neither poll nor
    lease; answering such a fact (actions only) is harmless.

    ``incarnation`` is the room's own before the step, or after it if the step opened the room: so a fact that
    opens a room is compared with what it opened.
    """

    invariant = "S2"

    def on_stepped(self, event: trace.Stepped) -> None:
        """Compare whom the fact was for with whom it moved."""
        if event.fact_incarnation == event.incarnation:
            return
        if event.poll_before == event.poll_after and event.lease_before == event.lease_after:
            return
        text = (
            f"{event.fact} meant for {tuple(event.fact_incarnation)} moved {tuple(event.incarnation)} "
            f"from {event.poll_before}/{event.lease_before} to {event.poll_after}/{event.lease_after}"
        )
        self.violate(event.t, event.node, event.incarnation.pair, text)


class StickyTerminal(Monitor):
    """S3. No Stepped leads from Success or Failed to another numbered poll, and none from a numbered poll to
    a smaller one, except to Failed.

    A room that is over may be taken by another attempt: RequestOpened of a pair other than the one that ended
    there is not judged here.
    """

    invariant = "S3"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ended: Recent[tuple[str, int], Pair] = Recent()

    def on_stepped(self, event: trace.Stepped) -> None:
        """Compare poll with poll; steps of the lease alone return at once."""
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        if before in TERMINAL_POLLS:
            self._judge_ended(event)
        elif after in TERMINAL_POLLS:
            self._ended.remember((event.node, event.incarnation.room), event.incarnation.pair)
        elif POLL_NUMBERS.get(after, 9) < POLL_NUMBERS.get(before, 0):
            self._report_step(event)

    def _judge_ended(self, event: trace.Stepped) -> None:
        ended = self._ended.pop((event.node, event.incarnation.room), None)
        if event.poll_after not in POLL_NUMBERS:
            return
        if event.poll_after in TERMINAL_POLLS:
            self._ended.remember((event.node, event.incarnation.room), event.incarnation.pair)
        if event.fact != OPENING or ended is None or ended == event.incarnation.pair:
            self._report_step(event)

    def _report_step(self, event: trace.Stepped) -> None:
        text = f"{event.fact} moved the room from {event.poll_before} back to {event.poll_after}"
        self.violate(event.t, event.node, event.incarnation.pair, text)


class NoResurrection(Monitor):
    """S4. A pair that a node has cleared (numbered to Absent, or anything to Retired) never becomes Announced
    or numbered there again; and only RequestOpened leads from Absent to a numbered poll.

    Each node remembers its last ``REMEMBERED`` cleared pairs and forgets them when it stops. Another attempt
    at the same room is another pair, and welcome.
    """

    invariant = "S4"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cleared: dict[str, Recent[Pair, None]] = {}

    def on_stepped(self, event: trace.Stepped) -> None:
        """Only steps into and out of the gone states matter."""
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        if after in GONE:
            if after == "Retired" or before in POLL_NUMBERS:
                self._clear(event)
        elif before in GONE:
            self._judge(event)

    def _clear(self, event: trace.Stepped) -> None:
        cleared = self._cleared.get(event.node)
        if cleared is None:
            cleared = self._cleared[event.node] = Recent()
        cleared.remember(event.incarnation.pair, None)

    def _judge(self, event: trace.Stepped) -> None:
        pair = event.incarnation.pair
        cleared = self._cleared.get(event.node)
        if cleared is not None and pair in cleared:
            text = f"{event.fact} brought a cleared room back as {event.poll_after}"
            self.violate(event.t, event.node, pair, text)
        elif event.poll_before == "Absent" and event.poll_after in POLL_NUMBERS and event.fact != OPENING:
            text = f"{event.fact} made a room {event.poll_after} that nobody opened"
            self.violate(event.t, event.node, pair, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """A new process has cleared nothing."""
        self._cleared.pop(event.node, None)


class CompleteSuccess(Monitor):
    """S5. On Committed: for every page index and every component, the page holds a tag of that component with
    the committing pair and that index, and the aux row belongs to that pair.
    """

    invariant = "S5"

    def on_committed(self, event: trace.Committed) -> None:
        """Name the first wrong page, else the wrong row."""
        pair = event.incarnation.pair
        for index, page in enumerate(event.contents):
            for component in event.components:
                tag = page.get(component)
                if tag is None or tag.pair != pair or tag.index != index or tag.source != component:
                    self.violate(event.t, event.node, pair, _wrong_page(index, component, pair, tag))
                    return
        if event.row_pair != pair:
            found = "nobody" if event.row_pair is None else _said(event.row_pair)
            self.violate(event.t, event.node, pair, f"aux row: expected {_said(pair)}, found {found}")


def _wrong_page(index: int, component: str, pair: Pair, tag: PageTag | None) -> str:
    found = "nothing" if tag is None else f"page {tag.index} of {_said(tag.pair)} from {tag.source}"
    return f"page {index}, component {component}: expected {_said(pair)}, found {found}"


class RightPeer(Monitor):
    """S6. On Addressed: the peer is one of the prefill ranks that the pair was admitted to, and the decode
    rank knew it in its current process epoch. Pairs that are not (or no longer) admitted are ignored.
    """

    invariant = "S6"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._prefill: Recent[Pair, tuple[str, ...]] = Recent()

    def on_admitted(self, event: trace.Admitted) -> None:
        """Here the router says which ranks run the request."""
        self._prefill.remember(event.pair, event.prefill)

    def on_addressed(self, event: trace.Addressed) -> None:
        """Compare the peer with the ranks that really run it."""
        pair = event.incarnation.pair
        prefill = self._prefill.get(pair)
        if prefill is None:
            return
        if event.peer not in prefill:
            text = f"pages were published to {event.peer}, but {', '.join(prefill)} run the request"
            self.violate(event.t, event.node, pair, text)
        elif event.peer_epoch != event.current_epoch:
            text = f"{event.peer} was addressed in epoch {event.peer_epoch}, but is in {event.current_epoch}"
            self.violate(event.t, event.node, pair, text)

    def on_resulted(self, event: trace.Resulted) -> None:
        """The request is over."""
        self._prefill.pop(event.pair, None)


class _History:
    """The decisions of one agreement group and how far each rank has come; ``None``: it went astray."""

    def __init__(self) -> None:
        self.first = 0
        self.decisions: deque[tuple[str, str]] = deque()
        self.position: dict[str, int | None] = {}

    def append(self, decision: tuple[str, str]) -> None:
        self.decisions.append(decision)
        if len(self.decisions) > AGREEMENT_WINDOW:
            self.decisions.popleft()
            self.first += 1


class RankAgreement(Monitor):
    """S7. In each group, the k-th collective that any rank enters has the kind and shape of the k-th of every
    other; and the decisions (rid, outcome) of each rank are a prefix of one common history.

    The history is what the rank that came first did. A rank is judged up to its first other decision;
    compared are the last ``AGREEMENT_WINDOW`` entries. While a rank of an engine is down its groups (those
    whose name begins with the same engine) are not judged, and once all are up again histories begin anew.
    """

    invariant = "S7"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._collectives: dict[str, Recent[int, tuple[str, Any, str]]] = {}
        self._histories: dict[str, _History] = {}
        self._down: dict[str, set[str]] = {}

    def on_collective_entered(self, event: trace.CollectiveEntered) -> None:
        """Compare with whoever entered this one first."""
        if self._down and _engine(event.group) in self._down:
            return
        entered = self._collectives.get(event.group)
        if entered is None:
            entered = self._collectives[event.group] = Recent(AGREEMENT_WINDOW)
        first = entered.get(event.sequence)
        if first is None:
            entered.remember(event.sequence, (event.kind, event.shape, event.node))
        elif first[0] != event.kind or first[1] != event.shape:
            text = (
                f"collective {event.sequence} of {event.group}: {event.kind} {event.shape} here, "
                f"{first[0]} {first[1]} on {first[2]}"
            )
            self.violate(event.t, event.node, None, text)

    def on_decided(self, event: trace.Decided) -> None:
        """Compare with the common history, or write its next line."""
        if self._down and _engine(event.group) in self._down:
            return
        history = self._histories.get(event.group)
        if history is None:
            history = self._histories[event.group] = _History()
        position = history.position.get(event.node, 0)
        if position is None:
            return
        history.position[event.node] = position + 1
        place = position - history.first
        if place == len(history.decisions):
            history.append((event.rid, event.outcome))
        elif place >= 0 and history.decisions[place] != (event.rid, event.outcome):
            history.position[event.node] = None
            self._report_astray(event, position, history.decisions[place])

    def _report_astray(self, event: trace.Decided, position: int, expected: tuple[str, str]) -> None:
        text = (
            f"decision {position} of {event.group}: {event.outcome} {event.rid} here, "
            f"{expected[1]} {expected[0]} on the rank that came first"
        )
        self.violate(event.t, event.node, None, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """A group with a dead rank cannot agree on anything."""
        engine = _engine(event.node)
        self._down.setdefault(engine, set()).add(event.node)
        for group in [group for group in self._collectives if _engine(group) == engine]:
            del self._collectives[group]
        for group in [group for group in self._histories if _engine(group) == engine]:
            del self._histories[group]

    def on_node_started(self, event: trace.NodeStarted) -> None:
        """Once the whole engine is up, it is judged again."""
        engine = _engine(event.node)
        down = self._down.get(engine, set())
        down.discard(event.node)
        if not down:
            self._down.pop(engine, None)


def _engine(name: str) -> str:
    return name.split("/", 1)[0]


class Conservation(Monitor):
    """S8. In each pool: no Reserved of a page that is owned, no Released of a page that its incarnation's
    pair does not own, and after each Released free + owned is the same total as after the first one.

    After a total that does not add up the new one is taken as true, so that one leak is one violation. A
    stopped node begins with a full pool again.
    """

    invariant = "S8"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._owners: dict[Place, dict[int, Pair]] = {}
        self._totals: dict[Place, int] = {}

    def on_reserved(self, event: trace.Reserved) -> None:
        """Every page must have been free, and handed out once."""
        owners = self._owners.setdefault((event.node, event.pool), {})
        pair = event.incarnation[:2]
        pages = event.pages
        if not owners.keys().isdisjoint(pages):
            page = next(page for page in pages if page in owners)
            text = f"{event.pool} page {page} went to {_said(pair)} while {_said(owners[page])} owned it"
            self.violate(event.t, event.node, pair, text)
        elif len(set(pages)) != len(pages):
            self.violate(event.t, event.node, pair, f"a {event.pool} page was handed out twice in one go")
        owners.update(dict.fromkeys(pages, pair))

    def on_released(self, event: trace.Released) -> None:
        """Every page must have been this pair's, and the pool's own count must agree."""
        place = (event.node, event.pool)
        owners = self._owners.setdefault(place, {})
        pair = event.incarnation[:2]
        foreign: list[tuple[int, Pair | None]] = []
        for page in event.pages:
            owner = owners.pop(page, None)
            if owner != pair:
                foreign.append((page, owner))
        if foreign:
            self._report_foreign(event, *foreign[0])
        total = event.free + len(owners)
        known = self._totals.get(place)
        if known != total:
            self._totals[place] = total
            if known is not None:
                self._report_total(event, len(owners), known)

    def _report_foreign(self, event: trace.Released, page: int, owner: Pair | None) -> None:
        whose = "nobody" if owner is None else _said(owner)
        text = f"{_said(event.incarnation.pair)} released {event.pool} page {page}, owned by {whose}"
        self.violate(event.t, event.node, event.incarnation.pair, text)

    def _report_total(self, event: trace.Released, owned: int, known: int) -> None:
        text = f"{event.pool}: {event.free} free + {owned} owned, but {known} pages in all"
        self.violate(event.t, event.node, event.incarnation.pair, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Its pools are gone."""
        for place in [place for place in self._owners if place[0] == event.node]:
            del self._owners[place]
            self._totals.pop(place, None)


class _Running:
    """What one admitted request has shown so far."""

    __slots__ = ("admitted", "committed", "failures")

    def __init__(self, admitted: trace.Admitted) -> None:
        self.admitted = admitted
        self.committed: set[str] = set()
        self.failures: dict[str, str | None] = {}


class TruthfulResult(Monitor):
    """S9. Resulted ok: every decode rank of the admission has Committed, and no rank of the pair has turned
    Failed. Resulted not ok: the cause is that of one of the failures seen for the pair, if any was seen.

    Ranks that stopped since the admission are not judged; what they said as they failed still counts as a
    cause.
    """

    invariant = "S9"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._running: Recent[Pair, _Running] = Recent()
        self._lives = Lives()

    def on_admitted(self, event: trace.Admitted) -> None:
        """From here to Resulted the request is followed."""
        self._running.remember(event.pair, _Running(event))

    def on_committed(self, event: trace.Committed) -> None:
        """This decode rank has what it needs."""
        running = self._running.get(event.incarnation.pair)
        if running is not None:
            running.committed.add(event.node)

    def on_stepped(self, event: trace.Stepped) -> None:
        """Note first failures and their causes."""
        if event.poll_after != "Failed" or event.poll_before == "Failed":
            return
        running = self._running.get(event.incarnation.pair)
        if running is not None:
            running.failures[event.node] = event.cause

    def on_resulted(self, event: trace.Resulted) -> None:
        """Compare what the client was told with what the ranks showed."""
        running = self._running.pop(event.pair, None)
        if running is None:
            return
        lie = self._false_success(running) if event.ok else _false_cause(running, event.cause)
        if lie:
            self.violate(event.t, event.node, event.pair, lie)

    def _false_success(self, running: _Running) -> str | None:
        admitted = running.admitted
        judged = [
            node for node in (*admitted.prefill, *admitted.decode) if not self._lives.excuse(node, admitted.t)
        ]
        for node in judged:
            if node in running.failures:
                return f"the client was told success, but {node} failed ({running.failures[node]})"
            if node in admitted.decode and node not in running.committed:
                return f"the client was told success, but {node} never committed"
        return None

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Nothing is expected from it."""
        self._lives.stop(event)

    def on_node_started(self, event: trace.NodeStarted) -> None:
        """Later requests count on it again."""
        self._lives.start(event)


def _false_cause(running: _Running, cause: str | None) -> str | None:
    causes = running.failures.values()
    if not causes or cause in causes:
        return None
    seen = ", ".join(sorted({str(failure) for failure in causes}))
    return f"the client was told {cause!r}, but the failures were {seen}"


class Containment(Monitor):
    """S10. There is no IllegalFactRaised and no LoopStopped."""

    invariant = "S10"

    def on_illegal_fact_raised(self, event: trace.IllegalFactRaised) -> None:
        """A machine was offered what its table forbids."""
        text = f"{event.fact} is illegal for a {event.role} in state {event.state}"
        self.violate(event.t, event.node, event.incarnation.pair, text)

    def on_loop_stopped(self, event: trace.LoopStopped) -> None:
        """A loop ended in a live process."""
        self.violate(event.t, event.node, None, f"the {event.loop} loop stopped: {event.cause}")


class ProducerReady(Monitor):
    """S11. A WritePosted of (node, pair, chunk) comes after Computed of the same three, in the same life of
    the node. The last ``REMEMBERED`` (node, pair) are remembered, so that a late write is judged by S1 and
    S2, not mistaken for an early one.
    """

    invariant = "S11"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._computed: Recent[tuple[str, Pair], set[int]] = Recent()

    def on_computed(self, event: trace.Computed) -> None:
        """The forward pass of this chunk is over."""
        key = (event.node, event.incarnation[:2])
        chunks = self._computed.get(key)
        if chunks is None:
            self._computed.remember(key, {event.chunk})
        else:
            chunks.add(event.chunk)

    def on_write_posted(self, event: trace.WritePosted) -> None:
        """The transport may read the chunk from here on."""
        pair = event.incarnation[:2]
        chunks = self._computed.get((event.node, pair))
        if chunks is None or event.chunk not in chunks:
            text = f"write {event.write} reads chunk {event.chunk} before it is computed"
            self.violate(event.t, event.node, pair, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """What it had computed is gone."""
        for key in [key for key in self._computed if key[0] == event.node]:
            del self._computed[key]


class RoomUnique(Monitor):
    """S12. A Stepped by RequestOpened never makes a pair live (numbered, not terminal) on a node on which
    another pair of the same room is live; nor does it move a live room that belongs to another pair than it
    opens. A RivalOpened of another pair that is offered to a live room is answered by RejectRequest.
    """

    invariant = "S12"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._live: dict[str, dict[int, Pair]] = {}

    def on_stepped(self, event: trace.Stepped) -> None:
        """Only openings and ends matter."""
        if event.poll_after not in LIVE_POLLS:
            if event.poll_before in LIVE_POLLS:
                self._live.get(event.node, {}).pop(event.incarnation.room, None)
        elif event.fact == OPENING:
            self._open(event)
        elif event.poll_before not in LIVE_POLLS:
            self._live.setdefault(event.node, {})[event.incarnation.room] = event.incarnation.pair
        elif event.fact == RIVALRY and REJECTION not in event.actions:
            self._judge_rival(event)

    def _judge_rival(self, event: trace.Stepped) -> None:
        rival = event.fact_incarnation.pair
        if rival != event.incarnation.pair:
            self.violate(event.t, event.node, rival, _two_live(rival, event.incarnation.pair))

    def _open(self, event: trace.Stepped) -> None:
        own, meant = event.incarnation.pair, event.fact_incarnation.pair
        live = self._live.setdefault(event.node, {})
        present = live.get(own[0])
        if own != meant and event.poll_before in LIVE_POLLS:
            if event.poll_before == event.poll_after and event.lease_before == event.lease_after:
                return
            present, own = own, meant
        live[own[0]] = own
        if present is not None and present != own:
            self.violate(event.t, event.node, own, _two_live(own, present))

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Nothing is live on it any more."""
        self._live.pop(event.node, None)


def _two_live(second: Pair, first: Pair) -> str:
    return f"{_said(second)} was opened while attempt {first[1]} of the room was live"


# ----------------------------------------------------------------------------------------------------
# Liveness
# ----------------------------------------------------------------------------------------------------


class _Ending:
    """An admitted request that has not ended everywhere; pending: node -> has it opened the room there?"""

    __slots__ = ("admitted_t", "pending", "resulted")

    def __init__(self, event: trace.Admitted) -> None:
        self.admitted_t = event.t
        self.pending = dict.fromkeys((*event.prefill, *event.decode), False)
        self.resulted = False


class BoundedEnd(TimedMonitor):
    """L1. Within ``end_s`` of Admitted every prefill and decode rank of it has come to an end for the pair:
    Success, Failed, Retired, or from a numbered poll to Absent. The violation is at the deadline, on the
    rank.

    A rank that is down or stopped since the admission is excused. So is one that never opened the room, once
    the client has its answer: nobody will bring the request to it any more.
    """

    invariant = "L1"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._endings: dict[Pair, _Ending] = {}
        self._lives = Lives()

    def on_admitted(self, event: trace.Admitted) -> None:
        """The clock starts for all ranks at once."""
        ending = self._endings[event.pair] = _Ending(event)
        self.expect(event.t + self.bounds.end_s, (event.pair, ending))

    def on_stepped(self, event: trace.Stepped) -> None:
        """Strike out ranks that have come to an end."""
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        opened = after in LIVE_POLLS
        if opened and before in LIVE_POLLS:
            return
        ending = self._endings.get(event.incarnation[:2])
        if ending is None or event.node not in ending.pending:
            return
        if opened:
            ending.pending[event.node] = True
        elif after != "Announced" and (after != "Absent" or before in POLL_NUMBERS):
            del ending.pending[event.node]
            if not ending.pending:
                del self._endings[event.incarnation[:2]]

    def on_resulted(self, event: trace.Resulted) -> None:
        """Ranks that know nothing of the request need not hear of it any more."""
        ending = self._endings.get(event.pair)
        if ending is not None:
            ending.resulted = True

    def lapse(self, deadline: float, debt: tuple[Pair, _Ending]) -> None:
        """Report every rank that has not come to an end."""
        pair, ending = debt
        if self._endings.get(pair) is not ending:
            return
        del self._endings[pair]
        for node, opened in ending.pending.items():
            if (ending.resulted and not opened) or self._lives.excuse(node, ending.admitted_t):
                continue
            state = "has not ended" if opened else "was never opened"
            self.violate(deadline, node, pair, f"the room {state} {self.bounds.end_s:g} s after admission")

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Nothing is expected from it."""
        self._lives.stop(event)

    def on_node_started(self, event: trace.NodeStarted) -> None:
        """Later requests count on it again."""
        self._lives.start(event)


class Propagate(TimedMonitor):
    """L2. Within ``propagate_s`` of the first Failed on one side, every rank of the other side that holds the
    pair in a live poll has left it. The violation is at the deadline, on the rank that still holds it.

    A rank that opens the room after the failure has ``propagate_s`` from its opening. While a fault severs
    any node that holds the pair or failed it, nothing is due; when it ends the clock starts again. A stopped
    node owes nothing; and a failure known only to stopped nodes cannot be told, so it obliges nobody (L1
    remains).
    """

    invariant = "L2"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._holders: dict[Pair, dict[str, str]] = {}
        self._failed: Recent[Pair, dict[str, set[str]]] = Recent()
        self._owed: dict[tuple[Pair, str], float] = {}
        self._severing: dict[tuple[str, str], tuple[str, ...]] = {}

    def on_stepped(self, event: trace.Stepped) -> None:
        """Only openings, ends and failures matter."""
        before, after = event.poll_before, event.poll_after
        if before == after:
            return
        if after in LIVE_POLLS:
            if before not in LIVE_POLLS:
                self._open(event)
            return
        if before in LIVE_POLLS:
            self._end(event)
        if after == "Failed":
            self._fail(event)

    def _open(self, event: trace.Stepped) -> None:
        pair = event.incarnation.pair
        self._holders.setdefault(pair, {})[event.node] = event.role
        if any(role != event.role for role in self._failed.get(pair, ())):
            self._owe(event.t, pair, event.node)

    def _end(self, event: trace.Stepped) -> None:
        pair = event.incarnation.pair
        self._owed.pop((pair, event.node), None)
        holders = self._holders.get(pair, {})
        holders.pop(event.node, None)
        if not holders:
            self._holders.pop(pair, None)

    def _fail(self, event: trace.Stepped) -> None:
        pair = event.incarnation.pair
        failed = self._failed.get(pair)
        if failed is None:
            failed = {}
            self._failed.remember(pair, failed)
        if event.role in failed:
            failed[event.role].add(event.node)
            return
        failed[event.role] = {event.node}
        for node, role in self._holders.get(pair, {}).items():
            if role != event.role and (pair, node) not in self._owed:
                self._owe(event.t, pair, node)

    def _owe(self, t: float, pair: Pair, node: str) -> None:
        deadline = t + self.bounds.propagate_s
        self._owed[pair, node] = deadline
        self.expect(deadline, (pair, node))

    def lapse(self, deadline: float, debt: tuple[Pair, str]) -> None:
        """Report the rank that still holds the pair, unless the link is down."""
        if self._owed.get(debt) != deadline:
            return
        pair, node = debt
        if any(self._touches(severs, pair) for severs in self._severing.values()):
            self._owed[debt] = math.inf
            return
        del self._owed[debt]
        failed = ", ".join(sorted(set().union(*self._failed.get(pair, {}).values())))
        text = f"still live {self.bounds.propagate_s:g} s after it could know that {failed} failed"
        self.violate(deadline, node, pair, text)

    def _touches(self, severs: tuple[str, ...], pair: Pair) -> bool:
        nodes = set(self._holders.get(pair, ())).union(*self._failed.get(pair, {}).values())
        return any(_matches(prefix, node) for prefix in severs for node in nodes)

    def on_fault_began(self, event: trace.FaultBegan) -> None:
        """Remember what it cuts off."""
        if event.severs:
            self._severing[event.node, event.fault] = event.severs

    def on_fault_ended(self, event: trace.FaultEnded) -> None:
        """Whoever was cut off has the whole bound again."""
        severs = self._severing.pop((event.node, event.fault), ())
        for pair, node in [debt for debt in self._owed if self._touches(severs, debt[0])]:
            self._owe(event.t, pair, node)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """It owes nothing, and it can tell nothing."""
        node = event.node
        for pair in [pair for pair, holders in self._holders.items() if node in holders]:
            self._owed.pop((pair, node), None)
            del self._holders[pair][node]
            if not self._holders[pair]:
                del self._holders[pair]
        for pair, failed in self._failed.items():
            for role in [role for role, nodes in failed.items() if nodes == {node}]:
                del failed[role]
                self._forgive(pair, role)
            for nodes in failed.values():
                nodes.discard(node)

    def _forgive(self, pair: Pair, failed_role: str) -> None:
        for node, role in self._holders.get(pair, {}).items():
            if role != failed_role:
                self._owed.pop((pair, node), None)


def _matches(prefix: str, node: str) -> bool:
    """Is ``prefix`` a prefix of the node's name? ``*`` is one of all; P1 is none of P10."""
    if prefix == "*":
        return True
    rest = node[len(prefix) :]
    return node.startswith(prefix) and not (prefix[-1:].isdigit() and rest[:1].isdigit())


class Recover(TimedMonitor):
    """L4. Every request Admitted after Healed is Resulted ok within ``recover_s`` of its admission. The
    violation is at the answer when it is not ok, else at the deadline, on the router.
    """

    invariant = "L4"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._healed = False
        self._pending: dict[Pair, trace.Admitted] = {}

    def on_healed(self, event: trace.Healed) -> None:
        """From here on the system has no excuse."""
        self._healed = True

    def on_admitted(self, event: trace.Admitted) -> None:
        """The clock starts."""
        if self._healed:
            self._pending[event.pair] = event
            self.expect(event.t + self.bounds.recover_s, event)

    def on_resulted(self, event: trace.Resulted) -> None:
        """The clock stops; but not at just any answer."""
        if self._pending.pop(event.pair, None) is not None and not event.ok:
            text = f"request {event.rid}, admitted after the faults, failed: {event.cause}"
            self.violate(event.t, event.node, event.pair, text)

    def lapse(self, deadline: float, debt: trace.Admitted) -> None:
        """Report a request without its answer."""
        if self._pending.get(debt.pair) is debt:
            del self._pending[debt.pair]
            bound_s = self.bounds.recover_s
            text = f"request {debt.rid}, admitted after the faults, has no answer after {bound_s:g} s"
            self.violate(deadline, debt.node, debt.pair, text)


class ReaperFree(Monitor):
    """L5. On Surveyed: overdue is 0."""

    invariant = "L5"

    def on_surveyed(self, event: trace.Surveyed) -> None:
        """Nothing that has expired may still be there."""
        if event.overdue:
            self.violate(event.t, event.node, None, f"{event.overdue} expired entries were not removed")


class NonBlocking(Monitor):
    """L6. On Stalled: blocked_s is at most ``step_s``."""

    invariant = "L6"

    def on_stalled(self, event: trace.Stalled) -> None:
        """A scheduler step has waited for a peer."""
        if event.blocked_s > self.bounds.step_s:
            text = f"one step waited {event.blocked_s:g} s for {event.on} (at most {self.bounds.step_s:g} s)"
            self.violate(event.t, event.node, None, text)


class HonestTimer(Monitor):
    """L7. Judged are Stepped by DeadlineReached that change the poll. With detail "waiting" on a receiver, it
    comes after an Addressed of that node and pair: before that the peer had nowhere to write. With detail
    "bootstrap" on a sender, no receiver of the pair is in WaitingForInput without having Addressed: such a
    peer has resolved its ranks and waits only for its own memory.
    """

    invariant = "L7"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._addressed: Recent[tuple[str, Pair], None] = Recent()
        self._holding: dict[Pair, set[str]] = {}

    def on_addressed(self, event: trace.Addressed) -> None:
        """From here on the prefill side can act."""
        pair = event.incarnation[:2]
        self._addressed.remember((event.node, pair), None)
        self._let_go(pair, event.node)

    def on_stepped(self, event: trace.Stepped) -> None:
        """Judge timers that had an effect; follow receivers."""
        if event.poll_before == event.poll_after:
            return
        if event.fact == "DeadlineReached":
            self._judge(event)
        if event.role != "receiver":
            return
        pair, after = event.incarnation[:2], event.poll_after
        if after == "WaitingForInput":
            if (event.node, pair) not in self._addressed:
                self._holding.setdefault(pair, set()).add(event.node)
            return
        self._let_go(pair, event.node)
        if after not in LIVE_POLLS:
            self._addressed.pop((event.node, pair), None)

    def _judge(self, event: trace.Stepped) -> None:
        pair = event.incarnation[:2]
        if event.role == "receiver":
            if event.detail == "waiting" and (event.node, pair) not in self._addressed:
                text = "gave up waiting for a peer that had not been told where to write"
                self.violate(event.t, event.node, pair, text)
        elif event.detail == "bootstrap" and pair in self._holding:
            holding = ", ".join(sorted(self._holding[pair]))
            text = f"gave up on {holding}, which was only waiting for its own memory"
            self.violate(event.t, event.node, pair, text)

    def _let_go(self, pair: Pair, node: str) -> None:
        holding = self._holding.get(pair)
        if holding is not None:
            holding.discard(node)
            if not holding:
                del self._holding[pair]

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """It waits for nothing any more."""
        for pair in [pair for pair, nodes in self._holding.items() if event.node in nodes]:
            self._let_go(pair, event.node)
        for key in [key for key in self._addressed if key[0] == event.node]:
            del self._addressed[key]


# ----------------------------------------------------------------------------------------------------
# Leaks
# ----------------------------------------------------------------------------------------------------


class QuiesceZero(Monitor):
    """R1. On Surveyed: every table of the node has 0 entries."""

    invariant = "R1"

    def on_surveyed(self, event: trace.Surveyed) -> None:
        """An idle node holds nothing."""
        left = [f"{entries} in {name}" for name, entries in event.tables if entries]
        if left:
            self.violate(event.t, event.node, None, f"left on an idle node: {', '.join(left)}")


class BoundedMaps(TimedMonitor):
    """R2. A room is *ownerless* on a node while it is Announced, or numbered without a RequestOpened. At most
    ``ownerless_rooms`` are so at once (reported where the bound is crossed, with the pair that crosses it),
    and none for longer than ``ownerless_s`` (reported at the deadline, once for each room).
    """

    invariant = "R2"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ownerless: dict[str, dict[int, float]] = {}

    def on_stepped(self, event: trace.Stepped) -> None:
        """Only openings, announcements and ends matter; an owner may come without a change of poll."""
        before, after = event.poll_before, event.poll_after
        if event.fact == OPENING:
            if event.fact_incarnation == event.incarnation:
                self._strike(event)
        elif before == after:
            return
        elif after in GONE:
            self._strike(event)
        elif before in GONE:
            self._orphan(event)

    def _strike(self, event: trace.Stepped) -> None:
        rooms = self._ownerless.get(event.node)
        if rooms:
            rooms.pop(event.incarnation.room, None)

    def _orphan(self, event: trace.Stepped) -> None:
        rooms = self._ownerless.setdefault(event.node, {})
        rooms[event.incarnation.room] = event.t
        pair = event.incarnation.pair
        self.expect(event.t + self.bounds.ownerless_s, (event.node, pair, event.t))
        if len(rooms) == self.bounds.ownerless_rooms + 1:
            text = f"{len(rooms)} rooms that nobody opened (at most {self.bounds.ownerless_rooms})"
            self.violate(event.t, event.node, pair, text)

    def lapse(self, deadline: float, debt: tuple[str, Pair, float]) -> None:
        """Report a room that is still without owner."""
        node, pair, since = debt
        if self._ownerless.get(node, {}).get(pair[0]) == since:
            text = f"nobody opened the room within {self.bounds.ownerless_s:g} s, and it is still there"
            self.violate(deadline, node, pair, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Its tables are gone."""
        self._ownerless.pop(event.node, None)


class RetryBudget(Monitor):
    """R3. Of the Requested with repeat > 0, each node sends at most ``repeats_per_s`` in any window of one
    second (half open: two that are a second apart, to the nanosecond, are in different windows).
    """

    invariant = "R3"

    WINDOW_S: ClassVar[float] = 1.0 - 1e-9

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._one_too_many = int(self.bounds.repeats_per_s) + 1
        self._times: dict[str, deque[float]] = {}

    def on_requested(self, event: trace.Requested) -> None:
        """Look back over as many repeats as would be one too many."""
        if event.repeat <= 0:
            return
        times = self._times.get(event.node)
        if times is None:
            times = self._times[event.node] = deque(maxlen=self._one_too_many)
        times.append(event.t)
        if len(times) == self._one_too_many and event.t - times[0] < self.WINDOW_S:
            text = (
                f"{len(times)} repeated requests within one second "
                f"(at most {self.bounds.repeats_per_s:g}), the last {event.route} to {event.server}"
            )
            self.violate(event.t, event.node, None, text)


# ----------------------------------------------------------------------------------------------------
# Observability
# ----------------------------------------------------------------------------------------------------


class MetricTruth(Monitor):
    """O1. On Surveyed (an idle node): every gauge says 0, what Queued has counted is 0 for every queue of the
    node, and a gauge that bears the name of a queue says what Queued has counted for it.
    """

    invariant = "O1"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._queues: dict[str, dict[str, int]] = {}

    def on_queued(self, event: trace.Queued) -> None:
        """Count entries and exits."""
        queues = self._queues.get(event.node)
        if queues is None:
            queues = self._queues[event.node] = {}
        queues[event.queue] = queues.get(event.queue, 0) + event.delta

    def on_surveyed(self, event: trace.Surveyed) -> None:
        """Compare what is said with what was counted."""
        queues = self._queues.get(event.node, {})
        wrong = [
            f"{name} says {value:g}" + (f", counted {queues[name]}" if name in queues else "")
            for name, value in event.gauges
            if value or queues.get(name, 0) != value
        ]
        said = {name for name, _ in event.gauges}
        wrong += [f"{name} not reported, counted {n}" for name, n in queues.items() if n and name not in said]
        if wrong:
            self.violate(event.t, event.node, None, f"on an idle node: {'; '.join(wrong)}")

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Its queues are gone."""
        self._queues.pop(event.node, None)


class HealthTruth(Monitor):
    """O2. No HealthReported is healthy while no request could finish on the engine."""

    invariant = "O2"

    def on_health_reported(self, event: trace.HealthReported) -> None:
        """Compare what is said with what is so."""
        if event.healthy and not event.able:
            self.violate(event.t, event.node, None, "says it is healthy, but no request can finish on it")


# ----------------------------------------------------------------------------------------------------
# The invariants
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Invariant:
    """One thing that must hold.

    monitor: the class that judges it. waits_for: where there is none, what the protocol would have to do
    before the invariant could break; else None.
    """

    id: str
    name: str
    klass: Klass
    sentence: str
    monitor: type[Monitor] | None
    waits_for: str | None = None


INVARIANTS: Final[dict[str, Invariant]] = {
    invariant.id: invariant
    for invariant in (
        Invariant(
            "S1", "page-lifetime", "safety",
            "A page is never handed to a new owner while a posted write on it is not proven terminal.",
            PageLifetime,
        ),
        Invariant(
            "S2", "generation", "safety",
            "Every message, timer and completion acts only on the incarnation that caused it.",
            Generation,
        ),
        Invariant(
            "S3", "sticky-terminal", "safety",
            "After Success or Failed no event changes a room's state; states never move backwards.",
            StickyTerminal,
        ),
        Invariant(
            "S4", "no-resurrection", "safety",
            "After a room is cleared nothing re-creates its state unless a new incarnation is opened.",
            NoResurrection,
        ),
        Invariant(
            "S5", "complete-success", "safety",
            "Decode commits a request only if every expected page of it landed and the aux row is its own.",
            CompleteSuccess,
        ),
        Invariant(
            "S6", "right-peer", "safety",
            "The prefill rank that decode talks to is the one that runs the request, in its current life.",
            RightPeer,
        ),
        Invariant(
            "S7", "rank-agreement", "safety",
            "Ranks of one group apply the same ordered decisions and enter the same collectives.",
            RankAgreement,
        ),
        Invariant(
            "S8", "conservation", "safety",
            "Free plus held pages are the total of every pool; every holder releases exactly once.",
            Conservation,
        ),
        Invariant(
            "S9", "truthful-result", "safety",
            "A client sees success only if both sides succeeded, and else a cause that was really seen.",
            TruthfulResult,
        ),
        Invariant(
            "S10", "containment", "safety",
            "One request's error or one bad message changes no other request and stops no loop.",
            Containment,
        ),
        Invariant(
            "S11", "producer-ready", "safety",
            "The transport reads a chunk only after the computation that writes it has finished.",
            ProducerReady,
        ),
        Invariant(
            "S12", "room-unique", "safety",
            "At most one incarnation of a room is live on a node; a second one is rejected.",
            RoomUnique,
        ),
        Invariant(
            "L1", "bounded-end", "liveness",
            "Every admitted request ends on every rank of both sides within a stated bound.",
            BoundedEnd,
        ),
        Invariant(
            "L2", "propagate", "liveness",
            "If one side turns Failed and the link is up, the other side ends soon, not at its own timeout.",
            Propagate,
        ),
        Invariant(
            "L3", "no-cycle", "liveness",
            "No cycle of waits for pages, slots, credits or messages is broken only by a long timer.",
            None,
            "optimistic prefill: a prefill that holds pages before decode has admitted the request; without "
            "it prefill never holds pages while it waits for decode memory, so no cycle can close",
        ),
        Invariant(
            "L4", "recover", "liveness",
            "After faults have stopped and restarts are done, new requests succeed within a bound.",
            Recover,
        ),
        Invariant(
            "L5", "reaper-free", "liveness",
            "Cleanup needs no new work, not what it frees, and no unexpired entry out of its way.",
            ReaperFree,
        ),
        Invariant(
            "L6", "non-blocking", "liveness",
            "One scheduler step has a bounded duration whatever a peer does.",
            NonBlocking,
        ),
        Invariant(
            "L7", "honest-timer", "liveness",
            "A deadline starts only when the peer that it accuses could have acted.",
            HonestTimer,
        ),
        Invariant(
            "R1", "quiesce-zero", "leak",
            "Without traffic all per-room tables, queues, slots and pages are back at zero on every rank.",
            QuiesceZero,
        ),
        Invariant(
            "R2", "bounded-maps", "leak",
            "Orphan or hostile input cannot make per-room state grow without bound.",
            BoundedMaps,
        ),
        Invariant(
            "R3", "retry-budget", "leak",
            "Repeated control-plane requests stay under a stated rate in every fault.",
            RetryBudget,
        ),
        Invariant(
            "O1", "metric-truth", "observability",
            "Gauges of an idle node are zero, and gauges say what was counted.",
            MetricTruth,
        ),
        Invariant(
            "O2", "health-truth", "observability",
            "Health is not OK while no request can finish.",
            HealthTruth,
        ),
    )
}  # fmt: skip
"""Every invariant by its id."""


# ----------------------------------------------------------------------------------------------------
# Watching
# ----------------------------------------------------------------------------------------------------


class Watch:
    """Monitors at work on a stream.

    violations: in the order in which they were found, the first one of each (invariant, pair, node) and at
    most ``RECORDED`` of an invariant; these are also emitted on the stream when somebody listens. counts: all
    of them, by invariant. first: the first of each invariant.

    Whoever emits events calls ``advance(t)`` before those of time t, and ``finish(t)`` at the end; then
    recorded violations are in order of time, even those found at a deadline.
    """

    def __init__(self, stream: Stream, bounds: Bounds, only: Iterable[str] | None = None) -> None:
        """Subscribe the monitors of all invariants, or of ``only``. Raises InvariantError for a wrong id."""
        self.violations: list[Violated] = []
        self.counts: dict[str, int] = {}
        self.first: dict[str, Violated] = {}
        self.monitors: dict[str, Monitor] = {}
        self._stream = stream
        self._due = math.inf
        self._known: dict[str, set[tuple[Pair | None, str]]] = {}
        self._held: list[Violated] | None = None
        for invariant in _chosen(only):
            if invariant.monitor is not None:
                self._place(invariant.id, invariant.monitor(bounds, self._take, self._wake))

    def _place(self, invariant_id: str, monitor: Monitor) -> None:
        self.monitors[invariant_id] = monitor
        for event_type, name in monitor.handles.items():
            self._stream.subscribe(event_type, getattr(monitor, name))

    def _wake(self, due: float) -> None:
        if due < self._due:
            self._due = due

    def advance(self, t: float) -> None:
        """Time has come to ``t`` (seconds): judge each bound that it has passed. Cheap when there is none."""
        if t > self._due:
            self._in_order(t, [monitor.advance for monitor in self.monitors.values() if monitor.due < t])

    def finish(self, t: float) -> None:
        """The trace is over at ``t``: judge what was due by then. What was due later is not judged."""
        self._in_order(t, [monitor.finish for monitor in self.monitors.values()])

    def _in_order(self, t: float, judges: list[Callable[[float], None]]) -> None:
        """Several monitors may find old debts at once: record them as they fell due."""
        self._held = []
        for judge_until in judges:
            judge_until(t)
        held, self._held = self._held, None
        self._due = min((monitor.due for monitor in self.monitors.values()), default=math.inf)
        for violated in sorted(held, key=lambda violated: violated.t):
            self._take(violated)

    def _take(self, violated: Violated) -> None:
        if self._held is not None:
            self._held.append(violated)
            return
        invariant = violated.invariant
        self.counts[invariant] = self.counts.get(invariant, 0) + 1
        self.first.setdefault(invariant, violated)
        known = self._known.setdefault(invariant, set())
        key = (violated.pair, violated.node)
        if key in known or len(known) >= RECORDED:
            return
        known.add(key)
        self.violations.append(violated)
        if self._stream.wants(Violated):
            self._stream.emit(violated)


def _chosen(only: Iterable[str] | None) -> list[Invariant]:
    if only is None:
        return list(INVARIANTS.values())
    wanted = set(only)
    for name in sorted(wanted - INVARIANTS.keys()):
        mend = _nearest(name.upper(), INVARIANTS) or f"; there are {', '.join(INVARIANTS)}"
        raise InvariantError(f"{name!r} is not an invariant{mend}")
    return [invariant for invariant in INVARIANTS.values() if invariant.id in wanted]


def judge(events: Iterable[Any], bounds: Bounds, only: Iterable[str] | None = None) -> Watch:
    """Watch a whole trace, its events in order of time. Returns the finished Watch."""
    stream = Stream()
    watch = Watch(stream, bounds, only)
    t = 0.0
    for event in events:
        t = event.t
        watch.advance(t)
        stream.emit(event)
    watch.finish(t)
    return watch
