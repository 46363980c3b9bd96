"""The writes to one owner in the order posted, and the thread of our own that performs them.

The thread sleeps on a bell (an eventfd) beside its connection, so that a submit, an abort or the end of the transport
is noticed at once and costs nothing meanwhile. What ``shm`` and ``tcp`` do in it differs; how it is begun, woken and
ended does not.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from typing import Final

from kvpoll.runtime.transports.posted import PostedWrites, Write

QUEUE_MAX: Final = 4096
"""Writes that wait for one thread; more are refused."""


class WriterThread:
    """A queue and its thread. ``owner``: how reasons name whom it writes to. A subclass says in ``_work`` what it does.

    The thread begins with the first write and ends once ``_gone`` says why no further one is taken.
    """

    def __init__(self, name: str, owner: str, writes: PostedWrites) -> None:
        self._name, self._owner, self._writes = name, owner, writes
        self._queue: deque[Write] = deque()
        self._lock = threading.Lock()
        self._gone: str | None = None
        self._thread: threading.Thread | None = None
        self._bell = -1

    def submit(self, write: Write) -> None:
        """Queue a write; it fails at once when the owner is known to be gone or the queue is full."""
        with self._lock:
            reason = self._gone
            if reason is None and len(self._queue) >= QUEUE_MAX:
                reason = f"{len(self._queue)} writes are queued for {self._owner} already"
            if reason is None:
                self._queue.append(write)
                self._begin()
                os.eventfd_write(self._bell, 1)
        if reason is not None:
            self._writes.fail(write, reason, drained=True)

    def nudge(self) -> None:
        """Something that the thread looks at has changed."""
        with self._lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def join(self, limit_s: float) -> bool:
        """Wait for the thread's end; True when it has ended."""
        if self._thread is None:
            return True
        self._thread.join(max(0.0, limit_s))
        return not self._thread.is_alive()

    def _begin(self) -> None:
        if self._thread is None:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    # --- the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        """Perform writes until ``_gone``."""
        raise TypeError(f"{type(self).__name__} does not say what its thread does")

    def _run(self) -> None:
        self._work()
        with self._lock:
            left, bell, self._bell = list(self._queue), self._bell, -1
            self._queue.clear()
            os.close(bell)
        for write in left:
            self._writes.fail(write, str(self._gone), drained=True)

    def _take_no_more(self, reason: str) -> None:
        """The owner is gone. The first reason stays."""
        with self._lock:
            self._gone = self._gone or reason

    def _wait(self, connection: socket.socket | None, events: int, limit_s: float | None) -> int:
        """Wait for the bell or the connection; the events of the connection."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if connection is not None:
            poll.register(connection, events)
        ready = dict(poll.poll(None if limit_s is None else int(limit_s * 1000 + 0.999)))
        if self._bell in ready:
            os.eventfd_read(self._bell)
        return ready.get(connection.fileno(), 0) if connection is not None else 0
