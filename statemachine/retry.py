"""Register retry: exponential back-off with jitter (sglang#25125). The caller draws the random number."""

from __future__ import annotations

from kvpoll.spec.protocol import Profile


def register_delay_s(profile: Profile, attempt: int, exhausted: bool, draw: float) -> float:
    """Seconds to wait after failed attempt number ``attempt`` (from 1). ``draw`` is uniform in [0, 1).

    min(first * 2^(attempt - 1), max) times a jitter in [register_jitter_low, 1]; the slow interval once exhausted.
    """
    if exhausted:
        return profile.number("register_slow_retry_s")
    low = profile.number("register_jitter_low")
    first, limit = profile.number("register_backoff_first_s"), profile.number("register_backoff_max_s")
    return min(first * 2.0 ** (attempt - 1), limit) * (low + (1.0 - low) * draw)
