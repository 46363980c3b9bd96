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


def merged(paths: Sequence[Path]) -> Iterator[Any]:
    """The events of all traces in order of time. Raises TraceError for a line that is none, unless it was cut."""
    lives: dict[str, int] = {}
    serials: dict[tuple[str, str, int], int] = {}
    writes: dict[tuple[Path, int], int] = {}
    for event in heapq.merge(*(_numbered(path, writes) for path in paths), key=lambda event: event.t):
        if isinstance(event, NodeStarted):
            lives[engine_of(event.node)] = event.epoch
        elif isinstance(event, Addressed):
            event = event._replace(current_epoch=lives.get(engine_of(event.peer), event.current_epoch))
        elif isinstance(event, Sent):
            channel = (event.node, event.to, event.serial)
            event = event._replace(serial=serials.setdefault(channel, len(serials)))
        elif isinstance(event, Delivered | Lost):
            channel = (event.sender, event.node, event.serial)
            event = event._replace(serial=serials.setdefault(channel, len(serials)))
        yield event


def _numbered(path: Path, writes: dict[tuple[Path, int], int]) -> Iterator[Any]:
    """The events of one life of one process, whose writes get numbers that no other life has used."""
    for event in _events(path):
        if isinstance(event, WritePosted | WriteLanded | WriteSettled):
            event = event._replace(write=writes.setdefault((path, event.write), len(writes) + 1))
        yield event


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
