"""The same machine as a judge: does a profile explain what a trace says, event by event, and if not, why?

A driver hands a fact to a machine and records what came of it. The judge does the same again: it keeps the room
that the profile's machine would have, offers it the recorded fact, and compares. Nothing of the protocol is decided
here a second time; every answer is a step of ``statemachine/machine.py`` or a row of ``spec/kvpoll.toml``.

* ``rooms`` replays the Stepped events of our own traces (``spec/trace.py``).
* ``sglang`` reads the status table of an instrumented SGLang (``spec/sglang_trace.py``) and looks for the facts
  that lead from one table value to the next.
* ``departure`` asks which rules would have to be set otherwise, so that the machine explains an event after all.
* ``rows`` puts rows of the table into words. ``finding`` is what is handed to whoever asked.

What the judge will not do: it does not decide whether what happened is *good*. That is what the invariants are for;
a profile of a historical defect explains a trace that breaks half of them.
"""

from kvpoll.statemachine.judge.departure import Change, Departures
from kvpoll.statemachine.judge.finding import Finding, Told
from kvpoll.statemachine.judge.rooms import RoomJudge
from kvpoll.statemachine.judge.sglang import SglangJudge

__all__ = ["Change", "Departures", "Finding", "RoomJudge", "SglangJudge", "Told"]
