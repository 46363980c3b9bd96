"""Local steps as integers: what each move does to each combination of local values, learned once.

Every cell numbers the values that it has ever had, from 0. A *group* holds all moves of one scope: for each
combination of value numbers in that scope, which outcomes there are, and for each outcome the new numbers and the
operations on other cells. An *effect table* holds, for (value, operation) of a cell, the value that results.

The functions behind the tables are the step functions of ``statemachine/`` and the monitors of ``spec/``; they are
called for a combination that has not been seen before, and never again.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvpoll.sim.explorer.system import Cell, Memo, Move, Outcome, Rename, text_of

Ints = npt.NDArray[np.signedinteger[Any]]
Hashes = npt.NDArray[np.uint64]

DENSE_LIMIT: Final = 1 << 24
"""Largest table that is indexed directly; above it, keys are sorted and searched."""

SPARSE_LIMIT: Final = 1 << 63
"""Keys are 64-bit numbers with a sign; a move of so many combinations would have two with the same key."""

LEARNING: Final = threading.RLock()
"""Held while anything is learned. What was learned is read without it: rows become visible when they are complete."""


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
        self._memos: list[Memo] = [{} for _ in self.hashes]

    def number(self, value: Any) -> int:
        """The number of a value; a new one if it has none."""
        known = self.numbers.get(value)
        if known is None:
            known = self.numbers[value] = len(self.values)
            self.values.append(value)
            self.hashes[0].append(_hash(self.cell.name, text_of(value, None, self._memos[0])))
            for column, (name, rename), memo in zip(self.hashes[1:], self._mirrors, self._memos[1:], strict=True):
                column.append(_hash(name, text_of(value, rename, memo)))
            self.violated.append(getattr(value, "violated", None) is not None)
        return known


def _hash(name: str, text: str) -> int:
    """64 bits of a cell's value. Hashes of states are sums of these, so one changed cell changes them cheaply."""
    digest = hashlib.blake2b(f"{name}={text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Dense(NamedTuple):
    """A table with a place for every combination; rows are written into it in place."""

    capacities: tuple[int, ...]
    rows: npt.NDArray[np.int32]

    def find(self, keys: Ints) -> npt.NDArray[np.int32]:
        return self.rows[keys]

    def with_rows(self, keys: Ints, rows: npt.NDArray[np.int32]) -> _Dense:
        self.rows[keys] = rows
        return self


class _Sparse(NamedTuple):
    """Combinations in order of their keys, and the row of each."""

    capacities: tuple[int, ...]
    keys: Ints
    rows: npt.NDArray[np.int32]

    def find(self, keys: Ints) -> npt.NDArray[np.int32]:
        if not len(self.keys):
            return np.full(len(keys), -1, np.int32)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.rows[places], np.int32(-1))

    def with_rows(self, keys: Ints, rows: npt.NDArray[np.int32]) -> _Sparse:
        keys = np.concatenate([self.keys, keys])
        order = np.argsort(keys, kind="stable")
        return _Sparse(self.capacities, keys[order], np.concatenate([self.rows, rows])[order])


class KeyIndex:
    """Finds the row of a combination of numbers; -1 where there is none yet.

    Readers take a whole index at a time, and a new index is complete before it takes the place of the old one; so
    other threads may read while one learns.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.known: list[tuple[int, ...]] = []
        self._index = self._made((16,) * width)

    def find(self, parts: Sequence[Ints]) -> npt.NDArray[np.int32]:
        """Rows of many combinations."""
        index = self._index
        if all(int(part.max(initial=0)) < most for part, most in zip(parts, index.capacities, strict=True)):
            return index.find(_keys(parts, index.capacities))
        with LEARNING:
            self._grow(parts)
        return self.find(parts)

    def add(self, combinations: Sequence[tuple[int, ...]]) -> None:
        """Give the next rows to these combinations, in order."""
        parts = self._columns(combinations)
        self._grow(parts)
        rows = np.arange(len(self.known), len(self.known) + len(combinations), dtype=np.int32)
        self.known.extend(combinations)
        self._index = self._index.with_rows(_keys(parts, self._index.capacities), rows)

    def _grow(self, parts: Sequence[Ints]) -> None:
        """If there are more values than there was room for, make a larger index."""
        capacities = list(self._index.capacities)
        for place, part in enumerate(parts):
            while int(part.max(initial=0)) >= capacities[place]:
                capacities[place] *= 2
        if tuple(capacities) != self._index.capacities:
            self._index = self._made(tuple(capacities))

    def _made(self, capacities: tuple[int, ...]) -> _Dense | _Sparse:
        """An index of all that is known: a table, or a sorted one when a table would be too large."""
        size = math.prod(capacities)
        if size > SPARSE_LIMIT:
            raise OverflowError(f"{size} combinations of local values in one move: more than have a key of their own")
        index: _Dense | _Sparse
        if size <= DENSE_LIMIT:
            index = _Dense(capacities, np.full(size, -1, np.int32))
        else:
            index = _Sparse(capacities, np.empty(0, np.int64), np.empty(0, np.int32))
        return index.with_rows(_keys(self._columns(self.known), capacities), np.arange(len(self.known), dtype=np.int32))

    def _columns(self, combinations: Sequence[tuple[int, ...]]) -> list[Ints]:
        return list(np.array(combinations, np.int64).reshape(-1, self.width).T)


def _keys(parts: Sequence[Ints], capacities: Sequence[int]) -> Ints:
    """Each combination as one number, whose digits it is."""
    keys: Ints = parts[0].astype(np.int64)
    for part, capacity in zip(parts[1:], capacities[1:], strict=True):
        keys = keys * capacity + part
    return keys


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
            with LEARNING:
                rows = self._index.find((numbers, operations))
                missing = np.unique(np.stack([numbers[rows < 0], operations[rows < 0]]), axis=1).T
                self._learn([(int(value), int(operation)) for value, operation in missing])
                rows = self._index.find((numbers, operations))
        after: Ints = self._after.data[rows]
        return after

    def _learn(self, pairs: list[tuple[int, int]]) -> None:
        apply, known = self.values.cell.apply, self.values.values
        assert apply is not None, f"cell {self.values.cell.name} takes no effects"
        for value, operation in pairs:
            result = known[value]
            for each in self.operations[operation]:
                result = apply(result, each)
            self._after.append(self.values.number(result))
        self._index.add(pairs)


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
        self.index = KeyIndex(len(scope))

    def judged_by(self, judges: Sequence[tuple[int, Any]]) -> None:
        """(cell place, judge) of every monitor that hears the events of these moves."""
        self._judges = list(judges)

    def use(self, outcomes: Ints) -> None:
        """Note that these outcomes have been witnessed."""
        if len(self.used) < len(self.outcomes):
            self.used = np.concatenate([self.used, np.zeros(len(self.outcomes), np.bool_)])
        self.used[outcomes] = True

    def learn(self, combinations: list[tuple[int, ...]]) -> None:
        """Learn combinations in a given order, so that everything gets the numbers that it had before."""
        self._learn(combinations)

    def find(self, parts: Sequence[Ints]) -> npt.NDArray[np.int32]:
        """Rows of (starts, counts) for many combinations, learning those that are new."""
        rows = self.index.find(parts)
        if (rows < 0).any():
            with LEARNING:
                unknown = self.index.find(parts) < 0
                missing = np.unique(np.stack([part[unknown] for part in parts]), axis=1).T
                self._learn([tuple(int(part) for part in combination) for combination in missing])
                rows = self.index.find(parts)
        return rows

    def _learn(self, combinations: list[tuple[int, ...]]) -> None:
        for combination in combinations:
            values = [self._cells[cell].values[part] for cell, part in zip(self.scope, combination, strict=True)]
            self.starts.append(len(self.outcomes))
            before = len(self.outcomes)
            for number, move in self.moves:
                for outcome in move.act(*values):
                    self._add(number, outcome)
            self.counts.append(len(self.outcomes) - before)
        self.index.add(combinations)

    def _add(self, number: int, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.move.append(number)
        for column, cell, value in zip(self.after, self.scope, outcome.after, strict=True):
            column.append(self._cells[cell].number(value))
        ordered: dict[int, list[Any]] = {}
        for name, operation in outcome.effects:
            place = self._places[name]
            assert place not in self.scope, f"{outcome.label}: {name} is in the move's scope; write it there"
            ordered.setdefault(place, []).append(operation)
        for place, judge in self._judges:
            heard = [event for event in outcome.events if type(event) in judge.handles]
            if heard:
                ordered[place] = heard
        for place in ordered.keys() | self.operations.keys():
            if place not in self.operations:
                column = Growing(np.int32)
                for _ in range(len(self.outcomes) - 1):
                    column.append(0)
                self.operations = {**self.operations, place: column}
            column = self.operations[place]
            operations = ordered.get(place)
            column.append(self._effects[place].number(tuple(operations)) if operations else 0)
