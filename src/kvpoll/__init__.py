"""kvpoll: the prefill/decode KV-transfer protocol, written once: specified, simulated under faults, and run.

The public names below are imported when they are first asked for, so that a serving engine that embeds the
machine pays for no simulator and no command line::

    import kvpoll

    protocol = kvpoll.load()
    machines = kvpoll.Machines(protocol, protocol.profile("reference"))

Rooms: ``kvpoll.spec`` (what must hold), ``kvpoll.statemachine`` (how it moves), ``kvpoll.sim`` (virtual
time), ``kvpoll.runtime`` (real processes) and ``kvpoll.reports`` (what people look at).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpoll.sim.run import Outcome, Run
    from kvpoll.sim.scenario import Scenario, load_scenario
    from kvpoll.spec.invariants import INVARIANTS, Watch, judge
    from kvpoll.spec.protocol import Profile, Protocol, load
    from kvpoll.spec.source import BadInput
    from kvpoll.spec.trace import read_trace
    from kvpoll.spec.vocabulary import POLL_NUMBERS, Action, Fact, Incarnation
    from kvpoll.statemachine.machine import ABSENT, IllegalFact
    from kvpoll.statemachine.roles import Machines

__version__ = "0.1.0"

__all__ = [
    "ABSENT",
    "INVARIANTS",
    "POLL_NUMBERS",
    "Action",
    "BadInput",
    "Fact",
    "IllegalFact",
    "Incarnation",
    "Machines",
    "Outcome",
    "Profile",
    "Protocol",
    "Run",
    "Scenario",
    "Watch",
    "__version__",
    "judge",
    "load",
    "load_scenario",
    "read_trace",
]

_HOMES = {
    **dict.fromkeys(("POLL_NUMBERS", "Action", "Fact", "Incarnation"), "spec.vocabulary"),
    **dict.fromkeys(("Profile", "Protocol", "load"), "spec.protocol"),
    **dict.fromkeys(("INVARIANTS", "Watch", "judge"), "spec.invariants"),
    "BadInput": "spec.source",
    "read_trace": "spec.trace",
    **dict.fromkeys(("ABSENT", "IllegalFact"), "statemachine.machine"),
    "Machines": "statemachine.roles",
    **dict.fromkeys(("Outcome", "Run"), "sim.run"),
    **dict.fromkeys(("Scenario", "load_scenario"), "sim.scenario"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
