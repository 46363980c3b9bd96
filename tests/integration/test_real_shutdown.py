"""However a cluster ends, nothing of it is left: no process, no listening socket, no file in /dev/shm or /tmp."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_cluster import LIMIT_S, Play, descendants, listening, process_state

from kvpoll.spec.source import BadInput


class Left(Exception):
    """What a user's own code raises in the middle."""


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files of the test and its processes go to a folder of their own, which is empty in the end."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert list(folder.iterdir()) == []


def shared_files(pids: set[int]) -> set[Path]:
    """Files of /dev/shm that these processes have mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line}


class Footprint:
    """The processes and ports of a running cluster, which must all be gone in the end."""

    def __init__(self, play: Play) -> None:
        launcher = play.launcher
        self.pids = {child.pid for child in launcher.children() if child.pid} | {launcher._nursery._process.pid}
        endpoints = [child.endpoint for child in launcher.children() if child.endpoint] + [launcher.plane.endpoint]
        self.ports = {int(endpoint.rpartition(":")[2]) for endpoint in endpoints}
        self.ports |= {server.port for server in launcher.servers}
        assert self.pids <= descendants(os.getpid())
        assert self.ports <= listening()
        assert shared_files(self.pids) == set(), "a name in /dev/shm outlives a killed process"

    def assert_gone(self) -> None:
        """Within a generous time; the kernel needs a moment to take processes apart."""
        end_s = time.monotonic() + LIMIT_S
        while any(process_state(pid) not in (None, "Z") for pid in self.pids) or self.ports & listening():
            assert time.monotonic() < end_s, {pid: process_state(pid) for pid in self.pids}
            time.sleep(0.02)


def test_a_cluster_is_closed_in_the_middle_of_requests(tmp_path: Path) -> None:
    """close() ends every process although requests are under way; a second close does nothing."""
    with Play(tmp_path) as play:
        play.registered()
        play.served()
        footprint = Footprint(play)
        for _ in range(5):
            play.submit(2048, output=500)
        play.launcher.close()
        footprint.assert_gone()


def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """One rank stands still, one engine is dead, a request is under way; then the user's code raises."""
    footprints = []
    with pytest.raises(Left), Play(tmp_path) as play:
        play.registered()
        footprints.append(Footprint(play))
        play.bring("D0", "WaitingForInput")
        play.kill("P0")
        raise Left
    footprints[0].assert_gone()


DOOMED = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from real_cluster import Play
play = Play(Path(sys.argv[1]), transport=sys.argv[3])
play.registered()
play.served()
launcher = play.launcher
endpoints = [child.endpoint for child in launcher.children()] + [launcher.plane.endpoint]
print(json.dumps({
    "pids": [child.pid for child in launcher.children()] + [launcher._nursery._process.pid],
    "ports": [int(each.rpartition(":")[2]) for each in endpoints] + [each.port for each in launcher.servers],
}), flush=True)
play.bring("D0", "WaitingForInput")
print("halted", flush=True)
play.past(1e6)
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_launcher_itself_is_killed(transport: str, tmp_path: Path) -> None:
    """SIGKILL leaves it no moment to clean up: the kernel ends its processes, even one that stands still."""
    command = [sys.executable, "-P", "-c", DOOMED, str(tmp_path), str(Path(__file__).parent), transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as doomed:
        assert doomed.stdout is not None
        said = json.loads(doomed.stdout.readline())
        assert doomed.stdout.readline() == b"halted\n"
        footprint = Footprint.__new__(Footprint)
        footprint.pids, footprint.ports = set(said["pids"]), set(said["ports"])
        assert footprint.pids <= descendants(os.getpid())
        assert footprint.ports <= listening()
        assert shared_files(footprint.pids) == set()
        doomed.kill()
    footprint.assert_gone()


def test_the_process_that_forks_the_ranks_is_killed(tmp_path: Path) -> None:
    """Its children go with it, and the launcher says so instead of waiting for a cluster that is gone."""
    with Play(tmp_path) as play:
        play.registered()
        footprint = Footprint(play)
        os.kill(play.launcher._nursery._process.pid, signal.SIGKILL)
        play.until(lambda: play.launcher.unexpected, "the launcher noticing")
        request = play.submit()
        assert play.answered(request).cause == "connection_refused"
        with pytest.raises(BadInput, match="gone"):
            play.launcher.engine("P0").start()  # type: ignore[union-attr]
    footprint.assert_gone()


def test_a_server_whose_port_is_taken_ends_the_start_with_one_line(tmp_path: Path) -> None:
    """The port was free when it was chosen and is taken when the server comes: BadInput, and no process stays."""
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        known = descendants(os.getpid())
        with pytest.raises(BadInput, match=str(port)) as raised:
            Play(tmp_path, server_port=port)
        assert "\n" not in str(raised.value)
    assert not {pid for pid in descendants(os.getpid()) - known if process_state(pid) not in (None, "Z")}
