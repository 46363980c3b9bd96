"""A bootstrap server in a process of its own: late, stopped, killed, and restarted without its memory (C1, C5)."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvpoll.runtime.bootstrap import BootstrapClient, Endpoint, RankInfo, Reply
from kvpoll.spec.protocol import load

WAIT_S = 60.0
PROFILE = load().profile("reference")
RUN = "import sys; from kvpoll.commands import verbs; verbs.VERBS['serve'] = 'serve'; sys.exit(verbs.perform(sys.argv[1:]))"


def rank(tp: int) -> RankInfo:
    return RankInfo("127.0.0.1", 30000 + tp, 16, "bfloat16", attn_tp_size=2, attn_tp_rank=tp, process_epoch=1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(port: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process, which listens, and the epoch that it announced."""
    command = [sys.executable, "-P", "-c", RUN, "serve", "--port", str(port), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["epoch"]
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_is_late_killed_and_restarted_without_its_memory() -> None:
    port = free_port()
    client = BootstrapClient(f"127.0.0.1:{port}", PROFILE)
    assert client.register(rank(0)) == Reply("refused"), "sglang#25125: the rank is up before its server"
    with serving(port) as (process, first):
        assert client.register(rank(0)) == client.register(rank(1)) == Reply(200, first)
        assert client.topology().body.server_epoch == first
        process.kill()
        process.wait(WAIT_S)
        assert client.health() == Reply("refused")
    with serving(port) as (_, second):
        assert second > first
        assert client.health() == Reply(200, second), "health alone says 200; the epoch says that it is another life"
        assert client.topology().status == 503
        assert client.register(rank(0)) == client.register(rank(1)) == Reply(200, second)
        assert client.topology().status == 200
    client.close()


def test_a_stopped_server_does_later_what_nobody_waited_for_and_counts_it_once() -> None:
    """C1: the answer came too late, the rank tries again, and SGLang's server would now be ready with one rank."""
    port = free_port()
    hurried = BootstrapClient(f"127.0.0.1:{port}", PROFILE.with_rules({"http_timeout_s": 0.5}))
    patient = BootstrapClient(f"127.0.0.1:{port}", PROFILE.with_rules({"http_timeout_s": WAIT_S}))
    with serving(port) as (process, _):
        process.send_signal(signal.SIGSTOP)
        assert hurried.register(rank(0)) == Reply("timeout")
        process.send_signal(signal.SIGCONT)
        assert patient.register(rank(0)).status == 200
        assert patient.topology().status == 503
        assert patient.register(rank(1)).status == 200
        assert patient.endpoint(0, 0, 0, 0) == Reply(200, Endpoint("127.0.0.1", 30000, 1))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    hurried.close()
    patient.close()


def test_a_client_that_is_idle_does_not_hold_up_the_end() -> None:
    port = free_port()
    with serving(port) as (process, _), socket.create_connection(("127.0.0.1", port), WAIT_S) as idle:
        idle.sendall(b"PUT /route HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        began_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        assert time.monotonic() - began_s < WAIT_S / 2, "bounded, and far below any client's patience"
