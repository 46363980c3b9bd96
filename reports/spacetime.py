"""The space-time diagram of one request: who did what when, on every rank that took part.

Time runs to the right, one lane a node: router, bootstrap servers, prefill ranks, decode ranks. On a lane the
thick bar is the poll of the request on that rank and the thin bar below it is the lease of its memory: most
silent corruption is one of the two being mistaken for the other, so both are always drawn. Messages are
arrows, one-sided writes are broad translucent ones, faults are shaded, violations are dotted lines in red.

``reading`` turns events into values; this file lays the values out on one sheet whose unit is the point
(1/72 inch), so that every overlap can be computed before anything is drawn.

It will not judge: what is violated is what the trace says is violated. It shows one request, (room, attempt);
other tries at the same room, and writes of others into this request's pages, appear in grey or red.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvpoll.reports import style
from kvpoll.reports.reading import (
    ROLES,
    Arrow,
    Fault,
    Story,
    axes_of,
    findings,
    lane_order,
    look_of,
    story,
)
from kvpoll.reports.style import (
    LINE,
    MARGIN,
    SWATCH,
    Box,
    Picture,
    Places,
    Segment,
    Sheet,
    Warp,
    centred,
    clock,
    flow,
)
from kvpoll.spec.trace import Pair


class Panel(NamedTuple):
    """One space-time diagram: events of a whole trace in order of time, and the (room, attempt) to show.

    focus None shows the pair of the first violation that has one, else the first request of the trace.
    """

    title: str
    subtitle: str
    events: list[Any]
    focus: Pair | None = None


ExtraRow = Callable[[Axes, Panel], None]
"""Draws one panel's share of a row of ordinary axes below the diagrams, for example a gauge."""


_GUTTER: Final = 18.0
_HEADROOM: Final = 18.0
_PITCH: Final = 46.0
_BAR: Final = 6.5
"""Half the height of a poll bar; text inside it is 8 point."""
_LEASE: Final = (8.0, 12.0)
"""Top and bottom of the lease bar, below the middle of its lane."""
_EDGE: Final = 9.0
"""Room at both ends of the time axis, so that a mark at the first instant is whole."""
_EXTRA_ROW: Final = 134.0
_ALIKE: Final = 4.0
"""Extra rows share the length of their x axis while the longest is at most this many times the shortest."""
_BEAT_APART: Final = 4.0
_BUNDLE: Final = 14.0
"""Arrows of one label and a common end that leave within this many points share one label."""
_PASSING: Final = 4.0
"""Least width of a poll bar: Failed is often left for Retired in the same instant, and must be seen."""
_STUB: Final = 14.0
"""How far an arrow that never arrives leans to the right."""


class _MarkLook(NamedTuple):
    marker: str
    colour: str
    size_pt: float
    above: bool


_MARKS: Final[dict[str, _MarkLook]] = {
    "admitted": _MarkLook("o", style.PAPER, 7, False),
    "answered": _MarkLook("o", style.GREEN, 7, False),
    "refused": _MarkLook("o", style.VERMILLION, 7, False),
    "agreed: admit": _MarkLook("v", style.GREEN, 6, True),
    "agreed: drop": _MarkLook("v", style.VERMILLION, 6, True),
    "decoding starts": _MarkLook("*", style.GREEN, 9, True),
    "illegal fact": _MarkLook("D", style.ORANGE, 5.5, True),
    "loop stopped": _MarkLook("s", style.ALARM, 7, False),
    "stopped": _MarkLook("X", style.BLACK, 8, False),
    "started": _MarkLook(">", style.GREEN, 8, False),
}
_NOTED: Final = ("loop stopped", "illegal fact", "refused")
"""Marks whose label is worth a line of text below the panel."""

_ARROW_COLOURS: Final = {"message": style.INK, "request": "#5A4FB0", "write": style.BLUE}
_LEGEND_WORDS: Final = {"message": "message", "request": "HTTP, there and back", "write": "one-sided write"}


Corner = tuple[float, float, float]
"""Left, top and width; the height follows from the lanes."""


class _Frame:
    """Where one panel's times and lanes are on the sheet, and what room is taken there."""

    def __init__(self, sheet: Sheet, told: Story, time: Warp, lane_names: list[str], at: Corner) -> None:
        self.sheet, self.told, self.time = sheet, told, time
        self.left, self.top, self.width = at
        self.right = self.left + self.width
        self.lane_names = lane_names
        self.floor = self.top + _HEADROOM + _PITCH * len(lane_names)
        self.places = Places((self.left, self.top, self.right, self.floor))
        self.segments = _segments(self)

    def x(self, t: float) -> float:
        return self.left + _EDGE + self.time(t) * (self.width - 2 * _EDGE)

    def y(self, node: str) -> float:
        return self.top + _HEADROOM + _PITCH * (self.lane_names.index(node) + 0.5)


class _Legend:
    """What the figure has used and must therefore explain; numbers stand for labels that found no room."""

    def __init__(self) -> None:
        self.polls: set[str] = set()
        self.leases: set[str] = set()
        self.arrows: set[str] = set()
        self.marks: set[str] = set()
        self.numbers: dict[str, tuple[int, str]] = {}

    def number(self, label: str, colour: str) -> int:
        return self.numbers.setdefault(label, (len(self.numbers) + 1, colour))[0]


def draw(panels: Sequence[Panel], out: Path, title: str, extra: Sequence[ExtraRow] | None = None) -> Path:
    """Draw the panels side by side with common lanes into ``out`` (.png, .svg or .pdf) and return its path.

    extra: each callable is one more row of ordinary axes, called once a panel with (axes, panel); see
    ``gauges.gauge_row``. The file holds no date and no version, so the same traces give the same bytes.
    Raises ValueError (one line) for no panels, more than four, or a target that cannot be written.
    """
    out = style.check_target(out)
    if not 1 <= len(panels) <= 4:
        raise ValueError(f"{out}: a space-time figure has 1 to 4 panels side by side, not {len(panels)}")
    with style.dressed():
        style.save(compose(panels, title, extra or ()), out)
    return out


def compose(panels: Sequence[Panel], title: str, extra: Sequence[ExtraRow] = ()) -> Figure:
    """The figure that ``draw`` saves, for callers that want it unsaved. Call inside ``style.dressed()``."""
    sheet, legend = Sheet(), _Legend()
    stories = [story(panel.events, panel.focus) for panel in panels]
    names = sorted({lane for told in stories for lane in told.lanes}, key=lane_order)
    label_width = max([_lane_label_width(name) for name in names], default=0.0)
    left = MARGIN + label_width + 6
    width = (sheet.width - MARGIN - left - _GUTTER * (len(panels) - 1)) / len(panels)
    columns = [left + place * (width + _GUTTER) for place in range(len(panels))]
    y = _title(sheet, title)
    top = max(_heading(sheet, panel, x, y, width) for panel, x in zip(panels, columns, strict=True))
    frames = [
        _Frame(sheet, told, time, names, (x, top, width))
        for told, time, x in zip(stories, axes_of(stories), columns, strict=True)
    ]
    _lane_labels(frames[0], label_width)
    sheet.text(MARGIN + label_width, frames[0].floor + 9.5, "t (s)", style.QUIET, ha="right")
    for frame in frames:
        _panel(frame, legend)
    wordless = {label for frame in frames for label in _arrow_labels(frame, frame.places.copy(), set(), None)}
    for frame in frames:
        _arrow_labels(frame, frame.places, wordless, legend)
    y = max(_findings(frame) for frame in frames)
    for row in extra:
        y = _extra(sheet, row, panels, columns, y, width)
    return sheet.finish(_explain(sheet, legend, y) + MARGIN)


def _title(sheet: Sheet, title: str) -> float:
    y = MARGIN + 6
    for line in style.wrapped(title, (sheet.width - 2 * MARGIN) * 0.93, style.TITLE_PT):
        sheet.text(MARGIN, y, line, size_pt=style.TITLE_PT, weight="bold")
        y += style.TITLE_PT * 1.35
    return y


def _heading(sheet: Sheet, panel: Panel, x: float, y: float, width: float) -> float:
    y += 2
    for line in style.wrapped(panel.title, width * 0.93, style.HEADING_PT):
        sheet.text(x, y, line, size_pt=style.HEADING_PT, weight="bold")
        y += style.HEADING_PT * 1.35
    for line in style.wrapped(panel.subtitle, width, style.TEXT_PT) if panel.subtitle else ():
        sheet.text(x, y, line, style.QUIET, style.TEXT_PT)
        y += style.TEXT_PT * 1.4
    return y + 2


def _lane_label_width(name: str) -> float:
    role = ROLES.get(name[:1], "")
    return max(style.text_width_pt(name, style.TEXT_PT, "bold"), style.text_width_pt(role))


def _lane_labels(frame: _Frame, width: float) -> None:
    for name in frame.lane_names:
        x, y = MARGIN + width, frame.y(name)
        frame.sheet.text(x, y - 4.5, name, size_pt=style.TEXT_PT, weight="bold", ha="right")
        frame.sheet.text(x, y + 6, ROLES.get(name[:1], ""), style.QUIET, ha="right")


def _panel(frame: _Frame, legend: _Legend) -> None:
    """Everything of one panel but the words on its arrows; what must be legible claims its room first."""
    for _, path in frame.segments:
        for segment in path:
            frame.places.cross(segment)
    _ground(frame)
    _bars(frame, legend)
    _axis(frame)
    _marks_on(frame, legend)
    _beats_on(frame, legend)
    _violation_flags(frame)
    _fault_bands(frame)
    for arrow, path in frame.segments:
        _arrow(frame, arrow, path)
        legend.arrows.add(arrow.kind)


def _ground(frame: _Frame) -> None:
    sheet = frame.sheet
    for place, name in enumerate(frame.lane_names):
        y = frame.y(name)
        band = (frame.left, y - _PITCH / 2, frame.right, y + _PITCH / 2)
        sheet.rectangle(band, style.BAND if place % 2 == 0 else style.PAPER, zorder=0)
        if name in frame.told.lanes:
            for begin, end in _lives(frame, name):
                sheet.line([begin, end], [y, y], style.NEUTRAL, 0.7, zorder=1)
    if frame.told.healed_s is not None:
        x = frame.x(frame.told.healed_s)
        sheet.line([x, x], [frame.top + 4, frame.floor], style.GREEN, 1.0, linestyle=(0, (6, 3)), zorder=1)
        _beside(frame, x, frame.top + 8, "faults over", style.GREEN)
    if not frame.lane_names:
        sheet.text(frame.left, frame.top + 8, "no request in this trace", style.QUIET)


def _lives(frame: _Frame, name: str) -> Iterator[tuple[float, float]]:
    """The stretches of a lane in which its process runs."""
    begin: float | None = frame.left
    for mark in frame.told.marks:
        if mark.node == name and mark.kind == "stopped" and begin is not None:
            yield begin, frame.x(mark.at_s)
            begin = None
        elif mark.node == name and mark.kind == "started":
            begin = frame.x(mark.at_s) if begin is None else begin
    if begin is not None:
        yield begin, frame.right


def _beside(frame: _Frame, x: float, y: float, words: str, colour: str) -> None:
    """Words just right of x, else just left of it, else nowhere."""
    width = style.text_width_pt(words) + 4
    boxes = [(x + 2, y - 5, x + 2 + width, y + 5), (x - 2 - width, y - 5, x - 2, y + 5)]
    box = frame.places.best(boxes, crossings=99)
    if box is not None:
        frame.sheet.text(box[0] + 2, y, words, colour)


def _axis(frame: _Frame) -> None:
    sheet, y = frame.sheet, frame.floor
    sheet.line([frame.left, frame.right], [y, y], style.QUIET, 0.8, zorder=3)
    for anchor in frame.told.anchors:
        sheet.line([frame.x(anchor)] * 2, [y, y + 2], style.NEUTRAL, 0.6, zorder=3)
    for t, words in _ticks(frame):
        sheet.line([frame.x(t)] * 2, [y, y + 4], style.QUIET, 0.8, zorder=3)
        sheet.text(frame.x(t), y + 9.5, words, style.QUIET, ha="center")
    for begin_s, end_s in frame.time.breaks:
        if frame.told.begin_s <= begin_s and end_s <= frame.told.end_s:
            _break(frame, begin_s, end_s)


def _break(frame: _Frame, begin_s: float, end_s: float) -> None:
    """A cut through the lanes where idle time is left out, with the time that it stands for above."""
    sheet, x = frame.sheet, (frame.x(begin_s) + frame.x(end_s)) / 2
    top, floor = frame.top + _HEADROOM, frame.floor
    sheet.rectangle((x - 2.2, top, x + 2.2, floor), style.PAPER, zorder=3)
    for side in (-2.2, 2.2):
        sheet.line([x + side] * 2, [top, floor], style.NEUTRAL, 0.6, linestyle=(0, (2, 2)), zorder=3)
        sheet.line([x + side - 2, x + side + 2], [floor + 4, floor - 4], style.INK, 1.1, zorder=5)
    words = _span(end_s - begin_s)
    width, y = style.text_width_pt(words) + 4, frame.top + 9
    box = frame.places.best([centred(x + dx, y, width, 10) for dx in (0, -12, 12, -20, 20)], crossings=99)
    if box is not None:
        sheet.text((box[0] + box[2]) / 2, y, words, style.QUIET, ha="center")


def _span(seconds: float) -> str:
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def _ticks(frame: _Frame) -> list[tuple[float, str]]:
    """The times that get a label: ends and breaks first, then violations, then whatever finds room."""
    told = frame.told
    wanted = [told.begin_s, told.end_s]
    wanted += [t for gap in frame.time.breaks for t in gap if told.begin_s <= t <= told.end_s]
    wanted += [event.t for event in told.violations]
    wanted += [told.healed_s] if told.healed_s is not None else []
    wanted += [bar.begin_s for bar in told.bars if bar.machine == "poll"]
    wanted += told.anchors
    room = style.text_width_pt("00.000") + 3
    chosen: list[float] = []
    for t in wanted:
        if all(abs(frame.x(t) - frame.x(other)) >= room for other in chosen):
            chosen.append(t)
    chosen.sort()
    around = [math.inf, *(after - before for before, after in pairwise(chosen)), math.inf]
    beside = [min(pair) for pair in pairwise(around)]
    return [(t, clock(t, gap)) for t, gap in zip(chosen, beside, strict=True)]


def _bars(frame: _Frame, legend: _Legend) -> None:
    ends = ("Success", "Failed")
    passing_last = sorted(frame.told.bars, key=lambda bar: (bar.begin_s == bar.end_s, bar.state in ends))
    for bar in passing_last:
        look = look_of(bar)
        if look is None or bar.end_s < frame.told.begin_s or bar.node not in frame.lane_names:
            continue
        (legend.polls if bar.machine == "poll" else legend.leases).add(bar.state)
        y = frame.y(bar.node)
        low, high = (-_BAR, _BAR) if bar.machine == "poll" else _LEASE
        begin = frame.x(bar.begin_s)
        box = (
            begin,
            y + low,
            max(frame.x(bar.end_s), begin + (_PASSING if bar.machine == "poll" else 0)),
            y + high,
        )
        passing = bar.begin_s == bar.end_s
        edge = {"edgecolor": style.PAPER if not look.hatch else style.NEUTRAL, "linewidth": 0.5}
        frame.sheet.rectangle(box, look.fill, hatch=look.hatch, zorder=2.5 if passing else 2, **edge)
        frame.places.claim(box)
        if bar.machine == "poll":
            _bar_name(frame, box, bar.state, look)


def _bar_name(frame: _Frame, box: Box, state: str, look: style.Look) -> None:
    """The state's name, or its short name, in its bar: where there is room and least is crossed."""
    for words in (state, look.short):
        width = style.text_width_pt(words) + 4
        spots = [
            (begin + (end - begin - width) * share, end - begin)
            for begin, end in _uncut(frame, box[0], box[2])
            if end - begin >= width + 1
            for share in (0.5, 0.35, 0.65, 0.2, 0.8, 0.05, 0.95)
        ]
        spots.sort(key=lambda spot: -spot[1])
        boxes = [(x, box[1] + 1, x + width, box[3] - 1) for x, _ in spots]
        if boxes:
            x = min(boxes, key=frame.places.crossings)[0]
            halo = [patheffects.withStroke(linewidth=2.2, foreground=look.fill)]
            y = (box[1] + box[3]) / 2 - 0.2
            frame.sheet.text(x + 2, y, words, look.text, zorder=3.5, path_effects=halo)
            return


def _uncut(frame: _Frame, begin: float, end: float) -> list[tuple[float, float]]:
    """The parts of a stretch of the axis between the cuts of its idle gaps."""
    cuts = [(frame.x(gap[0]) + frame.x(gap[1])) / 2 for gap in frame.time.breaks]
    edges = [begin, *(cut for cut in cuts if begin < cut < end), end]
    return [(left + 2.5 * (left in cuts), right - 2.5 * (right in cuts)) for left, right in pairwise(edges)]


def _marks_on(frame: _Frame, legend: _Legend) -> None:
    for mark in frame.told.marks:
        look = _MARKS[mark.kind]
        x, y = frame.x(mark.at_s), frame.y(mark.node) - (_BAR + 5 if look.above else 0)
        frame.sheet.mark(x, y, look.marker, look.colour, look.size_pt)
        frame.places.claim(centred(x, y, look.size_pt + 1, look.size_pt + 1))
        legend.marks.add(mark.kind)


def _beats_on(frame: _Frame, legend: _Legend) -> None:
    """Collectives as ticks below the lease; where a poll loop beats fast, one tick stands for many."""
    last: dict[tuple[str, bool], float] = {}
    for beat in frame.told.beats:
        x, y = frame.x(beat.at_s), frame.y(beat.node) + _LEASE[1] + 1.5
        if x - last.get((beat.node, beat.agrees), -math.inf) < _BEAT_APART:
            continue
        last[beat.node, beat.agrees] = x
        colour, width = (style.QUIET, 0.6) if beat.agrees else (style.ALARM, 1.4)
        frame.sheet.line([x, x], [y, y + 3.5], colour, width, zorder=2)
        legend.marks.add("collective" if beat.agrees else "collective of unlike shape")


def _violation_flags(frame: _Frame) -> None:
    flagged: set[tuple[str, str]] = set()
    for event in frame.told.violations:
        if (event.invariant, event.node) in flagged:
            continue
        flagged.add((event.invariant, event.node))
        x, width = frame.x(event.t), style.text_width_pt(event.invariant, weight="bold") + 7
        y = frame.y(event.node) - _BAR - 8 if event.node in frame.lane_names else frame.top + 9
        steps = [side * part * (width + 1) / 2 for part in range(7) for side in (-1, 1)]
        boxes = [centred(x + dx, y + dy, width, 12) for dy in (0, -6, 30) for dx in steps]
        box = frame.places.best(boxes, crossings=99) or boxes[0]
        frame.sheet.flag(box, event.invariant)
        top = frame.top + (_HEADROOM if event.node in frame.lane_names else 9)
        frame.sheet.line([x, x], [top, frame.floor], style.ALARM, 0.9, linestyle=(0, (1, 2)), zorder=3.2)


def _fault_bands(frame: _Frame) -> None:
    for fault in frame.told.faults:
        x0 = frame.x(fault.begin_s)
        x1 = max(frame.x(fault.end_s), x0 + 4)
        for name in {*fault.struck, *fault.severed}:
            y, struck = frame.y(name), name in fault.struck
            box = (x0, y - _PITCH / 2 + 1, x1, y + _PITCH / 2 - 1)
            hatch = "" if struck else "///"
            frame.sheet.rectangle(
                box,
                style.VERMILLION if struck else "none",
                alpha=0.16,
                hatch=hatch,
                zorder=0.5,
                edgecolor=style.VERMILLION,
            )
        first = min(fault.struck, key=frame.lane_names.index)
        _fault_name(frame, fault, x0, frame.y(first))


def _fault_name(frame: _Frame, fault: Fault, x0: float, y: float) -> None:
    words = fault.kind.replace("_", " ")
    width = style.text_width_pt(words) + 3
    rows = (y - _PITCH / 2 + 7, y + _PITCH / 2 - 6, y - _BAR - 6)
    boxes = [(x, row - 5, x + width, row + 5) for row in rows for x in (x0 + 1, x0 + 8, x0 - width - 1, x0 + 20)]
    boxes += [(x0 + step * 6, row - 5, x0 + step * 6 + width, row + 5) for row in rows for step in range(-20, 20)]
    box = frame.places.best(boxes, crossings=99)
    if box is not None:
        frame.sheet.text(box[0] + 1.5, (box[1] + box[3]) / 2, words, "#8F3D00", style="italic", zorder=6)


def _segments(frame: _Frame) -> list[tuple[Arrow, list[Segment]]]:
    """Each arrow with the strokes that draw it: one, or two for a request that is answered."""
    found = []
    for arrow in frame.told.arrows:
        if arrow.source == arrow.target or arrow.source not in frame.lane_names:
            continue
        x0, x1 = frame.x(arrow.begin_s), frame.x(arrow.end_s)
        if arrow.kind == "request":
            if arrow.outcome == "pending":
                x1 = min(x1, x0 + 8)
            middle = (x0 + x1) / 2
            there = _stroke(frame, arrow.source, arrow.target, x0, middle)
            back = _stroke(frame, arrow.target, arrow.source, middle, x1)
            found.append((arrow, [there] if arrow.outcome == "pending" else [there, back]))
        else:
            x1 = min(x1, x0 + _STUB) if arrow.outcome == "pending" else x1
            path = _stroke(frame, arrow.source, arrow.target, x0, x1)
            found.append(
                (
                    arrow,
                    [(path[0], path[1], *_along(path, 0.6))] if arrow.outcome in ("lost", "pending") else [path],
                )
            )
    return found


def _stroke(frame: _Frame, source: str, target: str, x0: float, x1: float) -> Segment:
    down = frame.y(target) > frame.y(source)
    return (x0, _rim(frame, source, down), x1, _rim(frame, target, not down))


def _rim(frame: _Frame, node: str, below: bool) -> float:
    """Where arrows touch a lane: at the rim of its bars, or near the line of a lane that has none."""
    y = frame.y(node)
    if node[:1] in ("R", "B"):
        return y + 3 if below else y - 3
    return y + _LEASE[1] if below else y - _BAR


def _arrow(frame: _Frame, arrow: Arrow, path: list[Segment]) -> None:
    colour = _arrow_colour(arrow)
    sheet, last = frame.sheet, path[-1]
    if arrow.kind == "write":
        sheet.arrow(last, colour, 4.5, head=arrow.outcome != "pending", alpha=0.38, zorder=2.8)
    elif arrow.kind == "request":
        for segment in path:
            sheet.arrow(segment, colour, 0.8, head=segment is last, alpha=0.9)
    else:
        dashes = "solid" if arrow.outcome == "arrived" and arrow.own else (0, (3, 2))
        sheet.arrow(last, colour, 1.1, head=arrow.outcome == "arrived", linestyle=dashes)
    if arrow.outcome in ("lost", "failed"):
        x, y = (path[0][2], path[0][3]) if arrow.kind == "request" else (last[2], last[3])
        sheet.mark(x, y, "x", style.ALARM, 6, markeredgecolor=style.ALARM, markeredgewidth=1.6)


def _arrow_colour(arrow: Arrow) -> str:
    if not arrow.own:
        return style.VERMILLION if arrow.kind == "write" else style.NEUTRAL
    return _ARROW_COLOURS[arrow.kind]


def _arrow_labels(frame: _Frame, places: Places, wordless: set[str], legend: _Legend | None) -> set[str]:
    """Words beside an arrow where there is room, else a number that the legend explains; one for a bundle.

    Returns the labels that found no room for their words. Without a legend nothing is drawn: the first round
    only learns which labels must be numbers, so that in the second every arrow of a kind is labelled alike.
    """
    failed: set[str] = set()
    for arrow, path in _bundled(frame.segments):
        segment = path[0] if arrow.kind == "request" else path[-1]
        if arrow.label in wordless:
            _number_arrow(frame, places, arrow, segment, legend)
            continue
        box = places.best(_word_boxes(arrow, segment), crossings=0)
        if box is None:
            failed.add(arrow.label)
        elif legend is not None:
            frame.sheet.text(box[0] + 2, (box[1] + box[3]) / 2, arrow.label, _label_colour(arrow))
    return failed


def _bundled(segments: Sequence[tuple[Arrow, list[Segment]]]) -> list[tuple[Arrow, list[Segment]]]:
    """One arrow, the longest, of each bundle: same label, a common end, nearly the same time."""
    chosen: list[tuple[Arrow, list[Segment]]] = []
    for arrow, path in sorted(segments, key=lambda pair: -abs(pair[1][0][3] - pair[1][0][1])):
        alike = (
            other.label == arrow.label
            and abs(other_path[0][0] - path[0][0]) < _BUNDLE
            and {other.source, other.target} & {arrow.source, arrow.target}
            for other, other_path in chosen
        )
        if not any(alike):
            chosen.append((arrow, path))
    return sorted(chosen, key=lambda pair: pair[0].begin_s)


def _label_colour(arrow: Arrow) -> str:
    colour = _arrow_colour(arrow)
    return {style.NEUTRAL: style.QUIET, style.BLUE: "#0A4F7D", style.VERMILLION: "#8F3D00"}.get(colour, colour)


def _along(segment: Segment, share: float) -> tuple[float, float]:
    x0, y0, x1, y1 = segment
    return (x0 + (x1 - x0) * share, y0 + (y1 - y0) * share)


def _word_boxes(arrow: Arrow, segment: Segment) -> list[Box]:
    width, gap = style.text_width_pt(arrow.label) + 4, 4 if arrow.kind == "write" else 2
    spots = [_along(segment, share) for share in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)]
    right = [(x + gap, y - 5, x + gap + width, y + 5) for x, y in spots]
    left = [(x - gap - width, y - 5, x - gap, y + 5) for x, y in spots]
    return [*right, *left]


def _number_arrow(frame: _Frame, places: Places, arrow: Arrow, path: Segment, legend: _Legend | None) -> None:
    shares = [0.5 + sign * step / 20 for step in range(9) for sign in (1, -1)]
    discs = [centred(*_along(path, share), 11.6, 11.6) for share in shares]
    disc = places.best(discs, crossings=99)
    if disc is not None and legend is not None:
        colour = _label_colour(arrow)
        number = legend.number(arrow.label, colour)
        frame.sheet.badge((disc[0] + disc[2]) / 2, (disc[1] + disc[3]) / 2, number, colour)


def _findings(frame: _Frame) -> float:
    y = frame.floor + 26
    broken = findings(frame.told)
    for text in broken or ["no violation in this trace"]:
        colour = style.ALARM if broken else "#00664B"
        for line in style.wrapped(text, frame.width, indent="    "):
            frame.sheet.text(frame.left, y, line, colour)
            y += LINE
    for mark in frame.told.marks:
        if mark.kind in _NOTED and mark.label:
            text = f"{clock(mark.at_s, 0.001)} s, {mark.node}: {mark.label}"
            for line in style.wrapped(text, frame.width, indent="    "):
                frame.sheet.text(frame.left, y, line, style.INK)
                y += LINE
    return y + 2


def _extra(sheet: Sheet, row: ExtraRow, panels: Sequence[Panel], columns: list[float], y: float, width: float) -> float:
    """One row of ordinary axes below the diagrams, with one height of the y axis for all of them."""
    drawn = []
    for panel, x in zip(panels, columns, strict=True):
        axes = sheet.window((x, y + 18, x + width, y + _EXTRA_ROW - 24))
        row(axes, panel)
        drawn.append(axes)
    tallest, ends = max(axes.get_ylim()[1] for axes in drawn), [axes.get_xlim()[1] for axes in drawn]
    for axes in drawn:
        axes.set_ylim(axes.get_ylim()[0], tallest)
        if max(ends) <= _ALIKE * min(ends):
            axes.set_xlim(axes.get_xlim()[0], max(ends))
    return y + _EXTRA_ROW


# --- the legend -----------------------------------------------------------------------------------

Item = tuple[str, Picture]


def _explain(sheet: Sheet, legend: _Legend, y: float) -> float:
    """The legend, one row a theme, broken where the sheet ends. Returns the y below it."""
    y += 4
    sheet.line([MARGIN, sheet.width - MARGIN], [y, y], style.RULE, 0.8)
    y += 10
    themes = _themes(sheet, legend)
    indent = MARGIN + max(style.text_width_pt(name, weight="bold") for name, _ in themes) + 12
    for name, items in themes:
        if items:
            y = flow(sheet, name, items, y, indent)
    return y


def _themes(sheet: Sheet, legend: _Legend) -> list[tuple[str, list[Item]]]:
    polls = [state for state in style.POLL_LOOKS if state in legend.polls]
    leases = [state for state in style.LEASE_LOOKS if state in legend.leases]
    polls += sorted(legend.polls - set(polls))
    leases += sorted(legend.leases - set(leases))
    numbered = sorted((number, label, colour) for label, (number, colour) in legend.numbers.items())
    drawn: list[Item] = [
        (words, _sample(sheet, kind)) for kind, words in _LEGEND_WORDS.items() if kind in legend.arrows
    ]
    drawn += [(kind, _symbol(sheet, look)) for kind, look in _MARKS.items() if kind in legend.marks]
    beats = [kind for kind in ("collective", "collective of unlike shape") if kind in legend.marks]
    drawn += [(kind, _beat_sample(sheet, kind)) for kind in beats]
    return [
        ("poll (thick bar)", [(s, _swatch(sheet, style.poll_look(s), _BAR - 1.5)) for s in polls]),
        ("lease (thin bar)", [(s, _swatch(sheet, style.lease_look(s), 2.2)) for s in leases]),
        ("drawn as", [*drawn, ("idle time cut short", _cut_sample(sheet))]),
        ("numbers", [(label, _number(sheet, number, colour)) for number, label, colour in numbered]),
    ]


def _swatch(sheet: Sheet, look: style.Look | None, half: float) -> Picture:
    shown = look or style.neutral_look("")
    how = {"hatch": shown.hatch, "edgecolor": style.NEUTRAL, "linewidth": 0.4}
    return lambda x, y: sheet.rectangle((x, y - half, x + SWATCH, y + half), shown.fill, **how)


def _sample(sheet: Sheet, kind: str) -> Picture:
    width, alpha = {"write": (4.5, 0.38), "request": (0.8, 0.9)}.get(kind, (1.1, 1.0))
    return lambda x, y: sheet.arrow((x, y, x + SWATCH, y), _ARROW_COLOURS[kind], width, alpha=alpha)


def _symbol(sheet: Sheet, look: _MarkLook) -> Picture:
    return lambda x, y: sheet.mark(x + SWATCH - 5, y, look.marker, look.colour, look.size_pt)


def _beat_sample(sheet: Sheet, kind: str) -> Picture:
    colour, width = (style.QUIET, 0.5) if kind == "collective" else (style.ALARM, 1.4)
    return lambda x, y: sheet.line([x + SWATCH - 5] * 2, [y - 2.5, y + 2.5], colour, width)


def _number(sheet: Sheet, number: int, colour: str) -> Picture:
    return lambda x, y: sheet.badge(x + SWATCH - 6, y, number, colour)


def _cut_sample(sheet: Sheet) -> Picture:
    def cut(x: float, y: float) -> None:
        sheet.line([x, x + SWATCH], [y, y], style.QUIET, 0.8)
        for side in (-2.2, 2.2):
            middle = x + SWATCH / 2 + side
            sheet.line([middle - 2, middle + 2], [y + 4, y - 4], style.INK, 1.1)

    return cut
