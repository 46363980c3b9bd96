"""NIXL with its UCX backend: one-sided writes into the memory of another process.

What was measured (ENGINES 1, 4) and what is done about it:

- ``release_xfer_handle`` succeeds and the bytes go on landing: a handle is released only after "DONE".
- A transfer to a stopped owner stays "PROC" for ever, without a time-out: the deadline is ours, and what has failed is
  still looked at, because a "DONE" that comes late is the proof that it has drained.
- ``transfer`` may raise, or copy everything before it returns (shm): it is called by the peer's own thread.
- Without its progress thread a target that is busy in Python receives nothing: the thread is always on.
- UCX listens on every device unless told: ``UCX_NET_DEVICES`` is lo and ``UCX_TLS`` tcp, where not set already.

Tried with host memory only. CUDA memory is passed on as VRAM; it needs ``tls="cuda_ipc,cuda_copy,tcp"`` or the like.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import numpy as np

from kvpoll.runtime.transports.copy_plan import Plan, cut, merge, plan_of
from kvpoll.runtime.transports.descriptor import Body, Places
from kvpoll.runtime.transports.engine_import import load_engine
from kvpoll.runtime.transports.engine_lane import Broken, Carrier, Refused
from kvpoll.runtime.transports.engine_transport import DEADLINE_S, EngineTransport, Peer
from kvpoll.runtime.transports.interface import Caps, Copies, Death, Region, Tag, TransportError, Wake
from kvpoll.runtime.transports.offsets import Space
from kvpoll.runtime.transports.page_lists import Grid, grid, uniform_bytes

MEMORY: Final = {"host": "DRAM", "cuda": "VRAM"}
CELLS_MAX: Final = 1 << 20
"""Above so many cells, a list of whole regions costs more (5 ms for 16384 cells) than lists for each write."""

GRIDS_MAX: Final = 4
"""Page sizes that are kept prepared for one peer; a pool has one or two."""


class Descriptor(Body):
    """agent: the name that its metadata carries. metadata: of ``get_agent_metadata``. regions: [(address, nbytes)].

    kind: "host" or "cuda", of all regions; device: their device number (0 for host).
    """

    agent: str
    metadata: bytes
    regions: Places
    kind: Literal["host", "cuda"]
    device: int


class NixlTransport(EngineTransport):
    """One process's agent.

    net_devices, tls: for UCX, where the environment does not say. module: the package of the NIXL build.
    device: number of the CUDA device, if the memory is there.
    """

    name = "nixl"
    caps = Caps(
        one_sided=True, cancel="best_effort", proves_death=False, copies_max=None, memory=frozenset({"host", "cuda"})
    )
    form = Descriptor
    part_ranges = 4096
    depth = 2

    def __init__(
        self,
        node: str,
        epoch: int,
        wake: Wake,
        on_death: Death,
        *,
        net_devices: str = "lo",
        tls: str = "tcp",
        module: str = "nixl_cu12",
        device: int = 0,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        super().__init__(node, epoch, wake, on_death, deadline_s)
        os.environ.setdefault("UCX_NET_DEVICES", net_devices)
        os.environ.setdefault("UCX_TLS", tls)
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        api = load_engine(f"{module}._api", "nixl")
        logging.getLogger(f"{module}._api").setLevel(logging.WARNING)
        # Names must differ between the lives of a node, or an old life's metadata would be taken for the new one's.
        self.agent_name = f"{node}#{epoch}#{secrets.token_hex(4)}"
        try:
            settings = api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
            self.agent = api.nixl_agent(self.agent_name, settings)
        except Exception as error:  # NIXL's exceptions share no class
            raise TransportError(
                f"nixl does not start over {os.environ['UCX_TLS']} on {os.environ['UCX_NET_DEVICES']}: {error}; "
                "check UCX_TLS and UCX_NET_DEVICES"
            ) from None
        self.agent_lock = threading.Lock()
        """The agent is made without locks of its own; peers' threads take turns."""
        self.memory = "DRAM"
        self.device = device
        self._registered: Any = None

    def _export(self, regions: Sequence[Region]) -> Descriptor:
        kinds = {region.kind for region in regions}
        if len(kinds) > 1:
            raise TransportError("nixl: all regions must be of one kind, host or cuda")
        kind = kinds.pop()
        self.memory = MEMORY[kind]
        self.device = self.device if kind == "cuda" else 0
        rows = [(region.address, region.nbytes, self.device, "") for region in regions]
        try:
            with self.agent_lock:
                self._registered = self.agent.register_memory(rows, self.memory)
                metadata = self.agent.get_agent_metadata()
        except Exception as error:
            raise TransportError(f"nixl does not register the memory: {_said(error)}") from None
        known = [(region.address, region.nbytes) for region in regions]
        return Descriptor(self.node, self.epoch, self.agent_name, metadata, known, kind, self.device)

    def _carrier(self, body: Descriptor, peer: Peer) -> Carrier:
        return _Transfers(self, body, peer.space)

    def _plan(self, copies: Copies, peer: Peer) -> Plan:
        """Pages of one size stay single, so that prepared lists can be used (NIXL joins neighbours itself)."""
        ranges = plan_of(copies, self.space, peer.space, merged=False)
        return ranges if self.page_bytes(ranges, peer.space) else merge(ranges)

    def _cut(self, ranges: Plan) -> Iterator[Plan]:
        longest = int(ranges.nbytes.max())
        return cut(ranges, self.part_ranges, max(self.part_bytes, longest if self._is_paged(ranges) else 0))

    def _is_paged(self, ranges: Plan) -> bool:
        return bool((ranges.nbytes == ranges.nbytes[0]).all())

    def page_bytes(self, ranges: Plan, target: Space) -> int | None:
        """The page size for which lists of whole regions are worth preparing, or None."""
        size = uniform_bytes(ranges, self.space, target)
        if size is None or max(self.space.total, target.total) // size > CELLS_MAX:
            return None
        return size

    def _shut(self) -> None:
        with self.agent_lock:
            if self._registered is not None:
                self.agent.deregister_memory(self._registered)
            del self.agent


class _Transfers:
    """Transfers to one remote agent."""

    def __init__(self, transport: NixlTransport, body: Descriptor, space: Space) -> None:
        self.transport = transport
        self.body = body
        self.space = space
        self.remote = ""
        self._prepared: dict[int, tuple[Grid, Any, Grid, Any]] = {}

    def open(self) -> None:
        """Make the remote agent known. Nothing is sent yet."""
        with self.transport.agent_lock:
            added = self.transport.agent.add_remote_agent(self.body.metadata)
        self.remote = added.decode() if isinstance(added, bytes) else str(added)

    def begin(self, part: Plan, tag: Tag) -> Any:
        """Make a transfer and post it. Raises Refused when it cannot be made, Broken when posting goes wrong."""
        del tag
        transport = self.transport
        with transport.agent_lock:
            try:
                handle = self._make(part)
            except Exception as error:  # nothing was posted
                raise Refused(f"nixl: {_said(error)}") from None
            try:
                state = transport.agent.transfer(handle)
            except Exception as error:
                _LOST.append(handle)
                raise Broken(f"nixl: {_said(error)}") from None
        if state == "ERR":
            _LOST.append(handle)
            raise Broken("nixl: the transfer ended with ERR")
        return handle

    def landed(self, ticket: Any) -> bool:
        """DONE, and only that. Raises Broken for ERR, and what NIXL raises (the owner is gone)."""
        agent = self.transport.agent
        with self.transport.agent_lock:
            try:
                state = agent.check_xfer_state(ticket)
            except Exception as error:
                _LOST.append(ticket)
                raise Broken(f"nixl: {_said(error)}") from None
            if state == "DONE":
                agent.release_xfer_handle(ticket)
                return True
        if state == "ERR":
            _LOST.append(ticket)
            raise Broken("nixl: the transfer ended with ERR")
        return False

    def give_up(self, ticket: Any) -> None:
        """Nothing: a release is a cancel that lets the bytes land, and takes away the handle that could say DONE."""
        del ticket

    def close(self) -> None:
        """Forget the remote agent and the lists that were prepared for it."""
        agent = self.transport.agent
        with self.transport.agent_lock, contextlib.suppress(Exception):
            for _, local, _, remote in self._prepared.values():
                agent.release_dlist_handle(local)
                agent.release_dlist_handle(remote)
            self._prepared.clear()
            agent.remove_remote_agent(self.remote)

    def _make(self, part: Plan) -> Any:
        agent = self.transport.agent
        size = self.transport.page_bytes(part, self.space)
        if size is not None:
            mine, local, theirs, remote = self._lists(size)
            sources = mine.cells(self.transport.space, part.source, part.source_region)
            targets = theirs.cells(self.space, part.target, part.target_region)
            return agent.make_prepped_xfer("WRITE", local, sources, remote, targets)
        local = agent.get_xfer_descs(_rows(part.source, part.nbytes, self.transport.device), self.transport.memory)
        remote = agent.get_xfer_descs(_rows(part.target, part.nbytes, self.body.device), MEMORY[self.body.kind])
        return agent.initialize_xfer("WRITE", local, remote, self.remote)

    def _lists(self, size: int) -> tuple[Grid, Any, Grid, Any]:
        """All pages of this size on both sides, prepared once."""
        if size not in self._prepared:
            agent, transport = self.transport.agent, self.transport
            while len(self._prepared) >= GRIDS_MAX:
                _, local, _, remote = self._prepared.pop(next(iter(self._prepared)))
                agent.release_dlist_handle(local)
                agent.release_dlist_handle(remote)
            mine, theirs = grid(transport.space, size), grid(self.space, size)
            self._prepared[size] = (
                mine,
                agent.prep_xfer_dlist(
                    "NIXL_INIT_AGENT", _rows(mine.addresses, size, transport.device), transport.memory
                ),
                theirs,
                agent.prep_xfer_dlist(
                    self.remote, _rows(theirs.addresses, size, self.body.device), MEMORY[self.body.kind]
                ),
            )
        return self._prepared[size]


_LOST: list[Any] = []
"""Handles of transfers that NIXL gave up: never released, because a release is a cancel that cancels nothing, and the
bytes are read from memory that the handle describes."""


def _rows(addresses: Any, nbytes: Any, device: int) -> Any:
    """NIXL's descriptors: uint64 [n, 3] of address, length, device."""
    rows = np.empty((len(addresses), 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = addresses, nbytes, device
    return rows


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
