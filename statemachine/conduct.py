"""Rules about the conduct of a driver, as named questions: what it does around the steps of the machines.

Explorer, simulator and runtime ask the same question in the same words, so that no driver reads a rule by itself.
"""

from __future__ import annotations

from kvpoll.spec.protocol import Profile


def believes_in_attempts(profile: Profile) -> bool:
    """Are two uses of one room number two rooms (S2)?"""
    return profile["identity"] == "incarnation"


def illegal_fact_stops(profile: Profile) -> bool:
    """Does an illegal fact end the scheduler loop (A04), or fail its request only (S10)?"""
    return profile["illegal_fact"] == "stops_scheduler"


def probes_ranks(profile: Profile) -> bool:
    """Do probes reach the ranks, both ways, and carry process epochs? Else decode asks the bootstrap server alone."""
    return profile["liveness_probe"] == "rank_epoch"


def watches_server(profile: Profile) -> bool:
    """Does a rank notice that the bootstrap server was restarted, and register again (C5)?"""
    return profile["registration_watch"] == "epoch"


def queues_at_arrival(profile: Profile) -> bool:
    """Does a decode rank queue a request when it comes, or when it has learned the way to it (sglang#21299)?"""
    return profile["decode_enqueue"] == "at_arrival"


def waits_for_http(profile: Profile, route: str) -> bool:
    """Does the scheduler stand still until this request is answered (A19)? What it sends by POST, it never awaits."""
    return profile["http_calls"] == "blocking" and not route.startswith("POST")


def follows_wall_clock(profile: Profile) -> bool:
    """Do deadlines move with the wall clock (PROTOCOL 17.5)?"""
    return profile["deadline_clock"] == "wall"


def counts_pages(profile: Profile) -> bool:
    """Does a prefill rank compare the pages of a prompt with those that decode has published (A08)?"""
    return profile["page_count"] == "agreed"


def stops_writes(profile: Profile) -> bool:
    """Is a transport asked to end the writes of a failed request? Else pages wait for as long as those would take."""
    return profile["failed_writes"] == "stopped"


def fences(profile: Profile) -> bool:
    """Does a decode rank that can refuse writes make a proof of it? Where pages go without one, nobody asks for it."""
    return profile["release_requires_quiescence"] == "proof"


def sends_again(profile: Profile) -> bool:
    """Is what a disconnect may have lost sent again when the link is back (B63)?"""
    return profile["resend_on_reconnect"] == "yes"
