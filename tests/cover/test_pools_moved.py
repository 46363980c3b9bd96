"""Whole pages through real transports: filled on two prefill ranks, sent by plan, read back on a decode rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvpoll.runtime.pools.aux_row import AuxRow, pack, unpack
from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.pattern import fill, read
from kvpoll.runtime.pools.plan import copier, writes_aux
from kvpoll.runtime.pools.pool import KVPool
from kvpoll.runtime.transports import make
from kvpoll.runtime.transports.interface import Copies, Tag, Transport
from kvpoll.runtime.transports.shm_memory import allocate
from kvpoll.spec.trace import PageTag
from kvpoll.spec.vocabulary import Incarnation

LIMIT_S = 60.0
INCARNATION = Incarnation(77, 2, 0)
WHOLE = Layout((0, 1, 2), pages=6, page_tokens=16, heads=4, head_dim=64, rows=2)


@pytest.fixture(params=["shm", "tcp"])
def transports(request: pytest.FixtureRequest) -> Iterator[list[Transport]]:
    """Two writers and an owner of one kind, closed at the end."""
    made = [
        make(request.param, node, 0, lambda: None, lambda _node, _epoch: None) for node in ("P0/tp0", "P0/tp1", "D0")
    ]
    yield made
    for each in made:
        each.close()


def settle(transport: Transport, peer: object, plan: Copies, write: int) -> None:
    handle = transport.post(peer, plan, Tag(INCARNATION, write))
    end = time.monotonic() + LIMIT_S
    while (progress := transport.poll(handle)).state == "pending" and time.monotonic() < end:
        time.sleep(0.002)
    assert progress.state == "done", progress
    transport.forget(handle)


def test_two_ranks_fill_a_prompt_and_its_aux_row(transports: list[Transport]) -> None:
    """TP 2 to TP 1 with pages [tokens, heads, head_dim]: a range for each token, layer and part."""
    *writers, owner = transports
    target = KVPool.on_host(replace(WHOLE, pages=9), allocate(replace(WHOLE, pages=9).total_bytes))
    descriptor = owner.register(target.regions())
    prompt = {0: (4, 7), 1: (1, 3)}
    row = AuxRow(77, 2, first_token=5, prompt_tokens=30, cached_tokens=0, pages=2)
    sources = {}
    for rank, writer in enumerate(writers):
        name = f"P0/tp{rank}"
        sources[name] = layout = replace(WHOLE, tp_size=2, tp_rank=rank)
        pool = KVPool.on_host(layout, allocate(layout.total_bytes))
        writer.register(pool.regions())
        peer = writer.connect(descriptor, "D0", 0)
        for part, (page, _) in prompt.items():
            fill(pool, page, PageTag(INCARNATION.pair, name, part, 0))
        here, there = zip(*prompt.values(), strict=True)
        settle(writer, peer, copier(layout, target.layout).copies(here, there), write=1)
        if writes_aux(layout, target.layout):
            pool.put_row(1, pack(row))
            settle(writer, peer, copier(layout, target.layout).copies([], [], (1, 0)), write=2)
    for part, (_, page) in prompt.items():
        assert read(target, page, sources) == {name: PageTag((77, 2), name, part, 0) for name in sources}
    assert [read(target, page, sources) for page in (0, 1, 2, 4, 5, 6, 8)] == [{}] * 7
    assert [unpack(target.get_row(each)) for each in (0, 1)] == [row, None]
