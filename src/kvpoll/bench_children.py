"""Processes that ``kvpoll bench runtime`` measures: ours and, in an interpreter that has them, those of its peers.

A child speaks lines of JSON. It is ended when the measuring ends, however that comes about.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

ENGINES_PYTHON: Final = "KVPOLL_ENGINES_PYTHON"
"""Environment variable: an interpreter that has Mooncake and NIXL, numpy, msgspec and pyzmq."""

SGLANG_PYTHON: Final = "KVPOLL_SGLANG_PYTHON"
"""Environment variable: an interpreter that has SGLang 0.5.23."""

ANSWER_S: Final = 180.0
_SOURCES: Final = Path(__file__).resolve().parents[1]
_LONELY: Final = ("unshare", "-rn", "sh", "-c", 'ip link set lo up; exec "$@"', "-")


class ChildFailed(Exception):
    """A measured process ended, or did not answer in time. One line: which, and what it said last."""


def interpreter(variable: str) -> str:
    """The interpreter that an environment variable names, or the running one."""
    return os.environ.get(variable) or sys.executable


def lacks(python: str, module: str) -> str | None:
    """Why an interpreter cannot import a module, in one line; None when it can."""
    if shutil.which(python) is None:
        return f"{python} is no program"
    told = subprocess.run(
        [python, "-P", "-c", f"import {module}"], capture_output=True, text=True, timeout=ANSWER_S, check=False,
        env=environment(python),
    )  # fmt: skip
    if told.returncode == 0:
        return None
    return (told.stderr.strip().splitlines() or [f"import {module} ends with {told.returncode}"])[-1]


def environment(python: str) -> dict[str, str]:
    """This process's environment; another interpreter finds kvpoll by PYTHONPATH."""
    given = dict(os.environ)
    if python != sys.executable:
        given["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_SOURCES), given.get("PYTHONPATH"))))
    return given


def namespace() -> tuple[str, ...]:
    """The words before a command that give it a network namespace with nothing but lo, or () where none can be made:
    Mooncake listens on every interface, whatever it is told.
    """
    if shutil.which("unshare") is None:
        return ()
    tried = subprocess.run([*_LONELY, "true"], capture_output=True, timeout=ANSWER_S, check=False)
    return _LONELY if tried.returncode == 0 else ()


class Child:
    """One process. ``ask`` writes a line to it and reads its answer."""

    def __init__(self, *words: str, python: str = sys.executable, before: Sequence[str] = ()) -> None:
        """words: what the interpreter is to run. before: the words of ``namespace``."""
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed with the child)
        self.name = " ".join(Path(word).name for word in words if not word.startswith("-"))
        self._process = subprocess.Popen(
            [*before, python, "-P", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            text=True, env=environment(python),
        )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        """Its next line. Raises ChildFailed."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(ANSWER_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise ChildFailed(f"{self.name}: {self._last_words() or f'no answer within {ANSWER_S:g} s'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, order: dict[str, Any]) -> None:
        """Write it an order. One that has ended is found out by ``hear``."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _last_words(self) -> str:
        self._said.seek(0)
        return (self._said.read().strip().splitlines() or [""])[-1]

    def close(self) -> None:
        """End of input, and if that does not end it, SIGKILL."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
