"""Ranks of a group: one endpoint each, polls merged as ``docs/embedding.md`` shows it, heads cut where TP differs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from endpoint_stage import LIMIT_S, PROTOCOL, REFERENCE, until

from kvpoll.runtime import BootstrapServer, DecodeEndpoint, KVPoll, Layout, PrefillEndpoint, Settings, Sizes
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
            given = Settings(layout, bootstrap=server.address, sizes=Sizes(tp=prefill_tp), tp=tp, **share)
            prefills.append(stack.enter_context(PrefillEndpoint(given)))
        for tp in range(decode_tp):
            layout = replace(WHOLE, tp_rank=tp, tp_size=decode_tp)
            given = Settings(layout, name="D", sizes=Sizes(tp=decode_tp), tp=tp, monitored=True)
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
