"""Structured logs of the runtime: one JSON object a line, through Python's own ``logging``, off unless asked for.

    handler = to_json()                      # to standard error, INFO and above
    handler = to_json(Path("kvpoll.jsonl"))  # or to a file
    stop(handler)

The logger is "kvpoll.runtime"; an engine that has its own handlers may use ``JsonLines`` with them, or read the fields
from ``record.kvpoll``. Every line has ``time`` (UTC), ``level``, ``event``, ``node``, ``epoch``; what concerns a
request has ``room``, ``attempt``, ``rid``; what has failed has ``cause``, the first one. Events:

    registering, registered, exhausted,    a prefill rank at its bootstrap server
    leaving, left
    admitted, succeeded, failed            a transfer (succeeded at DEBUG: it is the rule)
    quarantined, released                  pages that were kept after a failure, and that they came back (``pages``)
    peer_suspected, link_restored          a peer does not answer, or answers again (``peer``)
    peer_left, peer_died                   it said goodbye; every life of it before ``before_epoch`` is over
    messages_dropped                       control messages (``reason``, ``count``; at 1, 2, 4, 8, ...)
    violated                               an invariant (``invariant``, ``text``), in monitored mode
    closed                                 the endpoint has ended
    note                                   anything else that is logged below this logger (``text``)
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import IO, Any, Final

NAME: Final = "kvpoll.runtime"

LEVELS: Final = {
    "succeeded": logging.DEBUG,
    "failed": logging.WARNING,
    "quarantined": logging.WARNING,
    "exhausted": logging.WARNING,
    "peer_suspected": logging.WARNING,
    "messages_dropped": logging.WARNING,
    "violated": logging.ERROR,
}
"""Levels of events; the others are INFO."""

_log = logging.getLogger(NAME)
_log.addHandler(logging.NullHandler())  # so that nothing is printed where nobody has configured logging


class JsonLines(logging.Formatter):
    """A record as one line of JSON. Records of other modules below the logger become ``note``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        seconds, fraction = time.gmtime(record.created), int(record.msecs)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{fraction:03d}Z",
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "kvpoll", None)
        line |= fields if fields is not None else {"event": "note", "text": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        return json.dumps(line, default=str)


class Moments:
    """Tells what happens to one endpoint. Costs one comparison where the logger is off."""

    def __init__(self, node: str, epoch: int) -> None:
        self._who = {"node": node, "epoch": epoch}

    def __call__(self, event: str, pair: tuple[int, int] | None = None, **more: Any) -> None:
        """``pair``: (room, attempt), where it concerns one. ``more``: what else is known; None is left out."""
        level = LEVELS.get(event, logging.INFO)
        if not _log.isEnabledFor(level):
            return
        fields: dict[str, Any] = {"event": event, **self._who}
        if pair is not None:
            fields |= {"room": pair[0], "attempt": pair[1]}
        fields |= {name: value for name, value in more.items() if value is not None}
        text = " ".join(f"{name}={value}" for name, value in fields.items())
        _log.log(level, "%s", text, extra={"kvpoll": fields})


def to_json(where: IO[str] | Path | None = None, level: int = logging.INFO) -> logging.Handler:
    """Write the runtime's log as JSON lines to a stream or file (None: standard error). Returns what ``stop`` takes."""
    if isinstance(where, Path):
        handler: logging.Handler = logging.FileHandler(where, encoding="utf-8")
    else:
        handler = logging.StreamHandler(where if where is not None else sys.stderr)
    handler.setFormatter(JsonLines())
    handler.setLevel(level)
    _log.addHandler(handler)
    _log.setLevel(min(level, _log.level or level))
    return handler


def stop(handler: logging.Handler) -> None:
    """End what ``to_json`` began, and close its file."""
    _log.removeHandler(handler)
    if all(isinstance(each, logging.NullHandler) for each in _log.handlers):
        _log.setLevel(logging.NOTSET)
    handler.close()
