"""Which DP rank of a prefill engine runs a room: one definition for check, registration and lookup.

With plain replicas every process is attention-DP rank 0 of itself; using that number where the replica's number
is meant is how the check of sglang#22901 came to reject half of all plain-DP traffic (B41).
"""

from __future__ import annotations

from collections.abc import Hashable

from kvpoll.spec.protocol import Profile
from kvpoll.statemachine.conduct import believes_in_attempts


def known_rank(profile: Profile, replica: int, dp_attention: bool) -> int:
    """The rank number that a prefill process believes it has, under the profile's notion of it."""
    if profile["dp_rank_notion"] == "attention" and not dp_attention:
        return 0
    return replica


def conflict(profile: Profile, room: int, dp_size: int, follows_room: bool, rank: int) -> str | None:
    """Why decode will not find a request that runs on ``rank``, or None (sglang#22901, PROTOCOL 9)."""
    if dp_size <= 1 or not follows_room or profile["dp_lookup"] == "query" or profile["dp_conflict"] == "unchecked":
        return None
    derived = room % dp_size
    if derived == rank:
        return None
    return f"dp_conflict: runs on dp {rank}, decode will look on dp {derived}; route by room or set dp_lookup = query"


def entry_key(profile: Profile, pair: tuple[int, int]) -> Hashable:
    """What the bootstrap server files a request's DP rank under: (room, attempt), or the bare room number.

    Under the bare number a reused room finds the DP rank of the request before it, until its own registration has
    arrived, or for ever where that was lost or overtaken; decode then publishes its pages to the wrong rank (S6).
    """
    return pair if believes_in_attempts(profile) else pair[0]


def must_register(profile: Profile, dp_size: int, follows_room: bool) -> bool:
    """Does the prefill rank have to tell the bootstrap server where the room runs?"""
    return dp_size > 1 and (not follows_room or profile["dp_lookup"] == "query")
