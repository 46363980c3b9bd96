"""The loop of a child process that is told what to do by JSON lines, and answers each with one line."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def serve(rank: Any) -> None:
    """Call the methods that standard input names, until it ends or one of them was ``close``."""
    # The answers keep the real standard output; what an engine prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        verb = order.pop("do")
        try:
            answer = getattr(rank, verb)(**order)
        except Exception as error:
            answer = {"error": type(error).__name__, "said": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
        if verb == "close":
            break
    answers.close()
