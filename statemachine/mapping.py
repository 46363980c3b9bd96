"""Who talks to whom: which prefill ranks one decode rank contacts, and how many answers each side counts.

Pure arithmetic over parallel sizes (PROTOCOL 7.4, executed there for 18 topologies).
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
    responses_required: distinct prefill ranks whose Success completes the room.
    has_dummies: ranks after the first get dummy metadata and answer nothing (MLA with Dtp < Ptp).
    """

    tp_ranks: tuple[int, ...]
    cp_ranks: tuple[int, ...]
    pp_ranks: tuple[int, ...]
    destinations_required: int
    responses_required: int
    has_dummies: bool = False


def map_ranks(prefill: Sizes, decode: Sizes, decode_tp: int, decode_pp: int = 0, mla: bool = False) -> Mapping:
    """The mapping of the decode rank with TP index ``decode_tp`` and stage ``decode_pp``.

    Raises ValueError when the sizes cannot be mapped (PROTOCOL 6: decode CP must be 1, decode PP is 1 or equal to
    prefill's, and one TP size divides the other).
    """
    if decode.cp != 1:
        raise ValueError("decode CP must be 1")
    if decode.pp not in (1, prefill.pp):
        raise ValueError(f"decode PP {decode.pp} must be 1 or equal to prefill's PP {prefill.pp}")
    small, large = sorted((prefill.tp, decode.tp))
    if large % small:
        raise ValueError(f"prefill TP {prefill.tp} and decode TP {decode.tp}: one must divide the other")
    ratio = large // small
    rank = decode_tp % decode.tp
    destinations, responses, dummies = 1, 1, False
    if decode.tp > prefill.tp:
        tp_ranks: tuple[int, ...] = (rank // ratio,)
        destinations = ratio
    else:
        tp_ranks = tuple(range(rank * ratio, (rank + 1) * ratio))
        dummies = mla and ratio > 1
        responses = 1 if mla else ratio
    pp_ranks = (decode_pp,) if decode.pp > 1 else tuple(reversed(range(prefill.pp)))
    return Mapping(tp_ranks, (0,), pp_ranks, destinations, responses * len(pp_ranks), dummies)
