"""Exit statuses that scripts can trust."""

from typing import Final

HOLDS: Final = 0
VIOLATED: Final = 1
BAD_INPUT: Final = 2
DEFECT: Final = 3
"""kvpoll itself went wrong."""
INTERRUPTED: Final = 130
"""Ctrl-C, as shells report it (128 + SIGINT); `cli.main` says so by itself before all this is loaded."""
