"""The bootstrap server's table of ranks: the machine of role ``registry``, and the endpoint of each rank it lists.

What is ready, known or stale is the machine's word. This file keeps what the machine does not look at: addresses, and
the sizes that all ranks of one engine must agree on.
"""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any, Final

from kvpoll.runtime.bootstrap.reading import Refused
from kvpoll.runtime.bootstrap.rows import Coordinate, Endpoint, RankInfo, Topology
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.statemachine.machine import Machine
from kvpoll.statemachine.roles import Machines, Registry

STEPS_REMEMBERED: Final = 256
"""A machine remembers the steps it took. States of this table are as long as it and rarely come back, and what is
asked for is chosen by strangers, so the memory is thrown away before it is worth naming."""

_SHARED: Final = tuple(
    field.name for field in dataclasses.fields(Topology) if field.name not in ("prefill_http_port", "server_epoch")
)
"""Fields in which all ranks of one engine agree; one that a rank left empty agrees with everything."""
_AS_SGLANG: Final = {
    "dsv41_spec_layout": "DeepSeek-V4.1 DSpark PD layout differs across prefill ranks",
    "decode_allocation_policy": "Inconsistent prefill allocation policies",
}
"""The two contradictions that SGLang's server notices; it answers 400, and so do we. Null is a value of these."""


class RankTable:
    """The ranks of one prefill engine."""

    def __init__(self, protocol: Protocol, profile: Profile) -> None:
        self._protocol = protocol
        self._profile = profile
        self._machine: Machine = Machines(protocol, profile).registry
        self._steps = 0
        self._rows: dict[Coordinate, RankInfo] = {}
        self._topology: Topology | None = None
        self.registry = Registry()

    @property
    def is_ready(self) -> bool:
        """Does the table's rule (ready_means) say that the engine is complete?"""
        return self.registry.state == "Ready"

    @property
    def expected(self) -> int | None:
        """How many ranks the engine has; None before the first has registered."""
        return self._topology.rank_count if self._topology else None

    def __len__(self) -> int:
        return len(self._rows)

    def register(self, info: RankInfo) -> bool:
        """Enter a rank, retiring the endpoint of its predecessor. True when the engine became ready by it.

        Raises Refused, and then nothing changed: 409 for an older life of the rank, for another process that claims
        the same life, and for a rank of another engine (400 for the two contradictions that SGLang names so).
        """
        place = info.coordinate
        known = self._rows.get(place)
        self._require_agreement(info, known)
        listed = dict(self.registry.ranks).get(place.name, 0)
        epoch = info.process_epoch
        if epoch is None:  # SGLang's ranks have no epoch: who comes later replaces
            epoch = listed
        elif known is not None and known.process_epoch == epoch and _address(known) != _address(info):
            raise Refused(
                409,
                "contradiction",
                f"{info.label} and {known.label} both say they are epoch {epoch} of the same rank; one bootstrap "
                "server serves one engine, and a restarted rank needs a larger process_epoch",
            )
        registry = self.registry
        if known is not None and known.topology.rank_count != info.topology.rank_count:
            # Agreement held, so this rank is alone: its engine came back with other sizes, and starts an empty table.
            registry, orders = self._step(registry, "RankUnregistered", (place.name, epoch))
            if orders[0][0] == "AnswerStale":
                raise _over(place, epoch, listed)
        after, _ = self._step(registry, "RankRegistered", (place.name, epoch, info.topology.rank_count))
        if (place.name, epoch) not in after.ranks:
            raise _over(place, epoch, listed)
        was_ready = self.is_ready
        self.registry = after
        self._rows[place] = info
        if known is not None and known.topology != info.topology:
            self._topology = _merge(self._rows.values())
        else:
            self._topology = _joined(self._topology, info.topology)
        return self.is_ready and not was_ready

    def unregister(self, place: Coordinate, epoch: int | None) -> None:
        """Take a rank out that leaves on purpose. Raises Refused: 404 unknown, 409 for another life than the listed.

        ``epoch`` is None for a rank that registered without one, and only for such a rank.
        """
        known = self._rows.get(place)
        if epoch is None and known is not None and known.process_epoch is not None:
            raise Refused(409, "stale_epoch", f"{place.name} registered with an epoch; say which life of it leaves")
        listed = dict(self.registry.ranks).get(place.name, 0)
        detail = (place.name, listed if epoch is None else epoch)
        after, orders = self._step(self.registry, "RankUnregistered", detail)
        if orders[0][0] == "AnswerUnknownRank":
            raise Refused(404, "unknown_rank", f"{place.name} is not registered")
        if orders[0][0] == "AnswerStale":
            raise _over(place, epoch, listed)
        self.registry = after
        del self._rows[place]
        self._topology = _merge(self._rows.values())

    def topology(self) -> Topology:
        """The engine's sizes. Raises Refused (503) until it is ready."""
        self._require_route(None, "the engine")
        assert self._topology is not None, "a table is ready only after a registration"
        return self._topology

    def endpoint(self, place: Coordinate) -> Endpoint:
        """Where one rank listens. Raises Refused: 503 until the engine is ready, 404 for a rank that is not there."""
        self._require_route(place.name, place.name)
        return self._rows[place].endpoint

    def missing(self, names_max: int) -> list[str]:
        """Names of the first ``names_max`` ranks that the engine has and the table has not, in order."""
        if self._topology is None:
            return []
        sizes = self._topology
        axes = (sizes.dp_size, sizes.attn_cp_size, sizes.attn_tp_size, sizes.pp_size)
        places = (Coordinate(*place) for place in product(*(range(size) for size in axes)))
        found: list[str] = []
        for place in places:
            if place not in self._rows:
                found.append(place.name)
                if len(found) == names_max:
                    break
        return found

    def _require_route(self, rank: str | None, what: str) -> None:
        _, orders = self._step(self.registry, "RouteRequested", rank)
        answer = orders[0][0]
        if answer == "AnswerNotReady":
            told = f"Prefill server not fully registered yet ({len(self._rows)} workers registered)."
            raise Refused(503, "not_ready", told)
        if answer == "AnswerUnknownRank":
            raise Refused(404, "unknown_rank", f"Bootstrap info not found for {what}")

    def _step(self, registry: Registry, fact: str, detail: Any) -> tuple[Registry, Any]:
        self._steps += 1
        if self._steps % STEPS_REMEMBERED == 0:
            self._machine = Machine(self._protocol.roles["registry"], self._profile)
        after: tuple[Registry, Any] = self._machine.step(registry, fact, detail)
        return after

    def _require_agreement(self, info: RankInfo, known: RankInfo | None) -> None:
        """The rank describes the same engine as all other ranks do. Raises Refused, naming both."""
        engine = self._topology
        if known is not None and known.topology != info.topology:
            engine = _merge(row for place, row in self._rows.items() if place != info.coordinate)
        if engine is None:
            return
        name = _contradicted(engine, info.topology)
        if name is None:
            return
        own, theirs = getattr(info.topology, name), getattr(engine, name)
        other = next(
            row for place, row in self._rows.items()
            if place != info.coordinate and getattr(row.topology, name) == theirs
        )  # fmt: skip
        if name in _AS_SGLANG:
            raise Refused(400, "contradiction", f"{_AS_SGLANG[name]}: {info.label} and {other.label}")
        raise Refused(
            409,
            "contradiction",
            f"{name} is {own!r} on {info.label} and {theirs!r} on {other.label}; ranks of one engine must agree, and "
            "another engine needs a bootstrap server of its own",
        )


def _contradicted(engine: Topology, info: Topology) -> str | None:
    for name in _SHARED:
        own, theirs = getattr(info, name), getattr(engine, name)
        if own != theirs and (name in _AS_SGLANG or None not in (own, theirs)):
            return name
    return None


def _joined(engine: Topology | None, info: Topology) -> Topology:
    """The engine with what one more rank knows of it; the first rank that names something is believed, as in SGLang."""
    if engine is None:
        return info
    gaps = {
        name: getattr(info, name)
        for name in ("kv_cache_dtype", "kv_layout", "prefill_http_port")
        if getattr(engine, name) is None and getattr(info, name) is not None
    }
    return dataclasses.replace(engine, **gaps) if gaps else engine


def _merge(rows: Any) -> Topology | None:
    engine: Topology | None = None
    for row in rows:
        engine = _joined(engine, row.topology)
    return engine


def _over(place: Coordinate, epoch: int | None, listed: int) -> Refused:
    return Refused(409, "stale_epoch", f"epoch {epoch} of {place.name} is over: epoch {listed} has registered")


def _address(info: RankInfo) -> tuple[str, int]:
    return info.rank_ip, info.rank_port
