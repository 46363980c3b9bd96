"""The transports over the real Mooncake and NIXL engines, in real processes that are stopped and killed.

Set ``KVPOLL_ENGINE_PYTHON`` to the interpreter of an environment with ``mooncake-transfer-engine-non-cuda`` and
``nixl-cu12`` (this one is tried otherwise); libibverbs.so.1 must be found, if need be through LD_LIBRARY_PATH. Mooncake
runs in a network namespace with only lo, because it listens on every interface. What is not there skips, with the
reason.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine_processes"))
from staging import Rank, Stage, engine_python, why_not_imported, why_not_isolated

ENGINES = {"mooncake": "mooncake.engine", "nixl": "nixl_cu12._api"}
ENVIRONMENT = {
    "mooncake": {"MC_TCP_STATUS_TIMEOUT_SEC": "3", "MC_TCP_PROGRESS_TIMEOUT_SEC": "3"},
    "nixl": {"UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp"},
}
"""Mooncake's own patience of 30 s is not what is tested here."""

SEED = 5
LIMIT_S = 50.0


class Work(NamedTuple):
    """Which pages go where: ``moved`` of ``pages``, source and target in different random orders."""

    pages: int
    page_bytes: int
    source: list[int]
    target: list[int]

    @classmethod
    def draw(cls, pages: int, moved: int, page_bytes: int) -> Work:
        chance = random.Random(SEED)
        source, target = (chance.sample(range(pages), moved) for _ in range(2))
        return cls(pages, page_bytes, [at * page_bytes for at in source], [at * page_bytes for at in target])


SMALL = Work.draw(64, 32, 4096)
LARGE = Work.draw(2048, 2000, 32768)
"""62 MiB: far more than the sockets of a stopped process can hold, in two batches."""

UnderTest = Callable[[str], Stage]


@pytest.fixture(scope="session")
def reasons() -> dict[str, str | None]:
    """Why an engine cannot be tested here, by name."""
    python = engine_python()
    found = {name: why_not_imported(python, module) for name, module in ENGINES.items()}
    found["mooncake"] = found["mooncake"] or why_not_isolated()
    return {name: reason and f"{name} with {python}: {reason}" for name, reason in found.items()}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, reasons: dict[str, str | None]) -> str:
    name: str = request.param
    if reasons[name]:
        pytest.skip(str(reasons[name]))
    return name


@pytest.fixture
def stage(engine: str) -> Iterator[Stage]:
    with Stage(engine_python(), isolated=engine == "mooncake", **ENVIRONMENT[engine]) as stage:
        yield stage


def start_owner(stage: Stage, engine: str, work: Work, epoch: int = 0, regions: int = 1) -> tuple[Rank, str]:
    rank = stage.rank()
    started = rank.ask("start", name=engine, node="decode0", epoch=epoch, pages=work.pages,
                       page_bytes=work.page_bytes, regions=regions)  # fmt: skip
    assert "descriptor" in started, started
    return rank, started["descriptor"]


def start_writer(stage: Stage, engine: str, work: Work, regions: int = 1, **options: Any) -> Rank:
    rank = stage.rank()
    started = rank.ask("start", name=engine, node="prefill0", epoch=0, pages=work.pages,
                       page_bytes=work.page_bytes, regions=regions, seed=SEED, **options)  # fmt: skip
    assert "descriptor" in started, started
    return rank


def start_pair(stage: Stage, engine: str, work: Work, **options: Any) -> tuple[Rank, Rank]:
    owner, descriptor = start_owner(stage, engine, work)
    writer = start_writer(stage, engine, work, **options)
    writer.ask("connect", descriptor=descriptor, node="decode0", epoch=0)
    # One page first, so that no story is about the making of the connection.
    assert await_end(writer, post(writer, work, only=1))["state"] == "done"
    owner.ask("zero")
    return owner, writer


def post(writer: Rank, work: Work, epoch: int = 0, only: int | None = None) -> int:
    posted = writer.ask("post", peer=f"decode0#{epoch}", source=work.source[:only], target=work.target[:only],
                        nbytes=work.page_bytes)  # fmt: skip
    handle: int = posted["handle"]
    return handle


def await_end(writer: Rank, handle: int, drained: bool = False, limit_s: float = LIMIT_S) -> dict[str, Any]:
    return writer.ask("wait", handle=handle, limit_s=limit_s, drained=drained)


def wrong_bytes(owner: Rank, work: Work) -> int:
    """Bytes that are not as they must be once the write is done, pages that were not written to included."""
    answer = owner.ask("check", seed=SEED, source=work.source, target=work.target, nbytes=work.page_bytes)
    wrong: int = answer["wrong"]
    return wrong


# --- when all goes well -----------------------------------------------------------------------------


def test_pages_arrive_byte_by_byte_and_nothing_else_changes(stage: Stage, engine: str) -> None:
    owner, descriptor = start_owner(stage, engine, SMALL, regions=4)
    writer = start_writer(stage, engine, SMALL, regions=2)
    writer.ask("connect", descriptor=descriptor, node="decode0", epoch=0)
    assert await_end(writer, post(writer, SMALL)) == {"state": "done", "drained": True, "reason": None}
    assert wrong_bytes(owner, SMALL) == 0
    assert writer.ask("close")["took_s"] < 2
    assert owner.ask("close")["took_s"] < 2


def test_ranges_of_different_lengths_arrive(stage: Stage, engine: str) -> None:
    """Neighbours that are merged, odd lengths, and none of them a page of the prepared lists."""
    owner, writer = start_pair(stage, engine, SMALL)
    source, target, nbytes = [0, 5000, 5100, 9001], [70000, 100, 200, 131072], [4096, 100, 50, 12345]
    posted = writer.ask("post", peer="decode0#0", source=source, target=target, nbytes=nbytes)
    assert await_end(writer, posted["handle"])["state"] == "done"
    for start, end, length in zip(source, target, nbytes, strict=True):
        # Each range alone is right; what is wrong then are exactly the bytes of the other three.
        checked = owner.ask("check", seed=SEED, source=[start], target=[end], nbytes=length)
        assert 0 < checked["wrong"] <= sum(nbytes) - length


def test_8192_ranges_are_not_too_many(stage: Stage, engine: str) -> None:
    """Mooncake takes some 2000 ranges at once; above that it failed, wrote on, and was wedged (ENGINES 3)."""
    work = Work.draw(8192 * 2, 8192, 4096)
    owner, writer = start_pair(stage, engine, work)
    for _ in range(3):
        assert await_end(writer, post(writer, work))["state"] == "done"
    assert wrong_bytes(owner, work) == 0


def test_a_range_outside_the_memory_is_refused_before_a_byte_is_sent(stage: Stage, engine: str) -> None:
    owner, writer = start_pair(stage, engine, SMALL)
    whole = SMALL.pages * SMALL.page_bytes
    for source, target in ((whole - 100, 0), (0, whole - 100), (-4096, 0), (0, 1 << 62)):
        posted = writer.ask("post", peer="decode0#0", source=[0, source], target=[0, target], nbytes=4096)
        seen = writer.ask("poll", handle=posted["handle"])
        assert (seen["state"], seen["drained"]) == ("failed", True)
        assert "range 1" in seen["reason"]
    assert owner.ask("touched")["pages"] == 0
    assert await_end(writer, post(writer, SMALL))["state"] == "done"


# --- an owner that is killed ------------------------------------------------------------------------


def test_a_killed_owner_fails_the_write_and_its_next_life_is_written_to(stage: Stage, engine: str) -> None:
    owner, writer = start_pair(stage, engine, LARGE)
    handle = post(writer, LARGE)
    owner.ask("await_touched", pages=1, limit_s=LIMIT_S)
    owner.kill()
    failed = await_end(writer, handle)
    assert failed["state"] == "failed"
    assert failed["drained"] is False  # no engine proves that it has stopped
    late = await_end(writer, post(writer, LARGE, only=1))
    assert late["state"] == "failed"

    owner, descriptor = start_owner(stage, engine, LARGE, epoch=1)
    writer.ask("connect", descriptor=descriptor, node="decode0", epoch=1)
    assert await_end(writer, post(writer, LARGE, epoch=1))["state"] == "done"
    assert wrong_bytes(owner, LARGE) == 0
    over = writer.ask("poll", handle=post(writer, LARGE, epoch=0))
    assert (over["state"], over["drained"]) == ("failed", True)
    assert "epoch 1 has come" in over["reason"]


def test_an_owner_that_was_never_there_fails_the_write(stage: Stage, engine: str) -> None:
    owner, descriptor = start_owner(stage, engine, SMALL)
    owner.kill()
    writer = start_writer(stage, engine, SMALL)
    writer.ask("connect", descriptor=descriptor, node="decode0", epoch=0)
    assert await_end(writer, post(writer, SMALL))["state"] == "failed"
    assert writer.ask("close")["took_s"] < 2


# --- an owner that is stopped, and a write that is given up -----------------------------------------


def test_a_write_to_a_stopped_owner_fails_at_our_deadline_and_is_not_drained(stage: Stage, engine: str) -> None:
    """NIXL alone would wait for ever, and Mooncake for 30 s; neither then says when its bytes have stopped."""
    owner, writer = start_pair(stage, engine, LARGE, deadline_s=1.0)
    owner.signal(signal.SIGSTOP)
    failed = await_end(writer, post(writer, LARGE))
    assert failed == {"state": "failed", "drained": False, "reason": "not placed after 1 s"}
    time.sleep(1.0)
    assert writer.ask("close")["took_s"] < 2  # though the engine is still at it


def test_what_is_drained_never_changes_again(stage: Stage, engine: str) -> None:
    """The rule of release: an owner that is told "drained" may give the pages to someone else.

    The write is given up while the owner is stopped. NIXL says "done" when all has landed after all, and then nothing
    more comes; Mooncake breaks its batch off, so nothing is ever proven and the pages stay in quarantine.
    """
    owner, writer = start_pair(stage, engine, LARGE)
    owner.signal(signal.SIGSTOP)
    handle = post(writer, LARGE)
    time.sleep(0.2)
    given_up = writer.ask("abort", handle=handle)
    assert given_up == {"state": "failed", "drained": False, "reason": "aborted by its user"}
    still = await_end(
        writer, handle, drained=True, limit_s=4.0 if engine == "mooncake" else 1.0
    )  # Mooncake gives up at 3 s
    assert still["drained"] is False
    owner.signal(signal.SIGCONT)
    if engine == "mooncake":
        assert await_end(writer, handle, drained=True, limit_s=2.0)["drained"] is False
        return
    assert await_end(writer, handle, drained=True)["drained"] is True
    owner.ask("zero")
    time.sleep(1.0)
    assert owner.ask("touched")["pages"] == 0
    assert await_end(writer, post(writer, LARGE))["state"] == "done"
    assert wrong_bytes(owner, LARGE) == 0


# --- a writer that is stopped -----------------------------------------------------------------------


def pause_midway(owner: Rank, writer: Rank) -> int:
    """A write whose writer is stopped when its first pages have landed; its handle."""
    handle = post(writer, LARGE)
    owner.ask("await_touched", pages=50, limit_s=LIMIT_S)
    writer.signal(signal.SIGSTOP)
    time.sleep(0.3)
    return handle


def test_a_resumed_writer_overwrites_pages_that_were_released_without_proof(
    stage: Stage, engine: str, record_property: Callable[[str, object], None]
) -> None:
    """Why the rule of release exists, seen on the real engine (the pattern of ``stale_writer.py``).

    The pages of a paused writer are released without its word, as SGLang does after 30 s: what NIXL had still to
    write, it writes into pages that are someone else's by now, and reports success.
    """
    owner, writer = start_pair(stage, engine, LARGE)
    for _ in range(5):  # a write may be over before its writer is paused
        handle = pause_midway(owner, writer)
        owner.ask("zero")
        writer.signal(signal.SIGCONT)
        told = await_end(writer, handle, drained=True, limit_s=5.0)
        overwritten = owner.ask("touched")["pages"]
        record_property("pages_overwritten", overwritten)
        if overwritten:
            break
        owner.ask("zero")
    else:
        pytest.skip("five writes were over before their writer was paused")
    assert overwritten > 0
    if engine == "nixl":
        assert told["state"] == "done"


def test_pages_of_a_paused_writer_that_are_released_on_drained_stay_as_they_are(stage: Stage, engine: str) -> None:
    """The same pause, with the rule: no byte of a released page changes."""
    owner, writer = start_pair(stage, engine, LARGE)
    handle = pause_midway(owner, writer)
    writer.signal(signal.SIGCONT)
    writer.ask("abort", handle=handle)
    told = await_end(writer, handle, drained=True, limit_s=10.0)
    if not told["drained"]:
        assert engine == "mooncake"  # it broke the batch off, so the pages are never released
        assert told["state"] == "failed"
        return
    owner.ask("zero")
    time.sleep(0.5)
    assert owner.ask("touched")["pages"] == 0


def test_an_abort_ends_a_write_between_its_parts_and_drains(stage: Stage, engine: str) -> None:
    """Abort is a request: it takes effect between batches, and drained follows when the running one has landed."""
    owner, writer = start_pair(stage, engine, LARGE)
    owner.signal(signal.SIGSTOP)
    first, *_, last = [post(writer, LARGE) for _ in range(4)]
    assert writer.ask("abort", handle=last) == {"state": "failed", "drained": True, "reason": "aborted by its user"}
    given_up = writer.ask("abort", handle=first)
    assert given_up == {"state": "failed", "drained": False, "reason": "aborted by its user"}
    owner.signal(signal.SIGCONT)
    for handle in range(first, last):
        writer.ask("abort", handle=handle)
        assert await_end(writer, handle, drained=True)["drained"] is True
    owner.ask("zero")
    time.sleep(0.5)
    assert owner.ask("touched")["pages"] == 0
    assert owner.ask("revoke") == {"proven": False}  # an owner cannot keep these engines out
