"""The states of the smaller machines, and all machines of one profile together.

Prefill senders and decode receivers are rooms (``statemachine/machine.py``). Everything else that the protocol
decides is one of these: small tuples whose first field names the state in ``spec/kvpoll.toml``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.statemachine.machine import Machine, RoomMachine


class Registration(NamedTuple):
    """A prefill rank's registration; ``attempt`` counts PUTs of the current series.

    replaced: the server restarted since the last PUT was sent, so an answer to it says nothing of the new server.
    """

    state: str = "Unregistered"
    attempt: int = 0
    replaced: bool = False


class Registry(NamedTuple):
    """The bootstrap server's ranks as (name, process epoch), and how many PUTs it has seen."""

    state: str = "Empty"
    ranks: tuple[tuple[str, int], ...] = ()
    puts: int = 0


class DpEntry(NamedTuple):
    """Which prefill DP rank runs a room, as told to the bootstrap server."""

    state: str = "Unknown"
    rank: int | None = None


class Resolution(NamedTuple):
    """Which prefill DP rank a decode rank will contact."""

    state: str = "Unresolved"
    rank: int | None = None


class Peer(NamedTuple):
    """What one process believes of another: its epoch (None before the first answer) and missed probes."""

    state: str = "Alive"
    epoch: int | None = None
    misses: int = 0


class Queued(NamedTuple):
    """Where a request stands in a scheduler."""

    state: str = "Unqueued"


class Collective(NamedTuple):
    """Who has entered (mask), and the kind and shape that the first one brought."""

    state: str = "Open"
    entered: int = 0
    shape: Any = None


class Routed(NamedTuple):
    """The router's view of one request; ``cause`` is the first failure it heard of."""

    state: str = "Waiting"
    cause: str | None = None


STARTS: dict[str, Any] = {
    "registration": Registration(),
    "registry": Registry(),
    "dp_entry": DpEntry(),
    "resolution": Resolution(),
    "peer": Peer(),
    "prefill_request": Queued(),
    "decode_request": Queued(),
    "collective": Collective(),
    "router": Routed(),
}


class Machines:
    """Every machine of the protocol, compiled for one profile."""

    def __init__(self, protocol: Protocol, profile: Profile) -> None:
        self.protocol = protocol
        self.profile = profile
        self.sender = RoomMachine(protocol.roles["sender"], profile)
        self.receiver = RoomMachine(protocol.roles["receiver"], profile)
        small = {name: Machine(protocol.roles[name], profile) for name in STARTS}
        self.registration = small["registration"]
        self.registry = small["registry"]
        self.dp_entry = small["dp_entry"]
        self.resolution = small["resolution"]
        self.peer = small["peer"]
        self.prefill_request = small["prefill_request"]
        self.decode_request = small["decode_request"]
        self.collective = small["collective"]
        self.router = small["router"]

    def small(self, role: str) -> Machine:
        """The machine of a role that is not a room."""
        machine: Machine = getattr(self, role)
        return machine
