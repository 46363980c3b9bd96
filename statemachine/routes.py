"""How long a decode rank asks for a topology or an endpoint, and which it may use: those of living processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpoll.spec.protocol import Profile
from kvpoll.spec.vocabulary import ROOMLESS_CAUSES

if TYPE_CHECKING:
    from kvpoll.statemachine.machine import Local


def gives_up(profile: Profile, own: int, shared: int) -> bool:
    """Has a request waited long enough for its server's topology, after ``own`` answers since it came?

    ``shared``: answers since the first of the requests that now wait together. Where that counts, a request that
    comes late in an outage is failed with those before it, although the server may be back a second later (L4).
    """
    return (own if profile["topology_patience"] == "own" else shared) >= profile.number("topology_attempts")


def asks_together(profile: Profile) -> bool:
    """Do requests that need the same endpoint ask for it once? Where each is asked again, only so is R3 kept."""
    return profile["endpoint_patience"] == "as_topology"


def gives_up_endpoint(profile: Profile, useless: int) -> bool:
    """Has a request waited long enough for an endpoint, after so many answers that were of no use to it?"""
    return profile["endpoint_patience"] == "none" or useless >= profile.number("topology_attempts")


def still_looks(profile: Profile, room: Local) -> bool:
    """Is it worth while to look for the prefill ranks of this room: to set it up, or to tell them that it has failed?

    A room that has failed is looked for until they are found, or until it is forgotten: at the end of its tombstone.
    What the router has seen for itself (ROOMLESS_CAUSES) it tells both sides, or one of them is gone: then a search
    would end at another life of prefill, which knows of no such request and would keep its abort for minutes (R2).
    """
    if room.poll == "Bootstrapping":
        return True
    has_failed = room.poll == "Failed" or (room.poll == "Retired" and room.cause is not None)
    looks_on = profile["decode_failure_notice"] == "looks_on" and room.cause not in ROOMLESS_CAUSES
    return has_failed and room.contacted == 0 and looks_on


MISMATCH = "mismatch"
"""Status of a topology that was answered and can never be used: other page size, dtype, or sizes that do not fit."""


def forgets_on_timeout(profile: Profile) -> bool:
    """Is a request's timeout the only thing that drops a cached endpoint (A21)?"""
    return profile["route_cache"] == "by_address"


def may_use(profile: Profile, endpoint_epoch: int, believed_epoch: int | None) -> bool:
    """May metadata go to an endpoint of this process epoch?

    Under ``route_cache = "by_epoch"`` an endpoint is refused when the failure detector has already seen a later
    life of the process: the server still lists the dead one (A21). Otherwise whatever is listed is used.
    """
    if profile["route_cache"] == "by_address" or believed_epoch is None:
        return True
    return endpoint_epoch >= believed_epoch
