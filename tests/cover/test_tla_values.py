"""What TLC prints is read as it was meant, and what is written for TLC is read back as it was."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.sim.explorer.tla_values import (
    FUNCTION,
    ModelValue,
    Texts,
    canonical,
    fields_of,
    indices,
    of_action,
    of_detail,
    of_orders,
    of_room,
    of_state,
    parse,
    parse_state,
    read_dump,
    to_tla,
)
from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Action, Incarnation
from kvpoll.statemachine import ABSENT, STARTS, Room

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
PLAIN = (
    st.integers(-1000, 1000) | st.booleans() | st.text(max_size=8) | NAMES.map(lambda name: ModelValue(f"mv_{name}"))
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    PLAIN.map(canonical),
    lambda inner: (
        st.lists(inner, max_size=4).map(canonical)
        | st.frozensets(inner, max_size=4)
        | st.dictionaries(NAMES, inner, max_size=4).map(canonical)
        | st.dictionaries(st.integers(-2, 4), inner, max_size=4).map(canonical)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3).map(canonical)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    text = to_tla(value)
    assert parse(text) == value
    assert to_tla(parse(text)) == text
    assert canonical(value) == value and hash(value) == hash(parse(text))


PRINTED: list[tuple[str, Any]] = [
    (r'"a\"b\\c"', 'a"b\\c'),
    ("[a |-> 1, b |-> {}]", (FUNCTION, ("a", 1), ("b", frozenset()))),
    ('("b" :> 2 @@ "sglang-0.5.23" :> 1)', canonical({"sglang-0.5.23": 1, "b": 2})),
    ("(1 :> 2 @@ 3 :> 4)", (FUNCTION, (1, 2), (3, 4))),
    ('(2 :> "b" @@ 1 :> "a")', ("a", "b")),
    ("<<1, 2>>", (1, 2)),
    ("{1, 2, 3}", frozenset({1, 2, 3})),
    ("1..4", frozenset({1, 2, 3, 4})),
    ("2..1", frozenset()),
    ('{<<"a", 1>>, <<"b", {1, 2}>>}', frozenset({("a", 1), ("b", frozenset({1, 2}))})),
    ("-3", -3),
    ("m", ModelValue("m")),
    ("{m}", frozenset({ModelValue("m")})),
    ("<< >>", ()),
    ("<<<<>>>>", ((),)),
    ("{{}, {1}}", frozenset({frozenset(), frozenset({1})})),
    ("TRUE", True),
    ("<<FALSE>>", (False,)),
]
"""Left: copied from what TLC 2.15 printed."""


@pytest.mark.parametrize(("text", "value"), PRINTED, ids=[text for text, _ in PRINTED])
def test_tlc_prints_so(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


LONG = """\
State 14:
/\\ yy = <<<<>>>>
/\\ x = 13

State 15:
/\\ yy = ( <<"a", 1>> :>
      [ foo |-> <<"a", 1>>,
        bar |-> "a long string that makes the line too long, with x = 1 in it",
        baz |-> <<1, 2, 3, 4, 5, 6, 7, 8, 9, 10>> ] @@
  <<"b", 2>> :>
      [foo |-> 7] )
/\\ x = 14

"""


def test_a_dump_is_read_state_by_state(tmp_path: Path) -> None:
    path = tmp_path / "states.dump"
    path.write_text(LONG, encoding="utf-8")
    first, second = read_dump(path)
    assert first == {"yy": ((),), "x": 13}
    assert second["x"] == 14
    function = fields_of(second["yy"])
    assert function[("b", 2)] == canonical({"foo": 7})
    assert fields_of(function[("a", 1)])["baz"] == tuple(range(1, 11))


def test_a_single_variable_has_no_bullet(tmp_path: Path) -> None:
    path = tmp_path / "states.dump"
    path.write_text("State 1:\nx = 0\n\nState 2:\nx = 1\n\n", encoding="utf-8")
    assert list(read_dump(path)) == [{"x": 0}, {"x": 1}]
    assert parse_state("x = <<1,\n  2>>") == {"x": (1, 2)}


def test_each_text_is_read_once() -> None:
    texts = Texts()
    assert texts.value("{1, 2}") is texts.value("{1, 2}")


@pytest.mark.parametrize(
    "text", ["", "[a |-> ]", "<<1, 2", "{1} 2", "[a |-> 1", "SUBSET {1}", "1..", "(1 :> 2 @@ )", "?", "-"]
)
def test_what_is_no_value_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse(text)
    assert str(refused.value).startswith("not a value as TLC prints it, at ") and "\n" not in str(refused.value)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(BadInput, match="not a state as TLC prints it: Error: it broke"):
        parse_state("Error: it broke")


def test_a_missing_dump_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.dump: cannot be read: No such file"):
        list(read_dump(tmp_path / "none.dump"))


def test_a_record_is_no_sequence_of_pairs_and_survives_a_pickle() -> None:
    record = canonical({"a": 1})
    assert record != (("a", 1),) and pickle.loads(pickle.dumps(record)) == record
    assert canonical({1: "a", 2: "b"}) == ("a", "b") and canonical({}) == () and canonical(None) == "None"
    with pytest.raises(TypeError, match="not a record"):
        fields_of((1, 2))
    with pytest.raises(TypeError, match=r"no value for 0\.5"):
        canonical(0.5)


def test_machines_speak_tla() -> None:
    who = Incarnation(1001, 0, 0)
    room = Room(who, ABSENT._replace(poll="Failed", arrived=0b101, cause="client_left"))
    fields = fields_of(fields_of(of_room(room))["local"])
    assert fields["arrived"] == {0, 2} and fields["asked"] == frozenset() and fields["cause"] == "client_left"
    assert fields_of(of_state(ABSENT))["cause"] == "None"
    assert indices(0) == frozenset() and indices(0b1010) == {1, 3}
    assert of_state(STARTS["peer"]) == canonical({"state": "Alive", "epoch": [], "misses": 0})
    assert of_state(STARTS["registry"]._replace(ranks=(("tp0", 1),))) == canonical(
        {"state": "Empty", "ranks": {("tp0", 1)}, "puts": 0}
    )
    assert of_detail("RoutesResolved", (0b11, 2)) == (frozenset({0, 1}), 2)
    assert of_detail("PeerDied", 0b10) == (frozenset({1}),) and of_detail("PeerDied", None) == ()
    assert of_detail("WritePosted", True) == (True,)
    assert of_action(Action("AnswerDecode", who, ("Failed", 1))) == ("AnswerDecode", (1001, 0, 0), ("Failed", 1))
    assert of_orders((("ReleasePages", None), ("CancelLeg", "decode"))) == (
        ("ReleasePages", ()),
        ("CancelLeg", ("decode",)),
    )
