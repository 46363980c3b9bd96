"""The text of a schedule: how a behaviour of a model stands in a scenario file, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvpoll.spec.source import Source, nearest

ENDS: Final = ("here", "idle", "for ever")
"""How a schedule ends: just so; with a look at every node, all of which are idle; or with what it does for ever."""


@dataclass(frozen=True)
class Schedule:
    """The moves of one behaviour, by name ("name | label" where a move can lead to several things).

    cycle: moves that follow ``moves`` and are then repeated for ever; empty means that nothing happens any more.
    """

    model: str
    moves: tuple[str, ...]
    cycle: tuple[str, ...] = ()
    ends: str = "here"


def read_schedule(source: Source) -> Schedule:
    """The [schedule] section of a scenario file. Raises BadInput."""
    entry = source.data["schedule"]
    source.require_forms(("schedule",), entry, {"model": str, "moves": list, "cycle": list, "ends": str})
    source.require_all(("schedule",), entry, ("model", "moves"), "a schedule")
    ends = entry.get("ends", "here")
    if ends not in ENDS:
        raise source.error(("schedule", "ends"), f"unknown end {ends!r}{nearest(ends, ENDS)}")
    return Schedule(entry["model"], tuple(entry["moves"]), tuple(entry.get("cycle", ())), ends)


def write_schedule(
    title: str, story: str, schedule: Schedule, profile: str, changes: Mapping[str, Any], breaks: Sequence[str]
) -> str:
    """A scenario file of this schedule, which expects these invariants to break (the first is what it shows)."""
    lines = [f"title = {_quoted(title)}", f"story = {_quoted(story)}", "", "[schedule]"]
    lines += [f"model = {_quoted(schedule.model)}", f"ends = {_quoted(schedule.ends)}", "moves = ["]
    lines += [f"  {_quoted(move)}," for move in schedule.moves]
    lines += ["]"]
    if schedule.cycle:
        lines += ["cycle = [", *(f"  {_quoted(move)}," for move in schedule.cycle), "]"]
    lines += ["", "[[expect]]", f"profile = {_quoted(profile)}"]
    if changes:
        lines.append("rules = { " + ", ".join(f"{name} = {_literal(value)}" for name, value in changes.items()) + " }")
    lines.append(f"shows = [{', '.join(_quoted(name) for name in breaks[:1])}]")
    if breaks[1:]:
        lines.append(f"follows = [{', '.join(_quoted(name) for name in breaks[1:])}]")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _literal(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else f"{value}"
