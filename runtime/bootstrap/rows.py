"""What a rank says of itself when it registers, and what a decode rank is told: the fields of SGLang's bootstrap API.

Names and meanings are SGLang 0.5.23's (PROTOCOL 6), so that either side may be SGLang's. Ours are ``process_epoch``,
``rank_name`` and ``node`` of a rank, and the server's ``server_epoch``; all of them may be missing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

EPOCH_HEADER: Final = "X-Kvpoll-Epoch"
"""Header of every answer of our server: the life of the server."""

OWN_FIELDS: Final = ("process_epoch", "rank_name", "node")
"""Fields of a rank that SGLang does not know; sent only where they are set."""

MAPPING_FIELDS: Final = (
    "target_tp_rank", "target_tp_ranks", "target_cp_ranks", "target_pp_ranks",
    "required_dst_info_num", "required_prefill_response_num",
)  # fmt: skip
"""SGLang answers with its whole PrefillServerInfo, of which decode fills these in later: they are null on the wire."""


class Coordinate(NamedTuple):
    """Where a prefill rank stands in its engine. ``dp`` is the replica, or the attention-DP rank (PROTOCOL 6)."""

    dp: int
    cp: int
    tp: int
    pp: int

    @property
    def name(self) -> str:
        """``dp0/pp0/cp0/tp1``: how the machine of the registry and the metrics call the rank."""
        return f"dp{self.dp}/pp{self.pp}/cp{self.cp}/tp{self.tp}"


TOPOLOGY: Final = Coordinate(-1, -1, -1, -1)
"""What ``GET /route`` asks for when it wants the engine's sizes instead of one rank."""


@dataclass(frozen=True)
class Topology:
    """Sizes and layout of a prefill engine; the ranks of a decode engine compute from it whom to contact.

    page_size: tokens in a page. kv_cache_dtype, kv_layout: as the engine calls them, None where it did not say.
    follow_bootstrap_room: requests run on DP rank ``room mod dp_size``. prefill_http_port: the engine's own API.
    server_epoch: life of the bootstrap server that answered, None from SGLang's.
    """

    attn_tp_size: int
    attn_cp_size: int
    dp_size: int
    pp_size: int
    page_size: int | None
    kv_cache_dtype: str | None
    follow_bootstrap_room: bool = True
    enable_dsa_cache_layer_split: bool = False
    dsv41_spec_layout: dict[str, Any] | None = None
    kv_layout: str | None = None
    decode_allocation_policy: str = "early"
    enable_kv_cache_sharding: bool = False
    prefill_http_port: int | None = None
    server_epoch: int | None = None

    @property
    def rank_count(self) -> int:
        """How many ranks the engine has."""
        return self.dp_size * self.attn_cp_size * self.attn_tp_size * self.pp_size

    def as_json(self) -> dict[str, Any]:
        """The answer of SGLang's server, field by field; layouts only where they are set, and no field of ours.

        SGLang's client passes the answer to a constructor: one unknown field and it would never learn the topology.
        """
        told = dataclasses.asdict(self) | dict.fromkeys(MAPPING_FIELDS)
        del told["server_epoch"]
        for name in ("dsv41_spec_layout", "kv_layout"):
            if told[name] is None:
                del told[name]
        return told

    @classmethod
    def read(cls, data: Any) -> Topology:
        """The topology in an answer. Raises ValueError when it is none; fields of a newer server are passed over."""
        if not isinstance(data, dict):
            raise ValueError("not an object")
        told: dict[str, Any] = {"page_size": None, "kv_cache_dtype": None}
        for name, form in _FORMS.items():
            if data.get(name) is not None:
                if type(data[name]) is not form:
                    raise ValueError(f"{name} is {data[name]!r}")
                told[name] = data[name]
        told |= {name: _size(data, name) for name in _SIZES}
        return cls(**told)


_SIZES: Final = ("attn_tp_size", "attn_cp_size", "dp_size", "pp_size")
_FORMS: Final[dict[str, type]] = {
    "page_size": int, "kv_cache_dtype": str, "kv_layout": str, "decode_allocation_policy": str,
    "follow_bootstrap_room": bool, "enable_dsa_cache_layer_split": bool, "enable_kv_cache_sharding": bool,
    "dsv41_spec_layout": dict, "prefill_http_port": int, "server_epoch": int,
}  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    """Where a prefill rank listens for metadata, and which life of it that is (None: it did not say)."""

    rank_ip: str
    rank_port: int
    process_epoch: int | None = None
    rank_name: str | None = None
    node: str | None = None

    def as_json(self) -> dict[str, Any]:
        """SGLang's two fields, and ours where they are set; its client keeps the answer as a dictionary."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def read(cls, data: Any) -> Endpoint:
        """The endpoint in an answer. Raises ValueError when it is none."""
        if not isinstance(data, dict) or type(data.get("rank_ip")) is not str:
            raise ValueError("no rank_ip")
        epoch = data.get("process_epoch")
        if epoch is not None and type(epoch) is not int:
            raise ValueError(f"process_epoch is {epoch!r}")
        names = [value if isinstance(value := data.get(name), str) else None for name in ("rank_name", "node")]
        return cls(data["rank_ip"], _size(data, "rank_port"), epoch, *names)


@dataclass(frozen=True)
class RankInfo:
    """Body of ``PUT /route``. Sizes count ranks, ranks count from 0.

    attn_dp: data parallelism inside attention; system_dp: plain replicas. The engine has one of the two; a rank's
    ``dp`` is its replica where there are several, else its attention-DP rank. page_size: tokens. process_epoch:
    life of this rank's process, larger after every restart; None as from SGLang, which always replaces.
    """

    rank_ip: str
    rank_port: int
    page_size: int
    kv_cache_dtype: str | None
    attn_tp_size: int = 1
    attn_tp_rank: int = 0
    attn_cp_size: int = 1
    attn_cp_rank: int = 0
    attn_dp_size: int = 1
    attn_dp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    system_dp_size: int = 1
    system_dp_rank: int = 0
    kv_layout: str | None = None
    dsv41_spec_layout: dict[str, Any] | None = None
    load_balance_method: str | None = "follow_bootstrap_room"
    enable_dsa_cache_layer_split: bool = False
    enable_kv_cache_sharding: bool = False
    prefill_http_port: int | None = None
    decode_allocation_policy: str = "early"
    process_epoch: int | None = None
    rank_name: str | None = None
    node: str | None = None

    @property
    def coordinate(self) -> Coordinate:
        """Which rank of the engine this is."""
        dp = self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank
        return Coordinate(dp, self.attn_cp_rank, self.attn_tp_rank, self.pp_rank)

    @property
    def topology(self) -> Topology:
        """The engine as this rank sees it."""
        return Topology(
            attn_tp_size=self.attn_tp_size,
            attn_cp_size=self.attn_cp_size,
            dp_size=self.attn_dp_size if self.system_dp_size == 1 else self.system_dp_size,
            pp_size=self.pp_size,
            page_size=self.page_size,
            kv_cache_dtype=self.kv_cache_dtype,
            follow_bootstrap_room=self.load_balance_method == "follow_bootstrap_room",
            enable_dsa_cache_layer_split=self.enable_dsa_cache_layer_split,
            dsv41_spec_layout=self.dsv41_spec_layout,
            kv_layout=self.kv_layout,
            decode_allocation_policy=self.decode_allocation_policy,
            enable_kv_cache_sharding=self.enable_kv_cache_sharding,
            prefill_http_port=self.prefill_http_port,
        )

    @property
    def endpoint(self) -> Endpoint:
        """Where this rank listens."""
        return Endpoint(self.rank_ip, self.rank_port, self.process_epoch, self.rank_name, self.node)

    @property
    def label(self) -> str:
        """How a message names this rank: its name or place, and its address."""
        return f"{self.rank_name or self.coordinate.name} at {self.rank_ip}:{self.rank_port}"

    def as_json(self) -> dict[str, Any]:
        """The body of the PUT."""
        told = dataclasses.asdict(self)
        return {name: value for name, value in told.items() if value is not None or name not in OWN_FIELDS}


def _size(data: dict[str, Any], name: str) -> int:
    value = data.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value
