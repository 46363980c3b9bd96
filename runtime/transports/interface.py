"""What every transport offers, and the three facts that it keeps apart: outcome, drained, and whose life it was.

A *writer* (prefill) posts copies from its own memory into the memory that an *owner* (decode) has registered and
described. A transport that has failed, timed out or been cancelled may still be placing bytes: measured on real
engines, thousands of pages of a released request were overwritten after the writer had been told of its failure
(ENGINES 4). So ``Progress`` says two things, ``state`` and ``drained``, and the second comes from proof only.

Memory is addressed by offset: the regions that a process registers are laid end to end in one offset space, in the
order in which they were given, and a copy never crosses the border between two regions. Offsets are bytes.

All calls return at once; the work is done by threads of the transport's own, or by the engine behind it. When
something may have changed (a copy ended, an owner learned of a death), the transport calls ``wake``, from any
thread, and its user polls again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpoll.spec.vocabulary import Incarnation

Offsets = NDArray[np.int64]


class TransportError(Exception):
    """A transport cannot be set up or reach its peer. The message is one line: cause and mend."""


class Region(NamedTuple):
    """One contiguous piece of memory: ``address`` and ``nbytes``, "host" or "cuda", and what must stay alive.

    ``keep`` holds the object whose memory this is (a tensor, an mmap). ``file`` is the file descriptor that the
    memory is a mapping of, from its first byte, or None: only such memory can be shared by passing the descriptor.
    """

    address: int
    nbytes: int
    kind: Literal["host", "cuda"] = "host"
    keep: Any = None
    file: int | None = None


class Copies(NamedTuple):
    """Byte ranges to copy: three int64 arrays of one length n, in no particular order.

    source, target: offsets in the writer's and the owner's offset space. nbytes: length of each range, above 0.
    """

    source: Offsets
    target: Offsets
    nbytes: Offsets

    @property
    def total(self) -> int:
        """Bytes of all ranges together."""
        return int(self.nbytes.sum())


class Tag(NamedTuple):
    """Whose pages a write goes to: the owner's incarnation of the room, and the writer's number of this write."""

    incarnation: Incarnation
    write: int


class Progress(NamedTuple):
    """How a posted write stands.

    state: "pending"; "done", every byte is placed and none will be placed any more; or "failed". drained: no byte
    will be read or placed any more, and this is proven. "failed" may come long before drained, and drained may never
    come (the owner is unreachable). reason: why it failed, else None.
    """

    state: Literal["pending", "done", "failed"]
    drained: bool
    reason: str | None = None


PENDING: Final = Progress("pending", False)
DONE: Final = Progress("done", True)


class Caps(NamedTuple):
    """What a transport can do.

    one_sided: the writer itself puts the bytes into the owner's memory, so only its word or its proven death tells
    that it is quiet. Else the owner's process places them, and can refuse at once (``revoke`` returns True).
    cancel: what ``abort`` achieves: "none"; "best_effort", it ends soon; "fenced", no byte after it returns.
    proves_death: ``on_death`` reports a writer's end as the operating system saw it, and its ``close``. copies_max:
    how many ranges one post may hold, None for any number; the transport cuts longer posts itself. memory: kinds of
    region it takes.
    """

    one_sided: bool
    cancel: Literal["none", "best_effort", "fenced"]
    proves_death: bool
    copies_max: int | None
    memory: frozenset[str]


Wake = Callable[[], None]
Death = Callable[[str, int], None]
"""``on_death(node, epoch)``: that life of that node is over, and with it every write that it had posted.

Called once for a writer that this owner has admitted, when its process has ended or its transport was closed; either
way nothing of it will be placed any more. A writer that closes while it cannot prove that is reported when its process
ends. A writer that has only turned to a newer life of this owner is not over.
"""


class Transport(Protocol):
    """One side of the data path of one process. Built by ``transports.make``; safe to call from one thread.

    A process may be writer, owner, or both. ``node`` and ``epoch`` name it to its peers.
    """

    name: str
    caps: Caps

    def register(self, regions: Sequence[Region]) -> bytes:
        """Make this process's memory known; called once. Returns the descriptor that peers ``connect`` to.

        Raises TransportError when the memory cannot be used (kind, or not shareable).
        """
        ...

    def connect(self, descriptor: bytes, node: str, epoch: int) -> Any:
        """The peer whose ``register`` returned this descriptor, as a handle for ``post``. Does not wait for it:
        a peer that cannot be reached fails the writes that are posted to it. The same descriptor gives the same peer.
        A descriptor of a newer ``epoch`` of ``node`` retires the older peer: writes still queued for it fail.
        Raises TransportError when the descriptor is not one of this transport.
        """
        ...

    def post(self, peer: Any, copies: Copies, tag: Tag) -> int:
        """Start a write and return its handle. Copies of length 0 are done at once, and small ones may be: whoever
        posts polls once, since ``wake`` need not be called for what has ended when this returns. A small write may be
        done into the memory of an owner that has just died and is not known to; it is gone with its owner.

        Never raises for a dead peer or a bad range: a write with a range outside the registered regions of either side,
        across the border of two of them, or of no bytes, is a write that has failed and drained, with nothing placed.
        """
        ...

    def poll(self, handle: int) -> Progress:
        """How a write stands. Never blocks, never raises for a known handle."""
        ...

    def abort(self, handle: int) -> None:
        """Ask for the end of a write. A request, never a proof: ``drained`` still comes through ``poll``."""
        ...

    def forget(self, handle: int) -> None:
        """The user will not poll this handle again; what is kept of it is freed once it has drained."""
        ...

    def revoke(self, incarnation: Incarnation) -> bool:
        """As owner: this incarnation's pages are given up. True proves that no byte of its writes will be placed any
        more; False means that writers were told, at most, and their word must be awaited.
        """
        ...

    def close(self) -> None:
        """End all threads, sockets and mappings, within two seconds. Writes that are pending fail.

        Owners that were written to learn of it by their ``on_death``, if the transport proves death at all.
        """
        ...
