"""SGLang's own rank mapping, asked without a network: reads questions from standard input, prints its answers.

A question: ``prefill`` and ``decode`` (sizes), ``rank`` ([tp, pp] of the decode rank), and the flags of map_ranks.
An answer: what ``CommonKVManager._resolve_rank_mapping`` leaves in the PrefillServerInfo, or the refusal's kind.
Whether all CP ranks are asked is decided in the manager's constructor, which is run for real when ``construct`` is
given to the script; else that one decision is repeated here, since constructing binds a socket for each question.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import engine_on_cpu
from sglang.srt.disaggregation.common.conn import CommonKVManager, PrefillServerInfo
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_parallel

SIZES = {"dp": 1, "pp": 1, "tp": 1, "cp": 1}


class Manager(CommonKVManager):
    """The common part alone is abstract; nothing of its constructor or mapping is replaced."""


def constructed(question: dict[str, Any]) -> Any:
    """A real decode manager with these sizes and this rank."""
    sizes, (tp, pp) = SIZES | question["decode"], question["rank"]
    width = sizes["tp"]
    arguments = engine_on_cpu.configure(1)
    places = {
        f"{kind}tp_{name}": value for kind in ("", "attn_", "moe_") for name, value in (("size", width), ("rank", tp))
    }
    others = dict.fromkeys(("dp_rank", "attn_dp_rank", "attn_cp_rank", "attn_dcp_rank"), 0)
    stages = SimpleNamespace(world_size=sizes["pp"], rank_in_group=pp)
    get_parallel().clear_stamp()
    get_parallel().override_permanently(**places, **others, pp_size=sizes["pp"], pp_rank=pp, pp_group=stages)
    args = engine_on_cpu.Memory().described()
    args.engine_rank, args.pp_rank, args.is_hybrid_mla_backend = tp, pp, question.get("hybrid_mla", False)
    os.environ["SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER"] = str(question.get("all_cp_ranks", False))
    Manager.__abstractmethods__ = frozenset()
    return Manager(args, DisaggregationMode.DECODE, arguments, question.get("mla", False))


def described(question: dict[str, Any]) -> Any:
    """What the mapping reads of a decode manager."""
    sizes, (tp, pp) = SIZES | question["decode"], question["rank"]
    return SimpleNamespace(
        is_mla_backend=question.get("mla", False),
        is_hybrid_mla_backend=question.get("hybrid_mla", False),
        enable_all_cp_ranks_for_transfer=question.get("all_cp_ranks", False) or question.get("hybrid_mla", False),
        attn_tp_size=sizes["tp"],
        attn_cp_size=sizes["cp"],
        attn_cp_rank=0,
        pp_size=sizes["pp"],
        pp_rank=pp,
        kv_args=SimpleNamespace(engine_rank=tp),
    )


def answer(question: dict[str, Any], manager: Any) -> dict[str, Any]:
    sizes = SIZES | question["prefill"]
    info = PrefillServerInfo(
        attn_tp_size=sizes["tp"], attn_cp_size=sizes["cp"], dp_size=sizes["dp"], pp_size=sizes["pp"], page_size=1,
        kv_cache_dtype=None, follow_bootstrap_room=True, enable_kv_cache_sharding=question.get("kv_sharding", False),
    )  # fmt: skip
    try:
        CommonKVManager._resolve_rank_mapping(manager, info)
    except AssertionError:
        return {"refused": True}
    return {
        "tp_ranks": info.target_tp_ranks,
        "cp_ranks": info.target_cp_ranks,
        "pp_ranks": list(reversed(info.target_pp_ranks)),  # the order in which _setup_bootstrap_infos asks
        "destinations": info.required_dst_info_num,
        "responses": info.required_prefill_response_num,
        # as _setup_bootstrap_infos marks them
        "dummies": manager.is_mla_backend
        and info.target_tp_rank is not None
        and info.target_tp_ranks != [info.target_tp_rank],
    }


make = constructed if sys.argv[1:] == ["construct"] else described
print(json.dumps([answer(question, make(question)) for question in json.load(sys.stdin)]), flush=True)
os._exit(0)
