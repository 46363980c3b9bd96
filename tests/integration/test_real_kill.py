"""SIGKILL of every kind of process at every poll state of a request, and restarts at the same address."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_cluster import DECODE_POLLS, MOMENTS, PREFILL_POLLS, Play

from kvpoll.spec.trace import Resulted, Stepped


@pytest.mark.parametrize("victim", ["P0", "D0", "B0"])
def test_a_process_is_killed_at_every_poll_state_of_a_request(victim: str, tmp_path: Path) -> None:
    """Nine requests, each brought to a moment and struck there; each time the cluster serves again afterwards."""
    with Play(tmp_path) as play:
        play.registered()
        play.served()
        for node, poll in MOMENTS:
            kill_at(play, victim, node, poll)
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}
    lives = {event.epoch for event in verdict.events if type(event).__name__ == "NodeStarted" and event.node == victim}
    assert lives == set(range(len(MOMENTS) + 1))


def kill_at(play: Play, victim: str, node: str, poll: str) -> None:
    """One request reaches ``poll`` on ``node``, which stands still there; then the victim is killed."""
    request = play.bring(node, poll)
    fault = play.began(victim, "rank_crash")
    play.kill(victim)
    if node != victim:
        play.go_on(node)
    survivors = {"P0", "D0"} - {victim}
    play.over(request, *survivors)
    play.answered(request)
    for survivor in survivors:
        accounted = f"every page of {survivor} having a reason, after {victim} died at {poll} of {node}"
        play.until(lambda survivor=survivor: is_accounted_for(play, survivor), accounted)
    play.restart(victim)
    play.ended(victim, "rank_crash", fault)
    play.registered()
    play.served()


def is_accounted_for(play: Play, node: str) -> bool:
    """Pages that are still held belong to a request that decodes, or whose lease says why they are kept."""
    leases = [
        [step.lease_after for step in play.seen(Stepped, node=node) if step.incarnation.pair == pair][-1]
        for pair in play.held(node)
    ]
    return set(leases) <= {"Draining", "Quarantined", "Settled"}


@pytest.mark.parametrize(("victim", "polls"), [("P0", DECODE_POLLS), ("D0", PREFILL_POLLS)])
def test_a_peer_is_back_at_its_address_before_anybody_missed_it(
    victim: str, polls: tuple[str, ...], tmp_path: Path
) -> None:
    """Restarted within a tenth of the suspicion time, and again: the former life's requests end, new ones succeed.

    The other side stands still at each poll of a request while its peer dies and comes back, so what it hears first
    comes from the new life, at the old address. Nobody is suspected: that somebody died is proven, not guessed.
    """
    survivor = "D0" if victim == "P0" else "P0"
    with Play(tmp_path) as play:
        play.registered()
        address = play.child(victim).endpoint
        play.served()
        for poll in polls:
            request = play.bring(survivor, poll)
            fault = play.began(victim, "quick_restart")
            play.kill(victim)
            play.restart(victim)
            play.ended(victim, "quick_restart", fault)
            assert play.child(victim).endpoint == address
            play.go_on(survivor)
            play.registered()
            play.answered(request)
            play.over(request, survivor)
            play.served()
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}


def test_requests_meet_a_peer_that_is_down_for_longer_than_the_suspicion(tmp_path: Path) -> None:
    """A prefill rank is gone until decode has given it up; what comes meanwhile fails, what comes later is served."""
    with Play(tmp_path) as play:
        play.registered()
        play.served()
        fault = play.began("P0", "rank_crash")
        request = play.bring("D0", "WaitingForInput")
        play.kill("P0")
        play.go_on("D0")
        refused = play.submit()
        assert play.answered(refused).cause == "connection_refused"
        assert play.answered(request).ok is False
        play.past(15.0)
        play.restart("P0")
        play.ended("P0", "rank_crash", fault)
        play.registered()
        play.served()
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}
    assert [event.ok for event in verdict.events if isinstance(event, Resulted)].count(False) == 2
