"""How many faults of which kind are still to come: one cell of every model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from kvpoll.sim.explorer.system import Move, Outcome

CELL = "faults"
Budget = tuple[tuple[str, int], ...]
"""(kind, left), sorted; "total" bounds them all together."""


def budget(faults: Mapping[str, int]) -> Budget:
    """The budget that a model states."""
    total = faults.get("total", sum(faults.values()))
    return tuple(sorted({**faults, "total": total}.items()))


def spend(left: Budget, kind: str) -> Budget | None:
    """The budget after one fault of this kind; None when there is none left."""
    counts = dict(left)
    if counts.get(kind, 0) < 1 or counts["total"] < 1:
        return None
    return tuple(sorted({**counts, kind: counts[kind] - 1, "total": counts["total"] - 1}.items()))


def fault(name: str, kind: str, scope: tuple[str, ...], act: Callable[..., Iterable[Outcome]]) -> Move:
    """A move that costs one fault of its kind. ``act`` sees the scope without the budget, which is written last."""

    def spending(*values: object) -> Iterable[Outcome]:
        rest = spend(values[-1], kind)  # type: ignore[arg-type]
        if rest is None:
            return
        for outcome in act(*values[:-1]):
            yield outcome._replace(after=(*outcome.after, rest), marks=(*outcome.marks, f"fault {kind}"))

    return Move(name, "fault", (*scope, CELL), spending)
