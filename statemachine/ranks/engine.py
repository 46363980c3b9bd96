"""The server process tree that a rank belongs to, as the rank sees it, and the shape of its pools and speeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.host import Host, Waiting


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


class Home(Protocol):
    """The engine of a rank. Its ranks live and die together, at one address, life after life."""

    name: str
    epoch: int
    shape: EngineShape

    @property
    def host(self) -> Host:
        """The outside."""

    def pace(self, rank: Any) -> float:
        """How much slower than nominal this rank runs now."""

    def report_health(self) -> None:
        """Say what the health endpoint says, and what is true."""


class Collectives(Protocol):
    """The sequence of collectives of one group. Rank i's k-th entry meets every other rank's k-th entry."""

    size: int
    blocked: bool

    def enter(self, index: int, node: str, kind: str, shape: Any, payload: Any) -> Waiting:
        """Enter the next collective; returns the payloads of all ranks, in order of rank, once all have entered.

        Never returns when the ranks disagree about kind or shape.
        """


class Turns(Protocol):
    """The turns that the ranks of one group take together, asleep while there is nothing to see."""

    def wake(self) -> None:
        """Something changed: one more turn for everybody, after any that a rank has already begun."""

    def again(self, index: int) -> None:
        """The turn that rank ``index`` has just taken changed something: one more after it."""

    def rest(self, index: int) -> Waiting:
        """Sleep until a turn is wanted that rank ``index`` has not begun, then begin it."""


class PrefillHome(Home, Protocol):
    """A prefill engine."""

    @property
    def dp_ranks(self) -> int:
        """Data-parallel replicas."""

    @property
    def dp_attention(self) -> bool:
        """Data-parallel attention, or plain replicas."""

    @property
    def follows_room(self) -> bool:
        """Does its controller dispatch by room mod dp?"""

    @property
    def rank_count(self) -> int:
        """How many ranks the bootstrap server must expect."""

    @property
    def destinations_required(self) -> int:
        """Decode ranks that write metadata for a room to each rank."""


class PrefillGroup(Protocol):
    """One data-parallel replica: its pipeline stages, each a tensor x context group."""

    name: str
    dp: int
    stages: int
    size: int

    @property
    def turns(self) -> Turns:
        """Turns of the ranks of stage 0."""

    def stage_collectives(self, pp: int) -> Collectives:
        """The collectives of one stage."""

    def stage_turns(self) -> Turns:
        """Turns of a rank of a later stage, which follows the steps of stage 0."""

    def wake(self) -> None:
        """Every rank of stage 0 takes a turn; the later stages follow."""

    def block(self) -> None:
        """The pipeline hangs."""

    def leader_of(self, rank: Any) -> str:
        """The stage-0 rank of the same column."""

    def successor_of(self, rank: Any) -> str | None:
        """The same column's rank in the next stage."""


class DecodeGroup(Protocol):
    """The tensor ranks of one decode replica."""

    name: str

    @property
    def turns(self) -> Turns:
        """Turns of its ranks."""

    @property
    def collectives(self) -> Collectives:
        """Collectives of its ranks."""

    def wake(self) -> None:
        """Every rank takes a turn."""


def prefill_timers(profile: Any) -> dict[str, float]:
    """Timer -> seconds, of a prefill rank."""
    timers = {name: profile.number(f"{name}_timeout_s") for name in ("bootstrap", "announced", "tombstone")}
    return timers | {"transfer": profile.number("waiting_timeout_s")}


def decode_timers(profile: Any) -> dict[str, float]:
    """Timer -> seconds, of a decode rank."""
    names: Iterable[str] = ("bootstrap", "admission", "waiting", "drain")
    timers = {name: profile.number(f"{name}_timeout_s") for name in names}
    return timers | {"tombstone": profile.number("decode_tombstone_timeout_s")}
