"""The floor under every simulation here: SimPy alone, doing nothing as often as a run did something."""

from __future__ import annotations

import time

import simpy

DELAYS_S = tuple(0.001 * 7919 * number % 1.0 + 0.001 for number in range(1, 98))
"""Delays in no order, so that the heap has to work."""


def bare_loop_s(events: int, pending: int) -> float:
    """Seconds that SimPy needs for ``events`` timeouts of one callback each, with ``pending`` on its heap."""
    env = simpy.Environment()
    left = events - pending
    count = len(DELAYS_S)

    def fire(_: simpy.Event) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            schedule(DELAYS_S[left % count])

    def schedule(delay_s: float) -> None:
        event = simpy.Timeout(env, delay_s)
        assert event.callbacks is not None
        event.callbacks.append(fire)

    began = time.process_time()
    for number in range(min(pending, events)):
        schedule(DELAYS_S[number % count])
    env.run()
    return time.process_time() - began
