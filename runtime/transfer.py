"""One request's transfer on one rank, as the engine holds it: poll, pages, failure, callbacks.

Every call but ``wait*`` returns at once; the endpoint's thread does what was ordered. A call that cannot mean anything
raises TransferError where that can be told without asking the thread: it depends only on what this engine did before
(gave a page twice, sent after the last pages, released) or on a poll that never goes back (nothing was published while
the poll is Bootstrapping). What depends on the peer is no misuse: a transfer may fail between the engine's look at
``poll`` and its call, so ``send`` and ``publish`` of a failed transfer take nothing and return False.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from operator import index
from typing import TYPE_CHECKING, Any

from kvpoll.runtime.pools import aux_row
from kvpoll.spec.source import BadInput

if TYPE_CHECKING:
    from kvpoll.runtime.endpoint import Endpoint

Key = int
"""Memory of this rank that one transfer holds: ``n`` is page n, ``~n`` (below 0) is aux row n."""

_log = logging.getLogger("kvpoll.runtime")


class KVPoll(IntEnum):
    """How a transfer stands on this rank. Ranks merge by minimum."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class TransferError(Exception):
    """A call came at a moment when it cannot mean anything, or with memory that is not free. One line: cause, mend."""


class Transfer:
    """One request's transfer on this rank. Made by ``admit``; any thread may use it.

    rid: the engine's name of the request. pair: (room, attempt). ``on_poll(transfer, poll)`` and
    ``on_pages_free(transfer)`` are called from the endpoint's thread and must not wait for anything; what they raise is
    logged and counted (``endpoint.callback_errors``) and harms nobody. Give them to ``admit``, so that none is missed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        rid: str,
        pair: tuple[int, int],
        on_poll: Callable[[Any, KVPoll], None] | None = None,
        on_pages_free: Callable[[Any], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.rid = rid
        self.pair = pair
        self.on_poll = on_poll
        self.on_pages_free = on_pages_free
        self.admitted_s = time.monotonic()
        self.ready_s: float | None = None
        self.was_exposed = False
        self.given_up_as: str | None = None
        self._poll = KVPoll.Bootstrapping
        self._cause: str | None = None
        self._held: set[Key] = set()
        self._is_released = False
        self._is_finished = False
        self._giving = threading.Lock()
        self._waiters: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.rid} {self._poll.name} on {self.endpoint.node}>"

    # -- how it stands

    def poll(self) -> KVPoll:
        """How it stands now. Never waits."""
        return self._poll

    @property
    def failure(self) -> str | None:
        """Why it failed: the first cause, and what the peer said of it. None unless Failed."""
        return self._cause

    @property
    def pages_free(self) -> bool:
        """May the pages (and on decode the aux row) be used again? True also before any were given."""
        return not self._held

    def keys(self) -> list[Key]:
        """What it holds."""
        return list(self._held)

    def pages_held(self) -> int:
        """How many pages it holds."""
        return sum(key >= 0 for key in self.keys())

    @property
    def is_over(self) -> bool:
        """Released, with nothing held: the endpoint has forgotten it."""
        return self._is_finished and self.endpoint.transfers.get(self.pair) is not self

    @property
    def is_done(self) -> bool:
        """Released, and nothing is held any more: to be forgotten."""
        return self._is_finished and not self._held

    def wait(self, *polls: KVPoll, timeout_s: float) -> KVPoll:
        """Block until the poll is one of these, Failed, or Success, or the time is over; returns the poll.

        Raises TransferError in a callback, where it would wait for itself.
        """
        self.endpoint.refuse_own_thread("wait")
        wanted = {*polls, KVPoll.Failed, KVPoll.Success}
        self._wait_for(lambda: self._poll in wanted, timeout_s)
        return self._poll

    def wait_pages_free(self, timeout_s: float) -> bool:
        """Block until the pages may be used again, or the time is over. Raises TransferError in a callback."""
        self.endpoint.refuse_own_thread("wait_pages_free")
        return self._wait_for(lambda: not self._held, timeout_s)

    def _wait_for(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Block until it holds, or the time is over; does it hold?"""
        end_s = time.monotonic() + timeout_s
        changed = threading.Event()
        self._waiters.append(changed.set)  # first: what changes after the look below is told
        try:
            while not holds():
                left_s = end_s - time.monotonic()
                if left_s <= 0 or not changed.wait(left_s):
                    return holds()
                changed.clear()
            return True
        finally:
            self._waiters.remove(changed.set)

    async def reached(self, *polls: KVPoll) -> KVPoll:
        """Await one of these polls, Failed or Success. Bound it with ``asyncio.timeout`` where that is wanted."""
        wanted = {*polls, KVPoll.Failed, KVPoll.Success}
        await self._until(lambda: self._poll in wanted)
        return self._poll

    async def pages_returned(self) -> None:
        """Await the moment when the pages may be used again; it may never come (``asyncio.timeout``)."""
        await self._until(lambda: not self._held)

    async def _until(self, holds: Callable[[], bool]) -> None:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        self._waiters.append(wake)
        try:
            while not holds():
                await changed.wait()
                changed.clear()
        finally:
            self._waiters.remove(wake)

    # -- what the engine orders

    def abort(self, cause: str = "aborted") -> None:
        """Give up. The peer is told at once; ``release`` is still to be called. Of what has failed or succeeded it
        changes nothing, but that a Success which was not committed cannot be any more.
        """
        with self._giving:
            if self._is_released:
                return
            if self.given_up_as is None:
                self.given_up_as = cause
        self._order(self.endpoint.rank.give_up, self.pair, cause)

    def release(self) -> None:
        """The engine is done with this transfer, and on decode with its pages. Gives up what is not over yet.

        The pages come back as ever: when they are proven quiet. A second release does nothing.
        """
        with self._giving:
            if self._is_released:
                return
            self._is_released = True
        self._order(self.endpoint.rank.finish, self.pair)

    def _order(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.endpoint.do(self.endpoint.contained, self, function, arguments)

    def _may_give(self, what: str, pages: tuple[int, ...]) -> bool:
        """May memory be given now? False: it has failed. Raises TransferError when it never could."""
        if self._is_released:
            raise TransferError(f"{what}: {self.rid} was released; admit another transfer")
        if self._poll == KVPoll.Bootstrapping:
            raise TransferError(f"{what}: {self.rid} is Bootstrapping; wait until poll() is WaitingForInput")
        if len(set(pages)) < len(pages):
            twice = next(page for page in pages if pages.count(page) > 1)
            raise TransferError(f"{what}: page {twice} is given twice; every page of a prompt is another one")
        return self._poll != KVPoll.Failed

    # -- from the endpoint

    def take(self, keys: Sequence[Key]) -> None:
        """Memory was claimed for it; called under the endpoint's lock."""
        self._held.update(keys)

    def give_back(self, keys: Sequence[Key]) -> None:
        """Memory is free again. From the endpoint's thread."""
        if not self._held:
            return
        self._held.difference_update(keys)
        if not self._held:
            self._tell(self.on_pages_free, self)

    def move(self, poll: KVPoll, cause: str | None) -> None:
        """The room has another poll. From the endpoint's thread."""
        self._cause = cause if poll == KVPoll.Failed else None
        self._poll = poll  # after the cause, which whoever sees Failed may ask for
        self._tell(self.on_poll, self, poll)

    def finish(self) -> None:
        """The rank has carried out its release. From the endpoint's thread."""
        self._is_finished = True

    def _tell(self, callback: Callable[..., None] | None, *arguments: Any) -> None:
        """Something has changed: wake who waits, and call back."""
        if self._waiters:
            for wake in list(self._waiters):
                wake()
        if callback is None:
            return
        try:
            callback(*arguments)
        except Exception:  # the engine's mistake; neither this request's machine nor another request may feel it (S10)
            self.endpoint.callback_errors += 1
            _log.exception("%s: a callback of %s failed", self.endpoint.node, self.rid)


class PrefillTransfer(Transfer):
    """Prefill's end: the source."""

    _sent_last = False

    def send(
        self,
        pages: Sequence[int],
        last: bool = False,
        *,
        first_token: int | None = None,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> bool:
        """Send the prompt's next pages, whose KV is computed; ``last`` with the final ones, which may be none.

        pages: page numbers of this rank's pool, in prompt order, following those of earlier sends; each decode rank
        gets the layers and heads that it needs of them. They belong to the transfer until ``pages_free``.
        first_token, prompt_tokens, cached_tokens: what decode reads in its aux row (``aux_row.AuxRow``); with the last
        pages only. Returns False, and takes nothing, when the transfer has failed.

        Raises TransferError: before WaitingForInput, after the last pages, after release; no pages; a page twice, held
        by another transfer, or outside the pool; a token number outside its field; endpoint closed.
        """
        given = tuple(map(int, pages))
        row = None
        if first_token is not None or prompt_tokens or cached_tokens:
            if not last:
                raise TransferError(
                    f"send: first_token and token counts of {self.rid} go with the last pages; set last"
                )
            row = aux_row.AuxRow(*self.pair, first_token or 0, prompt_tokens, cached_tokens, 0)
            try:
                aux_row.pack(row)
            except BadInput as error:
                raise TransferError(f"send: {error}") from None
        if not last and not given:
            raise TransferError(f"send: no pages of {self.rid}; give some, or say that they were the last")
        with self._giving:
            if self._sent_last:
                raise TransferError(f"send: {self.rid} has sent its last pages already; it can only be released")
            if not self._may_give("send", given):
                return False
            self.endpoint.claim(self, given)
            self._sent_last = last
            self.was_exposed = True
        self._order(self.endpoint.sender.send_chunk, self.pair, given, last, row)
        return True


class DecodeTransfer(Transfer):
    """Decode's end: the destination."""

    row: int | None = None
    _is_committed = False

    def publish(self, pages: Sequence[int], row: int) -> bool:
        """Tell prefill where to write: once, when WaitingForInput.

        pages: page numbers of this rank's pool, in prompt order, for the whole of what prefill is to send. row: the
        aux row, from 0. Both belong to the transfer until ``pages_free``. Returns False, and takes nothing, when the
        transfer has failed.

        Raises TransferError: before WaitingForInput, a second time, after release; no pages; a page twice; a page or
        the row outside the pool, or held by another transfer; endpoint closed.
        """
        given, row = tuple(map(int, pages)), index(row)
        if not given:
            raise TransferError(f"publish: no pages of {self.rid}; what decode has in its cache needs no transfer")
        with self._giving:
            if self.row is not None:
                raise TransferError(f"publish: {self.rid} was published already; prefill may be writing to its pages")
            if not self._may_give("publish", given):
                return False
            self.endpoint.claim(self, given, row)
            self.row = row
            self.was_exposed = True
        self._order(self.endpoint.receiver.publish_to, self.pair, given, row)
        return True

    def commit(self) -> None:
        """After Success: the engine decodes from the pages. Nothing can fail this transfer any more; ``release`` gives
        the pages back when the request has ended. A second commit does nothing.

        Raises TransferError unless Success, or when this engine has aborted or released it before.
        """
        with self._giving:
            if self._is_committed:
                return
            if self._poll != KVPoll.Success:
                raise TransferError(f"commit: {self.rid} is {self._poll.name}; its pages are whole when it is Success")
            if self.given_up_as is not None or self._is_released:
                raise TransferError(f"commit: {self.rid} was given up before; its pages may belong to another transfer")
            self._is_committed = True
        self._order(self.endpoint.receiver.commit, self.pair)

    def abort(self, cause: str = "aborted") -> None:
        """Give up, unless it is committed. See ``Transfer.abort``."""
        if not self._is_committed:
            super().abort(cause)

    def aux(self) -> aux_row.AuxRow | None:
        """What prefill said with its last pages; None unless Success, and when the row is not this request's (S5)."""
        if self._poll != KVPoll.Success or self.row is None:
            return None
        found = aux_row.unpack(self.endpoint.pool.get_row(self.row))
        return found if found is not None and found.pair == self.pair else None
