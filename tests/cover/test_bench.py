"""What `kvpoll bench` measures is what it says: the same lives, nothing kept, an idle cluster that does nothing.

Speed is measured by the bench itself and never asserted here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import simpy

import kvpoll.statemachine
from kvpoll import bench, bench_simulation, bench_step
from kvpoll.cli import main
from kvpoll.sim.bench_loop import bare_loop_s
from kvpoll.sim.workload import WorkloadError
from kvpoll.spec.protocol import Protocol, load
from kvpoll.spec.source import BadInput
from kvpoll.spec.vocabulary import Fact, Incarnation

HOUSE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return load()


# -- the life of a sender


def test_our_life_visits_every_state_of_a_good_sender(protocol: Protocol) -> None:
    machine = bench_step.sender(protocol)
    room = machine.absent(Incarnation(bench_step.FIRST_ROOM, 1, 0))
    polls = []
    for kind, detail in bench_step.LIFE:
        room, _ = machine.step_room(room, Fact(kind, room.incarnation, detail))
        polls.append(room.local.poll)
    assert polls == [
        "Bootstrapping",
        *["WaitingForInput"] * 3,
        *["Transferring"] * 3,
        "Success",
        "Retired",
    ]
    assert room.local.lease == "Released"


@pytest.mark.parametrize("make", [bench_step.transitions_subject, bench_step.statemachine_subject])
def test_a_peer_lives_the_same_life_and_checks_it(make: Any) -> None:
    """An event out of turn raises and moves nothing, or it would be no peer of a checked step."""
    subject = make()
    room = subject.make(0)
    with pytest.raises(Exception, match=r"(?i)complete.*absent"):
        room.complete()
    subject.age(room)
    assert (_state(room), room.outstanding, room.last) == ("transferring", 1, False)
    with pytest.raises(Exception, match=r"(?i)clear.*transferring"):
        room.clear()
    room.complete()
    room.post(last=True)
    assert (_state(room), room.outstanding, room.last) == ("transferring", 1, True)
    room.complete()
    assert (_state(room), room.outstanding) == ("success", 0)
    room.clear()
    assert _state(room) == "retired"
    fresh = subject.make(1)
    subject.live([fresh])
    assert _state(fresh) == "retired"


def _state(room: Any) -> str:
    name = room.state if isinstance(getattr(room, "state", None), str) else next(iter(room.configuration)).id
    return str(name).lower()


def test_the_dictionary_forgets_its_rooms(protocol: Protocol) -> None:
    subject = bench_step.unchecked_subject()
    update = subject.age.__closure__[0].cell_contents  # type: ignore[attr-defined]
    statuses = dict(zip(update.__code__.co_freevars, update.__closure__, strict=True))["statuses"].cell_contents
    subject.age(subject.make(0))
    assert statuses == {bench_step.FIRST_ROOM: 3}
    subject.live([subject.make(0), subject.make(1)])
    assert statuses == {}


# -- memory


def test_a_step_without_change_returns_the_same_object_and_keeps_nothing(protocol: Protocol) -> None:
    machine = bench_step.sender(protocol)
    room, fact = bench_step.quiet_room(machine)
    after, actions = machine.step_room(room, fact)
    assert after is room
    assert actions == ()
    changed, _ = machine.step_room(room, Fact("PagesReserved", room.incarnation))
    assert changed is not room
    assert bench_step.blocks_kept_by_quiet_steps(protocol, 10_000) <= 0


def test_blocks_that_are_kept_are_counted(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    class Hoarder:
        """A machine that remembers each call."""

        def step_room(self, room: Any, fact: Any) -> None:
            kept.append([fact])

    room, fact = bench_step.quiet_room(bench_step.sender(protocol))
    monkeypatch.setattr(bench_step, "sender", lambda protocol: Hoarder())
    monkeypatch.setattr(bench_step, "quiet_room", lambda machine: (room, fact))
    assert bench_step.blocks_kept_by_quiet_steps(protocol, 1_000) > 1_000


def test_a_room_takes_at_most_200_bytes(protocol: Protocol) -> None:
    subject = bench_step.kvpoll_subject(protocol)._replace(sized=5_000)
    assert 100 < subject.bytes_a_room() <= 200


def test_an_idle_cluster_schedules_nothing(protocol: Protocol) -> None:
    """However long it idles: schedulers sleep, and detectors of healthy peers do not probe."""
    started = bench_simulation.idle_events(protocol, 60.0)
    assert 0 < started < 100
    assert bench_simulation.idle_events(protocol, 36_000.0) == started


# -- simulation


def test_the_lone_pair_can_serve_its_load(protocol: Protocol) -> None:
    """Otherwise the bench would time an overloaded cluster, which is cheap."""
    timed = bench_simulation.timed(bench_simulation.lone_pair_job(protocol, None, 60.0), check=True)
    outcome = timed.outcome
    assert outcome.requests > 50
    assert outcome.succeeded == outcome.requests
    assert outcome.holds
    assert not {"decode_memory_full", "allocation_failed"} & outcome.marks.keys()
    assert 0.0 < bench_simulation.ttft_p50_s(outcome) < 1.0
    assert timed.traffic_s == 60.0
    assert outcome.simulated_s > 500.0  # the quiet tail was run
    assert timed.times_real_time == pytest.approx(60.0 / timed.traffic_core_s)


def test_the_main_job_is_what_run_does() -> None:
    job = bench_simulation.main_job(None, 30.0)
    run = job.run(True, lambda now, whole: None)
    assert run.scenario.name == "main"
    assert run.line == "kvpoll run main --profile reference --minutes 0.5 --seed 0"
    assert run.faults is not None
    assert len(run.faults) > 20


def test_the_bare_loop_fires_as_many_events_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    timeout = simpy.Timeout
    monkeypatch.setattr(simpy, "Timeout", lambda env, delay: made.append(delay) or timeout(env, delay))
    for events, pending in ((500, 20), (5, 20)):
        made.clear()
        assert bare_loop_s(events, pending) > 0.0
        assert len(made) == events
        assert all(delay > 0.0 for delay in made)


# -- the command


def test_steps_alone_as_json_and_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deeper" / "bench.json"
    assert main(["bench", "--only", "step", "--rounds", "1", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert set(printed["step"]["steps_per_s"]) == {
        "kvpoll",
        "transitions",
        "python-statemachine",
        "unchecked dictionary update",
    }
    assert printed["machine"]["peers"].keys() == {"simpy", "transitions", "python-statemachine"}
    assert "simulation" not in printed
    assert "room" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "steps"], "unknown --only 'steps' (did you mean 'step'?)"),
        (["--rounds", "0"], "must be 1 or more"),
        (["--only", "step", "--docs"], "--docs needs every figure"),
        (["--rounds", "1", "--trace", "no/such.jsonl"], "no/such.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1


def test_a_trace_is_read_before_anything_is_measured(protocol: Protocol) -> None:
    with pytest.raises(WorkloadError, match="no such file"):
        bench.measure(protocol, bench.PARTS, 1, "no/such.jsonl")


def test_a_missing_peer_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"bench needs no-such-peer, which is missing: pip install 'kvpoll\[bench\]'"):
        bench_step.import_peer("no_such_peer", "no-such-peer")


def test_the_room_of_the_same_name_is_not_taken_for_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python started in the checkout finds statemachine/ there before the package python-statemachine."""
    monkeypatch.syspath_prepend(str(HOUSE))
    monkeypatch.delitem(sys.modules, "statemachine", raising=False)
    assert hasattr(bench_step.import_peer("statemachine", "python-statemachine"), "StateMachine")
    monkeypatch.setitem(sys.modules, "statemachine", kvpoll.statemachine)
    with pytest.raises(BadInput, match=r"hides python-statemachine .* start Python with -P"):
        bench_step.import_peer("statemachine", "python-statemachine")


# -- what is shown


def result() -> dict[str, Any]:
    """Figures that no machine gave."""
    job = {
        "traffic_s": 3600.0,
        "traffic_core_s": 4.0,
        "times_real_time": 900.0,
        "times_real_time_unchecked": 1800.0,
        "bare_simpy_core_s": 0.5,
        "events": 300_000,
        "requests": 1000,
        "succeeded": 990,
        "ttft_p50_s": 0.2,
        "faults": 0,
        "invariants": 23,
        "violated": ["S1"],
    }
    return {
        "rounds": 3,
        "trace": None,
        "machine": {"processor": "a processor", "cores": 2, "python": "CPython 3.11", "peers": {"simpy": "4"}},
        "step": {
            "steps_per_s": {"kvpoll": 1_200_000.0, "transitions": 120_000.0},
            "quiet_steps_per_s": 3e6,
            "blocks_kept_by_quiet_steps": 1,
        },
        "room": {"bytes_a_room": {"kvpoll": 180.0, "transitions": 9_000.0}},
        "simulation": {"1P1D": job, "2P2D": {**job, "faults": 26, "times_real_time": 100.0, "violated": []}},
        "idle": {"events_an_hour": 0},
    }


def test_rows_say_what_reached_its_bar() -> None:
    shown = bench.rows(result())
    assert shown[:4] == [
        ("checked step", "1,200,000/s", "1 M/s: reached", ""),
        ("checked step that changes nothing", "3,000,000/s", "", ""),
        ("memory kept by 100,000 of those", "1 blocks", "0: NOT reached", ""),
        ("step of transitions", "120,000/s", "", "kvpoll has 10x the speed"),
    ]
    assert ("a room of transitions", "9,000 bytes", "", "50x kvpoll's memory") in shown
    judged = "1P1D, 3,600 s, 23 invariants on every event"
    served = "1,000 requests, 99.0% served, TTFT p50 0.20 s, broke S1"
    assert (judged, "900x real time", "1,000x: NOT reached", served) in shown
    assert ("1P1D, 3,600 s, invariants off", "1,800x real time", "1,000x: reached", "") in shown
    assert ("1P1D, bare SimPy loop", "300,000 events in 0.50 s", "", "kvpoll takes 8.0x as long") in shown
    assert next(row.bar for row in shown if row.what.startswith("2P2D")) == "100x: reached"
    assert shown[-1] == ("an idle hour of 1P1D", "0 events", "0: reached", "")


def test_a_broken_invariant_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "measure", lambda *given: result())
    assert bench.main([]) == 1
    assert "broke S1" in capsys.readouterr().out
    assert bench.violations(result()) == ["1P1D S1"]
    assert bench.violations({}) == []


def test_the_table_of_a_page_is_rewritten_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{bench.BEGIN}\nold\n{bench.END}\nbelow\n")
    monkeypatch.setattr(bench, "measure", lambda *given: result())
    bench.main(["--docs", str(page)])
    once = page.read_text()
    assert once.startswith(f"above\n{bench.BEGIN}\n\n| figure | measured | bar | beside kvpoll |\n")
    assert once.endswith(f"{bench.END}\nbelow\n")
    assert "old" not in once
    assert "| checked step | 1,200,000/s | 1 M/s: reached |  |" in once
    assert "Medians of 3 rounds, the synthetic workload, one process on a processor (2 cores), CPython 3.11" in once
    bench.main(["--docs", str(page)])
    assert page.read_text() == once
    assert "checked step" in capsys.readouterr().out


def test_a_page_without_a_place_for_the_table_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"page\.md: has no place for the table"):
        bench.with_tables("no marks", result(), "page.md")
    with pytest.raises(BadInput, match=r"gone\.md: cannot be read"):
        bench.write_page(tmp_path / "gone.md", result())


def test_the_page_shows_the_committed_figures() -> None:
    """docs/benchmarks.md is written from reports/bench.json: kvpoll bench --out reports/bench.json --docs."""
    figures = json.loads((HOUSE / "reports" / "bench.json").read_text(encoding="utf-8"))
    page = bench.PAGE.read_text(encoding="utf-8")
    assert figures["simulation"].keys() == {"1P1D", "2P2D"}
    assert bench.with_tables(page, figures, "docs/benchmarks.md") == page
