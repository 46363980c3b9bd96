"""A cluster as cells and moves: what the explorer explores.

A *cell* holds one hashable value: the state of one process, the messages on one channel, the writes on one wire.
A *move* is one thing that may happen next. It reads and writes the few cells of its *scope*, and may order
*effects* on others (a message appended to a channel), which need not be read to be carried out. That locality is
the whole trick: what a move does is computed once for each combination of values in its scope, by the step
functions of ``statemachine/``, and remembered as integers (``tables.py``); a global step is then array arithmetic
(``search.py``). Whatever a move does must therefore be a pure function of the values it is given.

Moves come in three kinds. A *step* and a *deadline* are the protocol's own; behaviours are weakly fair to each of
them (one that stays possible happens in the end). A *fault* is the environment's; nobody is owed a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

Kind = Literal["step", "deadline", "fault"]
Rename = dict[Any, Any]
"""A symmetry: which room numbers, request ids and node names trade places."""

ROOMS_FROM: Final = 1000
"""Room numbers of models start here, so that no other whole number in a state can be taken for one."""


class Outcome(NamedTuple):
    """One thing that a move may lead to.

    after: new values of the scope's cells, in its order. label: what happened, for people. effects: (cell,
    operation) in order. events: what the trace says of it (``t`` is 0 in all; the path gives them their time).
    marks: what a model wants to have witnessed.
    """

    after: tuple[Any, ...]
    label: str
    effects: tuple[tuple[str, Any], ...] = ()
    events: tuple[Any, ...] = ()
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Move:
    """One thing that may happen: ``act(*values of scope)`` gives its outcomes, none when it is not possible.

    fair: does the environment owe it (weak fairness)? By default steps and deadlines are fair and faults are not.
    """

    name: str
    kind: Kind
    scope: tuple[str, ...]
    act: Callable[..., Iterable[Outcome]]
    optional: bool = False

    @property
    def fair(self) -> bool:
        """Does a behaviour that leaves this possible for ever without taking it not count?"""
        return self.kind != "fault" and not self.optional


@dataclass(frozen=True)
class Cell:
    """One component of the global state. ``apply(value, operation)`` carries out an effect."""

    name: str
    initial: Any
    apply: Callable[[Any, Any], Any] | None = None


def refuse(value: Any, operation: Any) -> Any:
    """The ``apply`` of a cell on which no effect is ever ordered."""
    raise AssertionError(f"no effect was expected here: {operation!r}")


@dataclass(frozen=True)
class System:
    """A model, ready to be explored.

    start: events that happened before the first move (processes that started). survey: what an idle node says of
    itself, from its cell's name and value (R1, O1). renames: symmetries, without the identity. view: the abstract
    state that TLC prints for the same state, as {variable: value}, from {cell: value}. numbers_kinds: collectives bear
    the number of their kind and shape, which keeps states few; when a behaviour is played they are counted instead.
    """

    name: str
    cells: Sequence[Cell]
    moves: Sequence[Move]
    start: tuple[Any, ...] = ()
    survey: Callable[[str, Any], Iterable[Any]] = lambda cell, value: ()
    renames: tuple[Rename, ...] = ()
    view: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    numbers_kinds: bool = False

    def initial(self) -> dict[str, Any]:
        """The first state, by cell."""
        return {cell.name: cell.initial for cell in self.cells}


def send(channel: tuple[Any, ...], messages: tuple[Any, ...]) -> tuple[Any, ...]:
    """The ``apply`` of an ordered channel: append. An equal message already in flight stands for both.

    Messages are idempotent facts, so merging repeats loses no behaviour worth the name and keeps channels finite
    when a timer asks again and again.
    """
    for message in messages:
        if message not in channel:
            channel = (*channel, message)
    return channel


class Sorted(tuple[Any, ...]):
    """A set that is kept in order only so that equal sets are equal values; its text does not depend on that order.

    A renaming would disturb the order, and a mirror image must have the text of the state that it mirrors.
    """

    __slots__ = ()


Memo = dict[Any, str]
"""Texts of tuples that have been asked for before, for one renaming."""


def text_of(value: Any, rename: Rename | None = None, memo: Memo | None = None) -> str:
    """A canonical text of a value: equal values give equal texts, whatever order sets and dictionaries have.

    With ``rename``, room numbers and names trade places first; so the text of a state's mirror image is had
    without making the mirror image. ``memo`` must always be used with the same renaming.
    """
    kind = type(value)
    if kind is str:
        return repr(value if rename is None else rename.get(value, value))
    if kind is int:
        return str(value) if rename is None else str(rename.get(value, value))
    if kind is bool:
        return str(int(value))
    if value is None or kind is float:
        return repr(value)
    if memo is None:
        memo = {}
    if not isinstance(value, tuple):
        return _text_of_other(value, rename, memo)
    key = (Sorted, value) if kind is Sorted else value
    try:
        known = memo.get(key)
    except TypeError:  # it holds something that can be changed
        return _text_of_tuple(value, rename, memo)
    if known is None:
        known = memo[key] = _text_of_tuple(value, rename, memo)
    return known


def _text_of_tuple(value: tuple[Any, ...], rename: Rename | None, memo: Memo) -> str:
    texts = [text_of(each, rename, memo) for each in value]
    return "(" + ",".join(sorted(texts) if type(value) is Sorted else texts) + ")"


def _text_of_other(value: Any, rename: Rename | None, memo: Memo) -> str:
    text = getattr(value, "text_of", None)
    if text is not None:
        return str(text(rename))
    if isinstance(value, dict):
        pairs = sorted(f"{text_of(key, rename, memo)}:{text_of(each, rename, memo)}" for key, each in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, set | frozenset):
        return "<" + ",".join(sorted(text_of(each, rename, memo) for each in value)) + ">"
    if not isinstance(value, Iterable):
        value = _fields(value)
    return "(" + ",".join([text_of(each, rename, memo) for each in value]) + ")"


def _fields(value: Any) -> list[Any]:
    """What a plain object holds, in the order of its names."""
    slots = getattr(type(value), "__slots__", None)
    return [getattr(value, name) for name in (sorted(slots) if slots else sorted(vars(value)))]
