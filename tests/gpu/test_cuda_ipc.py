"""``cuda_ipc`` between two processes on one GPU: bytes verified, order of work, aborts, killed and stopped peers.

Everything here skips without a GPU. What a machine without one can test of the same adapter is in
``tests/cover/test_engine_cuda_ipc.py`` and ``tests/integration/test_engine_cuda_ipc_host.py``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device (or torch is built without CUDA)", allow_module_level=True)

from kvpoll.runtime.transports.cuda_ipc_measure import Load, measure  # noqa: E402 (needs what was just asked for)

SCRIPT = Path(__file__).parent / "gpu_rank.py"
SOURCE = Path(__file__).parents[2] / "src"
REGION_BYTES = 8 << 20
SEED, LIMIT_S = 11, 120.0
Ranges = list[tuple[int, int, int]]


class Rank:
    """A child process with its own CUDA context."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )  # fmt: skip

    def ask(self, verb: str, **words: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": verb, **words}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Pair:
    """An owner and a writer on the same GPU."""

    def __init__(self, direction: str, kernel: str) -> None:
        self.direction = direction
        self.owner, self.writer = Rank(), Rank()
        options = {"direction": direction, "kernel": kernel}
        descriptor = self.owner.ask("start", node="decode0", epoch=0, seed=None, **options)["descriptor"]
        self.writer.ask("start", node="prefill0", epoch=0, seed=SEED, **options)
        self.writer.ask("connect", descriptor=descriptor, node="decode0", epoch=0)
        self.copier = self.owner if direction == "pull" else self.writer

    def post(self, ranges: Ranges, **words: Any) -> int:
        return int(self.writer.ask("post", ranges=ranges, **words)["handle"])

    def end(self, handle: int, drained: bool = False, limit_s: float = LIMIT_S) -> dict[str, Any]:
        return self.writer.ask("wait", handle=handle, limit_s=limit_s, drained=drained)


@pytest.fixture(params=["pull", "push"])
def direction(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(direction: str) -> Iterator[Pair]:
    made = Pair(direction, "auto")
    yield made
    made.writer.kill()
    made.owner.kill()


def pages(page_bytes: int, count: int) -> Ranges:
    """Random pages of both regions to random pages of both."""
    chance = random.Random(1)
    source, target = (chance.sample(range(2 * REGION_BYTES // page_bytes), count) for _ in range(2))
    return [(a * page_bytes, b * page_bytes, page_bytes) for a, b in zip(source, target, strict=True)]


DONE = {"state": "done", "drained": True, "reason": None}
CROOKED: Ranges = [(3, 5, 1001), (REGION_BYTES + 17, 4096, 333), (9000, REGION_BYTES + 1, 70_001)]


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("ranges", [pages(16384, 300), pages(65536, 100), CROOKED], ids=["16K", "64K", "crooked"])
def test_every_byte_is_where_it_belongs_and_no_other_changes(direction: str, kernel: str, ranges: Ranges) -> None:
    pair = Pair(direction, kernel)
    try:
        assert pair.end(pair.post(ranges)) == DONE
        assert pair.owner.ask("check", seed=SEED, ranges=ranges) == {"wrong": 0}
        assert pair.copier.ask("kernel")["name"] == kernel
    finally:
        pair.writer.kill()
        pair.owner.kill()


def test_the_copy_waits_for_what_the_callers_stream_computes(pair: Pair) -> None:
    """Between the order to compute and the post the host waits for nothing."""
    ranges = [(at, at, 1 << 20) for at in range(0, REGION_BYTES, 1 << 20)]
    assert pair.end(pair.post(ranges, busy_s=0.2)) == DONE
    assert pair.owner.ask("check", seed=SEED, ranges=ranges, inverted=True) == {"wrong": 0}


def test_an_aborted_write_drains_and_then_nothing_changes(pair: Pair) -> None:
    pair.end(pair.post(pages(65536, 1)))
    handle = pair.post(pages(65536, 200), busy_s=0.2)
    pair.writer.ask("abort", handle=handle)
    told = pair.end(handle, drained=True)
    assert (told["state"], told["drained"]) == ("failed", True)
    pair.owner.ask("zero")
    assert pair.owner.ask("died", limit_s=0.5) == {"deaths": []}
    assert pair.owner.ask("touched") == {"bytes": 0}


def test_a_revoked_pull_is_fenced(pair: Pair, direction: str) -> None:
    pair.end(pair.post(pages(65536, 1)))
    proven = pair.owner.ask("revoke")["proven"]
    assert proven is (direction == "pull")
    if proven:
        pair.owner.ask("zero")
        assert pair.end(pair.post(pages(65536, 100)))["reason"] == "the pages were given up"
        assert pair.owner.ask("touched") == {"bytes": 0}


def test_after_a_writers_death_is_told_no_byte_changes(pair: Pair) -> None:
    """The assumption of the pidfd: when it speaks, the driver has taken the dead process's work down."""
    pair.end(pair.post(pages(65536, 1)))
    pair.post(pages(65536, 256), busy_s=1.0)  # the copy is launched, and would begin in a second
    pair.writer.kill()
    assert pair.owner.ask("died", limit_s=LIMIT_S) == {"deaths": [["prefill0", 0]]}
    pair.owner.ask("zero")
    assert pair.owner.ask("died", limit_s=0.0)["deaths"]
    for _ in range(15):
        assert pair.owner.ask("touched") == {"bytes": 0}
        torch.cuda._sleep(150_000_000)
        torch.cuda.synchronize()


def test_a_killed_owner_fails_the_write_and_drains_it(pair: Pair) -> None:
    pair.end(pair.post(pages(65536, 1)))
    pair.owner.kill()
    told = pair.end(pair.post(pages(65536, 10)), drained=True)
    assert (told["state"], told["drained"]) == ("failed", True)


def test_a_stopped_writer_is_not_taken_for_dead(pair: Pair) -> None:
    pair.end(pair.post(pages(65536, 1)))
    pair.writer.process.send_signal(signal.SIGSTOP)
    assert pair.owner.ask("died", limit_s=1.0) == {"deaths": []}
    pair.writer.process.send_signal(signal.SIGCONT)
    ranges = pages(65536, 50)
    pair.owner.ask("zero")
    assert pair.end(pair.post(ranges)) == DONE
    assert pair.owner.ask("check", seed=SEED, ranges=ranges) == {"wrong": 0}


def test_the_measurement_verifies_what_it_measures(direction: str) -> None:
    """A small load: that the figures are of copies that arrived. Speed is judged by ``kvpoll bench``, not here."""
    figures = measure(direction, load=Load(pages=64, page_bytes=65536, writes=2, repeats=2))
    assert figures.verified
    assert figures.payload_bytes == 64 * 65536
    assert min(figures.one_write, figures.many_writes, figures.device_copy, figures.ratio) > 0
