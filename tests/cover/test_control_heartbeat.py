"""Heartbeats of ranks: who is asked when, what silence means, and what it does not mean."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll.runtime.control.heartbeat import Heartbeats
from kvpoll.spec.protocol import load
from kvpoll.statemachine.roles import Machines, Peer

PROTOCOL = load()


class Watcher:
    """One process that watches P0, asks every 2 s and gives up after 3 misses; peers answer as they are told."""

    def __init__(self, profile: str = "reference", **rules: Any) -> None:
        chosen = PROTOCOL.profile(profile).with_rules({"heartbeat_interval_s": 2, "heartbeat_max_failure": 3, **rules})
        self.now = 100.0
        self.alive: dict[str, int] = {"P0": 0}
        self.asked: list[tuple[float, str, int]] = []
        self.said: list[tuple[Any, ...]] = []
        self.beats = Heartbeats(
            Machines(PROTOCOL, chosen), chosen, self.now, self._ping,
            lambda node: self.said.append(("suspected", node)),
            lambda node, epoch: self.said.append(("dead", node, epoch)),
            lambda node: self.said.append(("restored", node)),
        )  # fmt: skip
        self.beats.watch("P0")

    def _ping(self, node: str, serial: int) -> None:
        self.asked.append((self.now, node, serial))

    def run(self, seconds: float, step_s: float | None = None) -> None:
        """A loop that ticks when it is wanted to (or every ``step_s``) and hears answers before it ticks."""
        end = self.now + seconds
        due = self.beats.tick(self.now)
        while self.now < end:
            heard = len(self.asked)
            self.now = min(end, self.now + step_s if step_s else due)
            for _, node, _ in self.asked[:heard][-1:]:
                if node in self.alive:
                    self.beats.pong(node, self.alive[node])
            due = self.beats.tick(self.now)

    def state(self, node: str = "P0") -> str:
        state = self.beats.state_of(node)
        assert state is not None
        return state.state


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


def test_a_peer_that_answers_is_asked_once_an_interval_and_nothing_is_said(watcher: Watcher) -> None:
    watcher.run(20)
    assert [t for t, _, _ in watcher.asked] == [100.0 + 2 * n for n in range(11)]
    assert [serial for _, _, serial in watcher.asked] == list(range(1, 12))
    assert (watcher.said, watcher.state()) == ([], "Alive")
    assert watcher.beats.gaps == 0


def test_a_peer_is_suspected_after_the_last_miss_that_is_allowed(watcher: Watcher) -> None:
    del watcher.alive["P0"]
    watcher.run(4)
    assert (watcher.said, watcher.state()) == ([], "Suspect")
    watcher.run(1.5)
    assert watcher.said == []
    watcher.run(0.5)
    assert (watcher.said, watcher.state()) == ([("suspected", "P0")], "Lost")
    watcher.run(100)
    assert watcher.said == [("suspected", "P0")]
    assert watcher.asked[-1][0] >= watcher.now - 2  # one that is lost is asked for ever: it may come back


def test_it_is_not_declared_dead_by_silence(watcher: Watcher) -> None:
    """A stopped process may still have a write in flight (ENGINES 4): silence proves nothing about its memory."""
    watcher.run(4)
    del watcher.alive["P0"]
    watcher.run(1000)
    assert not [word for word in watcher.said if word[0] == "dead"]


@pytest.mark.parametrize("silence_s, state", [(4, "Suspect"), (30, "Lost")])
def test_a_peer_that_comes_back_in_the_same_life_is_restored(watcher: Watcher, silence_s: float, state: str) -> None:
    watcher.run(4)
    del watcher.alive["P0"]
    watcher.run(silence_s)
    said = list(watcher.said)
    assert watcher.state() == state
    watcher.beats.heard("P0", 0)
    assert watcher.said == [*said, ("restored", "P0")]
    assert watcher.beats.state_of("P0") == Peer("Alive", 0, 0)
    watcher.beats.heard("P0", 0)
    assert watcher.said == [*said, ("restored", "P0")]


def test_a_new_life_proves_the_former_one_dead(watcher: Watcher) -> None:
    watcher.run(4)
    del watcher.alive["P0"]
    watcher.run(30)
    watcher.alive["P0"] = 3
    watcher.run(4)
    assert watcher.said == [("suspected", "P0"), ("dead", "P0", 0), ("restored", "P0")]
    assert watcher.beats.state_of("P0") == Peer("Alive", 3, 0)


def test_a_restart_between_two_questions_is_seen_by_its_epoch(watcher: Watcher) -> None:
    """A21: without an epoch a restart that is faster than the interval goes unnoticed."""
    watcher.run(4)
    watcher.alive["P0"] = 1
    watcher.run(2)
    assert watcher.said == [("dead", "P0", 0)]


def test_a_life_that_is_known_beforehand_can_be_proven_dead_by_the_first_answer(watcher: Watcher) -> None:
    watcher.alive = {"P1": 8}
    watcher.beats.watch("P1", epoch=7)
    watcher.beats.heard("P1", 8)
    assert watcher.said == [("dead", "P1", 7)]


def test_a_letter_of_a_dead_life_is_no_sign_of_life(watcher: Watcher) -> None:
    watcher.alive["P0"] = 5
    watcher.run(4)
    del watcher.alive["P0"]
    watcher.run(30)
    watcher.beats.heard("P0", 4)
    assert (watcher.said, watcher.state()) == ([("suspected", "P0")], "Lost")


def test_under_sglang_a_new_epoch_proves_nothing() -> None:
    """What the driver does comes from the machine: with probes of the server nobody is ever declared dead."""
    watcher = Watcher("sglang-0.5.23")
    watcher.run(4)
    watcher.alive["P0"] = 1
    watcher.run(4)
    assert watcher.said == []


def test_any_message_answers(watcher: Watcher) -> None:
    """A rank that sends statuses is alive even if its pong is late."""
    watcher.alive.clear()
    for _ in range(20):
        watcher.run(1)
        watcher.beats.heard("P0", 0)
    assert (watcher.said, watcher.state()) == ([], "Alive")


def test_only_those_who_are_watched_are_asked(watcher: Watcher) -> None:
    watcher.beats.heard("P9", 0)
    assert watcher.beats.state_of("P9") is None
    watcher.beats.unwatch("P0")
    watcher.beats.unwatch("P0")
    assert watcher.beats.tick(watcher.now) > watcher.now
    watcher.run(20)
    assert (watcher.asked, watcher.said) == ([], [])


def test_watching_twice_forgets_nothing(watcher: Watcher) -> None:
    del watcher.alive["P0"]
    watcher.run(4)
    watcher.beats.watch("P0", epoch=9)
    assert watcher.state() == "Suspect"


def test_a_callback_may_unwatch_whom_it_hears_of() -> None:
    watcher = Watcher()
    watcher.beats._on_suspected = watcher.beats.unwatch
    watcher.beats.watch("P1")
    watcher.alive.clear()
    watcher.run(60)
    assert watcher.beats.state_of("P0") is watcher.beats.state_of("P1") is None
    assert max(t for t, _, _ in watcher.asked) == 104.0  # before the third miss; nobody was asked after it


def test_a_callback_may_unwatch_somebody_else() -> None:
    """P0 is suspected, and whoever hears of it gives up P1 too, which was to be judged in the same round."""
    watcher = Watcher()
    watcher.beats._on_suspected = lambda node: watcher.beats.unwatch("P1")
    watcher.beats.watch("P1")
    watcher.alive.clear()
    watcher.run(6)
    assert (watcher.state("P0"), watcher.beats.state_of("P1")) == ("Lost", None)
    assert [node for t, node, _ in watcher.asked if t == 106.0] == ["P0"]


# --- the watcher's own sleep ----------------------------------------------------------------------


@pytest.mark.parametrize("slept_s", [2.5, 60, 100_000])
def test_who_slept_does_not_blame_the_others(watcher: Watcher, slept_s: float) -> None:
    """SIGSTOP, then SIGCONT: a question was open, its answer waits in the kernel, and the clock has jumped."""
    watcher.run(5)
    asked = len(watcher.asked)
    watcher.beats.tick(watcher.now)  # the question of t=104 was answered; ask the next one, then sleep
    watcher.now += 1.0
    watcher.beats.tick(watcher.now)
    assert len(watcher.asked) == asked + 1
    watcher.now += slept_s
    watcher.beats.tick(watcher.now)
    assert len(watcher.asked) == asked + 2  # asked again, not counted
    assert watcher.beats.state_of("P0") == Peer("Alive", 0, 0)
    assert watcher.beats.gaps == 1
    watcher.run(20)
    assert (watcher.said, watcher.state()) == ([], "Alive")


def test_who_slept_still_finds_the_dead(watcher: Watcher) -> None:
    watcher.run(5)
    del watcher.alive["P0"]
    watcher.now += 60
    watcher.run(5.9)
    assert watcher.said == []
    watcher.run(0.1)
    assert watcher.said == [("suspected", "P0")]


def test_a_loop_slower_than_the_interval_finds_the_dead_late_but_finds_them(watcher: Watcher) -> None:
    """A prefill step of seconds makes every tick look like a sleep; forgiving each would mean never to see."""
    del watcher.alive["P0"]
    watcher.run(60, step_s=2.5)
    assert watcher.said == [("suspected", "P0")]


def test_a_slow_loop_whose_peers_answer_suspects_nobody(watcher: Watcher) -> None:
    watcher.run(200, step_s=2.5)
    assert (watcher.said, watcher.state()) == ([], "Alive")


def test_a_clock_that_steps_back_stands_still(watcher: Watcher) -> None:
    watcher.run(5)
    asked = len(watcher.asked)
    assert watcher.beats.tick(50.0) >= watcher.now
    assert len(watcher.asked) == asked
    assert watcher.beats.gaps == 0


def test_a_tick_is_wanted_often_enough_to_know_a_sleep(watcher: Watcher) -> None:
    assert watcher.beats.tick(watcher.now) - watcher.now == pytest.approx(0.5)
