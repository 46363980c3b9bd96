"""The group models: what their ranks agree on under each profile, and that nothing holds because nothing happened.

State counts are pinned on the smallest model: a change there is a change of the model (or of the protocol), and is to
be explained. TLC, where it is installed, must reach the same states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpoll.sim.explorer.judges import judges
from kvpoll.sim.explorer.model import ModelFile, load_model, parse_model
from kvpoll.sim.explorer.properties import broken_promises
from kvpoll.sim.explorer.search import Explored, Search
from kvpoll.sim.explorer.tla_values import read_dump, to_tla
from kvpoll.sim.explorer.tlc import Answer, Job, check, find_checker
from kvpoll.spec.invariants import Bounds
from kvpoll.spec.protocol import Profile, load
from kvpoll.spec.source import BadInput, Source
from kvpoll.spec.tables_tla import rules_record
from kvpoll.spec.trace import CollectiveEntered

PROTOCOL = load()
BOUNDS = Bounds(240, 2, 60, 1, 20, 135, 4096)
SMALL = "tp-small"
PROFILES = ("reference", "before-sglang-21299", "after-sglang-21299", "sglang-0.5.23")

UNFAULTED = """
[model]
title = "two requests and no fault"
kind = "group"
pages = 1
[[request]]
rid = "q1"
room = 1001
[[request]]
rid = "q2"
room = 1002
"""


def profile_of(name: str, **rules: str) -> Profile:
    return PROTOCOL.profile(name).with_rules(rules) if rules else PROTOCOL.profile(name)


def explored(
    model: str | ModelFile, profile: Profile, *only: str, symmetry: bool = True, until_found: bool = False
) -> Explored:
    loaded = load_model(model, PROTOCOL) if isinstance(model, str) else model
    search = Search(loaded.build(PROTOCOL, profile), judges(BOUNDS, only or None), symmetry=symmetry)
    return search.run(until_found=until_found)


def depths(seen: Explored) -> dict[str, int]:
    return {name: found.depth for name, found in seen.found.items()}


@pytest.mark.parametrize(
    ("profile", "states", "broken"),
    [
        ("reference", 3021, {}),
        ("before-sglang-21299", 3362, {"S7": 10, "O2": 10, "R1": 12, "O1": 12, "S3": 19, "S9": 23}),
        ("after-sglang-21299", 4122, {"S3": 19, "S9": 23}),
        ("sglang-0.5.23", 4122, {"S3": 19, "S9": 23}),
    ],
)
def test_the_small_model_is_what_it_was(profile: str, states: int, broken: dict[str, int]) -> None:
    seen = explored(SMALL, profile_of(profile))
    assert seen.complete and (seen.states, depths(seen)) == (states, broken)


def test_every_fault_is_witnessed_and_does_not_break_the_reference() -> None:
    for name in ("tp-small", "tp-one-page"):
        model = load_model(name, PROTOCOL)
        seen = explored(model, profile_of("reference"))
        assert seen.complete and not seen.found and model.marks <= seen.marks, (name, depths(seen))


def test_queues_that_diverge_hang_the_group_for_ever() -> None:
    """sglang#21299: S7, then L1 with nothing left that could happen."""
    system = load_model(SMALL, PROTOCOL).build(PROTOCOL, profile_of("before-sglang-21299"))
    search = Search(system, judges(BOUNDS, ("S7", "L1")), keep_graph=True)
    found = search.run().found["S7"]
    entered = [each for each in found.path[-1].outcome.events if isinstance(each, CollectiveEntered)]
    assert [(each.node, each.kind) for each in entered] == [("D0/tp0", "requests"), ("D0/tp1", "preallocation")]
    hang = broken_promises(search)["L1"]
    assert (hang.depth, hang.cycle) == (11, [])


def test_a_rank_without_memory_diverges_where_positions_count() -> None:
    """A14 in SGLang as shipped: one rank could not allocate, so it has another amount of memory from then on."""
    seen = explored("tp-one-page", profile_of("sglang-0.5.23"), "S7", until_found=True)
    assert depths(seen) == {"S7": 28}
    assert sum(taken.move.kind == "fault" for taken in seen.found["S7"].path) == 1


def test_the_reference_without_one_rule_is_found_out() -> None:
    """A test that can fail: the reference without one of its rules is found out."""
    late = profile_of("reference", decode_enqueue="after_resolution")
    assert depths(explored("tp-one-page", late, "S7", until_found=True)).keys() == {"S7"}
    overwritten = profile_of("reference", setup_failure="overwritten")
    assert depths(explored(SMALL, overwritten, "S3", "S10")) == {"S3": 5, "S10": 10}
    blind = profile_of("reference", agreement="by_position")
    assert "S9" in depths(explored(SMALL, blind, "S9"))


def test_requests_may_trade_places() -> None:
    model = parse_model(Source("unfaulted.toml", UNFAULTED), PROTOCOL, "unfaulted")
    profile = profile_of("reference")
    folded, whole = explored(model, profile, "S7"), explored(model, profile, "S7", symmetry=False)
    assert whole.complete and folded.complete
    assert whole.states < 2 * folded.states < 1.05 * whole.states + 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("pages = 1", "pages = 0"), r"x\.toml:5: `pages` must be a whole number from 1 to 8, got 0"),
        (("pages = 1", "pages = 1\nranks = 3"), r"x\.toml:6: unknown key 'ranks'"),
        (("room = 1002", "room = 1001"), r"x\.toml:9: each request needs a rid and a room of its own"),
        (("room = 1002", "room = 12"), r"x\.toml:11: room numbers of models are above 1000, got 12"),
        (('rid = "q2"\n', ""), r"x\.toml:9: a request lacks `rid`"),
        (("[[request]]", "[faults]\nslownes = 1\n[[request]]"), r"x\.toml:7: unknown fault 'slownes'.*'slowness'"),
    ],
)
def test_mistakes_in_a_model_are_told_with_their_place(change: tuple[str, str], complaint: str) -> None:
    text = UNFAULTED.replace(*change, 1)
    with pytest.raises(BadInput, match=complaint):
        parse_model(Source("x.toml", text), PROTOCOL, "x")


# -- the same in TLA+


def job_of(model: ModelFile, profile: Profile, **claims: Any) -> Job:
    content = model.content
    faults = {**content.faults, "total": content.faults.get("total", sum(content.faults.values()))}
    constants = {
        "Rules": rules_record(PROTOCOL, profile),
        "Requests": to_tla(frozenset(content.asked)),
        "RoomOf": to_tla({rid: pair[0] for rid, pair in content.asked.items()}),
        "Pages": str(content.pages),
        "Faults": to_tla(faults),
    }
    return Job("Group", constants, **claims)


def told(model: ModelFile, profile: Profile, dump: Path | None = None, **claims: Any) -> Answer:
    try:
        checker = find_checker()
    except BadInput as missing:
        pytest.skip(str(missing))
    return check(job_of(model, profile, **claims), checker, dump=dump)


def states_of(model: ModelFile, profile: Profile) -> set[Any]:
    system = model.build(PROTOCOL, profile)
    search = Search(system, keep_graph=True)
    assert search.run().complete and system.view is not None
    views = [system.view(search.cells_of(row)) for row in np.concatenate(search.rows)]
    assert len(views) == search.explored.states
    return {tuple(sorted(view.items())) for view in views}


def states_of_tlc(model: ModelFile, profile: Profile, folder: Path) -> set[Any]:
    answer = told(model, profile, folder / "group.dump", specification="Safety")
    assert answer.verdict == "ok", answer.message
    states = set()
    for state in read_dump(folder / "group.dump"):
        del state["history"]
        states.add(tuple(sorted(state.items())))
    return states


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["reference", "before-sglang-21299", "sglang-0.5.23"])
def test_tlc_reaches_the_same_states(profile: str, tmp_path: Path) -> None:
    model, chosen = load_model(SMALL, PROTOCOL), profile_of(profile)
    ours = states_of(model, chosen)
    assert len(ours) == {"reference": 2926, "before-sglang-21299": 2807, "sglang-0.5.23": 2811}[profile]
    assert ours == states_of_tlc(model, chosen, tmp_path)


@pytest.mark.slow
def test_tlc_reaches_the_same_states_of_two_requests(tmp_path: Path) -> None:
    model = parse_model(Source("unfaulted.toml", UNFAULTED), PROTOCOL, "unfaulted")
    chosen = profile_of("reference")
    assert states_of(model, chosen) == states_of_tlc(model, chosen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "invariant", "moves"),
    [("before-sglang-21299", "S7", 10), ("sglang-0.5.23", "S3", 19), ("sglang-0.5.23", "S9", 23)],
)
def test_tlc_finds_the_same_violations(profile: str, invariant: str, moves: int) -> None:
    answer = told(load_model(SMALL, PROTOCOL), profile_of(profile), specification="Safety", invariants=(invariant,))
    assert (answer.verdict, answer.name, len(answer.trace) - 1) == ("invariant", invariant, moves)


@pytest.mark.slow
def test_tlc_finds_the_hang_and_nothing_in_the_reference() -> None:
    model, claims = load_model(SMALL, PROTOCOL), ("S3", "S5", "S7", "S8", "S9", "S10", "R1")
    whole = told(model, profile_of("reference"), invariants=claims, properties=("L1",))
    assert whole.verdict == "ok", whole.message
    assert told(model, profile_of("before-sglang-21299"), properties=("L1",)).verdict == "property"
