"""Faults as data: every kind begins, really does something, ends, and leaves a cluster that works."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sim_stage import PROTOCOL, Played, Stage, scenario, shape

from kvpoll.sim import faults
from kvpoll.sim.cluster import Cluster
from kvpoll.sim.faults import EFFECTS, FAULTS_PATH, Fault, Injector, draw_faults, kinds
from kvpoll.sim.run import Run
from kvpoll.sim.topology import Topology, rank_names
from kvpoll.spec import trace
from kvpoll.spec.source import BadInput

TRAFFIC = """
[topology.prefill]
dp = 2
pp = 2
tp = 2
[topology.decode]
tp = 2
[workload]
kind = "poisson"
rate_per_s = 6
input_tokens = 12000
output_tokens = 40
[timing]
hostile_s = 12
"""

TARGETS = {"server": "B0", "any_engine": "P0", "link": "P0", "router": "R", "prefill_engine": "P0"}
"""What a kind is aimed at below, by what a seed would aim it at; all others at a prefill rank."""

STRENGTHS = {
    "slow_s": 1.5, "share": 0.5, "after_s": 0.2, "delay_s": 0.2, "peer": '"D0"', "late_s": 3.0, "factor": 3.0,
    "offset_s": 400.0,
}  # fmt: skip
BEGINS_S, LASTS_S = 3.0, 5.0


def fault_text(kind: faults.Kind, **more: Any) -> str:
    target = TARGETS.get(kind.draw["target"], "P0/dp0/pp0/tp0")
    lines = [f'kind = "{kind.name}"', f'target = "{target}"', f"at_s = {BEGINS_S}", f"for_s = {LASTS_S}"]
    lines += [f"{name} = {STRENGTHS[name]}" for name, value in kind.parameters.items() if value == "required"]
    lines += [f"{name} = {value}" for name, value in more.items()]
    return "[[fault]]\n" + "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------- the vocabulary


def test_every_kind_of_the_file_has_an_effect_and_every_effect_a_kind() -> None:
    assert {kind.effect for kind in kinds().values()} == EFFECTS.keys()
    assert len(kinds()) == 26
    for kind in kinds().values():
        assert kind.says and kind.draw
        drawn = kind.draw.keys() - {"target", "at_s", "for_s"}
        assert drawn <= kind.parameters.keys()
        required = {name for name, value in kind.parameters.items() if value == "required"}
        assert required - drawn <= {"peer"}  # the other end of a drawn link


def test_a_vocabulary_that_names_no_effect_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FAULTS_PATH.read_text().replace('effect = "sever"', 'effect = "server"')
    path = tmp_path / "faults.toml"
    path.write_text(text)
    monkeypatch.setattr(faults, "FAULTS_PATH", path)
    line = text.split("\n").index('effect = "server"') + 1
    with pytest.raises(BadInput) as error:
        kinds.__wrapped__()
    assert str(error.value) == f"{path}:{line}: unknown effect 'server'"


@pytest.mark.parametrize("name", kinds())
def test_each_kind_begins_acts_ends_and_breaks_nothing(name: str) -> None:
    """Under the reference; one kind at a time, so that a violation names its culprit."""
    kind = kinds()[name]
    run = Played(TRAFFIC + fault_text(kind))
    (began,), (ended,) = run.of(trace.FaultBegan), run.of(trace.FaultEnded)
    assert (began.kind, ended.kind, began.fault, ended.fault) == (name, name, f"{name}-0", f"{name}-0")
    assert (began.t, ended.t) == (BEGINS_S, BEGINS_S + LASTS_S)
    assert bool(began.severs) == kind.severs
    assert run.outcome.unfired == []
    assert run.outcome.marks[f"fault:{name}"] >= 1
    assert run.outcome.violations == {}
    probes = [event for event in run.of(trace.Resulted) if event.rid.startswith("probe")]
    assert [event.ok for event in probes] == [True] * 4


def test_what_a_fault_severs_is_what_it_cuts_off() -> None:
    """L2 is suspended for these: everybody without a bootstrap server, the whole engine of a dead rank."""
    severs = {}
    for name, target in (("bootstrap_crash", "B0"), ("rank_crash", "P0/dp1/pp0/tp1"), ("partition", "P0")):
        text = fault_text(kinds()[name]).replace(
            f'target = "{TARGETS[kinds()[name].draw["target"]]}"', f'target = "{target}"'
        )
        (began,) = Played(TRAFFIC + text).of(trace.FaultBegan)
        severs[name] = began.severs
    assert severs == {"bootstrap_crash": ("*",), "rank_crash": ("P0",), "partition": ("P0",)}


# ------------------------------------------------------------------------------------------ when a fault begins


TRIGGERED = """
[workload]
kind = "requests"
requests = [{ at_s = 1.0, input_tokens = 4000, output_tokens = 16 }, { at_s = 2.0, input_tokens = 4000, output_tokens = 16 }]
[timing]
hostile_s = 20
[[fault]]
kind = "message_delay"
target = "D0"
for_s = 1
delay_s = 0.01
"""


def began_after(trigger: str, at_s: float = 0.0, **fields: Any) -> tuple[list[float], Played]:
    run = Played(TRIGGERED + f"at_s = {at_s}\ntrigger = {trigger}\n", **fields)
    return [event.t for event in run.of(trace.FaultBegan)], run


def test_a_trigger_fires_at_the_first_match_and_once() -> None:
    times, run = began_after('{ event = "Admitted", node = "R" }')
    assert times == [1.0]
    times, run = began_after('{ event = "Committed" }')
    assert times == [run.of(trace.Committed)[0].t]
    assert len(run.of(trace.Committed)) > 1


def test_time_counts_from_the_match() -> None:
    times, _ = began_after('{ event = "Admitted", rid = "r1" }', at_s=0.25)
    assert times == [2.25]


def test_a_star_at_the_end_matches_whatever_follows() -> None:
    times, run = began_after('{ event = "Answered", route = "GET*", status = 200 }')
    assert times == [run.of(trace.Answered, route="GET /route")[0].t]
    times, _ = began_after('{ event = "Admitted", rid = "r1*" }')
    assert times == [2.0]
    times, _ = began_after('{ event = "Admitted", rid = "r" }')
    assert times == []


def test_a_trigger_that_nothing_matches_leaves_the_fault_unfired() -> None:
    times, run = began_after('{ event = "Admitted", rid = "nobody" }')
    assert times == []
    assert run.outcome.unfired == ["message_delay"]


@pytest.mark.parametrize("fact", ["RoutesResolved", "SetupFinished", "WritePosted"])
def test_a_trigger_hears_the_same_whether_a_run_is_recorded_or_not(fact: str) -> None:
    """Steps that concern no invariant are left out of a run that nobody records, but not out of a trigger's."""
    trigger = f'{{ event = "Stepped", fact = "{fact}" }}'
    times, run = began_after(trigger)
    assert len(times) == 1
    alone = Run(PROTOCOL, run.scenario, PROTOCOL.profile("reference"))()
    assert alone.unfired == []
    assert alone.events == run.outcome.events


# ----------------------------------------------------------------------------------------------- when it ends


def test_a_fault_without_an_end_ends_with_the_hostile_phase() -> None:
    text = TRAFFIC + fault_text(kinds()["message_delay"]).replace(f"for_s = {LASTS_S}\n", "")
    (ended,) = Played(text).of(trace.FaultEnded)
    assert ended.t == 12.0


def test_what_has_not_begun_when_faults_stop_never_does() -> None:
    text = TRAFFIC + fault_text(kinds()["rank_crash"]).replace(f"at_s = {BEGINS_S}", "at_s = 25.0")
    run = Played(text)
    assert run.of(trace.FaultBegan) == []
    assert run.outcome.unfired == ["rank_crash"]


class Hands:
    """A cluster without traffic, and faults begun and ended by hand."""

    def __init__(self, topology: Topology | None = None) -> None:
        self.stage = Stage(topology or Topology(prefill=shape(count=2), decode=shape(count=2)))
        self.cluster: Cluster = self.stage.cluster()
        self.injector = Injector(self.cluster, [])

    def begin(self, name: str, target: str, **parameters: Any) -> Fault:
        kind = kinds()[name]
        number = len(self.injector.active)
        fault = Fault(f"{name}-{number}", kind, target, 0.0, 1e9, {**kind.parameters, **parameters})
        self.injector.begin(fault)
        return fault

    def end(self, fault: Fault) -> None:
        self.injector.end(fault)

    @property
    def up(self) -> dict[str, bool]:
        return {name: self.stage.world.alive[name] for name in ("P0", "P1", "B0", "B1", "D0", "D1")}

    def down(self) -> set[str]:
        return {name for name, up in self.up.items() if not up}


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.mark.parametrize(
    "name, target, down",
    [
        ("rank_crash", "P0", {"P0", "B0"}),
        ("quick_restart", "D1", {"D1"}),
        ("bootstrap_crash", "B1", {"B1"}),
        ("bootstrap_amnesia", "B0", {"B0"}),
    ],
)
def test_a_process_is_down_and_back_in_its_next_life(hands: Hands, name: str, target: str, down: set[str]) -> None:
    """The bootstrap server lives in its prefill engine and dies with it."""
    fault = hands.begin(name, target)
    assert hands.down() == down
    hands.end(fault)
    assert hands.down() == set()
    assert {each: hands.stage.world.epochs[each] for each in down} == dict.fromkeys(down, 1)


def test_a_rank_takes_its_whole_engine_along() -> None:
    hands = Hands(Topology(prefill=shape(count=2, dp=2, tp=2), decode=shape(count=2)))
    hands.begin("rank_crash", "P1/dp1/tp0")
    assert hands.down() == {"P1", "B1"}
    assert len(hands.stage.of(trace.NodeStopped)) == 4 + 1


def test_a_server_does_not_come_back_in_a_dead_engine(hands: Hands) -> None:
    server, engine = hands.begin("bootstrap_crash", "B0"), hands.begin("rank_crash", "P0")
    hands.end(server)
    assert hands.down() == {"P0", "B0"}
    hands.end(engine)
    assert hands.down() == set()


def test_an_engine_comes_back_without_a_server_that_is_still_held_down(hands: Hands) -> None:
    engine, server = hands.begin("rank_crash", "P0"), hands.begin("bootstrap_crash", "B0")
    hands.end(engine)
    assert hands.down() == {"B0"}
    hands.end(server)
    assert hands.down() == set()


@pytest.mark.parametrize(
    "first, second, target", [("rank_crash", "quick_restart", "P0"), ("bootstrap_late", "bootstrap_amnesia", "B0")]
)
def test_of_two_faults_that_hold_a_process_down_the_last_to_end_lets_it_up(
    hands: Hands, first: str, second: str, target: str
) -> None:
    longer, shorter = hands.begin(first, target), hands.begin(second, target)
    down = hands.down()
    hands.end(shorter)
    assert hands.down() == down
    hands.end(longer)
    assert hands.down() == set()
    assert hands.stage.world.epochs[target] == 1


def test_healing_ends_everything_in_whatever_order_it_began(hands: Hands) -> None:
    hands.begin("bootstrap_crash", "B0")
    hands.begin("rank_crash", "P0")
    hands.begin("quick_restart", "D0")
    hands.begin("partition", "P1", peer="D1")
    hands.injector.heal()
    assert hands.down() == set()
    assert hands.stage.world.network.severed == []
    assert hands.injector.active == {}
    hands.begin("rank_crash", "P0")
    assert hands.down() == set()


def fields_of(hands: Hands) -> dict[str, Any]:
    """What lasting faults change in a cluster."""
    world, server = hands.stage.world, hands.cluster.servers[0]
    return {
        "slow_s": server.slow_s, "error_share": server.error_share, "severed": list(world.network.severed),
        "delays": list(world.network.delays), "duplicating": list(world.network.duplicating),
        "faults": list(hands.cluster.transport.faults), "slow": list(hands.cluster.transport.slow),
        "slowdowns": [list(engine.slowdowns) for engine in hands.cluster.engines()],
        "fail_next": [rank.kv.fail_next for engine in hands.cluster.engines() for rank in engine.ranks.values()],
        "override": hands.cluster.router.override, "hooks": list(hands.cluster.router.before_dispatch),
        "room": hands.cluster.router.reuse_room(),
    }  # fmt: skip


LASTING = [name for name, kind in kinds().items() if kind.effect not in ("process_down", "jump_clock")]


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_has_ended_has_left_nothing_behind(hands: Hands, name: str) -> None:
    kind = kinds()[name]
    target = TARGETS.get(kind.draw["target"], "P0")
    before = fields_of(hands)
    strengths = {key: STRENGTHS[key] for key, value in kind.parameters.items() if value == "required"}
    fault = hands.begin(name, target, **(strengths | ({"peer": "D0"} if "peer" in strengths else {})))
    changed = fields_of(hands)
    assert changed != before
    hands.end(fault)
    assert fields_of(hands) == before


def test_two_faults_that_slow_a_server_add_up_and_go_one_by_one(hands: Hands) -> None:
    one, two = hands.begin("bootstrap_slow", "B0", slow_s=1.0), hands.begin("bootstrap_slow", "B0", slow_s=2.0)
    slow = [hands.cluster.servers[0].slow_s]
    for fault in (one, two):
        hands.end(fault)
        slow.append(hands.cluster.servers[0].slow_s)
    assert slow == [3.0, 2.0, 0.0]


# -------------------------------------------------------------------------------------- what some of them do


def share_ok(run: Played) -> float:
    return run.outcome.succeeded / run.outcome.requests


def ttft_s(run: Played) -> float:
    return max(run.outcome.ttft_s)


def free_write_s(run: Played) -> float:
    """How long the largest writes took that waited for no other, of those that were posted from second 3 to 8."""
    posted = {e.write: e for e in run.of(trace.WritePosted, node="P0/dp0/pp0/tp0") if 3.0 <= e.t < 8.0}
    largest = max(len(event.target_pages) for event in posted.values())
    return float(
        min(
            event.t - posted[event.write].t
            for event in run.of(trace.WriteSettled, node="P0/dp0/pp0/tp0")
            if event.write in posted and len(posted[event.write].target_pages) == largest
        )
    )


CALM = Played(TRAFFIC)

SEEN: dict[str, Callable[[Played], bool]] = {
    "slow_rank": lambda run: ttft_s(run) > 1.5 * ttft_s(CALM),
    "slow_link": lambda run: 2.5 < free_write_s(run) / free_write_s(CALM) < 3.5,
    "pp_abort": lambda run: "stage_abort" in run.outcome.causes,
    "client_abort": lambda run: run.outcome.causes.keys() == {"client_left"},
    "prefill_abort": lambda run: "prefill_abort" in run.outcome.causes,
    "decode_abort": lambda run: "decode_abort" in run.outcome.causes,
    "abort_storm": lambda run: "both_abort" in run.outcome.causes,
    "allocation_failure": lambda run: run.outcome.marks["allocation_failed"] == 1,
    "dp_override": lambda run: run.outcome.causes.keys() == {"dp_conflict"},
    "room_reuse": lambda run: any(event.pair[1] for event in run.of(trace.Admitted)),
    "message_duplicate": lambda run: run.outcome.marks["message_duplicated"] > 3,
    "message_drop": lambda run: run.outcome.marks["link_restored"] > 0,
    "partition": lambda run: run.outcome.marks["message_lost"] > 0,
    "write_fail": lambda run: "transfer_error" in run.outcome.causes,
    "write_partial": lambda run: "transfer_error" in run.outcome.causes,
    "rank_crash": lambda run: "engine_crashed" in run.outcome.causes,
}


@pytest.mark.parametrize("name", SEEN)
def test_a_fault_is_seen_by_those_whom_it_hits(name: str) -> None:
    run = Played(TRAFFIC + fault_text(kinds()[name]))
    assert SEEN[name](run)
    assert share_ok(CALM) == 1.0


WAITING = """
[topology.decode]
kv_pages = 12
[workload]
kind = "requests"
requests = [
  { at_s = 1.0, input_tokens = 4000, output_tokens = 400 },
  { at_s = 1.5, input_tokens = 4000, output_tokens = 16 },
]
[timing]
hostile_s = 20
[[fault]]
kind = "clock_offset"
target = "P0"
at_s = 5
offset_s = 400.0
"""


def test_the_wall_clock_moves_only_those_timers_that_look_at_it() -> None:
    """PROTOCOL 17.5: time.time() jumps by 400 s, and a request that waits for decode's memory is timed out."""
    assert share_ok(Played(WAITING)) == 1.0
    run = Played(WAITING, deadline_clock="wall")
    rung = run.of(trace.Stepped, fact="DeadlineReached", node="P0", detail="bootstrap")
    assert [(event.t, event.poll_after) for event in rung] == [(5.0, "Failed")]
    assert run.outcome.causes == {"bootstrap_timeout": 1}


def test_a_late_server_holds_back_itself_and_no_other() -> None:
    run = Played("""
[topology.prefill]
count = 2
[workload]
kind = "requests"
requests = [{ at_s = 1.0, input_tokens = 4000, output_tokens = 16 }, { at_s = 1.0, input_tokens = 4000, output_tokens = 16 }]
[timing]
hostile_s = 20
[[fault]]
kind = "bootstrap_late"
target = "B0"
for_s = 8
""")
    assert {event.node: event.t for event in run.of(trace.NodeStarted) if event.node[0] == "B"} == {
        "B0": 8.0,
        "B1": 0.0,
    }
    assert run.outcome.succeeded == run.outcome.requests
    assert run.outcome.violations == {}


# ------------------------------------------------------------------------------------------- drawn by a seed

WIDE = Topology(prefill=shape(count=2, dp=2, pp=3, tp=2), decode=shape(count=2, tp=4))


def drawn(seed: int) -> list[Fault]:
    return draw_faults(random.Random(seed), WIDE, 100.0)


def test_a_seed_draws_one_fault_of_every_kind_and_always_the_same() -> None:
    assert drawn(1) == drawn(1) != drawn(2)
    assert [fault.kind.name for fault in drawn(1)] == list(kinds())


def test_drawn_faults_lie_in_their_ranges_and_name_nodes_that_exist() -> None:
    nodes = {"R", "P0", "P1", "D0", "D1", "B0", "B1"}
    nodes |= {*rank_names("P", WIDE.prefill), *rank_names("D", WIDE.decode)}
    for seed in range(60):
        for fault in drawn(seed):
            assert fault.target in nodes
            assert 0.0 <= fault.at_s <= 95.0
            assert fault.trigger is None
            assert "required" not in fault.parameters.values()
            for name, value in fault.kind.draw.items():
                chosen = fault.for_s if name == "for_s" else fault.parameters.get(name)
                if isinstance(value, list):
                    assert value[0] <= chosen <= value[1]
            assert 0 <= fault.parameters.get("stage", 0) < 3
            if fault.kind.name == "partition":
                assert (fault.target[0], fault.parameters["peer"][0]) == ("P", "D")


def test_every_target_and_every_moment_can_be_drawn() -> None:
    crashes = [fault for seed in range(80) for fault in drawn(seed) if fault.kind.name == "rank_crash"]
    assert {fault.target for fault in crashes} == {"P0", "P1", "D0", "D1"}
    assert min(fault.at_s for fault in crashes) < 10 and max(fault.at_s for fault in crashes) > 85
    late = [fault for seed in range(20) for fault in drawn(seed) if fault.kind.name == "bootstrap_late"]
    assert {fault.at_s for fault in late} == {0.0}


def test_drawn_faults_are_what_a_scenario_could_say() -> None:
    """A drawn schedule can be written down and read back: that is how a shrunk one becomes a scenario."""
    for fault in drawn(5):
        lines = [f'kind = "{fault.kind.name}"', f'target = "{fault.target}"', f"for_s = {fault.for_s}"]
        lines += [f"{name} = {_toml(value)}" for name, value in fault.parameters.items() if name in _writable(fault)]
        text = "[topology.prefill]\ncount = 2\ndp = 2\npp = 3\ntp = 2\n[topology.decode]\ncount = 2\ntp = 4\n"
        text += '[workload]\nkind = "synthetic"\n[[fault]]\n' + "\n".join(lines) + "\n"
        (read,) = scenario(text).faults
        assert (read.kind, read.target, read.for_s, read.parameters) == (
            fault.kind, fault.target, fault.for_s, fault.parameters,
        )  # fmt: skip


def _writable(fault: Fault) -> set[str]:
    return set(fault.kind.parameters)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
