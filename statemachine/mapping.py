"""Who talks to whom: which prefill ranks one decode rank contacts, and how many answers each side counts.

Pure arithmetic over parallel sizes: what SGLang 0.5.23 computes in ``CommonKVManager._resolve_rank_mapping``, once per
decode rank and prefill address. Both sides must be given the same answers to the questions below (is it MLA, is the
KV sharded, do all CP ranks send): prefill decides by itself which of its ranks are dummies, and a decode rank that
expects one more answer than there are senders waits for its deadline.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Parallel sizes of one engine: data, pipeline, tensor, context. Decode engines have cp = 1."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1


class Mapping(NamedTuple):
    """What one decode rank must know about the prefill engine it is about to use.

    tp_ranks: prefill TP ranks to contact; the first is the real one where the others are dummies.
    cp_ranks, pp_ranks: likewise (stages from the highest down, as endpoints are requested).
    destinations_required: decode ranks that write metadata for a room to each of those prefill ranks.
    responses_required: distinct prefill ranks whose Success completes the room, over all TP, CP and PP ranks.
    has_dummies: ranks after the first get dummy metadata and answer nothing (MLA with Dtp < Ptp).
    """

    tp_ranks: tuple[int, ...]
    cp_ranks: tuple[int, ...]
    pp_ranks: tuple[int, ...]
    destinations_required: int
    responses_required: int
    has_dummies: bool = False


def map_ranks(
    prefill: Sizes,
    decode: Sizes,
    decode_tp: int,
    decode_pp: int = 0,
    mla: bool = False,
    *,
    hybrid_mla: bool = False,
    kv_sharding: bool = False,
    all_cp_ranks: bool = False,
) -> Mapping:
    """The mapping of the decode rank with TP index ``decode_tp`` and stage ``decode_pp``.

    mla: every TP rank of an engine holds the same latent KV, so one writer is enough. hybrid_mla: MLA beside layers
    of another kind, whose state is sharded: its TP ranks count as those of a model without MLA, and all CP ranks
    send. kv_sharding: each prefill rank holds some of the logical pages (over TP when ``mla`` and CP is 1, else over
    CP). all_cp_ranks: every CP rank sends, because the environment says so or because layers are split over CP.

    Raises ValueError when the sizes cannot be mapped: decode CP must be 1, decode PP is 1 or equal to prefill's, one
    TP size divides the other, and MLA sharded over TP needs equal TP sizes.
    """
    _check(prefill, decode)
    sharded_over_tp = mla and kv_sharding and prefill.cp == 1
    if sharded_over_tp and prefill.tp != decode.tp:
        raise ValueError(f"MLA KV sharded over TP needs equal TP sizes, not {prefill.tp} and {decode.tp}")
    rank = decode_tp % decode.tp
    destinations, responses, dummies = 1, 1, False
    if sharded_over_tp:
        tp_ranks = tuple(range(prefill.tp))
        destinations, responses = decode.tp, prefill.tp
    elif decode.tp >= prefill.tp:
        destinations = decode.tp // prefill.tp
        tp_ranks = (rank // destinations,)
    else:
        ratio = prefill.tp // decode.tp
        tp_ranks = tuple(range(rank * ratio, (rank + 1) * ratio))
        dummies = mla
        responses = 1 if mla else ratio
    every_cp = hybrid_mla or kv_sharding or all_cp_ranks
    cp_ranks = tuple(range(prefill.cp)) if every_cp else (0,)
    pp_ranks = (decode_pp,) if decode.pp == prefill.pp else tuple(reversed(range(prefill.pp)))
    return Mapping(tp_ranks, cp_ranks, pp_ranks, destinations, responses * len(cp_ranks) * len(pp_ranks), dummies)


def _check(prefill: Sizes, decode: Sizes) -> None:
    if decode.cp != 1:
        raise ValueError("decode CP must be 1")
    if decode.pp not in (1, prefill.pp):
        raise ValueError(f"decode PP {decode.pp} must be 1 or equal to prefill's PP {prefill.pp}")
    small, large = sorted((prefill.tp, decode.tp))
    if large % small:
        raise ValueError(f"prefill TP {prefill.tp} and decode TP {decode.tp}: one must divide the other")
