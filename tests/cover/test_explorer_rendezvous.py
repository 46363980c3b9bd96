"""The rendezvous models: what each profile reaches and breaks, that every rule matters, and that TLC agrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvpoll.sim.explorer.judges import judges
from kvpoll.sim.explorer.model import MODELS, ModelFile, load_model, parse_model
from kvpoll.sim.explorer.properties import broken_promises
from kvpoll.sim.explorer.rendezvous import scaled
from kvpoll.sim.explorer.rendezvous_nodes import Desk, Server
from kvpoll.sim.explorer.rendezvous_view import constants, view
from kvpoll.sim.explorer.search import Explored, Search
from kvpoll.sim.explorer.tla_values import read_dump
from kvpoll.sim.explorer.tlc import Answer, Checker, Job, check, find_checker
from kvpoll.spec.protocol import SPEC_PATH, Profile, Protocol, load, parse
from kvpoll.spec.source import BadInput, Source
from kvpoll.spec.tables_tla import rules_record

PROTOCOL = load()
REFERENCE = PROTOCOL.profiles["reference"]
SMALL = ("bootstrap-late", "dp-one-astray", "dp-plain-replicas")
LARGE = ("bootstrap-restart", "dp-router-override")


def explored(
    name: str, profile: Profile, judged: bool = True, protocol: Protocol = PROTOCOL, only: tuple[str, ...] | None = None
) -> Explored:
    """One model explored to the end."""
    system = load_model(name, protocol).build(protocol, profile)
    search = Search(system, judges(protocol.bounds, only) if judged else (), keep_graph=True)
    result = search.run(max_states=400_000)
    assert result.complete
    return result


class Verdict(NamedTuple):
    """What was found: invariant -> depth. broken: what waits for ever, and after how many moves that is settled."""

    found: dict[str, int]
    broken: dict[str, int]


def verdict(result: Explored) -> Verdict:
    """What breaks, and how soon."""
    found = {name: each.depth for name, each in result.found.items()}
    return Verdict(found, {name: each.depth for name, each in broken_promises(result.search).items()})


# -- what each profile reaches

STATES = {
    ("bootstrap-late", "reference"): 1360,
    ("bootstrap-late", "sglang-0.5.23"): 1110,
    ("bootstrap-late", "before-sglang-25125"): 452,
    ("bootstrap-late", "after-sglang-25125"): 1110,
    ("dp-one-astray", "reference"): 6469,
    ("dp-one-astray", "sglang-0.5.23"): 3581,
    ("dp-one-astray", "before-sglang-22901"): 4599,
    ("dp-one-astray", "after-sglang-22901"): 7781,
    ("dp-plain-replicas", "reference"): 1672,
    ("dp-plain-replicas", "sglang-0.5.23"): 1508,
    ("dp-plain-replicas", "after-sglang-22901"): 1823,
    ("bootstrap-restart", "reference"): 113672,
    ("dp-router-override", "reference"): 177375,
}


@pytest.mark.parametrize(("name", "profile"), STATES)
def test_as_many_states_as_ever(name: str, profile: str) -> None:
    result = explored(name, PROTOCOL.profiles[profile], judged=False)
    assert result.states == STATES[name, profile]


VERDICTS = {
    ("bootstrap-late", "reference"): Verdict({}, {}),
    ("bootstrap-late", "sglang-0.5.23"): Verdict({"O2": 6, "R1": 19, "O1": 19}, {"L1": 18, "L2": 18, "L4": 18}),
    ("bootstrap-late", "before-sglang-25125"): Verdict({"O2": 3, "R1": 17, "O1": 17}, {"L1": 16, "L2": 16, "L4": 16}),
    ("bootstrap-late", "after-sglang-25125"): Verdict({"O2": 6, "R1": 19, "O1": 19}, {"L1": 18, "L2": 18, "L4": 18}),
    ("dp-one-astray", "reference"): Verdict({}, {}),
    ("dp-one-astray", "sglang-0.5.23"): Verdict({"R1": 29}, {"S6": 23, "L2": 21, "R2": 28}),
    ("dp-one-astray", "before-sglang-22901"): Verdict({"R1": 30}, {"S6": 21, "R2": 29}),
    ("dp-one-astray", "after-sglang-22901"): Verdict({"R1": 29}, {"R2": 28}),
    ("dp-plain-replicas", "reference"): Verdict({}, {}),
    ("dp-plain-replicas", "sglang-0.5.23"): Verdict(
        {"S4": 11, "R1": 25, "O1": 25}, {"L1": 24, "L2": 21, "L4": 24, "R2": 24}
    ),
    ("dp-plain-replicas", "after-sglang-22901"): Verdict({}, {}),
    ("bootstrap-restart", "reference"): Verdict({}, {}),
    ("bootstrap-restart", "sglang-0.5.23"): Verdict(
        {"L6": 5, "O2": 6, "S4": 16, "L4": 26, "R1": 30, "O1": 30}, {"L1": 29, "L2": 15, "R2": 37}
    ),
    ("bootstrap-restart", "before-sglang-25125"): Verdict(
        {"O2": 3, "S4": 16, "L4": 24, "R1": 28, "O1": 28}, {"L1": 27, "L2": 21, "R2": 37}
    ),
    ("dp-router-override", "reference"): Verdict({}, {}),
    ("dp-router-override", "before-sglang-22901"): Verdict({"S4": 11, "S3": 14, "R1": 29}, {"S6": 20, "R2": 28}),
}


@pytest.mark.parametrize(("name", "profile"), VERDICTS)
def test_what_breaks_and_how_soon(name: str, profile: str) -> None:
    assert verdict(explored(name, PROTOCOL.profiles[profile])) == VERDICTS[name, profile]


@pytest.mark.parametrize("name", (*SMALL, *LARGE))
def test_nothing_holds_because_nothing_happened(name: str) -> None:
    model = load_model(name, PROTOCOL)
    assert model.marks
    assert model.marks <= explored(name, REFERENCE, judged=False).marks


# -- what is wrong with registration, and what would mend it


def unmended() -> Protocol:
    """The protocol as it was before the explorer: a restart of the server is not noticed while a PUT is under way."""
    text = SPEC_PATH.read_text()
    rows = [line for line in text.splitlines() if "server_was_replaced" not in line and "mark_replaced" not in line]
    return parse(Source("unmended.toml", "\n".join(rows)))


def test_an_answer_of_a_dead_server_was_taken_for_one_of_its_successor() -> None:
    """Found by exploration: `reference` broke L4, because the late 200 of a dead server ended the registration."""
    before = unmended()
    path = explored("bootstrap-late", before.profiles["reference"], protocol=before).found["L4"].path
    told = [taken.outcome.label for taken in path]
    dies, finds, hears = (
        told.index("B0 dies"),
        told.index("P0/dp1 finds another life of B0"),
        told.index("P0/dp1 hears 200"),
    )
    assert told.index("B0 answers PUT /route P0/dp1 0 2 of P0/dp1: 200") < dies < finds < hears
    assert "P0/dp1 begins to register" not in told[hears:]


@pytest.mark.parametrize("name", ("bootstrap-late", "bootstrap-restart"))
def test_now_it_registers_again(name: str) -> None:
    assert verdict(explored(name, REFERENCE)) == Verdict({}, {})


# -- every rule matters

SWITCHES = [
    ("bootstrap-late", "ready_means", "count_of_puts", "O2"),
    ("bootstrap-late", "register_exhausted", "continue_unregistered", None),
    ("bootstrap-late", "registration_watch", "none", None),
    ("bootstrap-late", "health", "process_alive", "O2"),
    ("bootstrap-restart", "http_calls", "blocking", "L6"),
    ("bootstrap-restart", "endpoint_patience", "none", None),
    ("dp-one-astray", "dp_conflict", "unchecked", "S6"),
    ("dp-one-astray", "dp_lookup", "query", None),
    ("dp-plain-replicas", "dp_rank_notion", "attention", "L4"),
    ("dp-plain-replicas", "dp_lookup", "query", None),
]


@pytest.mark.parametrize(("name", "rule", "value", "breaks"), SWITCHES)
def test_a_rule_switched_alone_makes_a_difference(name: str, rule: str, value: str, breaks: str | None) -> None:
    switched = REFERENCE.with_rules({rule: value})
    if breaks is None:
        assert explored(name, switched, judged=False).states != explored(name, REFERENCE, judged=False).states
        return
    broken = verdict(explored(name, switched, only=(breaks,)))
    assert breaks in broken.found or breaks in broken.broken
    assert verdict(explored(name, REFERENCE, only=(breaks,))) == Verdict({}, {})


def test_every_rule_that_a_model_is_said_to_exercise_is_switched() -> None:
    said = {rule for name in (*SMALL, *LARGE) for rule in load_model(name, PROTOCOL).exercises}
    assert said == {rule for _, rule, _, _ in SWITCHES}


@pytest.mark.parametrize(
    ("rule", "value", "depth"),
    [("register_exhausted", "continue_unregistered", 19), ("registration_watch", "none", 18)],
)
def test_a_rank_that_the_server_does_not_know_is_not_found(rule: str, value: str, depth: int) -> None:
    assert verdict(explored("bootstrap-late", REFERENCE.with_rules({rule: value}), only=("L4",))).found["L4"] == depth


def test_asking_the_server_finds_the_request_that_went_astray() -> None:
    switched = REFERENCE.with_rules({"dp_lookup": "query", "dp_conflict": "unchecked"})
    result = explored("dp-one-astray", switched)
    assert verdict(result) == Verdict({}, {})
    assert "dp_rank_queried" in result.marks


def test_a_server_that_names_the_wrong_rank_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Desk.dp_rank

    def lying(desk: Desk, server: Server, room: int) -> tuple[int, ...]:
        return tuple(1 - rank for rank in honest(desk, server, room))

    monkeypatch.setattr(Desk, "dp_rank", lying)
    switched = REFERENCE.with_rules({"dp_lookup": "query"})
    assert "S6" in verdict(explored("dp-plain-replicas", switched, only=("S6",))).broken


# -- model files

GOOD = (MODELS / "bootstrap-late.toml").read_text()


@pytest.mark.parametrize(
    ("text", "by", "complaint"),
    [
        ("room = 1001", "room = 7", r"bad.toml:\d+: room numbers of models are above 1000, got 7"),
        ('when = "healed"', 'when = "late"', r'bad.toml:\d+: `when` must be "start" or "healed", got \'late\''),
        ("prefill = 2", "prefill = 9", r"bad.toml:\d+: `prefill` must be from 1 to 4, got 9"),
        ('start = "late"', 'start = "never"', r"bad.toml:\d+: unknown start 'never'"),
        (
            "answer_lost = 1",
            "answer_lots = 1",
            r"bad.toml:\d+: unknown fault 'answer_lots' \(did you mean 'answer_lost'\?\)",
        ),
        (
            "prefill = 2",
            'prefill = 2\ndp_attention = "no"',
            r"bad.toml:\d+: `dp_attention` must be true or false, got 'no'",
        ),
        ("prefill = 2\n", "", r"bad.toml:\d+: .*prefill"),
        ("prefill = 2", "prefil = 2", r"bad.toml:\d+: unknown key 'prefil' \(did you mean 'prefill'\?\)"),
    ],
)
def test_a_mistake_in_a_model_is_named_with_its_line(text: str, by: str, complaint: str) -> None:
    assert text in GOOD
    with pytest.raises(BadInput, match=complaint):
        parse_model(Source("bad.toml", GOOD.replace(text, by)), PROTOCOL, "bad")


def test_two_requests_need_two_rooms() -> None:
    twice = GOOD + '\n[[request]]\nrid = "q2"\nroom = 1001\n'
    with pytest.raises(BadInput, match="a rid and a room of its own"):
        parse_model(Source("bad.toml", twice), PROTOCOL, "bad")


def test_attempts_are_scaled_down_and_never_up() -> None:
    content = load_model("bootstrap-late", PROTOCOL).content
    assert scaled(content, REFERENCE)["register_attempts"] == 2
    assert scaled(content, PROTOCOL.profiles["before-sglang-25125"])["register_attempts"] == 1


# -- TLC


@pytest.fixture(scope="module")
def checker() -> Checker:
    try:
        return find_checker()
    except BadInput as error:
        pytest.skip(str(error))


def asked(model: ModelFile, profile: Profile, checker: Checker, **what: Any) -> Answer:
    """What TLC says of a model under a profile."""
    dump = what.pop("dump", None)
    definitions = {"Rules": rules_record(PROTOCOL, scaled(model.content, profile)), **constants(model.content)}
    return check(Job("Rendezvous", definitions, **what), checker, dump=dump)


def hashable(states: Iterator[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """States as values of a set."""
    return {tuple(state[name] for name in sorted(state)) for state in states}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "profile", "rules"),
    [
        ("bootstrap-late", "reference", {}),
        ("bootstrap-late", "before-sglang-25125", {}),
        ("bootstrap-late", "reference", {"ready_means": "count_of_puts"}),
        ("dp-plain-replicas", "reference", {"dp_lookup": "query"}),
        ("dp-plain-replicas", "sglang-0.5.23", {}),
        ("dp-one-astray", "before-sglang-22901", {}),
    ],
)
def test_tlc_reaches_the_same_states(
    name: str, profile: str, rules: dict[str, str], checker: Checker, tmp_path: Path
) -> None:
    model, chosen = load_model(name, PROTOCOL), PROTOCOL.profiles[profile].with_rules(rules)
    ours = explored(name, chosen, judged=False)
    answer = asked(model, chosen, checker, dump=tmp_path / "states")
    assert (answer.verdict, answer.distinct, answer.depth) == ("ok", ours.states, ours.depth)
    rows = np.concatenate(ours.search.rows)
    assert hashable(view(ours.search.cells_of(row)) for row in rows) == hashable(read_dump(tmp_path / "states"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "profile", "rules", "invariant", "depth"),
    [
        ("bootstrap-late", "reference", {"registration_watch": "none"}, "L4", 18),
        ("bootstrap-late", "before-sglang-25125", {}, "O2", 3),
        ("dp-plain-replicas", "reference", {"dp_rank_notion": "attention"}, "L4", 5),
        ("dp-one-astray", "before-sglang-22901", {}, "S6", 21),
    ],
)
def test_tlc_finds_the_same_shortest_way(
    name: str, profile: str, rules: dict[str, str], invariant: str, depth: int, checker: Checker
) -> None:
    chosen = PROTOCOL.profiles[profile].with_rules(rules)
    answer = asked(load_model(name, PROTOCOL), chosen, checker, invariants=(invariant,))
    ours = verdict(explored(name, chosen, only=(invariant,)))
    assert (answer.verdict, answer.name, len(answer.trace) - 1) == ("invariant", invariant, depth)
    assert (ours.found | ours.broken)[invariant] == depth


@pytest.mark.slow
def test_tlc_finds_the_end_of_every_request(checker: Checker) -> None:
    fair = {"specification": "FairSpec", "properties": ("L1", "L4Answered")}
    model = load_model("dp-plain-replicas", PROTOCOL)
    assert asked(model, REFERENCE, checker, **fair).verdict == "ok"
    late = load_model("bootstrap-late", PROTOCOL)
    assert asked(late, PROTOCOL.profiles["before-sglang-25125"], checker, **fair).verdict == "property"
