"""The lives of the nodes that this process writes to: for each node one is present, and older ones are over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

P = TypeVar("P")


class _Life(NamedTuple, Generic[P]):
    descriptor: bytes
    epoch: int
    peer: P


class Peers(Generic[P]):
    """The present life of each node."""

    def __init__(self) -> None:
        self._present: dict[str, _Life[P]] = {}

    def __iter__(self) -> Iterator[P]:
        return iter([life.peer for life in self._present.values()])

    def find(self, descriptor: bytes, node: str, epoch: int) -> P | None:
        """The peer of this descriptor, if it is the present life of its node."""
        life = self._present.get(node)
        return life.peer if life is not None and life[:2] == (descriptor, epoch) else None

    def enter(self, descriptor: bytes, node: str, epoch: int, peer: P) -> tuple[P, str] | None:
        """A peer has become known. Returns whose life is over now, and why: the one before it, or its own."""
        known = self._present.get(node)
        if known is not None and known.epoch > epoch:
            return peer, f"{node} epoch {epoch} is over: epoch {known.epoch} has come"
        self._present[node] = _Life(descriptor, epoch, peer)
        return None if known is None else (known.peer, f"{node} epoch {known.epoch} is over: epoch {epoch} has come")
