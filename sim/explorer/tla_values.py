"""TLA+ values as Python values, and back: what TLC prints is read, and compared with what Python explored.

Two things are compared here, so both need one form, in which equal values are equal Python objects. A *canonical*
value is hashable:

    TLA+                                      canonical
    1, TRUE, "text"                           1, True, "text"
    <<1, 2>>, (1 :> "a" @@ 2 :> "b")          (1, 2), ("a", "b")      a function on 1..n is a sequence
    {1, 2}, 1..2                              frozenset({1, 2})
    [a |-> 1, b |-> 2]                        (FUNCTION, ("a", 1), ("b", 2))
    ("a" :> 1 @@ "b" :> 2)                    the same: a record is a function on texts
    model value m                             ModelValue("m")

Rooms, facts and actions of ``statemachine/`` differ from their TLA+ twins in form: masks are sets there, and what may
be missing is a tuple. ``of_room`` and its neighbours say how (``spec/tla/Machine.tla`` says why).

A dump holds hundreds of thousands of states, but each variable has few distinct texts; each is read once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Action
from kvpoll.statemachine import Local, Room

CACHE_LIMIT: Final = 200_000
NONE: Final = "None"
"""A missing text, such as the cause of a room that has not failed."""


class _Tag:
    """First element of a function's tuple, so that no sequence can be taken for it."""

    def __repr__(self) -> str:
        return "FUNCTION"

    def __reduce__(self) -> str:
        return "FUNCTION"


FUNCTION: Final = _Tag()


@dataclass(frozen=True)
class ModelValue:
    """A constant that is equal to itself only."""

    name: str


# -- canonical form, and text from it


def canonical(value: Any) -> Any:
    """The canonical value of ordinary Python data: lists, tuples, sets, dictionaries (records, functions), None."""
    if isinstance(value, str | int | ModelValue):  # bool is an int
        return value
    if value is None:
        return NONE
    if isinstance(value, tuple) and value and value[0] is FUNCTION:
        return function_of({canonical(key): canonical(each) for key, each in value[1:]})
    if isinstance(value, list | tuple):
        return tuple([canonical(each) for each in value])
    if isinstance(value, set | frozenset):
        return frozenset([canonical(each) for each in value])
    if isinstance(value, Mapping):
        return function_of({canonical(key): canonical(each) for key, each in value.items()})
    raise TypeError(f"TLA+ has no value for {value!r}")


def function_of(pairs: Mapping[Any, Any]) -> tuple[Any, ...]:
    """The canonical function with these canonical keys and values."""
    size = len(pairs)
    if all(type(key) is int and 1 <= key <= size for key in pairs):
        return tuple([pairs[place] for place in range(1, size + 1)])
    keys = sorted(pairs) if all(type(key) is str for key in pairs) else sorted(pairs, key=to_tla)
    return (FUNCTION, *[(key, pairs[key]) for key in keys])


def fields_of(record: tuple[Any, ...]) -> dict[Any, Any]:
    """A canonical record or function as a dictionary."""
    if not record or record[0] is not FUNCTION:
        raise TypeError(f"not a record: {record!r}")
    return dict(record[1:])


_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\f": "\\f", "\r": "\\r"}
_UNESCAPES = {written[1]: plain for plain, written in _ESCAPES.items()}


def to_tla(value: Any) -> str:
    """The value as TLA+ text. Equal values give equal texts."""
    value = canonical(value)
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + "".join([_ESCAPES.get(letter, letter) for letter in value]) + '"'
    if isinstance(value, ModelValue):
        return value.name
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted([to_tla(each) for each in value])) + "}"
    if value and value[0] is FUNCTION:
        return _function_text(value[1:])
    return "<<" + ", ".join([to_tla(each) for each in value]) + ">>"


def _function_text(pairs: tuple[tuple[Any, Any], ...]) -> str:
    if all(isinstance(key, str) and _PLAIN_NAME.fullmatch(key) for key, _ in pairs):
        return "[" + ", ".join([f"{key} |-> {to_tla(each)}" for key, each in pairs]) + "]"
    return "(" + " @@ ".join([f"{to_tla(key)} :> {to_tla(each)}" for key, each in pairs]) + ")"


# -- text that TLC has printed


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|<<|>>|\|->|:>|@@|\.\.|[\[\](){},]|-?\d+|[A-Za-z_][A-Za-z0-9_]*|\S')


def parse(text: str) -> Any:
    """The canonical value of what TLC printed. Raises BadInput when it is no plain value."""
    reader = _Reader(text)
    value = reader.value()
    if reader.peek() != "":
        raise reader.error()
    return value


class _Reader:
    """Recursive descent over the tokens of one value."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[str] = [*_TOKEN.findall(text), ""]
        self._place = 0

    def peek(self) -> str:
        """The next token; empty at the end."""
        return self._tokens[self._place]

    def error(self) -> BadInput:
        """What to raise when the next token does not belong here."""
        short = " ".join(self._text.split())
        found = self.peek() or "the end"
        return BadInput(
            f"not a value as TLC prints it, at {found!r}: {short[:120]}; expected a record, set or sequence"
        )

    def value(self) -> Any:
        """One value."""
        token = self._next()
        opened = _OPENERS.get(token)
        if opened is not None:
            return getattr(self, opened)()
        first = token[:1]
        if first == '"':
            return _unquoted(token)
        if first.isdigit() or (first == "-" and len(token) > 1):
            return self._number(int(token))
        if _PLAIN_NAME.fullmatch(token):
            return ModelValue(token)
        self._place -= 1
        raise self.error()

    def _next(self) -> str:
        token = self.peek()
        if token:
            self._place += 1
        return token

    def _expect(self, token: str) -> None:
        if self.peek() != token:
            raise self.error()
        self._place += 1

    def _number(self, number: int) -> Any:
        if self.peek() != "..":
            return number
        self._place += 1
        last = self._next()
        if not last.lstrip("-").isdigit():
            self._place -= 1
            raise self.error()
        return frozenset(range(number, int(last) + 1))

    def _elements(self, end: str) -> list[Any]:
        elements: list[Any] = []
        if self.peek() != end:
            elements.append(self.value())
            while self.peek() == ",":
                self._place += 1
                elements.append(self.value())
        self._expect(end)
        return elements

    def _true(self) -> bool:
        return True

    def _false(self) -> bool:
        return False

    def _sequence(self) -> Any:
        return tuple(self._elements(">>"))

    def _set(self) -> Any:
        return frozenset(self._elements("}"))

    def _record(self) -> Any:
        pairs: dict[Any, Any] = {}
        while True:
            name = self._next()
            self._expect("|->")
            pairs[name] = self.value()
            if self.peek() != ",":
                break
            self._place += 1
        self._expect("]")
        return function_of(pairs)

    def _function(self) -> Any:
        pairs: dict[Any, Any] = {}
        while True:
            key = self.value()
            self._expect(":>")
            pairs[key] = self.value()
            if self.peek() != "@@":
                break
            self._place += 1
        self._expect(")")
        return function_of(pairs)


_OPENERS = {"<<": "_sequence", "{": "_set", "[": "_record", "(": "_function", "TRUE": "_true", "FALSE": "_false"}


def _unquoted(token: str) -> str:
    inside: str = token[1:-1]
    if "\\" not in inside:
        return inside
    return re.sub(r"\\(.)", lambda found: _UNESCAPES.get(found[1], found[1]), inside)


# -- states


_VARIABLE = re.compile(r"(?:/\\ )?([A-Za-z_][A-Za-z0-9_]*) = ")


class Texts:
    """Reads values, each distinct text once."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def value(self, text: str) -> Any:
        """The canonical value of the text."""
        try:
            return self._known[text]
        except KeyError:
            if len(self._known) >= CACHE_LIMIT:
                self._known.clear()
            value = self._known[text] = parse(text)
            return value

    def state(self, lines: Iterable[str]) -> dict[str, Any]:
        """{variable: value} of one printed state. A value may go on over lines; those begin with a space."""
        state: dict[str, Any] = {}
        name, text = "", ""
        for line in lines:
            found = None if line.startswith(" ") else _VARIABLE.match(line)
            if found is not None:
                if name:
                    state[name] = self.value(text)
                name, text = found[1], line[found.end() :]
            elif line.strip():
                if not name:
                    raise BadInput(
                        f"not a state as TLC prints it: {line.strip()[:120]}; expected '/\\ variable = value'"
                    )
                text += "\n" + line
        if name:
            state[name] = self.value(text)
        return state


def parse_state(text: str) -> dict[str, Any]:
    """{variable: value} of one state of a counterexample."""
    return Texts().state(text.splitlines())


def read_dump(path: Path) -> Iterator[dict[str, Any]]:
    """The states of a file that ``-dump`` has written, one after the other. Raises BadInput."""
    texts = Texts()
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("State "):
                    if lines:
                        yield texts.state(lines)
                    lines = []
                else:
                    lines.append(line.rstrip("\n"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; check the path") from None
    if lines:
        yield texts.state(lines)


# -- the machines' values in the form of spec/tla/Machine.tla


_MASKS = {"arrived", "contacted", "drained", "asked", "entered"}
_OPTIONAL = {"rank", "epoch", "shape"}
_MASK_DETAILS = {"RoutesResolved", "PeerDied"}


def indices(mask: int) -> frozenset[int]:
    """The places of the bits that are set."""
    return frozenset([place for place in range(mask.bit_length()) if mask >> place & 1])


def of_state(state: Any) -> Any:
    """A room's Local, or the state of a small machine, as its record."""
    return function_of({name: _field(name, value) for name, value in zip(state._fields, state, strict=True)})


def _field(name: str, value: Any) -> Any:
    if name in _MASKS:
        return indices(value)
    if name in _OPTIONAL:
        return () if value is None else (canonical(value),)
    return frozenset(value) if name == "ranks" else canonical(value)


def of_local(local: Local) -> Any:
    """What a room knows, as its record."""
    return of_state(local)


def of_room(room: Room) -> Any:
    """A room as its record."""
    return function_of({"incarnation": canonical(room.incarnation), "local": of_local(room.local)})


def of_detail(kind: str, detail: Any) -> tuple[Any, ...]:
    """The detail of a fact or an action of this kind, always as a tuple."""
    if detail is None:
        return ()
    parts = detail if isinstance(detail, tuple) else (detail,)
    if kind in _MASK_DETAILS:
        parts = (indices(parts[0]), *parts[1:])
    return tuple([canonical(part) for part in parts])


def of_action(action: Action) -> tuple[Any, ...]:
    """An action as <<kind, incarnation, detail>>."""
    return (action.kind, canonical(action.incarnation), of_detail(action.kind, action.detail))


def of_orders(orders: Iterable[tuple[str, Any]]) -> tuple[Any, ...]:
    """The orders of a small machine as a sequence of <<kind, detail>>."""
    return tuple([(name, of_detail(name, detail)) for name, detail in orders])
