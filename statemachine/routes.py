"""Which endpoints a decode rank may use: those of processes that live, as far as it knows."""

from __future__ import annotations

from kvpoll.spec.protocol import Profile


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
