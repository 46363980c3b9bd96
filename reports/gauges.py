"""Gauges as an operator's dashboard shows them, and success rates with honest intervals.

The queues carry SGLang's metric names, because the first sign of most races in production is one of these
lines that never comes down: sglang#26912 was found as a ``num_prefill_bootstrap_queue_reqs`` that stayed up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kvpoll.reports import style
from kvpoll.reports.reading import lane_order
from kvpoll.reports.spacetime import ExtraRow, Panel
from kvpoll.spec import trace

Series = dict[str, tuple[list[float], list[int]]]
"""node -> (times in seconds, number of requests in the queue from that time on)."""

_BOARD: Final = "#181B1F"
_GRID: Final = "#34383E"
_CHALK: Final = "#D8D9DA"
_DIM: Final = "#A5A9AF"


def gauge_series(events: Sequence[Any], queue_name: str) -> Series:
    """Length of queue ``queue_name`` on each node that ever used it, from the first event to the last.

    A process that stops loses its queue. Nodes come in lane order; a node has one value per instant.
    """
    series: Series = {}
    if not events:
        return series
    for event in events:
        if isinstance(event, trace.Queued) and event.queue == queue_name:
            times, values = series.setdefault(event.node, ([events[0].t], [0]))
            _append(times, values, event.t, values[-1] + event.delta)
        elif isinstance(event, trace.NodeStopped):
            for node in series:
                if node == event.node or node.startswith(event.node + "/"):
                    _append(*series[node], event.t, 0)
    for times, values in series.values():
        if times[-1] < events[-1].t:
            _append(times, values, events[-1].t, values[-1])
    return {node: series[node] for node in sorted(series, key=lane_order)}


def _append(times: list[float], values: list[int], t: float, value: int) -> None:
    if times[-1] == t:
        values[-1] = value
    else:
        times.append(t)
        values.append(value)


def draw_gauge(target: Axes | Path, series: Series, queue_name: str, begin_s: float = 0.0) -> None:
    """One step line per node, in the look of a dashboard panel titled by the metric's name.

    target: matplotlib axes, or the file to write (.png, .svg, .pdf). The legend shows each line's last and
    greatest value. Raises ValueError (one line) for a file that cannot be written.
    """
    if isinstance(target, Axes):
        _gauge(target, series, queue_name, begin_s)
        return
    out = style.check_target(target)
    with style.dressed():
        figure = style.blank(2.4)
        axes = figure.add_axes((0.06, 0.18, 0.92, 0.68))
        _gauge(axes, series, queue_name, begin_s)
        style.save(figure, out)


def gauge_row(queue_name: str) -> ExtraRow:
    """A row for ``spacetime.draw(extra=[...])``: this queue's gauge below each panel, whole trace."""

    def row(axes: Axes, panel: Panel) -> None:
        draw_gauge(axes, gauge_series(panel.events, queue_name), queue_name)

    return row


def _gauge(axes: Axes, series: Series, queue_name: str, begin_s: float) -> None:
    _board(axes, queue_name)
    for place, (node, (times, values)) in enumerate(series.items()):
        colour = style.SERIES[place % len(style.SERIES)]
        width = 1.3 + 0.9 * min(len(series) - 1 - place, 4)  # equal lines stay visible as stripes
        label = f"{node}  last {values[-1]}  max {max(values)}"
        axes.step(times, values, where="post", color=colour, linewidth=width, label=label)
        axes.fill_between(times, values, step="post", color=colour, alpha=0.08, linewidth=0)
    tallest = max((max(values) for _, values in series.values()), default=0)
    last_s = max((times[-1] for times, _ in series.values()), default=begin_s + 1)
    key_rows = math.ceil(len(series) / 2)
    axes.set_ylim(0, max(tallest, 1) * (1.12 + 0.2 * key_rows))
    axes.set_xlim(begin_s, max(last_s, begin_s + 1e-3))
    if series:
        _key(axes)
    else:
        axes.text(0.5, 0.5, "no data", color=_DIM, fontsize=style.TEXT_PT, ha="center", transform=axes.transAxes)


def _board(axes: Axes, queue_name: str) -> None:
    axes.set_facecolor(_BOARD)
    title: dict[str, Any] = {
        "loc": "left",
        "fontsize": style.TEXT_PT,
        "color": style.INK,
        "family": "monospace",
    }
    axes.set_title(f"sglang:{queue_name}", pad=4, **title)
    axes.grid(visible=True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.tick_params(length=0, labelsize=style.SMALL_PT)
    axes.set_xlabel("t (s)", fontsize=style.SMALL_PT, labelpad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _key(axes: Axes) -> None:
    box = axes.legend(
        loc="upper left", fontsize=style.SMALL_PT, facecolor=_BOARD, edgecolor="none", framealpha=0.7,
        ncols=2, columnspacing=1.2, handlelength=1.0, handletextpad=0.5, borderpad=0.2, labelspacing=0.15,
    )  # fmt: skip
    for words in box.get_texts():
        words.set_color(_CHALK)


class Interval(NamedTuple):
    """A confidence interval of a proportion, 0 <= low <= high <= 1."""

    low: float
    high: float


def wilson(successes: int, total: int, z: float = 1.959964) -> Interval:
    """Wilson's score interval (1927) of a proportion; z = 1.96 gives 95 %. Nothing observed gives (0, 1).

    It stays inside [0, 1] and keeps a width at 0 and total successes, where the textbook interval has none.
    Raises ValueError unless 0 <= successes <= total.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} is not a proportion; give 0 <= successes <= total")
    if total == 0:
        return Interval(0.0, 1.0)
    rate, square = successes / total, z * z / total
    middle = (rate + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(rate * (1 - rate) / total + square / (4 * total))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


Point = tuple[float, int, int]
"""(x, successes, total)"""


def draw_success_curve(
    points: Mapping[str, Iterable[Point]], target: Axes | Path, xlabel: str, ylabel: str, title: str = ""
) -> None:
    """Success rate against x, one line a label, with Wilson's 95 % intervals as bars.

    target: axes, or a file. Raises ValueError (one line) for impossible counts or a bad target.
    """
    if isinstance(target, Axes):
        _curve(target, points, xlabel, ylabel, title)
        return
    out = style.check_target(target)
    with style.dressed():
        figure = style.blank(4.2)
        axes = figure.add_axes((0.075, 0.125, 0.905, 0.79))
        _curve(axes, points, xlabel, ylabel, title)
        style.save(figure, out)


_LINES: Final = (
    (style.VERMILLION, "o", "-"), (style.BLUE, "s", "-"), (style.GREEN, "^", "-"),
    (style.BLACK, "D", "--"), (style.PURPLE, "v", "--"), (style.ORANGE, "P", "--"),
)  # fmt: skip


def _curve(axes: Axes, points: Mapping[str, Iterable[Point]], xlabel: str, ylabel: str, title: str) -> None:
    for place, (label, given) in enumerate(points.items()):
        colour, marker, dashes = _LINES[place % len(_LINES)]
        line = [point for point in sorted(given) if point[2]]  # a point without trials has no place
        xs = [x for x, _, _ in line]
        rates = [successes / total for _, successes, total in line]
        bounds = [wilson(successes, total) for _, successes, total in line]
        below = [max(0.0, rate - bound.low) for rate, bound in zip(rates, bounds, strict=True)]
        above = [max(0.0, bound.high - rate) for rate, bound in zip(rates, bounds, strict=True)]
        axes.errorbar(
            xs, rates, yerr=[below, above], label=label, color=colour, marker=marker, markersize=5,
            linestyle=dashes, linewidth=1.5, capsize=2.5, elinewidth=1.0,
        )  # fmt: skip
    axes.set_ylim(-0.03, 1.05)
    axes.grid(visible=True, color=style.RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, fontsize=style.HEADING_PT)
    axes.set_ylabel(ylabel, fontsize=style.HEADING_PT)
    axes.tick_params(labelsize=style.TEXT_PT + 0.5)
    if title:
        axes.set_title(title, loc="left", fontsize=style.TITLE_PT, weight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if points:
        axes.legend(loc="best", fontsize=style.TEXT_PT + 1, frameon=False)
