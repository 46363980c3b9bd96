"""One trace from those of all processes of a cluster.

All clocks are the machine's monotonic one, so the lines are merged by time. Three things only the whole can say are put
right on the way: the process epoch that a peer really had when metadata was addressed to it, one serial for each
message, which its sender and its receiver numbered by channel, and one number for each write, of which every life of
every writer has its own first (S1 would take the second for a repeat of the first, and settle it).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvpoll.spec.trace import (
    Addressed,
    Delivered,
    Lost,
    NodeStarted,
    Sent,
    WriteLanded,
    WritePosted,
    WriteSettled,
    decode,
    read_header,
)
from kvpoll.statemachine.ranks.host import engine_of


class Whole:
    """What only the whole can say, put right event by event: ``numbered`` as each trace is read, ``right`` in order."""

    def __init__(self) -> None:
        self._lives: dict[str, int] = {}
        self._serials: dict[tuple[str, str, int], int] = {}
        self._writes: dict[tuple[Path, int], int] = {}

    def numbered(self, path: Path, event: Any) -> Any:
        """An event of one life of one process, whose writes get numbers that no other life has used."""
        if isinstance(event, WritePosted | WriteLanded | WriteSettled):
            return event._replace(write=self._writes.setdefault((path, event.write), len(self._writes) + 1))
        return event

    def right(self, event: Any) -> Any:
        """The next event of all."""
        if isinstance(event, NodeStarted):
            self._lives[engine_of(event.node)] = event.epoch
        elif isinstance(event, Addressed):
            return event._replace(current_epoch=self._lives.get(engine_of(event.peer), event.current_epoch))
        elif isinstance(event, Sent):
            return self._serial(event, (event.node, event.to, event.serial))
        elif isinstance(event, Delivered | Lost):
            return self._serial(event, (event.sender, event.node, event.serial))
        return event

    def _serial(self, event: Any, channel: tuple[str, str, int]) -> Any:
        return event._replace(serial=self._serials.setdefault(channel, len(self._serials)))


def merged(paths: Sequence[Path]) -> Iterator[Any]:
    """The events of all traces in order of time. Raises TraceError for a line that is none, unless it was cut."""
    whole = Whole()
    for event in heapq.merge(*(_numbered(path, whole) for path in paths), key=lambda event: event.t):
        yield whole.right(event)


def _numbered(path: Path, whole: Whole) -> Iterator[Any]:
    for event in _events(path):
        yield whole.numbered(path, event)


def _events(path: Path) -> Iterable[Any]:
    """One process's events; the last line of a process that was killed may be cut, and is left out."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
        if not first.endswith("\n"):
            return
        read_header(first, f"{path}:1")
        last = float("-inf")
        for number, line in enumerate(file, start=2):
            if not line.endswith("\n"):
                return
            event = decode(line, f"{path}:{number}")
            if event.t < last:  # two threads of a server write to one trace
                event = event._replace(t=last)
            last = event.t
            yield event
