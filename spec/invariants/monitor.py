"""What all monitors share: handlers found by name, deadlines, bounded memory, dead processes excused."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeVar

from kvpoll.spec.source import nearest
from kvpoll.spec.trace import EVENTS, NodeStarted, NodeStopped, Pair, Stepped, Violated
from kvpoll.spec.vocabulary import POLL_NUMBERS, TERMINAL_POLLS

LIVE_POLLS: Final[frozenset[str]] = frozenset(POLL_NUMBERS) - TERMINAL_POLLS
"""The numbered polls from which a room still has to come to an end."""

GONE: Final[frozenset[str]] = frozenset({"Absent", "Retired"})
"""Room states in which a node holds nothing that could act for the room."""

OPENING: Final = "RequestOpened"
"""The one fact by which an owner takes a room; every other fact finds a room or leaves it without owner."""

PAUSE: Final = "pause"
"""Kind of the fault that makes the processes of a node stand still (SIGSTOP) and go on later."""

REMEMBERED: Final = 16_384
"""How many past requests a monitor remembers where it must recognise something that comes late."""


class Bounds(NamedTuple):
    """The bounds that the invariants name, chosen by the caller.

    end_s: every admitted request has ended on every rank (L1). propagate_s: a failure has reached the other
    side (L2), a wrong peer is found out (S6). recover_s: a request admitted after the faults has succeeded
    (L4). step_s: longest wait of one scheduler step (L6). repeats_per_s: repeated HTTP requests of one node
    in any second (R3). ownerless_s, ownerless_rooms: how long, and how many at once, rooms may exist that
    nobody opened (R2).
    """

    end_s: float
    propagate_s: float
    recover_s: float
    step_s: float
    repeats_per_s: float
    ownerless_s: float
    ownerless_rooms: int


def _handler_name(event_name: str) -> str:
    return "on_" + re.sub(r"(?<!^)(?=[A-Z])", "_", event_name).lower()


_EVENT_OF_HANDLER: Final[dict[str, type[Any]]] = {_handler_name(name): cls for name, cls in EVENTS.items()}


class Monitor:
    """Judges one invariant; the subclass's docstring is its exact statement.

    A method ``on_write_posted(event)`` handles WritePosted, and so on; ``begin`` sets up their state.

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
                raise TypeError(f"{cls.__name__}.{name} handles no event{nearest(name, _EVENT_OF_HANDLER)}")
        cls.handles = {_EVENT_OF_HANDLER[name]: name for name in names}

    def __init__(self, bounds: Bounds, report: Callable[[Violated], None], wake: Callable[[float], None]) -> None:
        """report: takes each violation. wake: is told when ``due`` has become earlier."""
        self.bounds = bounds
        self._report = report
        self._wake = wake
        self.begin()

    def begin(self) -> None:
        """Set up the monitor's own state."""

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

    def __init__(self, *arguments: Any) -> None:
        self._deadlines: deque[tuple[float, Any]] = deque()
        super().__init__(*arguments)

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


class MortalMonitor(Monitor):
    """A monitor that knows which nodes died, and when: nothing is expected from a stopped process."""

    def __init__(self, *arguments: Any) -> None:
        self._down: set[str] = set()
        self._stopped_at: dict[str, float] = {}
        super().__init__(*arguments)

    def on_node_stopped(self, event: NodeStopped) -> None:
        """Nothing is expected from it."""
        self._down.add(event.node)
        self._stopped_at[event.node] = event.t

    def on_node_started(self, event: NodeStarted) -> None:
        """Later requests count on it again."""
        self._down.discard(event.node)

    def excuse(self, node: str, since: float) -> bool:
        """Is ``node`` down, or has it died at or after ``since``?"""
        return node in self._down or self._stopped_at.get(node, -math.inf) >= since


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


def ends(step: Stepped) -> bool:
    """Does this change of poll end the room: Success, Failed, Retired, or Absent once it was opened?"""
    after = step.poll_after
    if after == "Absent":
        return step.poll_before in POLL_NUMBERS
    return after not in LIVE_POLLS and after != "Announced"


def said(pair: Pair) -> str:
    """How texts name a pair."""
    return f"room {pair[0]} (attempt {pair[1]})"


def matches(prefix: str, node: str) -> bool:
    """Is ``prefix`` a prefix of the node's name? ``*`` is one of all; P1 is none of P10."""
    if prefix == "*":
        return True
    rest = node[len(prefix) :]
    return node.startswith(prefix) and not (prefix[-1:].isdigit() and rest[:1].isdigit())
