"""The cluster of a scenario: engines, their ranks, and the numbers that make time pass in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvpoll.statemachine.mapping import Mapping, map_ranks
from kvpoll.statemachine.ranks.engine import EngineShape
from kvpoll.statemachine.ranks.host import rank_name


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


def rank_names(side: str, shape: EngineShape) -> Iterator[str]:
    """Every rank of every engine of one side."""
    for engine in range(shape.count):
        for dp in range(shape.sizes.dp):
            for pp in range(shape.sizes.pp):
                for cp in range(shape.sizes.cp):
                    for tp in range(shape.sizes.tp):
                        yield rank_name(f"{side}{engine}", shape.sizes, dp, pp, tp, cp)
