"""One-sided KV writes over shared links.

Each rank has one network card of ``link_bytes_per_s``. A write occupies the writer's and the target's card from
the moment both are free, so writes queue behind each other as they do on real links. A write is posted, later
lands, and then settles; with a fault it lands in part, fails, or lands late, when its pages may be someone
else's. Failing is one fact, having drained is another (ENGINES 4): a failed write settles only afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from kvpoll.sim.world import covers
from kvpoll.spec.trace import PageTag, WriteLanded, WritePosted, WriteSettled, new_event
from kvpoll.statemachine.ranks.host import Destination, engine_of

if TYPE_CHECKING:
    from kvpoll.sim.world import World


class Write(NamedTuple):
    """One posted write: pages ``first`` .. of the prompt, from ``source`` (a prefill rank) to a destination."""

    serial: int
    source: Any
    destination: Destination
    chunk: int
    first: int
    pages: tuple[int, ...]
    last: bool
    epochs: tuple[int, int]
    done: Callable[..., None]


class Transport:
    """Moves bytes in virtual time and suffers the write faults."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slow: list[tuple[str, float]] = []
        self.faults: list[Any] = []
        self._busy: dict[str, float] = {}
        self._serial = 0
        self._draw = world.chance("writes")
        topology = world.topology
        self._page_bytes = topology.page_tokens * topology.kv_bytes_per_token
        self._share = topology.prefill.sizes.pp * max(topology.prefill.sizes.tp, topology.decode.sizes.tp)

    def post(self, source: Any, destination: Destination, chunk: int, first: int, source_pages: tuple[int, ...],
             last: bool, done: Callable[..., None]) -> None:  # fmt: skip
        """Post a write of ``len(source_pages)`` pages; ``done(outcome)`` gets "completed", "failed", "settled"."""
        world = self.world
        self._serial += 1
        target = destination.node
        pages = destination.pages[first : first + len(source_pages)]
        row = destination.row if last else None
        world.emit(new_event(WritePosted, (
            world.now, source.node, self._serial, destination.incarnation, target, chunk, last,
            source_pages, pages, row,
        )))  # fmt: skip
        start = max(world.now, self._busy.get(source.node, 0.0), self._busy.get(target, 0.0))
        end = start + self._duration_s(source.node, target, len(pages))
        self._busy[source.node] = self._busy[target] = end
        epochs = (world.epochs[source.engine.name], world.epochs[engine_of(target)])
        write = Write(self._serial, source, destination, chunk, first, pages, last, epochs, done)
        fault = self._fault_for(source.node)
        if fault is None:
            world.after(end - world.now, self.finish, write)
        else:
            fault.strike(self, write, end - world.now)

    def _duration_s(self, source: str, target: str, pages: int) -> float:
        topology = self.world.topology
        size = max(1, pages) * self._page_bytes / self._share
        factor = 1.0
        for prefix, slowdown in self.slow:
            if covers(prefix, source) or covers(prefix, target):
                factor *= slowdown
        return topology.latency_s + factor * size / topology.link_bytes_per_s

    def _fault_for(self, node: str) -> Any:
        for fault in self.faults:
            if covers(fault.target, node) and self._draw.random() < fault.share:
                return fault
        return None

    def finish(self, write: Write) -> None:
        """The write's time is over: place everything and tell the writer, or fail."""
        if self.is_writer_gone(write):
            return
        if self._is_cut(write):
            self.fail(write, settle_s=1.0)
            return
        self._place(write, write.pages)
        world = self.world
        world.emit(new_event(WriteSettled, (world.now, write.source.node, write.serial, True)))
        write.done("completed")

    def _is_cut(self, write: Write) -> bool:
        world, target = self.world, write.destination.node
        engine = engine_of(target)
        if not world.alive[engine] or world.epochs[engine] != write.epochs[1]:
            return True
        return world.network.is_severed(write.source.node, target)

    def is_writer_gone(self, write: Write) -> bool:
        """Did the writing process die meanwhile? Then nothing more is read, placed or reported."""
        engine = write.source.engine.name
        return not self.world.alive[engine] or self.world.epochs[engine] != write.epochs[0]

    def land(self, write: Write, count: int) -> None:
        """Place the first ``count`` pages of a write, whoever owns them now; the aux row with the last of all."""
        if not self.is_writer_gone(write) and not self._is_cut(write):
            self._place(write, write.pages[:count])

    def _place(self, write: Write, pages: tuple[int, ...]) -> None:
        world = self.world
        target = world.cluster.rank(write.destination.node)
        pair, source = write.destination.incarnation.pair, write.source.component
        contents = target.kv.contents
        part, chunk = write.first, write.chunk
        for page in pages:
            contents[page][source] = new_event(PageTag, (pair, source, part, chunk))
            part += 1
        if write.last and len(pages) == len(write.pages):
            target.place_row(write.destination.row, pair)
        if world.stream.wants(WriteLanded):
            landed = (world.now, target.node, write.serial, write.destination.incarnation, pages)
            world.emit(new_event(WriteLanded, landed))

    def settle(self, write: Write, ok: bool) -> None:
        """No byte of this write moves any more."""
        if not self.is_writer_gone(write):
            self.world.emit(WriteSettled(self.world.now, write.source.node, write.serial, ok))

    def fail(self, write: Write, settle_s: float) -> None:
        """Tell the writer that it failed; it settles later."""
        if self.is_writer_gone(write):
            return
        write.done("failed")
        self.world.after(settle_s, self._settle_failed, write)

    def _settle_failed(self, write: Write) -> None:
        if not self.is_writer_gone(write):
            self.settle(write, ok=False)
            write.done("settled")

    def forget(self, engine: str) -> None:
        """The cards of a dead engine are idle."""
        for node in [node for node in self._busy if engine_of(node) == engine]:
            del self._busy[node]
