"""Reads what a process appends to its trace, as it appends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpoll.spec.trace import decode


class Tail:
    """One trace that grows. A line that is not complete yet is left for the next look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        self._rest = b""

    def news(self) -> Iterator[Any]:
        """Events whose lines are complete; the header is passed over."""
        if not self.path.exists() or self.path.stat().st_size <= self._read:
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b'{"kvpoll_trace"') and b'"event"' in line:
                yield decode(line.decode(), str(self.path))
