"""The words that every room shares: poll numbers, incarnations, facts and actions.

Nothing here decides anything. A *fact* is an input to a machine, named in the past tense; an *action* is an
output, named as an order. Both carry the *incarnation* they concern, because a room number alone is reused in
practice and therefore identifies nothing.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

POLL_NUMBERS: Final[dict[str, int]] = {
    "Failed": 0,
    "Bootstrapping": 1,
    "WaitingForInput": 2,
    "Transferring": 3,
    "Success": 4,
}
"""The five KVPoll values. Ranks are merged by minimum, so Failed dominates and Success needs everyone."""

TERMINAL_POLLS: Final[frozenset[str]] = frozenset({"Success", "Failed"})

UNPOLLED: Final[frozenset[str]] = frozenset({"Absent", "Announced", "Retired"})
"""Room states without a poll number: no owner has opened the room (yet), or its owner has cleared it.

Absent: nothing is known. Announced: the peer spoke first. Retired: a tombstone that remembers the outcome.
"""

ROOMLESS_CAUSES: Final[frozenset[str]] = frozenset(
    {"engine_crashed", "connection_refused", "client_left", "room_in_use"}
)
"""Failures that no room reports: the router sees them for itself, or a rank refused to open a room."""


class Incarnation(NamedTuple):
    """The identity of one try at one room, as one process holds it.

    room: pairing number drawn by the router (63 bits); reused in practice.
    attempt: how often this room number has been used before, counted by the router.
    epoch: incarnation of the process that keeps the state (0 for its first life). A message carries the epoch
        of its *receiver* as the sender knew it, so that a restarted process recognises mail for its predecessor.
    """

    room: int
    attempt: int
    epoch: int

    @property
    def pair(self) -> tuple[int, int]:
        """What the prefill and the decode side have in common: (room, attempt)."""
        return self[:2]


class Fact(NamedTuple):
    """Something that happened, offered to a machine: kind, whom it concerns, and a small detail (or None)."""

    kind: str
    incarnation: Incarnation
    detail: Any = None


class Action(NamedTuple):
    """Something a machine orders its driver to do: kind, whom it concerns, and a small detail (or None)."""

    kind: str
    incarnation: Incarnation
    detail: Any = None
