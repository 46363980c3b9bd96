"""Pipelines: every interleaving of stages that agree on requests while those are given up; what each rule makes of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix  # type: ignore[import-untyped, unused-ignore]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped, unused-ignore]

from kvpoll.sim.explorer.budget import CELL
from kvpoll.sim.explorer.explore import Report, explore
from kvpoll.sim.explorer.model import load_model, parse_model
from kvpoll.sim.explorer.pipeline import Leg, constants
from kvpoll.sim.explorer.pipeline_stages import Stage, Step, acts_alone
from kvpoll.sim.explorer.schedule import Stepper
from kvpoll.sim.explorer.search import Search
from kvpoll.sim.explorer.system import System
from kvpoll.sim.explorer.tla_values import fields_of, read_dump
from kvpoll.sim.explorer.tlc import Job, check, find_checker
from kvpoll.spec.protocol import Profile, load
from kvpoll.spec.source import BadInput, Source
from kvpoll.statemachine.agreement import Ring

PROTOCOL = load()
SMALL = load_model("pipeline-small", PROTOCOL)
LARGE = load_model("pipeline", PROTOCOL)
RULES = ("rank0_by_request_id", "rank0_by_position", "consensus_good_only", "consensus_or_local_failed")


def ruled(rule: str) -> Profile:
    """The reference with another way for stages to agree, and nothing else changed."""
    return PROTOCOL.profile("reference").with_rules({"pp_decision": rule})


@cache
def explored(name: str) -> Report:
    """The small model under a profile, or under the reference with another rule."""
    profile = ruled(name) if name in RULES else PROTOCOL.profile(name)
    return explore(SMALL, PROTOCOL, profile)


def depths(report: Report) -> dict[str, int]:
    """Length of the shortest counterexample of each invariant that is broken."""
    return {name: found.depth for name, found in report.broken.items()}


def system_of(rule: str) -> System:
    """The small model under the reference with this rule."""
    return SMALL.build(PROTOCOL, ruled(rule))


class TestVerdicts:
    """One rule at a time, so that nothing else can be blamed."""

    def test_the_first_stage_decides_by_request_id_and_everything_holds(self) -> None:
        report = explored("reference")
        assert report.complete
        assert report.liveness is not None
        assert depths(report) == {}

    def test_positions_cannot_differ_where_every_stage_hears_the_same_steps(self) -> None:
        """C7 needs a queue that something else has changed; nothing here does."""
        report = explored("rank0_by_position")
        assert report.complete
        assert depths(report) == {}

    def test_agreeing_on_good_requests_only_leaves_the_others_for_ever(self) -> None:
        """sglang#26912: stage 0 drops what has failed, and never says so."""
        report = explored("consensus_good_only")
        assert depths(report) == {"R1": 9, "O1": 9}
        assert "1 in rooms, 1 in requests" in report.broken["R1"].text
        assert report.broken["R1"].path[-1].outcome.label == "P0/pp0 takes a turn: drop q1"

    def test_dropping_what_has_failed_here_splits_the_pipeline(self) -> None:
        """A03: what sglang#27028 did about it."""
        report = explored("consensus_or_local_failed")
        assert depths(report) == {"S7": 10}
        assert report.broken["S7"].path[-1].move.name == "P0/pp1 follows"
        assert "pipeline_mismatch" in report.safety.marks

    def test_a_split_pipeline_serves_nobody_any_more(self) -> None:
        """The other request, which nobody gave up, never ends on the stage that waits for ever."""
        second = 'room = 1001\n[[request]]\nrid = "q2"\nroom = 1002'
        text = Path(SMALL.path).read_text(encoding="utf-8")
        text = text.replace("total = 2", "total = 1").replace("prefill_abort = 1\ndecode_abort = 1\nslowness = 1", "")
        text = text.replace("stages = 2", 'stages = 2\nwrites = "at once"').replace("room = 1001", second)
        model = parse_model(Source("changed.toml", text), PROTOCOL, "changed")
        report = explore(model, PROTOCOL, ruled("consensus_or_local_failed"), only=("S7", "L1"))
        assert depths(report) == {"S7": 10, "L1": 18}
        assert depths(explore(model, PROTOCOL, ruled("rank0_by_request_id"), only=("S7", "L1"))) == {}

    @pytest.mark.parametrize(
        ("profile", "expected"),
        [
            ("before-sglang-27028", {"S4": 5, "L2": 7, "R1": 9, "O1": 9, "R2": 9, "S3": 10, "S9": 13}),
            ("after-sglang-27028", {"S4": 5, "L2": 8, "S3": 10, "S7": 10, "O2": 10, "R1": 10, "R2": 10, "S9": 13}),
            ("sglang-0.5.23", {"S4": 5, "L2": 8, "S3": 8, "R1": 10, "R2": 10, "S9": 11}),
        ],
    )
    def test_what_sglang_makes_of_it(self, profile: str, expected: dict[str, int]) -> None:
        assert depths(explored(profile)) == expected

    def test_only_the_orphans_of_27028_are_counted_in_a_queue(self) -> None:
        """R1 breaks in all of SGLang, because a late message re-creates a cleared room (A11); O1 tells them apart."""
        assert "O1" in explored("before-sglang-27028").broken
        for profile in ("after-sglang-27028", "sglang-0.5.23"):
            assert "O1" not in explored(profile).broken
            assert explored(profile).broken["R1"].text == "left on an idle node: 1 in rooms"


class TestSize:
    @pytest.mark.parametrize(
        ("name", "states"),
        [
            ("reference", 4861),
            ("rank0_by_position", 4861),
            ("consensus_good_only", 5915),
            ("consensus_or_local_failed", 9310),
            ("before-sglang-27028", 4145),
            ("after-sglang-27028", 5772),
            ("sglang-0.5.23", 3502),
        ],
    )
    def test_states_with_what_the_monitors_remember(self, name: str, states: int) -> None:
        assert explored(name).safety.states == states

    def test_the_large_model_is_explored_in_seconds(self) -> None:
        search = Search(LARGE.build(PROTOCOL, PROTOCOL.profile("reference")))
        seen = search.run()
        assert seen.complete
        assert seen.states == 127_699
        assert seen.marks >= LARGE.marks

    @pytest.mark.parametrize("name", ["reference", *RULES[1:]])
    def test_every_fault_is_witnessed(self, name: str) -> None:
        assert explored(name).unwitnessed == []
        assert {f"fault {kind}" for kind in SMALL.faults if kind != "total"} <= explored(name).safety.marks

    def test_two_equal_requests_are_explored_once(self) -> None:
        """A model with twins has half as many states if their symmetry is used (but for those that mirror themselves)."""
        twins = parse_model(written(LARGE.path, "stages = 3", "stages = 2"), PROTOCOL, "twins")
        system = twins.build(PROTOCOL, PROTOCOL.profile("reference"))
        once, twice = Search(system).run(), Search(system, symmetry=False).run()
        assert once.states < 0.51 * twice.states


def written(path: str, before: str, after: str) -> Source:
    """The text of a model file with one thing replaced by another."""
    text = Path(path).read_text(encoding="utf-8")
    assert before in text
    return Source("changed.toml", text.replace(before, after))


class TestStages:
    def test_a_stage_at_rest_takes_no_turn(self) -> None:
        """Idle costs nothing: with nothing dispatched only the router can move."""
        stepper = Stepper(system_of("consensus_or_local_failed"))
        possible = {move.name for move in stepper.system.moves if stepper.outcomes(move)}
        assert possible == {"R dispatches q1"}

    def test_only_a_stage_that_acts_alone_needs_steps_of_nothing(self) -> None:
        assert [acts_alone(ruled(rule)) for rule in RULES] == [False, False, False, True]

    @pytest.mark.parametrize("rule", RULES)
    def test_a_request_goes_all_the_way(self, rule: str) -> None:
        """Without a fault every rule serves the request, and every stage forgets it."""
        stepper = Stepper(system_of(rule))
        for _ in range(60):
            fair = [move for move in stepper.system.moves if move.kind == "step" and stepper.outcomes(move)]
            if not fair:
                break
            stepper.take(fair[-1].name)
        assert stepper.state["R"] == frozenset({Leg("q1", "done")})
        assert all(not stepper.state[node].entries for node in ("P0/pp0", "P0/pp1"))
        assert dict(stepper.state[CELL])["total"] == 2

    def test_a_batch_that_differs_stops_the_stage_and_the_health_says_so(self) -> None:
        """A stage that is handed a batch it does not have; under the reference it applies stage 0's and cannot."""
        system = system_of("rank0_by_position")
        follow = next(move for move in system.moves if move.name == "P0/pp1 follows")
        (outcome,) = follow.act(Stage(), (Step((), Ring(), ("q1",), 0),))
        assert outcome.after[0].stopped
        assert outcome.marks == ("pipeline_mismatch",)
        assert [type(event).__name__ for event in outcome.events] == ["CollectiveEntered", "HealthReported"]
        assert not outcome.events[1].healthy
        assert list(follow.act(outcome.after[0], (Step(),))) == []

    def test_a_tombstone_keeps_no_more_than_its_answers_need(self) -> None:
        """Two that ended alike are equal, whatever they ended of."""
        report = explored("reference")
        places = report.safety.search.places
        ends = {
            room.local
            for node in ("P0/pp0", "P0/pp1")
            for stage in report.safety.search.values[places[node]].values
            for room in stage.rooms
            if room.local.poll == "Retired"
        }
        assert {local.cause for local in ends} == {None, "failed"}
        assert len(ends) == 2


class TestFiles:
    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (("stages = 2", "stages = 1"), "`stages` must be from 2 to 8, got 1"),
            (("stages = 2", ""), "a pipeline model lacks `stages`"),
            (("stages = 2", 'stages = 2\nwrites = "never"'), "unknown way to write 'never'"),
            (("slowness = 1", "slownes = 1"), "unknown fault 'slownes' (did you mean 'slowness'?)"),
            (("room = 1001", "room = 7"), "room numbers of models are above 1000, got 7"),
            (("room = 1001", 'room = 1001\n[[request]]\nrid = "q2"\nroom = 1001'), "a room, of its own"),
            (('[[request]]\nrid = "q1"\nroom = 1001', ""), "at least one [[request]]"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_line(self, change: tuple[str, str], complaint: str) -> None:
        with pytest.raises(BadInput) as caught:
            parse_model(written(SMALL.path, *change), PROTOCOL, "changed")
        assert str(caught.value).startswith("changed.toml")
        assert complaint in str(caught.value)


class TestTla:
    """``spec/tla/Pipeline.tla`` against the explorer, on one fault."""

    ONE = parse_model(written(SMALL.path, "total = 2", "total = 1"), PROTOCOL, "one")

    def test_its_constants(self) -> None:
        assert constants(self.ONE.content) == {
            "Requests": '{"q1"}',
            "RoomOf": "[q1 |-> 1001]",
            "LastStage": "1",
            "WritesLater": "TRUE",
            "Faults": "[decode_abort |-> 1, pp_abort |-> 1, prefill_abort |-> 1, slowness |-> 1, total |-> 1]",
        }

    @pytest.mark.parametrize("rule", RULES)
    def test_no_behaviour_goes_round_in_circles(self, rule: str) -> None:
        """Which is why the module needs one condition of fairness only."""
        search = Search(system_of(rule), symmetry=False, keep_graph=True)
        states = search.run().states
        source, target = (np.concatenate([edges[place] for edges in search.edges]) for place in (0, 1))
        edges = csr_matrix((np.ones(len(source)), (source, target)), (states, states))
        assert connected_components(edges, connection="strong", return_labels=False) == states

    @pytest.mark.slow
    @pytest.mark.parametrize("profile", ["reference", "before-sglang-27028", "after-sglang-27028", "sglang-0.5.23"])
    def test_both_reach_the_same_states(self, profile: str, tmp_path: Path) -> None:
        try:
            checker = find_checker()
        except BadInput as missing:
            pytest.skip(str(missing))
        system = self.ONE.build(PROTOCOL, PROTOCOL.profile(profile))
        assert system.view is not None
        search = Search(system, symmetry=False, keep_graph=True)
        search.run()
        mine = {tuple(sorted(system.view(search.cells_of(row)).items())) for rows in search.rows for row in rows}
        definitions = {**constants(self.ONE.content), "Rules": f'Profiles["{profile}"]'}
        job = Job("Pipeline", definitions, specification="Safety", view="Protocol")
        answer = check(job, checker, dump=tmp_path / "states.dump")
        assert answer.verdict == "ok", answer.message
        theirs = set()
        for state in read_dump(tmp_path / "states.dump"):
            assert "broken" in fields_of(state.pop("history"))
            theirs.add(tuple(sorted(state.items())))
        assert len(mine) == search.explored.states == answer.distinct
        assert mine == theirs
