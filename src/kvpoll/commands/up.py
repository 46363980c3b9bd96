"""``kvpoll up``: a small cluster of real processes on this machine, under load, with what is done to it; a verdict.

An engine is what lives and dies as one: ``--prefill 2`` are two prefill engines, P0 and P1, each with a bootstrap
server of its own, and each of one rank unless --tp-prefill and the like say more. So decode0 can die while decode1
serves on, which is what a first look should show.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import re
import resource
import shlex
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from kvpoll.commands.options import (
    Verbs,
    add_profile,
    add_seed,
    add_spec,
    add_verb,
    counted,
    lasting,
    open_to_write,
    whole,
)
from kvpoll.commands.plan import changed_profile, read_spec
from kvpoll.commands.screen import Screen, plural
from kvpoll.commands.status import HOLDS, INTERRUPTED, VIOLATED
from kvpoll.commands.up_verdict import Ended, as_object, holds, show
from kvpoll.sim.topology import Topology, rank_names
from kvpoll.sim.workload import WORKLOADS, Arrival, poisson, read_model
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput, nearest
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape

if TYPE_CHECKING:
    from kvpoll.live_cluster import Deed, LiveCluster, Snapshot
    from kvpoll.runtime.cluster.launcher import Plan

LOAD_S: Final = 20.0
RATE_PER_S: Final = 4.0
PAGES: Final = 2048
PAGE_TOKENS: Final = 64
RANKS_MAX: Final = 32
RATE_MAX: Final = 500.0
PROCESS_BYTES: Final = 64 * 2**20
FILES_A_RANK: Final = 16
AT_S: Final = 5.0
FOR_S: Final = {"kill": 2.0, "stop": 3.0, "restart": 0.0}
DEEDS: Final = tuple(FOR_S)
REFRESH_S: Final = 0.25
LINE_S: Final = 3.0
SIDES: Final = {"prefill": "P", "decode": "D", "bootstrap": "B"}


class _Does(argparse.Action):
    """``--kill NAME --at S --for S``: the two that follow belong to the deed before them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        deeds: list[dict[str, Any]] = getattr(namespace, "deeds", None) or []
        namespace.deeds = deeds
        word = (option_string or "").lstrip("-")
        if word in DEEDS:
            deeds.append({"what": word, "name": values})
        elif not deeds:
            raise BadInput(f"--{word} {values}: belongs after --kill, --stop or --restart")
        elif word in deeds[-1]:
            raise BadInput(f"--{word} {values}: --{deeds[-1]['what']} {deeds[-1]['name']} has a --{word} already")
        else:
            deeds[-1][word] = values


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Start a small cluster of real processes, load it, show it live, break it, and say what came of it."
    more = "Ctrl-C ends the load and gives the verdict; a second Ctrl-C ends everything at once."
    parser = add_verb(verbs, "up", says, act, more)
    _add_cluster(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--rate", metavar="R", type=lasting, default=RATE_PER_S, help="requests a second (default 4)")
    load.add_argument("--requests", metavar="N", type=counted, help="so many requests (default: those of the time)")
    load.add_argument("--minutes", metavar="M", type=lasting, help=f"how long (default: {LOAD_S:g} s, or --requests)")
    load.add_argument("--abort-share", metavar="X", type=_share, default=0.0, help="clients that leave (default 0)")
    add_seed(load)  # type: ignore[arg-type]
    deeds = parser.add_argument_group("deeds", "NAME: decode0, prefill1, bootstrap0, or as the table names a process")
    for word, told in (
        ("kill", "SIGKILL; the engine dies with its rank, a prefill engine with its server; back after --for (2 s)"),
        ("stop", "SIGSTOP, and SIGCONT after --for (3 s)"),
        ("restart", "kill and start at once, at the same address; what is down is started"),
    ):
        deeds.add_argument(f"--{word}", metavar="NAME", action=_Does, help=told)
    deeds.add_argument("--at", metavar="S", action=_Does, type=_second, help=f"when, in seconds (default {AT_S:g})")
    deeds.add_argument("--for", metavar="S", action=_Does, type=lasting, help="how long it is down or stopped")
    deeds.add_argument("--no-restart", action="store_true", help="what is killed stays down")
    parser.add_argument("--metrics", metavar="PORT", type=whole, help="Prometheus metrics on 127.0.0.1; 0: any port")
    parser.add_argument("--record", metavar="FILE", help="write the merged trace, for `kvpoll validate`")
    parser.add_argument("--picture", metavar="FILE", help="write the table as SVG: one second after the last kill")
    add_spec(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    for side in ("prefill", "decode"):
        group.add_argument(f"--{side}", metavar="N", type=counted, default=2, help=f"{side} engines (default 2)")
        group.add_argument(f"--tp-{side}", metavar="N", type=counted, default=1, help="tensor ranks of each (1)")
        group.add_argument(f"--dp-{side}", metavar="N", type=counted, default=1, help="data-parallel replicas (1)")
    group.add_argument("--pp-prefill", metavar="N", type=counted, default=1, help="pipeline stages of each (1)")
    group.add_argument("--pages", metavar="N", type=counted, default=PAGES, help=f"KV pages of a rank ({PAGES})")
    group.add_argument("--transport", choices=("shm", "tcp"), default="shm", help="what moves pages (default shm)")
    add_profile(group, "reference", "rules of the protocol (default reference)")  # type: ignore[arg-type]
    group.add_argument(
        "--set", metavar="RULE=VALUE", action="append", default=[], dest="changes", help="change a rule of the profile"
    )


def _share(text: str) -> float:
    number = _second(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return number


def _second(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number and not negative, got {text!r}")
    return number


# ---------------------------------------------------------------------------------------------- what is wanted


class Wanted(NamedTuple):
    """What the options say, checked; nothing runs yet."""

    protocol: Protocol
    profile: Profile
    rules: dict[str, Any]
    topology: Topology
    arrivals: list[Arrival]
    deeds: list[Deed]
    load_s: float
    bytes_needed: int
    line: str


def wanted_of(arguments: argparse.Namespace) -> Wanted:
    """Check all that was given. Raises BadInput; nothing has been started then."""
    protocol = read_spec(arguments.spec)
    base = protocol.profile(arguments.profile)
    profile = changed_profile(protocol, arguments.profile, arguments.changes)
    rules = {name: value for name, value in profile.rules.items() if base.rules[name] != value}
    topology = _topology(arguments)
    arrivals, load_s = _load(arguments)
    deeds = [_deed(given, topology) for given in getattr(arguments, "deeds", None) or []]
    load_s = _stretched(arguments, deeds, load_s)
    _check_prompts(arrivals, topology)
    needed = _check_machine(topology)
    return Wanted(protocol, profile, rules, topology, arrivals, deeds, load_s, needed, _line(arguments))


def _topology(arguments: argparse.Namespace) -> Topology:
    """The cluster as a scenario would describe it. Raises BadInput when it cannot exist."""
    sizes = {
        "prefill": Sizes(dp=arguments.dp_prefill, pp=arguments.pp_prefill, tp=arguments.tp_prefill),
        "decode": Sizes(dp=arguments.dp_decode, tp=arguments.tp_decode),
    }
    ranks = sum(getattr(arguments, side) * sizes[side].dp * sizes[side].pp * sizes[side].tp for side in sizes)
    if ranks > RANKS_MAX:
        raise BadInput(f"{ranks:,} ranks are wanted, each a process; at most {RANKS_MAX} on one machine")
    shapes = {
        side: EngineShape(getattr(arguments, side), sizes[side], arguments.pages, 256, 256, 80_000.0, 0.005, 0.001, 0.0)
        for side in sizes
    }
    topology = Topology(shapes["prefill"], shapes["decode"], page_tokens=PAGE_TOKENS)
    problem = topology.check()
    if problem is not None:
        raise BadInput(f"this cluster cannot exist: {problem}")
    return topology


def _load(arguments: argparse.Namespace) -> tuple[list[Arrival], float]:
    """Arrivals at the rate, with the lengths of the conversation trace, and how long the load lasts."""
    if arguments.rate > RATE_MAX:
        raise BadInput(f"--rate {arguments.rate:g}: at most {RATE_MAX:g} requests a second on one machine")
    lasts_s = arguments.minutes * 60 if arguments.minutes is not None else LOAD_S
    if arguments.requests is not None and arguments.minutes is None:
        lasts_s = 2 * arguments.requests / arguments.rate + 30  # surely long enough for so many to arrive
    if lasts_s * arguments.rate > 1_000_000:
        raise BadInput(f"{lasts_s * arguments.rate:,.0f} requests are wanted; at most 1,000,000 in one run")
    lengths = read_model(WORKLOADS / "conversation.toml").lengths
    arrivals = poisson(random.Random(f"{arguments.seed}/up"), arguments.rate, lasts_s, lengths)
    if arguments.requests is not None:
        arrivals = arrivals[: arguments.requests]
        if arguments.minutes is None:
            lasts_s = arrivals[-1].t + 0.5
    return arrivals, lasts_s


def _deed(given: dict[str, Any], topology: Topology) -> Deed:
    from kvpoll.live_cluster import Deed

    target = node_of(given["name"], topology)
    return Deed(given["what"], target, given.get("at", AT_S), given.get("for", FOR_S[given["what"]]))


def node_of(name: str, topology: Topology) -> str:
    """The node that a user's name means: decode0 is D0. Raises BadInput with the nearest name."""
    servers = [f"B{number}" for number in range(topology.prefill.count)]
    ranks = [*rank_names("P", topology.prefill), *rank_names("D", topology.decode)]
    nodes = {*servers, *ranks, *(rank.partition("/")[0] for rank in ranks)}
    spoken = {f"{side}{node[1:]}": node for side, letter in SIDES.items() for node in nodes if node[0] == letter}
    node = spoken.get(name, name)
    if node not in nodes:
        raise BadInput(f"nothing here is called {name!r}{nearest(name, [*spoken, *nodes])}")
    return node


def _stretched(arguments: argparse.Namespace, deeds: list[Deed], load_s: float) -> float:
    """With --requests alone the load ends with the last of them, but not before all is done that was asked for."""
    for deed in deeds:
        if deed.at_s >= load_s and (arguments.minutes is not None or arguments.requests is None):
            told = f"--{deed.words} --at {deed.at_s:g}: the load ends at {load_s:g} s"
            raise BadInput(f"{told}; give an earlier time, or a longer load with --minutes")
    return max([load_s, *(deed.at_s + deed.for_s + 0.5 for deed in deeds if arguments.minutes is None)])


def _check_prompts(arrivals: list[Arrival], topology: Topology) -> None:
    longest = max((arrival.input_tokens for arrival in arrivals), default=0)
    pages, needed = topology.prefill.kv_pages, -(-longest // topology.page_tokens)
    if needed > pages:
        held = pages * topology.page_tokens
        raise BadInput(
            f"--pages {pages}: a rank holds {held:,} tokens and the longest prompt has {longest:,}; "
            f"give --pages {needed} or more"
        )


def _check_machine(topology: Topology) -> int:
    """Bytes that the cluster may come to use. Raises BadInput when this machine, or a limit of it, has less."""
    ranks = [*rank_names("P", topology.prefill), *rank_names("D", topology.decode)]
    whole = plan_layout(topology).total_bytes
    sizes = [
        (whole // (shape.sizes.tp * shape.sizes.pp), len(list(rank_names(side, shape))))
        for side, shape in (("P", topology.prefill), ("D", topology.decode))
    ]
    pools = sum(size * count for size, count in sizes)
    needed = pools + PROCESS_BYTES * (len(ranks) + topology.prefill.count)
    has = available_bytes()
    if has is not None and needed > has:
        told = f"the pools of {len(ranks)} ranks need {needed / 2**30:.1f} GiB and {has / 2**30:.1f} GiB are available"
        raise BadInput(f"{told}; give fewer --pages, or fewer ranks")
    largest = max(size for size, _ in sizes)
    # A process maps its own pool and, to write into them, those of its peers; each pool is a file in memory.
    for name, limit, used in (
        ("address space (ulimit -v)", resource.RLIMIT_AS, pools),
        ("size of a file (ulimit -f)", resource.RLIMIT_FSIZE, largest),
    ):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and used > soft:
            told = f"{used / 2**20:,.0f} MiB are needed and the limit on the {name} is {soft / 2**20:,.0f} MiB"
            raise BadInput(f"{told}; raise it, or give fewer --pages")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_A_RANK * len(ranks) + 64
    if files != resource.RLIM_INFINITY and files < wanted:
        raise BadInput(f"{len(ranks)} ranks need {wanted} open files and the limit is {files}; raise `ulimit -n`")
    return int(needed)


def available_bytes() -> int | None:
    """Memory that can be had without swapping: of the machine, or of the group it is limited by. None: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        found += [int(match[1]) * 1024] if match else []
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def plan_layout(topology: Topology) -> Any:
    """The memory of the whole model: 4 layers, 8 heads or more; a page of 64 tokens has 128 KiB."""
    try:
        from kvpoll.runtime.pools.layout import Layout
    except ModuleNotFoundError as error:
        raise BadInput(f"kvpoll up needs {error.name}, which is not installed: pip install 'kvpoll[runtime]'") from None
    heads = max(8, topology.prefill.sizes.tp, topology.decode.sizes.tp)
    layers = tuple(range(max(4, topology.prefill.sizes.pp)))
    shape = topology.prefill
    return Layout(layers, shape.kv_pages, PAGE_TOKENS, heads, 16, "float16", rows=shape.rows)


def _line(arguments: argparse.Namespace) -> str:
    """The command that does it again. Real processes: the same load and deeds, not the same interleaving."""
    words = ["kvpoll", "up", "--profile", arguments.profile]
    defaults = {"prefill": 2, "decode": 2, "pages": PAGES, "transport": "shm", "rate": RATE_PER_S, "abort_share": 0.0}
    sizes = dict.fromkeys(("tp_prefill", "dp_prefill", "pp_prefill", "tp_decode", "dp_decode"), 1)
    for name, default in {**sizes, **defaults, "requests": None, "minutes": None, "spec": None}.items():
        value = getattr(arguments, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    for change in arguments.changes:
        words += ["--set", change]
    for deed in getattr(arguments, "deeds", None) or []:
        words += [f"--{deed['what']}", deed["name"]]
        words += [word for name in ("at", "for") if name in deed for word in (f"--{name}", f"{deed[name]:g}")]
    words += ["--no-restart"] * arguments.no_restart
    return shlex.join([*words, "--seed", str(arguments.seed)])


# ---------------------------------------------------------------------------------------------- running it


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Start, load, break, end, judge."""
    try:
        import kvpoll.live_cluster
        import kvpoll.live_metrics  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput(f"kvpoll up needs {error.name}, which is not installed: pip install 'kvpoll[runtime]'") from None
    wanted = wanted_of(arguments)
    with contextlib.ExitStack() as stack:
        record = None if arguments.record is None else stack.enter_context(open_to_write(Path(arguments.record)))
        if arguments.picture is not None:
            stack.enter_context(open_to_write(Path(arguments.picture)))
        metrics = None
        if arguments.metrics is not None:
            metrics = _metrics(arguments.metrics)
            stack.callback(metrics.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvpoll-up-")))
        stack.enter_context(_ended_by_sigterm())
        ended = _run(wanted, arguments, folder, metrics, record, screen)
    if ended is None:
        screen.err.print("kvpoll: ended at once; nothing was judged, and no process is left", soft_wrap=True)
        return INTERRUPTED
    if arguments.json:
        screen.json(as_object(ended))
    else:
        show(ended, screen)
        screen.say(ended.line)
    return HOLDS if holds(ended) else VIOLATED


def _metrics(port: int) -> Any:
    from kvpoll.live_metrics import ClusterMetrics

    if not 0 <= port <= 65535:
        raise BadInput(f"--metrics {port}: is no port; give one from 0 to 65535")
    return ClusterMetrics(port)


def _run(
    wanted: Wanted, arguments: argparse.Namespace, folder: Path, metrics: Any, record: IO[str] | None, screen: Screen
) -> Ended | None:  # fmt: skip
    """The cluster's whole life. None when it was ended at once."""
    from kvpoll.live_cluster import LiveCluster

    cluster = LiveCluster(
        wanted.protocol, wanted.profile, _plan(wanted, arguments, folder), wanted.arrivals, wanted.deeds,
        wanted.load_s, restarts=not arguments.no_restart, abort_share=arguments.abort_share,
    )  # fmt: skip
    picture = None if arguments.picture is None else Path(arguments.picture)
    patience_s: float | None = 0.0
    try:
        with _Watching(cluster, wanted, metrics, picture, screen, arguments.json) as watching, _ended_by_user(cluster):
            cluster.play(watching.look)
            watching.look(True)
        patience_s = None
    except KeyboardInterrupt:
        return None
    finally:
        with _deaf():
            cluster.close(patience_s)
    header = {
        "kvpoll_trace": 1, "spec": wanted.protocol.digest, "title": "kvpoll up", "profile": wanted.profile.name,
        "seed": arguments.seed, "repeat": wanted.line, "real": True, "transport": arguments.transport, "speed": 1.0,
    }  # fmt: skip
    verdict, moved, left = cluster.judged(header, record)
    return Ended(
        wanted.line, wanted.profile.name, cluster.loaded_s, cluster.snapshot(), verdict.watch, verdict.ttft_s,
        verdict.events, moved, left, cluster.defects, list(cluster.told), arguments.record,
        was_cut=cluster.loaded_s < wanted.load_s - 0.5,
    )  # fmt: skip


def _plan(wanted: Wanted, arguments: argparse.Namespace, folder: Path) -> Plan:
    from kvpoll.runtime.cluster.config import Lengths
    from kvpoll.runtime.cluster.launcher import Plan

    topology = wanted.topology
    layout = dataclasses.replace(plan_layout(topology), pages=1, rows=0)
    return Plan(
        prefill=topology.prefill, decode=topology.decode, lengths=Lengths(topology.page_tokens, topology.chunk_tokens),
        layout=layout, profile=arguments.profile, rules=wanted.rules, spec=arguments.spec, seed=str(arguments.seed),
        speed=1.0, transport=arguments.transport, folder=folder,
    )  # fmt: skip


@contextlib.contextmanager
def _ended_by_user(cluster: LiveCluster) -> Iterator[None]:
    """Ctrl-C ends the load; the second one, or one before there is a load, ends everything at once."""

    def heard(number: int, frame: Any) -> None:
        if cluster.is_ending or cluster.phase == "starting":
            raise KeyboardInterrupt
        cluster.end_load()
        cluster.tell("Ctrl-C: the load is over; once more ends everything at once")

    former = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """No third Ctrl-C may keep the processes from being ended."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends everything at once, and in order: no process and no folder is left."""

    def heard(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class _Watching:
    """Shows the cluster while it plays: a live table, or a line every few seconds; and feeds the metrics."""

    def __init__(
        self, cluster: LiveCluster, wanted: Wanted, metrics: Any, picture: Path | None, screen: Screen, is_json: bool
    ) -> None:  # fmt: skip
        from kvpoll.live_table import draw, plain, render

        self.cluster, self.wanted = cluster, wanted
        self.metrics, self.picture = metrics, picture
        self.screen, self.is_json = screen, is_json
        self._render: Callable[[Snapshot, str, int], Any] = render
        self._plain: Callable[[Snapshot], str] = plain
        self._draw: Callable[[Snapshot, str, Path], None] = draw
        self._live: Any = None
        self._shown_s = self._said_s = float("-inf")
        self._picture_s = _picture_s(wanted)

    def __enter__(self) -> _Watching:
        console = self.screen.err if self.is_json else self.screen.out
        if not self.is_json:
            self.screen.say(_announcement(self.wanted, self.metrics))
        if console.is_terminal:
            from rich.live import Live

            self._live = Live(console=console, auto_refresh=False, transient=self.is_json)
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def look(self, is_last: bool = False) -> None:
        """Called at every turn of the cluster's loop; does something a few times a second."""
        wall_s = _wall_s()
        if wall_s - self._shown_s < REFRESH_S and not is_last:
            return
        self._shown_s = wall_s
        shot = self.cluster.snapshot()
        if self.metrics is not None:
            self.metrics.show(shot)
        if self.picture is not None and (shot.t >= self._picture_s or shot.phase != "load"):
            self._draw(shot, self.wanted.profile.name, self.picture)
            self.picture = None
        if self._live is not None:
            width = self._live.console.width
            self._live.update(self._render(shot, self.wanted.profile.name, width), refresh=True)
        elif not self.is_json and (is_last or wall_s - self._said_s >= LINE_S):
            self._said_s = wall_s
            self.screen.say(self._plain(shot))


def _wall_s() -> float:
    import time

    return time.monotonic()


def _picture_s(wanted: Wanted) -> float:
    """When there is most to see: a second after the last kill or else deed, or at three quarters of the load."""
    kills = [deed.at_s for deed in wanted.deeds if deed.what == "kill"]
    return max(kills or [deed.at_s for deed in wanted.deeds], default=0.75 * wanted.load_s - 1.0) + 1.0


def _announcement(wanted: Wanted, metrics: Any) -> str:
    topology = wanted.topology
    prefill, decode = (sum(1 for _ in rank_names(s, e)) for s, e in (("P", topology.prefill), ("D", topology.decode)))
    servers = topology.prefill.count
    processes = [plural(servers, "bootstrap server"), plural(prefill, "prefill rank"), plural(decode, "decode rank")]
    told = (
        f"{', '.join(processes)}: real processes below pid {os.getpid()}, {wanted.bytes_needed / 2**30:.1f} GiB; "
        f"{plural(len(wanted.arrivals), 'request')} in {wanted.load_s:.0f} s, then about 10 s to the verdict"
    )
    where = "" if metrics is None else f"; metrics at http://127.0.0.1:{metrics.port}/metrics"
    return told + where
