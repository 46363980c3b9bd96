"""Many seeds at once: the worker processes or machines that run them, and the sum of what came of them.

joblib does the work: loky processes on this machine, or a Ray cluster when ``kvpoll[ray]`` is installed. A job is
a picklable function of a seed; what it returns is handed over as soon as it is there, in whatever order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import multiprocessing.resource_tracker
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvpoll.sim.campaign_store import Result
from kvpoll.sim.faults import Fault, kinds
from kvpoll.sim.run import Outcome
from kvpoll.spec.source import BadInput

BACKENDS = ("joblib", "ray")
HOUSE = Path(__file__).parent.parent
CODE = ("sim/*.py", "statemachine/*.py", "spec/**/*.py", "spec/faults.toml")
"""What decides, beside the protocol and the scenario, what a seed does."""

Job = Callable[[int], Result | None]
"""Runs one seed; None when it was interrupted."""


@functools.lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest of the simulator. A result of other code says nothing about this one."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in HOUSE.glob(pattern)):
        found.update(path.relative_to(HOUSE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------- one result


def result_of(seed: int, outcome: Outcome, draw: str) -> Result:
    """What is kept of an outcome."""
    broken = sorted(outcome.violations.items(), key=lambda item: (item[1].t, item[0]))
    invariant, first = broken[0] if broken else (None, None)
    fired = {fault.kind.name: outcome.marks.get(f"fault:{fault.kind.name}", 0) for fault in outcome.faults}
    return Result(
        seed=seed,
        digest=outcome.digest,
        verdict="holds" if outcome.holds else "breaks",
        invariant=invariant,
        node=None if first is None else first.node,
        t=None if first is None else first.t,
        text=None if first is None else first.text,
        counts={name: outcome.counts.get(name, 1) for name, _ in broken},
        draw=draw,
        faults=[_fault_entry(fault) for fault in outcome.faults],
        fired={kind: times for kind, times in fired.items() if times},
        causes=dict(outcome.causes),
        requests=outcome.requests,
        succeeded=outcome.succeeded,
        events=outcome.events,
        simulated_s=outcome.simulated_s,
        seconds=round(outcome.wall_s, 3),
        repeat=outcome.line,
    )


def crash_of(seed: int, error: Exception, faults: Sequence[Fault], draw: str, repeat: str) -> Result:
    """A seed that brought the simulator itself down: kept like any other, so that the rest can go on."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    entries = [_fault_entry(fault) for fault in faults]
    return Result(seed, None, "crashed", None, None, None, text, {}, draw, entries, {}, {}, 0, 0, 0, 0.0, 0.0, repeat)


def _fault_entry(fault: Fault) -> dict[str, Any]:
    return {
        "kind": fault.kind.name,
        "target": fault.target,
        "at_s": fault.at_s,
        "for_s": fault.for_s,
        "parameters": dict(fault.parameters),
    }


# ----------------------------------------------------------------------------------------------------- workers


def check_backend(backend: str) -> None:
    """Is what the backend needs installed? Raises BadInput."""
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise BadInput("--backend ray needs Ray, which is missing: pip install 'kvpoll[ray]'")


def play(job: Job, seeds: Sequence[int], workers: int | None, backend: str) -> Generator[Result, None, None]:
    """Run seeds in parallel and yield each result as soon as it is there. None workers: one for each core.

    An interrupt raises KeyboardInterrupt here and stops the workers, which never see the signal themselves.
    Closing the generator stops them too.
    """
    if not seeds:
        return
    import joblib

    check_backend(backend)
    with _cluster(backend), _loss_explained(backend):
        with joblib.parallel_config(backend="ray" if backend == "ray" else "loky", n_jobs=workers or -1):
            # One seed a task: a longer task would keep finished seeds to itself until its last has ended.
            parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="2 * n_jobs")
        if workers != 1:
            _start_trackers()
        with signals_held():
            results = parallel(joblib.delayed(job)(seed) for seed in seeds)
        try:
            for result in results:
                if result is None:  # one worker is this process, and the run itself has heard Ctrl-C
                    raise KeyboardInterrupt
                yield result
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that what still ran has been cancelled, which is the purpose
                results.close()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Processes and threads started in here never see SIGINT; one that comes meanwhile is delivered afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_trackers() -> None:
    """Start the processes that watch over semaphores and folders. Starting one lets SIGINT through again, so it must
    not happen between `signals_held` and the first worker."""
    from joblib.externals.loky.backend import resource_tracker

    multiprocessing.resource_tracker.ensure_running()
    resource_tracker.ensure_running()


@contextlib.contextmanager
def _loss_explained(backend: str) -> Iterator[None]:
    """A worker that was killed (mostly for its memory) is no defect of kvpoll."""
    if backend == "ray":
        yield
        return
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    try:
        yield
    except TerminatedWorkerError:
        raise BadInput(
            "a worker process was killed from outside (out of memory?): use fewer --workers; "
            "what had ended is in the store, and the same command goes on"
        ) from None


@contextlib.contextmanager
def _cluster(backend: str) -> Iterator[None]:
    """The Ray cluster to work on: the one that RAY_ADDRESS names or that runs here, else one of this machine."""
    if backend != "ray":
        yield
        return
    import joblib
    import ray
    from ray.util.joblib import register_ray
    from ray.util.joblib.ray_backend import RayBackend

    class Streaming(RayBackend):  # type: ignore[misc]
        """joblib forbids generators for what derives from its multiprocessing pool, which deadlocks when a
        generator is dropped. Ray's pool, put in its place, hands over each result and ends at once."""

        supports_return_generator = True

    register_ray()
    joblib.register_parallel_backend("ray", Streaming)
    started = not ray.is_initialized()
    if started:
        with signals_held():
            ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        if started:
            ray.shutdown()


# -------------------------------------------------------------------------------------------------- the summary


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """What a campaign says: by invariant, by first cause of failure, by kind of fault; the frequent first."""
    verdicts = Counter(result.verdict for result in results)
    faults = by_fault(results)
    return {
        "seeds": len(results),
        "hold": verdicts["holds"],
        "broken": verdicts["breaks"],
        "crashed": verdicts["crashed"],
        "by_invariant": by_invariant(results),
        "crashes": [
            {"seed": result.seed, "text": result.text, "repeat": result.repeat}
            for result in results
            if result.verdict == "crashed"
        ],
        "by_first_cause": by_first_cause(results),
        "by_fault": faults,
        "never_fired": [entry["kind"] for entry in faults if entry["drawn"] and not entry["fired"]],
        "never_drawn": [entry["kind"] for entry in faults if not entry["drawn"]],
        "requests": sum(result.requests for result in results),
        "succeeded": sum(result.succeeded for result in results),
        "events": sum(result.events for result in results),
        "simulated_s": sum(result.simulated_s for result in results),
        "seconds": round(sum(result.seconds for result in results), 3),
    }


def by_invariant(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each broken invariant: in how many runs, in how many of them first, how often, and the first seed."""
    found = []
    for name in sorted({name for result in results for name in result.counts}):
        runs = [result for result in results if name in result.counts]
        first = min(runs, key=lambda result: result.seed)
        found.append(
            {
                "invariant": name,
                "runs": len(runs),
                "first_in": sum(result.invariant == name for result in runs),
                "times": sum(result.counts[name] for result in runs),
                "first_seed": first.seed,
                "repeat": first.repeat,
            }
        )
    return sorted(found, key=lambda entry: (-entry["runs"], entry["invariant"]))


def by_first_cause(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each first cause of failure: requests, and runs that have such."""
    requests: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for result in results:
        requests.update(result.causes)
        runs.update(result.causes.keys())
    found = [{"cause": cause, "requests": number, "runs": runs[cause]} for cause, number in requests.items()]
    return sorted(found, key=lambda entry: (-int(str(entry["requests"])), str(entry["cause"])))


def by_fault(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each kind: how many runs drew it, in how many it really did something, how many broke with and without it.

    A kind with which runs break far more often than without is the one to look at.
    """
    present = [({entry["kind"] for entry in result.faults}, result) for result in results]
    found = []
    for kind in kinds():
        with_it = [result for drawn, result in present if kind in drawn]
        broken = sum(result.verdict == "breaks" for result in with_it)
        found.append(
            {
                "kind": kind,
                "drawn": len(with_it),
                "fired": sum(kind in result.fired for result in with_it),
                "broken_with": broken,
                "broken_without": sum(result.verdict == "breaks" for result in results) - broken,
            }
        )
    return found
