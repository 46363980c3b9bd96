"""The router: rooms, replicas, two legs and one answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from sim_stage import Stage, shape

from kvpoll.sim.topology import Topology
from kvpoll.spec.trace import Admitted, Resulted, Sent
from kvpoll.statemachine.ranks.host import Request

LEGS = ("prefill", "decode")


class Desk:
    """A router in front of engines that do nothing: their controllers only note what reaches them."""

    def __init__(self, topology: Topology | None = None, **rules: Any) -> None:
        self.stage = Stage(topology, **rules)
        self.cluster = self.stage.cluster()
        self.router = self.cluster.router
        self.heard: list[tuple[str, str]] = []
        for engine in self.cluster.engines():
            engine.accept = self._listener(engine.name)  # type: ignore[attr-defined]

    def _listener(self, name: str) -> Any:
        return lambda request, command: self.heard.append((name, command[0]))

    def submit(self, rid: str = "r0", input_tokens: int = 1000) -> Request:
        request = self.router.submit(rid, input_tokens, 10)
        self.wait(0.1)
        return request

    def wait(self, seconds: float) -> None:
        self.stage.until(self.stage.world.now + seconds)

    def fail(self, request: Request, side: str, cause: str) -> None:
        engine = self.cluster.prefill[request.prefill] if side == "prefill" else self.cluster.decode[request.decode]
        rank = next(iter(engine.ranks.values()))
        self.stage.world.leg_failed(rank, request, side, cause)
        self.wait(0.1)

    def first_token(self, request: Request) -> None:
        self.stage.world.first_token(next(iter(self.cluster.decode[request.decode].ranks.values())), request)
        self.wait(0.1)

    @property
    def answer(self) -> tuple[bool, str | None] | None:
        results = self.stage.of(Resulted)
        assert len(results) <= 1
        return (results[0].ok, results[0].cause) if results else None


def test_a_request_goes_to_both_sides_at_once_and_is_answered_by_the_first_token() -> None:
    desk = Desk()
    request = desk.submit()
    assert sorted(desk.heard) == [("D0", "open"), ("P0", "open")]
    assert {event.t for event in desk.stage.of(Sent, message="Request")} == {request.t}
    desk.first_token(request)
    (resulted,) = desk.stage.of(Resulted)
    assert (resulted.ok, resulted.cause, resulted.rid, resulted.pair) == (True, None, "r0", request.pair)
    assert resulted.ttft_s == resulted.t - request.t
    assert desk.router.active == {}
    assert (desk.router.admitted, desk.router.succeeded, desk.router.causes) == (1, 1, {})


@pytest.mark.parametrize("side", LEGS)
def test_the_first_failure_answers_and_cancels_the_other_leg(side: str) -> None:
    """A09: what the reference does; the other leg hears of it in one message, not at its own timeout."""
    desk = Desk()
    request = desk.submit()
    desk.fail(request, side, "transfer_error: link down")
    assert desk.answer == (False, "transfer_error: link down")
    assert desk.heard[2:] == [("D0" if side == "prefill" else "P0", "abort")]
    assert desk.router.causes == {"transfer_error": 1}
    desk.fail(request, "decode" if side == "prefill" else "prefill", "cancelled")
    desk.first_token(request)
    assert desk.answer == (False, "transfer_error: link down")


@pytest.mark.parametrize("first", LEGS)
def test_waiting_for_both_the_first_cause_is_told_when_the_second_leg_fails(first: str) -> None:
    desk = Desk(router_join="waits_for_both")
    request = desk.submit()
    desk.fail(request, first, "one")
    assert desk.answer is None
    assert len(desk.heard) == 2
    desk.fail(request, "decode" if first == "prefill" else "prefill", "two")
    assert desk.answer == (False, "one")


def test_waiting_for_both_a_token_after_a_failure_is_no_success() -> None:
    desk = Desk(router_join="waits_for_both")
    request = desk.submit()
    desk.fail(request, "prefill", "one")
    desk.first_token(request)
    assert desk.answer == (False, "one")


def test_a_client_that_leaves_ends_both_legs() -> None:
    desk = Desk()
    desk.submit()
    assert desk.router.client_leaves("r0")
    desk.wait(0.1)
    assert desk.answer == (False, "client_left")
    assert sorted(desk.heard[2:]) == [("D0", "abort"), ("P0", "abort")]
    assert not desk.router.client_leaves("r0")


@pytest.mark.parametrize("side", LEGS)
def test_a_dead_engine_refuses_and_a_dying_one_resets(side: str) -> None:
    desk = Desk()
    engine = desk.cluster.prefill[0] if side == "prefill" else desk.cluster.decode[0]
    desk.submit("dying")
    engine.crash()
    desk.wait(0.1)
    desk.submit("dead")
    causes = {event.rid: event.cause for event in desk.stage.of(Resulted)}
    assert causes == {"dying": "engine_crashed", "dead": "connection_refused"}


def test_requests_go_round_all_replicas_of_decode_and_all_engines() -> None:
    desk = Desk(Topology(prefill=shape(count=2), decode=shape(count=2, dp=2)))
    for number in range(8):
        desk.submit(f"r{number}")
    admitted = desk.stage.of(Admitted)
    assert [event.prefill for event in admitted] == [("P0",), ("P1",)] * 4
    assert [event.decode for event in admitted[:4]] == [("D0/dp0",), ("D1/dp0",), ("D0/dp1",), ("D1/dp1",)]
    assert Counter(event.decode for event in admitted) == {
        ("D0/dp0",): 2, ("D1/dp0",): 2, ("D0/dp1",): 2, ("D1/dp1",): 2,
    }  # fmt: skip


def test_an_admission_names_every_rank_that_must_finish_it() -> None:
    desk = Desk(Topology(prefill=shape(dp=2, pp=2, cp=2, tp=2), decode=shape(tp=4)))
    request = desk.submit()
    (admitted,) = desk.stage.of(Admitted)
    dp = request.prefill_dp
    assert set(admitted.prefill) == {
        f"P0/dp{dp}/pp{pp}/cp{cp}/tp{tp}" for pp in range(2) for cp in range(2) for tp in range(2)
    }
    assert admitted.decode == ("D0/tp0", "D0/tp1", "D0/tp2", "D0/tp3")


def test_following_the_room_the_replica_is_room_mod_dp() -> None:
    desk = Desk(Topology(prefill=shape(dp=4)))
    requests = [desk.submit(f"r{number}") for number in range(20)]
    assert all(request.prefill_dp == request.pair[0] % 4 for request in requests)
    assert {request.prefill_dp for request in requests} == {0, 1, 2, 3}


@pytest.mark.parametrize("balance, expected", [("total_requests", [0, 1, 2, 0, 1]), ("total_tokens", [0, 1, 2, 1, 1])])
def test_balancing_load_the_replica_is_the_least_loaded(balance: str, expected: list[int]) -> None:
    desk = Desk(Topology(prefill=shape(dp=3), load_balance=balance))
    lengths = [9000, 1000, 5000, 2000, 100]
    requests = [desk.submit(f"r{number}", tokens) for number, tokens in enumerate(lengths)]
    assert [request.prefill_dp for request in requests] == expected
    desk.first_token(requests[0])  # its load is gone
    assert desk.submit("next").prefill_dp == 0


def test_an_override_has_the_last_word() -> None:
    desk = Desk(Topology(prefill=shape(dp=4)))
    desk.router.override = lambda request: (request.prefill_dp + 1) % 4
    request = desk.submit()
    assert request.prefill_dp == (request.pair[0] + 1) % 4
    assert desk.stage.of(Admitted)[0].prefill == (f"P0/dp{request.prefill_dp}",)


def test_rooms_are_63_bits_and_never_zero_and_a_reused_one_is_another_attempt() -> None:
    """PROTOCOL 1: 0 means "metadata not landed" to SGLang's decode."""
    desk = Desk()
    pairs = [desk.submit(f"r{number}").pair for number in range(100)]
    assert all(0 < room < 2**63 and attempt == 0 for room, attempt in pairs)
    assert len(set(pairs)) == 100
    assert max(room for room, _ in pairs) > 2**62
    room = pairs[0][0]
    desk.router.reuse_room = lambda: room
    assert [desk.submit(f"again{number}").pair for number in range(3)] == [(room, 1), (room, 2), (room, 3)]
