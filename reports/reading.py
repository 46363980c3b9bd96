"""One request as values: which states, arrows, faults and marks its trace holds, and on which lanes.

Nothing is drawn here, and nothing is judged: what is violated is what the trace says is violated.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from kvpoll.reports import style
from kvpoll.reports.style import Warp, clock, warp
from kvpoll.spec import trace
from kvpoll.spec.trace import Pair


class Bar(NamedTuple):
    """A stretch of time in one state. machine: "poll" or "lease". begin_s = end_s for a passing state."""

    node: str
    machine: str
    state: str
    begin_s: float
    end_s: float


class Arrow(NamedTuple):
    """Something on its way. kind: "message", "request" (HTTP, there and back) or "write".

    outcome: "arrived", "lost", "failed" or "pending" (the trace ends first; end_s is then the trace's end).
    own: False for another try at the same room, or for a write of somebody else into this request's pages.
    """

    kind: str
    label: str
    source: str
    target: str
    begin_s: float
    end_s: float
    outcome: str
    own: bool = True


class Fault(NamedTuple):
    """An injected fault: the lanes it struck, the lanes it cut off, and when, within the window."""

    kind: str
    node: str
    struck: tuple[str, ...]
    severed: tuple[str, ...]
    begin_s: float
    end_s: float


class Mark(NamedTuple):
    """A point on a lane. label: what a line of text below the panel says of it, or nothing."""

    kind: str
    node: str
    at_s: float
    label: str = ""


class Beat(NamedTuple):
    """A collective that a rank entered. agrees: kind and shape are the same on every rank that entered it."""

    node: str
    at_s: float
    agrees: bool


class Story(NamedTuple):
    """All that one panel draws. violations: Violated events of the pair, and of nobody in particular."""

    pair: Pair | None
    begin_s: float
    end_s: float
    lanes: tuple[str, ...]
    bars: list[Bar]
    arrows: list[Arrow]
    faults: list[Fault]
    marks: list[Mark]
    beats: list[Beat]
    violations: list[Any]
    healed_s: float | None

    @property
    def anchors(self) -> list[float]:
        """Times that deserve room on the axis; not collectives, for a poll loop beats all through a wait."""
        times = [self.begin_s, self.end_s]
        times += [t for bar in self.bars for t in (bar.begin_s, bar.end_s)]
        times += [t for arrow in self.arrows for t in (arrow.begin_s, arrow.end_s)]
        times += [t for fault in self.faults for t in (fault.begin_s, fault.end_s)]
        times += [mark.at_s for mark in self.marks] + [event.t for event in self.violations]
        times += [self.healed_s] if self.healed_s is not None else []
        return sorted({min(max(t, self.begin_s), self.end_s) for t in times})


NOBODY: Final[Pair] = (-1, -1)
"""The request that a trace without requests is drawn for."""

REQUESTS_LIMIT: Final = 24
"""HTTP requests drawn one by one; beyond that, a heartbeat is shown by its first and last try."""


def pair_of(event: Any) -> Pair | None:
    """The (room, attempt) that an event concerns, or None."""
    incarnation = getattr(event, "incarnation", None)
    return incarnation.pair if incarnation is not None else getattr(event, "pair", None)


def pick_focus(events: Iterable[Any]) -> Pair | None:
    """The pair of the first violation that has one, else of the first request, else None."""
    first = None
    for event in events:
        pair = pair_of(event)
        if isinstance(event, trace.Violated) and pair is not None:
            return pair
        first = first or pair
    return first


def bars(events: Sequence[Any], pair: Pair) -> list[Bar]:
    """Poll and lease states of ``pair`` on every rank, each with the time it lasted, in order of their end.

    A state open at the end of the trace lasts until the last event; a process that stops takes its states
    along. A state that was there before the first step seen began with the trace.
    """
    begin_s, end_s = (events[0].t, events[-1].t) if events else (0.0, 0.0)
    current: dict[tuple[str, str], tuple[str, float]] = {}
    done: list[Bar] = []

    def close(key: tuple[str, str], t: float) -> None:
        state, since = current.pop(key)
        done.append(Bar(*key, state, since, t))

    for event in events:
        if isinstance(event, trace.NodeStopped):
            for key in [key for key in current if _within(key[0], event.node)]:
                close(key, event.t)
        if not isinstance(event, trace.Stepped) or event.incarnation.pair != pair:
            continue
        for machine in ("poll", "lease"):
            key = (event.node, machine)
            before, after = getattr(event, f"{machine}_before"), getattr(event, f"{machine}_after")
            current.setdefault(key, (before, begin_s))
            if after != current[key][0]:
                close(key, event.t)
                current[key] = (after, event.t)
    for key in list(current):
        close(key, end_s)
    return [bar for bar in done if look_of(bar) is not None]


def look_of(bar: Bar) -> style.Look | None:
    """The look of a bar's state; None for a state that is drawn as nothing."""
    return style.poll_look(bar.state) if bar.machine == "poll" else style.lease_look(bar.state)


def arrows(events: Sequence[Any], pair: Pair) -> list[Arrow]:
    """Messages, HTTP requests and writes that concern ``pair``, in order of departure.

    Messages are matched by serial (a duplicate arrives twice), writes by number, HTTP answers by (node,
    server, route) in order. HTTP requests name no pair: all of them are returned.
    """
    end_s = events[-1].t if events else 0.0
    found = [*_messages(events, pair, end_s), *_requests(events, end_s), *_writes(events, pair, end_s)]
    return sorted(found, key=lambda arrow: (arrow.begin_s, arrow.end_s))


def _messages(events: Sequence[Any], pair: Pair, end_s: float) -> Iterator[Arrow]:
    sent: dict[int, Any] = {}
    ended: set[int] = set()
    for event in events:
        if isinstance(event, trace.Sent) and event.incarnation.room == pair[0]:
            sent[event.serial] = event
        elif isinstance(event, trace.Delivered | trace.Lost) and event.serial in sent:
            outcome = "arrived" if isinstance(event, trace.Delivered) else "lost"
            ended.add(event.serial)
            yield _message(sent[event.serial], pair, event.t, outcome)
    for serial, event in sent.items():
        if serial not in ended:
            yield _message(event, pair, end_s, "pending")


def _message(sent: Any, pair: Pair, end_s: float, outcome: str) -> Arrow:
    own = sent.incarnation.pair == pair
    label = sent.message if own else f"{sent.message} (attempt {sent.incarnation.attempt})"
    return Arrow("message", label, sent.node, sent.to, sent.t, end_s, outcome, own)


def _requests(events: Sequence[Any], end_s: float) -> Iterator[Arrow]:
    waiting: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for event in events:
        if isinstance(event, trace.Requested):
            waiting[event.node, event.server, event.route].append(event)
        elif isinstance(event, trace.Answered) and waiting[event.node, event.server, event.route]:
            asked = waiting[event.node, event.server, event.route].pop(0)
            outcome = "lost" if isinstance(event.status, str) else "arrived"
            if isinstance(event.status, int) and event.status >= 400:
                outcome = "failed"
            label = f"{event.route} {event.status}"
            yield Arrow("request", label, event.node, event.server, asked.t, event.t, outcome)
    for (node, server, route), left in waiting.items():
        for asked in left:
            yield Arrow("request", f"{route} unanswered", node, server, asked.t, end_s, "pending")


def _writes(events: Sequence[Any], pair: Pair, end_s: float) -> Iterator[Arrow]:
    ends: dict[int, tuple[float, str]] = {}
    landed: set[int] = set()
    for event in events:
        if isinstance(event, trace.WriteLanded):
            ends[event.write] = (event.t, "arrived")
            landed.add(event.write)
        elif isinstance(event, trace.WriteSettled) and (not event.ok or event.write not in landed):
            ends[event.write] = (event.t, "arrived" if event.ok else "failed")
    holds = _holds(events, pair, end_s)
    for event in events:
        if isinstance(event, trace.WritePosted):
            end, outcome = ends.get(event.write, (end_s, "pending"))
            if event.incarnation.pair == pair:
                label = f"chunk {event.chunk}, last" if event.last else f"chunk {event.chunk}"
                yield Arrow("write", label, event.node, event.target, event.t, end, outcome)
            elif _trespasses(event, end, holds):
                room = event.incarnation.room
                label = f"write of room {room}" if room != pair[0] else f"write of attempt {event.incarnation.attempt}"
                yield Arrow("write", label, event.node, event.target, event.t, end, outcome, own=False)


class _Hold(NamedTuple):
    node: str
    pages: frozenset[int]
    begin_s: float
    end_s: float


def _holds(events: Sequence[Any], pair: Pair, end_s: float) -> list[_Hold]:
    """When which KV pages belonged to the pair: from Reserved to the Released that gave them all back."""
    open_: dict[str, _Hold] = {}
    closed: list[_Hold] = []
    for event in events:
        if not isinstance(event, trace.Reserved | trace.Released):
            continue
        if event.pool != "kv" or event.incarnation.pair != pair:
            continue
        if isinstance(event, trace.Reserved):
            earlier = open_.get(event.node, _Hold(event.node, frozenset(), event.t, end_s))
            open_[event.node] = earlier._replace(pages=earlier.pages | set(event.pages))
        elif event.node in open_ and open_[event.node].pages <= set(event.pages):
            closed.append(open_.pop(event.node)._replace(end_s=event.t))
    return [*closed, *open_.values()]


def _trespasses(posted: Any, end_s: float, holds: Iterable[_Hold]) -> bool:
    """Was this foreign write under way on pages that the pair held (S1)?"""
    return any(
        hold.node == posted.target
        and not hold.pages.isdisjoint(posted.target_pages)
        and posted.t <= hold.end_s
        and end_s >= hold.begin_s
        for hold in holds
    )


ROLES: Final = {"R": "router", "B": "bootstrap", "P": "prefill", "D": "decode"}


def lane_order(node: str) -> tuple[int, tuple[int | str, ...]]:
    """Sort key of lanes: router, bootstrap servers, prefill ranks, decode ranks; numbers as numbers."""
    rank = "RBPD".find(node[:1]) if node else -1
    pieces = re.split(r"(\d+)", node)
    return (rank if rank >= 0 else 4, tuple(int(p) if p.isdigit() else p for p in pieces))


def lanes(events: Sequence[Any], pair: Pair) -> tuple[str, ...]:
    """Nodes that took part in the request, top to bottom.

    So do the bootstrap servers that they called, and whoever wrote into the request's pages (S1).
    """
    nodes: set[str] = set()
    for event in events:
        if pair_of(event) != pair or isinstance(event, trace.Violated):
            continue
        nodes.add(event.node)
        if isinstance(event, trace.Admitted):
            nodes.update(event.prefill, event.decode)
        nodes.update(getattr(event, name) for name in ("to", "sender", "target", "peer") if hasattr(event, name))
    nodes.update(e.server for e in events if isinstance(e, trace.Requested) and e.node in nodes)
    nodes.update(arrow.source for arrow in _writes(events, pair, events[-1].t if events else 0.0))
    engines = {node.split("/")[0][1:] for node in nodes}
    nodes.update(
        e.node for e in events if isinstance(e, trace.FaultBegan) and e.node.startswith("B") and e.node[1:] in engines
    )
    return tuple(sorted(nodes, key=lane_order))


def _everybody(events: Sequence[Any]) -> tuple[str, ...]:
    """All processes that a trace without a request tells of, and those that they called."""
    nodes = {event.node for event in events if isinstance(event, trace.NodeStarted | trace.Requested)}
    nodes.update(event.server for event in events if isinstance(event, trace.Requested))
    return tuple(sorted(nodes, key=lane_order))


def story(events: Sequence[Any], focus: Pair | None = None) -> Story:
    """Everything that a panel draws of one request; of all nodes, where the trace has no request."""
    pair = focus if focus is not None else pick_focus(events)
    if not events:
        return Story(pair, 0.0, 1.0, (), [], [], [], [], [], [], None)
    taking_part = lanes(events, pair) if pair is not None else _everybody(events)
    pair = pair or NOBODY
    drawn = [arrow for arrow in arrows(events, pair) if arrow.source in taking_part and arrow.target in taking_part]
    violations = [e for e in events if isinstance(e, trace.Violated) and e.pair in (pair, None)]
    begin_s, end_s = _window(events, pair, drawn, violations)
    drawn = _thinned([arrow for arrow in drawn if arrow.begin_s <= end_s and arrow.end_s >= begin_s])
    clipped = [arrow._replace(end_s=min(arrow.end_s, end_s)) for arrow in drawn]
    return Story(
        pair, begin_s, end_s, taking_part,
        [bar._replace(end_s=min(bar.end_s, end_s)) for bar in bars(events, pair) if bar.begin_s <= end_s],
        clipped,
        _faults(events, taking_part, begin_s, end_s),
        _marks(events, pair, taking_part, begin_s, end_s),
        _beats(events, taking_part, begin_s, end_s),
        violations,
        next((e.t for e in events if isinstance(e, trace.Healed) and begin_s <= e.t <= end_s), None),
    )  # fmt: skip


def _window(
    events: Sequence[Any], pair: Pair, drawn: Sequence[Arrow], violations: Sequence[Any]
) -> tuple[float, float]:
    """From the first to the last thing that concerns the request; set-up before it only while it is short."""
    times = [e.t for e in events if pair_of(e) == pair] + [event.t for event in violations]
    begin_s, end_s = min(times, default=events[0].t), max(times, default=events[-1].t)
    settled = [a.end_s for a in drawn if a.kind != "request" and a.own and a.outcome != "pending"]
    end_s = max([end_s, *settled])
    requests = [arrow.begin_s for arrow in drawn if arrow.kind == "request" and arrow.begin_s <= end_s]
    if requests and len(requests) <= REQUESTS_LIMIT:
        begin_s = min(begin_s, min(requests))
    return begin_s, end_s


def _thinned(drawn: list[Arrow]) -> list[Arrow]:
    """At most the first and last of each kind of HTTP request, once there are more than a figure can hold."""
    if sum(arrow.kind == "request" for arrow in drawn) <= REQUESTS_LIMIT:
        return drawn
    alike: dict[tuple[str, str], list[Arrow]] = defaultdict(list)
    for arrow in drawn:
        if arrow.kind == "request":
            alike[arrow.source, arrow.label].append(arrow)
    kept = {id(group[place]) for group in alike.values() for place in (0, -1)}
    return [arrow for arrow in drawn if arrow.kind != "request" or id(arrow) in kept]


def _within(node: str, prefix: str) -> bool:
    return node == prefix or node.startswith(prefix + "/")


def _faults(events: Sequence[Any], taking_part: Sequence[str], begin_s: float, end_s: float) -> list[Fault]:
    ended = {(e.node, e.fault): e.t for e in events if isinstance(e, trace.FaultEnded)}
    found = []
    for event in events:
        if not isinstance(event, trace.FaultBegan) or event.t > end_s:
            continue
        until_s = min(ended.get((event.node, event.fault), end_s), end_s)
        struck = tuple(n for n in taking_part if _within(n, event.node))
        if not struck and not re.match(r"[RBPD]\d*(/|$)", event.node):
            struck = tuple(taking_part)  # a fault of the network as a whole, not of a node
        severed = tuple(n for n in taking_part if any(_within(n, cut) for cut in event.severs))
        if until_s >= begin_s and struck:
            found.append(Fault(event.kind, event.node, struck, severed, max(event.t, begin_s), until_s))
    return found


def _marks(events: Sequence[Any], pair: Pair, taking_part: Sequence[str], begin_s: float, end_s: float) -> list[Mark]:
    rids = {e.rid for e in events if isinstance(e, trace.Admitted) and e.pair == pair}
    found = ((e, _mark(e, pair, rids)) for e in events if begin_s <= e.t <= end_s)
    return [
        Mark(kind_and_label[0], node, event.t, kind_and_label[1])
        for event, kind_and_label in found
        if kind_and_label is not None
        for node in taking_part
        if _within(node, event.node)
    ]


def _mark(event: Any, pair: Pair, rids: set[str]) -> tuple[str, str] | None:
    """Kind and label of the mark that stands for an event, or None. An engine's event marks all its ranks."""
    match event:
        case trace.NodeStopped():
            return "stopped", ""
        case trace.NodeStarted() if event.t > 0:
            return "started", ""
        case trace.LoopStopped():
            return "loop stopped", f"{event.loop} loop stopped: {event.cause}"
        case trace.IllegalFactRaised() if event.incarnation.pair == pair:
            return "illegal fact", f"illegal fact {event.fact} in {event.state}"
        case trace.Committed() if event.incarnation.pair == pair:
            return "decoding starts", ""
        case trace.Admitted() if event.pair == pair:
            return "admitted", ""
        case trace.Resulted() if event.pair == pair:
            told = "" if event.ok else f"client told: {event.cause or 'no cause'}"
            return "answered" if event.ok else "refused", told
        case trace.Decided() if event.rid in rids:
            return "agreed: admit" if event.outcome == "admit" else "agreed: drop", ""
    return None


def _beats(events: Sequence[Any], taking_part: Sequence[str], begin_s: float, end_s: float) -> list[Beat]:
    entered = [e for e in events if isinstance(e, trace.CollectiveEntered) and e.node in taking_part]
    forms: dict[tuple[str, int], set[str]] = defaultdict(set)
    for event in entered:
        forms[event.group, event.sequence].add(repr((event.kind, event.shape)))
    return [
        Beat(event.node, event.t, len(forms[event.group, event.sequence]) == 1)
        for event in entered
        if begin_s <= event.t <= end_s
    ]


# --- the time axes of a figure --------------------------------------------------------------------

_SHARED_LEAST: Final = 0.45
"""A common axis is worth it while every panel uses at least this share of it."""


def axes_of(stories: Sequence[Story]) -> list[Warp]:
    """One warp a panel; the same one for all of them unless that would leave a panel mostly empty."""
    joint = warp(t for told in stories for t in told.anchors)
    if all(joint(told.end_s) - joint(told.begin_s) >= _SHARED_LEAST for told in stories):
        return [joint] * len(stories)
    return [warp(told.anchors) for told in stories]


def findings(told: Story, most: int = 6) -> list[str]:
    """The violations in words, alike ones counted, not repeated; at most ``most``, then how many more."""
    first: dict[tuple[str, str], Any] = {}
    count: dict[tuple[str, str], int] = defaultdict(int)
    for event in told.violations:
        key = (event.invariant, event.node)
        first.setdefault(key, event)
        count[key] += 1
    lines = [
        f"{event.invariant} at {clock(event.t, 0.001)} s, {event.node}: {event.text}"
        + (f" (and {count[key] - 1} more)" if count[key] > 1 else "")
        for key, event in first.items()
    ]
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]
