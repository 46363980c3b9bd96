"""The cluster of a scenario: engines, their ranks, and the numbers that make time pass in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvpoll.statemachine.mapping import Mapping, Sizes, map_ranks


@dataclass(frozen=True)
class EngineShape:
    """One kind of engine: how many of them, their parallel sizes, pools and speeds.

    kv_pages: pages of page_tokens tokens in each rank's pool. rows: aux (metadata) rows. slots: requests that a
    decode rank runs at once. tokens_per_s: prefill speed of one data-parallel replica. iteration_s: one decode
    step. idle_s: one turn of a scheduler loop with nothing to compute. skew: how far ranks differ (fraction).
    """

    count: int = 1
    sizes: Sizes = field(default_factory=Sizes)
    kv_pages: int = 4096
    rows: int = 256
    slots: int = 256
    tokens_per_s: float = 80_000.0
    iteration_s: float = 0.03
    idle_s: float = 0.001
    skew: float = 0.05


@dataclass(frozen=True)
class Topology:
    """Prefill and decode engines and what joins them.

    page_tokens: tokens a page holds. kv_bytes_per_token: over all layers and ranks (70,272 is DeepSeek-V3's MLA).
    chunk_tokens: chunked prefill. link_bytes_per_s: one rank's network card. latency_s: one-way message latency,
    to which up to `jitter` times as much is drawn for every message; without jitter messages arrive as they left.
    dp_attention: data-parallel attention (True) or plain replicas. load_balance: how prefill's controller picks
    a DP rank: "follow_bootstrap_room", "total_requests" or "total_tokens".
    """

    prefill: EngineShape = field(default_factory=EngineShape)
    decode: EngineShape = field(default_factory=EngineShape)
    page_tokens: int = 512
    kv_bytes_per_token: int = 70_272
    chunk_tokens: int = 8192
    link_bytes_per_s: float = 25e9
    latency_s: float = 0.0002
    http_latency_s: float = 0.002
    jitter: float = 1.0
    dp_attention: bool = True
    load_balance: str = "follow_bootstrap_room"
    mla: bool = False

    @property
    def follows_room(self) -> bool:
        """Does the prefill controller dispatch by room mod dp?"""
        return self.load_balance == "follow_bootstrap_room"

    def mapping(self, decode_tp: int) -> Mapping:
        """Whom the decode rank with this TP index contacts."""
        return map_ranks(self.prefill.sizes, self.decode.sizes, decode_tp, 0, self.mla)

    def check(self) -> str | None:
        """Why this cluster cannot exist, or None."""
        try:
            for tp in range(self.decode.sizes.tp):
                self.mapping(tp)
        except ValueError as error:
            return str(error)
        if self.decode.sizes.pp != 1:
            return "decode PP above 1 is not simulated; use pp = 1"
        if self.chunk_tokens % self.page_tokens:
            return f"chunk_tokens {self.chunk_tokens} is not a multiple of page_tokens {self.page_tokens}"
        return None


def rank_name(side: str, engine: int, sizes: Sizes, dp: int, pp: int, tp: int, cp: int = 0) -> str:
    """``P0/dp1/pp0/tp1``; dimensions of size one are left out."""
    parts = [f"{side}{engine}"]
    for label, size, index in (
        ("dp", sizes.dp, dp),
        ("pp", sizes.pp, pp),
        ("cp", sizes.cp, cp),
        ("tp", sizes.tp, tp),
    ):
        if size > 1:
            parts.append(f"{label}{index}")
    return "/".join(parts)


def rank_names(side: str, shape: EngineShape) -> Iterator[str]:
    """Every rank of every engine of one side."""
    for engine in range(shape.count):
        for dp in range(shape.sizes.dp):
            for pp in range(shape.sizes.pp):
                for cp in range(shape.sizes.cp):
                    for tp in range(shape.sizes.tp):
                        yield rank_name(side, engine, shape.sizes, dp, pp, tp, cp)
