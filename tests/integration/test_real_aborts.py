"""Requests given up for real: at every poll state, from every side, in storms, on one pipeline stage, in shared rooms."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from real_cluster import MOMENTS, Play

from kvpoll.spec.trace import Marked, Resulted
from kvpoll.statemachine.mapping import Sizes
from kvpoll.statemachine.ranks.engine import EngineShape
from kvpoll.statemachine.ranks.host import Request


@pytest.mark.parametrize("side", ["prefill", "decode", "client"])
def test_a_request_is_given_up_at_every_poll_state(side: str, tmp_path: Path) -> None:
    """The rank in question stands still when the order comes. Both sides end, and hold nothing once it has decoded."""
    with Play(tmp_path) as play:
        play.registered()
        play.served()
        for node, poll in MOMENTS:
            request = play.bring(node, poll)
            give_up(play, request, side)
            play.go_on(node)
            answer = play.answered(request)
            assert answer.ok is False or poll == "Success" or (node, poll) == ("P0", "Transferring"), answer
            play.over(request, "P0", "D0")
        play.until(lambda: not play.held("P0") and not play.held("D0"), "all pages back")
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}


def give_up(play: Play, request: Request, side: str) -> None:
    """The client leaves, or one side alone is told to abort."""
    if side == "client":
        play.launcher.router.client_leaves(request.rid)
    else:
        play.launcher.router.cancel(request, side, f"{side}_abort")


def test_an_abort_storm_over_two_engines_of_each_side(tmp_path: Path) -> None:
    """Sixty requests in three seconds, four in five given up within moments by whoever; nothing is left of them."""
    engines = EngineShape(count=2, kv_pages=64, rows=16)
    chance = random.Random(7)
    with Play(tmp_path, prefill=engines, decode=engines) as play:
        for node in ("P0", "P1"):
            play.registered(node)
        requests: list[Request] = []

        def come() -> None:
            requests.append(play.submit(chance.choice([100, 512, 2048])))
            if chance.random() < 0.8:
                side = chance.choice(["prefill", "decode", "client"])
                play.launcher.after(chance.uniform(0.0, 0.4), give_up, play, requests[-1], side)

        for number in range(60):
            play.launcher.after(0.05 * number, come)
        play.until(lambda: len(requests) == 60 and all(map(play.result_of, requests)), "an answer for everybody")
        for request in requests:
            play.over(request, f"P{request.prefill}", f"D{request.decode}")
        play.heal(4)
        verdict = play.verdict()
    assert verdict.broken == {}
    answers = [event.ok for event in verdict.events if isinstance(event, Resulted)][:60]
    assert 5 < answers.count(False) < 60


@pytest.mark.parametrize("poll", ["Bootstrapping", "WaitingForInput"])
def test_one_pipeline_stage_gives_up_a_request(poll: str, tmp_path: Path) -> None:
    """sglang#26912, #34572: whichever of four stages fails it, every stage drops it, and the pipeline goes on."""
    prefill = EngineShape(sizes=Sizes(pp=4), kv_pages=64, rows=16)
    stages = [f"P0/pp{stage}" for stage in range(4)]
    with Play(tmp_path, prefill=prefill) as play:
        for stage in stages:
            play.registered(stage)
        play.served()
        for stage in stages:
            request = play.bring(stage, poll, tokens=2048)
            play.engine("P0").ranks[stage].abort_room(request.pair, "stage_abort")
            play.go_on(stage)
            assert play.answered(request).ok is False
            play.over(request, *stages, "D0")
            play.served(2048)
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}


def test_rooms_are_reused_while_their_former_requests_live_and_after(tmp_path: Path) -> None:
    """Half of forty requests get the room of an earlier one; a living room's second request is refused, no more."""
    chance, rooms = random.Random(11), list[int]()
    with Play(tmp_path) as play:
        play.registered()
        router = play.launcher.router
        router.before_dispatch.append(lambda request: rooms.append(request.pair[0]))
        router.reuse_room = lambda: chance.choice(rooms[-8:]) if rooms and chance.random() < 0.5 else None
        requests: list[Request] = []
        for number in range(40):
            play.launcher.after(0.1 * number, lambda: requests.append(play.submit(512, output=20)))
        play.until(lambda: len(requests) == 40 and all(map(play.result_of, requests)), "an answer for everybody")
        router.reuse_room = lambda: None
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}
    assert len({request.pair[0] for request in requests}) < 40
    assert any(isinstance(event, Marked) and event.mark == "rival_rejected" for event in verdict.events)
    refused = [event for event in verdict.events if isinstance(event, Resulted) and not event.ok]
    assert {event.cause for event in refused} == {"room_in_use"}
