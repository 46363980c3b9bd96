"""Endpoints in processes that are really stopped, killed and started again, while bytes are really under way.

One side is a child process, the other lives here, where its memory can be looked into. The writer is slowed down, so
that a write is long enough to be struck in its middle.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint_rank import LAYOUT, LIMIT_S, PAGES, PREFILLS, UNTOUCHED, count, fill

from kvpoll.runtime import BootstrapServer, DecodeEndpoint, KVPoll, PrefillEndpoint, Settings, TransferError
from kvpoll.spec.protocol import load

HERE = Path(__file__).parent
SLOW = {"bytes_per_s": 4 << 20}
RULES = {"heartbeat_interval_s": 0.3, "drain_timeout_s": 0.5, "topology_retry_s": 0.2, "register_backoff_first_s": 0.1}
ALL = range(PAGES)


def until(holds: Callable[[], Any], what: str) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > end_s:
            raise TimeoutError(what)
        time.sleep(0.01)


class Child:
    """An endpoint in another process."""

    def __init__(self, role: str, address: str, **settings: Any) -> None:
        given = json.dumps({"rules": RULES, **settings})
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "endpoint_rank.py"), role, address, given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def ask(self, verb: str, *arguments: Any) -> Any:
        self.tell(verb, *arguments)
        return self._answer()

    def tell(self, verb: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> Any:
        """Its next line; a child that says nothing for a minute is killed, and the test fails."""
        assert self.process.stdout is not None
        timer = threading.Timer(LIMIT_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            raise RuntimeError("the child has ended")
        return json.loads(line)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    protocol = load()
    with BootstrapServer(protocol, protocol.profile("reference"), port=0) as made:
        yield made


def published(decode: DecodeEndpoint, server: BootstrapServer, room: int) -> Any:
    transfer = decode.admit(room, server.address)
    assert transfer.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, transfer.failure
    transfer.publish(list(ALL), row=0)
    return transfer


def struck(child: Child, decode: DecodeEndpoint, server: BootstrapServer, room: int) -> Any:
    """A request whose writer is stopped in the middle of its write."""
    fill(decode.pool, ALL, UNTOUCHED)
    child.ask("admit", room)
    transfer = published(decode, server, room)
    assert child.ask("send", room) == KVPoll.WaitingForInput
    until(lambda: count(decode.pool, ALL, PREFILLS), "the first bytes")
    child.signal(signal.SIGSTOP)
    written = count(decode.pool, ALL, PREFILLS)
    assert written < PAGES * LAYOUT.page_bytes * 2, "some bytes are still to come"
    return transfer


def served(child: Child, decode: DecodeEndpoint, server: BootstrapServer, room: int) -> None:
    fill(decode.pool, ALL, UNTOUCHED)
    child.ask("admit", room)
    transfer = published(decode, server, room)
    child.ask("send", room)
    assert transfer.wait(timeout_s=LIMIT_S) == KVPoll.Success, transfer.failure
    assert count(decode.pool, ALL, PREFILLS) == PAGES * LAYOUT.page_bytes * 2
    said = transfer.aux()
    assert said is not None and said.first_token == room
    transfer.release()
    assert transfer.wait_pages_free(LIMIT_S)
    assert child.ask("end", room) == {"poll": KVPoll.Success, "failure": None, "free": True, "defects": []}


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_pages_under_a_stopped_writer_are_kept_until_it_is_proven_quiet(
    server: BootstrapServer, end: signal.Signals
) -> None:
    """shm: the writer itself puts the bytes there, so nothing but its word, or its death, gives the pages back (A01)."""
    child = Child("prefill", server.address, options=SLOW)
    settings = Settings(LAYOUT, name="D", rules=RULES, monitored=True)
    try:
        with DecodeEndpoint(settings) as decode:
            transfer = struck(child, decode, server, 1)
            transfer.abort("client left")
            assert transfer.wait(timeout_s=LIMIT_S) == KVPoll.Failed and transfer.failure == "client left"
            transfer.release()
            # Twice drain_timeout_s, and longer than suspicion takes: a timer is no proof.
            assert not transfer.wait_pages_free(1.5) and not transfer.is_over
            assert decode.health()["quarantined_pages"] == PAGES
            assert f'kvpoll_pages_quarantined{{node="D"}} {PAGES}.0' in decode.metrics.text().decode()
            heir = decode.admit(2, server.address)
            if heir.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput:
                with pytest.raises(TransferError, match="page 0 is still held by room 1"):
                    heir.publish([0], 1)
            heir.release()
            assert not decode.drain(0.1)
            child.signal(end)
            assert transfer.wait_pages_free(LIMIT_S)
            fill(decode.pool, ALL, UNTOUCHED)
            if end == signal.SIGCONT:
                ended = child.ask("end", 1)
                assert ended["free"] and ended["poll"] == KVPoll.Failed
            assert count(decode.pool, ALL, UNTOUCHED) == PAGES * LAYOUT.page_bytes * 2, "no byte came after that"
            until(lambda: transfer.is_over, "its end")
            assert decode.health()["quarantined_pages"] == 0 and decode.violations == []
    finally:
        child.kill()


def test_where_decode_places_the_bytes_its_refusal_is_the_proof(server: BootstrapServer) -> None:
    """tcp: the pages come back although the writer is stopped, are used again, and what it sends later changes nothing."""
    child = Child("prefill", server.address, transport="tcp", options=SLOW)
    settings = Settings(LAYOUT, name="D", transport="tcp", rules=RULES, monitored=True)
    try:
        with DecodeEndpoint(settings) as decode:
            transfer = struck(child, decode, server, 1)
            transfer.abort("client left")
            assert transfer.wait(timeout_s=LIMIT_S) == KVPoll.Failed
            transfer.release()
            assert transfer.wait_pages_free(LIMIT_S), "fenced"
            fill(decode.pool, ALL, UNTOUCHED)
            child.signal(signal.SIGCONT)
            ended = child.ask("end", 1)
            assert ended["poll"] == KVPoll.Failed and ended["free"]
            assert count(decode.pool, ALL, UNTOUCHED) == PAGES * LAYOUT.page_bytes * 2
            served(child, decode, server, 3)
            transfer = struck(child, decode, server, 4)
            child.kill()
            assert transfer.wait(timeout_s=LIMIT_S) == KVPoll.Failed, "nobody aborts; the writer is not there any more"
            transfer.release()
            assert transfer.wait_pages_free(LIMIT_S)
            assert decode.violations == [] and decode.health()["quarantined_pages"] == 0
    finally:
        child.kill()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_prefill_has_its_pages_back_from_a_decode_that_was_killed(server: BootstrapServer, transport: str) -> None:
    settings = Settings(
        LAYOUT, bootstrap=server.address, transport=transport, options=SLOW, rules=RULES, monitored=True
    )
    with PrefillEndpoint(settings) as prefill:
        prefill.wait_registered(LIMIT_S)
        child = Child("decode", server.address, transport=transport)
        try:
            transfer = prefill.admit(1)
            child.ask("admit", 1)
            child.ask("publish", 1)
            assert transfer.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
            transfer.send(list(ALL), last=True)
            until(lambda: transfer.poll() == KVPoll.Transferring, "the write")
            assert not transfer.pages_free
        finally:
            child.kill()
        assert transfer.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert (transfer.failure or "").startswith(("decode_lost", "transfer_error"))
        transfer.release()
        assert transfer.wait_pages_free(LIMIT_S)
        assert prefill.health()["ok"] and prefill.violations == []


def test_a_prefill_that_is_back_at_its_address_is_another_life(server: BootstrapServer) -> None:
    """Killed in the middle of a write; its successor registers at the same server, and requests go on (A20, A21)."""
    first = Child("prefill", server.address, options=SLOW)
    second = None
    try:
        with DecodeEndpoint(Settings(LAYOUT, name="D", rules=RULES, monitored=True)) as decode:
            transfer = struck(first, decode, server, 1)
            first.kill()
            second = Child("prefill", server.address)
            assert transfer.wait(timeout_s=LIMIT_S) == KVPoll.Failed and transfer.failure == "prefill_lost"
            assert transfer.wait_pages_free(LIMIT_S)
            transfer.release()
            served(second, decode, server, 2)
            assert second.ask("close")
            assert decode.drain(LIMIT_S) and decode.violations == []
    finally:
        first.kill()
        if second is not None:
            second.kill()


def test_the_toy_engine_runs_as_its_page_says() -> None:
    example = HERE.parents[1] / "examples" / "toy_engine.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80
    ran = subprocess.run([sys.executable, "-P", str(example)], capture_output=True, text=True, timeout=120)
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        "decode 101: 2 pages right, tokens [31, 32, 33, 34]",
        "decode 102: 1 pages right, tokens [18, 19, 20, 21]",
        "decode 103: 3 pages right, tokens [12, 13, 14, 15]",
        "decode 104: Failed (the client left)",
        "prefill 101: Success (all sent)",
        "prefill 102: Success (all sent)",
        "prefill 103: Success (all sent)",
        "prefill 104: Failed (aborted_by_decode)",
    ]
