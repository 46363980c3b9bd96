"""Settings that every test needs on every machine: no screen, no stopwatch, the same examples each run."""

import os

from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")

# Hypothesis' deadline is a stopwatch, and a shared machine makes it fail at random. Derandomised, because a
# red run must be repeatable by whoever reads it; `--hypothesis-profile=search` looks for new examples.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, derandomize=False)
settings.load_profile("repeatable")
