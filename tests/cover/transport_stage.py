"""What the stories of transports share: waiting for something to come true."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 20.0


def eventually(holds: Callable[[], object]) -> bool:
    """True, once it holds. Raises AssertionError when it does not come true."""
    until_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < until_s, f"it did not come true within {LIMIT_S:g} s"
        time.sleep(0.001)
    return True
