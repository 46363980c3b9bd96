"""Real endpoints in one process, with a real bootstrap server between them, for the tests beside this file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvpoll.runtime import (
    BootstrapServer,
    DecodeEndpoint,
    DecodeTransfer,
    KVPoll,
    Layout,
    PrefillEndpoint,
    PrefillTransfer,
    Settings,
)
from kvpoll.runtime.transports.memory import Fabric
from kvpoll.spec.protocol import load

PROTOCOL = load()
REFERENCE = PROTOCOL.profile("reference")
LAYOUT = Layout((0, 1), pages=64, page_tokens=4, heads=2, head_dim=16, rows=8)
LIMIT_S = 30.0
SOON = {"heartbeat_interval_s": 0.2, "drain_timeout_s": 0.3, "topology_retry_s": 0.1}
"""Rules of a cluster that notices things sooner."""


def until(holds: Callable[[], Any], what: str) -> None:
    """Wait for something that must happen."""
    end_s = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > end_s:
            raise TimeoutError(what)
        time.sleep(0.002)


class Stage:
    """A bootstrap server, a prefill and a decode endpoint. ``moving`` False: nothing is written before ``flow``.

    The transport is "memory": its fabric is stepped by a callback in the loop of prefill, so writes can be held.
    """

    def __init__(self, moving: bool = True, prefill: Any = None, decode: Any = None, **both: Any) -> None:
        self.server = BootstrapServer(PROTOCOL, REFERENCE, port=0)
        self.server.start()
        self.address = self.server.address
        self.fabric: Fabric | None = None
        if "transport" not in both:
            self.fabric = Fabric()
            both |= {"transport": "memory", "options": {"fabric": self.fabric}}
        given = {"layout": LAYOUT, **both}
        self.prefill = PrefillEndpoint(Settings(**{**given, "bootstrap": self.address, **(prefill or {})}))
        self.decode = DecodeEndpoint(Settings(**{**given, "name": "D", **(decode or {})}))
        self.moving = moving
        if self.fabric is not None:
            self.prefill.do(self._pump)
        self.prefill.wait_registered(LIMIT_S)
        self.rooms = iter(range(1, 1 << 40))

    def _pump(self) -> None:
        assert self.fabric is not None
        if self.moving:
            self.fabric.run()
        self.prefill.host.after(0.002, self._pump)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.moving = True
        self.prefill.close()
        self.decode.close()
        self.server.close()

    def restart_prefill(self) -> None:
        """Prefill ends, whatever is under way, and another life of it registers at the same address."""
        self.prefill.close()
        self.prefill = PrefillEndpoint(self.prefill.settings)
        self.prefill.do(self._pump)
        self.prefill.wait_registered(LIMIT_S)

    def one_range(self) -> None:
        """The write that is under way places one range, and is then paused: nobody can say that it is quiet."""
        done = threading.Event()
        assert self.fabric is not None
        fabric = self.fabric
        self.prefill.do(lambda: (fabric.step(), done.set()))
        assert done.wait(LIMIT_S) and fabric.under_way

    # -- stories in one line

    def admit(self, room: int | None = None, attempt: int = 0, **decode: Any) -> tuple[PrefillTransfer, DecodeTransfer]:
        """One request on both sides."""
        number = next(self.rooms) if room is None else room
        return self.prefill.admit(number, attempt), self.decode.admit(number, self.address, attempt, **decode)

    def ready(
        self, pages: tuple[int, ...] = (0, 1), row: int = 0, **given: Any
    ) -> tuple[PrefillTransfer, DecodeTransfer]:
        """A request whose decode has published and whose prefill may send."""
        source, target = self.admit(**given)
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, target.failure
        target.publish(pages, row)
        assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, source.failure
        return source, target

    def served(self, pages: tuple[int, ...] = (0, 1), row: int = 0, **given: Any) -> None:
        """One whole request, its bytes compared."""
        source, target = self.ready(pages, row, **given)
        fill(self.prefill, pages, source.pair[0])
        source.send(pages, last=True, first_token=source.pair[0], prompt_tokens=len(pages) * 4)
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success, target.failure
        assert source.wait(timeout_s=LIMIT_S) == KVPoll.Success, source.failure
        assert same_bytes(self, pages, pages)
        said = target.aux()
        assert said is not None and (said.first_token, said.pages) == (source.pair[0], len(pages))
        over(source, target)


def over(*transfers: PrefillTransfer | DecodeTransfer) -> None:
    """Release them, and see them go."""
    for transfer in transfers:
        transfer.release()
    for transfer in transfers:
        assert transfer.wait_pages_free(LIMIT_S), transfer
        until(lambda transfer=transfer: transfer.is_over, f"{transfer} being over")


def fill(endpoint: PrefillEndpoint, pages: tuple[int, ...], seed: int) -> None:
    """Compute a prompt's KV: bytes that depend on the request, the page and the plane."""
    chance = np.random.default_rng(seed)
    for page in pages:
        for plane in endpoint.pool.layout.planes:
            endpoint.pool.put(*plane, page, chance.integers(0, 256, endpoint.pool.layout.page_bytes, np.uint8))


def same_bytes(stage: Stage, source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Do these pages of prefill and of decode say the same, byte by byte?"""
    return all(
        np.array_equal(stage.prefill.pool.get(*plane, here), stage.decode.pool.get(*plane, there))
        for here, there in zip(source, target, strict=True)
        for plane in LAYOUT.planes
    )
