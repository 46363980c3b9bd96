"""One side of a conformance check: a transport, its memory, and the orders that the check gives it.

A ``Party`` is ordered by method calls. For a transport that joins processes each party lives in a child process of
its own (``HiredParty``), so that it can really be killed and stopped;
for one that lives in a single process the check calls it directly.

Memory is filled from a pattern in which every 8-byte word differs, so a byte that was moved wrongly is seen.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpoll.runtime.transports.interface import Copies, Progress, Region, Tag, Transport, TransportError
from kvpoll.runtime.transports.region_bytes import read, write
from kvpoll.spec.vocabulary import Incarnation

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

BLANK: Final = 0xA5
"""What an owner's pages hold before anything is written, and after they are given to someone else."""


_START: Final = f"import sys; from {__name__} import main; main(*sys.argv[1:])"


class Damage(NamedTuple):
    """What is wrong in an owner's memory: bytes that should have arrived and differ, and others that changed."""

    wrong: int
    strayed: int


class Born(NamedTuple):
    """A party's transport as it came to be: its descriptor and its capabilities."""

    descriptor: bytes
    caps: Any


def pattern(nbytes: int, seed: int) -> Bytes:
    """``nbytes`` bytes (a multiple of 8) in which every 8-byte word differs from every other."""
    words = np.arange(nbytes // 8, dtype=np.uint64) + np.uint64(seed << 40)
    return (words * np.uint64(0x9E3779B97F4A7C15)).view(np.uint8)


class Party:
    """Carries out orders. Every method takes and returns plain data, so that a child process can serve it."""

    def __init__(self, suite: Any) -> None:
        self._suite = suite
        self._transport: Transport | None = None
        self._regions: list[Region] = []
        self._peers: list[Any] = []
        self._rang = threading.Event()
        self._rings = 0
        self._deaths: list[tuple[str, int]] = []
        self._threads = set(threading.enumerate())

    def begin(self, node: str, epoch: int, sizes: list[int], seed: int | None, slow: bool) -> Born:
        """Make a transport over new memory: filled from the pattern of ``seed``, or blank."""
        make = self._suite.make_slow if slow else self._suite.make
        self._transport = make(node, epoch, self._wake, self._died)
        self._regions = [self._suite.allocate(nbytes) for nbytes in sizes]
        if seed is None:
            self.blank()
        else:
            self._put(pattern(sum(sizes), seed))
        return Born(self._transport.register(self._regions), self._transport.caps)

    def _wake(self) -> None:
        self._rings += 1
        self._rang.set()

    def _died(self, node: str, epoch: int) -> None:
        self._deaths.append((node, epoch))
        self._wake()

    @property
    def _made(self) -> Transport:
        assert self._transport is not None, "begin comes first"
        return self._transport

    # --- as writer ---------------------------------------------------------------------------------

    def connect(self, descriptor: bytes, node: str, epoch: int) -> int:
        """Number of the peer."""
        self._peers.append(self._made.connect(descriptor, node, epoch))
        return len(self._peers) - 1

    def refuses(self, descriptor: bytes, node: str, epoch: int) -> str | None:
        """The message with which ``connect`` refuses this descriptor, or None when it takes it."""
        try:
            self._made.connect(descriptor, node, epoch)
        except TransportError as error:
            return str(error)
        return None

    def post(self, peer: int, copies: tuple[Numbers, Numbers, Numbers], incarnation: Incarnation, number: int) -> int:
        """Handle of the write."""
        return self._made.post(self._peers[peer], Copies(*copies), Tag(incarnation, number))

    def poll(self, handle: int) -> Progress:
        """How a write stands, once the suite's world has had its turn."""
        self._suite.drive()
        return self._made.poll(handle)

    def slowest_poll_s(self, handle: int, times: int) -> float:
        """Longest of so many calls of ``poll``."""
        longest = 0.0
        for _ in range(times):
            began = time.monotonic()
            self._made.poll(handle)
            longest = max(longest, time.monotonic() - began)
        return longest

    def await_end(self, handle: int, limit_s: float, *, drained: bool) -> Progress:
        """Poll, and sleep until woken, until the write has ended (or drained), for at most ``limit_s``."""
        until_s = time.monotonic() + limit_s
        while True:
            self._rang.clear()
            progress = self.poll(handle)
            if progress.drained or (progress.state != "pending" and not drained) or time.monotonic() > until_s:
                return progress
            self._rang.wait(0 if self._suite.in_process else 0.05)

    def await_wake(self, handle: int, limit_s: float) -> bool:
        """Whether the transport calls ``wake`` when the write ends, without being polled."""
        until_s = time.monotonic() + limit_s
        while not self._rings and time.monotonic() < until_s:
            self._suite.drive()
            self._rang.wait(0 if self._suite.in_process else 0.05)
        return self._rings > 0 and self._made.poll(handle).state != "pending"

    def abort(self, handle: int) -> Progress:
        """Abort, and how the write stands right after."""
        self._made.abort(handle)
        return self._made.poll(handle)

    def forget(self, handle: int) -> None:
        """Forget the handle."""
        self._made.forget(handle)

    # --- as owner ----------------------------------------------------------------------------------

    def revoke(self, incarnation: Incarnation) -> bool:
        """Revoke, and fill all memory with blanks at once if that was a fence: its pages now belong to someone else."""
        fenced = self._made.revoke(incarnation)
        if fenced:
            self.blank()
        return fenced

    def blank(self) -> None:
        """All memory is given to someone else."""
        for region in self._regions:
            write(region, BLANK)

    def changed(self) -> int:
        """Bytes that are not blank."""
        return int((self._all() != BLANK).sum())

    def await_changed(self, nbytes: int, limit_s: float) -> int:
        """Wait, without sleeping, until so many bytes have changed; how many have."""
        until_s = time.monotonic() + limit_s
        step = max(1, sum(region.nbytes for region in self._regions) // 8192)
        while time.monotonic() < until_s:
            self._suite.drive()
            sample = sum(int((read(region)[::step] != BLANK).sum()) for region in self._regions) * step
            if sample >= nbytes:
                break
        return self.changed()

    def damage(self, seed: int, total: int, copies: tuple[Numbers, Numbers, Numbers]) -> Damage:
        """Compare memory byte by byte with what these copies from the pattern of ``seed`` should have made of it."""
        sent, want = pattern(total, seed), np.full(sum(r.nbytes for r in self._regions), BLANK, np.uint8)
        meant = np.zeros(len(want), bool)
        for begin, to, nbytes in zip(*(column.tolist() for column in copies), strict=True):
            want[to : to + nbytes] = sent[begin : begin + nbytes]
            meant[to : to + nbytes] = True
        differs = self._all() != want
        return Damage(int((differs & meant).sum()), int((differs & ~meant).sum()))

    def deaths(self) -> list[tuple[str, int]]:
        """What ``on_death`` was told."""
        return list(self._deaths)

    def await_death(self, limit_s: float) -> list[tuple[str, int]]:
        """Wait until ``on_death`` was told something."""
        until_s = time.monotonic() + limit_s
        while not self._deaths and time.monotonic() < until_s:
            time.sleep(0.01)
        return list(self._deaths)

    def counters(self) -> dict[str, int]:
        """The transport's counters, if it has any."""
        return dict(getattr(self._transport, "counters", {}))

    # --- both --------------------------------------------------------------------------------------

    def _all(self) -> Bytes:
        parts = [read(region) for region in self._regions]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _put(self, content: Bytes) -> None:
        at = 0
        for region in self._regions:
            write(region, content[at : at + region.nbytes])
            at += region.nbytes

    def close(self) -> tuple[float, list[str]]:
        """Close the transport; (seconds that took, names of threads of its that still run)."""
        began = time.monotonic()
        if self._transport is not None:
            self._transport.close()
        took_s = time.monotonic() - began
        return took_s, [thread.name for thread in threading.enumerate() if thread not in self._threads]

    def end(self) -> None:
        """Close and forget everything; ``begin`` may be called again."""
        self.close()
        self.__init__(self._suite)  # type: ignore[misc]


# --- a party in a child process ---------------------------------------------------------------------


class HiredParty:
    """A party in a child process, ordered through a pipe. Offers the methods of ``Party``."""

    def __init__(self, suite: type, limit_s: float) -> None:
        self._limit_s = limit_s
        here, there = Pipe()
        path = getattr(sys.modules[suite.__module__], "__file__", None) or ""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(there.fileno()), suite.__module__, path, suite.__qualname__],
            pass_fds=[there.fileno()], env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        there.close()
        self._pipe = here
        self.is_alive = True

    def __getattr__(self, order: str) -> Any:
        if order.startswith("_"):
            raise AttributeError(order)

        def send(*values: Any, **named: Any) -> Any:
            self._pipe.send((order, values, named))
            return self._answer(order)

        return send

    def _answer(self, order: str) -> Any:
        if not self._pipe.poll(self._limit_s):
            raise AssertionError(f"{order} did not return within {self._limit_s:g} s: the transport blocks its caller")
        try:
            good, value = self._pipe.recv()
        except EOFError:
            raise AssertionError(f"the process ended during {order}") from None
        if not good:
            raise AssertionError(f"{order} raised {value}")
        return value

    def stop(self) -> None:
        """SIGSTOP: the process stands still, with everything it holds."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until the system has cleared it away."""
        self.is_alive = False
        self._process.kill()
        self._process.wait(self._limit_s)
        self._pipe.close()


def serve(pipe: Connection, suite: Any) -> None:
    """Carry out orders from the pipe until it ends."""
    party = Party(suite)
    while True:
        try:
            order, values, named = pipe.recv()
        except (EOFError, OSError):
            party.close()
            return
        try:
            answer = (True, getattr(party, order)(*values, **named))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        pipe.send(answer)


def _module(name: str, path: str) -> ModuleType:
    """The module that defines the suite, by name if it can be imported, else from its file."""
    found = importlib.util.find_spec(name) if name != "__main__" else None
    if found is not None and (not path or found.origin == path):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("conformance_suite_" + Path(path).stem, path)
    assert spec is not None and spec.loader is not None, f"{path} cannot be imported"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(file: str, name: str, path: str, qualname: str) -> None:
    """What a child runs: serve a new party of the suite of this name through the pipe of this descriptor."""
    pipe = Connection(int(file))
    suite: Any = _module(name, path)
    for part in qualname.split("."):
        suite = getattr(suite, part)
    serve(pipe, suite())
