"""The explorer finds every mutant of ``spec/mutants.toml``, and says so of none that it has not found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpoll.cli import main
from kvpoll.sim.explorer import mutants, transfer_engines
from kvpoll.sim.explorer.mistakes import FUNCTIONS, replaced
from kvpoll.sim.explorer.mutants import JUDGED, Examiner, Mutant, load_mutants, parse_mutants
from kvpoll.sim.explorer.process import Pen
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput, Source
from kvpoll.statemachine import agreement
from kvpoll.statemachine.guards import GUARDS
from kvpoll.statemachine.updates import UPDATES

MUTANTS = load_mutants(load())


@pytest.fixture(scope="module")
def examine() -> Examiner:
    """One for all, because it remembers the sound runs."""
    return Examiner(load())


def read(text: str) -> list[Mutant]:
    return parse_mutants(Source("mutants.toml", text), load())


def mutant(change: str, invariant: str = "S1", more: str = "faults = {}") -> str:
    return f'[[mutant]]\nid = "one"\ntitle = "a mistake"\ninvariant = "{invariant}"\nmodel = "one-room"\n{more}\n{change}\n'


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.id for mutant in MUTANTS])
def test_a_mutant_is_caught(mutant: Mutant, examine: Examiner) -> None:
    verdict = examine(mutant)
    assert verdict.why == ""
    assert verdict.caught
    assert verdict.depth is not None
    assert verdict.text


def test_every_invariant_that_the_explorer_judges_has_a_mutant() -> None:
    assert {mutant.invariant for mutant in MUTANTS} == set(JUDGED)


def test_every_mistake_of_a_function_is_made_by_some_mutant() -> None:
    """Nothing is written down in Python that the data does not ask for."""
    made = {mutant.change.said for mutant in MUTANTS}
    for name, mistakes in FUNCTIONS.items():
        for mistake in mistakes:
            assert f"{name.partition(':')[2]}: {mistake}" in made


EQUIVALENT = [
    pytest.param('guard = "timer_is_announced"\nbecomes = "never"', "S1", id="a guard that nobody asks"),
    pytest.param(
        'row = { role = "router", from = ["Waiting"], fact = "LegFailed" }\nbecomes = { to = "Answered" }',
        "S9",
        id="a row that becomes what it is",
    ),
    pytest.param(
        'row = { role = "sender", from = ["Absent"], fact = "RequestOpened", guards = ["needs_no_destination"] }\nbecomes = "dropped"',
        "L1",
        id="a row that is never taken",
    ),
]


@pytest.mark.parametrize(("change", "invariant"), EQUIVALENT)
def test_a_mutant_that_changes_nothing_survives(change: str, invariant: str, examine: Examiner) -> None:
    """Or the check above could not fail."""
    verdict = examine(read(mutant(change, invariant))[0])
    assert not verdict.caught
    assert verdict.depth is None
    assert verdict.why == "survives"


def test_a_mutant_proves_nothing_where_the_sound_protocol_breaks_too(examine: Examiner) -> None:
    more = 'profile = "sglang-0.5.23"\nfaults = { client_abort = 1 }'
    change = 'guard = "timer_is_announced"\nbecomes = "never"'
    verdict = examine(read(mutant(change, "S3", more))[0])
    assert verdict.depth is not None
    assert not verdict.caught
    assert verdict.why.startswith("proves nothing: without the mistake, too, ")


def test_a_mutant_proves_nothing_where_the_sound_model_is_too_large_to_judge() -> None:
    """A promise is judged on the whole graph: half a graph without a broken promise says nothing."""
    mutant = next(mutant for mutant in MUTANTS if mutant.id == "last-write-ends-nothing")
    verdict = Examiner(load(), limit=20)(mutant)
    assert verdict.depth is not None
    assert not verdict.caught
    assert verdict.why.endswith("without the mistake there are more than 20 states, too many to judge")


def test_a_mutant_that_makes_the_model_infinite_is_given_up() -> None:
    change = 'row = { role = "prefill_request", from = ["Waiting"], fact = "ForwardFinished" }\nbecomes = { to = "=" }'
    few = Examiner(load(), limit=500)
    assert few(read(mutant(change, "S12"))[0]).why.startswith("survives the first ")


def test_a_mistake_that_the_model_cannot_make_is_named() -> None:
    change = (
        'row = { role = "prefill_request", from = ["Unqueued"], fact = "RequestArrived" }\nbecomes = { to = "Done" }'
    )
    with pytest.raises(BadInput, match=r"mutant 'one' \(mutants.toml:1\): model 'one-room' cannot make this mistake"):
        Examiner(load())(read(mutant(change))[0])


def test_nothing_is_left_of_a_mutant(examine: Examiner) -> None:
    before: list[Any] = [
        dict(GUARDS),
        dict(UPDATES),
        Pen.reserve,
        agreement.decide_transfer,
        transfer_engines.decide_transfer,
    ]
    assert transfer_engines.decide_transfer is agreement.decide_transfer
    for name in ("release-undrained", "rank-zero-for-all", "page-stays-free", "concludes-early"):
        assert examine(next(mutant for mutant in MUTANTS if mutant.id == name)).caught
    after = [dict(GUARDS), dict(UPDATES), Pen.reserve, agreement.decide_transfer, transfer_engines.decide_transfer]
    assert before == after


def test_what_was_replaced_is_put_back_when_the_search_fails() -> None:
    table = {"name": "old", "other": "old"}
    with pytest.raises(RuntimeError), replaced([(table, "name", "new"), (agreement, "SUCCESS", 9)]):
        assert table["name"] == "new"
        assert agreement.SUCCESS == 9
        raise RuntimeError
    with pytest.raises(KeyError), replaced([(table, "name", "new"), (table, "no such name", "new")]):
        pass
    assert table == {"name": "old", "other": "old"}
    assert agreement.SUCCESS == 4


def test_a_changed_table_is_a_copy() -> None:
    protocol = load()
    change = next(mutant for mutant in MUTANTS if mutant.id == "failed-means-free").change
    changed = change.protocol(protocol)
    assert changed is not protocol
    assert changed.digest != protocol.digest
    assert changed.roles["receiver"].joint != protocol.roles["receiver"].joint
    assert changed.roles["receiver"].table == protocol.roles["receiver"].table
    assert changed.roles["sender"] is protocol.roles["sender"]


GUARD = 'guard = "all_have_drained"\nbecomes = "always"'
ROW = 'row = { role = "receiver", from = ["WaitingForInput"], fact = "StatusReceived" }\nbecomes = "dropped"'
MALFORMED = [
    ("[mutants]", "mutants.toml:1: unknown section 'mutants' (did you mean 'mutant'?)"),
    ("", "mutants.toml:1: a file of mutants needs at least one"),
    ('[[mutant]]\nid = "one"', "mutants.toml:1: a mutant lacks `title`"),
    (mutant(GUARD, "L7"), "mutants.toml:4: unknown invariant that the explorer judges 'L7'"),
    (mutant(GUARD).replace("one-room", "one-rom"), "mutants.toml:5: unknown model 'one-rom' (did you mean 'one-room'?)"),
    (mutant(GUARD, more='profile = "referenc"'), "mutants.toml:6: unknown profile 'referenc' (did you mean 'reference'?)"),
    (mutant(GUARD, more="faults = { slow = 1 }"), "mutants.toml:6: unknown fault of model 'one-room' 'slow'"),
    (mutant(GUARD, more="faults = { slowness = 3 }"), "mutants.toml:6: `slowness` must be from 0 to 2, as in the model, got 3"),
    (mutant(GUARD, more='given = { identity = "rom" }'), "mutants.toml:6: rule 'identity' has no value 'rom' (did you mean 'room'?)"),
    (mutant(""), "mutants.toml:1: a mutant changes one of row, guard, update, function, rules; this one names none"),
    (mutant(f'{GUARD}\nupdate = "own"'), "this one names guard and update"),
    (mutant('guard = "all_have_drained"'), "mutants.toml:7: a mutant of `guard` needs a `becomes`"),
    (mutant('rules = { identity = "room" }\nbecomes = "always"'), "mutants.toml:7: a mutant of `rules` has no `becomes`"),
    (mutant(GUARD.replace("drained", "draind")), "mutants.toml:7: unknown guard 'all_have_draind' (did you mean 'all_have_drained'?)"),
    (mutant(GUARD.replace("always", "alway")), "mutants.toml:8: unknown mistake of a guard 'alway' (did you mean 'always'?)"),
    (mutant('update = "own"\nbecomes = "noting"'), "mutants.toml:8: unknown update 'noting' (did you mean 'nothing'?)"),
    (mutant('function = "statemachine.agreement:fits"\nbecomes = "x"'), "mutants.toml:7: unknown function with a mistake"),
    (mutant(ROW), "mutants.toml:7: several rows of role 'receiver' are meant (lines "),
    (mutant(ROW.replace('"StatusReceived"', '"StatusReceived", guards = []')), "mutants.toml:7: role 'receiver' has no such row in profile 'reference'; there are: WaitingForInput on StatusReceived if outcome_is_failed -> Failed"),
    (mutant(ROW.replace("StatusReceived", "StatusRecived")), "mutants.toml:7: unknown fact 'StatusRecived' (did you mean 'StatusReceived'?)"),
    (mutant(ROW.replace("WaitingForInput", "Waiting")), "mutants.toml:7: unknown state 'Waiting' (did you mean 'WaitingForInput'?)"),
    (mutant(ROW.replace('"receiver"', '"reciever"')), "mutants.toml:7: unknown role 'reciever' (did you mean 'receiver'?)"),
    (mutant(ROW.replace("from", "form")), "mutants.toml:7: unknown key 'form' (did you mean 'from'?)"),
    (mutant(ROW.replace('role = "receiver"', 'role = "router", table = "joint"')), "mutants.toml:7: role 'router' has no joint table"),
    (mutant('row = { role = "registration", from = ["Registered"], fact = "ServerRestarted" }\nbecomes = "nothing"'), 'mutants.toml:8: a row becomes "dropped" or a table of what it says instead'),
    (mutant('row = { role = "registration", from = ["Registered"], fact = "ServerRestarted" }\nbecomes = { actions = ["SendRegistraton"] }'), "mutants.toml:8: unknown action 'SendRegistraton' (did you mean 'SendRegistration'?)"),
    (mutant('row = { role = "registration", from = ["Registered"], fact = "ServerRestarted" }\nbecomes = { to = "Registred" }'), "mutants.toml:8: unknown state 'Registred' (did you mean 'Registered'?)"),
    (mutant(GUARD) + mutant(GUARD), "mutants.toml:10: there is another mutant 'one' above"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "complaint"), MALFORMED, ids=[complaint for _, complaint in MALFORMED])
def test_a_malformed_mutant_is_named_by_file_and_line(text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as raised:
        read(text)
    assert complaint in str(raised.value)


# -- the command


def test_the_command_says_what_was_caught(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "last-write-ends-nothing", "success-ends-nothing", "page-stays-free"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["mutant", "invariant", "model", "caught", "depth", "states", "seconds"]
    assert out[1].split()[:4] == ["last-write-ends-nothing", "L1", "one-room", "yes"]
    assert out[-1] == "caught 3 of 3 mutants, 2 of 2 invariants"


def test_the_command_takes_an_invariant_and_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "--invariant", "S12", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["invariants"] == ["S12"]
    assert said["caught"] == len(said["mutants"]) == sum(mutant.invariant == "S12" for mutant in MUTANTS)
    assert said["mutants"][0]["caught"] is True
    assert said["invariants_missed"] == []


def test_the_command_fails_when_one_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mutants.toml"
    path.write_text(mutant('guard = "timer_is_announced"\nbecomes = "never"', "S10"), encoding="utf-8")
    assert main(["mutants", "--file", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:4] == ["one", "S10", "one-room", "NO"]
    assert "one (a mistake), mutants.toml:1: survives" in out
    assert out.splitlines()[-1] == "caught 0 of 1 mutants, 0 of 1 invariants"


def test_an_invariant_without_a_mutant_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mutants.toml"
    change = 'row = { role = "sender", from = ["Transferring"], fact = "WriteCompleted", to = "Success" }\nbecomes = { to = "=" }'
    path.write_text(mutant(change, "L1"), encoding="utf-8")
    monkeypatch.setattr("kvpoll.commands.mutants.PATH", path)
    assert main(["mutants"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"caught 1 of 1 mutants, 1 of {len(JUDGED)} invariants"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["page-stays-fre"], "there is no mutant 'page-stays-fre' (did you mean 'page-stays-free'?)"),
        (["--invariant", "s13"], "'s13' is no invariant that the explorer judges (did you mean 'S"),
        (["page-stays-free", "--invariant", "S1"], "none of these mutants is made to break S1"),
        (["--file", "no-such.toml"], "no-such.toml: cannot be read: No such file or directory; check the path"),
    ],
)
def test_bad_input_is_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_the_file_says_where_it_is() -> None:
    assert mutants.PATH.name == "mutants.toml"
    assert all(mutant.line > 1 for mutant in MUTANTS)
