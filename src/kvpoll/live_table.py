"""What ``kvpoll up`` shows of a running cluster: a live table on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvpoll.live_cluster import Line, Snapshot

TOLD: Final = 6
"""How many of the last events are shown."""

PICTURE_COLUMNS: Final = 132

QUEUES: Final = {
    "P": (
        ("num_prefill_bootstrap_queue_reqs", "bootstrap"),
        ("num_queue_reqs", "waiting"),
        ("num_prefill_inflight_queue_reqs", "inflight"),
    ),
    "D": (
        ("num_decode_prealloc_queue_reqs", "prealloc"),
        ("num_decode_transfer_queue_reqs", "transfer"),
        ("num_running_reqs", "running"),
    ),
}
"""SGLang's gauges of each side, and what the table calls them."""

POLLS: Final = ("Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed")
STATES: Final = {"up": "green", "starting": "yellow", "stopped": "yellow", "down": "bold red"}
PHASES: Final = {
    "starting": "starting",
    "load": "under load",
    "drain": "the load is over; requests under way are finished",
    "probes": "probes: every request must succeed now",
    "quiet": "quiet, time runs faster: what is kept for late messages expires, then nothing may be left",
    "over": "over",
}


def render(shot: Snapshot, profile: str) -> RenderableType:
    """The whole picture: head, table, causes, the last events."""
    parts: list[RenderableType] = [_head(shot, profile), Padding(_table(shot.lines), (1, 0))]
    if shot.causes:
        parts.append(_causes(shot.causes))
    parts += [_event(t, text) for t, text in shot.told[-TOLD:]]
    return Group(*parts)


def _head(shot: Snapshot, profile: str) -> Text:
    failed = sum(shot.causes.values())
    head = Text.assemble(
        ("kvpoll up", "bold"), f"  profile {profile}  ", (f"{shot.t:6.1f} s", "bold"), f"  {PHASES[shot.phase]}\n",
        f"{shot.requests:,} requests: ", (f"{shot.succeeded:,} ok", "green"), ", ",
        (f"{failed:,} failed", "red" if failed else ""), f", {shot.active:,} under way    ",
        f"{size(sum(line.sent for line in shot.lines))} moved at {gigabytes(sent_per_s(shot))} GB/s, ",
        f"{size(sum(line.verified for line in shot.lines))} verified on arrival",
    )  # fmt: skip
    head.no_wrap = True
    return head


def sent_per_s(shot: Snapshot) -> float:
    """Bytes that all prefill ranks wrote, by the second, of late."""
    return sum(line.sent_per_s for line in shot.lines)


def _table(lines: Sequence[Line]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("process", "pid", "life", "state", "queues", "rooms by poll"):
        table.add_column(name, justify="right" if name in ("pid", "life") else "left", no_wrap=True)
    for name in ("GB/s", "moved", "free", "held", "quarantined"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*_cells(line))
    return table


def _cells(line: Line) -> list[Text]:
    side = line.node[:1]
    state = Text(line.state, style=STATES[line.state])
    named = [Text(line.node, style="bold"), Text(str(line.pid or "-")), Text(str(line.life)), state]
    if side not in QUEUES:
        return [*named, Text("bootstrap server", style="dim"), *(Text("") for _ in range(6))]
    is_known = bool(line.size)
    pages = [f"{number:,}" if is_known else "-" for number in (line.free, line.held, line.quarantined)]
    per_s, total = (
        (line.sent_per_s, line.sent) if side == "P" else (line.verified_per_s, line.verified)
    )  # decode has no byte of its own to move: what it read back and found sound
    arrow = "out" if side == "P" else "in"
    return [
        *named, _queues(line), _polls(line.polls), Text(f"{gigabytes(per_s)} {arrow:>3}"), Text(size(total)),
        Text(pages[0]), Text(pages[1]), Text(pages[2], style="yellow" if line.quarantined else ""),
    ]  # fmt: skip


def _queues(line: Line) -> Text:
    text = Text()
    for gauge, name in QUEUES[line.node[:1]]:
        count = line.queues.get(gauge, 0)
        text.append(f"{name} ", style="dim")
        text.append(f"{count:<3}", style="bold" if count else "dim")
        text.append(" ")
    return text


def _polls(polls: dict[str, int]) -> Text:
    text = Text()
    for name in POLLS:
        if polls.get(name):
            text.append(f"{name} {polls[name]} ", style="red" if name == "Failed" else "")
    return text if text.plain else Text("-", style="dim")


def _causes(causes: dict[str, int]) -> Text:
    ordered = sorted(causes.items(), key=lambda item: (-item[1], item[0]))
    return Text.assemble(
        ("first causes of failure: ", "bold"), ", ".join(f"{cause} {count:,}" for cause, count in ordered)
    )


def _event(t: float, text: str) -> Text:
    line = Text.assemble((f"{t:8.1f} s  ", "dim"), text)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def plain(shot: Snapshot) -> str:
    """One line, where there is no terminal."""
    failed = sum(shot.causes.values())
    up = sum(line.state == "up" for line in shot.lines)
    queues = " ".join(f"{line.node}:{_counts(line)}" for line in shot.lines if line.node[:1] in QUEUES)
    quarantined = sum(line.quarantined for line in shot.lines)
    return (
        f"{shot.t:6.1f} s  {shot.phase:<6}  {shot.requests:,} requests, {shot.succeeded:,} ok, {failed:,} failed, "
        f"{shot.active:,} under way  {gigabytes(sent_per_s(shot))} GB/s  {up}/{len(shot.lines)} up  "
        f"queues {queues}  quarantined {quarantined:,}"
    )


def _counts(line: Line) -> str:
    return "/".join(str(line.queues.get(gauge, 0)) for gauge, _ in QUEUES[line.node[:1]])


def gigabytes(bytes_per_s: float) -> str:
    """Decimal gigabytes, two or three places."""
    value = bytes_per_s / 1e9
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def size(count: int) -> str:
    """A number of bytes, decimal."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def draw(shot: Snapshot, profile: str, path: Path) -> None:
    """The picture as SVG, as a terminal of PICTURE_COLUMNS would show it. Raises OSError."""
    console = Console(record=True, width=PICTURE_COLUMNS, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(render(shot, profile))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(console.export_svg(title="kvpoll up", unique_id="kvpoll-up"), encoding="utf-8")
