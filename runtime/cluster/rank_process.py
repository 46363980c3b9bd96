"""One rank as a process: the scheduler of ``statemachine.ranks`` on a real host."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from kvpoll.runtime.bootstrap import RankInfo
from kvpoll.runtime.cluster.config import RankConfig
from kvpoll.runtime.cluster.engine import ProcessEngine
from kvpoll.runtime.cluster.group import Group, read_commands
from kvpoll.runtime.cluster.process import LAUNCHER, Station, stand_still
from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.control.messages import Envelope
from kvpoll.runtime.host import Address, Host
from kvpoll.runtime.memory import PatternPool, RowOwners
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.runtime.server_watch import ServerWatch
from kvpoll.runtime.transports import allocate, make
from kvpoll.runtime.writes import Writes
from kvpoll.spec.invariants import Watch
from kvpoll.spec.trace import EVENTS, Surveyed
from kvpoll.statemachine.conduct import probes_ranks, watches_server
from kvpoll.statemachine.ranks.decode import DecodeRank
from kvpoll.statemachine.ranks.prefill import PrefillRank


class RankProcess:
    """A rank, its memory, its transport, and the launcher's commands."""

    def __init__(self, config: RankConfig) -> None:
        self.config = config
        self.station = station = Station(config)
        self.host = Host(
            station.protocol, station.profile, station.plane, station.loop, config.lengths, config.servers,
            config.seed, mla=config.lengths.mla,
        )  # fmt: skip
        self.host.stream.recording = config.trace is not None
        self.host.emitted.append(station.record)
        self.watch: Watch | None = None
        if config.monitored:
            self.watch = Watch(self.host.stream, station.protocol.bounds)
        self.host.mail[wire.Command] = self._command
        self.host.directory[LAUNCHER] = Address(config.launcher, 0)
        self.halts = list(config.halts)
        if self.halts:
            self.host.emitted.append(self._halt)
        self.memory, self.transport = self._memory()
        self.host.writes = Writes(self.host, self.memory, self.transport)
        self.engine = ProcessEngine(self.host, config, self._health)
        self._said = 0
        station.tell_launcher("hello", memory=[(region.address, region.nbytes) for region in self.memory.regions()])

    def _memory(self) -> tuple[KVPool, Any]:
        """The pool in memory that the transport can share, and the transport."""
        config = self.config
        transport = make(
            config.transport, config.node, config.epoch, self._woken,
            lambda node, epoch: self.station.loop.post(self.host.saw_end, node, epoch), **config.transport_options,
        )  # fmt: skip
        memory = KVPool.on_host(config.layout, allocate(config.transport, config.layout.total_bytes))
        self.host.memory = (transport.register(memory.regions()), config.layout.to_bytes())
        return memory, transport

    def _woken(self) -> None:
        if self.host.writes is not None:
            self.host.writes.wake()

    # -- the rank

    def _begin(self, origin: float, directory: dict[str, list[Any]]) -> None:
        """All ranks of the engine are there: build this one."""
        if self.host.rank is not None:
            return
        config, host = self.config, self.host
        self.station.begin(origin)
        for node, (endpoint, epoch) in directory.items():
            host.directory[node] = Address(endpoint, epoch)
        replica = f"{config.engine}/dp{config.dp}"
        stage = config.stages[config.pp]
        group = Group(host, replica, config.dp, config.stages, config.pp, stage.index(config.node))
        rank: PrefillRank | DecodeRank
        if config.side == "prefill":
            host.info = self._info()
            rank = PrefillRank(self.engine, group, config.node, config.pp, config.tp, 0)
        else:
            rank = DecodeRank(self.engine, group, config.node, config.tp)
            rank.row_owners = RowOwners(self.memory)  # type: ignore[assignment]
        rank.kv = PatternPool(host, config.node, self.memory, self.config.sources)
        host.seat(rank)
        if isinstance(rank, PrefillRank):
            rank.register("Started")
            if watches_server(host.profile):
                watch = ServerWatch(host, config.engine, lambda: rank.register("ServerRestarted"))
                host.server_answered = watch.answered
        elif not probes_ranks(host.profile):
            for engine in config.servers:
                ServerWatch(host, engine, suspect=partial(rank.suspect, engine))
        self._stats()

    def _info(self) -> RankInfo:
        """What this rank registers as."""
        config, (dp, pp, tp, _) = self.config, self.config.shape.sizes
        ip, _, port = self.station.plane.endpoint.removeprefix("tcp://").rpartition(":")
        attention = config.lengths.dp_attention
        return RankInfo(
            rank_ip=ip, rank_port=int(port), page_size=config.lengths.page_tokens,
            kv_cache_dtype=config.layout.dtype, attn_tp_size=tp, attn_tp_rank=config.tp,
            attn_dp_size=dp if attention else 1, attn_dp_rank=config.dp if attention else 0,
            system_dp_size=1 if attention else dp, system_dp_rank=0 if attention else config.dp,
            pp_size=pp, pp_rank=config.pp, load_balance_method=config.lengths.load_balance,
            process_epoch=config.epoch, rank_name=config.node, node=config.node,
        )  # fmt: skip

    # -- the launcher

    def _command(self, envelope: Envelope, message: wire.Command) -> None:
        if envelope.node != LAUNCHER:
            return
        content = msgspec.json.decode(message.payload)
        if message.kind == "begin":
            self._begin(content["origin"], content["directory"])
        elif message.kind == "quit":
            self.station.loop.stop()
        elif message.kind == "speed":
            self.station.loop.change_speed(content["at"], content["speed"])
        elif message.kind == "pace":
            self.engine.slowdown = content["factor"]
        elif self.host.rank is not None:
            self._order(message.kind, content)

    def _order(self, kind: str, content: Any) -> None:
        """A command that needs the rank."""
        rank, host = self.host.rank, self.host
        if kind == "work":
            (command,) = read_commands([content])
            rank.commands.append(command)
            (rank.replica if isinstance(rank, PrefillRank) else rank.group).wake()
        elif kind == "abort_room":
            entry = rank.by_pair.get(tuple(content["pair"]))
            if entry is not None and entry.rejected is None:
                host.mark(host.node, f"staged:{content['cause']}")
                rank.deliver("AbortRequested", entry.incarnation, content["cause"])
        elif kind == "halt":
            self.halts.append(content)
            if self._halt not in host.emitted:
                host.emitted.append(self._halt)
        elif kind == "fail_allocations":
            rank.kv.fail_next = content["count"]
        elif kind == "survey":
            host.emit(self.survey())
            self.station.tell_launcher("surveyed")

    def survey(self) -> Surveyed:
        """What is left on this rank."""
        rank = self.host.rank
        tables = {
            "rooms": len(rank.rooms), "requests": len(rank.entries), "timers": rank.timers.armed(),
            "kv_pages": rank.kv.size - len(rank.kv.free), "by_pair": len(rank.by_pair),
            "writes": len(self.host.writes or ()),
        }  # fmt: skip
        for name in ("destinations", "askers", "peers"):
            if hasattr(rank, name):
                tables[name] = len(getattr(rank, name))
        if hasattr(rank, "aux"):
            tables["aux_rows"] = rank.aux.size - len(rank.aux.free)
        gauges = tuple((name, float(value)) for name, value in sorted(rank.gauges.items()))
        return Surveyed(self.host.now, self.host.node, tuple(tables.items()), gauges, rank.timers.overdue())

    def _health(self, registered: bool, running: bool) -> None:
        self.station.tell_launcher("health", registered=registered, running=running)

    def _stats(self) -> None:
        """Twice a second of wall time, how things stand; the launcher shows it."""
        host = self.host
        rank = host.rank
        polls: dict[str, int] = {}
        for room in rank.rooms.values():
            polls[room.local.poll] = polls.get(room.local.poll, 0) + 1
        registered = self.config.side == "decode" or rank.registration.state == "Registered"
        self.station.tell_launcher(
            "stats", gauges=rank.gauges, polls=polls, registered=registered,
            running=not rank.stopped and not rank.collectives.blocked,
            bytes=host.writes.bytes_done if host.writes is not None else 0, verified=rank.kv.bytes_verified,
            failed=self.station.loop.failed[-3:],
            quarantined=sum(len(rank.kv.held[pair]) for pair in rank.kv.quarantined),
            free=len(rank.kv.free), size=rank.kv.size,
            violations=dict(self.watch.counts) if self.watch is not None else {},
        )  # fmt: skip
        host.after(0.5 * self.station.loop.speed, self._stats)

    def _halt(self, event: Any) -> None:
        """Stand still at the event that a staged fault waits for; the launcher stages it and says go on."""
        for pattern in self.halts:
            wanted = {name: value for name, value in pattern.items() if name != "event"}
            if type(event) is EVENTS[str(pattern["event"])] and matches(event, wanted):
                self.halts.remove(pattern)
                stand_still()
                return

    def run(self) -> None:
        """Serve until the launcher says quit, or SIGTERM."""
        try:
            self.station.loop.run(self.host.receive)
        finally:
            self.host.close()
            self.transport.close()
            self.station.close()


def matches(event: Any, pattern: dict[str, Any]) -> bool:
    """Do the event's fields have these values? A text that ends with * matches by its beginning."""
    for name, wanted in pattern.items():
        value = getattr(event, name)
        if isinstance(wanted, str) and wanted.endswith("*"):
            if not str(value).startswith(wanted[:-1]):
                return False
        elif value != wanted:
            return False
    return True
