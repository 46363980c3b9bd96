"""The table of posted writes: what ``poll`` answers from, and the only place where a write changes its state.

Two facts change independently and each only once: pending becomes done or failed, and drained becomes true. The first
reason is kept. Transports differ in how they learn these facts, not in these rules.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, Literal

from kvpoll.runtime.transports.interface import DONE, PENDING, Progress, Tag, Wake
from kvpoll.runtime.transports.offsets import Plan

LOG: Final = logging.getLogger(__name__)


class Write:
    """One posted write. ``plan`` is dropped when it has ended; ``aborted`` is read by the thread that performs it."""

    __slots__ = ("aborted", "begun", "forgotten", "handle", "plan", "progress", "tag")

    def __init__(self, handle: int, tag: Tag, plan: Plan | None) -> None:
        self.handle = handle
        self.tag = tag
        self.plan = plan
        self.progress = PENDING
        self.aborted = False
        self.begun = False
        self.forgotten = False


class PostedWrites:
    """All writes of one transport that are not forgotten, by handle. Safe to use from any thread."""

    def __init__(self, wake: Wake) -> None:
        self._call_wake = wake
        self._lock = threading.Lock()
        self._writes: dict[int, Write] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._writes)

    def add(self, tag: Tag, plan: Plan | None) -> Write:
        """A new pending write."""
        with self._lock:
            self._last += 1
            write = Write(self._last, tag, plan)
            self._writes[write.handle] = write
            return write

    def add_ended(self, tag: Tag, progress: Progress) -> Write:
        """A write that ended as it was posted: it had nothing to do, or was refused."""
        write = self.add(tag, None)
        write.progress = progress
        self._wake()
        return write

    def poll(self, handle: int) -> Progress:
        """How the write stands. KeyError for a handle that was never given or is forgotten."""
        return self._writes[handle].progress

    def begin(self, write: Write) -> bool:
        """The performing thread takes the write up; False when it has ended in the meantime (it was aborted)."""
        with self._lock:
            if write.progress.state == "pending":
                write.begun = True
            return write.begun

    def abort(self, handle: int) -> bool:
        """Ask for the end; True when the performing thread has to be told.

        A write that no thread has taken up is over at once. One that has begun fails at once too, but drains only
        by the word of the thread that performs it.
        """
        with self._lock:
            write = self._writes.get(handle)
            if write is None or write.progress.drained:
                return False
            write.aborted = True
            changed = self._changed(write, "failed", not write.begun, "aborted by its user")
        if changed:
            self._wake()
        return write.begun

    def finish(self, write: Write) -> None:
        """Every byte is placed and none will be placed any more."""
        self._change(write, "done", True, None)

    def fail(self, write: Write, reason: str, *, drained: bool) -> None:
        """It failed for this reason; or, when it had ended before, it has drained now."""
        self._change(write, "failed", drained, reason)

    def forget(self, handle: int) -> None:
        """Nobody polls this handle again; it leaves the table once drained."""
        with self._lock:
            write = self._writes.get(handle)
            if write is not None:
                write.forgotten = True
                self._drop_if_over(write)

    def fail_all(self, reason: str, drained: Callable[[Write], bool]) -> None:
        """The transport closes: what is pending fails."""
        with self._lock:
            pending = [write for write in self._writes.values() if not write.progress.drained]
        for write in pending:
            self.fail(write, reason, drained=drained(write))

    def _wake(self) -> None:
        try:
            self._call_wake()
        except Exception:  # it must not end the thread that happened to call it
            LOG.exception("the wake function that the transport was given raised")

    def _change(self, write: Write, state: Literal["done", "failed"], drained: bool, reason: str | None) -> None:
        with self._lock:
            changed = self._changed(write, state, drained, reason)
        if changed:  # outside the lock: the user may call back from here
            self._wake()

    def _changed(self, write: Write, state: Literal["done", "failed"], drained: bool, reason: str | None) -> bool:
        before = write.progress
        if before.state != "pending":
            after = before._replace(drained=before.drained or drained)
        else:
            after = DONE if state == "done" else Progress(state, drained, reason)
        write.progress = after
        if after.drained:
            write.plan = None
        self._drop_if_over(write)
        return after != before

    def _drop_if_over(self, write: Write) -> None:
        if write.forgotten and write.progress.drained:
            self._writes.pop(write.handle, None)
