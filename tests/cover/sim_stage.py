"""A stage for the parts of the simulator: a world without traffic, and everything that happened in it."""

from __future__ import annotations

from typing import Any

from kvpoll.sim.cluster import Cluster
from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Scenario, parse_scenario
from kvpoll.sim.topology import Topology
from kvpoll.sim.world import World
from kvpoll.spec.protocol import Value, load
from kvpoll.spec.source import Source
from kvpoll.spec.trace import Stream
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape

PROTOCOL = load()
A = Incarnation(7, 0, 0)
B = Incarnation(8, 0, 0)


def shape(count: int = 1, dp: int = 1, pp: int = 1, tp: int = 1, cp: int = 1, **rest: Any) -> EngineShape:
    return EngineShape(count=count, sizes=Sizes(dp, pp, tp, cp), **rest)


class Stage:
    """A world, and the events that it emitted."""

    def __init__(
        self, topology: Topology | None = None, seed: int = 0, profile: str = "reference", **rules: Value
    ) -> None:
        stream = Stream()
        self.events: list[Any] = []
        stream.subscribe_all(self.events.append)
        chosen = PROTOCOL.profile(profile).with_rules(rules)
        self.world = World(PROTOCOL, chosen, topology or Topology(), seed, stream)

    def cluster(self) -> Cluster:
        """A cluster that is up and registered."""
        cluster = Cluster(self.world)
        cluster.start()
        self.until(1.0)
        return cluster

    def until(self, t: float) -> None:
        self.world.env.run(until=t)

    def cost(self, seconds: float) -> int:
        """How many events the next ``seconds`` cost, apart from the one that ends them."""
        before = self.world.scheduled_events()
        self.until(self.world.now + seconds)
        return self.world.scheduled_events() - before - ENDING

    def of(self, event_type: type[Any], /, **fields: Any) -> list[Any]:
        """Events of one type whose fields have these values."""
        return chosen(self.events, event_type, fields)


class Played:
    """A scenario written down in a test and run at seed 0, and the events that it emitted."""

    def __init__(self, text: str, profile: str = "reference", seed: int = 0, **rules: Value) -> None:
        self.events: list[Any] = []
        self.scenario: Scenario = scenario(text)
        with_rules = PROTOCOL.profile(profile).with_rules(rules)
        self.outcome: Outcome = Run(PROTOCOL, self.scenario, with_rules, seed, collect=self.events)()

    def of(self, event_type: type[Any], /, **fields: Any) -> list[Any]:
        """Events of one type whose fields have these values."""
        return chosen(self.events, event_type, fields)


def scenario(text: str) -> Scenario:
    """A scenario from its text; the title is added."""
    return parse_scenario(Source("here.toml", 'title = "here"\n' + text), PROTOCOL, "here")


def chosen(events: list[Any], event_type: type[Any], fields: dict[str, Any]) -> list[Any]:
    return [
        event
        for event in events
        if type(event) is event_type and all(getattr(event, name) == value for name, value in fields.items())
    ]


ENDING = 0
ENDING = Stage().cost(1.0)
"""What SimPy itself schedules to end a run at a time, measured where nothing else happens."""
