"""Where the processes of a cluster come from: one process that has imported everything, and forks.

A rank that is forked here is up in milliseconds instead of the second that imports take, so a crashed one is back as
fast as the scenario says. The nursery runs no thread and no socket of its own, which makes the fork safe. It says
when a child has ended as ``waitpid`` saw it, and nobody outlives it: the kernel kills it when the launcher dies, and
its children when it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from kvpoll.runtime.cluster.config import Config, RankConfig
from kvpoll.spec.source import BadInput

GONE: Final = "the process that forks the ranks is gone"
PR_SET_PDEATHSIG: Final = 1
MESSAGE_BYTES_MAX: Final = 1 << 20


class Born(msgspec.Struct, frozen=True, tag="born"):
    """A child was forked for the config of this number."""

    number: int
    pid: int


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A child is gone, as waitpid saw it: its exit status, or minus the signal."""

    pid: int
    status: int


_encode: Final = msgspec.json.Encoder().encode
_read_news: Final[Callable[[bytes], Born | Ended]] = msgspec.json.Decoder(Born | Ended).decode
_read_config: Final[Callable[[bytes], Config]] = msgspec.json.Decoder(Config).decode


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Nursery:
    """The launcher's side: asks for children and hears of their ends."""

    def __init__(self, stderr: int | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvpoll.runtime.cluster.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip
        ours.settimeout(30.0)
        self._socket = ours
        self._number = 0
        self._born: set[int] = set()
        self._ended: dict[int, int] = {}

    def bear(self, config: Config) -> int:
        """A new process with this config. Returns its pid. Raises BadInput when the nursery is gone."""
        self._number += 1
        try:
            self._socket.send(_encode(config))
            while True:
                news = self._hear()
                if isinstance(news, Born) and news.number == self._number:
                    self._born.add(news.pid)
                    return news.pid
                self._note(news)
        except OSError as error:
            raise BadInput(
                f"{config.node} cannot be started: {GONE} ({error}); close the cluster, start anew"
            ) from None

    def ended(self) -> dict[int, int]:
        """Children that have ended, with their status, since the beginning. Never waits.

        When the nursery itself is gone, all of them are: the kernel has killed them with it.
        """
        with contextlib.suppress(BlockingIOError):
            self._socket.setblocking(False)
            try:
                while True:
                    self._note(self._hear())
            except ConnectionResetError:
                self._ended |= dict.fromkeys(self._born - self._ended.keys(), -signal.SIGKILL)
            finally:
                self._socket.settimeout(30.0)
        return self._ended

    def _hear(self) -> Born | Ended:
        data = self._socket.recv(MESSAGE_BYTES_MAX)
        if not data:
            raise ConnectionResetError(GONE)
        return _read_news(data)

    def _note(self, news: Born | Ended) -> None:
        if isinstance(news, Ended):
            self._ended[news.pid] = news.status

    def close(self) -> None:
        """End the nursery and with it every child that still lives."""
        self._socket.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# -- the nursery itself


def _serve(channel: socket.socket) -> None:
    """Fork for every config; tell of every end; leave when the launcher has closed its side."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(read, selectors.EVENT_READ)
    number = 0
    while True:
        for key, _ in selector.select():
            if key.fileobj is channel:
                data = channel.recv(MESSAGE_BYTES_MAX)
                if not data:
                    return
                number += 1
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    os.close(read)
                    os.close(write)
                    channel.close()
                    _live(data)
                channel.send(_encode(Born(number, pid)))
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(read, 4096)
                _reap(channel)


def _reap(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        channel.send(_encode(Ended(pid, os.waitstatus_to_exitcode(status))))


def _live(data: bytes) -> None:
    """The life of a child; never returns."""
    status = 1
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _become(_read_config(data)).run()
        status = 0
    except Exception as error:
        print(f"kvpoll: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if os.environ.get("KVPOLL_DEBUG"):
            import traceback

            traceback.print_exc()
    finally:
        os._exit(status)


def _become(config: Config) -> RankProcess | ServerProcess:
    return RankProcess(config) if isinstance(config, RankConfig) else ServerProcess(config)


if __name__ == "__main__":
    die_with_parent()
    from kvpoll.runtime.cluster.rank_process import RankProcess
    from kvpoll.runtime.cluster.server_process import ServerProcess
    from kvpoll.runtime.transports import shm, tcp  # noqa: F401  the usual ones; a child imports any other itself

    _serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
