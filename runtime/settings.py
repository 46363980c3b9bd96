"""What an endpoint is told, and what is wrong with it: everything that can be known before a socket is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.spec.protocol import Profile, Protocol, Rule, Value
from kvpoll.spec.source import BadInput, nearest
from kvpoll.statemachine.mapping import Sizes


@dataclass(frozen=True)
class Settings:
    """What an endpoint is told.

    layout: this rank's memory. bootstrap: "host:port" of the prefill engine's bootstrap server; prefill only.
    name: of a decode engine, the same in every life of it, so that peers see a restart as one (by default one that
    nobody else has); a prefill engine is named by its bootstrap address. sizes: parallel sizes of this engine (dp, pp,
    tp, cp), and dp, pp, tp, cp this rank's place. destinations: how many decode ranks write metadata for a room to
    each prefill rank (decode TP / prefill TP, at least 1). follows_room: requests find their DP rank by room number
    (SGLang's load balancing "follow_bootstrap_room"). pool: the engine's own memory; made here where it is None.

    profile, rules: of the protocol; reference unless there is a reason. Timeouts are rules, in seconds of the
    monotonic clock. host, port: where the control plane listens; 0 is any free port. transport, options: see
    ``kvpoll doctor``. epoch: this life of the engine, larger after every restart, and the same for all its ranks; an
    engine of one rank may leave it out (it is milliseconds of the wall clock then). token: bearer token of the
    bootstrap server. secret: 1 to 64 bytes that every rank of both sides has; control messages without it are dropped.
    monitored: check the invariants on what this rank does, as it does it. trace: record what happens to this file.
    """

    layout: Layout
    bootstrap: str = ""
    name: str = ""
    sizes: Sizes = field(default_factory=Sizes)
    dp: int = 0
    pp: int = 0
    tp: int = 0
    cp: int = 0
    destinations: int = 1
    follows_room: bool = True
    pool: KVPool | None = None
    profile: str = "reference"
    rules: dict[str, Value] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 0
    transport: str = "shm"
    options: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    token: str | None = None
    secret: bytes | None = None
    monitored: bool = False
    trace: Path | None = None


def check(settings: Settings, side: str) -> None:
    """Raises BadInput for the first thing that cannot be: a place outside the sizes, a layout of another rank or of
    another pool, no aux row. ``side`` is "prefill" or "decode".
    """
    problem = _place(settings) or _memory(settings, side) or _name(settings, side)
    if problem is not None:
        raise BadInput(f"{side} endpoint: {problem}")


def _place(settings: Settings) -> str | None:
    for label, size in settings.sizes._asdict().items():
        index = getattr(settings, label)
        if size < 1:
            return f"{label} size {size}; a size counts ranks, from 1"
        if not 0 <= index < size:
            return f"{label} rank {index} does not exist where the {label} size is {size}; ranks count from 0"
    ranks = math.prod(settings.sizes)
    if ranks > 1 and settings.epoch is None:
        return (
            f"an engine of {ranks} ranks needs an epoch, since its ranks live and die together; "
            f"give all of them the same, larger than in their last life (a start time will do)"
        )
    if settings.destinations < 1:
        return f"destinations is {settings.destinations}; at least one decode rank sends metadata, so give 1 or more"
    return None


def _memory(settings: Settings, side: str) -> str | None:
    layout, tp, size = settings.layout, settings.tp, settings.sizes.tp
    if (layout.tp_rank, layout.tp_size) != (tp, size):
        return (
            f"the layout is of TP rank {layout.tp_rank} of {layout.tp_size}, the endpoint of TP rank {tp} of {size}; "
            f"give both the same tp_rank and tp_size"
        )
    if layout.rows < 1:
        why = "keeps its aux row there until it is sent" if side == "prefill" else "has its aux row there"
        return f"the layout has no aux rows and every request {why}; give rows >= 1, one for each request under way"
    if settings.pool is not None and settings.pool.layout != layout:
        return "the pool was made for another layout than the one that is given; give pool.layout"
    return None


def _name(settings: Settings, side: str) -> str | None:
    if side == "prefill" and not settings.bootstrap:
        return "its engine's bootstrap server is not given; give bootstrap = 'HOST:PORT'"
    if side == "prefill" and settings.name not in ("", settings.bootstrap):
        return f"the name {settings.name!r}: a prefill engine is named by its bootstrap address; leave name out"
    if side == "decode" and settings.bootstrap:
        return "bootstrap is for prefill; a decode endpoint is given the address with each request (admit)"
    if "/" in settings.name or "/" in settings.bootstrap:
        name = settings.name or settings.bootstrap
        return f"the name {name!r} has a slash, and ranks are named below their engine; give one without"
    return None


def chosen_profile(settings: Settings, protocol: Protocol) -> Profile:
    """The profile with the rules that were set otherwise. Raises BadInput for a name or value that there is not."""
    for name, value in settings.rules.items():
        if name not in protocol.rules:
            raise BadInput(f"rules: unknown rule {name!r}{nearest(name, protocol.rules)}")
        problem = _value(protocol.rules[name], value)
        if problem is not None:
            raise BadInput(f"rules: {problem}")
    return protocol.profile(settings.profile).with_rules(settings.rules)


def _value(rule: Rule, value: Value) -> str | None:
    if rule.kind == "number":
        is_number = type(value) in (int, float) and 0 <= float(value) < float("inf")
        return None if is_number else f"{rule.name} is a number of {rule.unit} and not negative, got {value!r}"
    return None if value in rule.values else f"{rule.name} has no value {value!r}{nearest(value, rule.values)}"
