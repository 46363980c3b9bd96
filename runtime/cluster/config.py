"""What a process of the cluster is told when it is started, as one JSON object."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvpoll.runtime.pools.layout import Layout
from kvpoll.spec.protocol import Value
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape


class Lengths(msgspec.Struct, frozen=True):
    """Sizes that prefill and decode have in common, and how requests find their DP rank."""

    page_tokens: int
    chunk_tokens: int
    follows_room: bool = True
    load_balance: str = "follow_bootstrap_room"
    dp_attention: bool = True
    mla: bool = False


class Shape(msgspec.Struct, frozen=True):
    """``EngineShape`` as it travels."""

    sizes: Sizes
    kv_pages: int
    rows: int
    slots: int
    tokens_per_s: float
    iteration_s: float
    idle_s: float

    @classmethod
    def of(cls, shape: EngineShape) -> Shape:
        """What travels of an engine's shape."""
        return cls(
            shape.sizes, shape.kv_pages, shape.rows, shape.slots,
            shape.tokens_per_s, shape.iteration_s, shape.idle_s,
        )  # fmt: skip

    def shape(self) -> EngineShape:
        """The shape again; real ranks differ by themselves, so no skew is drawn."""
        return EngineShape(
            1, self.sizes, self.kv_pages, self.rows, self.slots,
            self.tokens_per_s, self.iteration_s, self.idle_s, 0.0,
        )  # fmt: skip


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every process needs. launcher: endpoint of the launcher. origin: monotonic seconds of the trace's start;
    None in a first life, which begins when the launcher says so and is told the origin then. control_port: where the
    former life listened, 0 in a first one.
    """

    node: str
    epoch: int
    launcher: str
    origin: float | None
    speed: float
    profile: str
    rules: dict[str, Value]
    spec: str | None
    trace: str | None
    control_port: int = 0


class ServerConfig(ProcessConfig, frozen=True, tag="server", kw_only=True):
    """A bootstrap server."""

    port: int


class RankConfig(ProcessConfig, frozen=True, tag="rank", kw_only=True):
    """One rank. stages: nodes of its replica, stage by stage. layout: of its own memory;
    sources: of the prefill ranks, by their place in a replica. halts: trace events at which it stops itself."""

    side: Literal["prefill", "decode"]
    engine: str
    dp: int
    pp: int
    tp: int
    stages: tuple[tuple[str, ...], ...]
    shape: Shape
    peer_sizes: Sizes
    lengths: Lengths
    servers: dict[str, str]
    layout: Layout
    sources: dict[str, Layout]
    transport: str
    transport_options: dict[str, str | int | float | bool]
    seed: str
    monitored: bool = False
    halts: tuple[dict[str, str | int | float | bool | None], ...] = ()


Config = ServerConfig | RankConfig
