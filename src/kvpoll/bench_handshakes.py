"""Complete handshakes of small requests through real endpoints, for ``kvpoll bench runtime``.

A handshake is what a request costs beside its KV: both sides admit it, decode publishes its pages, prefill writes
them (four pages of 256 bytes in each of four planes, and the aux row), both learn of Success, both release, and the
pages are free again on both. A window of requests is kept under way; a slot of it is used again when all that is over.

``python -m kvpoll.bench_handshakes both|prefill|decode [ADDRESS]`` is one process of it, which speaks the lines of
JSON that ``bench_sglang`` describes. The process with the prefill endpoint also runs the bootstrap server, as it is
with SGLang. The engine is driven by callbacks, which is what an embedding engine would use; SGLang has polls only.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from kvpoll.runtime.bootstrap import BootstrapServer
from kvpoll.runtime.endpoint import (
    DecodeEndpoint,
    DecodeTransfer,
    Endpoint,
    KVPoll,
    PrefillEndpoint,
    PrefillTransfer,
    Settings,
    Transfer,
)
from kvpoll.runtime.pools.layout import Layout
from kvpoll.spec.protocol import load

PAGES_EACH: Final = 4
LAYOUT: Final = Layout((0, 1), pages=1024, page_tokens=1, heads=1, head_dim=128, rows=256)
"""As ``bench_sglang`` has it: two layers of keys and values, pages of 256 bytes."""

WAIT_S: Final = 60.0


class HandshakeFailed(Exception):
    """A handshake failed, or did not end in time. One line."""


class Side:
    """The endpoints of one process, and a bootstrap server beside prefill's."""

    def __init__(self, role: str, address: str = "", **settings: Any) -> None:
        """role: "both", "prefill" or "decode"; address: of the bootstrap server, for decode. settings: of both ends;
        "trace" is a folder."""
        self.server: BootstrapServer | None = None
        self.prefill: PrefillEndpoint | None = None
        self.decode: DecodeEndpoint | None = None
        self.address = address
        trace = settings.pop("trace", None)
        mine: list[dict[str, Any]] = [
            {"trace": Path(trace) / f"{side}.jsonl"} if trace else {} for side in ("prefill", "decode")
        ]
        if role != "decode":
            protocol = load()
            self.server = BootstrapServer(protocol, protocol.profile("reference"), port=0)
            self.server.start()
            self.address = self.server.address
            self.prefill = PrefillEndpoint(Settings(LAYOUT, bootstrap=self.address, **settings, **mine[0]))
            self.prefill.wait_registered(WAIT_S)
        if role != "prefill":
            self.decode = DecodeEndpoint(Settings(LAYOUT, name="decode", **settings, **mine[1]))

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Those that live here."""
        return tuple(each for each in (self.prefill, self.decode) if each is not None)

    def close(self) -> None:
        """End everything."""
        for endpoint in self.endpoints:
            endpoint.close()
        if self.server is not None:
            self.server.close()


class Drive:
    """``requests`` handshakes from room ``first`` on, ``window`` at once."""

    def __init__(self, side: Side, first: int, requests: int, window: int) -> None:
        self.side = side
        self.requests = requests
        self.latency_s: list[float] = []
        self.failure: str | None = None
        self._rooms = itertools.count(first)
        self._end = first + requests
        self._window = window
        self._ends = len(side.endpoints)
        self._over = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> dict[str, Any]:
        """{"done", "wall_s", "latency_s"}. Raises HandshakeFailed."""
        began = time.perf_counter()
        for slot in range(self._window):
            self._start(slot)
        ended = self._over.wait(WAIT_S)
        wall_s = time.perf_counter() - began
        if self.failure is not None or not ended:
            done = f"{len(self.latency_s)} of {self.requests} handshakes within {WAIT_S:g} s"
            raise HandshakeFailed(self.failure or done)
        return {"done": len(self.latency_s), "wall_s": wall_s, "latency_s": self.latency_s}

    def _start(self, slot: int) -> None:
        room = next(self._rooms)
        if room >= self._end:
            return
        began = time.perf_counter()
        left = self._ends
        pages = tuple(range(slot * PAGES_EACH, (slot + 1) * PAGES_EACH))

        def moved(end: Transfer, poll: KVPoll) -> None:
            """What an engine does: give pages when the room is ready, release it when it has succeeded."""
            if poll is KVPoll.WaitingForInput:
                if isinstance(end, PrefillTransfer):
                    end.send(pages, last=True)
                elif isinstance(end, DecodeTransfer):
                    end.publish(pages, slot)
            elif poll is KVPoll.Success:
                end.release()
            elif poll is KVPoll.Failed:
                self.failure = f"room {room}: {end.failure}"
                self._over.set()

        def ended(end: Transfer) -> None:
            nonlocal left
            if self._ends > 1:
                with self._lock:  # each endpoint calls back from its own thread
                    left -= 1
                    is_last = not left
                if not is_last:
                    return
            self.latency_s.append(time.perf_counter() - began)
            if len(self.latency_s) == self.requests:
                self._over.set()
            self._start(slot)

        if self.side.prefill is not None:
            self.side.prefill.admit(room, on_poll=moved, on_pages_free=ended)
        if self.side.decode is not None:
            self.side.decode.admit(room, self.side.address, on_poll=moved, on_pages_free=ended)


def main(role: str, address: str = "", settings: str = "{}") -> None:
    """Serve the orders on standard input, in the way of ``bench_sglang``."""
    side = Side(role, address, **json.loads(settings))
    print(json.dumps({"ready": side.address}), flush=True)
    try:
        for line in sys.stdin:
            gc.collect()
            gc.freeze()  # as an engine does when it is warm; ``bench_sglang`` does it too
            print(json.dumps(Drive(side, **json.loads(line)).run()), flush=True)
    finally:
        side.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
