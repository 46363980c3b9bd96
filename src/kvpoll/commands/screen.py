"""What people see: tables and sentences on standard output, progress on standard error.

On a terminal rich draws; into a pipe or a file the same tables are plain columns, and there is no progress.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Advance = Callable[[float, float], None]
"""Called with (done so far, whole)."""

GAP = "  "
BAR = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
STYLES = {
    "holds": "green",
    "breaks": "red",
    "yes": "green",
    "no": "yellow",
    "NO": "bold red",
}
"""Colours of cells that are just this word."""


class Screen:
    """Standard output and standard error of one command."""

    def __init__(self) -> None:
        self.out = Console(highlight=False, markup=False, emoji=False)
        self.err = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.drawing = False

    def say(self, text: str = "", style: str | None = None) -> None:
        """One line; never broken, so that it can be copied."""
        if not self.out.is_terminal:
            print(text, flush=True)
            return
        console = self.err if self.drawing else self.out  # a bar is moved down only by what its own console prints
        console.print(Text(text, style=style or ""), soft_wrap=True)

    def prose(self, text: str) -> None:
        """A sentence that a terminal may wrap at words."""
        if self.out.is_terminal:
            self.out.print(Text(text))
        else:
            print(text)

    def json(self, value: Any) -> None:
        """One JSON object on one line."""
        print(json.dumps(value, separators=(",", ":"), allow_nan=False), flush=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        right: Sequence[str] = (),
        line: str | None = None,
    ) -> None:
        """A table. ``right`` columns are numbers. ``line`` is a column whose cells must stay in one piece.

        On a terminal that is too narrow its cells are listed below the table instead, in the same order.
        """
        if not self.out.is_terminal:
            print(_plain(columns, rows, right))
            return
        if line is None or sum(_widths(columns, rows)) + len(GAP) * (len(columns) - 1) <= self.out.width:
            self.out.print(_rich(columns, rows, right, line))
            return
        place = columns.index(line)
        rest = [[*row[:place], *row[place + 1 :]] for row in rows]
        self.out.print(_rich([name for name in columns if name != line], rest, right, None))
        self.say(f"{line}, row by row:", "bold")
        for row in rows:
            self.say(f"  {row[place]}")

    @contextlib.contextmanager
    def progress(self, label: str, unit: str = "") -> Iterator[Advance]:
        """A bar on standard error while the body runs; yields what moves it. Without a terminal: nothing."""
        if not self.err.is_terminal:
            yield lambda done, whole: None
            return
        bar = Progress(*BAR, console=self.err, transient=True, redirect_stdout=False)
        task = bar.add_task(label, total=None, state="")

        def advance(done: float, whole: float) -> None:
            state = f"{min(done, whole):,.0f} of {whole:,.0f}{unit}"
            bar.update(task, completed=min(done, whole), total=whole, state=state)

        with bar:
            self.drawing = True
            try:
                yield advance
            finally:
                self.drawing = False

    @contextlib.contextmanager
    def status(self, label: str) -> Iterator[Callable[[str], None]]:
        """What is being done, on standard error of a terminal. Yields what changes the text."""
        if not self.err.is_terminal:
            yield lambda text: None
            return
        with self.err.status(Text(label)) as spinner:
            yield lambda text: spinner.update(Text(text))


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> str:
    """Columns as wide as they must be."""
    widths = _widths(columns, rows)
    cells = (
        [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, name, width in zip(row, columns, widths, strict=True)
        ]
        for row in [columns, *rows]
    )
    return "\n".join(GAP.join(row).rstrip() for row in cells)


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], line: str | None) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name == line or name in right)
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    return table


def seconds(value: float | None) -> str:
    """A time for people: "-" for none."""
    return "-" if value is None else f"{value:,.3f} s" if value < 10 else f"{value:,.1f} s"


def plural(number: int, noun: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
