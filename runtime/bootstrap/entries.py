"""Which DP rank runs a request, as its prefill rank filed it: the machines of role ``dp_entry``, with their expiry."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from kvpoll.runtime.bootstrap.reading import Refused
from kvpoll.spec.protocol import Profile
from kvpoll.statemachine.dp_rank import entry_key
from kvpoll.statemachine.machine import Machine
from kvpoll.statemachine.roles import DpEntry

Asked = tuple[int, int | None]
"""A room, and the attempt where the client told it; SGLang's does not."""


class _Filed(NamedTuple):
    entry: DpEntry
    expiry_s: float


class DpEntries:
    """All entries of one server. Every entry lives equally long, so the order of filing is the order of expiry."""

    def __init__(self, machine: Machine, profile: Profile, entries_max: int, clock: Callable[[], float]) -> None:
        self._machine = machine
        self._profile = profile
        self._entries_max = entries_max
        self._clock = clock
        self._filed: dict[Hashable, _Filed] = {}

    def __len__(self) -> int:
        self.expire()
        return len(self._filed)

    def register(self, asked: Asked, rank: int) -> None:
        """File an entry for dp_entry_timeout_s. Raises Refused when the table is full of entries that still live."""
        self.expire()
        key = self.key(asked)
        known = self._filed.get(key)
        if known is None and len(self._filed) >= self._entries_max:
            raise Refused(503, "entries_full", f"{len(self._filed)} DP ranks are on file, which is this server's limit")
        after, _ = self._machine.step(known.entry if known else DpEntry(), "DpRankRegistered", rank)
        self._filed.pop(key, None)
        self._filed[key] = _Filed(after, self._clock() + self._profile.number("dp_entry_timeout_s"))

    def rank(self, asked: Asked) -> int | None:
        """The DP rank on file, or None."""
        known = self._filed.get(self.key(asked))
        entry, orders = self._machine.step(known.entry if known else DpEntry(), "DpRankQueried")
        rank: int | None = entry.rank if orders else None
        return rank

    def expire(self) -> None:
        """Drop what is older than dp_entry_timeout_s."""
        now_s = self._clock()
        while self._filed:
            key, filed = next(iter(self._filed.items()))
            if filed.expiry_s > now_s:
                return
            self._machine.step(filed.entry, "EntryExpired")
            del self._filed[key]

    def key(self, asked: Asked) -> Hashable:
        """What an entry is filed under; a client that knows no attempts files under the bare room, as in SGLang."""
        room, attempt = asked
        return room if attempt is None else entry_key(self._profile, (room, attempt))
