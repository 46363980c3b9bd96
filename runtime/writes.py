"""The writes of one prefill rank: from an order to write pages, through a transport, to what became of it.

A transport says three things of a write (``transports.interface``), and this hands them on one by one: "completed";
or "failed", and perhaps much later "settled", when it is proven that no byte moves any more. What never settles stays
here, and with it the source memory.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvpoll.runtime.pools import aux_row
from kvpoll.runtime.pools.layout import Layout, mismatch
from kvpoll.runtime.pools.plan import Copier, copier
from kvpoll.runtime.transports.interface import Copies, Progress, Tag, Transport, TransportError
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import WriteLanded, WritePosted, WriteSettled
from kvpoll.statemachine.ranks.host import Destination

if TYPE_CHECKING:
    from kvpoll.runtime.host import Host
    from kvpoll.runtime.pools.pool import KVPool

Done = Callable[[str], None]
PEERS_KEPT: Final = 1024
"""Layouts, and judgements of peers' memory, that are remembered."""

_log = logging.getLogger("kvpoll.runtime")


class _Write(NamedTuple):
    """One write: its number in the trace, where it goes, its aux row here (or None), and who wants to know."""

    serial: int
    destination: Destination
    pages: tuple[int, ...]
    row: int | None
    nbytes: int
    done: Done


class Writes:
    """Posts copies and polls them. Belongs to the loop's thread; ``wake`` may be called from any."""

    def __init__(self, host: Host, pool: KVPool, transport: Transport) -> None:
        self.host = host
        self.pool = pool
        self.transport = transport
        self.bytes_done = 0
        self.failed = 0
        self.rows_said: dict[tuple[int, int], aux_row.AuxRow] = {}
        self._serial = 0
        self._pending: dict[int, _Write] = {}
        self._unsettled: dict[int, _Write] = {}
        self._rows = list(range(pool.layout.rows))
        self._copiers: dict[bytes, Copier] = {}
        self._judged: dict[tuple[Any, ...], str | None] = {}
        self._starved: deque[tuple[Any, ...]] = deque()
        self._given_up: set[int] = set()
        self._is_polling = False

    def __len__(self) -> int:
        """Writes that have not settled."""
        return len(self._pending) + len(self._unsettled) + len(self._starved)

    def problem(self, destination: Destination) -> str | None:
        """Why this rank cannot write to a destination's memory: one line, or None. Nothing is sent."""
        key = (destination.node, *destination.memory)
        if key not in self._judged:
            if len(self._judged) >= PEERS_KEPT:
                self._judged.clear()
            descriptor, encoded, epoch = destination.memory
            try:
                found = mismatch(self.pool.layout, Layout.from_bytes(encoded))
                self.transport.connect(descriptor, destination.node, epoch)
            except (BadInput, TransportError, ValueError) as error:
                found = str(error)
            self._judged[key] = found
        return self._judged[key]

    def abort(self, pair: tuple[int, int]) -> None:
        """A request has failed: ask for the end of its writes. When they are quiet is heard as ever."""
        for handle, write in self._pending.items():
            if write.destination.incarnation.pair == pair:
                self._given_up.add(handle)
                self.transport.abort(handle)

    def post(
        self, destination: Destination, chunk: int, first: int, pages: tuple[int, ...], last: bool, done: Done
    ) -> None:
        """Write pages of a prompt to the destination's, and the aux row with the last of them.

        That one waits while every aux row of this rank is in a write that is under way.
        """
        if last and not self._rows and self.pool.layout.rows:
            self._starved.append((destination, chunk, first, pages, last, done))
            return
        self._serial += 1
        serial, host = self._serial, self.host
        targets = destination.pages[first : first + len(pages)]
        row = self._rows.pop() if last and self._rows else None
        target_row = destination.row if last else None
        own = destination.incarnation
        if host.wants(WritePosted):
            posted = WritePosted(
                host.now, host.node, serial, own, destination.node, chunk, last, pages, targets, target_row
            )
            host.emit(posted)
        try:
            peer, ranges = self._ranges(destination, pages, targets, row, first + len(pages))
            handle = self.transport.post(peer, ranges, Tag(own, serial))
        except (BadInput, TransportError, ValueError, LookupError) as error:
            _log.warning("%s: write %d to %s cannot be posted: %s", host.node, serial, destination.node, error)
            host.note(own.pair, str(error), host.reasons)
            self._free(row)
            host.loop.soon(self._refused, serial, done)
            return
        write = self._pending[handle] = _Write(serial, destination, targets, row, ranges.total, done)
        progress = self.transport.poll(handle)
        if progress.state != "pending":  # it was small, and is over already
            host.loop.soon(self._ended, handle, write, progress)

    def _refused(self, serial: int, done: Done) -> None:
        """Nothing was sent, so nothing is in flight: failed and settled are one moment."""
        self.failed += 1
        done("failed")
        self._settle(serial, False)
        done("settled")

    def _copier(self, encoded: bytes) -> Copier:
        """From this pool to one of this layout. Raises BadInput when that cannot be."""
        known = self._copiers.get(encoded)
        if known is None:
            if len(self._copiers) >= PEERS_KEPT:
                self._copiers.clear()
            known = self._copiers[encoded] = copier(self.pool.layout, Layout.from_bytes(encoded))
        return known

    def _ranges(
        self, destination: Destination, pages: tuple[int, ...], targets: tuple[int, ...], row: int | None, sent: int
    ) -> tuple[Any, Copies]:
        descriptor, encoded, epoch = destination.memory
        known = self._copier(encoded)
        peer = self.transport.connect(descriptor, destination.node, epoch)
        if row is None:
            return peer, known.copies(pages, targets)
        pair = destination.incarnation.pair
        said = self.rows_said.get(pair)
        tokens = (0, 0, 0) if said is None else (said.first_token, said.prompt_tokens, said.cached_tokens)
        self.pool.put_row(row, aux_row.pack(aux_row.AuxRow(*pair, *tokens, sent)))
        return peer, known.copies(pages, targets, (row, destination.row))

    # -- what became of them

    def wake(self) -> None:
        """Something may have changed; the loop looks soon. From any thread."""
        if not self._is_polling:
            self._is_polling = True
            self.host.loop.post(self._poll)

    def _poll(self) -> None:
        self._is_polling = False
        for handle, write in list(self._pending.items()):
            progress = self.transport.poll(handle)
            if progress.state != "pending":
                self._ended(handle, write, progress)
        for handle, write in list(self._unsettled.items()):
            if self.transport.poll(handle).drained:
                self._drained(handle, write)

    def _ended(self, handle: int, write: _Write, progress: Progress) -> None:
        """A write is no longer pending."""
        if self._pending.pop(handle, None) is None:
            return  # this was heard before
        if progress.state == "done":
            self._completed(handle, write)
        else:
            self._failed(handle, write, progress.reason, progress.drained)

    def _completed(self, handle: int, write: _Write) -> None:
        host, destination = self.host, write.destination
        self._given_up.discard(handle)
        self.transport.forget(handle)
        self.bytes_done += write.nbytes
        self._free(write.row)
        if host.wants(WriteLanded):
            host.emit(WriteLanded(host.now, destination.node, write.serial, destination.incarnation, write.pages))
        self._settle(write.serial, True)
        write.done("completed")

    def _failed(self, handle: int, write: _Write, reason: str | None, drained: bool) -> None:
        self.failed += 1
        level = logging.DEBUG if handle in self._given_up else logging.WARNING
        _log.log(level, "%s: write %d to %s failed: %s", self.host.node, write.serial, write.destination.node, reason)
        self._unsettled[handle] = write
        if reason is not None:
            self.host.note(write.destination.incarnation.pair, reason, self.host.reasons)
        write.done("failed")
        if drained:
            self._drained(handle, write)

    def _drained(self, handle: int, write: _Write) -> None:
        del self._unsettled[handle]
        self._given_up.discard(handle)
        self.transport.forget(handle)
        self._free(write.row)
        self._settle(write.serial, False)
        write.done("settled")

    def _free(self, row: int | None) -> None:
        if row is not None:
            self._rows.append(row)
            if self._starved:
                self.host.loop.soon(self._feed)

    def _feed(self) -> None:
        """Rows have come back: go on with the writes that waited for one."""
        while self._starved and self._rows:
            self.post(*self._starved.popleft())

    def _settle(self, serial: int, ok: bool) -> None:
        if self.host.wants(WriteSettled):
            self.host.emit(WriteSettled(self.host.now, self.host.node, serial, ok))
