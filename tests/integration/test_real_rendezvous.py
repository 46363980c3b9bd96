"""Finding each other for real: a late, dead, restarted and empty bootstrap server, and links that break."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_cluster import Play, cut_connections, unread_bytes

from kvpoll.spec.trace import Answered, Delivered, Marked, Sent


def test_the_bootstrap_server_comes_after_the_first_request(tmp_path: Path) -> None:
    """sglang#25125: ranks register again and again, decode asks again and again, and the request is served."""
    with Play(tmp_path, servers_late=frozenset({"B0"})) as play:
        fault = play.began("B0", "bootstrap_late")
        request = play.submit()
        play.until(lambda: play.seen(Answered, node="D0", status="refused"), "decode being refused")
        play.until(lambda: play.seen(Answered, node="P0", status="refused"), "prefill being refused")
        play.restart("B0")
        play.ended("B0", "bootstrap_late", fault)
        assert play.answered(request).ok
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}
    assert any(isinstance(event, Marked) and event.mark == "registration_retried" for event in verdict.events)


def test_a_prefill_engine_and_its_bootstrap_server_die_and_come_back_together(tmp_path: Path) -> None:
    """As when the server lives in the engine's process tree: the new server is empty, and decode asks it anew."""
    with Play(tmp_path) as play:
        play.registered()
        for poll in ("Bootstrapping", "WaitingForInput"):
            request = play.bring("D0", poll)
            fault = play.began("P0", "rank_crash")
            play.kill("B0")
            play.kill("P0")
            play.go_on("D0")
            assert play.answered(request).ok is False
            play.over(request, "D0")
            play.restart("B0")
            waiting = play.submit()
            play.restart("P0")
            play.ended("P0", "rank_crash", fault)
            play.registered()
            play.answered(waiting)
            play.over(waiting, "D0")
            play.served()
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}


def test_a_server_that_lost_its_memory_while_prefill_stood_still_is_told_again(tmp_path: Path) -> None:
    """C5: a decode rank that is new, too, asks a server that knows nobody until prefill goes on and notices."""
    with Play(tmp_path) as play:
        play.registered()
        play.served()
        fault = play.began("B0", "bootstrap_amnesia")
        play.pause("P0")
        play.kill("B0")
        play.kill("D0")
        play.restart("B0")
        play.restart("D0")
        request = play.submit()
        play.until(lambda: play.seen(Answered, node="D0", status=503), "a server that is not ready")
        play.go_on("P0")
        play.ended("B0", "bootstrap_amnesia", fault)
        play.registered()
        play.answered(request)
        play.over(request, "P0", "D0")
        play.heal()
        verdict = play.verdict()
    assert verdict.broken == {}


FORGETFUL = {"resend_on_reconnect": "no"}


@pytest.mark.parametrize(("rules", "result"), [({}, (True, None)), (FORGETFUL, (False, "waiting_timeout"))])
def test_a_status_is_lost_with_its_connection_and_is_sent_again(
    rules: dict[str, str], result: tuple[bool, str | None], tmp_path: Path
) -> None:
    """B63: prefill's Success lies unread in the socket of a decode rank that stands still, and the connection breaks.

    Both processes live on. What comes over the next connection shows the gap; decode publishes its pages again and
    gets the answer again. Where neither side remembers, it waits for its own deadline.
    """
    with Play(tmp_path, rules=rules) as play:
        play.registered()
        play.served()
        request = play.bring("P0", "Transferring")
        play.pause("D0")
        port = int((play.child("D0").endpoint or "").rpartition(":")[2])
        before = unread_bytes(port)
        play.go_on("P0")
        play.until(lambda: lost_status(play), "the status being sent")
        play.until(lambda: unread_bytes(port) > before, "the status being in the socket of D0")
        (status,) = lost_status(play)
        fault = play.began("D0", "message_drop")
        try:
            assert cut_connections(play.pid("D0"), port) > 0
        except PermissionError:
            pytest.skip("this kernel or container forbids to borrow another process's sockets (pidfd_getfd)")
        play.go_on("D0")
        play.ended("D0", "message_drop", fault)
        answer = play.answered(request)
        assert (answer.ok, answer.cause) == result
        heard = [event.serial for event in play.seen(Delivered, node="D0", sender="P0")]
        assert status.serial not in heard, "the status was read before the connection broke"
        assert play.seen(Marked, node="D0", mark="link_restored")
        play.over(request, "P0", "D0")
        play.heal()
        verdict = play.verdict()
    assert rules or verdict.broken == {}


def lost_status(play: Play) -> list[Sent]:
    """Outcomes that P0 has sent and D0 has not read."""
    read = {event.serial for event in play.seen(Delivered, node="D0", sender="P0")}
    return [event for event in play.seen(Sent, node="P0", to="D0", message="Status*") if event.serial not in read]
