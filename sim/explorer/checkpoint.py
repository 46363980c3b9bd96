"""A search that was stopped, on disk, and going on with it.

What was learned is not stored but learned again in the same order: local values by number, then the combinations of
every group. So a checkpoint holds only arrays and values, and is refused when model, spec or judges have changed.

The values are Python objects, read back with pickle: open only checkpoints that you wrote yourself.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvpoll.sim.explorer.search import SURVEY, Found, Search, Taken
from kvpoll.sim.explorer.system import Outcome
from kvpoll.spec.source import BadInput

VERSION: Final = 2

UNREADABLE: Final = (
    OSError, LookupError, ValueError, EOFError, TypeError, AttributeError, ImportError, zipfile.BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip
"""What reading a file can raise that is no checkpoint, or holds values that this kvpoll does not know."""


def identity(search: Search, digests: tuple[str, ...]) -> str:
    """Which search this is: model, spec, profile, judges and symmetry."""
    moves = [move.name for move in search.system.moves]
    judged = [judge.invariant for judge in search.judges]
    text = repr((VERSION, digests, search.system.name, moves, judged, len(search.renames), search.keep_graph))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(search: Search, path: Path, digests: tuple[str, ...]) -> None:
    """Write the search as it stands. It was stopped between two blocks."""
    explored = search.explored
    arrays: dict[str, Any] = {
        "frontier": search._frontier,
        "hashes": np.stack(search._hashes),
        "parents": np.concatenate(search.parents),
        "taken": np.concatenate(search.taken),
        **search.visited.arrays(),
    }
    if search._next_rows:
        arrays["next_rows"] = np.concatenate(search._next_rows)
        arrays["next_hashes"] = np.stack(
            [np.concatenate([each[k] for each in search._next_hashes]) for k in range(len(search._hashes))]
        )
    told = {
        "identity": identity(search, digests),
        "count": search.visited.count,
        "edges": explored.edges,
        "depth": explored.depth,
        "seconds": explored.seconds,
        "quiet": explored.quiet,
        "position": search._position,
        "first_number": search._first_number,
        "closed": sorted(search.closed),
        "violations": {str(place): found for place, found in search._violations.items()},
        "found": [(found.invariant, _state(found), _survey(found), found.text) for found in explored.found.values()],
    }
    values = pickle.dumps([values.values for values in search.values], pickle.HIGHEST_PROTOCOL)
    known = [group.index.known for group in search.groups]
    used = [np.flatnonzero(group.used).tolist() for group in search.groups]
    temporary = path.with_name(f"{path.name}.part")
    with zipfile.ZipFile(temporary, "w") as file:
        file.writestr("told.json", json.dumps(told))
        file.writestr("values.pickle", values)
        file.writestr("known.pickle", pickle.dumps((known, used), pickle.HIGHEST_PROTOCOL))
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, np.ascontiguousarray(array))
    temporary.replace(path)


def _state(found: Found) -> int:
    return found.path[-1].state if found.path else 0


def _survey(found: Found) -> str | None:
    """What a look at an idle node is called, when the path ends with one."""
    return found.path[-1].outcome.label if found.path and found.path[-1].move is SURVEY else None


def resume(search: Search, path: Path, digests: tuple[str, ...]) -> None:
    """Make a fresh search stand where the stored one stood. Raises BadInput for a file that is not of it."""
    try:
        with zipfile.ZipFile(path) as file:
            told = json.loads(file.read("told.json"))
            if told["identity"] != identity(search, digests):
                raise BadInput(
                    f"{path}: is of another model, spec, profile or choice of invariants; remove it to begin anew"
                )
            values = pickle.loads(file.read("values.pickle"))
            known, used = pickle.loads(file.read("known.pickle"))
            arrays = {
                name[:-4]: np.lib.format.read_array(file.open(name), allow_pickle=False)
                for name in file.namelist()
                if name.endswith(".npy")
            }
    except UNREADABLE as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: is not a checkpoint of an exploration ({error}); remove it to begin anew") from None
    _learn_again(search, values, known, used)
    _fill(search, told, arrays)


def _learn_again(search: Search, values: list[list[Any]], known: list[Any], used: list[list[int]]) -> None:
    for column, stored in zip(search.values, values, strict=True):
        for value in stored:
            column.number(value)
    for group, combinations, outcomes in zip(search.groups, known, used, strict=True):
        group.learn(combinations)
        group.use(np.array(outcomes, np.int64))


def _fill(search: Search, told: dict[str, Any], arrays: dict[str, Any]) -> None:
    explored = search.explored
    search.visited.restore(arrays, told["count"])
    search._frontier, search._hashes = arrays["frontier"], list(arrays["hashes"])
    search.parents, search.taken = [arrays["parents"]], [arrays["taken"]]
    search._position, search._first_number = told["position"], told["first_number"]
    if "next_rows" in arrays:
        search._next_rows, search._next_hashes = [arrays["next_rows"]], [list(arrays["next_hashes"])]
    search.closed = set(told["closed"])
    search._violations = {int(place): tuple(found) for place, found in told["violations"].items()}
    explored.edges, explored.depth = told["edges"], told["depth"]
    explored.seconds, explored.quiet = told["seconds"], told["quiet"]
    for invariant, state, survey, text in told["found"]:
        path = search.path_to(state)
        if survey is not None:
            path.append(Taken(SURVEY, Outcome((), survey), state))
        explored.found[invariant] = Found(invariant, len(path), path, text)
