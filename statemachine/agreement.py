"""How ranks of one group come to the same decisions. Pure; who sends what to whom is the driver's business.

Polls merge by minimum: Failed (0) dominates, Success (4) needs everyone. Under ``by_request_id`` ranks exchange
one message of fixed shape per iteration, keyed by request, so neither queue order nor an empty queue matters
(A14). Under ``by_position`` they exchange one vector per queue and zip it with their own queue.

Pipeline stages take their decisions from stage 0. How, is the rule ``pp_decision``; the two ``consensus_*``
values are the ring of sglang#27028 before and after its fix, and are kept because they break R1 and S7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from kvpoll.spec.protocol import Profile
from kvpoll.spec.vocabulary import POLL_NUMBERS, Incarnation
from kvpoll.statemachine.machine import Room

FAILED, BOOTSTRAPPING, WAITING, TRANSFERRING, SUCCESS = (POLL_NUMBERS[name] for name in POLL_NUMBERS)


class Decision(NamedTuple):
    """What a group does about one request: admit it, conclude it (its transfer is over), or drop it."""

    rid: str
    outcome: str
    cause: str | None = None


class Report(NamedTuple):
    """What one rank says of one request: its poll, and why it failed if it did."""

    poll: int
    cause: str | None = None


def report_on(room: Room | None, incarnation: Incarnation) -> Report:
    """What a scheduler sees of one of its requests; a missing room, or one of another attempt, is Failed (A22)."""
    if room is None or room[0][1] != incarnation[1]:
        return Report(FAILED, "room_lost")
    local = room[1]
    return Report(POLL_NUMBERS.get(local.poll, FAILED), local.cause)


def agrees_by_request_id(profile: Profile) -> bool:
    """One message of fixed shape per iteration, or one vector per queue that is skipped when it is empty (A14)?"""
    return profile["agreement"] == "by_request_id"


def merge_by_request(contributions: Sequence[Mapping[str, Report]]) -> dict[str, Report]:
    """Minimum per request over the ranks that know it; a rank that does not know it holds it in Bootstrapping."""
    first, *others = contributions
    if not others:
        return dict(first)
    merged: dict[str, Report] = {}
    for rid, report in first.items():
        reports = [report, *(other.get(rid, _UNKNOWN) for other in others)]
        merged[rid] = min(reports, key=_by_poll)
    return merged


_UNKNOWN = Report(BOOTSTRAPPING)


def _by_poll(report: Report) -> int:
    return report.poll


def merge_by_position(vectors: Sequence[Sequence[int]]) -> list[int]:
    """The all-reduce MIN of SGLang: element k of every rank, whatever request each of them means by k."""
    return [min(column) for column in zip(*vectors, strict=False)]


def decide_bootstrap(rid: str, report: Report) -> Decision | None:
    """What to do with a request in a bootstrap or preallocation queue."""
    if report.poll == FAILED:
        return Decision(rid, "drop", report.cause)
    if report.poll >= WAITING:
        return Decision(rid, "admit")
    return None


def decide_transfer(rid: str, report: Report) -> Decision | None:
    """What to do with a request whose transfer runs (waiting, in flight, or decode's transfer queue)."""
    if report.poll == FAILED:
        return Decision(rid, "drop", report.cause)
    if report.poll == SUCCESS:
        return Decision(rid, "conclude")
    return None


def given_up(cause: str | None, report: Report | None) -> Report | None:
    """A request that this side gave up for ``cause`` is Failed whatever its room says; the first cause stays."""
    if not cause or (report is not None and report.poll == FAILED):
        return report
    return Report(FAILED, cause)


def decide_decode(rid: str, state: str, cause: str | None, report: Report | None) -> Decision | None:
    """What a decode rank does about a request in one of its queues, given the merged report (None: none came).

    One that waits for memory is dropped here if it failed; admitting it is a question of memory (``fits``).
    """
    merged = given_up(cause, report)
    if merged is None or merged.poll == BOOTSTRAPPING:
        return None
    if state == "Transfer":
        return decide_transfer(rid, merged)
    return decide_bootstrap(rid, merged) if merged.poll == FAILED else None


class Ring(NamedTuple):
    """What travels down the pipeline with one step.

    decisions: stage 0's decisions, in order. queue: stage 0's bootstrap queue when it decided (for by_position).
    candidates: requests that every stage so far found ready. agreed: the closed result of the round before.
    """

    decisions: tuple[Decision, ...] = ()
    queue: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    agreed: tuple[str, ...] = ()


def intersect(candidates: Iterable[str], ready: Iterable[str]) -> tuple[str, ...]:
    """Candidates that this stage finds ready too, in the order in which they came."""
    here = set(ready)
    return tuple(rid for rid in candidates if rid in here)


def stage_decisions(
    profile: Profile, ring: Ring, queue: Sequence[str], failed: Mapping[str, str | None]
) -> list[Decision]:
    """What a later stage applies to its bootstrap queue, given stage 0's step and its own local failures."""
    rule = profile["pp_decision"]
    if rule == "rank0_by_request_id":
        return list(ring.decisions)
    if rule == "rank0_by_position":
        return _zip_positions(ring, queue)
    dropped: list[Decision] = []
    if rule == "consensus_or_local_failed":
        dropped = [Decision(rid, "drop", failed[rid]) for rid in queue if rid in failed]
    gone = {decision.rid for decision in dropped}
    here = set(queue) - gone
    return dropped + [Decision(rid, "admit") for rid in ring.agreed if rid in here]


def _zip_positions(ring: Ring, queue: Sequence[str]) -> list[Decision]:
    """C7: the list says "third request: admit"; which request is third here, nobody checks."""
    outcomes = {decision.rid: decision for decision in ring.decisions}
    applied: list[Decision] = []
    for theirs, ours in zip(ring.queue, queue, strict=False):
        decision = outcomes.get(theirs)
        if decision is not None:
            applied.append(Decision(ours, decision.outcome, decision.cause))
    applied.extend(decision for decision in ring.decisions if decision.rid not in ring.queue)
    return applied


def uses_ring(profile: Profile, stages: int) -> bool:
    """Do pipeline stages agree by a ring, as before PP0 decided for all (sglang#27028)?"""
    return stages > 1 and str(profile["pp_decision"]).startswith("consensus")


def watched_states(profile: Profile, stages: int) -> tuple[str, ...]:
    """In which scheduler states past the bootstrap queue a prefill group still looks at a request's poll.

    With pipeline stages SGLang looks at requests in flight only, so one that fails while it waits is computed all
    the same (A03).
    """
    if stages > 1 and profile["pp_decision"] != "rank0_by_request_id":
        return ("Inflight",)
    return ("Waiting", "Inflight")


def follows_batch(profile: Profile) -> bool:
    """Does a later stage compute the batch that stage 0 names, or the one that its own queue suggests?"""
    return profile["pp_decision"] == "rank0_by_request_id"


def stage0_decisions(
    reports: Mapping[str, Report], queue: Sequence[str], agreed: Sequence[str] | None
) -> list[Decision]:
    """What stage 0 applies to its bootstrap queue.

    ``agreed`` is None where stage 0 decides from reports that cover every stage; else it is the closed result of
    the ring, and stage 0 drops by its own failures alone (sglang#26912).
    """
    decided = [decide_bootstrap(rid, reports[rid]) for rid in queue if rid in reports]
    decisions = [decision for decision in decided if decision is not None]
    if agreed is None:
        return decisions
    drops = [decision for decision in decisions if decision.outcome == "drop" and decision.rid not in agreed]
    here = set(queue)
    return drops + [Decision(rid, "admit") for rid in agreed if rid in here]


class Memory(NamedTuple):
    """What a decode rank has left: KV pages, aux rows, slots of its running batch."""

    pages: int
    rows: int
    slots: int

    def less(self, pages: int) -> Memory:
        """After one more request of this many pages."""
        return Memory(self.pages - pages, self.rows - 1, self.slots - 1)


def tightest(budgets: Iterable[Memory]) -> Memory:
    """What every rank of the group has at least: memory is granted by this, so that all ranks decide alike."""
    return Memory(*map(min, zip(*budgets, strict=True)))


def fits(needed_pages: int, memory: Memory) -> bool:
    """May the next request be given pages, a row and a slot?"""
    return needed_pages <= memory.pages and memory.rows >= 1 and memory.slots >= 1
