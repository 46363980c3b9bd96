"""One endpoint in a process of its own, for the stories of ``test_endpoint_processes``.

``python endpoint_rank.py prefill|decode ADDRESS SETTINGS`` serves one JSON order a line and answers each with one line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kvpoll.runtime import DecodeEndpoint, KVPoll, Layout, PrefillEndpoint, Settings

PAGES = 64
LAYOUT = Layout((0,), pages=64, page_tokens=16, heads=8, head_dim=256, dtype="bfloat16", rows=4)
"""Pages of 64 KiB in two planes: 8 MiB, more than one frame of tcp and one piece of shm."""

PREFILLS, UNTOUCHED = 0xAB, 0x11
LIMIT_S = 60.0


def fill(pool: Any, pages: range, value: int) -> None:
    """Every byte of these pages."""
    for page in pages:
        for layer, part in LAYOUT.planes:
            pool.page_view(layer, part, page)[:] = value


def count(pool: Any, pages: range, value: int) -> int:
    """How many bytes of these pages have this value."""
    return sum(int((pool.page_view(*plane, page) == value).sum()) for page in pages for plane in LAYOUT.planes)


class Rank:
    """The endpoint and its transfers, by room."""

    def __init__(self, role: str, address: str, settings: dict[str, Any]) -> None:
        self.address = address
        self.transfers: dict[int, Any] = {}
        if role == "prefill":
            self.endpoint: Any = PrefillEndpoint(Settings(LAYOUT, bootstrap=address, **settings))
            self.endpoint.wait_registered(LIMIT_S)
            fill(self.endpoint.pool, range(PAGES), PREFILLS)
        else:
            self.endpoint = DecodeEndpoint(Settings(LAYOUT, name="D", **settings))

    def admit(self, room: int) -> None:
        to = (room,) if isinstance(self.endpoint, PrefillEndpoint) else (room, self.address)
        self.transfers[room] = self.endpoint.admit(*to)

    def send(self, room: int) -> int:
        reached = self.transfers[room].wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S)
        self.transfers[room].send(list(range(PAGES)), last=True, first_token=room)
        return int(reached)

    def publish(self, room: int) -> int:
        reached = self.transfers[room].wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S)
        self.transfers[room].publish(list(range(PAGES)), 0)
        return int(reached)

    def end(self, room: int) -> dict[str, Any]:
        """How it ended, once its pages are free."""
        transfer = self.transfers.pop(room)
        poll = transfer.wait(timeout_s=LIMIT_S)
        transfer.release()
        free = transfer.wait_pages_free(LIMIT_S)
        health = self.endpoint.health()
        return {"poll": int(poll), "failure": transfer.failure, "free": free, "defects": health["defects"]}

    def close(self) -> bool:
        self.endpoint.close()
        return True


def main(role: str, address: str, settings: str) -> None:
    """Serve orders until standard input ends."""
    rank = Rank(role, address, json.loads(settings))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(getattr(rank, verb)(*arguments)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
