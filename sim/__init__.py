"""A testbed of virtual time: a SimPy cluster that drives the machines of ``statemachine/`` under faults."""

from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Scenario, find, load_scenario, names_available

__all__ = ["Outcome", "Run", "Scenario", "find", "load_scenario", "names_available"]
