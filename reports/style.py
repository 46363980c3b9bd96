"""Paper, ink and time axis of kvpoll's figures: all that knows how to draw and nothing of requests.

Colours are the eight of Okabe and Ito ("Color Universal Design", 2008), which readers with any of the common
colour deficiencies can tell apart; each poll state also has a short name, and states without an owner have a
hatch, so that no figure depends on colour alone. A figure is 11 inches wide at 150 dots per inch and is
read at 900 pixels in a README, where 8 point type is about 9 pixels high: no text is smaller than that. A
``Sheet`` is measured in points, ``Places`` knows what room on it is taken, ``warp`` makes the time axis, and
``save`` writes files that are byte-identical when nothing has changed.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

BLACK: Final = "#000000"
ORANGE: Final = "#E69F00"
SKY: Final = "#56B4E9"
GREEN: Final = "#009E73"
YELLOW: Final = "#F0E442"
BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
PURPLE: Final = "#CC79A7"

INK: Final = "#1F2328"
QUIET: Final = "#59636E"
RULE: Final = "#D1D9E0"
PAPER: Final = "#FFFFFF"
BAND: Final = "#F6F8FA"
ALARM: Final = "#A40E26"
NEUTRAL: Final = "#9AA4AF"

WIDTH_IN: Final = 11.0
DOTS_PER_INCH: Final = 150
POINTS_PER_INCH: Final = 72.0
SMALL_PT: Final = 8.0
TEXT_PT: Final = 8.5
HEADING_PT: Final = 10.5
TITLE_PT: Final = 13.0


class Look(NamedTuple):
    """How one state is painted: fill, matplotlib hatch (or ""), colour of text on it, and a short name."""

    fill: str
    hatch: str
    text: str
    short: str


POLL_LOOKS: Final[dict[str, Look | None]] = {
    "Absent": None,
    "Announced": Look("#E7EBEF", "....", INK, "Ann"),
    "Bootstrapping": Look(YELLOW, "", INK, "Boot"),
    "WaitingForInput": Look(SKY, "", INK, "WFI"),
    "Transferring": Look(BLUE, "", PAPER, "Xfer"),
    "Success": Look(GREEN, "", PAPER, "OK"),
    "Failed": Look(VERMILLION, "", PAPER, "Fail"),
    "Retired": Look("#DDE2E7", "////", INK, "Ret"),
}
"""One look per poll state; None is drawn as nothing at all."""

LEASE_LOOKS: Final[dict[str, Look | None]] = {
    "Absent": None,
    "Unreserved": None,
    "Reserved": Look(SKY, "", INK, "Resv"),
    "Exposed": Look(ORANGE, "", INK, "Expo"),
    "Draining": Look(PURPLE, "", INK, "Drain"),
    "Quarantined": Look(BLACK, "", PAPER, "Quar"),
    "Forsaken": Look(VERMILLION, "", PAPER, "Fors"),
    "Settled": Look(GREEN, "", PAPER, "Sett"),
    "Released": Look("#DDE2E7", "", INK, "Rel"),
}
"""Known lease states. A name that is not here is painted neutral, hatched, and named in the legend."""

SERIES: Final = (SKY, ORANGE, GREEN, PURPLE, YELLOW, VERMILLION, BLUE, "#FFFFFF")
"""Line colours on a dark dashboard, in order of use."""

PARAMETERS: Final[dict[str, object]] = {
    "font.family": ["DejaVu Sans"],
    "font.size": TEXT_PT,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": SMALL_PT,
    "ytick.labelsize": SMALL_PT,
    "hatch.linewidth": 0.5,
    "hatch.color": NEUTRAL,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "path.simplify": False,
    "svg.hashsalt": "kvpoll",
    "svg.fonttype": "path",
}

# matplotlib otherwise writes its version and the hour into the file, and a rerun would differ for no reason.
_METADATA: Final[dict[str, dict[str, None]]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def poll_look(state: str) -> Look | None:
    """The look of a poll state; neutral for a name that this palette does not know; None for Absent."""
    return POLL_LOOKS[state] if state in POLL_LOOKS else neutral_look(state)


def lease_look(state: str) -> Look | None:
    """The look of a lease state; neutral for an unknown name; None where no memory is held."""
    return LEASE_LOOKS[state] if state in LEASE_LOOKS else neutral_look(state)


def neutral_look(state: str) -> Look:
    """A grey look for a state without a colour of its own; hatches tell two such states apart."""
    hatches = ("xxxx", "\\\\\\\\", "----", "||||", "++++")
    return Look("#C4CBD2", hatches[sum(map(ord, state)) % len(hatches)], INK, state[:4])


@contextmanager
def dressed() -> Iterator[None]:
    """Draw inside this context: kvpoll's parameters over matplotlib's defaults, whatever the user's are."""
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    with matplotlib.rc_context():
        matplotlib.rcParams.update(defaults)
        matplotlib.rcParams.update(PARAMETERS)  # type: ignore[arg-type]
        yield


def blank(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure with an Agg canvas; pyplot's global state is never touched."""
    figure = Figure(figsize=(width_in, height_in), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure


def check_target(out: Path) -> Path:
    """``out`` as a Path. Raises ValueError unless its suffix is .png, .svg or .pdf and its folder exists."""
    out = Path(out)
    if out.suffix not in _METADATA:
        nearest = difflib.get_close_matches(out.suffix, _METADATA, n=1, cutoff=0.3) or [".png"]
        raise ValueError(f"{out}: figures are .png, .svg or .pdf, not {out.suffix!r}; try {nearest[0]!r}")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {str(out.parent)!r}; create it first")
    return out


def save(figure: Figure, out: Path) -> None:
    """Write the figure without a date or a version in it, so that a rerun is byte-identical."""
    out = check_target(out)
    figure.savefig(out, dpi=DOTS_PER_INCH, metadata=_METADATA[out.suffix])


@lru_cache(maxsize=4096)
def text_width_pt(text: str, size_pt: float = SMALL_PT, weight: str = "normal") -> float:
    """How wide a line of text will be, in points: its outline, and the 3 % that hinting may add."""
    font = FontProperties(family="DejaVu Sans", weight=weight)
    path = TextPath((0, 0), text.rstrip().replace("$", "S") or " ", size=size_pt, prop=font)
    return 1.03 * float(path.get_extents().x1) if text.strip() else 0.0


def wrapped(text: str, width_pt: float, size_pt: float = SMALL_PT, indent: str = "") -> list[str]:
    """``text`` broken between words into lines of at most ``width_pt``; later lines start with ``indent``.

    A single word that is wider than the line keeps a line of its own.
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line.strip() else line + word
        if line.strip() and text_width_pt(longer, size_pt) > width_pt:
            lines.append(line)
            longer = indent + word
        line = longer
    return [*lines, line] if line.strip() or not lines else lines


# --- the sheet -----------------------------------------------------------------------------------

Box = tuple[float, float, float, float]
Segment = tuple[float, float, float, float]
Picture = Callable[[float, float], None]
"""Draws a legend's sample; (x, y) is the middle of its left edge."""

MARGIN: Final = 10.0
LINE: Final = 11.5
SWATCH: Final = 20.0


class Sheet:
    """The whole figure as one page, x to the right and y downwards, in points."""

    def __init__(self) -> None:
        self.figure: Figure = blank(4.0)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.width = WIDTH_IN * POINTS_PER_INCH
        self._windows: list[tuple[Axes, Box]] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str = INK,
        size_pt: float = SMALL_PT,
        **how: Any,
    ) -> None:
        """Words that start at x, their middle at y, unless ``how`` says otherwise."""
        how = {"ha": "left", "va": "center", "zorder": 8, **how}
        self.axes.text(x, y, words, color=colour, fontsize=size_pt, parse_math=False, **how)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, width: float = 0.8, **how: Any) -> None:
        self.axes.plot(xs, ys, color=colour, linewidth=width, solid_capstyle="butt", clip_on=False, **how)

    def rectangle(self, box: Box, fill: str, **how: Any) -> None:
        x0, y0, x1, y1 = box
        how = {"linewidth": 0, **how}
        self.axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=fill, **how))

    def arrow(self, segment: Segment, colour: str, width: float, head: bool = True, **how: Any) -> None:
        x0, y0, x1, y1 = segment
        shape = f"-|>,head_length={2.2 + width * 0.35},head_width={1.1 + width * 0.25}" if head else "-"
        how = {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 2, "zorder": 4, **how}
        self.axes.add_patch(FancyArrowPatch((x0, y0), (x1, y1), arrowstyle=shape, color=colour, linewidth=width, **how))

    def mark(self, x: float, y: float, marker: str, colour: str, size_pt: float, **how: Any) -> None:
        how = {"markeredgecolor": INK, "markeredgewidth": 0.6, "zorder": 6, **how}
        self.axes.plot([x], [y], marker=marker, color=colour, markersize=size_pt, linestyle="none", **how)

    def flag(self, box: Box, words: str) -> None:
        """Words in white on a small red plate."""
        x0, y0, x1, y1 = box
        plate = FancyBboxPatch(
            (x0 + 0.5, y0 + 0.5), x1 - x0 - 1, y1 - y0 - 1, boxstyle="round,pad=0,rounding_size=2",
            facecolor=ALARM, linewidth=0, zorder=7,
        )  # fmt: skip
        self.axes.add_patch(plate)
        self.text((x0 + x1) / 2, (y0 + y1) / 2, words, PAPER, ha="center", weight="bold")

    def badge(self, x: float, y: float, number: int, colour: str) -> None:
        self.axes.add_patch(Circle((x, y), 5.6, facecolor=PAPER, edgecolor=colour, linewidth=0.9, zorder=7))
        self.text(x, y + 0.2, str(number), colour, 8 if number < 10 else 7.4, ha="center", weight="bold")

    def window(self, box: Box) -> Axes:
        """Ordinary axes somewhere on the sheet."""
        axes: Axes = self.figure.add_axes((0, 0, 1, 1), label=str(len(self._windows)))
        self._windows.append((axes, box))
        return axes

    def finish(self, height: float) -> Figure:
        """Cut the sheet to its height; only now do points become positions."""
        self.figure.set_size_inches(WIDTH_IN, height / POINTS_PER_INCH)
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(height, 0)
        for axes, (x0, y0, x1, y1) in self._windows:
            axes.set_position((x0 / self.width, 1 - y1 / height, (x1 - x0) / self.width, (y1 - y0) / height))
        return self.figure


class Places:
    """What room is taken on one panel, and by which arrows it is crossed."""

    def __init__(self, bounds: Box) -> None:
        self._bounds = bounds
        self._boxes: list[Box] = []
        self._segments: list[Segment] = []

    def copy(self) -> Places:
        """The same room, to try something out on."""
        other = Places(self._bounds)
        other._boxes, other._segments = [*self._boxes], [*self._segments]
        return other

    def claim(self, box: Box) -> None:
        self._boxes.append(box)

    def cross(self, segment: Segment) -> None:
        self._segments.append(segment)

    def free(self, box: Box) -> bool:
        """Inside the panel, and over nothing that is claimed?"""
        x0, y0, x1, y1 = self._bounds
        inside = box[0] >= x0 and box[1] >= y0 and box[2] <= x1 and box[3] <= y1
        return inside and not any(overlap(box, other) for other in self._boxes)

    def crossings(self, box: Box) -> int:
        """How many arrows run through the box."""
        return sum(touches(segment, box) for segment in self._segments)

    def best(self, candidates: Iterable[Box], crossings: int) -> Box | None:
        """The free candidate with the fewest crossings, at most ``crossings``, now claimed; or None."""
        rated = [(self.crossings(box), place, box) for place, box in enumerate(candidates) if self.free(box)]
        if not rated or min(rated)[0] > crossings:
            return None
        self.claim(min(rated)[2])
        return min(rated)[2]


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def touches(segment: Segment, box: Box) -> bool:
    """Does the segment enter the box? (Liang and Barsky's clipping.)"""
    x0, y0, x1, y1 = segment
    enter, leave = 0.0, 1.0
    for step, low, high in ((x1 - x0, box[0] - x0, box[2] - x0), (y1 - y0, box[1] - y0, box[3] - y0)):
        if step == 0:
            if low > 0 or high < 0:
                return False
            continue
        near, far = sorted((low / step, high / step))
        enter, leave = max(enter, near), min(leave, far)
    return enter <= leave


def centred(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def flow(sheet: Sheet, name: str, items: Sequence[tuple[str, Picture]], y: float, indent: float) -> float:
    """A row of a legend: a sample and its words, again and again, broken where the sheet ends."""
    sheet.text(MARGIN, y, name, QUIET, weight="bold")
    x = indent
    for words, picture in items:
        width = SWATCH + 4 + text_width_pt(words)
        if x > indent and x + width > sheet.width - MARGIN:
            x, y = indent, y + LINE + 2
        picture(x, y)
        sheet.text(x + SWATCH + 4, y, words)
        x += width + 14
    return y + LINE + 3


# --- time ----------------------------------------------------------------------------------------

_FLOOR: Final = 0.3
"""Least width of a gap, in median gaps: a burst is stretched until its arrows can be told apart."""
_SLOPE: Final = 0.6
"""Gaps longer than the median grow with their logarithm, by this much per factor e."""
_IDLE: Final = 25.0
"""A gap this many times the median is idle: so much coarser a scale must be marked with //."""
_BREAK_SHARE: Final = 0.09
"""Least share of the axis that an idle gap keeps, so that its sign and its two times can be read."""


class Warp(NamedTuple):
    """A map from seconds to [0, 1]: piecewise linear, strictly increasing between its knots, clamped outside.

    breaks: the idle gaps (begin_s, end_s) that were cut short and need a // on the axis.
    """

    times_s: tuple[float, ...]
    places: tuple[float, ...]
    breaks: tuple[tuple[float, float], ...]

    def __call__(self, t: float) -> float:
        """Place of time ``t`` (seconds) on the axis, 0 to 1."""
        return _interpolate(t, self.times_s, self.places)

    def inverse(self, place: float) -> float:
        """The time (seconds) at a place on the axis."""
        return _interpolate(place, self.places, self.times_s)


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    index = bisect_right(xs, x)
    if index == 0:
        return ys[0]
    if index == len(xs):
        return ys[-1]
    share = (x - xs[index - 1]) / (xs[index] - xs[index - 1])
    return ys[index - 1] + share * (ys[index] - ys[index - 1])


def warp(times: Iterable[float]) -> Warp:
    """A time axis for events at ``times`` (seconds, any order): ordinary gaps to scale, idle ones cut short.

    A life of 2 s of action and 300 s of waiting has no legible linear axis. Gaps up to the median are linear
    (with a floor, so that bursts stay readable), longer ones grow with their logarithm, and idle ones are
    reported in ``breaks``. Evenly spaced times give exactly the linear axis. No times, or one, map to 0.5.
    """
    knots = sorted(set(times))
    if len(knots) < 2:
        only = knots[0] if knots else 0.0
        return Warp((only,), (0.5,), ())
    gaps = [after - before for before, after in pairwise(knots)]
    unit = median(gaps)
    widths = [_width(gap / unit) for gap in gaps]
    idle = [gap / unit > _IDLE for gap in gaps]
    busy = sum(width for width, cut in zip(widths, idle, strict=True) if not cut)
    if any(idle):
        least = min(_BREAK_SHARE, 0.45 / sum(idle)) * busy
        widths = [max(width, least) if cut else width for width, cut in zip(widths, idle, strict=True)]
    places = [0.0]
    for width in widths:
        places.append(places[-1] + width)
    breaks = tuple(pair for pair, cut in zip(pairwise(knots), idle, strict=True) if cut)
    return Warp(tuple(knots), tuple(place / places[-1] for place in places), breaks)


def _width(gap: float) -> float:
    """Width of a gap, both in units of the median gap."""
    return max(gap, _FLOOR) if gap <= 1 else 1 + _SLOPE * math.log(gap)


def clock(t: float, beside_s: float) -> str:
    """A time as the axis writes it: to a tenth of the distance to its neighbour, in 1 to 4 decimals."""
    decimals = min(4, max(1, math.ceil(-math.log10(beside_s)) + 1)) if 0 < beside_s < math.inf else 1
    text = f"{t:.{decimals}f}"
    return text.rstrip("0").rstrip(".")
