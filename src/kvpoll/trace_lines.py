"""Lines of a trace, from a file, a pipe or an archive, and events from lines; a mistake is told by file and line.

Decoding is most of the work of a validation, so msgspec does it where it is installed (``kvpoll[runtime]``): it
checks names and types of every field while it reads. Without it the standard library does the same, about five
times slower. What a line may hold is said in one place only, the classes of ``spec/trace.py``; both ways are
derived from them.

What msgspec returns are structs, not the named tuples of ``spec/trace.py``: same names, same values, attributes
only. Whoever reads events by attribute cannot tell the difference.
"""

from __future__ import annotations

import functools
import gzip
import math
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from kvpoll.spec import trace
from kvpoll.spec.trace import EVENTS, TraceError

try:
    import msgspec
except ImportError:  # the extra "runtime" is not installed
    msgspec = None  # type: ignore[assignment]

LINE_MAX: Final = 64 * 2**20
"""Bytes of the longest line that is read."""

Detail = int | float | str | bool | None | tuple[int | float | str | bool | None, ...]
"""What a fact's detail looks like in a trace."""

READING_ERRORS: Final = (OSError, EOFError, zlib.error)
"""What reading a file, a pipe or an archive can end in."""

Role = Literal["sender", "receiver"]

Decode = Callable[[bytes], Any]


def lines_of(path: str) -> tuple[Iterator[bytes], int, Callable[[], int]]:
    """(lines, bytes in all or 0 when unknown, a function that says how far reading has come). "-": standard input.

    Raises BadInput when the file cannot be opened; the iterator raises READING_ERRORS when reading fails halfway.
    A line is cut at LINE_MAX bytes, so that no input can take all memory.
    """
    if path == "-":
        return _cut(sys.stdin.buffer), 0, lambda: 0
    try:
        raw = Path(path).open("rb")  # noqa: SIM115 (closed with the last line, by its iterator)
        size = Path(path).stat().st_size
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}; give a trace, or - for standard input") from None
    if path.endswith(".gz"):
        return _cut(gzip.GzipFile(fileobj=raw)), size, raw.tell
    return _cut(raw), size, raw.tell


def _cut(file: Any) -> Iterator[bytes]:
    return iter(functools.partial(file.readline, LINE_MAX), b"")


def decoder() -> Decode:
    """A function from a line to its event. It raises ValueError for a line that is none; ``complain`` says why."""
    return _structs() if msgspec is not None else _tuples()


def complain(line: bytes, where: str, error: Exception) -> TraceError:
    """The error to raise for a line that could not be decoded."""
    if len(line) >= LINE_MAX:
        return TraceError(f"{where}: a line of more than {LINE_MAX // 2**20} MiB; a trace has an event a line")
    try:
        trace.decode(line.decode(), where)
    except TraceError as told:
        return told
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RecursionError):
        pass  # a value of the wrong form: the first error says which
    return TraceError(f"{where}: {error}")


def _hints(event_type: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(event_type)
    if "detail" in hints:
        hints["detail"] = Detail
    if "role" in hints:
        hints["role"] = Role
    if "shape" in hints:
        hints["shape"] = Any
    return hints


def _replaced(event: Any, **changes: Any) -> Any:
    """What ``_replace`` of a named tuple does, for a struct."""
    return msgspec.structs.replace(event, **changes)


@functools.lru_cache(maxsize=1)
def _structs() -> Decode:
    """Events as structs, told apart by their field "event"."""
    structs = [
        msgspec.defstruct(
            name,
            list(_hints(event_type).items()),
            tag_field="event",
            tag=name,
            forbid_unknown_fields=True,
            gc=False,
            namespace={"_replace": _replaced},
        )
        for name, event_type in EVENTS.items()
    ]
    return msgspec.json.Decoder(Union[tuple(structs)]).decode  # noqa: UP007 (built at run time)


Check = Callable[[Any], bool]


@functools.lru_cache(maxsize=1)
def _tuples() -> Decode:
    """Events as named tuples, every field checked against its hint."""
    checks = {
        event_type: [(place, name, _check(hint)) for place, (name, hint) in enumerate(_hints(event_type).items())]
        for event_type in EVENTS.values()
    }

    def decode(line: bytes) -> Any:
        try:
            event = trace.decode(line.decode())
        except (TypeError, AttributeError, IndexError, KeyError, RecursionError) as error:
            raise ValueError(f"a field has the wrong form: {error}") from None
        for place, name, check in checks[type(event)]:
            if not check(event[place]):
                raise ValueError(f"{name!r} of {type(event).__name__} cannot be {event[place]!r}")
        if not math.isfinite(event.t):
            raise ValueError(f"'t' cannot be {event.t!r}")
        return event

    return decode


def _check(hint: Any) -> Check:
    """A function that says whether a value is of the hinted type. Whole numbers pass for floats, as in JSON."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if origin in (Union, types.UnionType):
        checks = [_check(argument) for argument in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is Literal:
        return lambda value: value in arguments
    if origin is tuple:
        return _check_tuple(arguments)
    if origin is dict:
        key, held = map(_check, arguments)
        return lambda value: isinstance(value, dict) and all(key(k) and held(v) for k, v in value.items())
    if hasattr(hint, "_fields"):
        whole = _check_tuple(tuple(get_type_hints(hint).values()))
        return lambda value: isinstance(value, hint) and whole(value)
    kinds = {float: (float, int), None: (type(None),)}.get(hint, (hint,))
    return lambda value: type(value) in kinds


def _check_tuple(hints: tuple[Any, ...]) -> Check:
    if hints[-1:] == (Ellipsis,):
        each = _check(hints[0])
        return lambda value: isinstance(value, tuple) and all(map(each, value))
    checks = [_check(hint) for hint in hints]
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == len(checks)
        and all(check(part) for check, part in zip(checks, value, strict=True))
    )
