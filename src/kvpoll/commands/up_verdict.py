"""What came of a cluster of ``kvpoll up``: for people, and as one JSON object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvpoll.commands.screen import Screen, plural, seconds
from kvpoll.commands.verdict import by_count, percentile, percentiles
from kvpoll.spec.invariants import INVARIANTS, Watch

if TYPE_CHECKING:
    from kvpoll.live_cluster import Moved, Snapshot


class Ended(NamedTuple):
    """A cluster that is over. line: the command. left: node -> what was still there. defects: kvpoll's own.

    was_cut: the load was ended by Ctrl-C.
    """

    line: str
    profile: str
    loaded_s: float
    shot: Snapshot
    watch: Watch
    ttft_s: list[float]
    events: int
    moved: Moved
    left: dict[str, dict[str, int]]
    defects: list[str]
    told: list[tuple[float, str]]
    record: str | None
    was_cut: bool


def holds(ended: Ended) -> bool:
    """Did every invariant hold, and no process of kvpoll go wrong by itself?"""
    return not ended.watch.first and not ended.defects


def show(ended: Ended, screen: Screen) -> None:
    """Everything but the line that repeats it."""
    from kvpoll.live_table import gigabytes, size

    shot, moved = ended.shot, ended.moved
    screen.say()
    if ended.told and not screen.out.is_terminal:
        for t, text in ended.told:
            screen.say(f"{t:8.1f} s  {text}")
    failed = sum(shot.causes.values())
    early = " (ended by Ctrl-C)" if ended.was_cut else ""
    unanswered = f", {shot.active:,} without an answer" if shot.active else ""
    told = f"{plural(shot.requests, 'request')} in {ended.loaded_s:.1f} s of load{early}"
    screen.say(f"{told}: {shot.succeeded:,} ok, {failed:,} failed{unanswered}")
    if shot.causes:
        rows = [[cause, f"{count:,}"] for cause, count in by_count(shot.causes).items()]
        screen.table(["first cause of failure", "requests"], rows, right=["requests"])
    found = percentiles(ended.ttft_s)
    screen.say("time to first token: " + ", ".join(f"{name} {seconds(value)}" for name, value in found.items()))
    per_s = moved.placed / ended.loaded_s if ended.loaded_s else 0.0
    one = percentile(moved.write_bytes_per_s, 0.5)
    single = "" if one is None else f"; one write, from post to proof: median {gigabytes(one)} GB/s"
    screen.say(
        f"{size(moved.placed)} moved in {plural(moved.writes, 'write')}, {gigabytes(per_s)} GB/s of load{single}"
    )
    wrong = f", {moved.failed_writes:,} writes failed" if moved.failed_writes else ""
    screen.say(
        f"{size(moved.verified)} in {plural(moved.pages_verified, 'page')} verified byte by byte on arrival{wrong}"
    )
    _show_left(ended, screen)
    if ended.record is not None:
        screen.say(
            f"trace of all processes written to {ended.record}; `kvpoll validate {ended.record}` judges each step"
        )
    for text in ended.defects:
        screen.say(f"a process went wrong by itself: {text}", "bold red")
    _show_verdict(ended, screen)


def _show_left(ended: Ended, screen: Screen) -> None:
    left = {node: tables for node, tables in sorted(ended.left.items()) if tables}
    if not left:
        told = f"nothing is left on {plural(len(ended.left), 'rank')}: no room, request, page, row, write or timer"
        screen.say(told)
        return
    for node, tables in left.items():
        screen.say(f"left on {node}: " + ", ".join(f"{count:,} in {name}" for name, count in tables.items()), "yellow")


def _show_verdict(ended: Ended, screen: Screen) -> None:
    watch = ended.watch
    if not watch.first:
        screen.say(f"holds: no invariant broke in {ended.events:,} events of all processes", "green")
        return
    screen.say(f"breaks: {plural(len(watch.first), 'invariant')} under {ended.profile}", "red")
    ordered = sorted(watch.first.items(), key=lambda item: (item[1].t, item[0]))
    rows = [
        [name, INVARIANTS[name].name, seconds(found.t), f"{watch.counts.get(name, 1):,}", f"{found.node}: {found.text}"]
        for name, found in ordered
    ]
    screen.table(["invariant", "name", "first at", "times", "what was seen"], rows, right=["first at", "times"])


def as_object(ended: Ended) -> dict[str, Any]:
    """Everything as one JSON object."""
    shot, moved, watch = ended.shot, ended.moved, ended.watch
    return {
        "profile": ended.profile,
        "verdict": "holds" if holds(ended) else "breaks",
        "violations": [
            {"invariant": name, "t": found.t, "node": found.node, "text": found.text, "times": watch.counts[name]}
            for name, found in sorted(watch.first.items(), key=lambda item: (item[1].t, item[0]))
        ],
        "defects": ended.defects,
        "load_s": round(ended.loaded_s, 3),
        "ended_by_user": ended.was_cut,
        "requests": shot.requests,
        "succeeded": shot.succeeded,
        "unanswered": shot.active,
        "failed_by_first_cause": by_count(shot.causes),
        "ttft_s": percentiles(ended.ttft_s),
        "bytes_moved": moved.placed,
        "bytes_verified": moved.verified,
        "pages_verified": moved.pages_verified,
        "writes": moved.writes,
        "writes_failed": moved.failed_writes,
        "gb_per_s": round(moved.placed / ended.loaded_s / 1e9, 4) if ended.loaded_s else 0.0,
        "gb_per_s_of_a_write": _rounded(percentile(moved.write_bytes_per_s, 0.5)),
        "left": {node: tables for node, tables in sorted(ended.left.items()) if tables},
        "ranks_surveyed": len(ended.left),
        "lives": {line.node: line.life + 1 for line in shot.lines},
        "told": [{"t": round(t, 3), "text": text} for t, text in ended.told],
        "events": ended.events,
        "repeat": ended.line,
    }  # fmt: skip


def _rounded(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else round(bytes_per_s / 1e9, 4)
