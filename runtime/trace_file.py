"""A trace on disk that survives the death of its process: every event is in the file before anybody hears of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvpoll.spec.trace import encode


class TraceFile:
    """Writes one process's events as JSON lines, unbuffered: what SIGKILL can cut is the last line."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._file = path.open("ab", buffering=0)
        self._write(json.dumps({"kvpoll_trace": 1, **header}, sort_keys=True))

    def __call__(self, event: Any) -> None:
        self._write(encode(event))

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """The process ends as planned."""
        self._file.close()
