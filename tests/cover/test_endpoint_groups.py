"""Ranks of a group: one endpoint each, polls merged as ``docs/embedding.md`` shows it, heads cut where TP differs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from endpoint_stage import LIMIT_S, PROTOCOL, REFERENCE, until

from kvpoll.runtime import BootstrapServer, DecodeEndpoint, KVPoll, Layout, PrefillEndpoint, Settings, Sizes
from kvpoll.runtime.transports.memory import Fabric
from kvpoll.statemachine.agreement import Report, decide_transfer, merge_by_request

WHOLE = Layout((0, 1), pages=16, page_tokens=4, heads=4, head_dim=8, dtype="uint8", rows=4)


@contextmanager
def engines(prefill_tp: int, decode_tp: int) -> Iterator[tuple[str, list[PrefillEndpoint], list[DecodeEndpoint]]]:
    """A prefill and a decode engine of these TP sizes, over shm."""
    with ExitStack() as stack:
        server = stack.enter_context(BootstrapServer(PROTOCOL, REFERENCE, port=0))
        share = {"monitored": True, "destinations": max(1, decode_tp // prefill_tp)}
        prefills, decodes = [], []
        for tp in range(prefill_tp):
            layout = replace(WHOLE, tp_rank=tp, tp_size=prefill_tp)
            given = Settings(layout, bootstrap=server.address, sizes=Sizes(tp=prefill_tp), tp=tp, epoch=1, **share)
            prefills.append(stack.enter_context(PrefillEndpoint(given)))
        for tp in range(decode_tp):
            layout = replace(WHOLE, tp_rank=tp, tp_size=decode_tp)
            given = Settings(layout, name="D", sizes=Sizes(tp=decode_tp), tp=tp, epoch=1, monitored=True)
            decodes.append(stack.enter_context(DecodeEndpoint(given)))
        for endpoint in prefills:
            endpoint.wait_registered(LIMIT_S)
        yield server.address, prefills, decodes


def head(number: int, page: int) -> Any:
    """What every token's vector of one head of one page is."""
    return np.full((WHOLE.page_tokens, WHOLE.head_dim), 16 * number + page, np.uint8)


def serve(address: str, prefills: list[PrefillEndpoint], decodes: list[DecodeEndpoint], room: int) -> bool:
    """One request on all ranks; did every head reach the rank that keeps it?"""
    sources = [endpoint.admit(room) for endpoint in prefills]
    targets = [endpoint.admit(room, address) for endpoint in decodes]
    for target in targets:
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, target.failure
        target.publish([2, 3], row=1)
    for endpoint, source in zip(prefills, sources, strict=True):
        assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, source.failure
        layout = endpoint.pool.layout
        for page in (0, 1):
            for plane in layout.planes:
                for own in range(layout.local_heads):
                    view = endpoint.pool.page_view(*plane, page).reshape(layout.page_shape)
                    view[:, own] = head(layout.first_head + own, page)
        source.send([0, 1], last=True, first_token=room)
    for end in (*targets, *sources):
        assert end.wait(timeout_s=LIMIT_S) == KVPoll.Success, end.failure
    assert all((said := target.aux()) is not None and said.first_token == room for target in targets)
    right = all(
        (endpoint.pool.page_view(*plane, page + 2).reshape(endpoint.pool.layout.page_shape)[:, own]
         == head(endpoint.pool.layout.first_head + own, page)).all()
        for endpoint in decodes for plane in WHOLE.planes for page in (0, 1)
        for own in range(endpoint.pool.layout.local_heads)
    )  # fmt: skip
    for end in (*targets, *sources):
        end.release()
        assert end.wait_pages_free(LIMIT_S)
    return right


def test_two_prefill_ranks_fill_the_heads_of_one_decode_rank() -> None:
    with engines(2, 1) as (address, prefills, decodes):
        assert serve(address, prefills, decodes, 1) and serve(address, prefills, decodes, 2)
        assert [endpoint.violations for endpoint in (*prefills, *decodes)] == [[]] * 3


def test_one_prefill_rank_fills_four_decode_ranks() -> None:
    with engines(1, 4) as (address, prefills, decodes):
        assert serve(address, prefills, decodes, 1)
        assert [endpoint.violations for endpoint in (*prefills, *decodes)] == [[]] * 5


def step(lives: list[dict[str, Any]]) -> None:
    """One scheduler iteration of every rank, with the collective in the middle (see docs/embedding.md)."""
    everyone = [{rid: Report(int(t.poll()), t.failure) for rid, t in live.items()} for live in lives]
    for live in lives:
        for rid, merged in merge_by_request(everyone).items():
            decision = decide_transfer(rid, merged)
            if decision is not None and rid in live:
                transfer = live.pop(rid)
                if decision.outcome == "conclude":
                    transfer.commit()
                else:
                    transfer.abort(decision.cause or "peer rank")
                transfer.release()


def test_ranks_conclude_together_and_give_up_together() -> None:
    """Rank 1 gives up one of two requests: rank 0 hears it by the merge, drops it, and concludes the other."""
    with engines(2, 2) as (address, prefills, decodes):
        sources = {room: [endpoint.admit(room) for endpoint in prefills] for room in (7, 8)}
        lives: list[dict[str, Any]] = [{str(room): end.admit(room, address) for room in (7, 8)} for end in decodes]
        for live in lives:
            for row, transfer in enumerate(live.values()):
                assert transfer.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
                transfer.publish([row], row)
        ends = [transfer for live in lives for transfer in live.values()]
        lives[1]["7"].abort("no memory on rank 1")
        assert lives[1]["7"].wait(timeout_s=LIMIT_S) == KVPoll.Failed
        for source in sources[8]:
            assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
            source.send([8], last=True)
        for live in lives:
            assert live["8"].wait(timeout_s=LIMIT_S) == KVPoll.Success
        step(lives)
        assert lives == [{}, {}]
        until(lambda: all(end.is_over for end in ends), "all pages of both ranks being back")
        assert next(end.failure for end in ends if end.rid == "7/0") in (
            "no memory on rank 1",
            "failed_by_prefill: aborted_by_decode",
        )
        for source in (*sources[7], *sources[8]):
            source.release()
            assert source.wait_pages_free(LIMIT_S)
        assert [endpoint.violations for endpoint in (*prefills, *decodes)] == [[]] * 4


@pytest.mark.parametrize("follows_room", [True, False])
def test_requests_find_the_data_parallel_rank_that_runs_them(follows_room: bool) -> None:
    """By the room number, or where prefill balances by load, by what the rank told the bootstrap server."""
    with ExitStack() as stack:
        server = stack.enter_context(BootstrapServer(PROTOCOL, REFERENCE, port=0))
        given = Settings(WHOLE, bootstrap=server.address, sizes=Sizes(dp=2), epoch=1, follows_room=follows_room)
        prefills = [stack.enter_context(PrefillEndpoint(replace(given, dp=dp))) for dp in (0, 1)]
        decode = stack.enter_context(DecodeEndpoint(Settings(WHOLE)))
        for endpoint in prefills:
            endpoint.wait_registered(LIMIT_S)
        for room in (4, 5):
            rank = prefills[room % 2 if follows_room else 1]
            target = decode.admit(room, server.address)
            source = rank.admit(room)
            assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, target.failure
            target.publish([room], row=0)
            assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, source.failure
            source.send([1], last=True)
            assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
            for end in (source, target):
                end.release()
                assert end.wait_pages_free(LIMIT_S)
        if follows_room:
            wrong = prefills[0].admit(7)
            assert wrong.wait(timeout_s=LIMIT_S) == KVPoll.Failed and "dp" in (wrong.failure or ""), wrong.failure


def test_stages_of_a_pipeline_send_their_own_layers() -> None:
    """Prefill PP 2, decode PP 1: each stage fills the planes of its layers; Success needs both."""
    with ExitStack() as stack:
        server = stack.enter_context(BootstrapServer(PROTOCOL, REFERENCE, port=0))
        prefills = [
            stack.enter_context(
                PrefillEndpoint(
                    Settings(replace(WHOLE, layers=(pp,)), bootstrap=server.address, sizes=Sizes(pp=2), pp=pp, epoch=1)
                )
            )
            for pp in (0, 1)
        ]
        decode = stack.enter_context(DecodeEndpoint(Settings(WHOLE, monitored=True)))
        for endpoint in prefills:
            endpoint.wait_registered(LIMIT_S)
        sources = [endpoint.admit(1) for endpoint in prefills]
        target = decode.admit(1, server.address)
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, target.failure
        target.publish([5], row=0)
        for layer, (endpoint, source) in enumerate(zip(prefills, sources, strict=True)):
            assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
            for part in ("k", "v"):
                endpoint.pool.page_view(layer, part, 0)[:] = 10 + layer
            assert target.poll() == KVPoll.WaitingForInput
            source.send([0], last=True)
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
        assert [int(decode.pool.page_view(layer, "v", 5).max()) for layer in (0, 1)] == [10, 11]
        for end in (target, *sources):
            end.release()
            assert end.wait_pages_free(LIMIT_S)
        assert decode.violations == []


def test_the_death_of_one_prefill_rank_proves_nothing_of_its_siblings() -> None:
    """Both ranks are writing when one process ends: the request fails, the pages wait for the other (S1)."""
    fabric = Fabric(choose=lambda count: count - 1)  # the youngest write moves: that of rank 1
    memory: dict[str, Any] = {"transport": "memory", "options": {"fabric": fabric}, "epoch": 1, "monitored": True}
    with ExitStack() as stack:
        server = stack.enter_context(BootstrapServer(PROTOCOL, REFERENCE, port=0))
        sources = []
        for tp in (0, 1):
            layout = replace(WHOLE, tp_rank=tp, tp_size=2)
            given = Settings(layout, bootstrap=server.address, sizes=Sizes(tp=2), tp=tp, **memory)
            endpoint = stack.enter_context(PrefillEndpoint(given))
            sources.append(endpoint.admit(1))
        quick = {"drain_timeout_s": 0.2}
        decode = stack.enter_context(DecodeEndpoint(Settings(WHOLE, name="D", rules=quick, **memory)))
        target = decode.admit(1, server.address)
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, target.failure
        target.publish([2], row=0)
        for number, source in enumerate(sources, 1):
            assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
            source.send([0], last=True)
            until(lambda number=number: fabric.under_way == number, "its write")
        sources[0].endpoint.do(lambda: (fabric.step(), fabric.kill(sources[0].endpoint.node)))
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed and target.failure == "prefill_lost"
        target.release()
        assert not target.wait_pages_free(1.0) and decode.health()["quarantined_pages"] == 1
        until(lambda: sources[1].poll() == KVPoll.Failed, "the sibling hearing of it")
        sources[1].endpoint.do(fabric.run)
        assert target.wait_pages_free(LIMIT_S), "the sibling has acknowledged"
        assert decode.violations == []
