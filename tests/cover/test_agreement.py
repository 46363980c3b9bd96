"""The pure decisions that drivers ask for: how ranks agree, whom they contact, where a room runs, when to retry."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll.spec.protocol import Profile, Value, load
from kvpoll.statemachine import dp_rank
from kvpoll.statemachine.agreement import (
    BOOTSTRAPPING,
    FAILED,
    SUCCESS,
    TRANSFERRING,
    WAITING,
    Decision,
    Memory,
    Report,
    Ring,
    decide_bootstrap,
    decide_transfer,
    fits,
    follows_batch,
    intersect,
    merge_by_position,
    merge_by_request,
    stage0_decisions,
    stage_decisions,
    tightest,
    uses_ring,
    watched_states,
)
from kvpoll.statemachine.health import reports_healthy
from kvpoll.statemachine.mapping import Mapping, Sizes, map_ranks
from kvpoll.statemachine.retry import register_delay_s
from kvpoll.statemachine.routes import may_use

REFERENCE = load().profile("reference")


def rules(**changes: Value) -> Profile:
    return REFERENCE.with_rules(changes)


# ------------------------------------------------------------------------------------------------ merging polls


def test_polls_have_the_order_that_the_minimum_needs() -> None:
    assert FAILED < BOOTSTRAPPING < WAITING < TRANSFERRING < SUCCESS
    assert (FAILED, SUCCESS) == (0, 4)


def test_one_failure_dominates_and_success_needs_everyone() -> None:
    merged = merge_by_request(
        [
            {"a": Report(SUCCESS), "b": Report(SUCCESS), "c": Report(WAITING)},
            {"a": Report(SUCCESS), "b": Report(FAILED, "transfer_error"), "c": Report(BOOTSTRAPPING)},
        ]
    )
    assert merged == {"a": Report(SUCCESS), "b": Report(FAILED, "transfer_error"), "c": Report(BOOTSTRAPPING)}


def test_of_two_failures_the_first_rank_names_the_cause() -> None:
    """Every rank merges the same payloads in the same order, so all of them name the same cause."""
    merged = merge_by_request([{"a": Report(FAILED, "one")}, {"a": Report(FAILED, "two")}])
    assert merged == {"a": Report(FAILED, "one")}


def test_a_rank_that_does_not_know_a_request_yet_holds_it_back() -> None:
    assert merge_by_request([{"a": Report(SUCCESS)}, {}]) == {"a": Report(BOOTSTRAPPING)}
    assert merge_by_request([{"a": Report(FAILED, "x")}, {}]) == {"a": Report(FAILED, "x")}
    assert merge_by_request([{"a": Report(SUCCESS)}]) == {"a": Report(SUCCESS)}


REPORTS = st.builds(Report, st.integers(0, 4), st.none())
TABLES = st.lists(st.dictionaries(st.sampled_from("abcd"), REPORTS), min_size=1, max_size=5)


@given(TABLES)
def test_merging_by_request_is_the_minimum_over_the_ranks(tables: list[dict[str, Report]]) -> None:
    merged = merge_by_request(tables)
    assert merged.keys() == tables[0].keys()
    for rid, report in merged.items():
        assert report.poll == min(table.get(rid, Report(BOOTSTRAPPING)).poll for table in tables)


def test_merging_by_position_merges_whatever_stands_there() -> None:
    """A14: two ranks whose queues differ merge one request's poll with another's, and the rest falls off."""
    assert merge_by_position([[SUCCESS, WAITING], [SUCCESS, FAILED]]) == [SUCCESS, FAILED]
    assert merge_by_position([[SUCCESS, WAITING, FAILED], [WAITING]]) == [WAITING]
    assert merge_by_position([[], [WAITING]]) == []


# --------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    "poll, bootstrap, transfer",
    [
        (FAILED, Decision("a", "drop", "why"), Decision("a", "drop", "why")),
        (BOOTSTRAPPING, None, None),
        (WAITING, Decision("a", "admit"), None),
        (TRANSFERRING, Decision("a", "admit"), None),
        (SUCCESS, Decision("a", "admit"), Decision("a", "conclude")),
    ],
)
def test_a_merged_poll_decides(poll: int, bootstrap: Decision | None, transfer: Decision | None) -> None:
    report = Report(poll, "why" if poll == FAILED else None)
    assert decide_bootstrap("a", report) == bootstrap
    assert decide_transfer("a", report) == transfer


REPORTED = {"a": Report(FAILED, "late"), "b": Report(WAITING), "c": Report(BOOTSTRAPPING), "d": Report(WAITING)}


def test_stage_0_decides_in_the_order_of_its_queue() -> None:
    assert stage0_decisions(REPORTED, ["d", "c", "a", "b", "new"], None) == [
        Decision("d", "admit"), Decision("a", "drop", "late"), Decision("b", "admit"),
    ]  # fmt: skip


def test_in_a_ring_stage_0_admits_what_is_agreed_and_drops_by_itself() -> None:
    """sglang#26912: the ring carries admissions; failures are nobody's business but stage 0's."""
    assert stage0_decisions(REPORTED, ["a", "b", "c", "d"], ["d", "gone"]) == [
        Decision("a", "drop", "late"), Decision("d", "admit"),
    ]  # fmt: skip
    assert stage0_decisions(REPORTED, ["a"], ["a"]) == [Decision("a", "admit")]


RING = Ring(
    decisions=(Decision("a", "admit"), Decision("b", "drop", "late"), Decision("z", "conclude")),
    queue=("a", "b", "c"),
    agreed=("c", "d", "gone"),
)


def test_by_request_id_a_later_stage_does_what_stage_0_says() -> None:
    for queue in (["a", "b", "c"], ["c", "b"], []):
        assert stage_decisions(REFERENCE, RING, queue, {"c": "own failure"}) == list(RING.decisions)


def test_by_position_a_later_stage_does_it_to_whoever_stands_there() -> None:
    """C7: nobody checks whether the third request here is the third request there."""
    profile = rules(pp_decision="rank0_by_position")
    assert stage_decisions(profile, RING, ["a", "b", "c"], {}) == list(RING.decisions)
    assert stage_decisions(profile, RING, ["b", "a"], {}) == [
        Decision("b", "admit"), Decision("a", "drop", "late"), Decision("z", "conclude"),
    ]  # fmt: skip
    assert stage_decisions(profile, RING, ["c"], {}) == [Decision("c", "admit"), Decision("z", "conclude")]


def test_by_consensus_a_later_stage_admits_and_keeps_what_has_failed() -> None:
    profile = rules(pp_decision="consensus_good_only")
    assert stage_decisions(profile, RING, ["c", "d", "e"], {"e": "late"}) == [
        Decision("c", "admit"), Decision("d", "admit"),
    ]  # fmt: skip


def test_by_consensus_or_failure_it_drops_what_was_agreed_and_has_failed_since() -> None:
    """sglang#27028, A03: stage 0 has admitted d already, and computes it."""
    profile = rules(pp_decision="consensus_or_local_failed")
    assert stage_decisions(profile, RING, ["c", "d", "e"], {"d": "abort", "e": "late", "x": "not here"}) == [
        Decision("d", "drop", "abort"), Decision("e", "drop", "late"), Decision("c", "admit"),
    ]  # fmt: skip


def test_only_consensus_rules_and_only_pipelines_use_the_ring() -> None:
    values = load().rules["pp_decision"].values
    assert {rule for rule in values if uses_ring(rules(pp_decision=rule), 4)} == {
        "consensus_good_only", "consensus_or_local_failed",
    }  # fmt: skip
    assert not any(uses_ring(rules(pp_decision=rule), 1) for rule in values)


def test_what_a_pipeline_looks_at_and_computes() -> None:
    for rule in load().rules["pp_decision"].values:
        assert watched_states(rules(pp_decision=rule), 1) == ("Waiting", "Inflight")
        is_reference = rule == "rank0_by_request_id"
        assert watched_states(rules(pp_decision=rule), 4) == (("Waiting",) if is_reference else ()) + ("Inflight",)
        assert follows_batch(rules(pp_decision=rule)) is is_reference


def test_candidates_keep_their_order_down_the_pipeline() -> None:
    assert intersect(("c", "a", "b"), ["b", "x", "c"]) == ("c", "b")
    assert intersect((), ["a"]) == ()


# ------------------------------------------------------------------------------------------------------ memory


def test_memory_is_granted_by_the_tightest_rank() -> None:
    assert tightest([Memory(9, 2, 7), Memory(4, 8, 7), Memory(5, 5, 1)]) == Memory(4, 2, 1)
    assert tightest(iter([Memory(9, 2, 7)])) == Memory(9, 2, 7)


@pytest.mark.parametrize(
    "needed, memory, answer",
    [
        (4, Memory(4, 1, 1), True),
        (5, Memory(4, 1, 1), False),
        (4, Memory(4, 0, 1), False),
        (4, Memory(4, 1, 0), False),
        (0, Memory(0, 1, 1), True),
    ],
)
def test_a_request_needs_pages_a_row_and_a_slot(needed: int, memory: Memory, answer: bool) -> None:
    assert fits(needed, memory) is answer


def test_a_grant_leaves_less() -> None:
    assert Memory(9, 3, 2).less(4) == Memory(5, 2, 1)


# ------------------------------------------------------------------------------------------------- who with whom

SAME, WIDER, NARROWER = Sizes(tp=4), Sizes(tp=8), Sizes(tp=2)


@pytest.mark.parametrize(
    "prefill, decode, rank, mla, expected",
    [
        (SAME, SAME, 3, False, Mapping((3,), (0,), (0,), 1, 1)),
        (SAME, SAME, 5, False, Mapping((1,), (0,), (0,), 1, 1)),  # decode DP attention: rank modulo its TP size
        (SAME, WIDER, 5, False, Mapping((2,), (0,), (0,), 2, 1)),
        (SAME, NARROWER, 1, False, Mapping((2, 3), (0,), (0,), 1, 2)),
        (SAME, NARROWER, 1, True, Mapping((2, 3), (0,), (0,), 1, 1, True)),
        (SAME, SAME, 1, True, Mapping((1,), (0,), (0,), 1, 1)),
        (SAME, WIDER, 5, True, Mapping((2,), (0,), (0,), 2, 1)),
        (Sizes(pp=3, tp=2), Sizes(tp=2), 0, False, Mapping((0,), (0,), (2, 1, 0), 1, 3)),
        (Sizes(pp=2, tp=4), Sizes(tp=2), 0, False, Mapping((0, 1), (0,), (1, 0), 1, 4)),
        (Sizes(pp=2, tp=4), Sizes(tp=2), 0, True, Mapping((0, 1), (0,), (1, 0), 1, 2, True)),
        (Sizes(cp=2, tp=2), Sizes(tp=2), 1, False, Mapping((1,), (0,), (0,), 1, 1)),
        (Sizes(dp=4), Sizes(dp=2), 0, False, Mapping((0,), (0,), (0,), 1, 1)),
    ],
)
def test_whom_a_decode_rank_contacts(prefill: Sizes, decode: Sizes, rank: int, mla: bool, expected: Mapping) -> None:
    """PROTOCOL 7.4, case by case."""
    assert map_ranks(prefill, decode, rank, mla=mla) == expected


def test_with_as_many_stages_on_both_sides_each_talks_to_its_own() -> None:
    both = Sizes(pp=2)
    assert map_ranks(both, both, 0, 1) == Mapping((0,), (0,), (1,), 1, 1)


@pytest.mark.parametrize("tp", [(1, 1), (1, 4), (4, 1), (2, 8), (8, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("mla", [False, True])
def test_both_sides_count_alike(tp: tuple[int, int], pp: int, mla: bool) -> None:
    """What a prefill rank is told to wait for is how many decode ranks contact it; so with the answers."""
    prefill, decode = Sizes(pp=pp, tp=tp[0]), Sizes(tp=tp[1])
    contacts: Counter[tuple[int, int]] = Counter()
    for rank in range(decode.tp):
        mapping = map_ranks(prefill, decode, rank, mla=mla)
        real = mapping.tp_ranks[:1] if mapping.has_dummies else mapping.tp_ranks
        assert mapping.responses_required == len(real) * len(mapping.pp_ranks)
        contacts.update((stage, each) for stage in mapping.pp_ranks for each in mapping.tp_ranks)
    assert contacts == {(stage, each): mapping.destinations_required for stage in range(pp) for each in range(tp[0])}


@pytest.mark.parametrize(
    "prefill, decode, problem",
    [
        (Sizes(), Sizes(cp=2), "decode CP must be 1"),
        (Sizes(pp=4), Sizes(pp=2), "decode PP 2 must be 1 or equal to prefill's PP 4"),
        (Sizes(tp=3), Sizes(tp=2), "prefill TP 3 and decode TP 2: one must divide the other"),
        (Sizes(tp=2), Sizes(tp=3), "prefill TP 2 and decode TP 3: one must divide the other"),
    ],
)
def test_sizes_that_cannot_be_mapped_are_refused(prefill: Sizes, decode: Sizes, problem: str) -> None:
    with pytest.raises(ValueError) as error:
        map_ranks(prefill, decode, 0)
    assert str(error.value) == problem


# --------------------------------------------------------------------------------------------- where a room runs

UNCHECKED, CHECKED = rules(dp_conflict="unchecked"), REFERENCE
ASKING = rules(dp_lookup="query")


def test_a_replica_knows_its_number_and_attention_ranks_are_zero_in_plain_replicas() -> None:
    """B41: with the wrong notion every plain replica believes that it is rank 0."""
    wrong = rules(dp_rank_notion="attention")
    assert [dp_rank.known_rank(REFERENCE, 3, attention) for attention in (True, False)] == [3, 3]
    assert [dp_rank.known_rank(wrong, 3, attention) for attention in (True, False)] == [3, 0]


def test_a_conflict_names_both_ranks_and_what_to_do() -> None:
    told = dp_rank.conflict(CHECKED, 6, 4, True, 1)
    assert told == "dp_conflict: runs on dp 1, decode will look on dp 2; route by room or set dp_lookup = query"
    assert dp_rank.conflict(CHECKED, 6, 4, True, 2) is None


@pytest.mark.parametrize(
    "profile, size, follows",
    [(UNCHECKED, 4, True), (ASKING, 4, True), (CHECKED, 1, True), (CHECKED, 4, False)],
)
def test_where_decode_asks_or_there_is_no_choice_nothing_conflicts(profile: Profile, size: int, follows: bool) -> None:
    assert dp_rank.conflict(profile, 6, size, follows, 1) is None


@pytest.mark.parametrize(
    "profile, size, follows, answer",
    [
        (REFERENCE, 4, True, False),
        (REFERENCE, 4, False, True),
        (ASKING, 4, True, True),
        (ASKING, 1, True, False),
        (REFERENCE, 1, False, False),
    ],
)
def test_a_room_is_registered_where_decode_will_ask(profile: Profile, size: int, follows: bool, answer: bool) -> None:
    """PROTOCOL 9, the table of the sender's constructor."""
    assert dp_rank.must_register(profile, size, follows) is answer


# ------------------------------------------------------------------------------------------------------- retries


def test_waits_double_up_to_a_limit() -> None:
    waits = [register_delay_s(REFERENCE, attempt, False, 1.0) for attempt in range(1, 8)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


@given(st.integers(1, 60), st.floats(0.0, 1.0, exclude_max=True))
def test_jitter_takes_off_a_quarter_at_most(attempt: int, draw: float) -> None:
    nominal = min(2.0 ** (attempt - 1), 30.0)
    assert 0.75 * nominal <= register_delay_s(REFERENCE, attempt, False, draw) <= nominal


def test_jitter_spreads_evenly_from_low_to_nominal() -> None:
    assert register_delay_s(REFERENCE, 3, False, 0.0) == 3.0
    assert register_delay_s(REFERENCE, 3, False, 0.5) == 3.5
    assert register_delay_s(rules(register_jitter_low=0), 3, False, 0.25) == 1.0


def test_exhausted_the_wait_is_the_slow_one() -> None:
    assert register_delay_s(REFERENCE, 5, True, 0.3) == 30.0
    assert register_delay_s(rules(register_slow_retry_s=7), 99, True, 0.9) == 7.0


# --------------------------------------------------------------------------------------------- routes and health


@pytest.mark.parametrize("endpoint, believed, answer", [(1, 1, True), (2, 1, True), (0, 1, False), (0, None, True)])
def test_an_endpoint_of_a_process_that_is_known_to_be_over_is_refused(
    endpoint: int, believed: int | None, answer: bool
) -> None:
    """A21: the server still lists the dead process; the failure detector has seen its successor."""
    assert may_use(REFERENCE, endpoint, believed) is answer
    assert may_use(rules(route_cache="by_address"), endpoint, believed)


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_health_says_what_the_rule_says(alive: bool, registered: bool, running: bool) -> None:
    assert reports_healthy(REFERENCE, alive, registered, running) is (alive and registered and running)
    assert reports_healthy(rules(health="process_alive"), alive, registered, running) is alive
