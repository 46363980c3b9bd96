"""Starts ranks in processes of their own, speaks to them, and leaves none behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "src"
LIMIT_S = 60.0


class Rank:
    """One child process, as ``rank.py`` describes it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [*command, str(HERE / "rank.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, text=True, start_new_session=True,
        )  # fmt: skip

    def send(self, verb: str, **words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": verb, **words}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.kill()
            raise RuntimeError(f"the rank ended: {self.process.communicate()[1][-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, verb: str, **words: Any) -> dict[str, Any]:
        self.send(verb, **words)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, which ends a stopped process too, and wait for it."""
        self.process.kill()
        self.process.wait(LIMIT_S)


class Stage:
    """All ranks of one story. isolated: in a network namespace with lo and nothing else."""

    def __init__(self, python: str, isolated: bool, **environment: str) -> None:
        self.ranks: list[Rank] = []
        self.environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1", **environment}
        self.command = [python, "-P"]
        self.holder: subprocess.Popen[str] | None = None
        if isolated:
            self._isolate()

    def _isolate(self) -> None:
        """A process that holds the namespace open; ranks enter it."""
        script = "ip link set lo up && echo up && exec sleep 600"
        self.holder = subprocess.Popen(["unshare", "-rn", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "up\n":
            raise RuntimeError("no network namespace")
        enter = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(self.holder.pid)]
        self.command = [*enter, *self.command]

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        for rank in self.ranks:
            rank.kill()
            for pipe in (rank.process.stdin, rank.process.stdout, rank.process.stderr):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue
        if self.holder is not None:
            self.holder.kill()
            self.holder.communicate()

    def rank(self) -> Rank:
        rank = Rank(self.command, self.environment)
        self.ranks.append(rank)
        return rank


def why_not_isolated() -> str | None:
    """Why a network namespace cannot be had here, or None."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    tried = subprocess.run(
        ["unshare", "-rn", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return tried.stderr.strip() or "unshare failed" if tried.returncode else None


def why_not_imported(python: str, module: str) -> str | None:
    """Why an interpreter cannot import an engine, or None."""
    try:
        tried = subprocess.run(
            [python, "-c", f"import {module}"], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except OSError as error:
        return f"{python} does not run: {error}"
    lines = tried.stderr.strip().splitlines() or [f"status {tried.returncode}"]
    return lines[-1] if tried.returncode else None


def engine_python() -> str:
    """The interpreter of an environment with the engines: KVPOLL_ENGINE_PYTHON, else this one."""
    return os.environ.get("KVPOLL_ENGINE_PYTHON") or sys.executable
