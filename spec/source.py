"""TOML files whose mistakes can be named: file, line, cause, nearest valid name."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class BadInput(ValueError):
    """Something that the user gave cannot be used. The message is one line: place, cause, mend."""


def nearest(name: object, valid: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest valid name, or the list of valid names when nothing is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (valid: {', '.join(names)})" if len(names) <= 12 else f" (valid: {', '.join(names[:12])}, ...)"


class Rows(list):  # type: ignore[type-arg]
    """The form of a list of tables."""


class Source:
    """One parsed TOML file that remembers on which line each key stands.

    ``data`` is the parsed content. ``fail(path, cause)`` raises BadInput for the entry at ``path``, a tuple of
    keys and list indices such as ("role", "sender", "transition", 3).
    """

    def __init__(self, path: Path | str, text: str | None = None) -> None:
        self.name = str(path)
        if text is None:
            text = _read(Path(path))
        self.text = text
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BadInput(f"{self.name}:{_line_in(error, text)}: not valid TOML: {error}") from None
        except RecursionError:
            raise BadInput(f"{self.name}:1: nested too deeply to be read") from None
        self._lines = _index(text)

    def line_of(self, path: tuple[str | int, ...]) -> int:
        """Line of the entry at ``path``, or of the nearest enclosing entry that is known."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def error(self, path: tuple[str | int, ...], cause: str) -> BadInput:
        """The error to raise for the entry at ``path``."""
        return BadInput(f"{self.name}:{self.line_of(path)}: {cause}")

    def require_known(self, path: tuple[str | int, ...], given: Iterable[str], valid: Iterable[str], what: str) -> None:
        """Every given name is valid; the first that is not is reported with its nearest valid name."""
        names = set(valid)
        for name in given:
            if name not in names:
                raise self.error((*path, name), f"unknown {what} {name!r}{nearest(name, names)}")

    def require_forms(self, path: tuple[str | int, ...], entry: object, forms: Mapping[str, type]) -> None:
        """``entry`` is a table, knows no key but those of ``forms``, and each value has its form."""
        if not isinstance(entry, dict):
            raise self.error(path, f"a table was expected here, got {entry!r}")
        self.require_known(path, entry, forms, "key")
        for key, value in entry.items():
            self.require_form((*path, key), key, value, forms[key])

    def require_form(self, path: tuple[str | int, ...], key: str, value: Any, form: type) -> None:
        """``value`` has the form; a list holds names only."""
        item: type | None = str if form is list else dict if form is Rows else None
        plain = list if form is Rows else form
        fits = isinstance(value, plain)
        if not fits or (item and not all(isinstance(each, item) for each in value)):
            raise self.error(path, f"`{key}` must be {_FORM_NAMES[form]}, got {value!r}")

    def require_all(
        self, path: tuple[str | int, ...], entry: Mapping[str, Any], keys: Iterable[str], what: str
    ) -> None:
        """No key is missing."""
        for key in keys:
            if key not in entry:
                raise self.error(path, f"{what} lacks `{key}`")


_FORM_NAMES = {str: "text", list: "a list of names", dict: "a table", Rows: "a list of tables", int: "a number"}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8 text; a TOML file was expected") from None


def _line_in(error: tomllib.TOMLDecodeError, text: str) -> int:
    found = re.search(r"line (\d+)", str(error))
    return int(found.group(1)) if found else text.count("\n") + 1


_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*("[^"]+"|'[^']+'|[A-Za-z0-9_.-]+)\s*=""")
_INLINE_KEY = re.compile(r"""[{,]\s*([A-Za-z0-9_-]+)\s*=""")


def _index(text: str) -> dict[tuple[str | int, ...], int]:
    """Line numbers of table headers, keys, and the elements of arrays written one per line."""
    lines: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    array: tuple[str | int, ...] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if array is not None:
            array = _index_element(line, array, number, lines, counts)
        elif header := _HEADER.match(line):
            table = _header_path(header, counts)
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            path = table + _split(key.group(1))
            lines.setdefault(path, number)
            for inner in _INLINE_KEY.findall(line):
                lines.setdefault((*path, inner), number)
            if line.split("#")[0].rstrip().endswith("["):
                array = path
    return lines


def _header_path(header: re.Match[str], counts: dict[tuple[str | int, ...], int]) -> tuple[str | int, ...]:
    path = _split(header.group(2))
    if header.group(1) == "[[":
        index = counts.get(path, 0)
        counts[path] = index + 1
        return (*path, index)
    return path


def _index_element(
    line: str,
    array: tuple[str | int, ...],
    number: int,
    lines: dict[tuple[str | int, ...], int],
    counts: dict[tuple[str | int, ...], int],
) -> tuple[str | int, ...] | None:
    stripped = line.strip()
    if stripped.startswith("]"):
        return None
    if stripped and not stripped.startswith("#"):
        index = counts.get(array, 0)
        counts[array] = index + 1
        lines[(*array, index)] = number
    return array


def _split(dotted: str) -> tuple[str, ...]:
    parts = re.findall(r"""\"([^\"]+)\"|'([^']+)'|([^.\s]+)""", dotted)
    return tuple(next(part for part in found if part) for found in parts)
