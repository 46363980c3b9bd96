"""What a judge has found: one event, why the profile does not explain it, and what it would have allowed."""

from __future__ import annotations

from dataclasses import dataclass

from kvpoll.statemachine.judge.departure import Change


@dataclass(frozen=True, slots=True)
class Told:
    """An earlier event, for context: the line of the trace that holds it, and what it says."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One event that the profile does not explain.

    line: of the trace, from 1. t: seconds, as the trace has them. event: what happened, in one line. room: which
    room, or None. before: poll, lease and cause that the judge holds true before the event, or None. why: one
    sentence. allowed: what the profile has instead, the fact itself first. changes: the rules that would have to be
    set otherwise (empty: no choice of rules explains it). invariants: ids that the event concerns. context: what
    came before on this room, oldest first.
    """

    line: int
    t: float
    node: str
    event: str
    room: str | None
    before: str | None
    why: str
    allowed: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    invariants: tuple[str, ...] = ()
    context: tuple[Told, ...] = ()
