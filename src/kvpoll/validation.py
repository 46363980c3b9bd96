"""One validation: a trace read once from beginning to end, judged by a profile's machines and by the invariants.

``validate`` reads either format, line by line. Nothing of the trace is kept but the rooms that live, the bounded
memories of the monitors, and what was found: the first event of each kind of departure, the first violation of each
invariant, and counts of all others.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from kvpoll.spec import trace
from kvpoll.spec.invariants import Watch
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.sglang_trace import read_line
from kvpoll.spec.source import BadInput, nearest
from kvpoll.spec.trace import EVENTS, Stream, TraceError, Violated
from kvpoll.statemachine.judge import Change, Finding, RoomJudge, SglangJudge, Told
from kvpoll.trace_lines import READING_ERRORS, complain, decoder

FORMATS: Final = ("auto", "kvpoll", "sglang")
SGLANG: Final = "sglang-0.5.23"
"""The profile that an SGLang trace is judged by unless told otherwise."""

OWN_WORD: Final[dict[str, list[Any]]] = {"Violated": []}
"""What a recorded run said of itself is not evidence; nobody hears it."""

ONE_RANK: Final = frozenset({"S2", "S3", "S4", "S8", "S10", "S12", "L5", "L6", "R1", "R2", "R3", "O1", "O2"})
"""Invariants that the events of one rank decide. The others compare ranks, and need the trace of all of them."""

TICK: Final = 1 << 16
"""Lines between two calls of ``progress``."""


class Broken(NamedTuple):
    """The first violation of an invariant: the line at which it was found, the event there, what came before.

    event: None where no step but the time that passed broke it. context: earlier events of its room on its node.
    """

    line: int
    violated: Violated
    event: str | None = None
    context: tuple[Told, ...] = ()


@dataclass
class Departure:
    """Events that depart from the profile in the same way: the first of them, and how many there were."""

    first: Finding
    times: int = 1


@dataclass
class Verdict:
    """What came of a validation.

    departures: by the rules that would have to be set otherwise, in order of first appearance; the key () holds the
    events that no choice of rules explains. broken: first violation of each invariant. counts: violations by
    invariant. lines: read, from 1. steps: of room machines that were judged. open: (node, room, poll) that an SGLang
    table still shows at the end. notes: what the reader should know of how the trace was judged.
    """

    format: str
    profile: str
    lines: int = 0
    steps: int = 0
    departures: dict[tuple[Change, ...], Departure] = field(default_factory=dict)
    broken: dict[str, Broken] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    open: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def first(self) -> Finding | None:
        """The first event that the profile does not explain."""
        found = [departure.first for departure in self.departures.values()]
        return min(found, key=lambda finding: finding.line, default=None)

    @property
    def unexplained(self) -> int:
        """How many events the profile does not explain."""
        return sum(departure.times for departure in self.departures.values())

    @property
    def holds(self) -> bool:
        """Is everything explained and nothing broken?"""
        return not self.departures and not self.broken


class Enough(Exception):
    """As many findings as were asked for."""


@dataclass
class Asked:
    """How a trace is to be judged. ``profile`` None: that of the trace. ``only`` None: every invariant.

    part: the trace holds some of the ranks only, so only ONE_RANK is judged. news_only: it leaves out steps that
    move nothing to be seen. findings_max: stop after so many (0: never).
    """

    profile: str | None = None
    format: str = "auto"
    news_only: bool = False
    part: bool = False
    only: tuple[str, ...] | None = None
    findings_max: int = 0


class Trial:
    """A validation under way. Lines come from ``lines``; ``name`` is what errors call the trace."""

    def __init__(self, protocol: Protocol, asked: Asked, lines: Iterator[bytes], name: str) -> None:
        self.protocol = protocol
        self.asked = asked
        self.name = name
        first, number, before = _first_line(lines, name)
        self._lines, self._number = lines, number
        self.format = _format(first, f"{name}:{number}") if asked.format == "auto" else asked.format
        self.header: dict[str, Any] = {}
        if self.format == "kvpoll":
            self.header = trace.read_header(before, f"{name}:{number}")
        else:
            self._lines, self._number = itertools.chain([before.encode()], lines), number - 1
        self.profile = self._profile()
        self.verdict = Verdict(self.format, self.profile.name, lines=self._number)
        self._line = self._number
        self._by_rows: dict[str, int] = {}
        self._current: Any = None
        self._stream = Stream()
        self._stream.subscribe(Violated, self._violated)
        self._part = asked.part or self.header.get("part") is True
        self._only = asked.only
        if self._part:
            self._only = tuple(sorted(ONE_RANK if asked.only is None else ONE_RANK & set(asked.only)))
        self._watch = Watch(self._stream, protocol.bounds, self._only)
        self.judge: RoomJudge | SglangJudge
        if self.format == "kvpoll":
            self._news = asked.news_only or self.header.get("steps") == "news"
            self.judge = RoomJudge(protocol, self.profile, self._news)
        else:
            self.judge = SglangJudge(protocol, self.profile, self._tell)

    def _profile(self) -> Profile:
        """The profile that was asked for, or the one that the trace was recorded under."""
        if self.asked.profile is not None:
            return _labelled(self.protocol, self.asked.profile, "--profile")
        if self.format == "sglang":
            return self.protocol.profile(SGLANG)
        label = self.header.get("profile")
        if not isinstance(label, str):
            raise BadInput(f"{self.name}:1: the header names no profile; add --profile NAME")
        return _labelled(self.protocol, label, f"{self.name}:1")

    def __call__(self, progress: Callable[[], None] = lambda: None) -> Verdict:
        """Read to the end, or to as many findings as were asked for. Raises BadInput at a line that is no event.

        An interrupt ends it early; the verdict then says that it is not complete.
        """
        verdict = self.verdict
        try:
            if isinstance(self.judge, RoomJudge):
                self._judge_ours(self.judge, progress)
            else:
                self._judge_sglang(self.judge, progress)
        except READING_ERRORS as error:
            where = f"{self.name}:{self._line + 1}"
            raise TraceError(f"{where}: cannot be read on: {error}; the file may be cut off") from None
        except Enough:
            verdict.complete = False
            verdict.notes.append(f"stopped at line {self._line:,}: as many findings as were asked for")
        except KeyboardInterrupt:
            verdict.complete = False
            verdict.notes.append(f"interrupted at line {self._line:,}")
        for name in verdict.broken:
            verdict.counts[name] = max(self._watch.counts.get(name, 0), self._by_rows.get(name, 0))
        verdict.lines = self._line
        return verdict

    # -- what is found

    def _violated(self, violated: Violated) -> None:
        if self._only is None or violated.invariant in self._only:
            self._by_rows[violated.invariant] = self._by_rows.get(violated.invariant, 0) + 1
            if violated.invariant not in self.verdict.broken:
                number = None if violated.pair is None else violated.pair[0]
                context = () if number is None else self.judge.context(violated.node, number)
                event = None if self._current is None else self.judge.told(self._current)
                self.verdict.broken[violated.invariant] = Broken(self._line, violated, event, context)
            self._count()

    def _found(self, finding: Finding) -> None:
        """Keep the first departure of its kind; invariants that broke at the same event are its invariants too."""
        known = self.verdict.departures.get(finding.changes)
        if known is not None:
            known.times += 1
        else:
            here = [name for name, broken in self.verdict.broken.items() if broken.line == finding.line]
            concerned = tuple(dict.fromkeys((*finding.invariants, *here)))
            self.verdict.departures[finding.changes] = Departure(dataclasses.replace(finding, invariants=concerned))
        self._count()

    def _count(self) -> None:
        found = self.verdict.unexplained + len(self.verdict.broken)
        if 0 < self.asked.findings_max <= found:
            raise Enough

    # -- our traces

    def _judge_ours(self, judge: RoomJudge, progress: Callable[[], None]) -> None:
        name, decode, watch = self.name, decoder(), self._watch
        heard = _ByType({kind: self._stream.observers[event_type] for kind, event_type in EVENTS.items()} | OWN_WORD)
        judged = _ByType(self._judged(judge))
        last = t = float("-inf")
        for number, line in enumerate(self._lines, start=self._number + 1):
            try:
                event = decode(line)
            except ValueError as error:
                if not line.strip():
                    continue
                raise complain(line, f"{name}:{number}", error) from None
            t = event.t
            if t < last:
                raise TraceError(
                    f"{name}:{number}: time {float(t)} is before {float(last)}; a trace is in order of time"
                )
            last = t
            self._line = number
            if t > watch.due:
                self._current = None
                watch.advance(t)
            self._current = event
            kind = event.__class__
            for hear in heard[kind]:
                hear(event)
            take = judged[kind]
            if take is not None:
                finding = take(number, event)
                if finding is not None:
                    self._found(finding)
            if not number % TICK:
                progress()
        self._current = None
        if t > float("-inf"):
            watch.finish(t)
        self._note_how(judge)

    def _note_how(self, judge: RoomJudge) -> None:
        """What the reader should know of how the trace was judged."""
        self.verdict.steps = judge.steps
        notes = self.verdict.notes
        if self._news:
            notes.append("only news was recorded: what a room did not show was taken as it suits")
        if self._part:
            notes.append("the trace holds some of the ranks only: invariants that compare ranks were not judged")
        if judge.taken_up:
            notes.append(f"{judge.taken_up:,} rooms were under way when the trace began")
        if self.header.get("spec") not in (None, self.protocol.digest):
            notes.append("the trace was recorded under another kvpoll.toml")

    def _judged(self, judge: RoomJudge) -> dict[str, Any]:
        """What is judged, by name of the event; None: only the monitors hear of it."""
        judged: dict[str, Any] = dict.fromkeys(EVENTS)
        judged |= {
            "Stepped": judge.stepped,
            "IllegalFactRaised": judge.illegal_fact_raised,
            "LoopStopped": judge.loop_stopped,
            "NodeStarted": lambda line, event: judge.node_started(event),
            "NodeStopped": lambda line, event: judge.node_stopped(event),
        }
        unmodelled = self.header.get("not_machines", [])
        if not isinstance(unmodelled, list) or not all(isinstance(node, str) for node in unmodelled):
            raise BadInput(f"{self.name}:1: 'not_machines' is a list of node names")
        if unmodelled:
            for kind in ("Stepped", "IllegalFactRaised"):
                judged[kind] = _except_for(unmodelled, judged[kind])
        return judged

    # -- traces of SGLang

    def _judge_sglang(self, judge: SglangJudge, progress: Callable[[], None]) -> None:
        last = -1
        for number, line in enumerate(self._lines, start=self._number + 1):
            if not line.strip():
                continue
            where = f"{self.name}:{number}"
            event = read_line(line, where)
            if event.seq <= last:
                raise TraceError(f"{where}: seq {event.seq} comes after {last}; a trace is in order of seq")
            last = event.seq
            self._line, self._current = number, event
            for finding in judge.offer(number, event):
                self._found(finding)
            if not number % TICK:
                progress()
        self._current = None
        self._watch.finish(judge.seconds)
        verdict = self.verdict
        verdict.steps, verdict.open = judge.steps, judge.left_open()
        verdict.notes += [f"{kind} are not in the trace, and were taken on trust" for kind in sorted(judge.trusting)]
        if judge.missing:
            verdict.notes.append(f"{judge.missing:,} events are missing from the trace (seq has gaps)")

    def _tell(self, event: Any) -> None:
        if event.t > self._watch.due:
            self._watch.advance(event.t)
        self._stream.emit(event)


class _ByType(dict[type[Any], Any]):
    """What belongs to an event, by its class; filled from a table by name as classes are seen."""

    def __init__(self, by_name: dict[str, Any]) -> None:
        super().__init__()
        self._by_name = by_name

    def __missing__(self, kind: type[Any]) -> Any:
        found = self[kind] = self._by_name[kind.__name__]
        return found


def _except_for(nodes: list[str], judge: Callable[[int, Any], Finding | None]) -> Callable[[int, Any], Finding | None]:
    return lambda line, event: None if event.node in nodes else judge(line, event)


def _first_line(lines: Iterator[bytes], name: str) -> tuple[dict[str, Any], int, str]:
    """The object in the first line that is not blank, its number and its text. Raises TraceError."""
    number = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = line.decode()
            first = json.loads(text)
        except (ValueError, RecursionError):
            raise TraceError(f"{name}:{number}: not a JSON object; a trace has one a line") from None
        if not isinstance(first, dict):
            raise TraceError(f"{name}:{number}: not a JSON object; a trace has one a line")
        return first, number, text
    raise TraceError(f"{name}:{number + 1}: the trace is empty")


def _format(first: dict[str, Any], where: str) -> str:
    if "kvpoll_trace" in first:
        return "kvpoll"
    if "ev" in first and "seq" in first:
        return "sglang"
    raise TraceError(
        f'{where}: neither a kvpoll trace (a header line {{"kvpoll_trace": 1, ...}}) nor one of SGLang '
        '(lines with "seq" and "ev"); see docs/validate.md'
    )


def _labelled(protocol: Protocol, label: str, where: str) -> Profile:
    """The profile of a label such as `reference` or `reference+pp_decision=rank0_by_position`. Raises BadInput."""
    name, _, changed = label.partition("+")
    try:
        profile = protocol.profile(name)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    changes: dict[str, Any] = {}
    for part in changed.split(",") if changed else ():
        rule, _, value = part.partition("=")
        known = protocol.rules.get(rule)
        if known is None:
            raise BadInput(f"{where}: unknown rule {rule!r}{nearest(rule, protocol.rules)}")
        if known.kind == "choice" and value not in known.values:
            raise BadInput(f"{where}: rule {rule!r} has no value {value!r}{nearest(value, known.values)}")
        try:
            changes[rule] = value if known.kind == "choice" else float(value)
        except ValueError:
            raise BadInput(f"{where}: rule {rule!r} is a number of {known.unit}, got {value!r}") from None
    return profile.with_rules(changes)
