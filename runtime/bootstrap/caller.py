"""Lets a scheduler use the bootstrap client without waiting for it (rule http_calls, A19).

A few threads make the calls; the answers come back through the scheduler's own ``post``. The queue is bounded and
refuses when it is full, and no single address can hold all threads: a server that takes connections and never answers
delays the calls to itself, not those to its neighbours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, NamedTuple

from kvpoll.runtime.bootstrap.client import NOT_AN_ANSWER, Reply

CLOSE_LIMIT_S: Final = 1.0

logger = logging.getLogger(__name__)


class _Call(NamedTuple):
    lane: str
    act: Callable[[], Reply]
    then: Callable[[Reply], None]


class Caller:
    """A small pool of threads that make HTTP calls.

    post: hands a function to the scheduler's loop, from any thread (``loop.call_soon_threadsafe``, a queue's put).
    queue_max: calls that wait. lane_max: calls of one lane in progress at a time; by default all threads but one.
    """

    def __init__(
        self,
        post: Callable[[Callable[[], None]], object],
        threads: int = 4,
        queue_max: int = 256,
        lane_max: int | None = None,
    ) -> None:
        self.refused = 0
        self._post = post
        self._queue_max = queue_max
        self._lane_max = max(1, threads - 1) if lane_max is None else lane_max
        self._waiting: deque[_Call] = deque()
        self._busy: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._is_open = True
        self._threads = [
            threading.Thread(target=self._work, name=f"bootstrap call {number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Calls that wait for a thread."""
        return len(self._waiting)

    def submit(self, lane: str, act: Callable[[], Reply], then: Callable[[Reply], None]) -> bool:
        """Call ``act()`` soon and hand its reply to ``then`` through ``post``. Never waits.

        lane: the server's address. False when the queue is full or the caller is closed: nothing will be called then,
        and ``refused`` counts it.
        """
        with self._changed:
            if not self._is_open or len(self._waiting) >= self._queue_max:
                self.refused += 1
                return False
            self._waiting.append(_Call(lane, act, then))
            self._changed.notify()
            return True

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """Drop what waits and end the threads; a call in progress is left to its own time limit, unheard."""
        with self._changed:
            self._is_open = False
            self._waiting.clear()
            self._changed.notify_all()
        end_s = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _work(self) -> None:
        while (call := self._take()) is not None:
            try:
                reply = call.act()
            except Exception as error:  # a client's calls do not raise; a thread must survive one that does
                logger.exception("a call to %s raised", call.lane)
                reply = Reply(NOT_AN_ANSWER, f"{type(error).__name__} in the call")
            with self._changed:
                self._busy[call.lane] -= 1
                if not self._busy[call.lane]:
                    del self._busy[call.lane]
                self._changed.notify()
                is_open = self._is_open
            if is_open:
                self._hand_over(call, reply)

    def _hand_over(self, call: _Call, reply: Reply) -> None:
        try:
            self._post(lambda: call.then(reply))
        except Exception:  # the scheduler's loop has ended; its threads must not end with a traceback
            logger.warning("the answer of %s came after its scheduler had ended", call.lane)

    def _take(self) -> _Call | None:
        """The oldest call whose lane has a thread left; None when the caller is closed."""
        with self._changed:
            while self._is_open:
                for place, call in enumerate(self._waiting):
                    if self._busy[call.lane] < self._lane_max:
                        del self._waiting[place]
                        self._busy[call.lane] += 1
                        return call
                self._changed.wait()
            return None
