"""A real bootstrap server in a thread, and the requests that SGLang's ranks send to it, for the tests beside this file."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests

from kvpoll.runtime.bootstrap import BootstrapServer, RankInfo
from kvpoll.spec.protocol import Profile, load

PROTOCOL = load()
REFERENCE = PROTOCOL.profile("reference")
SGLANG = PROTOCOL.profile("sglang-0.5.23")
WAIT_S = 20.0
HURRIED = REFERENCE.with_rules({"http_timeout_s": 0.3})


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def server(profile: Profile = REFERENCE, **options: Any) -> BootstrapServer:
    """A server on any free port of the loopback address; use it as a context manager."""
    return BootstrapServer(PROTOCOL, profile, port=0, **options)


def rank(tp: int = 0, tp_size: int = 2, **fields: Any) -> RankInfo:
    """One tensor-parallel rank of a small engine."""
    given: dict[str, Any] = {
        "rank_ip": "127.0.0.1", "rank_port": 30000 + tp, "page_size": 16, "kv_cache_dtype": "bfloat16",
        "attn_tp_size": tp_size, "attn_tp_rank": tp, **fields,
    }  # fmt: skip
    return RankInfo(**given)


def ask(target: BootstrapServer, method: str, path: str, **options: Any) -> requests.Response:
    """One request, without our client in between."""
    return requests.request(method, f"http://{target.address}{path}", timeout=WAIT_S, **options)


def put(target: BootstrapServer, info: RankInfo, **extra: Any) -> requests.Response:
    return ask(target, "PUT", "/route", json={**info.as_json(), **extra})


def route(target: BootstrapServer, tp: int = -1, **others: int) -> requests.Response:
    """GET /route as SGLang asks; -1 asks for the engine."""
    rest = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_pp_rank"), min(tp, 0))
    return ask(target, "GET", "/route", params={**rest, "target_tp_rank": tp, **others})


def leave(target: BootstrapServer, tp: int, epoch: int | None = None) -> requests.Response:
    """DELETE /route of one rank."""
    place = {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": tp, "target_pp_rank": 0}
    return ask(target, "DELETE", "/route", params=place if epoch is None else {**place, "process_epoch": epoch})


def gauges(target: BootstrapServer) -> dict[str, float]:
    """What /metrics says, by name with labels."""
    lines = ask(target, "GET", "/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for something that must happen."""
    end_s = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > end_s:
            raise TimeoutError(what)
        time.sleep(0.005)


@contextmanager
def answering(*parts: bytes, gap_s: float = 0.0) -> Iterator[str]:
    """The address of a server that sends these bytes to everyone, with a pause before each part but the first.

    Without parts it takes connections and never answers (A19).
    """
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    def answer(peer: socket.socket) -> None:
        try:
            with peer:
                if parts:
                    peer.recv(65536)
                for number, part in enumerate(parts):
                    if number and over.wait(gap_s):
                        return
                    peer.sendall(part)
                if not parts:
                    over.wait()
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()
