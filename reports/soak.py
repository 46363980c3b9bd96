"""The picture of a soak: requests, memory and rooms over time, and every fault where it struck."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib.axes import Axes

from kvpoll.reports import style

HEIGHT_IN: Final = 8.2
SMOOTHED: Final = 5
LOOKS: Final = {
    "prefill0": (style.BLUE, "-"), "prefill1": (style.SKY, "-"),
    "decode0": (style.VERMILLION, "-"), "decode1": (style.ORANGE, "-"),
    "bootstrap0": (style.GREEN, "-"), "bootstrap1": (style.PURPLE, "-"),
}  # fmt: skip
"""Colour and line of each process; the second of each kind is the one that is killed."""


def draw(found: dict[str, Any], out: Path) -> None:
    """Write the picture of what ``kvpoll.soak`` found. Raises BadInput for a file name that cannot be drawn to."""
    style.check_target(out)
    with style.dressed():
        figure = style.blank(HEIGHT_IN)
        grid = figure.add_gridspec(
            4, 1, height_ratios=[2.0, 2.6, 1.8, 1.4], left=0.085, right=0.985, top=0.90, bottom=0.065, hspace=0.16
        )
        rows: list[Axes] = []
        for place in range(4):
            rows.append(figure.add_subplot(grid[place], sharex=rows[0] if rows else None))
        figure.text(0.012, 0.968, _title(found), size=style.TITLE_PT, weight="bold", color=style.INK)
        figure.text(0.012, 0.938, _subtitle(found), size=style.TEXT_PT, color=style.QUIET)
        _rate(rows[0], found)
        _memory(rows[1], found)
        _rooms(rows[2], found)
        _faults(rows[3], found)
        for axes in rows:
            _dress(axes, is_last=axes is rows[-1])
        rows[0].set_xlim(0, found["samples"][-1]["t_s"])
        style.save(figure, out)


def _title(found: dict[str, Any]) -> str:
    ending = found["line"].rpartition(": ")[2] if found["holds"] else f"{len(found['problems'])} problems"
    return f"{found['requests']:,} requests through real processes: {ending}"


def _subtitle(found: dict[str, Any]) -> str:
    outcomes, lives = found["outcomes"], sum(found["lives"].values())
    share = outcomes.get("ok", 0) / max(1, found["requests"])
    return (
        f"{share:.1%} succeeded, every byte of them compared; the others were given up or lost a process. "
        f"{lives} lives of 6 processes, {len(found['strikes'])} faults, "
        f"{found['judge']['judged'] or 0:,} events judged as they happened. Seed {found['seed']}."
    )


def _rate(axes: Axes, found: dict[str, Any]) -> None:
    """Requests that ended in each second, smoothed by a running median."""
    samples = found["samples"]
    steps = [
        ((a["t_s"] + b["t_s"]) / 2, (b["over"] - a["over"]) / max(1e-9, b["t_s"] - a["t_s"]))
        for a, b in pairwise(samples)
    ]
    times, rates = [t for t, _ in steps], [rate for _, rate in steps]
    axes.plot(times, rates, color=style.RULE, linewidth=0.8)
    axes.plot(times, _running(rates), color=style.INK, linewidth=1.4)
    axes.set_ylabel("requests over\na second")
    axes.set_ylim(0, None)


def _running(values: Sequence[float]) -> list[float]:
    return [median(values[max(0, i - SMOOTHED) : i + SMOOTHED + 1]) for i in range(len(values))]


def _memory(axes: Axes, found: dict[str, Any]) -> None:
    """Resident memory of every process; a line breaks where a life ends."""
    for name, (colour, dash) in LOOKS.items():
        points = [(s["t_s"], s["processes"].get(name, [None])[0]) for s in found["samples"]]
        megabytes = [float("nan") if size is None else size / 1e6 for _, size in points]
        label = f"{name}, {found['lives'][name]} lives" if found["lives"][name] > 1 else name
        axes.plot([t for t, _ in points], megabytes, color=colour, linestyle=dash, linewidth=1.3, label=label)
    judge = [(s["t_s"], s["judge"][0] / 1e6) for s in found["samples"] if s["judge"][0]]
    axes.plot(*zip(*judge, strict=True), color=style.NEUTRAL, linewidth=1.0, linestyle=":", label="judge")
    axes.set_ylabel("resident memory\nMB")
    axes.set_ylim(0, None)
    axes.legend(loc="lower right", ncols=4, frameon=True, framealpha=0.9, edgecolor=style.RULE, fontsize=style.SMALL_PT)


def _rooms(axes: Axes, found: dict[str, Any]) -> None:
    """Rooms in each table, tombstones included: they come with the traffic and go with it."""
    for name in ("prefill0", "prefill1", "decode0", "decode1"):
        points = [(s["t_s"], s["rooms"].get(name)) for s in found["samples"]]
        counts = [float("nan") if count is None else count for _, count in points]
        axes.plot([t for t, _ in points], counts, color=LOOKS[name][0], linewidth=1.2)
    axes.set_ylabel("rooms, with\ntombstones")
    axes.set_ylim(0, None)


def _faults(axes: Axes, found: dict[str, Any]) -> None:
    """Every stop and kill, as long as it lasted."""
    names = list(LOOKS)
    for fault in found["strikes"]:
        row = names.index(fault["whom"])
        is_kill = fault["deed"] == "kill"
        colour = style.ALARM if is_kill else style.NEUTRAL
        axes.broken_barh([(fault["at_s"], max(0.6, fault.get("for_s", 0.6)))], (row - 0.36, 0.72), color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("seconds     (red: killed and away, grey: stopped)")


def _dress(axes: Axes, is_last: bool) -> None:
    axes.grid(axis="y", color=style.RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelbottom=is_last, length=3)
