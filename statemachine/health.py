"""What a health endpoint may say."""

from __future__ import annotations

from kvpoll.spec.protocol import Profile


def reports_healthy(profile: Profile, process_alive: bool, registered: bool, loops_running: bool) -> bool:
    """Under ``can_serve`` an engine is healthy only while a request could finish on it (O2, A04, sglang#25125)."""
    if profile["health"] == "process_alive":
        return process_alive
    return process_alive and registered and loops_running
