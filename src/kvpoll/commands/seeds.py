"""Many seeds of one plan, in several processes; every finished seed is on disk before the next is awaited.

Ctrl-C stops the workers within moments and exits with 130; the same command with the same --out goes on where
it stopped. Workers never see the signal: this process decides, and tells them through an event.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import IO, Any

from kvpoll.commands.plan import Plan, Prepared, draw_digest, prepare
from kvpoll.commands.screen import Screen, plural, seconds
from kvpoll.commands.status import HOLDS, INTERRUPTED, VIOLATED
from kvpoll.commands.verdict import by_count, percentiles, violation_objects
from kvpoll.spec.source import BadInput

RESULTS = "results.jsonl"
Record = dict[str, Any]
Done = Callable[[Record], None]


def act(plan: Plan, arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the seeds that are missing, print a line for each, then the sum of all."""
    prepared = prepare(plan)
    wanted = range(arguments.seed, arguments.seed + arguments.seeds)
    with contextlib.ExitStack() as stack:
        results = Results(None if arguments.out is None else Path(arguments.out), prepared.identity, stack)
        missing = [seed for seed in wanted if seed not in results.records]
        if len(missing) < len(wanted) and not arguments.json:
            screen.say(f"{plural(len(wanted) - len(missing), 'seed')} already in {results.path}")
        told = Told(screen, missing, quiet=arguments.json)
        advance = stack.enter_context(screen.progress(plan.scenario, " seeds"))
        advance(len(wanted) - len(missing), len(wanted))

        def done(record: Record) -> None:
            results.append(record)
            told.tell(record)
            advance(len(results.of(wanted)), len(wanted))

        interrupted = not play(plan, missing, _jobs(arguments.jobs, missing), done)
    told.tell_rest()
    more = ["--seeds", str(arguments.seeds)] + ([] if arguments.out is None else ["--out", arguments.out])
    records = results.of(wanted)
    line = _line(records, plan.line(arguments.seed, *more), interrupted)
    if arguments.json:
        screen.json(
            {
                **total(records),
                "wanted": len(wanted),
                "interrupted": interrupted,
                "runs": records,
                "repeat": line,
            }
        )
    else:
        _show(records, len(wanted), interrupted, screen)
        screen.say(line)
    return INTERRUPTED if interrupted else HOLDS if all(record["holds"] for record in records) else VIOLATED


def _jobs(given: int | None, seeds: Sequence[int]) -> int:
    return max(1, min(given or os.cpu_count() or 1, len(seeds)))


def _line(records: Sequence[Record], whole: str, interrupted: bool) -> str:
    """The first seed that broke something; else everything, which also goes on after an interrupt."""
    broken = [record["repeat"] for record in records if not record["holds"]]
    return whole if interrupted or not broken else str(broken[0])


# ---------------------------------------------------------------------------------------------------- on disk


class Results:
    """``results.jsonl``: one finished seed a line. A last line that was cut off by a crash is dropped."""

    def __init__(self, folder: Path | None, identity: str, stack: contextlib.ExitStack) -> None:
        self.identity = identity
        self.records: dict[int, Record] = {}
        self.path = None if folder is None else folder / RESULTS
        self._file: IO[str] | None = None
        if self.path is not None:
            self._file = stack.enter_context(self._open(self.path))

    def _open(self, path: Path) -> IO[str]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            self._read(whole, path)
            if whole != text:
                path.write_text(whole, encoding="utf-8")
            return path.open("a", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is not text"
            raise BadInput(f"{path}: cannot be used for results: {cause}; choose another --out") from None

    def _read(self, text: str, path: Path) -> None:
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                record = json.loads(line)
                seed, identity = record["seed"], record["run"]
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{path}:{number}: not a result of `kvpoll run --seeds`; choose another --out") from None
            if identity != self.identity:
                cause = f"is of another run ({record.get('repeat')}), or spec or scenario have changed since"
                raise BadInput(f"{path}:{number}: this result {cause}; choose another --out")
            self.records[seed] = record

    def append(self, record: Record) -> None:
        """Keep a finished seed, on disk at once."""
        self.records[record["seed"]] = record
        if self._file is not None:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
            self._file.flush()

    def of(self, wanted: range) -> list[Record]:
        """What is known of these seeds, in order."""
        return [self.records[seed] for seed in wanted if seed in self.records]


# ------------------------------------------------------------------------------------------------- in workers

_stop: Any = None


def _begin(stop: Any) -> None:
    global _stop  # the one thing that a worker process must know before its first task
    _stop = stop


@functools.lru_cache(maxsize=1)
def _prepared(plan: Plan) -> Prepared:
    return prepare(plan)


def _one(plan: Plan, seed: int) -> Record | None:
    """Run one seed in a worker; None when it was stopped."""
    prepared = _prepared(plan)
    outcome = prepared.run(seed, progress=_look_up)()
    if outcome.interrupted:
        return None
    kinds = [fault.kind.name for fault in outcome.faults]
    return {
        "seed": seed,
        "draw": draw_digest(outcome.faults),
        "holds": outcome.holds,
        "violations": violation_objects(outcome),
        "requests": outcome.requests,
        "succeeded": outcome.succeeded,
        "failed_by_first_cause": by_count(outcome.causes),
        "ttft_s": percentiles(outcome.ttft_s),
        "fired": [kind for kind in kinds if kind not in outcome.unfired],
        "unfired": list(outcome.unfired),
        "events": outcome.events,
        "simulated_s": outcome.simulated_s,
        "wall_s": round(outcome.wall_s, 3),
        "run": prepared.identity,
        "repeat": outcome.line,
    }  # fmt: skip


def _look_up(done: float, whole: float) -> None:
    """Every ten simulated seconds: has Ctrl-C been pressed? Run then ends as if it had been hit itself."""
    if _stop is not None and _stop.is_set():
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------- in the parent


def play(plan: Plan, seeds: Sequence[int], jobs: int, done: Done) -> bool:
    """Run seeds in ``jobs`` processes and call ``done`` as each ends. False when interrupted."""
    if not seeds:
        return True
    context = multiprocessing.get_context("spawn")  # fork would copy the thread that draws the progress bar
    stop = context.Event()
    executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(stop,))
    futures: list[Future[Record | None]] = []
    told: set[Future[Record | None]] = set()
    try:
        with _signals_held():
            futures += [executor.submit(_one, plan, seed) for seed in seeds]
        for future in as_completed(futures):
            _hand_over(future, told, done)
        return True
    except KeyboardInterrupt:
        stop.set()
        executor.shutdown(cancel_futures=True)
        for future in futures:
            if future not in told and not future.cancelled():
                _hand_over(future, told, done)
        return False
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _hand_over(future: Future[Record | None], told: set[Future[Record | None]], done: Done) -> None:
    record = future.result()
    told.add(future)
    if record is not None:
        done(record)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What is started in here never sees SIGINT; one that comes meanwhile is delivered afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ----------------------------------------------------------------------------------------------- what to show


class Told:
    """Prints a line for each seed, in order of seeds whichever ends first."""

    def __init__(self, screen: Screen, seeds: Sequence[int], quiet: bool) -> None:
        self.screen = screen
        self.waiting = list(reversed(seeds))
        self.early: dict[int, Record] = {}
        self.quiet = quiet

    def tell(self, record: Record) -> None:
        """A seed has ended: print it and those that waited for it."""
        self.early[record["seed"]] = record
        while self.waiting and self.waiting[-1] in self.early:
            self._print(self.early.pop(self.waiting.pop()))

    def tell_rest(self) -> None:
        """After an interrupt: those whose predecessors never ended."""
        for seed in sorted(self.early):
            self._print(self.early[seed])
        self.early.clear()

    def _print(self, record: Record) -> None:
        if self.quiet:
            return
        failed = sum(record["failed_by_first_cause"].values())
        ttft, held = record["ttft_s"], record["holds"]
        broken = "" if held else "  " + " ".join(sorted(record["violations"]))
        self.screen.say(
            f"seed {record['seed']:<6} draw {record['draw']}  {'holds ' if held else 'breaks'}  "
            f"{record['requests']:>6,} requests {failed:>5,} failed  "
            f"TTFT p50 {seconds(ttft['p50']):>8} p99 {seconds(ttft['p99']):>8}{broken}",
            None if held else "red",
        )


def total(records: Sequence[Record]) -> Record:
    """The sum over seeds. TTFT: the median of the seeds' p50, and the worst p99."""
    causes: Counter[str] = Counter()
    fired: Counter[str] = Counter()
    for record in records:
        causes.update(record["failed_by_first_cause"])
        fired.update({*record["fired"]})
        fired.update(dict.fromkeys(record["unfired"], 0))
    middle = [record["ttft_s"]["p50"] for record in records if record["ttft_s"]["p50"] is not None]
    worst = [record["ttft_s"]["p99"] for record in records if record["ttft_s"]["p99"] is not None]
    return {
        "seeds": len(records),
        "hold": sum(record["holds"] for record in records),
        "broken": _broken(records),
        "requests": sum(record["requests"] for record in records),
        "succeeded": sum(record["succeeded"] for record in records),
        "failed_by_first_cause": by_count(dict(causes)),
        "fired_in_seeds": by_count(dict(fired)),
        "ttft_s": {"median_p50": median(middle) if middle else None, "worst_p99": max(worst, default=None)},
        "events": sum(record["events"] for record in records),
        "simulated_s": sum(record["simulated_s"] for record in records),
        "wall_s": round(sum(record["wall_s"] for record in records), 3),
    }  # fmt: skip


def _broken(records: Sequence[Record]) -> dict[str, list[int]]:
    """Invariant -> the seeds that broke it."""
    names = sorted({name for record in records for name in record["violations"]})
    return {name: [record["seed"] for record in records if name in record["violations"]] for name in names}


def _show(records: Sequence[Record], wanted: int, interrupted: bool, screen: Screen) -> None:
    screen.say()
    if interrupted:
        screen.say(f"interrupted: {len(records):,} of {plural(wanted, 'seed')} done", "bold")
    if not records:
        return
    found = total(records)
    _show_coverage(found, screen)
    failed = sum(found["failed_by_first_cause"].values())
    screen.say(f"{found['requests']:,} requests: {found['succeeded']:,} succeeded, {failed:,} failed")
    rows = [[cause, f"{count:,}"] for cause, count in found["failed_by_first_cause"].items()]
    if rows:
        screen.table(["first cause of failure", "requests"], rows, right=["requests"])
    ttft, wall_s = found["ttft_s"], max(found["wall_s"], 1e-3)
    middle, worst = seconds(ttft["median_p50"]), seconds(ttft["worst_p99"])
    screen.say(f"time to first token: median p50 {middle}, worst p99 {worst}")
    per_s, ratio = found["events"] / wall_s, found["simulated_s"] / wall_s
    screen.say(f"{found['events']:,} events, {per_s:,.0f} events/s and {ratio:,.0f} times real time on one core")
    screen.say()
    for name, seeds in found["broken"].items():
        screen.prose(f"{name} broke in {plural(len(seeds), 'seed')}: {', '.join(map(str, seeds))}")
    all_hold = found["hold"] == found["seeds"]
    told = f"every invariant holds in {found['hold']:,} of {plural(found['seeds'], 'seed')}"
    screen.say(told, "green" if all_hold else "red")


def _show_coverage(found: Record, screen: Screen) -> None:
    """How many seeds each kind of fault really fired in: nothing passes because nothing happened."""
    fired = found["fired_in_seeds"]
    if fired:
        rows = [[kind, f"{count:,}"] for kind, count in fired.items()]
        screen.table(["fault", "fired in seeds"], rows, right=["fired in seeds"])
        screen.say()
