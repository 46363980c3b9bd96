"""memory: one process, deterministic, and able to suffer every fault that a real engine shows.

All endpoints are joined to one ``Fabric``. Nothing moves until ``fabric.step()`` is called: a step places one range
(or lets one fault strike), so a test decides between which two ranges something happens. There are no threads, no
clock and no chance; whoever wants interleavings passes ``choose``. Bytes are really copied, late ones too: a write that
was reported failed overwrites, when told to, the pages that its room no longer owns (ENGINES 4, RACES A01).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from kvpoll.runtime.transports.copy_plan import Plan, plan_of
from kvpoll.runtime.transports.descriptor import Body, Sizes
from kvpoll.runtime.transports.interface import Caps, Copies, Death, Region, Tag, Wake
from kvpoll.runtime.transports.offsets import Space
from kvpoll.runtime.transports.posted import PostedWrites, Write
from kvpoll.runtime.transports.posting import PostingTransport
from kvpoll.spec.vocabulary import Incarnation

Kind = Literal["delay", "partial", "late", "drop_completion", "duplicate_completion", "owner_death", "writer_death"]
Choose = Callable[[int], int]


class Fault(NamedTuple):
    """What befalls one write, after ``ranges`` of its ranges have been placed.

    delay: nothing moves for ``steps`` steps. partial: it fails, and has drained. late: it fails and has not drained;
    the rest lands when ``Fabric.land`` is called, whatever became of the pages. drop_completion: everything is placed,
    and the writer is never told. duplicate_completion: the writer is told, and told again ``steps`` steps later.
    owner_death, writer_death: that process ends. node, nth: only writes of this writer, only its nth (from 0) write.
    """

    kind: Kind
    ranges: int = 0
    steps: int = 1
    node: str | None = None
    nth: int | None = None


class Descriptor(Body):
    """sizes: bytes of each region."""

    sizes: Sizes


class Peer(NamedTuple):
    """One owner's life as its writer sees it."""

    node: str
    epoch: int
    space: Space

    def __str__(self) -> str:
        return f"{self.node} epoch {self.epoch}"


class Move:
    """One write under way."""

    def __init__(self, writer: MemoryTransport, peer: Peer, write: Write, plan: Plan, faults: list[Fault]) -> None:
        self.writer, self.peer, self.write = writer, peer, write
        self.faults = faults
        self.placed = 0
        self.wait = 0
        self.held = False  # a late write: it lands when told
        self.told = 0
        self._rows = _rows(plan, peer.space)
        self._next = next(self._rows, None)

    @property
    def is_placed(self) -> bool:
        """Whether no range is left."""
        return self._next is None

    def place(self, owner: MemoryTransport) -> None:
        """Copy one range into the owner's memory, unless the owner itself places and has revoked it."""
        assert self._next is not None
        source, region, begin, nbytes = self._next
        incarnation = self.write.tag.incarnation
        if owner.caps.one_sided or incarnation not in owner.revoked:
            ctypes.memmove(owner.regions[region].address + begin, source, nbytes)
        self.placed += 1
        self._next = next(self._rows, None)


class Fabric:
    """Joins the endpoints of one process by name and moves their bytes when told to."""

    def __init__(self, choose: Choose | None = None) -> None:
        self.faults: list[Fault] = []
        self.steps = 0
        self._choose = choose or (lambda count: 0)
        self._lives: dict[str, MemoryTransport] = {}
        self._moves: list[Move] = []
        self._posts: dict[str, int] = {}

    @property
    def under_way(self) -> int:
        """Writes under way, held ones included."""
        return len(self._moves)

    def inject(self, *faults: Fault) -> None:
        """Each fault strikes the next write that it fits, once."""
        self.faults += faults

    def step(self) -> bool:
        """Let the oldest write (or the one that ``choose(count)`` names) do one thing. False when all is still."""
        ready = [move for move in self._moves if not move.held]
        if not ready:
            return False
        self.steps += 1
        self._advance(ready[self._choose(len(ready))])
        return True

    def run(self, steps_max: int = 1_000_000) -> int:
        """Step until all is still; the number of steps. RuntimeError when that takes more than ``steps_max``."""
        for count in range(steps_max):
            if not self.step():
                return count
        raise RuntimeError(f"the fabric still moves after {steps_max} steps")

    def land(self, *, tell: bool = True) -> int:
        """Late writes place the rest of their bytes now; with ``tell`` their writers learn that they have drained."""
        late = [move for move in self._moves if move.held]
        for move in late:
            owner = self._lives.get(move.peer.node)
            while owner is not None and owner.epoch == move.peer.epoch and not move.is_placed:
                move.place(owner)
            if tell:
                self._end(move, None, drained=True)
        return len(late)

    def kill(self, node: str) -> None:
        """The process ends: its writes stop between two ranges, and the owners that it wrote to learn of it."""
        dead = self._lives.pop(node, None)
        if dead is None:
            return
        told = {move.peer.node for move in self._moves if move.writer is dead} | dead.connected
        self._moves = [move for move in self._moves if move.writer is not dead]
        for move in [move for move in self._moves if move.peer[:2] == (node, dead.epoch)]:
            self._end(move, f"{move.peer} has ended", drained=True)
        for name in sorted(told):
            if (owner := self._lives.get(name)) is not None:
                owner.on_death(node, dead.epoch)

    # --- called by endpoints -----------------------------------------------------------------------

    def join(self, transport: MemoryTransport) -> None:
        """A life begins; it replaces the former life of the node."""
        former = self._lives.get(transport.node)
        if former is not None and former is not transport:
            self.kill(transport.node)
        self._lives[transport.node] = transport

    def leave(self, transport: MemoryTransport) -> None:
        """An endpoint closes: like its death, as far as its bytes go."""
        if self._lives.get(transport.node) is transport:
            self.kill(transport.node)

    def lives_at(self, peer: Peer) -> bool:
        """Whether this life of the node is there."""
        life = self._lives.get(peer.node)
        return life is not None and life.epoch == peer.epoch

    def add(self, writer: MemoryTransport, peer: Peer, write: Write, plan: Plan) -> None:
        """Queue a write, with the faults that fit it."""
        nth = self._posts.get(writer.node, 0)
        self._posts[writer.node] = nth + 1
        fitting = [f for f in self.faults if f.node in (None, writer.node) and f.nth in (None, nth)]
        for fault in fitting:
            self.faults.remove(fault)
        self._moves.append(Move(writer, peer, write, plan, sorted(fitting, key=lambda fault: fault.ranges)))

    # --- one step ----------------------------------------------------------------------------------

    def _advance(self, move: Move) -> None:
        writes, write = move.writer.writes, move.write
        owner = self._lives.get(move.peer.node)
        writes.begin(write)
        if move.wait:
            move.wait -= 1
        elif move.told:
            move.told -= 1
            if not move.told:
                move.writer.wake()  # the same completion, once more
                self._moves.remove(move)
        elif owner is None or owner.epoch != move.peer.epoch:
            self._end(move, f"{move.peer} has ended", drained=True)
        elif write.aborted:
            self._end(move, "aborted by its user", drained=True)
        elif write.tag.incarnation in owner.revoked:
            self._end(move, "revoked by its owner", drained=True)
        elif move.faults and move.faults[0].ranges <= move.placed:
            self._strike(move, move.faults.pop(0))
        elif not move.is_placed:
            move.place(owner)
        else:
            writes.finish(write)
            self._moves.remove(move)

    def _strike(self, move: Move, fault: Fault) -> None:
        match fault.kind:
            case "delay":
                move.wait = fault.steps
            case "partial":
                self._end(move, f"failed after {move.placed} ranges", drained=True)
            case "late":
                move.held = True
                move.writer.writes.fail(move.write, f"failed after {move.placed} ranges", drained=False)
            case "drop_completion" | "duplicate_completion":
                self._complete(move, fault)
            case "owner_death":
                self.kill(move.peer.node)
            case "writer_death":
                self.kill(move.writer.node)

    def _complete(self, move: Move, fault: Fault) -> None:
        owner = self._lives[move.peer.node]
        while not move.is_placed:
            move.place(owner)
        if fault.kind == "drop_completion":
            self._moves.remove(move)
        else:
            move.writer.writes.finish(move.write)
            move.told = max(1, fault.steps)

    def _end(self, move: Move, reason: str | None, *, drained: bool) -> None:
        move.writer.writes.fail(move.write, reason or "failed", drained=drained)
        self._moves.remove(move)


class MemoryTransport(PostingTransport[Peer]):
    """One endpoint of a fabric. one_sided: False makes the owner place the bytes, so that ``revoke`` fences."""

    name = "memory"
    form = Descriptor

    def __init__(
        self, node: str, epoch: int, wake: Wake, on_death: Death, *, fabric: Fabric, one_sided: bool = True
    ) -> None:
        super().__init__(node, epoch, PostedWrites(wake))
        self.wake, self.on_death = wake, on_death
        self.caps = Caps(one_sided, "best_effort", True, None, frozenset({"host"}))
        self.fabric = fabric
        self.revoked: set[Incarnation] = set()
        self.connected: set[str] = set()
        fabric.join(self)

    def _export(self, regions: Sequence[Region]) -> Descriptor:
        return Descriptor(self.node, self.epoch, [region.nbytes for region in regions])

    def _reach(self, body: Descriptor) -> Peer:
        """Writes to a life that is over fail when their turn comes."""
        self.connected.add(body.node)
        return Peer(body.node, body.epoch, Space(body.sizes))

    def _plan(self, copies: Copies, peer: Peer) -> Plan:
        """Ranges stay as they were posted: a test decides between which two of them something happens."""
        return plan_of(copies, self.space, peer.space, merged=False)

    def _start(self, peer: Peer, tag: Tag, plan: Plan) -> int:
        """Queue the write; it moves with the fabric's steps."""
        if not self.fabric.lives_at(peer):
            return self.writes.add_ended(tag, f"{peer} has ended")
        write = self.writes.add(Write(tag, plan))
        self.fabric.add(self, peer, write, plan)
        return write.handle

    def revoke(self, incarnation: Incarnation) -> bool:
        """Give up an incarnation's pages. True, and a fence, only when the owner places the bytes itself."""
        self.revoked.add(incarnation)
        return not self.caps.one_sided

    def close(self) -> None:
        """Leave the fabric. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.fabric.leave(self)
            self.writes.fail_all("the transport is closed", drained=True)


def _rows(plan: Plan, owner: Space) -> Iterator[tuple[int, int, int, int]]:
    """(source address, owner's region, offset within that region, bytes) of each range."""
    begin = plan.target - owner.starts[plan.target_region]
    return zip(plan.source.tolist(), plan.target_region.tolist(), begin.tolist(), plan.nbytes.tolist(), strict=True)
