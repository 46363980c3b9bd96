"""The engine that a rank process belongs to, as seen from inside: ``Home`` of ``statemachine.ranks.engine``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpoll.runtime.cluster.config import RankConfig
from kvpoll.runtime.host import Host
from kvpoll.statemachine.mapping import map_ranks


class ProcessEngine:
    """One process of an engine. What is true of the engine as a whole, the launcher puts together from its ranks."""

    def __init__(self, host: Host, config: RankConfig, report: Callable[[bool, bool], None]) -> None:
        """report(registered, running): tell the launcher how this rank stands."""
        self.host = host
        self.name = config.engine
        self.epoch = config.epoch
        self.shape = config.shape.shape()
        self.slowdown = 1.0
        self._config = config
        self._report = report

    def pace(self, rank: Any) -> float:
        """How much slower than nominal this rank runs now."""
        return self.slowdown

    def report_health(self) -> None:
        """Say what is true of this rank; health is the engine's."""
        rank = self.host.rank
        if rank is None:
            return
        registered = self._config.side == "decode" or rank.registration.state == "Registered"
        self._report(registered, not rank.stopped and not rank.collectives.blocked)

    # -- of a prefill engine

    @property
    def dp_ranks(self) -> int:
        """Data-parallel replicas."""
        return self.shape.sizes.dp

    @property
    def dp_attention(self) -> bool:
        """Data-parallel attention, or plain replicas."""
        return self._config.lengths.dp_attention

    @property
    def follows_room(self) -> bool:
        """Does its controller dispatch by room mod dp?"""
        return self._config.lengths.follows_room

    @property
    def rank_count(self) -> int:
        """How many ranks the bootstrap server must expect."""
        sizes = self.shape.sizes
        return sizes.dp * sizes.pp * sizes.tp * sizes.cp

    @property
    def destinations_required(self) -> int:
        """Decode ranks that write metadata for a room to each rank."""
        config = self._config
        return map_ranks(self.shape.sizes, config.peer_sizes, 0, 0, config.lengths.mla).destinations_required
