"""Decode engines of the simulator: the process tree around the ranks of ``statemachine.ranks.decode``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpoll.sim.engine import Detector, Engine
from kvpoll.sim.group import Collectives, Turns
from kvpoll.statemachine.conduct import probes_ranks
from kvpoll.statemachine.ranks.decode import DecodeRank
from kvpoll.statemachine.ranks.host import Request, rank_name

if TYPE_CHECKING:
    from kvpoll.sim.cluster import Cluster


class Group:
    """The tensor ranks of one decode replica."""

    def __init__(self, engine: DecodeEngine, dp: int) -> None:
        self.name = f"{engine.name}/dp{dp}"
        self.turns = Turns(engine.host, engine.shape.sizes.tp)
        self.collectives = Collectives(engine.host, self.name, engine.shape.sizes.tp)
        self.ranks: list[DecodeRank] = []

    def wake(self) -> None:
        """Every rank takes a turn."""
        self.turns.wake()


class DecodeEngine(Engine):
    """A decode server."""

    side = "D"

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(cluster.world, number, cluster.topology.decode)
        self.cluster = cluster
        self.groups: list[Group] = []

    def build(self) -> None:
        sizes = self.shape.sizes
        self.groups = [Group(self, dp) for dp in range(sizes.dp)]
        for dp, group in enumerate(self.groups):
            for tp in range(sizes.tp):
                group.ranks.append(DecodeRank(self, group, rank_name(self.name, sizes, dp, 0, tp), tp))
        self.ranks = {rank.node: rank for group in self.groups for rank in group.ranks}

    def ready(self) -> None:
        by_rank = probes_ranks(self.host.profile)
        for rank in self.ranks.values():
            for engine in self.cluster.prefill:
                target = engine.name if by_rank else engine.server.name
                suspect, bury = _about(rank, engine.name)
                self.detectors.append(Detector(rank, target, suspect, bury))

    def accept(self, request: Request, command: tuple[Any, ...]) -> None:
        """The controller hands a command to the leader of the request's group."""
        group = self.groups[request.decode_dp]
        group.ranks[0].commands.append(command)
        group.wake()


def _about(rank: DecodeRank, engine: str) -> Any:
    """What a detector tells the rank, whatever it probed: the engine is meant, not its bootstrap server."""
    return (lambda target: rank.suspect(engine)), (lambda target, epoch: rank.bury(engine, epoch))
