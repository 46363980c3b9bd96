"""``cuda_ipc`` between real processes that are killed and stopped, on host memory: what each learns of the other's end.

The copies are stood in for (see ``HostDevice``); sockets, pidfds, mappings and processes are real. With a GPU the same
stories run in ``tests/gpu``.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine_processes"))
from staging import Rank, Stage

PAGES, PAGE_BYTES, SEED = 64, 4096, 3
LIMIT_S = 30.0
SOURCE = [page * PAGE_BYTES for page in range(0, PAGES, 2)]
TARGET = [page * PAGE_BYTES for page in range(PAGES - 1, 0, -2)]


class Scene:
    """An owner and a writer; the process that copies can hold its copies in flight."""

    def __init__(self, stage: Stage, direction: str) -> None:
        self.stage, self.direction = stage, direction
        self.owner, self.descriptor = self.start_owner(0)
        self.writer = stage.rank()
        self.start(self.writer, "prefill0", 0, SEED)
        self.writer.ask("connect", descriptor=self.descriptor, node="decode0", epoch=0)
        self.copier = self.owner if direction == "pull" else self.writer
        assert self.end(self.post()) == {"state": "done", "drained": True, "reason": None}
        assert self.check()["wrong"] == 0

    def start(self, rank: Rank, node: str, epoch: int, seed: int | None = None) -> str:
        started = rank.ask("start", name="cuda_ipc", node=node, epoch=epoch, pages=PAGES, page_bytes=PAGE_BYTES,
                           seed=seed, direction=self.direction, backend="host")  # fmt: skip
        assert "descriptor" in started, started
        return str(started["descriptor"])

    def start_owner(self, epoch: int) -> tuple[Rank, str]:
        owner = self.stage.rank()
        return owner, self.start(owner, "decode0", epoch)

    def post(self, epoch: int = 0) -> int:
        posted = self.writer.ask("post", peer=f"decode0#{epoch}", source=SOURCE, target=TARGET, nbytes=PAGE_BYTES)
        return int(posted["handle"])

    def post_and_hold(self) -> int:
        """A write whose copy has begun and does not end."""
        before = self.copier.ask("copies_started")["copies"]
        self.copier.ask("gate", is_open=False)
        handle = self.post()
        until = time.monotonic() + LIMIT_S
        while self.copier.ask("copies_started")["copies"] == before:
            assert time.monotonic() < until
        return handle

    def end(self, handle: int, drained: bool = False, limit_s: float = LIMIT_S) -> dict[str, object]:
        return self.writer.ask("wait", handle=handle, limit_s=limit_s, drained=drained)

    def check(self) -> dict[str, object]:
        return self.owner.ask("check", seed=SEED, source=SOURCE, target=TARGET, nbytes=PAGE_BYTES)


@pytest.fixture(params=["pull", "push"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with Stage(sys.executable, isolated=False) as stage:
        yield Scene(stage, request.param)


def test_an_owner_learns_of_its_writers_death_once_and_not_of_a_pause(scene: Scene) -> None:
    scene.writer.signal(signal.SIGSTOP)
    assert scene.owner.ask("died", lives=1, limit_s=0.5) == {"deaths": []}
    scene.writer.signal(signal.SIGCONT)
    assert scene.owner.ask("died") == {"deaths": []}
    scene.writer.kill()
    assert scene.owner.ask("died", lives=1, limit_s=LIMIT_S) == {"deaths": [["prefill0", 0]]}
    assert scene.owner.ask("died", lives=2, limit_s=0.3) == {"deaths": [["prefill0", 0]]}


def test_a_dead_writers_running_pull_ends_before_its_death_is_told(scene: Scene) -> None:
    """Death means that nothing of that process moves; a copy that the owner itself runs for it must be over."""
    if scene.direction == "push":
        pytest.skip("a push runs in the writer, and ends with it")
    scene.post_and_hold()
    scene.writer.kill()
    assert scene.owner.ask("died", lives=1, limit_s=0.5) == {"deaths": []}
    scene.owner.ask("gate", is_open=True)
    assert scene.owner.ask("died", lives=1, limit_s=LIMIT_S) == {"deaths": [["prefill0", 0]]}


def test_a_dead_owner_fails_the_write_and_a_pull_is_drained_by_its_death(scene: Scene) -> None:
    handle = scene.post_and_hold()
    scene.owner.kill()
    failed = scene.end(handle)
    assert failed["state"] == "failed"
    if scene.direction == "push":  # its own copy still reads its own pages
        assert scene.writer.ask("poll", handle=handle)["drained"] is False
        scene.writer.ask("gate", is_open=True)
    assert scene.end(handle, drained=True)["drained"] is True
    late = scene.end(scene.post())
    assert (late["state"], late["drained"]) == ("failed", True)


def test_a_stopped_owner_proves_nothing(scene: Scene) -> None:
    handle = scene.post_and_hold()
    scene.owner.signal(signal.SIGSTOP)
    scene.writer.ask("abort", handle=handle)
    assert scene.end(handle, drained=True, limit_s=0.5)["drained"] is False
    scene.owner.signal(signal.SIGCONT)
    scene.copier.ask("gate", is_open=True)
    assert scene.end(handle, drained=True)["drained"] is True


def test_an_owners_next_life_is_written_to(scene: Scene) -> None:
    scene.owner.kill()
    scene.owner, descriptor = scene.start_owner(1)
    scene.writer.ask("connect", descriptor=descriptor, node="decode0", epoch=1)
    assert scene.end(scene.post(1))["state"] == "done"
    assert scene.check()["wrong"] == 0
    assert scene.end(scene.post(0))["state"] == "failed"


def test_pages_that_are_released_on_drained_do_not_change(scene: Scene) -> None:
    """The paused writer of ``stale_writer.py``: its copy is in flight while it stands still."""
    handle = scene.post_and_hold()
    scene.writer.signal(signal.SIGSTOP)
    time.sleep(0.1)
    scene.writer.signal(signal.SIGCONT)
    scene.writer.ask("abort", handle=handle)
    scene.copier.ask("gate", is_open=True)
    assert scene.end(handle, drained=True) == {"state": "failed", "drained": True, "reason": "aborted by its user"}
    scene.owner.ask("zero")
    time.sleep(0.3)
    assert scene.owner.ask("touched") == {"pages": 0}
