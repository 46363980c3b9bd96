"""The control page of an owner: what its writers look at between two chunks.

One small shared file of 64-bit words, written by the owner alone and mapped read-only by its writers:

    word 0     format
    word 1     the owner's epoch
    word 2     1 while the owner takes writes, 0 once it has closed
    word 3     number of revocations so far
    word 8..   a ring of revoked incarnations, four words each: room, attempt, epoch, number of the revocation

An entry is complete before the number in word 3 covers it. The ring is a courtesy that ends writes early, not a
fence: a writer that sleeps for more than a ring of revocations, or in the middle of a chunk, misses it. Proof that
pages are quiet comes from the writer's word or from its end.
"""

from __future__ import annotations

from typing import Final

from kvpoll.runtime.transports.interface import TransportError
from kvpoll.runtime.transports.shm_memory import Mapping, SharedPool
from kvpoll.spec.vocabulary import Incarnation

_FORMAT: Final = 0x4B56_0001
_RING: Final = 4096
_FIRST: Final = 8
_ENTRY: Final = 4
CONTROL_BYTES: Final = 8 * (_FIRST + _ENTRY * _RING)
_MASK: Final = (1 << 63) - 1


class ControlPage:
    """The owner's side: it alone writes. ``file`` is what writers are given."""

    def __init__(self, epoch: int) -> None:
        self._pool = SharedPool(CONTROL_BYTES, "kvpoll-control")
        self.file = self._pool.file
        self._words = memoryview(self._pool.mapping).cast("q")
        self._words[0], self._words[1], self._words[2] = _FORMAT, epoch & _MASK, 1

    def revoke(self, incarnation: Incarnation) -> None:
        """Tell writers that these pages are given up."""
        words, number = self._words, self._words[3] + 1
        at = _FIRST + _ENTRY * (number % _RING)
        words[at + 3] = 0  # a reader that meets a half-written entry skips it
        words[at], words[at + 1], words[at + 2] = (part & _MASK for part in incarnation)
        words[at + 3] = number
        words[3] = number

    def close(self) -> None:
        """Writers stop at their next chunk."""
        self._words[2] = 0


class ControlView:
    """A writer's side: a read-only mapping of the owner's page, and the revocations seen so far."""

    def __init__(self, file: int, epoch: int) -> None:
        self._mapping = Mapping(file, CONTROL_BYTES, writable=False)
        self._words = self._mapping.words()
        self._epoch = epoch & _MASK
        self._seen = 0
        self._revoked: dict[tuple[int, ...], None] = {}
        if self._words[0] != _FORMAT:
            self.close()
            raise TransportError("shm: the peer's control page has another format: run the same kvpoll on both sides")

    def why_stop(self, incarnation: Incarnation) -> str | None:
        """Why no further byte of this incarnation may be written, or None."""
        words = self._words
        if words[3] != self._seen:
            self._read_ring(words[3])
        if not words[2]:
            return "the owner has closed"
        if words[1] != self._epoch:
            return "the owner is in another life"
        if self._revoked and tuple(part & _MASK for part in incarnation) in self._revoked:
            return "revoked by its owner"
        return None

    def _read_ring(self, count: int) -> None:
        words = self._words
        for number in range(max(self._seen + 1, count - _RING + 1), count + 1):
            at = _FIRST + _ENTRY * (number % _RING)
            if words[at + 3] == number:
                self._revoked[words[at], words[at + 1], words[at + 2]] = None
        self._seen = count
        while len(self._revoked) > 16 * _RING:
            del self._revoked[next(iter(self._revoked))]

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._mapping.close()
