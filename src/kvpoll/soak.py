"""The soak: requests without end through real processes that are aborted, stopped and killed, judged as it runs.

    kvpoll bench soak [--requests 100000] [--seed 0]

Two prefill engines, each with a bootstrap server of its own, and two decode engines, all processes of their own. The
first of each kind lives from beginning to end, is stopped now and then, and shows whether memory is flat; the second
is killed again and again and comes back in a new life. Every byte is compared on arrival. What is judged: every
invariant on the merged traces while they are written, those that an endpoint can judge alone in monitored mode,
every byte, after the last request that a few more succeed now that the faults are over, and that nothing is left.
Ctrl-C ends it early, with a verdict.

Ranks tell each other of every failure. The router tells them only what they may be unable to know: that a process was
killed, which its broken connection says (``--router-tells failures`` has it abort the other leg of any failure).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvpoll.commands.options import Parser, counted
from kvpoll.commands.status import HOLDS, VIOLATED
from kvpoll.soak_process import fate
from kvpoll.soak_verdict import check_path, verdict, write
from kvpoll.spec.invariants import PAUSE
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import Admitted, FaultBegan, FaultEnded, Healed, NodeStopped, Resulted, Surveyed, encode

ROUTER: Final = "R"
OUTAGE: Final = "bootstrap_amnesia"
WINDOW: Final = 96
REUSED_SHARE: Final = 0.05
FAULT_EVERY_S: Final = (1.0, 4.0)
STALL_S: Final = (0.3, 4.0)
TELL_S: Final = 0.3
"""So long the router waits before it gives up the other leg. Routers do so at once; this one lets ranks go first."""

PROBES: Final = 16
"""So many requests come when the faults are over; nobody gives them up, and each must succeed (L4)."""

DOWN_S: Final = (0.2, 2.0)
QUIET_LIMIT_S: Final = 150.0
TOLD_S: Final = 5.0
READY_S: Final = 60.0

RULES: Final = {
    "bootstrap_timeout_s": 25, "waiting_timeout_s": 25, "admission_timeout_s": 12, "announced_timeout_s": 30,
    "tombstone_timeout_s": 35, "decode_tombstone_timeout_s": 5, "drain_timeout_s": 3, "register_slow_retry_s": 5,
    "heartbeat_interval_s": 1,
}  # fmt: skip
"""The deadlines of ``reference`` in their order, shorter, so that a soak sees each of them many times."""

END_S: Final = 80.0
"""L1's bound for these: the longest chain of deadlines, with a stop of 4 s and room for a slow machine."""


class Plan(NamedTuple):
    """What is asked for. faults: are processes stopped and killed? router_tells: does the router abort the other leg
    after any failure ("failures"), or only after a process was killed ("deaths")?
    """

    requests: int
    seed: int
    faults: bool = True
    router_tells: str = "deaths"


class Member:
    """One process of the cluster, over all its lives."""

    def __init__(self, name: str, kind: str, config: dict[str, Any]) -> None:
        self.name, self.kind, self.config = name, kind, config
        self.process: Any = None
        self.state = "down"
        self.node = ""
        self.epoch = 0
        self.lives = 0
        self.pipe = ""
        self.stats: dict[str, Any] = {}
        self.survey: dict[str, int] | None = None
        self.gauges: dict[str, float] = {}
        self.total: Counter[str] = Counter()
        self.first_stats: dict[str, Any] = {}
        self._orders: list[dict[str, Any]] = []

    def tell(self, **order: Any) -> None:
        """Write it an order. One that has ended takes none."""
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def bury(self) -> None:
        """This life is over; what it has counted stays."""
        self.total.update(self.stats.get("counts", {}))
        self.stats = {}


class Soak:
    """The coordinator: routes requests, does the faults, keeps the books."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.chance = random.Random(plan.seed)
        self.selector = selectors.DefaultSelector()
        self.origin = time.monotonic()
        ports = [_free_port() for _ in range(2)]
        self.addresses = [f"127.0.0.1:{port}" for port in ports]
        self.members = [
            *(Member(f"bootstrap{i}", "server", {"port": ports[i]}) for i in range(2)),
            *(Member(f"prefill{i}", "prefill", {"bootstrap": self.addresses[i]}) for i in range(2)),
            *(Member(f"decode{i}", "decode", {"name": f"decode{i}"}) for i in range(2)),
        ]
        self.by_name = {member.name: member for member in self.members}
        self.owing: dict[tuple[int, int], set[str]] = {}
        self.outcomes: Counter[str] = Counter()
        self.faults: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.verdict_of_judge: dict[str, Any] = {}
        self.admitted = self.over = 0
        self.interrupted = False
        self.unexpected: list[str] = []
        self._reusable: deque[tuple[int, int]] = deque(maxlen=1000)
        self._due: list[tuple[float, str, Member, dict[str, Any]]] = []
        self._untold: deque[tuple[float, str, tuple[int, int], str]] = deque()
        self.told_by_router: Counter[str] = Counter()
        self.probed: Counter[str] = Counter()
        self.is_healed = False
        self._probes: set[tuple[int, int]] = set()
        self._unanswered: set[tuple[int, int]] = set()
        self._outages: dict[str, str] = {}
        self._room = 0
        self._results: dict[tuple[int, int], dict[str, str]] = {}
        self._sent: dict[str, list[Any]] = {member.name: [] for member in self.members}

    # -- processes

    def start(self) -> None:
        """Judge first, then everybody else. Raises RuntimeError when one does not come up."""
        bounds = load().bounds._replace(end_s=END_S)
        self.judge = _spawn("kvpoll.soak_judge", json.dumps(bounds))
        self._listen(self.judge, None)
        for member in self.members:
            self.launch(member)
            self.wait(lambda member=member: member.state == "up", READY_S, f"{member.name} did not start")

    def launch(self, member: Member) -> None:
        """Begin a life of a process."""
        member.lives += 1
        member.epoch = member.lives
        if member.kind == "server":
            member.process = _spawn("kvpoll.soak_process", "server", str(member.config["port"]))
        else:
            member.pipe = str(self.folder / f"{member.name}.{member.lives}")
            os.mkfifo(member.pipe)
            self.tell_judge(watch=member.pipe)
            more = {"epoch": member.epoch, "rules": RULES, "trace": member.pipe, "seed": self.plan.seed}
            member.process = _spawn("kvpoll.soak_process", member.kind, json.dumps(member.config | more))
        member.state = "starting"
        self._listen(member.process, member)

    def kill(self, member: Member) -> None:
        """SIGKILL, and the proof of its end."""
        if member.state == "stopped":
            member.process.send_signal(signal.SIGCONT)
        member.process.kill()
        self._ended(member)

    def _ended(self, member: Member) -> None:
        member.process.wait()
        self.selector.unregister(member.process.stdout)
        for stream in (member.process.stdin, member.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        member.state = "down"
        member.bury()
        if member.kind != "server":
            self.tell_judge(close=member.pipe)
            if member.node:
                self.emit(NodeStopped(time.monotonic(), member.node, member.epoch))
        for pair in [pair for pair, names in self.owing.items() if member.name in names]:
            self.settle(pair, member.name, "killed")

    def _listen(self, process: Any, member: Member | None) -> None:
        os.set_blocking(process.stdout.fileno(), False)
        self.selector.register(process.stdout, selectors.EVENT_READ, (member, bytearray()))

    def tell_judge(self, **order: Any) -> None:
        """Write the judge an order."""
        with contextlib.suppress(BrokenPipeError):
            self.judge.stdin.write(json.dumps(order).encode() + b"\n")
            self.judge.stdin.flush()

    def emit(self, event: Any) -> None:
        """Tell the judge what only the coordinator knows. Times are of the monotonic clock."""
        self.tell_judge(event=encode(event))

    # -- what they say

    def turn(self, limit_s: float = 0.02) -> None:
        """Hear everybody, and do what is due."""
        for key, _ in self.selector.select(limit_s):
            member, kept = key.data
            data = key.fileobj.read(1 << 18)  # type: ignore[union-attr]
            if data == b"":
                self._hung_up(member)
                continue
            *lines, rest = (kept + (data or b"")).split(b"\n")
            kept[:] = rest
            for line in lines:
                self._hear(member, json.loads(line))
        now = time.monotonic()
        for due in [due for due in self._due if due[0] <= now]:
            self._due.remove(due)
            self._undo(*due[1:])
        while self._untold and self._untold[0][0] <= now:
            _, name, pair, why = self._untold.popleft()
            if name in self.owing.get(pair, ()):
                self.told_by_router[why] += 1
                self.by_name[name].tell(abort=[pair])

    def _hung_up(self, member: Member | None) -> None:
        if member is None:
            raise RuntimeError("the judge has ended; run it alone to see why: python -m kvpoll.soak_judge")
        self.unexpected.append(f"{member.name} ended by itself with {member.process.wait()}")
        self._ended(member)

    def _hear(self, member: Member | None, said: dict[str, Any]) -> None:
        if member is None:
            self.verdict_of_judge = said
        elif "ready" in said:
            member.node, member.state = said["ready"], "up"
            if member.kind != "server":
                self.tell_judge(origin=[member.pipe, said["origin"]])
        else:
            member.stats = said.get("stats", member.stats)
            if member.stats and not member.first_stats:
                member.first_stats = member.stats
            member.survey = said.get("survey", member.survey)
            member.gauges = said.get("gauges", member.gauges)
            if said.get("listed") and member.name in self._outages:
                self.emit(FaultEnded(time.monotonic(), member.node, self._outages.pop(member.name), OUTAGE))
            for room, attempt, cause in said.get("failed", ()):
                self.answer((room, attempt), cause)
                self.expect_end((room, attempt), member.name, "failed")
            for room, attempt, outcome in said.get("over", ()):
                self.settle((room, attempt), member.name, outcome)

    def settle(self, pair: tuple[int, int], name: str, outcome: str) -> None:
        """One side is through with a request; when both are, the request is over."""
        names = self.owing.get(pair)
        if names is None or name not in names:
            return
        names.discard(name)
        self._results.setdefault(pair, {})[name] = outcome
        if outcome != "ok":
            self.answer(pair, "engine_crashed" if outcome == "killed" else outcome)
        elif name.startswith("decode"):
            self.answer(pair, None)
        if names:
            if outcome == "killed":
                self.expect_end(pair, name, outcome)
            return
        del self.owing[pair]
        told = set(self._results.pop(pair).values())
        worst = sorted(told - {"ok"}, key=lambda outcome: (outcome != "corrupt", outcome))
        if pair in self._probes:
            self.probed[worst[0] if worst else "ok"] += 1
            return
        self.over += 1
        self.outcomes[worst[0] if worst else "ok"] += 1
        self._reusable.append(pair)

    def answer(self, pair: tuple[int, int], cause: str | None) -> None:
        """The client has its answer: decode's success, or the first failure of a side."""
        if pair in self._unanswered:
            self._unanswered.discard(pair)
            rid = f"{pair[0]}/{pair[1]}"
            self.emit(Resulted(time.monotonic(), ROUTER, rid, pair, cause is None, cause, None))

    def expect_end(self, pair: tuple[int, int], name: str, why: str) -> None:
        """One side has failed or was killed: unless the other ends soon, the router tells it, if it tells this."""
        if why == "killed" or self.plan.router_tells == "failures":
            for other in self.owing.get(pair, set()) - {name}:
                self._untold.append((time.monotonic() + TELL_S, other, pair, why))

    # -- requests

    def route(self) -> None:
        """Admit as many requests as the window has room for."""
        up = [[each for each in self.members if each.kind == side and each.state in ("up", "stopped")]
              for side in ("prefill", "decode")]  # fmt: skip
        while len(self.owing) < WINDOW and self.admitted < self.plan.requests and all(up):
            self.admitted += 1
            self._admit(self._pair(), *map(self.chance.choice, up))
        self._send()

    def _admit(self, pair: tuple[int, int], prefill: Member, decode: Member) -> None:
        self.owing[pair] = {prefill.name, decode.name}
        self._unanswered.add(pair)
        nodes = ((prefill.node,), (decode.node,))
        self.emit(Admitted(time.monotonic(), ROUTER, f"{pair[0]}/{pair[1]}", pair, *nodes))
        for member in (prefill, decode):
            self._sent[member.name].append([*pair, prefill.config["bootstrap"]])

    def _send(self) -> None:
        for name, requests in self._sent.items():
            if requests:
                self.by_name[name].tell(admit=requests)
                requests.clear()

    def _pair(self) -> tuple[int, int]:
        """A new room number, or an old one with the next attempt."""
        if self._reusable and self.chance.random() < REUSED_SHARE:
            room, attempt = self._reusable.popleft()
            return room, attempt + 1
        self._room += 1
        return self._room, 0

    def probe(self) -> None:
        """The faults are over: from here on every request must succeed (L4). All pairs of engines get some."""
        self.is_healed = True
        self.emit(Healed(time.monotonic(), ROUTER))
        sides = [[each for each in self.members if each.kind == side] for side in ("prefill", "decode")]
        for number in range(PROBES):
            self._room += 1
            while any(fate(self.plan.seed, self._room, 0)[:3]):
                self._room += 1
            self._probes.add((self._room, 0))
            self._admit((self._room, 0), sides[0][number % 2], sides[1][number // 2 % 2])
        self._send()

    # -- faults

    def strike(self) -> None:
        """One fault, drawn. The first member of each kind is never killed."""
        kind = self.chance.choice(("server", "prefill", "decode"))
        deed = self.chance.choice(("kill", "stop"))
        spared = "0" if deed == "kill" else ""
        candidates = [
            each for each in self.members
            if each.kind == kind and each.state == "up" and (not spared or not each.name.endswith(spared))
        ]  # fmt: skip
        if not candidates:
            return
        member = self.chance.choice(candidates)
        now = time.monotonic()
        fault: dict[str, Any] = {
            "id": f"f{len(self.faults)}",
            "deed": deed,
            "whom": member.name,
            "at_s": round(now - self.origin, 2),
        }
        self.faults.append(fault)
        if deed == "kill":
            if kind == "server":  # until a rank is in its table again, nobody finds the way to that engine
                self._outages[member.name] = fault["id"]
                self.emit(FaultBegan(now, member.node, fault["id"], OUTAGE, (member.node,)))
            self.kill(member)
            self._due.append((now + self.chance.uniform(*DOWN_S), "launch", member, fault))
            return
        self.emit(FaultBegan(now, member.node, fault["id"], PAUSE, (member.node,)))
        member.process.send_signal(signal.SIGSTOP)
        member.state = "stopped"
        self._due.append((now + self.chance.uniform(*STALL_S), "continue", member, fault))

    def _undo(self, what: str, member: Member, fault: dict[str, Any]) -> None:
        fault["for_s"] = round(time.monotonic() - self.origin - fault["at_s"], 2)
        if what == "launch":
            self.launch(member)
        elif member.state == "stopped":
            member.process.send_signal(signal.SIGCONT)
            member.state = "up"
            self.emit(FaultEnded(time.monotonic(), member.node, fault["id"], PAUSE))

    # -- the run

    def run(self, tell: Any) -> None:
        """All requests, then the quiet. ``tell`` hears a line now and then."""
        self.start()
        self._healthy()
        self.loaded = time.monotonic()
        strike_s, told_s = self.loaded + 3.0, self.loaded
        while self.over < self.plan.requests and not self.interrupted:
            self.route()
            self.turn()
            now = time.monotonic()
            if self.plan.faults and now >= strike_s and self.admitted < self.plan.requests:
                self.strike()
                strike_s = now + self.chance.uniform(*FAULT_EVERY_S)
            if now - told_s >= 1.0:
                self.sample(now)
                if len(self.samples) % int(TOLD_S) == 0:
                    tell(self.line())
                told_s = now
        self.traffic_s = time.monotonic() - self.loaded
        tell(f"{self.line()}; quiet now, until every table is empty")
        self.heal()

    def _healthy(self) -> None:
        """Prefill is registered when its first request gets through; waiting here keeps the first ones short."""
        self.wait(lambda: all(member.stats for member in self.members), READY_S, "a process says nothing")

    def sample(self, now: float) -> None:
        """What everything weighs now."""
        weights = {m.name: [m.stats[key] for key in ("rss", "fds", "threads")] for m in self.members if m.stats}
        judge = self.verdict_of_judge
        self.samples.append({
            "t_s": round(now - self.origin, 2), "over": self.over, "processes": weights,
            "rooms": {m.name: m.stats["rooms"] for m in self.members if "rooms" in m.stats},
            "judge": [judge.get(key, 0) for key in ("rss", "judged", "waiting")],
        })  # fmt: skip

    def line(self) -> str:
        """Progress in one line."""
        judged = self.verdict_of_judge.get("judged", 0)
        broken = self.verdict_of_judge.get("counts", {})
        rate = self.over / max(1e-9, time.monotonic() - self.loaded)
        first = (self.verdict_of_judge.get("violated") or [""])[0]
        found = f"violated: {broken}, the first {first}" if broken else "nothing violated"
        return (
            f"{self.over:,} of {self.plan.requests:,} over ({rate:,.0f}/s, {self.outcomes['ok']:,} ok), "
            f"{len(self.faults)} faults, {judged:,} events judged, {found}"
        )

    def heal(self) -> None:
        """No more requests or faults: everybody is up and idle until nothing is left, or the limit is over."""
        end_s = time.monotonic() + QUIET_LIMIT_S
        sampled_s = asked_s = 0.0
        self.interrupted = False  # the next Ctrl-C ends the quiet, too
        while time.monotonic() < end_s and not self.interrupted:
            self.turn()
            now = time.monotonic()
            if now - sampled_s >= 1.0:
                sampled_s = now
                self.sample(now)
            if now - asked_s < 2.0:
                continue
            asked_s = now
            is_calm = not self.owing and all(member.state == "up" for member in self.members)
            if is_calm and self.is_healed and self.is_empty():
                break
            if is_calm and not self.is_healed:
                self.probe()
                for member in self.members:
                    member.survey = None
            for member in self.members:
                member.tell(survey=True)
        for member in self.members:
            if member.survey:
                tables = tuple((name, count) for name, count in member.survey.items() if name != "overdue")
                gauges = tuple(member.gauges.items())
                self.emit(Surveyed(time.monotonic(), member.node, tables, gauges, member.survey["overdue"]))
        self.tell_judge(finish=True)
        with contextlib.suppress(RuntimeError):
            self.wait(lambda: "finished" in self.verdict_of_judge, QUIET_LIMIT_S, "the judge did not finish")

    def is_empty(self) -> bool:
        """Has every process said that nothing is left?"""
        return all(member.survey is not None and not any(member.survey.values()) for member in self.members)

    def wait(self, holds: Any, limit_s: float, complaint: str) -> None:
        """Turn until it holds. Raises RuntimeError when it does not in time."""
        end_s = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > end_s:
                raise RuntimeError(complaint)
            self.turn()

    def close(self) -> None:
        """End every process, the hard way where it must be."""
        processes = [member.process for member in self.members if member.process is not None]
        for process in [*processes, *([self.judge] if hasattr(self, "judge") else [])]:
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGCONT)
                process.stdin.close()
        for process in [*processes, *([self.judge] if hasattr(self, "judge") else [])]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self.selector.close()


def _spawn(module: str, *words: str) -> Any:
    # In a session of its own: Ctrl-C is the coordinator's to hear, which then asks for a verdict.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[Soak]:
    """A soak whose processes are gone afterwards; Ctrl-C asks it to come to a verdict."""
    with tempfile.TemporaryDirectory(prefix="kvpoll-soak-") as folder:
        soak = Soak(plan, Path(folder))

        def interrupt(number: int, frame: Any) -> None:
            soak.interrupted = True

        former = signal.signal(signal.SIGINT, interrupt)
        try:
            yield soak
        finally:
            signal.signal(signal.SIGINT, former)
            soak.close()


def main(argv: list[str]) -> int:
    """Run a soak, print a verdict in one line, write the figures. Raises BadInput; returns the exit status."""
    given = _parser().parse_args(argv)
    for path in filter(None, (given.out, given.figure)):
        check_path(path, given.figure)
    with running(Plan(given.requests, given.seed, not given.no_faults, given.router_tells)) as soak:
        soak.run(lambda line: print(line, file=sys.stderr, flush=True))
        found = verdict(soak)
    write(found, given.out, given.figure)
    print(found["line"])
    print(f"had nothing to judge: {', '.join(found['judge']['idle']) or 'none'}")
    for problem in found["problems"]:
        print(f"  {problem}")
    return HOLDS if found["holds"] else VIOLATED


def _parser() -> Parser:
    parser = Parser(prog="kvpoll bench soak", description="Real processes under aborts, stops and kills, and judged.")
    parser.add_argument("--requests", type=counted, default=100_000, metavar="N", help="how many requests (100,000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws aborts, faults and routes (0)")
    parser.add_argument("--no-faults", action="store_true", help="aborts only: no process is stopped or killed")
    parser.add_argument(
        "--router-tells", choices=("deaths", "failures"), default="deaths",
        help="what the router tells the other side: that a process was killed (deaths), or of every failure",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write the figures to FILE, as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw memory, rate and faults over time (.png, .svg, .pdf)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
