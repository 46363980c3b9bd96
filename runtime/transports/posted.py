"""The table of posted writes: what ``poll`` answers from, and the only place where a write changes its state.

Two facts change independently and each only once: pending becomes done or failed, and drained becomes true. The first
reason is kept. A failed write has drained when nobody holds it any more: a hold is a thread, or a part that an engine
was given, that may still be placing bytes. Transports differ in how they learn that a hold has ended, not in these
rules.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Final, TypeVar

from kvpoll.runtime.transports.copy_plan import Plan
from kvpoll.runtime.transports.interface import DONE, PENDING, Progress, Tag, Wake

LOG: Final = logging.getLogger(__name__)


class Write:
    """One posted write. ``plan`` is dropped when it has drained; ``aborted`` is read by the thread that performs it.

    holds: how many threads or parts may still be placing bytes of it.
    """

    __slots__ = ("aborted", "forgotten", "handle", "holds", "plan", "progress", "tag")

    def __init__(self, tag: Tag, plan: Plan | None = None) -> None:
        self.handle = 0
        self.tag = tag
        self.plan = plan
        self.progress = PENDING
        self.holds = 0
        self.aborted = False
        self.forgotten = False

    @property
    def is_pending(self) -> bool:
        """Whether it is neither done nor failed."""
        return self.progress.state == "pending"


W = TypeVar("W", bound=Write)


class PostedWrites:
    """All writes of one transport that are not forgotten, by handle. Safe to use from any thread."""

    def __init__(self, wake: Wake) -> None:
        self.lock = threading.RLock()
        self._wake = wake
        self._writes: dict[int, Write] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._writes)

    # --- called by the transport's user ------------------------------------------------------------

    def add(self, write: W) -> W:
        """Enter a new write; it gets its handle."""
        with self.lock:
            self._last += 1
            write.handle = self._last
            self._writes[write.handle] = write
        return write

    def add_done(self, tag: Tag) -> int:
        """Enter a write that was over before it was posted; whoever posts it will look. Its handle."""
        write = Write(tag)
        write.progress = DONE
        return self.add(write).handle

    def add_ended(self, tag: Tag, refusal: str | None) -> int:
        """Enter a write that ends as it is posted: refused, or done because it had nothing to do. Its handle."""
        write = Write(tag)
        write.progress = DONE if refusal is None else Progress("failed", True, refusal)
        self.add(write)
        self.tell()
        return write.handle

    def poll(self, handle: int) -> Progress:
        """How the write stands. KeyError for a handle that was never given or is forgotten."""
        return self._writes[handle].progress

    def abort(self, handle: int) -> bool:
        """Ask for the end; True when whoever performs the write has to be told.

        A write that nobody holds is over at once. One that is held fails at once too, but drains only by the word of
        those who hold it.
        """
        with self.lock:
            write = self._writes.get(handle)
            if write is None or write.progress.drained:
                return False
            write.aborted = True
        self.fail(write, "aborted by its user")
        return write.holds > 0

    def forget(self, handle: int) -> None:
        """Nobody polls this handle again. Whoever performs the write keeps what it needs of it."""
        with self.lock:
            write = self._writes.pop(handle, None)
            if write is not None:
                write.forgotten = True

    # --- called by whoever performs it --------------------------------------------------------------

    def begin(self, write: Write) -> bool:
        """The one performing thread takes the write up; False when it has ended in the meantime (it was aborted)."""
        with self.lock:
            if write.is_pending:
                write.holds = 1
            return write.holds > 0

    def finish(self, write: Write) -> None:
        """Every byte is placed and none will be placed any more."""
        with self.lock:
            write.holds = 0
            changed = self._changed(write, DONE)
        if changed:
            self.tell()

    def fail(self, write: Write, reason: str, *, drained: bool = False) -> None:
        """It failed for this reason, unless it had ended before. drained: nobody holds it any more."""
        self.fail_each([write], reason, drained=drained)

    def fail_each(self, writes: Iterable[Write], reason: str, *, drained: bool = False) -> None:
        """The same for several writes, with one call of ``wake``."""
        changed = False
        with self.lock:
            for write in writes:
                if drained:
                    write.holds = 0
                changed |= self._changed(write, Progress("failed", write.holds == 0, reason))
        if changed:  # outside the lock: the user may call back from here
            self.tell()

    def fail_all(self, reason: str, *, drained: bool = False) -> None:
        """The transport closes: what is pending fails. drained: nobody holds any write any more."""
        with self.lock:
            held = [write for write in self._writes.values() if not write.progress.drained]
        self.fail_each(held, reason, drained=drained)

    def tell(self) -> None:
        """Call ``wake``. What it raises is logged: it must not end the thread that happened to call it."""
        try:
            self._wake()
        except Exception:
            LOG.exception("the wake function that the transport was given raised")

    def _changed(self, write: Write, after: Progress) -> bool:
        """Let the write end as ``after`` if it was pending, else let it drain if nobody holds it. The lock is held."""
        before = write.progress
        write.progress = after if write.is_pending else before._replace(drained=before.drained or write.holds == 0)
        if write.progress.drained:
            write.plan = None
        return write.progress != before and not write.forgotten
