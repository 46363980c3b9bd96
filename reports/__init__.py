"""What people look at: figures drawn from traces, and from nothing else.

A figure is drawn from the events of ``kvpoll.spec.trace``, so a simulation, an exhaustive search and a
production log give the same picture::

    from pathlib import Path
    from kvpoll.reports import Panel, draw, gauge_row
    from kvpoll.spec.trace import read_trace

    with open("before.jsonl") as file:
        before = list(read_trace(file, "before.jsonl")[1])
    draw([Panel("Before", "profile before-sglang-27028", before)], Path("race.png"), "sglang#26912",
         extra=[gauge_row("num_prefill_bootstrap_queue_reqs")])

spacetime: one request on every rank that took part, with its violations.
reading: the same request as values, without a picture.
gauges: queue lengths as an operator sees them, and success rates with intervals.
style: paper, ink and time axis, and files that are byte-identical when nothing has changed.

Names are imported when they are first asked for: matplotlib is an extra, and half a second that a command
which draws nothing should not pay.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpoll.reports.gauges import draw_gauge, draw_success_curve, gauge_row, gauge_series, wilson
    from kvpoll.reports.reading import Story, bars, pick_focus, story
    from kvpoll.reports.spacetime import ExtraRow, Panel, draw
    from kvpoll.reports.style import Warp, warp

__all__ = [
    "ExtraRow",
    "Panel",
    "Story",
    "Warp",
    "bars",
    "draw",
    "draw_gauge",
    "draw_success_curve",
    "gauge_row",
    "gauge_series",
    "pick_focus",
    "story",
    "warp",
    "wilson",
]

_HOMES = {
    **dict.fromkeys(("draw_gauge", "draw_success_curve", "gauge_row", "gauge_series", "wilson"), "gauges"),
    **dict.fromkeys(("Story", "bars", "pick_focus", "story"), "reading"),
    **dict.fromkeys(("Warp", "warp"), "style"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'spacetime')}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError("figures need matplotlib, which is missing: pip install 'kvpoll[reports]'") from None
