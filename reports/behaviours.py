"""Pictures of what the explorer found: a panel for each request that takes part, or one for all nodes without any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvpoll.reports.spacetime import Panel, draw
from kvpoll.spec.trace import Admitted

PANELS_MOST: Final = 3


def draw_behaviour(place: Path, heading: str, title: str, subtitle: str, events: Sequence[Any]) -> Path:
    """Draw a played behaviour. Two requests on one page show whose page a late write lands on (S1, S5)."""
    asked = {event.pair: event.rid for event in events if isinstance(event, Admitted)}
    if len(asked) <= 1:
        panels = [Panel(title, subtitle, list(events))]
    else:
        panels = [
            Panel(f"{title}: {rid}, room {pair[0]}, attempt {pair[1]}", subtitle, list(events), pair)
            for pair, rid in list(asked.items())[:PANELS_MOST]
        ]
    return draw(panels, place, heading)
