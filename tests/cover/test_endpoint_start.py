"""How an endpoint starts and ends: bad input in one line, and nothing left behind, whatever happened."""

from __future__ import annotations

import gc
import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bootstrap_stage import answering
from endpoint_stage import LAYOUT, LIMIT_S, PROTOCOL, REFERENCE, SOON, Stage, over, until

from kvpoll.runtime import (
    BootstrapServer,
    DecodeEndpoint,
    KVPoll,
    KVPool,
    Layout,
    PrefillEndpoint,
    Settings,
    Sizes,
    TransferError,
)
from kvpoll.runtime.transports.memory import Fabric
from kvpoll.spec.source import BadInput


def belongings() -> tuple[set[str], set[str]]:
    """Threads and open files of this process, by what they are."""
    gc.collect()
    files = set()
    for file in Path("/proc/self/fd").iterdir():
        try:
            files.add(f"{file.name} {file.readlink()}")
        except OSError:
            continue
    return {f"{thread.name} {thread.ident}" for thread in threading.enumerate()}, files


@contextmanager
def nothing_left() -> Iterator[None]:
    """What runs here leaves no thread and no open file."""
    before = belongings()
    yield
    left: list[Any] = []

    def is_gone() -> bool:
        after = belongings()
        left[:] = [after[0] - before[0], after[1] - before[1]]
        return not any(left)

    try:
        until(is_gone, "everything being gone")
    except TimeoutError:
        raise AssertionError(f"left behind: {left}") from None


def settings(**given: Any) -> Settings:
    return Settings(**{"layout": LAYOUT, "transport": "memory", "options": {"fabric": Fabric()}, **given})


TWO = replace(LAYOUT, tp_rank=1, tp_size=2)
OTHER_POOL = KVPool.on_host(Layout((0,), pages=1, page_tokens=4, heads=2, head_dim=16, rows=1))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"profile": "referense"}, "did you mean 'reference'"),
        ({"rules": {"waiting_timeouts": 3}}, "did you mean 'waiting_timeout_s'"),
        ({"rules": {"waiting_timeout_s": "soon"}}, "waiting_timeout_s is a number of seconds and not negative, got 'soon'"),
        ({"rules": {"waiting_timeout_s": float("inf")}}, "got inf"),
        ({"rules": {"identity": "romo"}}, "identity has no value 'romo' (did you mean 'room'?)"),
        ({"transport": "shn", "options": {}}, "there is no transport 'shn' (did you mean 'shm'?)"),
        ({"transport": "tcp", "options": {"line": 2}}, "the transport tcp has no option 'line'"),
        ({"transport": "tcp", "options": {"host": "192.0.2.1"}}, "tcp: cannot listen on 192.0.2.1"),
        ({"transport": "mooncake", "options": {}}, "mooncake"),
        ({"port": 70_000}, "port 70000 does not exist"),
        ({"host": "192.0.2.1"}, "cannot listen here"),
        ({"host": "0.0.0.0"}, "no address to answer to"),
        ({"layout": replace(LAYOUT, rows=0)}, "no aux rows"),
        ({"layout": TWO}, "TP rank 1 of 2, the endpoint of TP rank 0 of 1"),
        ({"layout": TWO, "tp": 1}, "tp rank 1 does not exist where the tp size is 1"),
        ({"sizes": Sizes(dp=0)}, "dp size 0"),
        ({"layout": replace(LAYOUT, tp_size=2), "sizes": Sizes(tp=2)}, "an engine of 2 ranks needs an epoch"),
        ({"destinations": 0}, "destinations is 0"),
        ({"pool": OTHER_POOL}, "another layout"),
        ({"secret": b""}, "the token has 0 bytes"),
        ({"secret": b"x" * 65}, "the token has 65 bytes"),
        ({"epoch": -1}, "epoch -1"),
        ({"trace": Path("/nowhere/at/all.jsonl")}, "the trace cannot be written"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_what_cannot_be_is_one_line_and_leaves_nothing(side: str, given: dict[str, Any], says: str) -> None:
    if given.get("transport") == "mooncake" and importlib.util.find_spec("mooncake") is not None:
        pytest.skip("mooncake is installed here, so it is not missing")
    with nothing_left(), pytest.raises(BadInput) as caught:
        made = PrefillEndpoint if side == "prefill" else DecodeEndpoint
        made(settings(**({"bootstrap": "127.0.0.1:9"} if side == "prefill" else {}), **given))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "bootstrap server is not given"),
        ({"bootstrap": "nowhere"}, "nowhere"),
        ({"bootstrap": "127.0.0.1:99999"}, "99999"),
        ({"bootstrap": "http://127.0.0.1:8998"}, "has a slash"),
        ({"bootstrap": "127.0.0.1:9", "name": "mine"}, "named by its bootstrap address"),
    ],
)
def test_a_prefill_endpoint_needs_the_address_of_its_server(given: dict[str, Any], says: str) -> None:
    with nothing_left(), pytest.raises(BadInput, match=says):
        PrefillEndpoint(settings(**given))


def test_a_decode_endpoint_has_a_name_of_its_own() -> None:
    with pytest.raises(BadInput, match="'a/b' has a slash"):
        DecodeEndpoint(settings(name="a/b"))
    with pytest.raises(BadInput, match="bootstrap is for prefill"):
        DecodeEndpoint(settings(bootstrap="127.0.0.1:9"))
    with pytest.raises(BadInput, match="shorten it"):
        DecodeEndpoint(settings(name="n" * 1000))
    with DecodeEndpoint(settings()) as one, DecodeEndpoint(settings()) as other:
        assert one.node != other.node, "two in one process are not one in two lives"


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, nothing_left():
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"{port}: cannot listen here: Address already in use; choose another port"):
            DecodeEndpoint(settings(port=port))
        with DecodeEndpoint(settings()) as decode:
            with pytest.raises(BadInput, match=f"metrics: cannot listen on 127.0.0.1:{port}"):
                decode.serve_metrics(port)
            with pytest.raises(BadInput, match="port 65536 does not exist"):
                decode.serve_metrics(65_536)


def test_a_pool_that_is_too_small() -> None:
    from kvpoll.runtime.transports.shm import allocate

    with pytest.raises(BadInput, match=r"bytes are too few for the layout, which takes \d+; give more memory"):
        KVPool.on_host(LAYOUT, allocate(LAYOUT.total_bytes - 1))


def test_a_server_that_is_not_there() -> None:
    with nothing_left():
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        with PrefillEndpoint(settings(bootstrap=address)) as prefill:
            with pytest.raises(
                BadInput, match=f"{address}: this rank is not registered after 0.1 s .*start the server"
            ):
                prefill.wait_registered(0.1)
            assert not prefill.health()["ok"] and prefill.health()["state"] == "registering"
        with DecodeEndpoint(settings()) as decode, pytest.raises(BadInput, match=f"{address}: no topology .refused"):
            decode.check(address)


def test_a_server_that_never_answers_delays_only_its_own_requests() -> None:
    """It takes connections and is silent (A19). Other requests go on, and close does not wait for it."""
    with Stage() as stage, answering() as silent:
        stuck = stage.decode.admit(1, silent)
        stage.served(room=2)
        assert stuck.poll() == KVPoll.Bootstrapping
        began = time.monotonic()
        stage.decode.close()
        assert time.monotonic() - began < 15, "bounded; the silent server would have held it for http_timeout_s each"
        assert stuck.poll() == KVPoll.Failed and stuck.failure == "endpoint_closed"


def test_a_wrong_token_is_said_at_once() -> None:
    with nothing_left(), BootstrapServer(PROTOCOL, REFERENCE, port=0, token="right") as server:
        with (
            PrefillEndpoint(settings(bootstrap=server.address, token="wrong")) as prefill,
            pytest.raises(BadInput, match=r"may not register .*401.*; give the server's token"),
        ):
            prefill.wait_registered(LIMIT_S)
        with PrefillEndpoint(settings(bootstrap=server.address, token="right")) as prefill:
            prefill.wait_registered(LIMIT_S)


def test_another_secret_is_a_stranger() -> None:
    """Decode's metadata is dropped and counted; decode hears nothing, and says whom it lost. No timer of a minute."""
    with Stage(rules=SOON, prefill={"secret": b"one"}, decode={"secret": b"other"}) as stage:
        source, target = stage.admit()
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed or target.poll() == KVPoll.WaitingForInput
        if target.poll() == KVPoll.WaitingForInput:
            target.publish([1], 0)
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert (target.failure or "").startswith(("prefill_lost", "topology", "route"))
        assert sum(stage.prefill.dropped.values()) > 0
        source.abort()


@pytest.mark.parametrize(
    ("decode", "says"),
    [
        (replace(LAYOUT, page_tokens=8), "page size differs: prefill has 4 tokens, decode has 8; start both"),
        (replace(LAYOUT, dtype="float16"), "KV dtype differs: prefill has bfloat16, decode has float16; start both"),
    ],
)
def test_sides_that_do_not_fit_are_told_before_and_at_run_time(decode: Layout, says: str) -> None:
    with Stage(decode={"layout": decode}) as stage:
        with pytest.raises(BadInput, match=f"{stage.address}: {says}"):
            stage.decode.check(stage.address)
        _, target = stage.admit()
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert (target.failure or "").startswith(f"topology_mismatch: {says}")


def test_topologies_that_do_not_fit() -> None:
    three = replace(LAYOUT, heads=6, tp_size=3, tp_rank=2)
    two = replace(LAYOUT, heads=6, tp_size=2)
    with Stage(
        prefill={"layout": two, "sizes": Sizes(tp=2), "epoch": 1},
        decode={"layout": three, "sizes": Sizes(tp=3), "tp": 2, "epoch": 1},
    ) as stage:
        until(lambda: stage.prefill.rank.standing()[0], "the one rank being registered")
        other = PrefillEndpoint(
            settings(bootstrap=stage.address, layout=replace(two, tp_rank=1), sizes=Sizes(tp=2), tp=1, epoch=1)
        )
        with other:
            other.wait_registered(LIMIT_S)
            with pytest.raises(BadInput, match="TP sizes do not fit: prefill has 2, decode has 3; one must divide"):
                stage.decode.check(stage.address)
            _, target = stage.admit()
            assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
            assert "TP sizes do not fit" in (target.failure or "")


@pytest.mark.parametrize(
    ("decode", "says"),
    [
        (replace(LAYOUT, heads=4), "number of KV heads differs: prefill has 2, decode has 4"),
        (replace(LAYOUT, order="HND"), "page order differs"),
        (replace(LAYOUT, layers=(0,)), "layers differ: decode lacks layer 1"),
        (replace(LAYOUT, row_bytes=128), "aux row size"),
    ],
)
def test_layouts_that_do_not_fit_fail_the_request_before_its_kv_is_computed(decode: Layout, says: str) -> None:
    """No server knows these; prefill sees them in decode's metadata, and both sides say why."""
    with Stage(decode={"layout": decode}) as stage:
        source, target = stage.admit()
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        target.publish([1], 0)
        assert source.wait(timeout_s=LIMIT_S) == target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert (source.failure or "").startswith(f"layout_mismatch: {says}")
        assert (target.failure or "").startswith(f"failed_by_prefill: layout_mismatch: {says}")
        over(source, target)
        early = stage.decode.admit(900, stage.address)
        assert early.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        early.publish([2], 1)
        until(lambda: 900 in stage.prefill.rank.rooms, "the metadata being there before its request")
        late = stage.prefill.admit(900)
        assert late.wait(timeout_s=LIMIT_S) == KVPoll.Failed and says in (late.failure or "")
        over(late, early)


def test_sides_of_different_transports() -> None:
    with Stage(decode={"transport": "tcp", "options": {}}) as stage:
        source, target = stage.admit()
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        target.publish([1], 0)
        assert source.wait(timeout_s=LIMIT_S) == target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert (target.failure or "").startswith("failed_by_prefill: layout_mismatch: memory:")


# -- the end


@pytest.mark.parametrize("transport", ["memory", "shm", "tcp"])
def test_what_was_used_and_closed_leaves_nothing(transport: str) -> None:
    with nothing_left():
        given: dict[str, Any] = {} if transport == "memory" else {"transport": transport}
        with Stage(**given) as stage:
            stage.served()
            port = stage.decode.serve_metrics(0)
            with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as reader:
                reader.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                assert b"200" in reader.recv(64)
        del stage


def test_close_tells_the_peers_and_ends_what_was_under_way() -> None:
    """Decode hears at once that prefill is gone, each room with its cause; nobody waits for a timer."""
    with Stage(moving=False) as stage:
        source, target = stage.ready()
        waiting = stage.prefill.admit(60)
        source.send([0], last=False)
        until(lambda: source.poll() == KVPoll.Transferring, "the write being posted")
        stage.moving = True
        stage.prefill.close()
        stage.prefill.close()
        assert source.poll() == waiting.poll() == KVPoll.Failed
        assert source.failure == waiting.failure == "endpoint_closed"
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert target.failure in ("failed_by_prefill: endpoint_closed", "prefill_lost")
        assert target.wait_pages_free(LIMIT_S)
        for call in (lambda: stage.prefill.admit(61), lambda: source.endpoint.claim(source, [("page", 9)])):
            with pytest.raises(TransferError, match="is closed"):
                call()
        source.release()
        waiting.abort()
        assert stage.prefill.health()["state"] == "closed" and not stage.prefill.health()["ok"]
        with pytest.raises(BadInput, match=r"no topology .404|no topology .503"):
            stage.decode.check(stage.address)


def test_goodbye_frees_what_its_peer_kept_in_quarantine() -> None:
    """The acknowledgement of an abort is lost, so decode keeps the pages; prefill drains, and says goodbye."""
    with Stage(moving=False, rules={**SOON, "heartbeat_interval_s": 30}) as stage:
        source, target = stage.ready()
        source.send([0, 1], last=True)
        until(lambda: source.poll() == KVPoll.Transferring, "the write being posted")
        send = stage.prefill.host.send
        stage.prefill.host.send = lambda node, to, message, *rest: (  # type: ignore[method-assign]
            None if message == "AbortAck" else send(node, to, message, *rest)
        )
        target.abort("client left")
        assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        target.release()
        stage.moving = True
        assert source.wait_pages_free(LIMIT_S)
        source.release()
        assert not target.wait_pages_free(1.0), "nothing proves to decode that the writer is quiet"
        assert stage.decode.health()["quarantined_pages"] == 2 and not target.is_over
        assert not stage.decode.drain(0.05), "and it cannot say that it is drained"
        assert stage.prefill.drain(LIMIT_S)
        stage.prefill.close()
        assert target.wait_pages_free(LIMIT_S), "Goodbye is the proof"
        assert stage.decode.health()["quarantined_pages"] == 0
        assert stage.decode.drain(LIMIT_S)


def test_drain_lets_requests_finish_and_takes_no_more() -> None:
    with Stage(moving=False) as stage:
        source, target = stage.ready()
        source.send([0, 1], last=True)
        assert not stage.prefill.drain(0.05)
        assert stage.prefill.health()["state"] == "draining" and not stage.prefill.health()["ok"]
        with pytest.raises(TransferError, match="is draining"):
            stage.prefill.admit(7)
        until(lambda: _unlisted(stage), "the server not listing it any more")
        stage.moving = True
        assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
        source.release()
        target.release()
        assert stage.prefill.drain(LIMIT_S) and stage.decode.drain(LIMIT_S)


def _unlisted(stage: Stage) -> bool:
    try:
        stage.decode.check(stage.address)
    except BadInput:
        return True
    return False


def test_a_draining_rank_is_not_listed_again_when_the_server_restarts() -> None:
    with Stage(rules=SOON) as stage:
        source, target = stage.ready()
        stage.prefill.drain(0.0)
        until(lambda: _unlisted(stage), "the server not listing it any more")
        port = stage.server.port
        stage.server.close()
        with BootstrapServer(PROTOCOL, REFERENCE, port=port) as stage.server:
            watched = threading.Event()
            stage.prefill.host.loop.post(stage.prefill.host.after, 1.5, watched.set)
            assert watched.wait(LIMIT_S), "several rounds of probes of the server"
            assert _unlisted(stage)
            source.send([0, 1], last=True)
            assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
            over(source, target)
            assert stage.prefill.drain(LIMIT_S)


def test_a_server_that_forgot_everything_is_registered_with_again() -> None:
    """It starts late, then is restarted with an empty table: the rank comes back by itself, requests go on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fabric = Fabric()
    quick = {"rules": {**SOON, "register_backoff_first_s": 0.05}, "options": {"fabric": fabric}}
    with PrefillEndpoint(settings(bootstrap=f"127.0.0.1:{port}", **quick)) as prefill:
        until(lambda: prefill.host.last_answer is not None, "a first refusal")
        assert not prefill.health()["ok"]
        for _ in range(2):
            with BootstrapServer(PROTOCOL, REFERENCE, port=port), DecodeEndpoint(settings(**quick)) as decode:
                until(lambda: not _refused(decode, f"127.0.0.1:{port}"), "its being listed")
                target = decode.admit(5, f"127.0.0.1:{port}")
                assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
                target.release()


def _refused(decode: DecodeEndpoint, address: str) -> bool:
    try:
        decode.check(address)
    except BadInput:
        return True
    return False


def test_without_the_extra_the_package_imports_and_one_line_says_what_to_install() -> None:
    told = subprocess.run(
        [sys.executable, "-P", "-c", (
            "import sys\n"
            "sys.modules['zmq'] = None\n"
            "import kvpoll, kvpoll.runtime\n"
            "print(kvpoll.load().digest != '')\n"
            "try:\n"
            "    from kvpoll.runtime import PrefillEndpoint\n"
            "except ImportError as error:\n"
            "    print(error)\n"
        )],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    first, second = told.stdout.splitlines()
    assert first == "True"
    assert second == "kvpoll.runtime.PrefillEndpoint needs zmq, which is not installed: pip install 'kvpoll[runtime]'"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        import kvpoll.runtime

        kvpoll.runtime.Nothing  # noqa: B018
