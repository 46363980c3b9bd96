"""One process of the soak: a bootstrap server, or an endpoint and the engine around it, which aborts when told.

    python -m kvpoll.soak_process server PORT
    python -m kvpoll.soak_process prefill|decode CONFIG

CONFIG is JSON: bootstrap (prefill's), name (decode's), epoch, rules, trace (a path), seed. Orders come as lines of
JSON: ``{"admit": [[room, attempt, bootstrap], ...]}``, ``{"abort": [[room, attempt], ...]}`` and ``{"survey": true}``;
the end of the input ends it. It says ``{"ready": NODE, "origin": S}``, then at once ``{"failed": [[room, attempt,
cause], ...]}`` and ``{"over": [[room, attempt, outcome], ...]}`` when the pages are free too, every second ``{"stats":
{...}}``, and ``{"survey": {...}, "gauges": {...}}`` where it was asked. A server says ``{"listed": N}``: ranks in its
table.

What an engine does to a request, and when, follows from the seed and the room alone, so both sides know it. Prefill
fills the pages with words that say whose they are; decode compares every byte on arrival, and says in its trace what it
found (S5). When decode gets pages back
it notes what is in them, and compares again before it gives them to the next request: a byte that changed meanwhile
was written by somebody who had no right to.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import os
import random
import select
import sys
import threading
import time
import zlib
from collections import Counter, deque
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from kvpoll.runtime.bootstrap import BootstrapServer
from kvpoll.runtime.endpoint import DecodeEndpoint, Endpoint, KVPoll, PrefillEndpoint, Settings, TransferError
from kvpoll.runtime.pools.layout import Layout
from kvpoll.spec.protocol import load
from kvpoll.spec.trace import Committed, PageTag
from kvpoll.spec.vocabulary import Incarnation

SLOTS: Final = 192
PAGES_EACH: Final = 4
PAGE_BYTES: Final = 256
LAYOUT: Final = Layout((0, 1), pages=SLOTS * PAGES_EACH, page_tokens=1, heads=1, head_dim=128, rows=SLOTS)
REQUEST_BYTES: Final = PAGES_EACH * PAGE_BYTES * len(LAYOUT.planes)
TICK_S: Final = 0.02
STATS_S: Final = 1.0
LISTED_S: Final = 0.1
ABORT_SHARE: Final = 0.04
"""Of the requests, so many are given up by prefill, as many by decode, and as many by their client on both."""

MOMENTS: Final = {
    "client": ("admitted", "later"),
    "prefill": ("admitted", "waiting", "sending"),
    "decode": ("admitted", "waiting", "published"),
}
"""When a request is given up. A client's abort is brought to both sides by the router; what a side does, it must tell
the other itself, even where it has not found it yet.
"""

GAUGES: Final = ("kvpoll_transfers_live", "kvpoll_pages_quarantined", "kvpoll_writes_unsettled", "kvpoll_rooms")
"""Of ``/metrics``, what an idle endpoint may not show (O1)."""

_MIX: Final = 0x9E3779B97F4A7C15
_WORD: Final = (1 << 64) - 1


class Fate(NamedTuple):
    """What will be done to a request. client, prefill, decode: the moment at which each gives it up, None for never.
    later_s: how long after its admission "later" is. chunks: in how many parts prefill sends it.
    """

    client: str | None
    prefill: str | None
    decode: str | None
    later_s: float
    chunks: int


def fate(seed: int, room: int, attempt: int) -> Fate:
    """The same on both sides."""
    chance = random.Random(f"{seed}/{room}/{attempt}")
    moments = {
        who: chance.choice(moments) if chance.random() < ABORT_SHARE else None for who, moments in MOMENTS.items()
    }
    return Fate(**moments, later_s=chance.uniform(0.0, 0.05), chunks=1 + (chance.random() < 0.3))


class Pages:
    """The pages of each slot as one side fills and the other compares them."""

    def __init__(self, endpoint: Endpoint) -> None:
        pool, layout = endpoint.pool, endpoint.settings.layout
        self._words = [
            [
                pool.page_view(plane.layer, plane.part, slot * PAGES_EACH + page).view(np.uint64)
                for plane in layout.planes
                for page in range(PAGES_EACH)
            ]
            for slot in range(SLOTS)
        ]
        self.noted: dict[int, int] = {}

    @staticmethod
    def _first(room: int, attempt: int) -> int:
        return (room * 1_000_003 + attempt) * _MIX & _WORD

    def fill(self, slot: int, room: int, attempt: int) -> None:
        """Write whose they are to all words of a slot, another word for each page of each plane."""
        word = self._first(room, attempt)
        for place, words in enumerate(self._words[slot]):
            words[:] = (word + place * _MIX) & _WORD

    def found(self, slot: int, room: int, attempt: int) -> list[bool]:
        """For each page of a slot, in all planes: is every byte what ``fill`` wrote?"""
        word, is_right = self._first(room, attempt), [True] * PAGES_EACH
        for place, words in enumerate(self._words[slot]):
            is_right[place % PAGES_EACH] &= bool((words == np.uint64((word + place * _MIX) & _WORD)).all())
        return is_right

    def note(self, slot: int) -> None:
        """Remember what is in a slot that nobody owns."""
        self.noted[slot] = self._sum(slot)

    def is_untouched(self, slot: int) -> bool:
        """Has nobody written to it since?"""
        return slot not in self.noted or self.noted.pop(slot) == self._sum(slot)

    def _sum(self, slot: int) -> int:
        found = 0
        for words in self._words[slot]:
            found = zlib.crc32(words.tobytes(), found)
        return found


class Request:
    """One request on this side."""

    __slots__ = ("bootstrap", "fate", "is_over", "is_released", "outcome", "pair", "seen", "slot", "transfer")

    def __init__(self, pair: tuple[int, int], bootstrap: str, fate: Fate) -> None:
        self.pair, self.bootstrap, self.fate = pair, bootstrap, fate
        self.slot = -1
        self.transfer: Any = None
        self.outcome = "none"
        self.seen: set[KVPoll] = set()
        self.is_released = self.is_over = False


class Engine:
    """The engine around one endpoint: gives pages, compares them, gives up, and keeps count."""

    def __init__(self, side: str, config: dict[str, Any]) -> None:
        self.side, self.seed = side, config["seed"]
        trace = Path(config["trace"]) if config.get("trace") else None
        settings = Settings(
            LAYOUT, bootstrap=config.get("bootstrap", ""), name=config.get("name", ""), epoch=config["epoch"],
            rules=config["rules"], monitored=True, trace=trace,
        )  # fmt: skip
        self.endpoint: Any = PrefillEndpoint(settings) if side == "prefill" else DecodeEndpoint(settings)
        self.pages = Pages(self.endpoint)
        self.counts: Counter[str] = Counter()
        self.over: deque[tuple[int, int, str]] = deque()
        self.failed: deque[tuple[int, int, str]] = deque()
        self.surveys: deque[dict[str, Any]] = deque()
        self._free = deque(range(SLOTS))
        self._live: dict[tuple[int, int], Request] = {}
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()
        self._later: list[tuple[float, int, Request]] = []

    def admit(self, room: int, attempt: int, bootstrap: str) -> None:
        """A request was routed here; it waits while no slot is free."""
        request = self._live[room, attempt] = Request((room, attempt), bootstrap, fate(self.seed, room, attempt))
        self._begin(request)

    def give_up(self, room: int, attempt: int) -> None:
        """The router says that the other side has failed."""
        request = self._live.get((room, attempt))
        if request is not None and request.transfer is not None:
            request.transfer.abort("other_side_failed")

    def _begin(self, request: Request) -> None:
        with self._lock:
            if not self._free:
                self._waiting.append(request)
                return
            request.slot = self._free.popleft()
        try:
            args = (request.bootstrap,) if self.side == "decode" else ()
            transfer = request.transfer = self.endpoint.admit(request.pair[0], *args, attempt=request.pair[1])
        except TransferError as error:
            self.counts[f"refused: {error}"[:60]] += 1
            request.is_released = True
            self._end(request)
            return
        transfer.on_pages_free = lambda transfer: self._look(request)
        transfer.on_poll = lambda transfer, poll: self._moved(request, poll)
        if "admitted" in (request.fate.client, getattr(request.fate, self.side)):
            transfer.abort("soak")
        elif request.fate.client == "later":
            heapq.heappush(self._later, (time.monotonic() + request.fate.later_s, id(request), request))
        self.endpoint.do(lambda: self._moved(request, transfer.poll()))

    def turn(self) -> None:
        """Give up those whose time has come. From the thread that admits."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            transfer = heapq.heappop(self._later)[2].transfer
            transfer.abort("soak")

    # -- from the endpoint's thread

    def _moved(self, request: Request, poll: KVPoll) -> None:
        if poll in request.seen or request.is_released:
            return
        request.seen.add(poll)
        try:
            if poll == KVPoll.WaitingForInput:
                self._give(request)
            elif poll in (KVPoll.Success, KVPoll.Failed):
                self._finish(request, poll)
        except TransferError as error:
            self.counts[f"refused: {error}"[:60]] += 1

    def _give(self, request: Request) -> None:
        transfer, moment, slot = request.transfer, getattr(request.fate, self.side), request.slot
        pages = range(slot * PAGES_EACH, (slot + 1) * PAGES_EACH)
        if moment == "waiting":
            transfer.abort("soak")
        elif self.side == "decode":
            self.counts["touched"] += not self.pages.is_untouched(slot)
            transfer.publish(pages, slot)
        else:
            self.pages.fill(slot, *request.pair)
            middle = PAGES_EACH // request.fate.chunks
            if middle < PAGES_EACH:
                transfer.send(pages[:middle])
                if moment == "sending":
                    transfer.abort("soak")
                    return
            transfer.send(pages[-middle:] if middle < PAGES_EACH else pages, last=True)
        if moment in ("sending", "published"):
            transfer.abort("soak")

    def _finish(self, request: Request, poll: KVPoll) -> None:
        transfer = request.transfer
        if poll == KVPoll.Success and self.side == "decode":
            self.counts["compared"] += 1
            pages = self.pages.found(request.slot, *request.pair)
            self._tell_found(request, pages)
            request.outcome = "ok" if all(pages) and transfer.aux() is not None else "corrupt"
            with contextlib.suppress(TransferError):  # given up in the moment before: then release gives it up
                transfer.commit()
        elif poll == KVPoll.Success:
            request.outcome = "ok"
        else:
            request.outcome = (transfer.failure or "failed").partition(":")[0]
            self.failed.append((*request.pair, request.outcome))
        request.is_released = True
        transfer.release()
        self._look(request)

    def _tell_found(self, request: Request, pages: list[bool]) -> None:
        """S5 judges what is in the memory. The endpoint's own event of the commit cannot say it: no engine tells it."""
        endpoint, source = self.endpoint, request.bootstrap
        contents = tuple(
            {source: PageTag(request.pair, source, part, 0)} if is_right else {} for part, is_right in enumerate(pages)
        )
        row = request.pair if request.transfer.aux() is not None else None
        own = Incarnation(*request.pair, endpoint.epoch)
        endpoint.host.emit(Committed(endpoint.host.now, endpoint.node, own, (source,), contents, row))

    def _look(self, request: Request) -> None:
        """Over is what was released and whose pages are free."""
        if request.is_released and request.transfer.pages_free:
            self.endpoint.do(self._end, request)  # after what ``release`` has posted

    def _end(self, request: Request) -> None:
        if request.is_over:
            return
        request.is_over = True
        self._live.pop(request.pair, None)
        if self.side == "decode":
            self.pages.note(request.slot)
        with self._lock:
            self._free.append(request.slot)
            following = self._waiting.popleft() if self._waiting else None
        self.over.append((*request.pair, request.outcome))
        if following is not None:
            self._begin(following)

    # -- what is left

    def stats(self) -> dict[str, Any]:
        """Sizes of everything that could grow."""
        endpoint = self.endpoint
        return {
            **process_stats(), "counts": dict(self.counts), "rooms": len(endpoint.rank.rooms),
            "transfers": len(endpoint.transfers), "slots_taken": SLOTS - len(self._free),
            "quarantined": endpoint.rank.quarantined_pages(), "violations": len(endpoint.violations),
            "defects": list(endpoint.host.loop.failed)[:3],
            "violated": [f"{v.invariant} {v.node} {v.pair}: {v.text}" for v in endpoint.violations[:5]],
        }  # fmt: skip

    def look_around(self) -> None:
        """Have ``survey`` and ``stats`` told. In the endpoint's thread, whose tables they are."""
        self.surveys.append({"survey": self.survey(), "gauges": self.gauges(), "stats": self.stats()})

    def gauges(self) -> dict[str, float | None]:
        """What ``/metrics`` says."""
        registry, node = self.endpoint.metrics.registry, self.endpoint.node
        return {name: registry.get_sample_value(name, {"node": node}) for name in GAUGES}

    def survey(self) -> dict[str, int]:
        """What a process that has nothing to do may not have."""
        rank = self.endpoint.rank
        tables = {
            "rooms": len(rank.rooms), "transfers": len(self.endpoint.transfers), "requests": len(rank.by_pair),
            "timers": rank.timers.armed(), "writes": len(self.endpoint.host.writes or ()),
            "slots": SLOTS - len(self._free), "waiting": len(self._waiting), "pages": rank.pages.in_use,
            "overdue": rank.timers.overdue(),
        }  # fmt: skip
        tables |= {"rows": rank.rows.in_use} if self.side == "decode" else {}
        return tables


def process_stats() -> dict[str, Any]:
    """Resident bytes, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"), "fds": len(list(Path("/proc/self/fd").iterdir())) - 1,
        "threads": threading.active_count(),
    }  # fmt: skip


def say(**what: Any) -> None:
    """One line."""
    print(json.dumps(what), flush=True)


def orders(limit_s: float, kept: bytearray) -> list[dict[str, Any]] | None:
    """The orders that arrive within the limit; None at the end of the input."""
    if not select.select([0], [], [], limit_s)[0]:
        return []
    data = os.read(0, 1 << 16)
    if not data:
        return None
    kept += data
    *lines, rest = kept.split(b"\n")
    kept[:] = rest
    return [json.loads(line) for line in lines]


def serve_rank(side: str, config: dict[str, Any]) -> None:
    """Run an endpoint until the input ends."""
    engine = Engine(side, config)
    say(ready=engine.endpoint.node, origin=engine.endpoint.host.loop.origin)
    kept, told_s = bytearray(), 0.0
    while (given := orders(TICK_S, kept)) is not None:
        for order in given:
            for request in order.get("admit", ()):
                engine.admit(*request)
            for pair in order.get("abort", ()):
                engine.give_up(*pair)
            if "survey" in order:
                engine.endpoint.do(engine.look_around)
        engine.turn()
        while engine.surveys:
            say(**engine.surveys.popleft())
        if engine.failed:
            say(failed=[engine.failed.popleft() for _ in range(len(engine.failed))])
        if engine.over:
            say(over=[engine.over.popleft() for _ in range(len(engine.over))])
        if time.monotonic() - told_s > STATS_S:
            told_s = time.monotonic()
            say(stats=engine.stats())
    engine.endpoint.close()


def serve_bootstrap(port: int) -> None:
    """Run a bootstrap server until the input ends."""
    protocol = load()
    server = BootstrapServer(protocol, protocol.profile("reference"), port=port)
    server.start()
    say(ready=server.address, origin=0.0)
    kept, told_s, listed = bytearray(), 0.0, 0
    while (given := orders(LISTED_S, kept)) is not None:
        if len(server.table) != listed:
            listed = len(server.table)
            say(listed=listed)
        if given or time.monotonic() - told_s > STATS_S:
            told_s = time.monotonic()
            say(stats=process_stats(), **({"survey": {}} if any("survey" in order for order in given) else {}))
    server.close()


def main(kind: str, config: str) -> None:
    """One process."""
    logging.disable(logging.ERROR)  # a fault a second is what this is for
    if kind == "server":
        serve_bootstrap(int(config))
    else:
        serve_rank(kind, json.loads(config))


if __name__ == "__main__":
    main(*sys.argv[1:])
