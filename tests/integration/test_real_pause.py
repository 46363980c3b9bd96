"""SIGSTOP and SIGCONT of every kind of process at every poll state of a request, and a writer that wakes up late."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_cluster import LAYOUT, MOMENTS, PAGE_TOKENS, Play

from kvpoll.runtime.pools.pattern import is_corrupt
from kvpoll.spec.invariants import PAUSE
from kvpoll.spec.trace import Fenced, Marked, PageTag, Released, WritePosted, WriteSettled
from kvpoll.statemachine.ranks.engine import EngineShape
from kvpoll.statemachine.ranks.host import Request

SUSPICION_S = 16.0
"""After this much silence every peer has been suspected (twice 4 s, and the question before that)."""


@pytest.mark.parametrize("victim", ["P0", "D0", "B0"])
def test_a_process_pauses_for_a_moment_at_every_poll_state_of_a_request(victim: str, tmp_path: Path) -> None:
    """It goes on before anybody can have missed it: what was under way succeeds, unless it was given up before."""
    with Play(tmp_path) as play:
        play.registered()
        play.served()
        for node, poll in MOMENTS:
            request = play.bring(node, poll)
            fault = play.began(victim, PAUSE)
            if node != victim:
                play.pause(victim)
                play.go_on(node)
            play.go_on(victim)
            play.ended(victim, PAUSE, fault)
            assert play.answered(request).ok is (poll != "Failed") or suspected(play)
            play.over(request, "P0", "D0")
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}


def suspected(play: Play) -> bool:
    """Was anybody believed lost? On a machine that is busy enough a process may stand still by itself."""
    return bool(play.seen(Marked, mark="peer_suspected"))


@pytest.mark.parametrize("victim", ["P0", "D0"])
def test_a_process_pauses_until_it_is_given_up_at_every_poll_state_of_a_request(victim: str, tmp_path: Path) -> None:
    """Whoever waits for it ends by suspicion or deadline; then it goes on, and nothing that it does breaks anything."""
    with Play(tmp_path) as play:
        play.registered()
        play.served()
        for node, poll in MOMENTS:
            request = play.bring(node, poll)
            fault = play.began(victim, PAUSE)
            if node != victim:
                play.pause(victim)
                play.go_on(node)
            play.past(SUSPICION_S)
            play.over(request, *({"P0", "D0"} - {victim}))
            play.go_on(victim)
            play.ended(victim, PAUSE, fault)
            play.answered(request)
            play.over(request, "P0", "D0")
            play.until(lambda: play.answered(play.submit()).ok, "a request that succeeds after the pause")
        play.heal()
        verdict = play.verdict()
    assert any(isinstance(event, Marked) and event.mark == "peer_suspected" for event in verdict.events)
    assert verdict.broken == {}


def test_the_bootstrap_server_pauses_before_anything_is_known_of_it_and_while_requests_run(tmp_path: Path) -> None:
    """What needs it waits, and ends by its own deadline; what knows its routes already does not need it."""
    with Play(tmp_path) as play:
        play.registered()
        fault = play.began("B0", PAUSE)
        play.pause("B0")
        request = play.submit()
        assert play.answered(request).cause == "bootstrap_timeout"
        play.over(request, "P0", "D0")
        play.go_on("B0")
        play.served()
        play.pause("B0")
        for node, poll in MOMENTS:
            request = play.bring(node, poll)
            play.go_on(node)
            assert play.answered(request).ok is (poll != "Failed")
        play.go_on("B0")
        play.ended("B0", PAUSE, fault)
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}


# -- a writer that wakes up after its pages were given up

PROMPT_PAGES = 18
PROMPT = PROMPT_PAGES * PAGE_TOKENS
BIG = replace(LAYOUT, head_dim=256)
SLOW: dict[str, Any] = {"bytes_per_s": 6e6}
"""A prompt's 9 MiB take one and a half seconds, and three frames of tcp, so that a write can be stopped amid it."""


def stop_in_the_middle_of_a_write(play: Play) -> tuple[Request, WritePosted]:
    """A request whose write has placed some of its bytes and not all of them; its writer P0 stands still."""
    request = play.submit(PROMPT)
    assert request.prefill == 0
    (write,) = play.until(lambda: play.seen(WritePosted, node="P0"), "a write")

    def placed() -> int:
        tags = play.tags("D0", write.target_pages, "P0")
        return sum(tag is not None for tag in tags)

    play.until(placed, "its first bytes in the memory of D0")
    play.pause("P0")
    tags = play.tags("D0", write.target_pages, "P0")
    assert not all(is_wholly_of(request, tag) for tag in tags), "the write was over before it could be stopped"
    return request, write


NO_FENCE = {"fence_after_s": 600}
"""Decode could refuse what comes over tcp; here it does not, and waits for the writer's word as over shm."""


@pytest.mark.parametrize(("transport", "rules"), [("shm", {}), ("tcp", NO_FENCE)])
def test_a_paused_writer_wakes_up_and_no_byte_of_a_released_page_changes(
    transport: str, rules: dict[str, Any], tmp_path: Path
) -> None:
    """The client leaves while the writer stands still: its pages stay in quarantine until it has said that it is quiet.

    Another request decodes from other pages all the while. ENGINES 4 shows what real engines do to such pages.
    """
    with late_writer(tmp_path, transport, "proof", **rules) as play:
        request, write = stop_in_the_middle_of_a_write(play)
        fault = play.began("P0", PAUSE)
        play.launcher.router.client_leaves(request.rid)
        play.until(lambda: play.seen(Marked, node="D0", mark="pages_quarantined"), "the quarantine")
        other = play.submit(PROMPT, output=1500)
        assert other.prefill == 1
        assert play.answered(other).ok
        pages = play.held("D0")[other.pair]
        assert not set(pages) & set(write.target_pages)
        assert play.held("D0")[request.pair] == write.target_pages
        play.go_on("P0")
        play.ended("P0", PAUSE, fault)
        given_back = play.until(lambda: released(play, request), "the pages coming back")
        before = page_bytes(play, given_back.pages)
        assert all(is_wholly_of(other, tag) for tag in play.tags("D0", pages, "P1"))
        play.past(5.0)
        assert page_bytes(play, given_back.pages) == before
        play.heal()
        play.hurry()
        play.until(lambda: not play.held("D0"), "the end of the other request")
        verdict = play.verdict()
    assert verdict.broken == {}


def test_who_places_the_bytes_can_refuse_them_and_needs_no_word_of_a_paused_writer(tmp_path: Path) -> None:
    """Over tcp decode's own process places what arrives. It fences the room of the request that was given up, has the
    pages back while the writer still stands amid its write, and gives them all to another request. The writer wakes up
    and sends on: no byte of them changes, and it hears that it was refused.
    """
    with late_writer(tmp_path, "tcp", "proof") as play:
        request, write = stop_in_the_middle_of_a_write(play)
        fault = play.began("P0", PAUSE)
        play.launcher.router.client_leaves(request.rid)
        given_back = play.until(lambda: released(play, request), "the pages coming back")
        (fenced,) = play.seen(Fenced, node="D0")
        assert fenced.incarnation == given_back.incarnation and fenced.t <= given_back.t
        assert not play.seen(Marked, node="D0", mark="pages_quarantined")
        other = play.submit(PROMPT, output=1500)
        assert other.prefill == 1
        assert play.answered(other).ok
        pages = play.held("D0")[other.pair]
        assert set(pages) == set(write.target_pages)
        before = page_bytes(play, pages)
        assert all(is_wholly_of(other, tag) for tag in play.tags("D0", pages, "P1"))
        assert not play.seen(WriteSettled, node="P0"), "the writer still stands amid its write"
        play.go_on("P0")
        play.ended("P0", PAUSE, fault)
        (settled,) = play.until(lambda: play.seen(WriteSettled, node="P0"), "the end of the write")
        assert not settled.ok
        play.past(5.0)
        assert page_bytes(play, pages) == before
        play.heal()
        play.hurry()
        play.until(lambda: not play.held("D0"), "the end of the other request")
        verdict = play.verdict()
    assert verdict.broken == {}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("rule", ["never", "proof_or_timeout"])
def test_without_proof_the_same_writer_overwrites_the_pages_of_another_request(
    rule: str, transport: str, tmp_path: Path
) -> None:
    """The check above can fail: where pages go without proof, S1 breaks, and the bytes of the new owner change.

    The writer is not asked to stop: else it might, between two of its frames, before it has done any harm.
    """
    with late_writer(tmp_path, transport, rule, failed_writes="left") as play:
        request, write = stop_in_the_middle_of_a_write(play)
        fault = play.began("P0", PAUSE)
        play.launcher.router.client_leaves(request.rid)
        play.until(lambda: released(play, request), "the pages being given up")
        other = play.submit(PROMPT, output=1500)
        assert other.prefill == 1
        assert play.answered(other).ok
        pages = play.held("D0")[other.pair]
        assert set(pages) == set(write.target_pages)
        assert all(is_wholly_of(other, tag) for tag in play.tags("D0", pages, "P1"))
        play.go_on("P0")
        play.ended("P0", PAUSE, fault)
        play.until(
            lambda: not all(is_wholly_of(other, tag) for tag in play.tags("D0", pages, "P1")), "a page overwritten"
        )
        verdict = play.verdict()
    assert "S1" in verdict.broken


def late_writer(folder: Path, transport: str, rule: str, **rules: Any) -> Play:
    """Two prefill ranks that write slowly, and a decode rank with memory for two prompts."""
    play = Play(
        folder, transport=transport, options=SLOW, rules={"release_requires_quiescence": rule, **rules}, speed=5.0, layout=BIG,
        prefill=EngineShape(count=2, kv_pages=32, rows=32), decode=EngineShape(kv_pages=2 * PROMPT_PAGES, rows=32),
    )  # fmt: skip
    for node in ("P0", "P1"):
        play.registered(node)
    return play


def released(play: Play, request: Request) -> Released | None:
    """The release of a request's pages on D0."""
    events = [event for event in play.seen(Released, node="D0", pool="kv") if event.incarnation.pair == request.pair]
    return events[0] if events else None


def page_bytes(play: Play, pages: tuple[int, ...]) -> list[bytes]:
    """What pages of D0 hold, plane by plane, as bytes."""
    memory = play.memory("D0")
    return [memory.get(plane.layer, plane.part, page).tobytes() for page in pages for plane in memory.layout.planes]


def is_wholly_of(request: Request, tag: PageTag | None) -> bool:
    """Is every byte of this page as the request's prefill rank computed it?"""
    return tag is not None and tag.pair == request.pair and not is_corrupt(tag)
