"""The protocol as pure step functions. See ``statemachine/machine.py`` for the theory of operation."""

from kvpoll.statemachine.machine import ABSENT, IllegalFact, Local, Machine, Room, RoomMachine
from kvpoll.statemachine.roles import STARTS, Machines

__all__ = ["ABSENT", "STARTS", "IllegalFact", "Local", "Machine", "Machines", "Room", "RoomMachine"]
