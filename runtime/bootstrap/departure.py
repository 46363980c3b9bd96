"""A rank that leaves on purpose (planned scale-down): one step of the registry that its table does not have yet.

Written in the form of ``Machine.step`` so that it can be replaced by it. Limit: nothing is remembered of a rank that
has left, so a PUT of the same life that was overtaken by its own DELETE would list it again.
"""

from __future__ import annotations

from kvpoll.statemachine.machine import Orders
from kvpoll.statemachine.roles import Registry


def unregister(registry: Registry, rank: str, epoch: int) -> tuple[Registry, Orders]:
    """RankUnregistered: next registry and orders.

    A life that is listed, or its successor whose own registration never came, takes the entry away (AnswerRoute);
    a predecessor's late goodbye does not (AnswerStale); nor can one leave that is not there (AnswerUnknownRank).
    A count of PUTs goes down by one, since it is what that rule calls readiness (C1).
    """
    known = dict(registry.ranks).get(rank)
    if known is None:
        return registry, (("AnswerUnknownRank", None),)
    if epoch < known:
        return registry, (("AnswerStale", None),)
    ranks = tuple(entry for entry in registry.ranks if entry[0] != rank)
    if not ranks:
        return Registry(), (("AnswerRoute", None),)
    return Registry("Partial", ranks, max(0, registry.puts - 1)), (("AnswerRoute", None),)
