"""One checked step and one room, beside what else one could write a sender with.

All subjects live the same life of a prefill sender: open, register the destination, register it again (ignored),
post a write, complete it, post the last one, complete it, clear. All but the dictionary check: an event out of turn
raises and moves nothing. kvpoll's sender does more with it than its peers are asked to: it also keeps the lease of
the pages (which is why it hears of their reservation), settles identity, and orders actions. Rooms are made before
the clock starts, facts while it runs.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib import import_module, metadata
from itertools import repeat
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvpoll.spec.protocol import Protocol
from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Fact, Incarnation
from kvpoll.statemachine import Machines, Room, RoomMachine

LIFE: Final[tuple[tuple[str, Any], ...]] = (
    ("RequestOpened", 1),
    ("DestinationRegistered", (0, 1)),
    ("DestinationRegistered", (0, 1)),
    ("PagesReserved", None),
    ("WritePosted", False),
    ("WriteCompleted", None),
    ("WritePosted", True),
    ("WriteCompleted", None),
    ("Cleared", None),
)
"""The facts of one sender, in order, each with its detail."""

MID_LIFE: Final = 5
"""After so many facts a write is out; the size of a room is taken there."""

PEER_EVENTS: Final = 8
"""The events of the same life for those that keep no lease: all but PagesReserved."""

FIRST_ROOM: Final = 1 << 62
"""Room numbers have 63 bits, so each is an object of its own; small ones would be shared."""

QUIET: Final = ("DestinationRegistered", (0, 1))
"""A fact that changes nothing once the destination is known."""


class Subject(NamedTuple):
    """Something to measure. ``make(number)`` gives one room, ``live(rooms)`` drives each through its whole life.

    ``age(room)`` takes it to the middle of its life and returns it. events: of one life. rooms: how many are
    driven between two looks at the clock. sized: how many are weighed.
    """

    name: str
    make: Callable[[int], Any]
    live: Callable[[list[Any]], None]
    age: Callable[[Any], Any]
    events: int
    rooms: int
    sized: int

    def steps_per_s(self) -> float:
        """Events a second, the making of the rooms left out."""
        rooms = [self.make(number) for number in range(self.rooms)]
        gc.collect()
        began = time.process_time()
        self.live(rooms)
        return self.events * len(rooms) / (time.process_time() - began)

    def bytes_a_room(self) -> float:
        """Memory of one room in the middle of its life, with everything that it alone holds."""
        self.age(self.make(0))  # what all rooms share is made now, and not weighed
        rooms: list[Any] = [None] * self.sized
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(self.sized):
                rooms[number] = self.age(self.make(number))
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return (after - before) / self.sized


def sender(protocol: Protocol) -> RoomMachine:
    """The sender of the reference profile."""
    return Machines(protocol, protocol.profile("reference")).sender


def kvpoll_subject(protocol: Protocol) -> Subject:
    """Our own step: the sender of the reference profile."""
    machine = sender(protocol)
    step = machine.step_room

    def make(number: int) -> Room:
        return machine.absent(Incarnation(FIRST_ROOM + number, 1, 0))

    def live(rooms: list[Room]) -> None:
        for room in rooms:
            own = room.incarnation
            for kind, detail in LIFE:
                room, _ = step(room, Fact(kind, own, detail))

    def age(room: Room) -> Room:
        own = room.incarnation
        for kind, detail in LIFE[:MID_LIFE]:
            room, _ = step(room, Fact(kind, own, detail))
        return room

    return Subject("kvpoll", make, live, age, len(LIFE), 20_000, 100_000)


def quiet_room(machine: RoomMachine) -> tuple[Room, Fact]:
    """A room in the middle of its life and a fact that changes nothing in it."""
    room = machine.absent(Incarnation(FIRST_ROOM, 1, 0))
    for kind, detail in LIFE[:2]:
        room, _ = machine.step_room(room, Fact(kind, room.incarnation, detail))
    fact = Fact(QUIET[0], room.incarnation, QUIET[1])
    machine.step_room(room, fact)
    return room, fact


def quiet_steps_per_s(protocol: Protocol, steps: int = 200_000) -> float:
    """Steps a second that change nothing, with the fact at hand."""
    machine = sender(protocol)
    room, fact = quiet_room(machine)
    step = machine.step_room
    began = time.process_time()
    for _ in range(steps):
        step(room, fact)
    return steps / (time.process_time() - began)


def blocks_kept_by_quiet_steps(protocol: Protocol, steps: int = 100_000) -> int:
    """How many memory blocks more there are after so many steps that change nothing.

    Counting takes blocks itself, so it is done with no step as well. The interpreter takes one now and then, so it
    is done three times, and the least counts.
    """
    machine = sender(protocol)
    room, fact = quiet_room(machine)
    return min(_blocks_kept(machine, room, fact, steps) - _blocks_kept(machine, room, fact, 0) for _ in range(3))


def _blocks_kept(machine: RoomMachine, room: Room, fact: Fact, steps: int) -> int:
    step = machine.step_room
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in repeat(None, steps):  # a range would make numbers
        step(room, fact)
    return sys.getallocatedblocks() - before


# -- peers


def unchecked_subject() -> Subject:
    """What SGLang does per status: a dictionary, and the larger of two numbers. The floor; it checks nothing."""
    statuses: dict[int, int] = {}
    life = (1, 2, 2, 3, 3, 3, 4)  # the last of the eight events forgets the room

    def update(room: int, status: int) -> None:
        known = statuses.get(room)
        statuses[room] = status if known is None or status == 0 else max(known, status)

    def live(rooms: list[int]) -> None:
        for room in rooms:
            for status in life:
                update(room, status)
            statuses.pop(room)

    def make(number: int) -> int:
        return FIRST_ROOM + number

    def age(room: int) -> int:
        update(room, 3)
        return room

    return Subject("unchecked dictionary update", make, live, age, PEER_EVENTS, 20_000, 100_000)


class Counted:
    """What a peer's sender counts: writes that are out, and whether the last one is among them."""

    def __init__(self) -> None:
        self.outstanding = 0
        self.last = False
        super().__init__()

    def was_last_write(self) -> bool:
        """Does this completion end the request?"""
        return self.last and self.outstanding == 1

    def count_write(self, last: bool = False) -> None:
        """A write was posted."""
        self.outstanding += 1
        self.last = self.last or last

    def uncount_write(self) -> None:
        """A write is over."""
        self.outstanding -= 1


def _live_as_methods(rooms: list[Any]) -> None:
    for room in rooms:
        room.open()
        room.register()
        room.register()
        room.post()
        room.complete()
        room.post(last=True)
        room.complete()
        room.clear()


def _age_as_methods(room: Any) -> Any:
    room.open()
    room.register()
    room.register()
    room.post()
    return room


STATES: Final = ("Absent", "Bootstrapping", "WaitingForInput", "Transferring", "Success", "Retired")


def transitions_subject() -> Subject:
    """One `transitions.Machine` for all rooms, each room a model in it: the way of its own that costs least."""
    peer = import_peer("transitions", "transitions")
    rows = [
        {"trigger": "open", "source": "Absent", "dest": "Bootstrapping"},
        {"trigger": "register", "source": "Bootstrapping", "dest": "WaitingForInput"},
        {"trigger": "register", "source": "WaitingForInput", "dest": None},
        {"trigger": "post", "source": "WaitingForInput", "dest": "Transferring", "before": "count_write"},
        {"trigger": "post", "source": "Transferring", "dest": None, "before": "count_write"},
        {
            "trigger": "complete",
            "source": "Transferring",
            "dest": "Success",
            "conditions": "was_last_write",
            "after": "uncount_write",
        },
        {"trigger": "complete", "source": "Transferring", "dest": None, "after": "uncount_write"},
        {"trigger": "clear", "source": "Success", "dest": "Retired"},
    ]
    machine = peer.Machine(model=None, states=list(STATES), initial="Absent", transitions=rows, auto_transitions=False)

    def make(number: int) -> Counted:
        room = Counted()
        machine.add_model(room)
        return room

    return Subject("transitions", make, _live_as_methods, _age_as_methods, PEER_EVENTS, 2_000, 2_000)


def statemachine_subject() -> Subject:
    """One instance of a python-statemachine class for each room."""
    peer = import_peer("statemachine", "python-statemachine")
    state = peer.State

    class Sender(Counted, peer.StateMachine):  # type: ignore[misc, name-defined]
        """The sender's life in python-statemachine's own words."""

        absent = state(initial=True)
        bootstrapping, waiting, transferring, success = state(), state(), state(), state()
        retired = state(final=True)
        open = absent.to(bootstrapping)
        register = bootstrapping.to(waiting) | waiting.to.itself(internal=True)
        post = waiting.to(transferring, on="count_write") | transferring.to.itself(internal=True, on="count_write")
        complete = transferring.to(success, cond="was_last_write", on="uncount_write") | transferring.to.itself(
            internal=True, on="uncount_write"
        )
        clear = success.to(retired)

    def make(number: int) -> Any:
        return Sender()

    return Subject("python-statemachine", make, _live_as_methods, _age_as_methods, PEER_EVENTS, 400, 400)


def subjects(protocol: Protocol) -> list[Subject]:
    """Ours first. Raises BadInput when a peer is not installed."""
    return [kvpoll_subject(protocol), transitions_subject(), statemachine_subject(), unchecked_subject()]


def import_peer(module: str, distribution: str) -> Any:
    """A peer's package from where it is installed. Raises BadInput when it is not.

    The house has a room called statemachine, which a Python that was started in it finds before the package.
    """
    try:
        home = Path(str(metadata.distribution(distribution).locate_file("")))
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise BadInput(f"bench needs {distribution}, which is missing: pip install 'kvpoll[bench]'") from None
    path = list(sys.path)
    sys.path.insert(0, str(home))
    try:
        peer = import_module(module)
    finally:
        sys.path[:] = path
    if not str(getattr(peer, "__file__", "")).startswith(str(home)):
        hides = f"{Path(str(peer.__file__)).parent} hides {distribution} {version}"
        raise BadInput(f"{hides}: start Python with -P (`python -P -m kvpoll bench`)")
    return peer
