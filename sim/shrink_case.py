"""Making a failing run small: fewest faults, then fewest departures from in-order delivery, then fewest steps.

A `Judge` asks whether a case still breaks the same invariant, `tiers` are the ways to make it smaller (see `shrink`),
and `size_of` measures how far that came.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kvpoll.sim.faults import Fault
from kvpoll.sim.run import PROBE, PROBE_GAP_S, Enough, Outcome, Progress, Run
from kvpoll.sim.scenario import Expectation, Timing
from kvpoll.sim.scenario_text import FOR_EVER_S, Ask, Case
from kvpoll.sim.shrink import Tier, drop, simplify
from kvpoll.sim.topology import Topology, rank_names
from kvpoll.spec.invariants.monitor import GONE
from kvpoll.spec.protocol import Protocol
from kvpoll.spec.trace import Admitted, Delivered, Pair, Stepped, Stream, Violated
from kvpoll.statemachine.ranks.engine import EngineShape


@dataclass(frozen=True)
class Seen:
    """What a run showed up to the violation that was waited for. unfired: kinds of fault that had done nothing."""

    violated: Violated
    unfired: frozenset[str]
    outcome: Outcome


def look(
    case: Case, protocol: Protocol, wanted: str | None = None, *, first: bool = True, collect: list[Any] | None = None,
    advance: Progress | None = None,
) -> Seen | None:  # fmt: skip
    """Run a case until ``wanted`` breaks (None: any invariant). ``first``: none may break before it.

    None when it does not. Raises KeyboardInterrupt when the run was interrupted.
    """
    found: list[Violated] = []
    others: list[Violated] = []

    def heard(violated: Violated) -> None:
        if found or (first and others):
            return  # the run is about to end; what else breaks at this very moment came later
        (found if wanted in (None, violated.invariant) else others).append(violated)
        if found or first:
            raise Enough

    def listen(stream: Stream) -> None:
        stream.subscribe(Violated, heard)

    run = Run(
        protocol, case.scenario(), case.rules_of(protocol), listen=listen, collect=collect, progress=advance
    )  # fmt: skip
    outcome = run()
    if outcome.interrupted:
        raise KeyboardInterrupt
    return Seen(found[0], frozenset(outcome.unfired), outcome) if found else None


class Judge:
    """The question: does a case still break the invariant? Remembers what it saw of the last case that does."""

    def __init__(self, protocol: Protocol, seen: Seen, *, first: bool = True) -> None:
        self.protocol = protocol
        self.wanted = seen.violated.invariant
        self.first = first
        self.seen = seen

    def __call__(self, case: Case) -> bool:
        """Run it."""
        seen = look(case, self.protocol, self.wanted, first=self.first)
        if seen is None:
            return False
        self.seen = seen
        return True


@dataclass(frozen=True)
class Size:
    """How much there is of a failure, up to the violation.

    departures: messages that overtook one sent to the same node before them, or came twice. steps: facts that
    room machines took. story: those of the violating request alone; where a violation names none, those of the
    requests that had not come to an end everywhere.
    """

    faults: int
    departures: int
    requests: int
    ranks: int
    steps: int
    story: int


def size_of(case: Case, judge: Judge) -> Size:
    """Run a case once more, recorded, and measure it. The case must fail."""
    events: list[Any] = []
    seen = look(case, judge.protocol, judge.wanted, first=judge.first, collect=events)
    assert seen is not None
    steps = [event for event in events if type(event) is Stepped]
    story = {seen.violated.pair} if seen.violated.pair is not None else _unfinished(steps)
    return Size(
        faults=len(case.faults) + sum(ask.leaves_at_s is not None for ask in case.asks),
        departures=_departures([event for event in events if type(event) is Delivered]),
        requests=sum(type(event) is Admitted for event in events),
        ranks=sum(len(list(rank_names(*side))) for side in (("P", case.topology.prefill), ("D", case.topology.decode))),
        steps=len(steps),
        story=sum(step.incarnation.pair in story or step.fact_incarnation.pair in story for step in steps),
    )


def _unfinished(steps: Iterable[Stepped]) -> set[Pair]:
    last = {(step.node, step.incarnation.pair): step.poll_after for step in steps}
    return {pair for (_, pair), poll in last.items() if poll not in GONE}


def _departures(delivered: Sequence[Delivered]) -> int:
    """Seen from the end: a message is out of order when one with a lower number, or itself, still comes."""
    lowest: dict[str, int] = {}
    count = 0
    for event in reversed(delivered):
        still = lowest.get(event.node, event.serial + 1)
        count += still <= event.serial
        lowest[event.node] = min(still, event.serial)
    return count


def expectation_of(case: Case, protocol: Protocol, shows: str) -> Expectation:
    """Run a case to its end and say what a file must expect of it."""
    outcome = Run(protocol, case.scenario(), case.rules_of(protocol))()
    follows = sorted(name for name in outcome.violations if name != shows)
    marks = sorted(mark for mark in outcome.marks if mark.startswith("fault:"))
    shown = (shows,) if shows in outcome.violations else ()
    return Expectation(case.profile, case.label, case.rules, shown, (*shown, *follows), tuple(marks), ())


# ------------------------------------------------------------------------------------------ reductions of a run


def tiers(judge: Judge) -> tuple[Tier[Case], ...]:
    """The reductions of a run, for the judge that will be asked."""
    cut = simplify("what comes after", lambda case: _cut(case, judge.seen.violated.t))
    return (
        Tier(
            "faults",
            (
                cut,
                simplify("what did nothing", lambda case: _fired(case, judge.seen.unfired)),
                drop("faults", lambda case: case.faults, lambda case, kept: dataclasses.replace(case, faults=kept)),
                drop("leaving clients", _leaving, _only_leaving),
                simplify("faults, another seed", lambda case: _reseeded(case, _fewer_faults(case))),
                simplify("faults, other requests", lambda case: chain(*map(_asked_anew, _fewer_faults(case)))),
            ),
        ),
        Tier("departures", (simplify("jitter and skew", _even), simplify("reordering", _in_order))),
        Tier(
            "steps",
            (
                cut,
                simplify("ranks", _fewer_ranks),
                simplify("chance", _certain),
                simplify("probes", _fewer_probes),
                simplify("one request", _asked_anew),
                drop("requests", lambda case: case.asks, lambda case, kept: dataclasses.replace(case, asks=kept)),
                simplify("lengths", _shorter_asks),
                simplify("healed phase", _sooner_healed),
                simplify("durations", _shorter_faults),
                simplify("moments", _sooner),
                simplify("numbers", _rounded),
                simplify("ranks and requests, another seed", lambda case: _reseeded(case, _fewer(case))),
                simplify("seed", lambda case: [dataclasses.replace(case, seed=0)] if case.seed else []),
                simplify("plain cluster", _plain),
            ),
        ),
    )


def _cut(case: Case, t: float) -> Iterator[Case]:
    """Leave out what begins after the violation; exact, since chance is drawn in order of time."""
    end = math.ceil(t * 10 + 1) / 10
    if end < case.timing.hostile_s:
        yield dataclasses.replace(
            case,
            timing=dataclasses.replace(case.timing, hostile_s=end),
            asks=tuple(ask for ask in case.asks if ask.at_s <= t),
            faults=tuple(fault for fault in case.faults if fault.trigger is not None or fault.at_s <= t),
        )


def _fired(case: Case, unfired: frozenset[str]) -> Iterator[Case]:
    kept = tuple(fault for fault in case.faults if fault.kind.name not in unfired)
    if len(kept) < len(case.faults):
        yield dataclasses.replace(case, faults=kept)


def _leaving(case: Case) -> tuple[int, ...]:
    return tuple(number for number, ask in enumerate(case.asks) if ask.leaves_at_s is not None)


def _only_leaving(case: Case, kept: tuple[int, ...]) -> Case:
    asks = tuple(ask if number in kept else ask._replace(leaves_at_s=None) for number, ask in enumerate(case.asks))
    return dataclasses.replace(case, asks=asks)


def _fewer_faults(case: Case) -> Iterator[Case]:
    for place in range(len(case.faults)):
        yield dataclasses.replace(case, faults=(*case.faults[:place], *case.faults[place + 1 :]))
    for place in _leaving(case):
        yield _only_leaving(case, tuple(number for number in _leaving(case) if number != place))


SEEDS = 16
"""How many seeds are tried where a smaller case fails only by luck (which room number is drawn, say)."""


def _reseeded(case: Case, smaller: Iterable[Case]) -> Iterator[Case]:
    """Smaller cases under other chance, when they are so small that it costs little."""
    if len(case.asks) + case.timing.probes <= FEW:
        for each in smaller:
            for seed in range(SEEDS):
                yield dataclasses.replace(each, seed=seed)


# -- departures from order

REORDERING = {
    "delay_messages": {"random": False, "delay_s": 0.0},
    "duplicate_messages": {"share": 0.0},
    "strike_writes": {"late_s": 0.0},
    "slow_rank": {"factor": 1.0},
    "slow_link": {"factor": 1.0},
}
"""Effect -> its parameters that upset order, each with the value at which it upsets none."""

WEAKENINGS = 4
"""How often such a parameter is halved towards its harmless value; further does not make a story clearer."""


def _even(case: Case) -> Iterator[Case]:
    """Every message takes equally long, every rank is equally fast."""
    topology = case.topology
    if topology.jitter and topology.prefill.skew and topology.decode.skew:
        yield _on(case, dataclasses.replace(_level(_level(topology, "prefill"), "decode"), jitter=0.0))
    if topology.jitter:
        yield _on(case, dataclasses.replace(topology, jitter=0.0))
    for side in ("prefill", "decode"):
        if getattr(topology, side).skew:
            yield _on(case, _level(topology, side))


def _level(topology: Topology, side: str) -> Topology:
    shape: EngineShape = getattr(topology, side)
    changed: Topology = _with(topology, side, dataclasses.replace(shape, skew=0.0))
    return changed


def _in_order(case: Case) -> Iterator[Case]:
    """Faults that upset the order of things do so less."""
    for place, fault in enumerate(case.faults):
        for name, harmless in REORDERING.get(fault.kind.effect, {}).items():
            value = fault.parameters.get(name, harmless)
            if value != harmless:
                yield _with_parameter(case, place, name, harmless)
                if not isinstance(value, bool) and abs(value - harmless) > _weakest(fault, name, harmless):
                    yield _with_parameter(case, place, name, round(harmless + (value - harmless) / 2, 4))


def _weakest(fault: Fault, name: str, harmless: float) -> float:
    """Below this a parameter is not halved any more: what a seed draws at most, halved so many times."""
    drawn = fault.kind.draw.get(name)
    most = drawn[1] if isinstance(drawn, list) else 1.0
    return float(abs(most - harmless) / 2.0**WEAKENINGS)


# -- steps


def _fewer_ranks(case: Case) -> Iterator[Case]:
    """Fewer engines, replicas, stages and tensor ranks; nodes that go are replaced by their neighbours."""
    topology = case.topology
    for name in ("count", "dp", "pp", "cp"):
        for side in ("prefill", "decode"):
            for number in _below(_number(getattr(topology, side), name)):
                yield from _possible(case, _with_number(topology, side, name, number))
    for number in _below(max(topology.prefill.sizes.tp, topology.decode.sizes.tp)):
        changed = topology
        for side in ("prefill", "decode"):
            changed = _with_number(changed, side, "tp", min(number, getattr(topology, side).sizes.tp))
        yield from _possible(case, changed)
        for side in ("prefill", "decode"):
            if number < getattr(topology, side).sizes.tp:
                yield from _possible(case, _with_number(topology, side, "tp", number))


def _below(number: int) -> list[int]:
    return sorted({1, number // 2, number - 1} - {0, number})


def _number(shape: EngineShape, name: str) -> int:
    found: int = shape.count if name == "count" else getattr(shape.sizes, name)
    return found


def _with_number(topology: Topology, side: str, name: str, number: int) -> Topology:
    shape: EngineShape = getattr(topology, side)
    if name == "count":
        return _with(topology, side, dataclasses.replace(shape, count=number))
    return _with(topology, side, dataclasses.replace(shape, sizes=shape.sizes._replace(**{name: number})))


def _possible(case: Case, topology: Topology) -> Iterator[Case]:
    """The case on another cluster, if that one can exist; faults go on naming nodes that are there."""
    if topology.check() is None:
        faults = tuple(_moved(fault, topology) for fault in case.faults)
        yield dataclasses.replace(case, topology=topology, faults=faults)


def _moved(fault: Fault, topology: Topology) -> Fault:
    parameters = dict(fault.parameters)
    if "peer" in parameters:
        parameters["peer"] = _renamed(parameters["peer"], topology)
    if "stage" in parameters:
        parameters["stage"] = min(parameters["stage"], topology.prefill.sizes.pp - 1)
    trigger = fault.trigger
    if trigger is not None:
        trigger = {
            key: _renamed(value, topology) if isinstance(value, str) else value for key, value in trigger.items()
        }
    target = _renamed(fault.target, topology)
    return dataclasses.replace(fault, target=target, parameters=parameters, trigger=trigger)


def _renamed(node: str, topology: Topology) -> str:
    """The node of a smaller cluster that stands for this one: the last of those that are left, where it is gone."""
    engine, *parts = node.split("/")
    if engine[:1] not in ("P", "B", "D") or not engine[1:].isdigit():
        return node
    shape = topology.decode if engine[0] == "D" else topology.prefill
    kept = [engine[0] + str(min(int(engine[1:]), shape.count - 1))]
    for part in parts:
        size = getattr(shape.sizes, part[:2], 1)
        if size > 1 and part[2:].isdigit():
            kept.append(f"{part[:2]}{min(int(part[2:]), size - 1)}")
    return "/".join(kept)


def _certain(case: Case) -> Iterator[Case]:
    """A fault strikes all that it could: which ones is then no matter of chance."""
    for place, fault in enumerate(case.faults):
        if fault.parameters.get("share", 1.0) < 1.0:
            yield _with_parameter(case, place, "share", 1.0)
        if fault.parameters.get("after_s"):
            yield _with_parameter(case, place, "after_s", 0.0)


BEFORE_S = (-0.1, -0.01, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
"""How long before a fault begins or ends a request may have to come to be struck in one state or another."""


def _asked_anew(case: Case) -> Iterator[Case]:
    """One short request near the beginning or the end of a fault, instead of many: most races need no more.

    Leaving out requests one by one does not find it, because what was struck stood in a queue behind others.
    """
    lasting = [fault.at_s + fault.for_s for fault in case.faults if fault.for_s < case.timing.hostile_s]
    moments = {*lasting, *(fault.at_s for fault in case.faults if fault.trigger is None)}
    if len(case.asks) + case.timing.probes > 1:
        timing = dataclasses.replace(case.timing, probes=0)
        for moment in sorted(moments):
            for before_s in BEFORE_S:
                ask = Ask(round(moment - before_s, 3), case.topology.page_tokens, 1)
                if ask.at_s >= 0:
                    yield dataclasses.replace(case, asks=(ask,), timing=timing)


def _shorter_asks(case: Case) -> Iterator[Case]:
    """Prompts of a page, or of half as many; answers of one token. All at once, or one by one if they are few."""
    groups = [range(len(case.asks)), *([place] for place in range(len(case.asks)) if 1 < len(case.asks) <= FEW)]
    for group in groups:
        for name, least in (("input_tokens", case.topology.page_tokens), ("output_tokens", 1)):
            for shorter in (lambda now, least=least: least, lambda now, least=least: max(least, now // 2)):
                asks = tuple(_shortened(ask, name, shorter) if n in group else ask for n, ask in enumerate(case.asks))
                if asks != case.asks:
                    yield dataclasses.replace(case, asks=asks)


def _shortened(ask: Ask, name: str, shorter: Callable[[int], int]) -> Ask:
    now = getattr(ask, name)
    return ask._replace(**{name: min(now, shorter(now))})


FEW = 8
"""Up to so many requests each is simplified by itself; with more it takes long and helps little."""


def _fewer_probes(case: Case) -> Iterator[Case]:
    for probes in range(case.timing.probes):
        yield dataclasses.replace(case, timing=dataclasses.replace(case.timing, probes=probes))
    if case.timing.probes:
        yield _probes_asked(case)


def _probes_asked(case: Case) -> Case:
    """Probes as requests like any other, which can then be moved and left out."""
    begin = case.timing.hostile_s + case.timing.grace_s
    probes = tuple(Ask(begin + PROBE_GAP_S * number, *PROBE) for number in range(case.timing.probes))
    timing = dataclasses.replace(case.timing, hostile_s=begin + PROBE_GAP_S * (len(probes) + 1), probes=0)
    return dataclasses.replace(case, asks=(*case.asks, *probes), timing=timing)


def _fewer(case: Case) -> Iterator[Case]:
    """One request or some ranks less."""
    for place in range(len(case.asks)):
        yield dataclasses.replace(case, asks=(*case.asks[:place], *case.asks[place + 1 :]))
    yield from _fewer_probes(case)
    yield from _fewer_ranks(case)


def _sooner_healed(case: Case) -> Iterator[Case]:
    """A shorter hostile phase, and else the phases that a file need not name.

    The quiet phase costs nothing and stays: what is left at its end is then really left.
    """
    timing, plain = case.timing, Timing()
    last = max([0.0, *(ask.at_s for ask in case.asks), *(fault.at_s for fault in case.faults)])
    for hostile_s in (math.ceil(last + 1), max(math.ceil(last + 1), math.ceil(timing.hostile_s / 2))):
        if hostile_s < timing.hostile_s:
            yield dataclasses.replace(case, timing=dataclasses.replace(timing, hostile_s=hostile_s))
    yield dataclasses.replace(case, timing=dataclasses.replace(timing, grace_s=plain.grace_s, quiet_s=plain.quiet_s))


def _shorter_faults(case: Case) -> Iterator[Case]:
    for place, fault in enumerate(case.faults):
        for for_s in (0.1, 1.0, float(f"{fault.for_s / 2:.2g}")):
            if 0.1 <= for_s < fault.for_s < FOR_EVER_S:
                yield _with_fault(case, place, dataclasses.replace(fault, for_s=for_s))


def _sooner(case: Case) -> Iterator[Case]:
    """The story begins sooner, and its moments are numbers of few digits."""
    moments = [ask.at_s for ask in case.asks] + [fault.at_s for fault in case.faults if fault.trigger is None]
    begin = min(moments, default=0.0)
    for early in (begin - 1.0, begin / 2):
        if begin > 1.0 and early > 0:
            yield _earlier(case, round(early, 3))
    for digits in (1, 2, 3):
        yield dataclasses.replace(case, asks=tuple(_asked_at(ask, round(ask.at_s, digits)) for ask in case.asks))
    for place, ask in enumerate(case.asks[: FEW if len(case.asks) <= FEW else 0]):
        for at_s in _rounder(ask.at_s):
            asks = (*case.asks[:place], _asked_at(ask, at_s), *case.asks[place + 1 :])
            yield dataclasses.replace(case, asks=tuple(sorted(asks, key=lambda each: each.at_s)))
        for leaves_at_s in _rounder(ask.leaves_at_s or 0.0):
            if leaves_at_s >= ask.at_s:
                asks = (*case.asks[:place], ask._replace(leaves_at_s=leaves_at_s), *case.asks[place + 1 :])
                yield dataclasses.replace(case, asks=asks)
    for place, fault in enumerate(case.faults):
        for at_s in _rounder(fault.at_s):
            yield _with_fault(case, place, dataclasses.replace(fault, at_s=at_s))


def _rounded(case: Case) -> Iterator[Case]:
    """What a seed drew to four places says the same in one or two."""
    for place, fault in enumerate(case.faults):
        for for_s in _shorter_to_write(fault.for_s):
            yield _with_fault(case, place, dataclasses.replace(fault, for_s=for_s))
        for name, value in fault.parameters.items():
            if isinstance(value, float):
                for number in _shorter_to_write(value):
                    yield _with_parameter(case, place, name, number)


def _earlier(case: Case, by_s: float) -> Case:
    """Everything sooner by so much, and the hostile phase as much shorter."""
    asks = tuple(_asked_at(ask, round(ask.at_s - by_s, 6)) for ask in case.asks)
    faults = tuple(
        fault if fault.trigger is not None else dataclasses.replace(fault, at_s=round(fault.at_s - by_s, 6))
        for fault in case.faults
    )
    timing = dataclasses.replace(case.timing, hostile_s=round(max(case.timing.hostile_s - by_s, 0.1), 6))
    return dataclasses.replace(case, asks=asks, faults=faults, timing=timing)


def _asked_at(ask: Ask, at_s: float) -> Ask:
    """The request at another time; its client stays as long as before."""
    leaves_at_s = None if ask.leaves_at_s is None else round(ask.leaves_at_s - ask.at_s + at_s, 6)
    return ask._replace(at_s=at_s, leaves_at_s=leaves_at_s)


def _rounder(value: float) -> list[float]:
    """Fewer digits, or half as late: each later step is shorter to write or nearer to zero, so there is an end."""
    return [*_shorter_to_write(value), *([float(math.ceil(value / 2))] if value > 2 else [])]


def _shorter_to_write(value: float) -> list[float]:
    numbers = (float(f"{value:.{digits}g}") for digits in (1, 2, 3))
    return [number for number in numbers if len(repr(number)) < len(repr(value))]


def _plain(case: Case) -> Iterator[Case]:
    """The cluster with the sizes of pools and speeds that a file need not name."""
    plain, shape = Topology(), EngineShape()
    for side in ("prefill", "decode"):
        sizes = getattr(case.topology, side).sizes
        even = getattr(case.topology, side).skew
        count = getattr(case.topology, side).count
        yield from _changed(
            case, _with(case.topology, side, dataclasses.replace(shape, sizes=sizes, skew=even, count=count))
        )
    for name in ("page_tokens", "chunk_tokens", "load_balance", "dp_attention", "mla", "link_bytes_per_s"):
        yield from _changed(case, _with(case.topology, name, getattr(plain, name)))
    for name in ("latency_s", "http_latency_s", "kv_bytes_per_token"):
        yield from _changed(case, _with(case.topology, name, getattr(plain, name)))


def _changed(case: Case, topology: Topology) -> Iterator[Case]:
    if topology != case.topology:
        yield from _possible(case, topology)


# -- putting something else in its place


def _with(topology: Topology, name: str, value: Any) -> Topology:
    return dataclasses.replace(topology, **{name: value})


def _on(case: Case, topology: Topology) -> Case:
    return dataclasses.replace(case, topology=topology)


def _with_fault(case: Case, place: int, fault: Fault) -> Case:
    return dataclasses.replace(case, faults=(*case.faults[:place], fault, *case.faults[place + 1 :]))


def _with_parameter(case: Case, place: int, name: str, value: Any) -> Case:
    fault = case.faults[place]
    return _with_fault(case, place, dataclasses.replace(fault, parameters={**fault.parameters, name: value}))
