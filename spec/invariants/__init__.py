"""What must hold, judged from a trace: one value and one monitor for each invariant.

The ids are those of the catalogue of known races: S safety, L liveness, R leak, O observability. A *monitor*
folds trace events (``spec/trace.py``) into a small state of its own and reports a ``Violated`` event where
its invariant breaks. It reads events and nothing else, so the same monitors judge a simulation while it runs,
an exhaustive search, and a production log line by line.

``Watch`` is the way in: it subscribes the monitors to a stream and collects what they report. ``judge`` does
that for a whole trace. ``catalogue`` lists the invariants; every other module holds the monitors of one idea.

What these files will not do: a monitor never looks into a machine, never changes what it watches, and never
judges what the trace does not say. Two habits keep the monitors cheap: a step that changes no poll returns at
once, and an ordinary page is only ever touched by set and dictionary operations. Memory is bounded by what is
live plus ``REMEMBERED`` entries of history for each monitor (and node) that must recognise late mail.

Throughout, a *pair* is (room, attempt): what both sides of a request have in common.
"""

from kvpoll.spec.invariants.catalogue import INVARIANTS, Invariant, Klass
from kvpoll.spec.invariants.monitor import PAUSE, REMEMBERED, Bounds, Monitor, Recent, TimedMonitor
from kvpoll.spec.invariants.ranks import AGREEMENT_WINDOW
from kvpoll.spec.invariants.watch import RECORDED, InvariantError, Watch, judge

__all__ = [
    "AGREEMENT_WINDOW", "INVARIANTS", "PAUSE", "RECORDED", "REMEMBERED", "Bounds", "Invariant", "InvariantError",
    "Klass", "Monitor", "Recent", "TimedMonitor", "Watch", "judge",
]  # fmt: skip
