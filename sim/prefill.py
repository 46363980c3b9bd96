"""Prefill engines of the simulator: the process tree around the ranks of ``statemachine.ranks.prefill``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpoll.sim.engine import Detector, Engine
from kvpoll.sim.group import Collectives, Turns
from kvpoll.statemachine.conduct import probes_ranks, watches_server
from kvpoll.statemachine.ranks.host import Request, rank_name
from kvpoll.statemachine.ranks.prefill import PrefillRank

if TYPE_CHECKING:
    from kvpoll.sim.cluster import Cluster


class Replica:
    """One data-parallel replica: its pipeline stages, each a tensor x context group."""

    def __init__(self, engine: PrefillEngine, dp: int) -> None:
        sizes = engine.shape.sizes
        self.engine = engine
        self.dp = dp
        self.stages = sizes.pp
        self.name = f"{engine.name}/dp{dp}"
        group = sizes.tp * sizes.cp
        self.size = group * sizes.pp
        self.turns = Turns(engine.host, group)
        self.collectives = [Collectives(engine.host, f"{self.name}/pp{pp}", group) for pp in range(sizes.pp)]
        self.ranks: list[list[PrefillRank]] = []

    def build(self) -> None:
        """Make the ranks, stage by stage."""
        sizes = self.engine.shape.sizes
        for pp in range(sizes.pp):
            self.ranks.append([])
            for cp in range(sizes.cp):
                for tp in range(sizes.tp):
                    node = rank_name(self.engine.name, sizes, self.dp, pp, tp, cp)
                    self.ranks[pp].append(PrefillRank(self.engine, self, node, pp, tp, cp))

    def wake(self) -> None:
        """Every rank of stage 0 takes a turn; the later stages follow."""
        self.turns.wake()

    def block(self) -> None:
        """The pipeline hangs."""
        for collectives in self.collectives:
            collectives.blocked = True

    def stage_collectives(self, pp: int) -> Collectives:
        """The collectives of one stage."""
        return self.collectives[pp]

    def stage_turns(self) -> Turns:
        """Turns of a rank of a later stage, which follows the steps of stage 0."""
        return Turns(self.engine.host)

    def leader_of(self, rank: PrefillRank) -> str:
        """The stage-0 rank of the same column."""
        return self.ranks[0][rank.index].node

    def successor_of(self, rank: PrefillRank) -> str | None:
        """The same column's rank in the next stage."""
        return self.ranks[rank.pp + 1][rank.index].node if rank.pp + 1 < self.stages else None


class PrefillEngine(Engine):
    """A prefill server with its bootstrap server and DP controller."""

    side = "P"

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(cluster.world, number, cluster.topology.prefill)
        self.cluster = cluster
        self.server = cluster.servers[number]
        self.replicas: list[Replica] = []
        self.load: list[int] = [0] * self.shape.sizes.dp

    def build(self) -> None:
        self.replicas = [Replica(self, dp) for dp in range(self.shape.sizes.dp)]
        for replica in self.replicas:
            replica.build()
        self.ranks = {rank.node: rank for rep in self.replicas for stage in rep.ranks for rank in stage}

    def ready(self) -> None:
        profile = self.host.profile
        for rank in self.ranks.values():
            self.host.after(rank.chance.random() * 0.01, rank.register, "Started")
            if watches_server(profile):
                self.detectors.append(Detector(rank, self.server.name, lambda _: None, _server_restarted(rank)))
            if probes_ranks(profile):
                for engine in self.cluster.decode:
                    self.detectors.append(Detector(rank, engine.name, rank.suspect, rank.bury))

    @property
    def rank_count(self) -> int:
        """How many ranks the bootstrap server must expect."""
        sizes = self.shape.sizes
        return sizes.dp * sizes.pp * sizes.tp * sizes.cp

    @property
    def dp_attention(self) -> bool:
        """Data-parallel attention, or plain replicas."""
        return self.cluster.topology.dp_attention

    @property
    def follows_room(self) -> bool:
        """Does its controller dispatch by room mod dp?"""
        return self.cluster.topology.follows_room

    @property
    def dp_ranks(self) -> int:
        """Data-parallel replicas."""
        return self.shape.sizes.dp

    @property
    def destinations_required(self) -> int:
        """Decode ranks that write metadata for a room to each rank."""
        return self.cluster.topology.mapping(0).destinations_required

    def is_registered(self) -> bool:
        return all(rank.registration.state == "Registered" for rank in self.ranks.values())

    def accept(self, request: Request, command: tuple[Any, ...]) -> None:
        """The controller hands a command to the leader of the request's replica."""
        leader = self.replicas[request.prefill_dp].ranks[0][0]
        leader.commands.append(command)
        self.replicas[request.prefill_dp].wake()


def _server_restarted(rank: PrefillRank) -> Any:
    def tell(name: str, epoch: int) -> None:
        rank.register("ServerRestarted")

    return tell
