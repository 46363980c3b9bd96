"""What ``kvpoll up`` shows of a running cluster: a live table on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvpoll.live_cluster import Line, Snapshot

TOLD: Final = 6
"""How many of the last events are shown."""

PICTURE_COLUMNS: Final = 118
WIDE_COLUMNS: Final = 112
"""A narrower terminal is not shown polls, lives and sums."""

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

POLLS: Final = {
    "Bootstrapping": "poll 1\nboot",
    "WaitingForInput": "2\nwait",
    "Transferring": "3\nmove",
    "Success": "4\nok",
    "Failed": "0\nfail",
}
"""Rooms by KVPoll, in the order of a request's life."""

STATES: Final = {"up": "green", "starting": "yellow", "stopped": "yellow", "down": "bold red"}
PHASES: Final = {
    "starting": "starting",
    "load": "under load",
    "drain": "the load is over; requests under way are finished",
    "probes": "probes: every request must succeed now",
    "quiet": "quiet, time runs faster: what is kept for late messages expires, then nothing may be left",
    "over": "over",
}


def render(shot: Snapshot, profile: str, width: int) -> RenderableType:
    """The whole picture, for a terminal of this many columns: head, table, causes, the last events."""
    parts: list[RenderableType] = [_head(shot, profile), Padding(_table(shot.lines, width), (1, 0))]
    if shot.causes:
        parts.append(_causes(shot.causes))
    if shot.violated:
        parts.append(Text(_violated(shot.violated), style="bold red"))
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


def _table(lines: Sequence[Line], width: int) -> Table:
    """One row a process. A heading of two lines has prefill's word above decode's."""
    is_wide = width >= WIDE_COLUMNS
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name, is_number in _headings(is_wide):
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True, vertical="bottom")
    for line in lines:
        table.add_row(*_cells(line, is_wide))
    return table


def _headings(is_wide: bool) -> Iterator[tuple[str, bool]]:
    yield from (("\nprocess", False), ("\npid", True))
    if is_wide:
        yield "\nlife", True
    yield "\nstate", False
    for (_, above), (_, below) in zip(QUEUES["P"], QUEUES["D"], strict=True):
        yield f"{above}\n{below}", True
    if is_wide:
        yield from ((heading, True) for heading in POLLS.values())
    yield "GB/s out\nGB/s in", True
    if is_wide:
        yield "moved\nverified", True
    yield from (("pages\nfree", True), ("\nheld", True), ("quaran-\ntined", True))


def _cells(line: Line, is_wide: bool) -> list[Text]:
    named = [Text(line.node, style="bold"), Text(str(line.pid or "-"))]
    if is_wide:
        named.append(Text(str(line.life)))
    named.append(Text(line.state, style=STATES[line.state]))
    if line.node[:1] not in QUEUES:
        return [*named, Text("(server)", style="dim")]
    # Decode has no byte of its own to move; what it has read back and found sound is shown instead.
    is_prefill = line.node.startswith("P")
    per_s, total = (line.sent_per_s, line.sent) if is_prefill else (line.verified_per_s, line.verified)
    cells = [*named, *(_count(line.queues.get(gauge, 0)) for gauge, _ in QUEUES[line.node[:1]])]
    if is_wide:
        cells += [_count(line.polls.get(poll, 0), "red" if poll == "Failed" else "") for poll in POLLS]
    cells.append(Text(gigabytes(per_s)))
    if is_wide:
        cells.append(Text(size(total)))
    pages = (line.free, line.held, line.quarantined)
    styles = ("", "", "yellow" if line.quarantined else "")
    return cells + [
        Text(f"{number:,}" if line.size else "-", style=style) for number, style in zip(pages, styles, strict=True)
    ]


def _count(number: int, style: str = "") -> Text:
    """Zero is nothing to look at."""
    return Text(str(number), style=style) if number else Text("\u00b7", style="dim")


def _causes(causes: dict[str, int]) -> Text:
    ordered = sorted(causes.items(), key=lambda item: (-item[1], item[0]))
    return Text.assemble(
        ("first causes of failure: ", "bold"), ", ".join(f"{cause} {count:,}" for cause, count in ordered)
    )


def _violated(counts: dict[str, int]) -> str:
    return "violated so far: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


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
        f"queues {queues}  quarantined {quarantined:,}" + (f"  {_violated(shot.violated)}" if shot.violated else "")
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
    console.print(render(shot, profile, PICTURE_COLUMNS))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = console.export_svg(title="kvpoll up", unique_id="kvpoll-up")
    path.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL), encoding="utf-8")  # nothing is fetched
