"""shm between real processes that fork: a child must not stand between its parent's death and the owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvpoll.runtime.transports import measure, shm_wire
from kvpoll.runtime.transports.shm import ShmTransport, allocate, as_array

WRITER = """
    import os, sys, time
    import numpy as np
    from kvpoll.runtime.transports.interface import Copies, Tag
    from kvpoll.runtime.transports.shm import ShmTransport, allocate
    from kvpoll.spec.vocabulary import Incarnation

    made = ShmTransport("prefill0", 1, lambda: None, lambda *life: None)
    pool = allocate(1 << 16)
    made.register([pool])
    peer = made.connect(bytes.fromhex(sys.argv[1]), "decode0", 1)
    copies = Copies(*(np.array([n]) for n in (0, 0, 1 << 16)))
    handle = made.post(peer, copies, Tag(Incarnation(1, 0, 1), 1))
    while made.poll(handle).state == "pending":
        time.sleep(0.005)
    assert made.poll(handle).state == "done", made.poll(handle)
    child = os.fork()
    if child == 0:
        with open("/proc/self/maps") as maps:
            pools = [line for line in maps if "memfd:decode-pool" in line]
        os.write(1, f"child {len(pools)} {os.getpid()}\\n".encode())
        time.sleep(600)
        os._exit(0)
    time.sleep(600)
"""


class Owner:
    def __init__(self) -> None:
        self.deaths: list[tuple[str, int]] = []
        self.transport = ShmTransport("decode0", 1, lambda: None, lambda *life: self.deaths.append(life))
        self.pool = allocate(1 << 16, name="decode-pool")
        as_array(self.pool)[:] = 9
        self.descriptor = self.transport.register([self.pool])


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.transport.close()


def test_a_forked_child_of_a_killed_writer_hides_nothing_and_holds_no_pool(owner: Owner) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(WRITER), owner.descriptor.hex()], stdout=subprocess.PIPE
    )
    child = None
    try:
        assert writer.stdout is not None
        word, pools, child = writer.stdout.readline().split()
        assert word == b"child" and int(pools) == 0, "the child maps nothing of the owner's pool"
        assert not as_array(owner.pool).any()
        writer.kill()
        writer.wait(30)
        assert _within_limit(lambda: owner.deaths == [("prefill0", 1)]), "seen although the child lives"
        os.kill(int(child), 0)
    finally:
        writer.kill()
        writer.wait(30)
        if child is not None:
            os.kill(int(child), signal.SIGKILL)


STRANGER = """
    import os, socket, sys
    os.setuid(65534)
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.connect(sys.argv[1].replace("@", "\\0"))
    raw.send(bytes.fromhex(sys.argv[2]))
    answer, files, _, _ = socket.recv_fds(raw, 64, 8)
    print(answer.hex(), len(files))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_even_with_the_secret(owner: Owner) -> None:
    doorkeeper = owner.transport._doorkeeper
    assert doorkeeper is not None
    hello = shm_wire.pack_hello(shm_wire.Hello("prefill0", 1, doorkeeper.secret))
    told = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(STRANGER), doorkeeper.address.replace("\0", "@"), hello.hex()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    answer, files = told.stdout.split()
    assert shm_wire.unpack_answer(bytes.fromhex(answer)) == (3, 0) and files == "0"
    assert doorkeeper.counters["admitted"] == 0


def _within_limit(holds: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + 30
    while not holds() and time.monotonic() < until_s:
        time.sleep(0.01)
    return bool(holds())


def test_the_measures_move_verified_bytes() -> None:
    small = measure.Workload(4, 8, 4096)
    copies = small.copies()
    assert small.moved_bytes == int(copies.nbytes.sum()) == 1 << 17
    pool = np.zeros(small.pool_bytes, np.uint8)
    assert not measure._is_right(pool, small)
    source = np.zeros(small.pool_bytes, np.uint8)
    measure._stamp(source, small)
    for begin, to, nbytes in zip(*(column.tolist() for column in copies), strict=True):
        pool[to : to + nbytes] = source[begin : begin + nbytes]
    assert measure._is_right(pool, small)
    measure.WORKLOADS["tiny"] = small
    try:
        for measured in (*measure.measure_shm(["tiny"], repetitions=1), *measure.measure_tcp(["tiny"], repetitions=1)):
            assert measured.rate.median > 0 and measured.share_of_memcpy > 0
    finally:
        del measure.WORKLOADS["tiny"]
