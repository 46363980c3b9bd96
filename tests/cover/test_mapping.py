"""The rank mapping over the topologies that SGLang 0.5.23 was asked about (PROTOCOL 7.4), and its bookkeeping.

The table is ``tests/integration/sglang_mapping/topologies.toml``; test_sglang_mapping.py asks the real code again.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kvpoll.statemachine.mapping import Mapping, Sizes, map_ranks

TABLE = Path(__file__).parents[1] / "integration" / "sglang_mapping" / "topologies.toml"
TOPOLOGIES: list[dict[str, Any]] = tomllib.loads(TABLE.read_text())["topology"]
FLAGS = ("mla", "hybrid_mla", "kv_sharding", "all_cp_ranks")


def flags(topology: dict[str, Any]) -> dict[str, bool]:
    return {name: topology.get(name, False) for name in FLAGS}


def test_the_table_has_eighteen_different_topologies() -> None:
    asked = {(str(each["prefill"]), str(each["decode"]), *flags(each).values()) for each in TOPOLOGIES}
    assert len(TOPOLOGIES) == len(asked) == 18


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda topology: topology["name"])
def test_a_decode_rank_contacts_whom_sglang_contacts(topology: dict[str, Any]) -> None:
    prefill, decode = Sizes(**topology["prefill"]), Sizes(**topology["decode"])
    assert map_ranks(prefill, decode, *topology["rank"], **flags(topology)) == Mapping(
        tp_ranks=tuple(topology["tp_ranks"]),
        cp_ranks=tuple(topology.get("cp_ranks", [0])),
        pp_ranks=tuple(topology.get("pp_ranks", [0])),
        destinations_required=topology["destinations"],
        responses_required=topology["responses"],
        has_dummies=topology.get("dummies", False),
    )


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda topology: topology["name"])
def test_over_all_decode_ranks_both_sides_count_alike(topology: dict[str, Any]) -> None:
    """Each contacted prefill rank is contacted by as many as it was told, and answers are counted from real ones."""
    prefill, decode = Sizes(**topology["prefill"]), Sizes(**topology["decode"])
    contacts: Counter[tuple[int, int, int]] = Counter()
    for tp, pp in product(range(decode.tp), range(decode.pp)):
        mapping = map_ranks(prefill, decode, tp, pp, **flags(topology))
        real = mapping.tp_ranks[:1] if mapping.has_dummies else mapping.tp_ranks
        assert mapping.responses_required == len(real) * len(mapping.cp_ranks) * len(mapping.pp_ranks)
        contacts.update(product(mapping.pp_ranks, mapping.cp_ranks, mapping.tp_ranks))
    senders = product(range(prefill.pp), mapping.cp_ranks, range(prefill.tp))
    assert contacts == dict.fromkeys(senders, mapping.destinations_required)


def test_mla_sharded_over_tp_needs_equal_sizes() -> None:
    with pytest.raises(ValueError) as error:
        map_ranks(Sizes(tp=4), Sizes(tp=2), 0, mla=True, kv_sharding=True)
    assert str(error.value) == "MLA KV sharded over TP needs equal TP sizes, not 4 and 2"
    assert map_ranks(Sizes(tp=4, cp=2), Sizes(tp=2), 0, mla=True, kv_sharding=True).has_dummies
