"""Breadth-first search of every interleaving, many states at a time.

A state is a row of value numbers, one for each cell. Expanding a block of rows means: for every group of moves, look
up what they do to the values in their scope (``tables.py``), apply the effects on other cells, and add up the new
hash from the cells that changed. Only rows whose hash is new are ever written out. Breadth first, so the path to
anything that is found is as short as any.

Symmetry: with each row goes its hash under every renaming of interchangeable rooms and engines; the least of them
stands for the whole orbit. The row that is kept is the one that was found, so paths are real paths.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvpoll.sim.explorer.judges import Judge, cell_of
from kvpoll.sim.explorer.system import Cell, Move, Outcome, Rename, System
from kvpoll.sim.explorer.tables import Effects, Group, Hashes, Ints, Values
from kvpoll.sim.explorer.visited import Visited
from kvpoll.spec.source import BadInput

BLOCK: Final = 1 << 15
"""States expanded at a time: large enough for numpy, small enough for the processor's cache."""

GROUP_BITS: Final = 16
"""How a step is remembered: the number of the outcome in its group, then the number of the group."""

SURVEY: Final = Move("survey", "step", (), lambda: ())
"""The last step of a path to a state that a look at an idle node found broken; nothing moves."""

Rows = npt.NDArray[np.int32]


class Progress(NamedTuple):
    """Where a search stands: distinct states, edges, depth, states still to expand, seconds and bytes so far."""

    states: int
    edges: int
    depth: int
    frontier: int
    seconds: float
    bytes: int


class TooLarge(BadInput):
    """The model does not fit into the memory it was given."""


class Taken(NamedTuple):
    """One step of a path: the move, what it led to, and the state number afterwards."""

    move: Move
    outcome: Outcome
    state: int


@dataclass
class Found:
    """The first (hence shortest) violation of one invariant: depth in moves, and the path to it."""

    invariant: str
    depth: int
    path: list[Taken]
    text: str


@dataclass
class Explored:
    """What a search has seen. complete: nothing was left to expand."""

    system: System
    states: int = 0
    edges: int = 0
    depth: int = 0
    seconds: float = 0.0
    bytes: int = 0
    complete: bool = False
    stopped: str = ""
    found: dict[str, Found] = field(default_factory=dict)
    marks: set[str] = field(default_factory=set)
    quiet: int = 0
    search: Any = None


class _Batch(NamedTuple):
    """Successors of one block by one group: parents (rows of the block), outcomes, changes, hashes."""

    group: int
    parent: Ints
    outcome: Ints
    changes: list[tuple[int, Ints | None, Ints]]
    hashes: list[Hashes]


class Search:
    """One exploration. ``run`` may be called again after it was stopped: it goes on where it was."""

    def __init__(
        self,
        system: System,
        judges: Sequence[Judge] = (),
        symmetry: bool = True,
        keep_graph: bool = False,
        memory_bytes: int = 8 << 30,
        workers: int = 1,
    ) -> None:
        self.system = system
        self.judges = list(judges)
        cells = [*system.cells, *(cell_of(judge, system.start) for judge in judges)]
        self.renames: list[Rename] = list(system.renames) if symmetry and not keep_graph else []
        self.values = [Values(cell, [(_mirrored(cell, each), each) for each in self.renames]) for cell in cells]
        self.effects = [Effects(values) for values in self.values]
        self.places = {cell.name: place for place, cell in enumerate(cells)}
        self.groups = self._grouped(cells)
        self.move_is_fair = np.array([move.fair for move in system.moves], np.bool_)
        self.keep_graph = keep_graph
        self.memory_bytes = memory_bytes
        self.visited = Visited()
        self.closed: set[int] = set()
        self.explored = Explored(system, search=self)
        self.parents: list[npt.NDArray[np.int32]] = []
        self.taken: list[npt.NDArray[np.int64]] = []
        self.rows: list[npt.NDArray[Any]] = []
        self.edges: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []
        self._frontier, self._hashes = self._first(cells)
        self._first_number = 0
        self._position = 0
        self._next_rows: list[Rows] = []
        self._next_hashes: list[list[Hashes]] = []
        self._violations: dict[int, tuple[int, int]] = {}
        self.workers = workers
        self.stop = False

    def _grouped(self, cells: Sequence[Cell]) -> list[Group]:
        groups: dict[tuple[bool, tuple[int, ...]], Group] = {}
        for number, move in enumerate(self.system.moves):
            scope = tuple(self.places[name] for name in move.scope)
            key = (move.kind == "deadline", scope)
            if key not in groups:
                groups[key] = Group(scope, self.values, self.effects)
            groups[key].moves.append((number, move))
        first = len(self.system.cells)
        for group in groups.values():
            group.judged_by([(first + place, judge) for place, judge in enumerate(self.judges)])
        self.patient = [place for place, (is_deadline, _) in enumerate(groups) if is_deadline]
        self.prompt = [place for place, (is_deadline, _) in enumerate(groups) if not is_deadline]
        return list(groups.values())

    def _first(self, cells: Sequence[Cell]) -> tuple[Rows, list[Hashes]]:
        row = np.array([[values.number(cell.initial) for values, cell in zip(self.values, cells, strict=True)]])
        hashes = [
            np.array([sum(int(values.hashes[k].data[0]) for values in self.values) & (1 << 64) - 1], np.uint64)
            for k in range(1 + len(self.renames))
        ]
        self.visited.add(_least(hashes))
        self._remember(np.array([-1], np.int32), np.array([-1], np.int64), row)
        return row.astype(np.int32), hashes

    def _remember(self, parents: Any, taken: Any, rows: Any) -> None:
        self.parents.append(parents)
        self.taken.append(taken)
        if self.keep_graph:
            self.rows.append(_compact(rows))

    # -- the search

    def run(
        self,
        progress: Callable[[Progress], None] = lambda progress: None,
        max_states: int | None = None,
        max_depth: int | None = None,
        until_found: bool = False,
    ) -> Explored:
        """Explore level by level until nothing is left, a limit is reached, something is found, or ``stop`` is set."""
        self.explored.stopped = ""
        began = time.monotonic() - self.explored.seconds
        explored = self.explored
        while len(self._frontier):
            if (max_states is not None and self.visited.count >= max_states) or (
                max_depth is not None and explored.depth >= max_depth
            ):
                explored.stopped = "limit"
                break
            if until_found and explored.found:
                explored.stopped = "found"
                break
            self._level(lambda left: progress(self._progress(began, left)))
            explored.seconds = time.monotonic() - began
            if self.stop and len(self._frontier):
                explored.stopped = "interrupted"
                break
        explored.complete = not len(self._frontier)
        explored.states, explored.seconds = self.visited.count, time.monotonic() - began
        explored.bytes = self._bytes()
        explored.marks = {
            mark for group in self.groups for n in np.flatnonzero(group.used) for mark in group.outcomes[n].marks
        }
        return explored

    def _progress(self, began: float, left: int) -> Progress:
        explored = self.explored
        seconds = time.monotonic() - began
        return Progress(self.visited.count, explored.edges, explored.depth, left, seconds, self._bytes())

    def _bytes(self) -> int:
        kept = sum(array.nbytes for column in (self.parents, self.taken, self.rows) for array in column)
        edges = sum(array.nbytes for edge in self.edges for array in edge)
        frontier = self._frontier.nbytes + sum(column.nbytes for column in self._hashes)
        return self.visited.bytes() + kept + edges + 2 * frontier

    def _level(self, tell: Callable[[int], None]) -> None:
        """Expand what is left of the frontier, block by block, unless it is stopped before the end."""
        frontier = self._frontier
        for first, block, batches, quiet in self._expanded():
            self._find_quiet(block, quiet, self._first_number + first)
            rows, hashes = self._merge(block, batches, self._first_number + first)
            self._next_rows.append(rows)
            self._next_hashes.append(hashes)
            self._position = first + len(block)
            left = len(frontier) - self._position + sum(map(len, self._next_rows))
            tell(left)
            if self._bytes() > self.memory_bytes:
                self._give_up(left)
            if self.stop:
                break
        if self._position >= len(frontier):
            self._turn_over()

    def _turn_over(self) -> None:
        """The level is done: what was new in it is the next frontier."""
        self._frontier = np.concatenate(self._next_rows)
        self._hashes = [np.concatenate([each[k] for each in self._next_hashes]) for k in range(len(self._hashes))]
        self._first_number = self.visited.count - len(self._frontier)
        self._position, self._next_rows, self._next_hashes = 0, [], []
        self.explored.depth += 1
        self._close()

    def _expanded(self) -> Iterator[tuple[int, Rows, list[_Batch], Ints]]:
        """(place, block, successors, idle rows) of every block that is left, in order; several threads work ahead."""
        firsts = iter(range(self._position, len(self._frontier), BLOCK))
        if self.workers == 1:
            yield from map(self._expand, firsts)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            ahead = deque(pool.submit(self._expand, first) for first in islice(firsts, 2 * self.workers))
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(self._expand, first) for first in islice(firsts, 1))

    def _give_up(self, frontier: int) -> None:
        raise TooLarge(
            f"model {self.system.name!r} needs more than its {self.memory_bytes / 2**30:g} GiB: "
            f"{self.visited.count:,} states seen, {frontier:,} still to expand at depth {self.explored.depth}; "
            "give it more --memory, or lower a budget under [faults] or the number of requests in the model"
        )

    def _expand(self, first: int) -> tuple[int, Rows, list[_Batch], Ints]:
        """Successors of one block. Reads what all threads share and learns under a lock; changes nothing else."""
        block = self._frontier[first : first + BLOCK]
        hashes = [column[first : first + BLOCK] for column in self._hashes]
        batches = [batch for place in self.prompt if (batch := self._successors(place, block, hashes))]
        idle = self._idle(len(block), batches)
        if len(idle):
            late = [self._deadline(place, block, hashes, idle) for place in self.patient]
            batches += [batch for batch in late if batch]
            idle = self._idle(len(block), batches)
        return first, block, batches, idle

    def _merge(self, block: Rows, batches: list[_Batch], offset: int) -> tuple[Rows, list[Hashes]]:
        """Number the successors that nobody has seen, and write them out with their hashes."""
        if not batches:
            return block[:0], [column[:0] for column in self._hashes]
        canonical = np.concatenate([_least(batch.hashes) for batch in batches])
        distinct, first, inverse = np.unique(canonical, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")
        numbers, fresh = self.visited.add(distinct[order])
        for batch in batches:
            self.groups[batch.group].use(batch.outcome)
        if self.keep_graph:
            self._keep_edges(batches, offset, order, numbers, inverse)
        self.explored.edges += len(canonical)
        return self._write_out(block, batches, first[order][fresh], offset)

    def _idle(self, size: int, batches: list[_Batch]) -> Ints:
        """The rows in which nothing happens that the protocol owes."""
        busy = np.zeros(size, np.bool_)
        for batch in batches:
            busy[batch.parent[self.move_is_fair[self.groups[batch.group].move.data[batch.outcome]]]] = True
        return np.flatnonzero(~busy)

    def _deadline(self, place: int, block: Rows, hashes: list[Hashes], idle: Ints) -> _Batch | None:
        """Deadlines are patient: one passes when nothing else that is owed can happen (or as a fault, early)."""
        batch = self._successors(place, block[idle], [column[idle] for column in hashes])
        return batch and batch._replace(parent=idle[batch.parent])

    def _successors(self, place: int, block: Rows, hashes: list[Hashes]) -> _Batch | None:
        group = self.groups[place]
        found = group.find([block[:, cell] for cell in group.scope])
        counts = group.counts.data[found]
        total = int(counts.sum())
        if not total:
            return None
        parent = np.repeat(np.arange(len(block)), counts)
        ends = np.cumsum(counts)
        outcome = np.arange(total) + np.repeat(group.starts.data[found] - (ends - counts), counts)
        new_hashes = [column[parent] for column in hashes]
        changes: list[tuple[int, Ints | None, Ints]] = []
        for cell, column in zip(group.scope, group.after, strict=True):
            after = column.data[outcome]
            changes.append((cell, None, after))
            self._rehash(new_hashes, cell, None, block[parent, cell], after)
        for cell, operations in group.operations.items():
            if cell in self.closed:
                continue
            ordered = operations.data[outcome]
            where = np.flatnonzero(ordered)
            if len(where):
                before = block[parent[where], cell]
                after = self.effects[cell].apply(before, ordered[where])
                changes.append((cell, where, after))
                self._rehash(new_hashes, cell, where, before, after)
        batch = _Batch(place, parent, outcome, changes, new_hashes)
        return _without(batch, new_hashes[0] == hashes[0][parent])

    def _rehash(self, hashes: list[Hashes], cell: int, where: Ints | None, before: Ints, after: Ints) -> None:
        for column, parts in zip(hashes, self.values[cell].hashes, strict=True):
            change = parts.data[after] - parts.data[before]
            if where is None:
                column += change
            else:
                column[where] += change

    def _write_out(
        self,
        block: Rows,
        batches: list[_Batch],
        chosen: Ints,
        offset: int,
    ) -> tuple[Rows, list[Hashes]]:
        """The rows at these places of the concatenated batches, in that order."""
        rows = np.empty((len(chosen), block.shape[1]), np.int32)
        hashes = [np.empty(len(chosen), np.uint64) for _ in batches[0].hashes]
        parents = np.empty(len(chosen), np.int32)
        taken = np.empty(len(chosen), np.int64)
        start = 0
        for batch in batches:
            size = len(batch.parent)
            mine = np.flatnonzero((chosen >= start) & (chosen < start + size))
            if len(mine):
                sources = chosen[mine] - start
                rows[mine] = _patched(block, batch, sources)
                parents[mine] = batch.parent[sources] + offset
                taken[mine] = batch.outcome[sources] << GROUP_BITS | batch.group
                for column, each in zip(hashes, batch.hashes, strict=True):
                    column[mine] = each[sources]
            start += size
        self._look(rows)
        self._remember(parents, taken, rows)
        return rows, hashes

    def _look(self, rows: Rows) -> None:
        """Note the first of these new states in which a judge has something to report."""
        first = self.visited.count - len(rows)
        for place in range(len(self.system.cells), len(self.values)):
            if place in self.closed or place in self._violations:
                continue
            bad = np.flatnonzero(self.values[place].violated.data[rows[:, place]])
            if len(bad):
                self._violations[place] = (first + int(bad[0]), int(rows[bad[0], place]))

    def _close(self) -> None:
        """What was found broken is recorded with its shortest path, and not judged any further."""
        for place, (state, number) in self._violations.items():
            judge = self.judges[place - len(self.system.cells)]
            violated = self.values[place].values[number].violated
            path = self.path_to(state)
            self.explored.found[judge.invariant] = Found(judge.invariant, len(path), path, violated.text)
            self._retire(place)
        self._violations = {}

    def _retire(self, place: int) -> None:
        self.closed.add(place)
        before = self._frontier[:, place].copy()
        self._frontier[:, place] = 0
        self._rehash(self._hashes, place, None, before, self._frontier[:, place])

    # -- nodes at rest

    def _find_quiet(self, block: Rows, quiet: Ints, offset: int) -> None:
        """States in which nothing but a fault can happen: every idle node is surveyed (R1, O1)."""
        self.explored.quiet += len(quiet)
        for state in quiet:
            self._survey(block[state], offset + int(state))

    def _survey(self, row: Any, state: int) -> None:
        for cell, number in zip(self.system.cells, row, strict=False):
            values = self.values[self.places[cell.name]]
            for event in self.system.survey(cell.name, values.values[number]):
                self._judge_idle(row, state, event)

    def _judge_idle(self, row: Any, state: int, event: Any) -> None:
        for place, judge in enumerate(self.judges, len(self.system.cells)):
            if type(event) not in judge.handles or place in self.closed or judge.invariant in self.explored.found:
                continue
            seen = judge.apply(self.values[place].values[row[place]], event)
            if seen.violated is not None:
                path = self.path_to(state)
                end = Outcome((), f"{event.node} is idle and is looked at", events=(event,))
                path.append(Taken(SURVEY, end, state))
                self.explored.found[judge.invariant] = Found(judge.invariant, len(path), path, seen.violated.text)

    # -- paths and graph

    def _keep_edges(self, batches: list[_Batch], offset: int, order: Ints, numbers: Any, inverse: Ints) -> None:
        ranked = np.empty(len(order), np.int32)
        ranked[order] = numbers
        target = ranked[inverse]
        source = np.concatenate([batch.parent for batch in batches]).astype(np.int32) + np.int32(offset)
        move = np.concatenate([self.groups[batch.group].move.data[batch.outcome] for batch in batches])
        self.edges.append((source, target, move))

    def path_to(self, state: int) -> list[Taken]:
        """The moves from the first state to this one."""
        parents, taken = self._history()
        path: list[Taken] = []
        while state > 0:
            outcome, place = divmod(int(taken[state]), 1 << GROUP_BITS)
            group = self.groups[place]
            move = self.system.moves[int(group.move.data[outcome])]
            path.append(Taken(move, group.outcomes[outcome], state))
            state = int(parents[state])
        return path[::-1]

    def taken_between(self, source: Any, number: int, target: Any, state: int) -> Taken:
        """The outcome of a move that leads from one row to another."""
        move = self.system.moves[number]
        before, after = self.cells_of(source), self.cells_of(target)
        for outcome in move.act(*[before[cell] for cell in move.scope]):
            if self._leads_to(outcome, move, before, after):
                return Taken(move, outcome, state)
        raise AssertionError(f"{move.name} does not lead from state to state {state}")

    def _leads_to(self, outcome: Outcome, move: Move, before: dict[str, Any], after: dict[str, Any]) -> bool:
        cells = {**before, **dict(zip(move.scope, outcome.after, strict=True))}
        for name, operation in outcome.effects:
            apply = self.values[self.places[name]].cell.apply
            assert apply is not None
            cells[name] = apply(cells[name], operation)
        return all(cells[cell.name] == after[cell.name] for cell in self.system.cells)

    def _history(self) -> tuple[Any, Any]:
        if len(self.parents) > 1:
            self.parents = [np.concatenate(self.parents)]
            self.taken = [np.concatenate(self.taken)]
        return self.parents[0], self.taken[0]

    def cells_of(self, row: Any) -> dict[str, Any]:
        """The values of one state's row, by cell."""
        return {values.cell.name: values.values[number] for values, number in zip(self.values, row, strict=True)}


def _mirrored(cell: Cell, rename: Rename) -> str:
    """Which cell holds the mirror image of this one's value: a cell's name is made of the names in it."""
    return " ".join(str(rename.get(part, part)) for part in cell.name.split(" "))


def _least(hashes: list[Hashes]) -> Hashes:
    least = hashes[0]
    for other in hashes[1:]:
        least = np.minimum(least, other)
    return least


def _compact(rows: Any) -> npt.NDArray[Any]:
    compact: npt.NDArray[Any] = rows.astype(np.uint16 if rows.max(initial=0) < 1 << 16 else np.int32)
    return compact


def _without(batch: _Batch, still: npt.NDArray[np.bool_]) -> _Batch | None:
    """Drop successors that are their own parents: they are no steps."""
    if not still.any():
        return batch
    keep = np.flatnonzero(~still)
    if not len(keep):
        return None
    position = np.full(len(still), -1)
    position[keep] = np.arange(len(keep))
    changes: list[tuple[int, Ints | None, Ints]] = []
    for cell, where, after in batch.changes:
        if where is None:
            changes.append((cell, None, after[keep]))
        else:
            moved = position[where]
            changes.append((cell, moved[moved >= 0], after[moved >= 0]))
    return _Batch(batch.group, batch.parent[keep], batch.outcome[keep], changes, [h[keep] for h in batch.hashes])


def _patched(block: Rows, batch: _Batch, sources: Ints) -> Rows:
    """Whole rows of some successors: the parent's, with the changed cells written in."""
    rows = block[batch.parent[sources]]
    position: Any = None
    for cell, where, after in batch.changes:
        if where is None:
            rows[:, cell] = after[sources]
            continue
        if position is None:
            position = np.full(len(batch.parent), -1)
            position[sources] = np.arange(len(sources))
        places = position[where]
        rows[places[places >= 0], cell] = after[places >= 0]
    return rows
