"""The protocol as pure step functions. See ``statemachine/machine.py`` for the theory of operation.

``ranks`` is what stands around the steps: it keeps state, but has no clock, no chance and no I/O either. Each of those
it asks of its host.
"""

from kvpoll.statemachine.machine import ABSENT, IllegalFact, Local, Machine, Room, RoomMachine
from kvpoll.statemachine.roles import STARTS, Machines

__all__ = ["ABSENT", "STARTS", "IllegalFact", "Local", "Machine", "Machines", "Room", "RoomMachine"]
