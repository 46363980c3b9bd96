"""Mooncake's transfer engine: one-sided writes into the memory of another process, over tcp (or rdma).

What was measured (ENGINES 3, 4) and what is done about it:

- A batch above its queue is refused in part, and may wedge the peer for good: at most 1024 ranges go into a batch, and
  the queue's limits are raised before the engine is made.
- ``rc != 0`` after a failure, and after its own time-out of 30 s, comes while pages are still being written: the write
  fails, and is not drained. ``rc == 0`` of every batch that was begun is the one proof that it gives.
- It has no cancel: an abort takes effect between batches, and the write is drained when the running one returns 0.
- It takes a local address that is not registered: ranges are checked here.
- Its probe blocks for a minute at a stopped peer: it is asked in a thread.
- It listens on every interface: see ``mooncake_namespace.py``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

from kvpoll.runtime.transports.copy_plan import Plan
from kvpoll.runtime.transports.descriptor import Body, Places
from kvpoll.runtime.transports.engine_import import load_engine
from kvpoll.runtime.transports.engine_lane import Broken, Carrier
from kvpoll.runtime.transports.engine_transport import DEADLINE_S, EngineTransport, Peer
from kvpoll.runtime.transports.interface import Caps, Death, Region, Tag, TransportError, Wake
from kvpoll.runtime.transports.mooncake_namespace import MEND, open_interfaces

SETTINGS: Final = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_ADMISSION_TIMEOUT_MS": "30000",
    "MC_LOG_LEVEL": "ERROR",
    "MC_TE_METRIC": "0",
}
"""Read by the engine when it is made; a value that the environment already has is left alone."""


class Descriptor(Body):
    """session: host:port of the owner's handshake. regions: [(address, nbytes)]."""

    session: str
    regions: Places


class MooncakeTransport(EngineTransport):
    """One process's engine.

    host: the address that peers are given. protocol, device: as ``TransferEngine.initialize`` takes them.
    allow_all_interfaces: start although the engine's ports are open to other machines.
    """

    name = "mooncake"
    caps = Caps(one_sided=True, cancel="best_effort", proves_death=False, copies_max=None, memory=frozenset({"host"}))
    form = Descriptor

    def __init__(
        self,
        node: str,
        epoch: int,
        wake: Wake,
        on_death: Death,
        *,
        host: str = "127.0.0.1",
        protocol: str = "tcp",
        device: str = "",
        allow_all_interfaces: bool = False,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        super().__init__(node, epoch, wake, on_death, deadline_s)
        if not allow_all_interfaces:
            refuse_open_interfaces()
        for setting, value in {**SETTINGS, "MC_TCP_BIND_ADDRESS": host}.items():
            os.environ.setdefault(setting, value)
        self.engine = load_engine("mooncake.engine", "mooncake").TransferEngine()
        status = self.engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if status != 0:
            raise TransportError(
                f"mooncake does not start on {host} over {protocol}: status {status}; check the address and the device"
            )
        self.session = f"{host}:{self.engine.get_rpc_port()}"
        self._probes: dict[str, threading.Thread] = {}
        self._answers: dict[str, int] = {}

    def _export(self, regions: Sequence[Region]) -> Descriptor:
        for place, region in enumerate(regions):
            status = self.engine.register_memory(region.address, region.nbytes)
            if status != 0:
                for done in regions[:place]:
                    self.engine.unregister_memory(done.address)
                raise TransportError(f"mooncake does not register region {place} ({region.nbytes} bytes): {status}")
        known = [(region.address, region.nbytes) for region in regions]
        return Descriptor(self.node, self.epoch, self.session, known)

    def _carrier(self, body: Descriptor, peer: Peer) -> Carrier:
        return _Batches(self.engine, body.session)

    def _shut(self) -> None:
        for region in self.regions:
            self.engine.unregister_memory(region.address)

    def probe(self, peer: Peer) -> int | None:
        """What the engine's last probe of this peer said: 0 it answers, below 0 it does not, None not known yet.

        Starts another if none is running; ``wake`` is called when it ends. A hint only: it proves no death, because a
        peer that is not reached may be writing.
        """
        carrier = peer.lane.carrier
        assert isinstance(carrier, _Batches)
        session = carrier.session
        running = self._probes.get(session)
        if running is None or not running.is_alive():
            self._probes[session] = thread = threading.Thread(
                target=self._ask, args=(session,), name=f"mooncake-probe-{peer.node}", daemon=True
            )
            thread.start()
        return self._answers.get(session)

    def _ask(self, session: str) -> None:
        with contextlib.suppress(Exception):
            self._answers[session] = int(self.engine.send_probe(session))
        self.writes.tell()


class _Batches:
    """Batches to one session. The engine lets go of the interpreter's lock while it works."""

    def __init__(self, engine: Any, session: str) -> None:
        self.engine = engine
        self.session = session

    def open(self) -> None:
        """The engine connects with the first batch."""

    def begin(self, part: Plan, tag: Tag) -> None:
        """Write a batch and wait for it. Raises Broken unless the engine says that all of it is placed."""
        del tag
        status = self.engine.batch_transfer_sync_write(
            self.session, part.source.tolist(), part.target.tolist(), part.nbytes.tolist()
        )
        if status != 0:
            raise Broken(f"mooncake returned {status} for {len(part.nbytes)} ranges to {self.session}")

    def landed(self, ticket: None) -> bool:
        """``begin`` has waited for it."""
        del ticket
        return True

    def give_up(self, ticket: Any) -> None:
        """There is no cancel; the batch is over already."""
        del ticket

    def close(self) -> None:
        """Sessions end with the engine."""


def refuse_open_interfaces() -> None:
    """Raises TransportError where another machine could reach the engine's ports."""
    try:
        names = open_interfaces()
    except OSError as error:
        raise TransportError(
            f"mooncake listens on every interface, and which there are is not known: {error}; "
            f"{MEND}, or set allow_all_interfaces=True"
        ) from None
    if names:
        raise TransportError(
            f"mooncake listens on every interface, {', '.join(names)} included, and takes writes from whoever "
            f"connects; {MEND}, or set allow_all_interfaces=True"
        )
