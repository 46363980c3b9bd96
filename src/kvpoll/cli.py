"""The command ``kvpoll``. Everything behind it is loaded late, so that Ctrl-C is heard from the first moment."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED = 130
"""As shells report it: 128 + SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; raises nothing but SystemExit after --help and --version."""
    try:
        from kvpoll.commands.verbs import perform

        return perform(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("kvpoll: interrupted", file=sys.stderr)
        return INTERRUPTED
