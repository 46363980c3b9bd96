"""Failure detectors: silent while all is well, suspicious after enough misses, sure after a new process epoch."""

from __future__ import annotations

from typing import Any

import pytest
from sim_stage import Played, Stage, shape

from kvpoll.sim.engine import Detector
from kvpoll.sim.topology import Topology
from kvpoll.spec.trace import Stepped


class Watched:
    """One detector of P0 on decode rank D0, and what it said of it."""

    def __init__(self, **rules: Any) -> None:
        self.stage = Stage(heartbeat_interval_s=2, heartbeat_max_failure=3, **rules)
        self.cluster = self.stage.cluster()
        self.said: list[tuple[str, int | None]] = []
        rank = self.cluster.rank("D0")
        self.detector = Detector(
            rank, "P0", lambda target: self.said.append(("suspected", None)),
            lambda target, epoch: self.said.append(("dead", epoch)),
        )  # fmt: skip
        rank.engine.detectors = [self.detector]

    def after(self, seconds: float) -> None:
        self.stage.until(self.stage.world.now + seconds)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_healthy_peer_costs_no_events(watched: Watched) -> None:
    assert watched.stage.cost(10_000) == 0
    assert watched.said == []


def test_a_disturbance_that_was_nothing_costs_one_probe(watched: Watched) -> None:
    before = watched.stage.world.scheduled_events()
    watched.detector.disturb()
    watched.detector.disturb()
    assert watched.stage.world.scheduled_events() == before + 1
    assert watched.stage.cost(10_000) == 0
    assert watched.detector.state.state == "Alive"


def test_a_peer_is_suspected_after_the_last_miss_that_is_allowed(watched: Watched) -> None:
    watched.cluster.prefill[0].crash()
    watched.after(4.0)
    assert (watched.said, watched.detector.state.state) == ([], "Suspect")
    watched.after(2.0)
    assert (watched.said, watched.detector.state.state) == ([("suspected", None)], "Lost")
    watched.after(100.0)
    assert watched.said == [("suspected", None)]


def test_a_peer_that_comes_back_in_the_same_life_is_alive_again(watched: Watched) -> None:
    """A partition: nobody died, so nobody is buried."""
    watched.stage.world.network.severed.append(("P0", "D0"))
    watched.cluster.disturb("P0")
    watched.after(20.0)
    assert watched.said == [("suspected", None)]
    watched.stage.world.network.severed.clear()
    watched.after(2.0)
    assert (watched.said, watched.detector.state.state) == ([("suspected", None)], "Alive")


def test_a_new_epoch_declares_the_former_life_dead(watched: Watched) -> None:
    watched.cluster.prefill[0].crash()
    watched.after(20.0)
    watched.cluster.prefill[0].start()
    watched.after(2.0)
    assert watched.said == [("suspected", None), ("dead", 1)]
    assert (watched.detector.state.state, watched.detector.state.epoch) == ("Alive", 1)


def test_a_restart_between_two_probes_is_seen_by_its_epoch(watched: Watched) -> None:
    """C5, A21: a restart within the interval is invisible to a probe that carries no epoch."""
    watched.cluster.prefill[0].crash()
    watched.cluster.prefill[0].start()
    watched.after(2.0)
    assert watched.said == [("dead", 1)]


def test_probes_of_the_bootstrap_server_see_neither() -> None:
    """sglang-0.5.23 probes the server's thread: a quick restart of the ranks changes nothing that it sees."""
    watched = Watched(liveness_probe="server_health")
    watched.cluster.prefill[0].crash()
    watched.cluster.prefill[0].start()
    watched.after(10.0)
    assert watched.said == []


def test_a_dead_watcher_asks_nobody(watched: Watched) -> None:
    watched.cluster.prefill[0].crash()
    watched.cluster.decode[0].crash()
    watched.after(30.0)
    assert watched.said == []


def test_detectors_of_a_rank_probe_at_their_own_phase() -> None:
    """Otherwise twelve ranks would fail their rooms in the same microsecond, which no cluster does."""
    stage = Stage(Topology(prefill=shape(), decode=shape(tp=4)))
    cluster = stage.cluster()
    cluster.prefill[0].crash()
    stage.until(30)
    suspected = [event.t for event in stage.events if getattr(event, "mark", "") == "peer_suspected"]
    assert len(suspected) == len(set(suspected)) >= 4
    assert max(suspected) - min(suspected) > 0.1


LATE_WRITE = """
[topology.prefill]
tp = 2
[workload]
kind = "requests"
requests = [{ at_s = 1.0, input_tokens = 4000, output_tokens = 16 }]
[timing]
hostile_s = 30
[[fault]]
kind = "write_late"
target = "P0"
for_s = 5
share = 1.0
late_s = 60
[[fault]]
kind = "quick_restart"
target = "P0"
at_s = 2
for_s = 0.5
"""


def test_the_death_of_writers_is_proof_that_they_are_quiet() -> None:
    """ENGINES 4: decode learns which of its writers died, as a mask, and their pages need not drain any more."""
    run = Played(LATE_WRITE)
    (died,) = run.of(Stepped, node="D0", fact="PeerDied")
    assert died.detail == 0b11
    assert (died.poll_before, died.poll_after, died.lease_before, died.lease_after) == (
        "Failed", "Retired", "Draining", "Released",
    )  # fmt: skip
    assert died.t < 2.5 + 2.1
    assert run.outcome.violations == {}


def test_without_epochs_decode_waits_for_its_own_timeout() -> None:
    """A21: the ranks are new, the server says OK, and decode never learns that its writers are gone."""
    run = Played(LATE_WRITE, profile="sglang-0.5.23")
    assert run.of(Stepped, fact="PeerDied") == []
    failed = [event for event in run.of(Stepped, node="D0") if event.poll_after == "Failed" != event.poll_before]
    assert [(event.fact, event.detail) for event in failed] == [("DeadlineReached", "waiting")]
    assert failed[0].t > 300
