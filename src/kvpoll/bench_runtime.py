"""The runtime beside its peers: bytes moved, handshakes made, and what watching them costs.

Every round measures all subjects in turn, and a figure is the median of the rounds. Each subject is a process of its
own, or two, so that none is slowed by what another has loaded. What has no peer here stays open and says why.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

from kvpoll.bench_children import ENGINES_PYTHON, SGLANG_PYTHON, Child, interpreter, lacks, namespace

WORKLOADS: Final = ("64 KiB", "1 MiB")
TRANSFERS: Final = 3
"""Repetitions of a transfer in one round, after two that warm it up."""

ENGINES: Final = {"mooncake": "mooncake.engine", "nixl": "nixl_cu12._api"}
"""Peers of tcp, and what must be importable for them. Both use TCP here."""

SGLANG: Final = "sglang.srt"
WINDOWS: Final = {32: 3000, 1: 500}
"""Requests at once -> requests of a round."""

ARRANGEMENTS: Final = ("one process", "two processes")
VARIANTS: Final = ("plain", "monitored", "traced")
VARIED: Final = 2000
SHARE_OF_MEMCPY, TIMES_ENGINES, TIMES_SGLANG = 0.8, 1.5, 5.0
"""The bars."""

Result = dict[str, Any]
Tell = Callable[[str], None]
Reached = Callable[[str, bool], str]


def measure(rounds: int, tell: Tell) -> Result:
    """All figures of the runtime. Raises ChildFailed when a process that is there does not do what it is told."""
    began = os.getloadavg()[0]
    transfers, missing = _measure_transfers(rounds, tell)
    handshakes, lonely = _measure_handshakes(rounds, tell)
    costs = _measure_costs(rounds, tell)
    return {
        "transfers": transfers,
        "handshakes": handshakes,
        "costs": costs,
        "cuda": _cuda(),
        "open": {**missing, **lonely},
        "load": [round(began, 1), round(os.getloadavg()[0], 1)],
    }


def is_complete(found: Result) -> bool:
    """Was every peer there? CUDA is another machine's matter and does not count."""
    return not found["open"]


def _cuda() -> str:
    if not Path("/dev/nvidiactl").exists():
        return "open: no GPU here"
    return "open: measured by python -m kvpoll.runtime.transports.cuda_ipc_measure, where a GPU is at hand"


# -- bytes


def _measure_transfers(rounds: int, tell: Tell) -> tuple[Result, dict[str, str]]:
    """GB/s of each kind under each workload, and of memcpy beside shm; and what could not be measured, and why."""
    python, before = interpreter(ENGINES_PYTHON), namespace()
    missing = {kind: why for kind, module in ENGINES.items() if (why := _lack(kind, python, module, before))}
    kinds = ["shm", "tcp", *(kind for kind in ENGINES if kind not in missing)]
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in WORKLOADS}
    for number in range(rounds):
        for name in WORKLOADS:
            for kind in kinds:
                tell(f"{kind}, pages of {name}, round {number + 1} of {rounds}")
                words = ("-m", "kvpoll.bench_transfers", kind, name, str(TRANSFERS))
                where = {"python": python} if kind in ENGINES else {}
                with Child(*words, before=before, **where) as child:
                    answer = child.hear()
                speeds[name].setdefault(kind, []).append(answer["gb_per_s"])
                if kind == "shm":
                    share = answer["gb_per_s"] / answer["memcpy_gb_per_s"]
                    speeds[name].setdefault("memcpy", []).append(answer["memcpy_gb_per_s"])
                    speeds[name].setdefault("shm share of memcpy", []).append(share)
    found = {name: {kind: _figure(values) for kind, values in kinds.items()} for name, kinds in speeds.items()}
    return found, missing


def _lack(kind: str, python: str, module: str, before: tuple[str, ...]) -> str | None:
    if kind == "mooncake" and not before:
        return "it listens on every interface, and no network namespace can be made here (unshare -rn)"
    why = lacks(python, module)
    return None if why is None else f"{why}; name an interpreter that has it with {ENGINES_PYTHON}"


# -- handshakes


def _measure_handshakes(rounds: int, tell: Tell) -> tuple[Result, dict[str, str]]:
    """Handshakes a second and their latency, by arrangement, window and whose they are."""
    python = interpreter(SGLANG_PYTHON)
    why = lacks(python, SGLANG)
    with ExitStack() as stack:
        subjects = {("kvpoll", arrangement): _ours(stack, arrangement) for arrangement in ARRANGEMENTS}
        if why is None:
            subjects |= {("sglang", arrangement): _theirs(stack, arrangement, python) for arrangement in ARRANGEMENTS}
        taken: dict[str, Result] = {arrangement: {} for arrangement in ARRANGEMENTS}
        first = 1
        for number in range(-1, rounds):  # the first round warms up and counts for nothing
            for window, requests in WINDOWS.items():
                for (whose, arrangement), children in subjects.items():
                    tell(f"handshakes of {whose}, {arrangement}, {window} at once, round {number + 1} of {rounds}")
                    answer = _drive(children, first, requests, window)
                    first += requests
                    if number >= 0:
                        taken[arrangement].setdefault(str(window), {}).setdefault(whose, []).append(answer)
    found = {
        arrangement: {
            window: {whose: _middle(answers) for whose, answers in subjects.items()}
            for window, subjects in windows.items()
        }
        for arrangement, windows in taken.items()
    }
    mend = f"name an interpreter that has SGLang 0.5.23 with {SGLANG_PYTHON}"
    return found, {} if why is None else {"sglang": f"{why}; {mend}"}


def _ours(stack: ExitStack, arrangement: str, settings: str = "{}") -> list[Child]:
    return _pair(stack, arrangement, ("-m", "kvpoll.bench_handshakes"), (settings,), {})


def _theirs(stack: ExitStack, arrangement: str, python: str) -> list[Child]:
    script = str(Path(__file__).with_name("bench_sglang.py"))
    return _pair(stack, arrangement, (script,), (), {"python": python})


def _pair(
    stack: ExitStack, arrangement: str, words: tuple[str, ...], more: tuple[str, ...], where: dict[str, str]
) -> list[Child]:
    """The process or the two that make handshakes, ready."""
    if arrangement == "one process":
        both = stack.enter_context(Child(*words, "both", "", *more, **where))
        both.hear()
        return [both]
    prefill = stack.enter_context(Child(*words, "prefill", "", *more, **where))
    address = prefill.hear()["ready"]
    decode = stack.enter_context(Child(*words, "decode", address, *more, **where))
    decode.hear()
    return [prefill, decode]


def _drive(children: list[Child], first: int, requests: int, window: int) -> dict[str, float]:
    """One round: handshakes a second until both sides are through, and decode's latencies."""
    for child in children:
        child.tell({"first": first, "requests": requests, "window": window})
    answers = [child.hear() for child in children]
    latency_s = sorted(answers[-1]["latency_s"])
    return {
        "per_s": requests / max(answer["wall_s"] for answer in answers),
        "p50_ms": 1e3 * latency_s[len(latency_s) // 2],
        "p99_ms": 1e3 * latency_s[len(latency_s) * 99 // 100],
    }


def _middle(answers: list[dict[str, float]]) -> dict[str, float]:
    return {name: _figure([answer[name] for answer in answers]) for name in answers[0]}


def _measure_costs(rounds: int, tell: Tell) -> Result:
    """Handshakes a second of one process: as it is, with every invariant judged as it happens, and recorded."""
    speeds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = {"plain": "{}", "monitored": '{"monitored": true}', "traced": f'{{"trace": "{folder}"}}'}
        subjects = {variant: _ours(stack, "one process", settings[variant]) for variant in VARIANTS}
        first = 1
        for number in range(-1, rounds):
            for variant, children in subjects.items():
                tell(f"handshakes {variant}, round {number + 1} of {rounds}")
                answer = _drive(children, first, VARIED, 32)
                first += VARIED
                if number >= 0:
                    speeds[variant].append(answer["per_s"])
    return {variant: _figure(values) for variant, values in speeds.items()}


def _figure(values: list[float]) -> float:
    """The median, to four significant digits: the rest is noise."""
    return float(f"{median(values):.4g}")


# -- showing


def table(found: Result, reached: Reached) -> Iterator[tuple[str, ...]]:
    """The rows of the table: (what, figure, bar, beside)."""
    for name, speeds in found["transfers"].items():
        yield from _transfer_rows(name, speeds, found["open"], reached)
    for arrangement, windows in found["handshakes"].items():
        for window, subjects in windows.items():
            yield from _handshake_rows(arrangement, int(window), subjects, reached)
    if "sglang" in found["open"]:
        yield "handshakes of SGLang", "open", f"{TIMES_SGLANG:g}x SGLang: open", found["open"]["sglang"]
    plain = found["costs"]["plain"]
    for variant, speed in found["costs"].items():
        if variant != "plain":
            yield f"handshakes, {variant}", f"{speed:,.0f}/s", "", f"{speed / plain:.2f}x the speed of plain ones"
    yield "cuda_ipc", "open", "0.8 of device copy: open", found["cuda"].removeprefix("open: ")


def _transfer_rows(name: str, speeds: Result, missing: dict[str, str], reached: Reached) -> Iterator[tuple[str, ...]]:
    share = speeds["shm share of memcpy"]
    bar = reached(f"{SHARE_OF_MEMCPY:g} of memcpy", share >= SHARE_OF_MEMCPY)
    beside = f"memcpy {speeds['memcpy']:.1f} GB/s; shm has {share:.2f} of it"
    yield f"shm, pages of {name}", f"{speeds['shm']:.1f} GB/s", bar, beside
    ours = speeds["tcp"]
    peers = {kind: speeds[kind] for kind in ENGINES if kind in speeds}
    wanted = f"{TIMES_ENGINES:g}x Mooncake and NIXL"
    holds = all(ours >= TIMES_ENGINES * speed for speed in peers.values())
    is_open = holds and any(kind in missing for kind in ENGINES)
    yield f"tcp, pages of {name}", f"{ours:.1f} GB/s", f"{wanted}: open" if is_open else reached(wanted, holds), ""
    for kind in ENGINES:
        if kind in peers:
            yield f"{kind} over tcp, {name}", f"{peers[kind]:.1f} GB/s", "", f"tcp has {ours / peers[kind]:.2f}x"
        else:
            yield f"{kind} over tcp, {name}", "open", "", missing[kind]


def _handshake_rows(arrangement: str, window: int, subjects: Result, reached: Reached) -> Iterator[tuple[str, ...]]:
    ours, theirs = subjects["kvpoll"], subjects.get("sglang")
    how = f"{arrangement}, {window} at once" if window > 1 else f"{arrangement}, one at a time"
    bar = ""
    if theirs is not None:
        ratio = ours["per_s"] / theirs["per_s"]
        bar = reached(f"{TIMES_SGLANG:g}x SGLang", ratio >= TIMES_SGLANG)
    yield f"handshakes, {how}", f"{ours['per_s']:,.0f}/s", bar, _latency(ours)
    if theirs is not None:
        beside = f"{_latency(theirs)}; kvpoll has {ratio:.2f}x the throughput"
        yield f"SGLang's handshakes, {how}", f"{theirs['per_s']:,.0f}/s", "", beside


def _latency(answer: dict[str, float]) -> str:
    return f"p50 {answer['p50_ms']:.2f} ms, p99 {answer['p99_ms']:.2f} ms"
