"""Local steps as integers: what each move does to each combination of local values, learned once.

Every cell numbers the values that it has ever had, from 0. A *group* holds all moves of one scope: for each
combination of value numbers in that scope, which outcomes there are, and for each outcome the new numbers and the
operations on other cells. An *effect table* holds, for (value, operation) of a cell, the value that results.

The functions behind the tables are the step functions of ``statemachine/`` and the monitors of ``spec/``; they are
called for a combination that has not been seen before, and never again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvpoll.sim.explorer.system import Cell, Move, Outcome, Rename, text_of

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

DENSE_LIMIT: Final = 1 << 24
"""Largest table that is indexed directly; above it, keys are sorted and searched."""

PART_BITS: Final = 21
"""Bits of a sparse key for each of up to three parts."""


class Growing:
    """A numpy column that grows by doubling. ``data`` is valid up to ``size``."""

    __slots__ = ("data", "fill", "size")

    def __init__(self, dtype: Any, fill: Any = 0) -> None:
        self.data: npt.NDArray[Any] = np.full(64, fill, dtype)
        self.fill = fill
        self.size = 0

    def append(self, value: Any) -> None:
        """Add one value."""
        if self.size == len(self.data):
            self.data = np.concatenate([self.data, np.full(len(self.data), self.fill, self.data.dtype)])
        self.data[self.size] = value
        self.size += 1


class Values:
    """The values of one cell, numbered; and for each its hash, as it is and under every symmetry."""

    def __init__(self, cell: Cell, mirrors: Sequence[tuple[str, Rename]]) -> None:
        self.cell = cell
        self.values: list[Any] = []
        self.numbers: dict[Any, int] = {}
        self.hashes = [Growing(np.uint64) for _ in range(1 + len(mirrors))]
        self.violated = Growing(np.bool_)
        self._mirrors = mirrors

    def number(self, value: Any) -> int:
        """The number of a value; a new one if it has none."""
        known = self.numbers.get(value)
        if known is None:
            known = self.numbers[value] = len(self.values)
            self.values.append(value)
            self.hashes[0].append(_hash(self.cell.name, text_of(value)))
            for column, (name, rename) in zip(self.hashes[1:], self._mirrors, strict=True):
                column.append(_hash(name, text_of(value, rename)))
            self.violated.append(getattr(value, "violated", None) is not None)
        return known


def _hash(name: str, text: str) -> int:
    """64 bits of a cell's value. Hashes of states are sums of these, so one changed cell changes them cheaply."""
    digest = hashlib.blake2b(f"{name}={text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class KeyIndex:
    """Finds the row of a combination of numbers; -1 where there is none yet."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.capacities = [16] * width
        self._dense: npt.NDArray[np.int32] | None = np.full(16**width, -1, np.int32)
        self._keys: Ints = np.empty(0, np.int64)
        self._rows: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self._known: list[tuple[int, ...]] = []

    def find(self, parts: Sequence[Ints]) -> npt.NDArray[np.int32]:
        """Rows of many combinations."""
        if self._dense is not None and all(
            int(part.max(initial=0)) < capacity for part, capacity in zip(parts, self.capacities, strict=True)
        ):
            return self._dense[self._flat(parts)]
        if self._dense is not None:
            self._grow(parts)
            return self.find(parts)
        keys = _packed(parts)
        if not len(self._keys):
            return np.full(len(keys), -1, np.int32)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[places] == keys, self._rows[places], np.int32(-1))

    def add(self, combinations: Sequence[tuple[int, ...]], first_row: int) -> None:
        """Give the next rows to these combinations, in order."""
        self._known.extend(combinations)
        rows = np.arange(first_row, first_row + len(combinations), dtype=np.int32)
        parts = list(np.array(combinations, np.int64).reshape(-1, self.width).T)
        if self._dense is not None:
            self._dense[self._flat(parts)] = rows
            return
        keys = np.concatenate([self._keys, _packed(parts)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], np.concatenate([self._rows, rows])[order]

    def _flat(self, parts: Sequence[Ints]) -> Ints:
        flat = parts[0].astype(np.int64)
        for part, capacity in zip(parts[1:], self.capacities[1:], strict=True):
            flat = flat * capacity + part
        return flat

    def _grow(self, parts: Sequence[Ints]) -> None:
        """More values than there was room for: a larger table, or a sorted one when that would be too large."""
        for place, part in enumerate(parts):
            while int(part.max(initial=0)) >= self.capacities[place]:
                self.capacities[place] *= 2
        size = 1
        for capacity in self.capacities:
            size *= capacity
        known = self._known
        self._known = []
        self._dense = np.full(size, -1, np.int32) if size <= DENSE_LIMIT else None
        if known:
            self.add(known, 0)


def _packed(parts: Sequence[Ints]) -> Ints:
    packed = parts[0].astype(np.int64)
    for part in parts[1:]:
        packed = packed << PART_BITS | part
    return packed


class Effects:
    """One cell's operations, numbered from 1 (0: none), and what each makes of each value."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.operations: list[Any] = [None]
        self._numbers: dict[Any, int] = {}
        self._index = KeyIndex(2)
        self._after = Growing(np.int32)

    def number(self, operation: Any) -> int:
        """The number of an operation. Those that cannot be hashed are known by their text."""
        try:
            known = self._numbers.get(operation)
            key = operation
        except TypeError:
            key = text_of(operation)
            known = self._numbers.get(key)
        if known is None:
            known = self._numbers[key] = len(self.operations)
            self.operations.append(operation)
        return known

    def apply(self, numbers: Ints, operations: Ints) -> Ints:
        """New value numbers, one for each pair."""
        rows = self._index.find((numbers, operations))
        if (rows < 0).any():
            missing = np.unique(np.stack([numbers[rows < 0], operations[rows < 0]]), axis=1).T
            self._learn([(int(value), int(operation)) for value, operation in missing])
            rows = self._index.find((numbers, operations))
        after: Ints = self._after.data[rows]
        return after

    def _learn(self, pairs: list[tuple[int, int]]) -> None:
        apply, known = self.values.cell.apply, self.values.values
        assert apply is not None, f"cell {self.values.cell.name} takes no effects"
        first = self._after.size
        for value, operation in pairs:
            result = known[value]
            for each in self.operations[operation]:
                result = apply(result, each)
            self._after.append(self.values.number(result))
        self._index.add(pairs, first)


class Group:
    """All moves of one scope, and what they do, as far as it is known."""

    def __init__(self, scope: tuple[int, ...], cells: Sequence[Values], effects: Sequence[Effects]) -> None:
        self.scope = scope
        self.moves: list[tuple[int, Move]] = []
        self.outcomes: list[Outcome] = []
        self.move = Growing(np.int16)
        self.after = [Growing(np.int32) for _ in scope]
        self.operations: dict[int, Growing] = {}
        self.starts = Growing(np.int32)
        self.counts = Growing(np.int32)
        self.used: npt.NDArray[np.bool_] = np.zeros(64, np.bool_)
        self._cells = cells
        self._effects = effects
        self._places = {values.cell.name: place for place, values in enumerate(cells)}
        self._judges: list[tuple[int, Any]] = []
        self._index = KeyIndex(len(scope))

    def judged_by(self, judges: Sequence[tuple[int, Any]]) -> None:
        """(cell place, judge) of every monitor that hears the events of these moves."""
        self._judges = list(judges)

    def find(self, parts: Sequence[Ints]) -> npt.NDArray[np.int32]:
        """Rows of (starts, counts) for many combinations, learning those that are new."""
        rows = self._index.find(parts)
        unknown = rows < 0
        if unknown.any():
            missing = np.unique(np.stack([part[unknown] for part in parts]), axis=1).T
            self._learn([tuple(int(part) for part in combination) for combination in missing])
            rows = self._index.find(parts)
        return rows

    def _learn(self, combinations: list[tuple[int, ...]]) -> None:
        first = self.starts.size
        for combination in combinations:
            values = [self._cells[cell].values[part] for cell, part in zip(self.scope, combination, strict=True)]
            self.starts.append(len(self.outcomes))
            before = len(self.outcomes)
            for number, move in self.moves:
                for outcome in move.act(*values):
                    self._add(number, outcome)
            self.counts.append(len(self.outcomes) - before)
        if len(self.used) < len(self.outcomes):
            self.used = np.concatenate([self.used, np.zeros(len(self.outcomes), np.bool_)])
        self._index.add(combinations, first)

    def _add(self, number: int, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.move.append(number)
        for column, cell, value in zip(self.after, self.scope, outcome.after, strict=True):
            column.append(self._cells[cell].number(value))
        ordered: dict[int, list[Any]] = {}
        for name, operation in outcome.effects:
            ordered.setdefault(self._places[name], []).append(operation)
        for place, judge in self._judges:
            heard = [event for event in outcome.events if type(event) in judge.handles]
            if heard:
                ordered[place] = heard
        for place in ordered.keys() | self.operations.keys():
            column = self.operations.get(place)
            if column is None:
                column = self.operations[place] = Growing(np.int32)
                for _ in range(len(self.outcomes) - 1):
                    column.append(0)
            operations = ordered.get(place)
            column.append(self._effects[place].number(tuple(operations)) if operations else 0)
