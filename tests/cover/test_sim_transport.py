"""Writes share cards, land, settle, and suffer: late, partial, failed, to a dead target, from a dead writer."""

from __future__ import annotations

from typing import Any

import pytest
from sim_stage import A, B, Stage, shape

from kvpoll.sim.cluster import Cluster
from kvpoll.sim.faults import Fault, Injector, kinds
from kvpoll.sim.topology import Topology
from kvpoll.spec.trace import PageTag, WriteLanded, WritePosted, WriteSettled
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.ranks.host import Destination

PAGE_BYTES = 512 * 1000
LINK = 512_000_000.0  # one page takes a millisecond; times below are milliseconds after the first second


class Cards:
    """Two prefill engines and two decode engines of one rank each, and writes between them."""

    def __init__(self, **prefill: Any) -> None:
        topology = Topology(
            shape(count=2, **prefill), shape(count=2), kv_bytes_per_token=1000, link_bytes_per_s=LINK, latency_s=0.0
        )
        self.stage = Stage(topology)
        self.cluster: Cluster = self.stage.cluster()
        self.outcomes: list[tuple[float, str, str]] = []

    def post(
        self, source: str, target: str, pages: int, who: Incarnation = A, first: int = 0, last: bool = True
    ) -> None:
        destination = Destination(target, who, 0, tuple(range(10, 10 + first + pages)), 5)
        sent = tuple(range(pages))
        self.cluster.transport.post(
            self.cluster.rank(source), destination, 0, first, sent, last, lambda outcome: self.told(source, outcome)
        )

    def told(self, source: str, outcome: str) -> None:
        self.outcomes.append((round((self.stage.world.now - 1.0) * 1000, 3), source, outcome))

    def fault(self, name: str, target: str, **parameters: Any) -> Fault:
        """Begin a fault of this kind now."""
        kind = kinds()[name]
        fault = Fault(name, kind, target, 0.0, 1e9, {**kind.parameters, **parameters})
        Injector(self.cluster, [fault]).begin(fault)
        return fault

    def contents(self, node: str, pages: range) -> list[dict[str, PageTag]]:
        return [dict(self.cluster.rank(node).kv.contents[page]) for page in pages]


@pytest.fixture
def cards() -> Cards:
    return Cards()


def test_a_write_is_posted_lands_and_settles(cards: Cards) -> None:
    cards.post("P0", "D0", 4, first=2)
    cards.stage.until(2)
    (posted,) = cards.stage.of(WritePosted)
    assert (posted.node, posted.target, posted.source_pages, posted.target_pages) == (
        "P0", "D0", (0, 1, 2, 3), (12, 13, 14, 15),
    )  # fmt: skip
    assert (posted.incarnation, posted.row, posted.last) == (A, 5, True)
    (landed,) = cards.stage.of(WriteLanded)
    (settled,) = cards.stage.of(WriteSettled)
    assert (landed.node, landed.pages) == ("D0", (12, 13, 14, 15))
    assert (settled.node, settled.ok) == ("P0", True)
    assert posted.write == landed.write == settled.write
    assert cards.outcomes == [(4, "P0", "completed")]
    assert cards.contents("D0", range(12, 16)) == [{"P0": PageTag(A.pair, "P0", part, 0)} for part in range(2, 6)]
    assert cards.cluster.rank("D0").row_owners[5] == A.pair


def test_the_row_travels_with_the_last_write_only(cards: Cards) -> None:
    cards.post("P0", "D0", 1, last=False)
    cards.stage.until(2)
    assert cards.stage.of(WritePosted)[0].row is None
    assert cards.cluster.rank("D0").row_owners[5] is None


def test_writes_queue_behind_each_other_on_a_card(cards: Cards) -> None:
    """A card moves one write at a time, the writer's as well as the target's; disjoint pairs do not meet."""
    cards.post("P0", "D0", 4)
    cards.post("P0", "D1", 4)  # waits for P0's card
    cards.post("P1", "D0", 2, who=B)  # waits for D0's card
    cards.stage.until(2)
    assert cards.outcomes == [(4, "P0", "completed"), (6, "P1", "completed"), (8, "P0", "completed")]


def test_disjoint_cards_run_side_by_side(cards: Cards) -> None:
    cards.post("P0", "D0", 4)
    cards.post("P1", "D1", 4, who=B)
    cards.stage.until(2)
    assert cards.outcomes == [(4, "P0", "completed"), (4, "P1", "completed")]


def test_an_idle_card_starts_at_once(cards: Cards) -> None:
    cards.post("P0", "D0", 4)
    cards.stage.until(1.5)
    cards.post("P0", "D0", 4)
    cards.stage.until(2)
    assert cards.outcomes[1] == (504, "P0", "completed")


def test_ranks_share_the_bytes_of_a_page() -> None:
    """Each of two stages and two tensor ranks holds a quarter of every page."""
    wide = Cards(pp=2, tp=2)
    wide.post("P0/pp0/tp0", "D0", 4)
    wide.stage.until(2)
    assert wide.outcomes == [(1, "P0/pp0/tp0", "completed")]


def test_a_write_of_nothing_takes_the_time_of_a_page(cards: Cards) -> None:
    cards.post("P0", "D0", 0)
    cards.stage.until(2)
    assert cards.outcomes == [(1, "P0", "completed")]
    assert cards.cluster.rank("D0").row_owners[5] == A.pair


@pytest.mark.parametrize("target", ["P0", "D0", "*"])
def test_a_slow_link_slows_whoever_uses_it(cards: Cards, target: str) -> None:
    cards.fault("slow_link", target, factor=10)
    cards.post("P0", "D0", 4)
    cards.stage.until(2)
    assert cards.outcomes == [(40, "P0", "completed")]


def test_a_failed_write_places_nothing_and_settles_later(cards: Cards) -> None:
    """Failing is one fact, having drained is another (ENGINES 4)."""
    cards.fault("write_fail", "P0", share=1.0, settle_s=0.1)
    cards.post("P0", "D0", 4)
    cards.stage.until(2)
    assert cards.outcomes == [(4, "P0", "failed"), (104, "P0", "settled")]
    assert cards.stage.of(WriteLanded) == []
    assert [event.ok for event in cards.stage.of(WriteSettled)] == [False]
    assert cards.contents("D0", range(10, 14)) == [{}, {}, {}, {}]


def test_a_partial_write_places_half_between_failing_and_settling(cards: Cards) -> None:
    cards.fault("write_partial", "P0", share=1.0, settle_s=0.5)
    cards.post("P0", "D0", 5)
    cards.stage.until(3)
    assert cards.outcomes == [(5, "P0", "failed"), (505, "P0", "settled")]
    (landed,) = cards.stage.of(WriteLanded)
    assert landed.pages == (10, 11)
    assert round(landed.t - 1.0, 6) == 0.255
    assert cards.cluster.rank("D0").row_owners[5] is None


def test_a_late_write_lands_on_whoever_owns_the_pages_by_then(cards: Cards) -> None:
    cards.fault("write_late", "P0", share=1.0, late_s=3.0)
    cards.post("P0", "D0", 2)
    cards.stage.until(2)
    cards.cluster.rank("D0").kv.contents[10] = {"P0": PageTag(B.pair, "P0", 0, 0)}
    cards.stage.until(6)
    assert cards.outcomes == [(3002, "P0", "completed")]
    assert cards.contents("D0", range(10, 11)) == [{"P0": PageTag(A.pair, "P0", 0, 0)}]


def test_a_share_of_writes_is_struck(cards: Cards) -> None:
    cards.fault("write_fail", "P0", share=0.5, settle_s=0.0)
    for _ in range(200):
        cards.post("P0", "D0", 1)
    cards.post("P1", "D1", 1, who=B)
    cards.stage.until(3)
    failed = sum(outcome == "failed" for _, source, outcome in cards.outcomes if source == "P0")
    assert 70 < failed < 130
    assert [outcome for _, source, outcome in cards.outcomes if source == "P1"] == ["completed"]


def test_a_dead_writer_reads_places_and_reports_nothing(cards: Cards) -> None:
    cards.post("P0", "D0", 4)
    cards.cluster.prefill[0].crash()
    cards.stage.until(2)
    assert cards.outcomes == []
    assert cards.stage.of(WriteLanded) == []
    assert cards.stage.of(WriteSettled) == []


def test_a_writer_in_its_next_life_does_not_finish_what_the_former_began(cards: Cards) -> None:
    cards.post("P0", "D0", 4)
    cards.cluster.prefill[0].crash()
    cards.cluster.prefill[0].start()
    cards.stage.until(2)
    assert cards.outcomes == []
    assert cards.contents("D0", range(10, 14)) == [{}, {}, {}, {}]


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_write_to_a_dead_target_fails_and_settles(cards: Cards, comes_back: bool) -> None:
    cards.post("P0", "D0", 4)
    cards.cluster.decode[0].crash()
    if comes_back:
        cards.cluster.decode[0].start()
    cards.stage.until(3)
    assert cards.outcomes == [(4, "P0", "failed"), (1004, "P0", "settled")]
    assert cards.stage.of(WriteLanded) == []


def test_a_write_across_a_partition_fails_and_settles(cards: Cards) -> None:
    cards.stage.world.network.severed.append(("P0", "D0"))
    cards.post("P0", "D0", 4)
    cards.stage.until(3)
    assert [outcome for _, _, outcome in cards.outcomes] == ["failed", "settled"]
    assert cards.stage.of(WriteLanded) == []


def test_a_struck_write_of_a_dead_writer_says_nothing(cards: Cards) -> None:
    cards.fault("write_partial", "P0", share=1.0, settle_s=0.5)
    cards.post("P0", "D0", 4)
    cards.stage.until(1.1)
    cards.cluster.prefill[0].crash()
    cards.stage.until(3)
    assert [outcome for _, _, outcome in cards.outcomes] == ["failed"]
    assert cards.stage.of(WriteSettled) == []
    assert cards.stage.of(WriteLanded) == []


def test_the_cards_of_a_dead_engine_are_idle(cards: Cards) -> None:
    cards.post("P0", "D0", 400)
    cards.cluster.decode[0].crash()
    cards.cluster.decode[0].start()
    cards.cluster.transport.forget("P0")
    cards.post("P0", "D0", 1)
    cards.stage.until(1.1)
    assert cards.outcomes == [(1, "P0", "completed")]
