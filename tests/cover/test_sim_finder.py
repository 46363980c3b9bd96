"""How decode finds its prefill ranks when the server errs in between, and whom it tells when it fails meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from sim_stage import Played, Stage, shape

from kvpoll.sim.cluster import Cluster
from kvpoll.sim.topology import Topology
from kvpoll.spec.trace import Admitted, Answered, Requested, Resulted, Sent, Stepped
from kvpoll.statemachine.routes import still_looks

ROUTE = "GET /route"


class Story(Stage):
    """1P1D, up and registered at 1 s; the server answers 500 from the moment at which decode knows its topology."""

    def __init__(self, **rules: Any) -> None:
        super().__init__(**rules)
        self.plant: Cluster = self.cluster()
        self.server = self.plant.servers[0]
        self.world.stream.subscribe(Answered, self._answered)

    def _answered(self, event: Answered) -> None:
        if event.node == "D0" and event.status == 200 and not self.of(Answered, node="D0", status=500):
            self.server.error_share = 1.0

    def asked(self) -> list[tuple[int, int]]:
        """Seconds and repeats of what decode asked the server."""
        return [(round(event.t), event.repeat) for event in self.of(Requested, node="D0", route=ROUTE)]

    def polls(self, node: str) -> list[tuple[int, str, str | None]]:
        """Seconds, polls and causes, as one node's only room went through them."""
        changes = [event for event in self.of(Stepped, node=node) if event.poll_before != event.poll_after]
        return [(round(event.t), event.poll_after, event.cause) for event in changes]


# -- an endpoint that is not answered


def test_an_endpoint_that_is_not_answered_is_asked_for_again_and_the_request_succeeds() -> None:
    """One 500 between the topology and the endpoint failed the request, although 40 of the topology would not have."""
    story = Story()
    story.plant.router.submit("r0", 1000, 4)
    story.until(3.5)
    assert [poll for _, poll, _ in story.polls("D0")] == ["Bootstrapping"]
    story.server.error_share = 0.0
    story.until(10.0)
    assert story.asked() == [(1, 0), (1, 0), (2, 1), (3, 2), (4, 3)]  # the topology, and then the endpoint
    assert [event.ok for event in story.of(Resulted)] == [True]


def test_where_it_is_asked_for_once_the_request_fails_with_the_status() -> None:
    """What SGLang does (PROTOCOL 6)."""
    story = Story(endpoint_patience="none", decode_failure_notice="known_ranks")
    story.plant.router.submit("r0", 1000, 4)
    story.until(30.0)
    assert story.asked() == [(1, 0), (1, 0)]
    assert (1, "Failed", "route_500") in story.polls("D0")
    assert [(event.ok, event.cause) for event in story.of(Resulted)] == [(False, "route_500")]


def test_its_patience_is_that_with_the_topology() -> None:
    story = Story(topology_attempts=5, decode_failure_notice="known_ranks")
    story.plant.router.submit("r0", 1000, 4)
    story.until(30.0)
    assert [repeat for _, repeat in story.asked()] == [0, 0, 1, 2, 3, 4]
    assert (5, "Failed", "route_500") in story.polls("D0")
    assert story.world.marks["setup_failed"] == 1


def test_requests_that_need_the_same_endpoint_ask_for_it_together() -> None:
    """R3: each by itself, fifty requests would ask fifty times a second for as long as the server errs."""
    story = Story()
    for number in range(50):
        story.plant.router.submit(f"r{number}", 1000, 4)
    story.until(1.5)
    story.plant.router.submit("late", 1000, 4)
    story.until(4.5)
    repeats = [t for t, repeat in story.asked() if repeat]
    assert max(repeats.count(t) for t in repeats) == 2  # of the endpoint, and of the topology, which the late one needs
    story.server.error_share = 0.0
    story.until(20.0)
    assert [event.ok for event in story.of(Resulted)] == [True] * 51
    assert "R3" not in story.world.watch.counts


def test_one_that_is_given_up_meanwhile_holds_nobody_up() -> None:
    story = Story()
    for rid in ("r0", "r1"):
        story.plant.router.submit(rid, 1000, 4)
    story.until(2.5)
    story.plant.router.client_leaves("r0")
    story.server.error_share = 0.0
    story.until(10.0)
    assert {event.rid: event.ok for event in story.of(Resulted)} == {"r0": False, "r1": True}


# -- decode fails before it has found anybody

ALONE = {"router_join": "waits_for_both"}


def decode_gives_up(**rules: Any) -> Story:
    """Decode alone gives its only request up at 3 s, while the server errs, and the router leaves prefill alone."""
    story = Story(**ALONE, **rules)
    story.request = story.plant.router.submit("r0", 1000, 4)
    story.until(3.0)
    story.plant.router.cancel(story.request, "decode", "test")
    story.until(5.5)
    return story


def test_prefill_is_told_as_soon_as_it_is_found() -> None:
    """L2: prefill waited for its own deadline, 120 s, because decode had nobody to tell and looked no further."""
    story = decode_gives_up()
    assert story.polls("D0") == [(1, "Bootstrapping", None), (3, "Failed", "test"), (3, "Retired", "test")]
    assert [poll for _, poll, _ in story.polls("P0")] == ["Bootstrapping"]
    story.server.error_share = 0.0
    story.until(7.0)
    assert story.polls("P0")[1] == (6, "Failed", "aborted_by_decode")
    assert len(story.of(Sent, node="D0", to="P0", message="Abort")) == 1
    assert [(event.ok, event.cause) for event in story.of(Resulted)] == [(False, "test")]


def test_without_the_rule_prefill_waits_for_its_own_deadline() -> None:
    story = decode_gives_up(decode_failure_notice="known_ranks")
    story.server.error_share = 0.0
    story.until(130.0)
    assert story.of(Sent, node="D0", to="P0") == []
    assert story.polls("P0")[1] == (121, "Failed", "bootstrap_timeout")
    assert "L2" in story.world.watch.counts


def test_it_looks_no_longer_than_it_remembers_the_request() -> None:
    story = decode_gives_up()
    story.until(60.0)
    last_t, _ = story.asked()[-1]
    assert 3 + 20 - 2 <= last_t <= 3 + 20 + 1
    assert not any(still_looks(story.world.profile, room.local) for room in decode_rooms(story))
    assert decode_rooms(story) == []
    assert is_at_rest(story)


def is_at_rest(story: Story) -> bool:
    """Does decode look for nobody any more?"""
    (rank,) = story.plant.decode[0].ranks.values()
    return not (rank.finder._asking or rank.finder._fetching or rank.finder._unanswered)


def decode_rooms(story: Story) -> list[Any]:
    (rank,) = story.plant.decode[0].ranks.values()
    return list(rank.rooms.values())


@pytest.mark.parametrize(("cause", "asks"), [("engine_crashed", False), ("client_left", False), ("test", True)])
def test_what_the_router_has_seen_for_itself_it_tells_both_sides(cause: str, asks: bool) -> None:
    """A search would end at prefill's next life, which would keep an abort of a request that never comes (R2)."""
    story = Story(**ALONE)
    request = story.plant.router.submit("r0", 1000, 4)
    story.until(3.0)
    story.plant.router.cancel(request, "decode", cause)
    story.until(10.0)
    assert (max(t for t, _ in story.asked()) > 5) == asks
    assert is_at_rest(story) != asks


def test_one_whose_patience_is_over_is_looked_for_all_the_same() -> None:
    """It has failed; its prefill rank has not, and is told when the server is back."""
    story = Story(**ALONE, topology_attempts=3)
    story.plant.router.submit("r0", 1000, 4)
    story.until(8.0)
    assert (3, "Failed", "route_500") in story.polls("D0")
    assert len(story.polls("P0")) == 1
    story.server.error_share = 0.0
    story.until(10.0)
    assert story.polls("P0")[1][1:] == ("Failed", "aborted_by_decode")


def test_a_new_attempt_at_the_room_ends_the_search_for_the_old_one() -> None:
    story = decode_gives_up()
    story.plant.router.reuse_room = lambda: story.request.pair[0]
    again = story.plant.router.submit("r1", 1000, 4)
    assert again.pair == (story.request.pair[0], 1)
    story.until(8.0)
    story.server.error_share = 0.0
    story.until(20.0)
    assert "S2" not in story.world.watch.counts and "S12" not in story.world.watch.counts
    told = {event.incarnation.attempt for event in story.of(Sent, node="D0", to="P0", message="Abort")}
    assert told <= {1}


OUTAGE = """
[workload]
kind = "requests"
requests = [{ at_s = 1.0, input_tokens = 1000, output_tokens = 4 }, { at_s = 2.0, input_tokens = 1000, output_tokens = 4 }]
[timing]
hostile_s = 30
[[fault]]
kind = "bootstrap_crash"
target = "B0"
at_s = 0.9
for_s = 8
[[fault]]
kind = "decode_abort"
target = "R"
at_s = 0
for_s = 1.5
share = 1.0
after_s = 1.0
"""


@pytest.mark.parametrize("notice", ["looks_on", "known_ranks"])
def test_an_outage_delays_the_notice_and_no_longer(notice: str) -> None:
    """L2 is suspended while the server is away, and due two seconds after it is back."""
    run = Played(OUTAGE, **ALONE, decode_failure_notice=notice)
    first, second = run.of(Admitted)[:2]
    ended = {event.incarnation.pair: event.cause for event in run.of(Stepped, node="P0", poll_after="Failed")}
    assert ended == {first.pair: "aborted_by_decode" if notice == "looks_on" else "bootstrap_timeout"}
    assert [event.ok for event in run.of(Resulted) if event.pair == second.pair] == [True]
    assert ("L2" in run.outcome.violations) == (notice == "known_ranks")


def test_a_dp_rank_that_the_server_never_learns_is_asked_for_no_longer_than_the_request_is_remembered() -> None:
    """Five times a second for all such requests of a rank together, as while they are set up (R3)."""
    story = Stage(Topology(prefill=shape(dp=2), load_balance="total_requests"), **ALONE)
    plant = story.cluster()
    server = plant.servers[0]
    answer = server.request

    def deaf(client: str, route: str, detail: Any, repeat: int, reply: Any) -> None:
        if route != "POST /register_dp_rank":
            answer(client, route, detail, repeat, reply)

    server.request = deaf  # type: ignore[method-assign]
    requests = [plant.router.submit(f"r{number}", 1000, 4) for number in range(30)]
    story.until(3.0)
    for request in requests:
        plant.router.cancel(request, "decode", "test")
    story.until(60.0)
    asked = [event.t for event in story.of(Requested, node="D0", route="POST /query_dp_ranks")]
    assert 3.0 + 20.0 - 1.0 < max(asked) < 3.0 + 20.0 + 1.0
    assert "R3" not in story.world.watch.counts
    (rank,) = plant.decode[0].ranks.values()
    assert not rank.finder._unanswered
