"""What a rank asks of the outside, and the things that it speaks of when it does.

A host never decides anything of the protocol. It is one of two siblings: ``sim.world.World``, whose time is virtual,
and ``runtime.host.Host``, whose time is the monotonic clock. Both call a rank from one thread only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol

from kvpoll.spec.protocol import Profile
from kvpoll.spec.trace import Stream
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.roles import Machines

Waiting = Generator[Any, Any, Any]
"""A task of a rank: it yields what the host gave it to wait for (``sleep``, ``happening``) and is resumed then."""

Reply = Callable[[int | str, Any], None]
"""How an HTTP request ended: status code with the answer, or "refused" or "timeout" with None."""


class Request(NamedTuple):
    """One client request as the router dispatched it. ``pair`` is (room, attempt); engines are counted from 0."""

    rid: str
    pair: tuple[int, int]
    t: float
    input_tokens: int
    output_tokens: int
    prefill: int
    prefill_dp: int
    decode: int
    decode_dp: int


class Destination(NamedTuple):
    """What a decode rank published: its name, its incarnation of the room, its bit, pages in prompt order, aux row.

    ``memory`` is what the transport needs to reach those pages; the rank hands it on and does not look at it.
    """

    node: str
    incarnation: Incarnation
    bit: int
    pages: tuple[int, ...]
    row: int
    memory: Any = None


class Plan(NamedTuple):
    """What a decode rank must know of a prefill engine first: sizes, and how requests find their rank."""

    sizes: Sizes
    follows_room: bool
    mla: bool = False


class Lengths(Protocol):
    """Sizes that prefill and decode have in common."""

    @property
    def page_tokens(self) -> int:
        """Tokens that a page holds."""

    @property
    def chunk_tokens(self) -> int:
        """Tokens that prefill computes at once; a multiple of ``page_tokens``."""


class Happening(Protocol):
    """Something that tasks wait for, and that happens once."""

    def succeed(self, value: Any = None) -> Any:
        """It has happened; who waits goes on with this value."""


class Chance(Protocol):
    """Draws that a host makes for a rank: a rank has no randomness of its own, as it has no clock."""

    def random(self) -> float:
        """Uniform in [0, 1)."""

    def uniform(self, low: float, high: float) -> float:
        """Uniform between two numbers."""

    def getrandbits(self, bits: int, /) -> int:
        """A whole number of so many bits."""


class Host(Protocol):
    """The outside of a rank. ``now`` is in seconds since the start of the trace."""

    profile: Profile
    machines: Machines
    stream: Stream

    @property
    def now(self) -> float:
        """The time, on a clock that only moves forward."""

    @property
    def topology(self) -> Lengths:
        """Sizes that all ranks agree on."""

    # -- telling

    def wants(self, event_type: type[Any]) -> bool:
        """Does anybody listen for this type? What happens with every request is made an event only then."""

    def emit(self, event: Any) -> None:
        """Tell invariants and recorder what happened."""

    def mark(self, node: str, mark: str) -> None:
        """Witness something that a scenario waits for."""

    # -- time and tasks

    def after(self, delay_s: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function later."""

    def sleep(self, delay_s: float) -> Any:
        """What a task yields to go on after this time."""

    def happening(self) -> Happening:
        """What a task yields to go on when it succeeds."""

    def spawn(self, task: Waiting) -> Any:
        """Run a task."""

    def chance(self, purpose: str) -> Chance:
        """Draws of their own for every purpose; the host decides whether they follow from a seed."""

    # -- others

    def send(self, node: str, to: str, message: str, incarnation: Incarnation, *arguments: Any) -> None:
        """Send a control message to another rank: its ``receive`` is called, if it arrives."""

    def request(self, node: str, engine: str, route: str, detail: Any, repeat: int, reply: Reply) -> None:
        """Send an HTTP request to the bootstrap server of a prefill engine."""

    def post(self, rank: Any, destination: Destination, chunk: int, first: int, pages: tuple[int, ...], last: bool,
             done: Callable[[str], None]) -> None:  # fmt: skip
        """Write ``pages``, the prompt's pages from ``first`` on; ``done`` hears "completed", "failed", "settled"."""

    def problem(self, destination: Destination) -> str | None:
        """Why this process cannot write to a destination's memory, or None. Nothing is sent."""

    def abandon(self, own: Incarnation) -> None:
        """A room of this process has failed: ask for the end of its writes. When they are quiet is heard as ever."""

    def refuse(self, own: Incarnation) -> bool:
        """Place no byte any more that comes for a room of this process. True proves it; False: it cannot refuse."""

    def explain(self, own: Incarnation, reason: str) -> None:
        """More of why a room fails, for people to read."""

    def plan(self, engine: str) -> Plan:
        """A prefill engine whose topology has been learned."""

    def believed_epoch(self, rank: Any, engine: str) -> int | None:
        """Process epoch of an engine as this rank's failure detector last saw it; None before that."""

    def true_epoch(self, engine: str) -> int:
        """Process epoch of an engine as it is, as far as this host can know; for the trace only."""

    def leg_failed(self, rank: Any, request: Request, side: str, cause: str) -> None:
        """Answer the router's leg with an error."""

    def first_token(self, rank: Any, request: Request) -> None:
        """Stream the first token to the router."""


@functools.lru_cache(maxsize=4096)
def engine_of(node: str) -> str:
    """``P0`` for ``P0/dp1/tp0``."""
    return node.partition("/")[0]


def is_of(node: str, name: str) -> bool:
    """Is this node the process of that name, or a rank of the engine of that name?"""
    return node == name or node.startswith(name + "/")


def rank_name(engine: str, sizes: Sizes, dp: int, pp: int, tp: int, cp: int = 0) -> str:
    """``P0/dp1/pp0/tp1``; dimensions of size one are left out."""
    parts = [engine]
    for label, size, index in (("dp", sizes.dp, dp), ("pp", sizes.pp, pp), ("cp", sizes.cp, cp), ("tp", sizes.tp, tp)):
        if size > 1:
            parts.append(f"{label}{index}")
    return "/".join(parts)


def unique_index(sizes: Sizes, pp: int, tp: int, cp: int = 0) -> int:
    """The bit by which decode ranks count a prefill rank (``prefill_unique_rank``, PROTOCOL 1)."""
    return tp * sizes.pp * sizes.cp + pp * sizes.cp + cp
