"""The loop of one process: time, timers, tasks, and what other threads hand in. One thread runs it.

It is the real sibling of SimPy's environment: ``after``, ``sleep`` and ``happening`` mean the same here and there.
Time is the monotonic clock, in seconds since an origin that all processes of a cluster share. ``speed`` makes it run
faster than the wall: a scenario whose deadlines are minutes is staged in seconds, while messages and bytes take the
time that they take.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kvpoll.runtime.control.plane import ControlPlane
from kvpoll.statemachine.ranks.host import Waiting

WAIT_MAX_S: Final = 0.25
"""The longest sleep in wall seconds; nothing needs it, a missed wake would cost no more."""

FAILED_KEPT: Final = 100
"""Defects that are remembered; all are logged."""

_log = logging.getLogger("kvpoll.runtime")


class Happening:
    """Something that tasks wait for, and that happens once."""

    __slots__ = ("_loop", "_waiting", "happened", "value")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: list[Callable[[Any], None]] = []
        self.happened = False
        self.value: Any = None

    def succeed(self, value: Any = None) -> None:
        """It has happened; who waits goes on with this value, at the loop's next turn."""
        if self.happened:
            return
        self.happened, self.value = True, value
        for resume in self._waiting:
            self._loop.soon(resume, value)
        self._waiting.clear()

    def then(self, resume: Callable[[Any], None]) -> None:
        """Call this when it has happened."""
        if self.happened:
            self._loop.soon(resume, self.value)
        else:
            self._waiting.append(resume)


class Loop:
    """Timers, tasks and posted calls of one process, around its control plane."""

    def __init__(self, plane: ControlPlane, origin: float | None = None, speed: float = 1.0) -> None:
        """origin: monotonic seconds of the trace's start (now, where it is None). speed: see above."""
        self.plane = plane
        self.clock = (time.monotonic() if origin is None else origin, speed)  # read by other threads, in one look
        self.stopped = False
        self.failed: list[str] = []
        self.before_wait: list[Callable[[], None]] = []
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._soon: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._thread: int | None = None  # that of the turn under way

    @property
    def now(self) -> float:
        """Seconds since the origin, ``speed`` times as fast as the wall."""
        origin, speed = self.clock
        return (time.monotonic() - origin) * speed

    @property
    def origin(self) -> float:
        """Monotonic second at which the trace's time was, or would have been, zero."""
        return self.clock[0]

    @origin.setter
    def origin(self, origin: float) -> None:
        self.clock = (origin, self.speed)

    @property
    def speed(self) -> float:
        """How much faster than the wall time runs."""
        return self.clock[1]

    def change_speed(self, at: float, speed: float) -> None:
        """From monotonic second ``at`` on, time runs at this speed; it does not jump there. Processes that are told
        the same agree again, however late each hears of it, as long as ``at`` is past and ``speed`` does not fall.
        """
        origin, former = self.clock
        self.clock = (at - (at - origin) * former / speed, speed)

    # -- from the loop's own thread

    def after(self, delay_s: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function later."""
        heapq.heappush(self._due, (self.now + delay_s, next(self._order), function, arguments))

    def soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function at the next turn."""
        self._soon.append((function, arguments))

    def happening(self) -> Happening:
        """What a task yields to go on when it succeeds."""
        return Happening(self)

    def sleep(self, delay_s: float) -> Happening:
        """What a task yields to go on after this time."""
        waits = Happening(self)
        self.after(delay_s, waits.succeed)
        return waits

    def spawn(self, task: Waiting) -> None:
        """Run a task."""
        self.soon(self._resume, task, None)

    def _resume(self, task: Waiting, value: Any) -> None:
        try:
            waits = task.send(value)
        except StopIteration:
            return
        waits.then(lambda happened: self._resume(task, happened))

    # -- from any thread

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the loop call a function, and wake it."""
        self._posted.append((function, arguments))
        if threading.get_ident() != self._thread:  # the loop looks at what was posted before it sleeps
            self.plane.wake()

    def stop(self) -> None:
        """End ``run`` after the turn that is under way."""
        self.stopped = True
        self.plane.wake()

    # -- turning

    def run(self, receive: Callable[[], None]) -> None:
        """Turn until ``stop``. ``receive`` takes what the control plane has."""
        while not self.stopped:
            self.turn(receive)

    def turn(self, receive: Callable[[], None], wait_s: float = WAIT_MAX_S) -> None:
        """One turn: what has arrived, what was posted, what is due; then sleep until something more comes.

        ``wait_s`` bounds the sleep, in wall seconds; 0 never sleeps.
        """
        self._thread = threading.get_ident()
        self._call(receive, ())
        for queue in (self._posted, self._soon):
            for _ in range(len(queue)):
                self._call(*queue.popleft())
        now = self.now
        while self._due and self._due[0][0] <= now and not self._soon:
            _, _, function, arguments = heapq.heappop(self._due)
            self._call(function, arguments)
        for prepare in self.before_wait:
            prepare()
        self._call(self.plane.flush, ())
        if not (self._soon or self._posted or self.stopped):
            due_s = (self._due[0][0] - self.now) / self.speed if self._due else wait_s
            if due_s > 0 and wait_s > 0:
                self.plane.wait(min(wait_s, due_s))
        self._thread = None

    def _call(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """A defect in one call is told and remembered; it ends neither the loop nor another request (S10)."""
        try:
            function(*arguments)
        except Exception as error:
            if len(self.failed) < FAILED_KEPT:
                self.failed.append(f"{type(error).__name__}: {error}")
            _log.exception("%s: a call of the loop failed", self.plane.node)
