"""The bootstrap server over HTTP: what it answers, when it does not, and what it forgets."""

from __future__ import annotations

from typing import Any

import pytest
from sim_stage import PROTOCOL, Played, Stage

from kvpoll.sim.bootstrap import BootstrapServer
from kvpoll.spec.trace import (
    Addressed,
    Admitted,
    Answered,
    HealthReported,
    NodeStarted,
    NodeStopped,
    Requested,
    Resulted,
)
from kvpoll.statemachine.dp_rank import entry_key

HTTP_S = 0.002
NODE = "P0"


class Client:
    """A server of a world without a cluster, and the answers of everything asked of it."""

    def __init__(self, **rules: Any) -> None:
        self.stage = Stage(**rules)
        self.server = BootstrapServer(self.stage.world, "B0")
        self.answers: list[tuple[float, int | str, Any]] = []

    def ask(self, route: str, detail: Any = None, seconds: float = 10.0) -> tuple[int | str, Any]:
        """Ask, wait, and return status and body of the one answer."""
        before = len(self.answers)
        self.send(route, detail)
        self.wait(seconds)
        (answer,) = self.answers[before:]
        return answer[1], answer[2]

    def send(self, route: str, detail: Any = None) -> None:
        self.server.request(NODE, route, detail, 0, self._reply)

    def wait(self, seconds: float) -> None:
        self.stage.until(self.stage.world.now + seconds)

    def put(self, rank: str, expected: int = 2, epoch: int = 0) -> tuple[int | str, Any]:
        return self.ask("PUT /route", (rank, epoch, expected))

    def _reply(self, status: int | str, body: Any) -> None:
        self.answers.append((self.stage.world.now, status, body))


@pytest.fixture
def client() -> Client:
    client = Client()
    client.server.start()
    return client


def test_it_is_ready_when_every_expected_rank_is_there(client: Client) -> None:
    assert client.ask("GET /route") == (503, None)
    assert client.put("P0/tp0") == (200, None)
    assert client.ask("GET /route") == (503, None)
    assert client.put("P0/tp1", epoch=3) == (200, None)
    assert client.ask("GET /route") == (200, {"P0/tp0": 0, "P0/tp1": 3})
    assert client.ask("GET /route", "P0/tp1") == (200, {"P0/tp0": 0, "P0/tp1": 3})
    assert client.ask("GET /route", "P0/tp7") == (404, None)
    assert [(event.healthy, event.able) for event in client.stage.of(HealthReported)] == [(True, True)]


def test_a_rank_that_leaves_is_not_listed(client: Client) -> None:
    assert client.ask("DELETE /route", ("P0/tp0", 0)) == (404, None)
    client.put("P0/tp0")
    client.put("P0/tp1", epoch=1)
    assert client.ask("DELETE /route", ("P0/tp1", 0)) == (409, None)
    assert client.ask("DELETE /route", ("P0/tp1", 1)) == (200, None)
    assert client.ask("GET /route") == (503, None)


def test_a_rank_that_registers_again_counts_once_and_the_newest_life_is_listed(client: Client) -> None:
    client.put("P0/tp0")
    client.put("P0/tp0", epoch=1)
    assert client.ask("GET /route") == (503, None)
    client.put("P0/tp1")
    client.put("P0/tp0", epoch=0)  # a late message of its first life
    assert client.ask("GET /route", "P0/tp0") == (200, {"P0/tp0": 1, "P0/tp1": 0})


def test_counting_puts_it_is_ready_without_a_rank() -> None:
    """C1: and says so, which is what O2 sees."""
    client = Client(ready_means="count_of_puts")
    client.server.start()
    client.put("P0/tp0")
    client.put("P0/tp0")
    assert client.ask("GET /route") == (200, {"P0/tp0": 0})
    assert client.ask("GET /route", "P0/tp1") == (404, None)
    assert [(event.healthy, event.able) for event in client.stage.of(HealthReported)] == [(True, False)]


def test_an_answer_takes_a_round_trip(client: Client) -> None:
    client.ask("GET /route")
    latency_s = client.stage.world.topology.latency_s
    assert HTTP_S + latency_s <= client.answers[0][0] <= HTTP_S + 2 * latency_s
    (asked,), (answered,) = client.stage.of(Requested), client.stage.of(Answered)
    assert (asked.node, asked.server, asked.route, asked.repeat) == (NODE, "B0", "GET /route", 0)
    assert (answered.node, answered.server, answered.route, answered.status) == (NODE, "B0", "GET /route", 503)


def test_nobody_listens_before_it_is_started_and_after_it_is_stopped() -> None:
    client = Client()
    assert client.ask("GET /route") == ("refused", None)
    client.server.start()
    client.server.start()
    assert client.ask("GET /route") == (503, None)
    client.server.stop()
    client.server.stop()
    assert client.ask("GET /route") == ("refused", None)
    assert [event.epoch for event in client.stage.of(NodeStarted)] == [0]
    assert [event.epoch for event in client.stage.of(NodeStopped)] == [0]


def test_it_dies_with_a_request_in_its_hands(client: Client) -> None:
    client.server.slow_s = 1.0
    client.send("PUT /route", ("P0/tp0", 0, 1))
    client.wait(0.5)
    client.server.stop()
    client.server.start()
    client.wait(10)
    assert [status for _, status, _ in client.answers] == ["refused"]
    assert client.server.registry.ranks == ()


def test_across_a_partition_the_client_waits_for_its_timeout(client: Client) -> None:
    client.stage.world.network.severed.append(("B0", "P0"))
    assert client.ask("GET /route") == ("timeout", None)
    assert client.answers[0][0] == 5.0


def test_a_slow_server_is_slow(client: Client) -> None:
    client.server.slow_s = 2.0
    assert client.ask("GET /route") == (503, None)
    assert 2.0 < client.answers[0][0] < 2.01


def test_a_server_slower_than_the_timeout_does_what_nobody_hears_of(client: Client) -> None:
    """vllm#42199: the registration was applied although the client had given up."""
    client.server.slow_s = 7.0
    assert client.put("P0/tp0", expected=1) == ("timeout", None)
    assert client.answers[0][0] == 5.0
    client.server.slow_s = 0.0
    assert client.ask("GET /route") == (200, {"P0/tp0": 0})
    assert client.stage.world.marks["request_applied_unheard"] == 1


def test_what_nobody_hears_of_dies_with_the_server(client: Client) -> None:
    """A request is in the hands of one life of the process; the next one has never seen it."""
    client.server.slow_s = 7.0
    client.send("PUT /route", ("P0/tp0", 0, 1))
    client.wait(6.0)
    client.server.stop()
    client.server.start()
    client.wait(10.0)
    assert client.server.registry.ranks == ()
    assert "request_applied_unheard" not in client.stage.world.marks


def test_a_share_of_answers_is_500_and_those_change_nothing(client: Client) -> None:
    client.server.error_share = 1.0
    assert client.put("P0/tp0", expected=1) == (500, None)
    client.server.error_share = 0.0
    assert client.ask("GET /route") == (503, None)
    client.server.error_share = 0.5
    statuses = [client.ask("GET /route")[0] for _ in range(100)]
    assert set(statuses) == {500, 503}
    assert 30 < statuses.count(500) < 70
    assert client.stage.world.marks["http_error"] == 1 + statuses.count(500)


@pytest.mark.parametrize("amnesia", [True, False])
def test_a_new_process_remembers_or_not(client: Client, amnesia: bool) -> None:
    client.put("P0/tp0", expected=1)
    client.ask("POST /register_dp_rank", (17, 3))
    client.server.stop()
    client.server.start(amnesia)
    assert client.server.epoch == client.stage.world.epochs["B0"] == 1
    assert client.ask("GET /route")[0] == (503 if amnesia else 200)
    assert len(client.server.dp_entries) == (0 if amnesia else 1)


def dp_ranks(client: Client, *rooms: int) -> Any:
    status, body = client.ask("POST /query_dp_ranks", rooms)
    assert status == 200
    return body


def test_it_says_where_a_room_runs_until_the_entry_expires(client: Client) -> None:
    """PROTOCOL 6: entries are cleaned up after dp_entry_timeout_s, whether somebody asked or not."""
    assert dp_ranks(client, 17) == {}
    assert client.ask("POST /register_dp_rank", (17, 3)) == (200, None)
    assert client.ask("POST /register_dp_rank", (18, 1)) == (200, None)
    assert dp_ranks(client, 17, 18, 19) == {17: 3, 18: 1}
    client.wait(200.0)
    client.ask("POST /register_dp_rank", (17, 2))  # the room is used again: a new entry, a new time
    client.wait(20.0)
    assert dp_ranks(client, 17, 18) == {17: 2}
    client.wait(240.0)
    assert dp_ranks(client, 17) == {}
    assert client.server.dp_entries == {}


def test_entries_of_a_former_life_expire_nobody() -> None:
    client = Client(dp_entry_timeout_s=50)
    client.server.start()
    client.ask("POST /register_dp_rank", (17, 3))
    client.server.stop()
    client.server.start()
    client.ask("POST /register_dp_rank", (17, 2))
    client.wait(35.0)
    assert dp_ranks(client, 17) == {17: 2}


@pytest.mark.parametrize("down_s", [10.0, 300.0])
def test_entries_that_a_standby_takes_over_expire_in_their_own_time(client: Client, down_s: float) -> None:
    """R1, swarm seed 13 of sglang-21299: a server that came back with its tables kept every entry of them for ever."""
    client.ask("POST /register_dp_rank", (17, 3))
    client.server.stop()
    client.wait(down_s)
    client.server.start(amnesia=False)
    assert dp_ranks(client, 17) == ({17: 3} if down_s < 240 else {})
    client.wait(240.0)
    assert client.server.dp_entries == {}


def test_a_room_that_runs_on_the_same_rank_again_and_again_is_known_from_the_last_time_on(client: Client) -> None:
    """Entries were told apart as objects; equal steps give the same object, so an old timer took a new entry away."""
    for _ in range(3):
        client.ask("POST /register_dp_rank", (17, 3))
        client.wait(100.0)
    client.wait(60.0)
    assert dp_ranks(client, 17) == {17: 3}
    client.wait(100.0)
    assert client.server.dp_entries == {}


# -- whole runs in which the server is the trouble

BALANCED = """
[topology]
load_balance = "total_requests"
[topology.prefill]
count = {count}
dp = 2
[topology.decode]
tp = 2
[timing]
hostile_s = 15
[workload]
"""


def most_in_a_second(times: list[float]) -> int:
    return max(sum(first <= t < first + 1.0 for t in times) for first in times)


@pytest.mark.parametrize("count", [1, 6])
def test_rooms_that_nobody_knows_are_asked_for_together(count: int) -> None:
    """R3, swarm seed 6 of sglang-21299: after seven seconds without a server 36 registrations were lost, and every
    decode rank asked for each of the 36 rooms by itself, five times a second.
    """
    late = "\n".join(f'[[fault]]\nkind = "bootstrap_late"\ntarget = "B{n}"\nfor_s = 7' for n in range(count))
    arrivals = 'kind = "poisson"\nrate_per_s = 8\ninput_tokens = 4000\noutput_tokens = 16\nuntil_s = 5\n'
    run = Played(BALANCED.format(count=count) + arrivals + late)
    assert run.outcome.violations == {}
    for node in ("D0/tp0", "D0/tp1"):
        asked = run.of(Requested, node=node, route="POST /query_dp_ranks")
        again = [event.t for event in asked if event.repeat]
        assert {event.server for event in asked if event.repeat} == {f"B{n}" for n in range(count)}
        assert 5 <= most_in_a_second(again) <= 6
        assert most_in_a_second([event.t for event in asked if not event.repeat]) <= 12


REUSED = (
    BALANCED.format(count=1)
    + """
kind = "requests"
requests = [
  { at_s = 1.0, input_tokens = 4000, output_tokens = 16 },
  { at_s = 5.0, input_tokens = 4000, output_tokens = 16 },
]
[[fault]]
kind = "room_reuse"
share = 1.0
[[fault]]
kind = "dp_override"
at_s = 4
for_s = 2
[[fault]]
kind = "bootstrap_error"
target = "B0"
at_s = 4
for_s = 2
share = 1.0
"""
)


def test_a_reused_room_never_finds_the_dp_rank_of_the_request_before_it() -> None:
    """S6, swarm seed 9 of sglang-21299: entries were filed under the room number, so when the registration of the
    room's second request was lost, decode sent its pages to the rank of the first.
    """
    run = Played(REUSED)
    first, second = (event for event in run.of(Admitted) if event.rid in ("r0", "r1"))
    assert first.pair[0] == second.pair[0] and first.prefill != second.prefill
    assert {event.peer for event in run.of(Addressed) if event.incarnation.pair == first.pair} == {*first.prefill}
    assert [event.peer for event in run.of(Addressed) if event.incarnation.pair == second.pair] == []
    assert "S6" not in run.outcome.violations
    assert run.of(Requested, node="D0/tp0", route="POST /query_dp_ranks", repeat=20) != []


def test_under_the_bare_room_number_two_requests_share_one_entry() -> None:
    """What SGLang's server does, and its profiles with it."""
    assert entry_key(PROTOCOL.profile("reference"), (7, 1)) == (7, 1)
    assert entry_key(PROTOCOL.profile("sglang-0.5.23"), (7, 1)) == 7


def test_decode_asks_for_longer_than_the_slowest_rank_takes_to_register() -> None:
    """L4, swarm seed 21 of sglang-21299: a rank out of attempts registered every 30 s, decode gave up after 14 s."""
    reference = PROTOCOL.profile("reference")
    slowest_s = reference.number("register_slow_retry_s") + reference.number("http_timeout_s")
    patience_s = (reference.number("topology_attempts") - 1) * reference.number("topology_retry_s")
    assert slowest_s < patience_s < PROTOCOL.bounds.recover_s


OUTAGE = """
[topology.prefill]
tp = 4
[workload]
kind = "requests"
requests = [{ at_s = 1.0, input_tokens = 4000, output_tokens = 16 }]
[timing]
hostile_s = 16
grace_s = 0
[[fault]]
kind = "bootstrap_late"
target = "B0"
for_s = 16
"""


def test_a_request_that_comes_with_the_heal_is_served_by_ranks_that_had_given_up() -> None:
    """L4, swarm seeds 0 and 21 of sglang-21299: whoever came after an outage was told topology_503 before the ranks
    had registered; the longer patience did not help while a request from within the outage had used it up for all.
    """
    run = Played(OUTAGE)
    assert run.outcome.violations == {}
    answers = {event.rid: (event.ok, event.cause) for event in run.of(Resulted)}
    assert answers.pop("r0") == (False, "topology_503")  # it came before the heal and asked 40 times
    assert [ok for ok, _ in answers.values()] == [True] * 4
    assert len(run.of(HealthReported, node="P0", healthy=False)) >= 4


@pytest.mark.parametrize("rules", [{"topology_attempts": 15}, {"topology_patience": "shared"}])
def test_with_less_patience_it_is_told_topology_503(rules: dict[str, Any]) -> None:
    run = Played(OUTAGE, **rules)
    assert run.outcome.violations.keys() == {"L4"}
    assert {event.cause for event in run.of(Resulted) if event.rid != "r0"} == {"topology_503"}


def test_asking_again_for_a_route_that_was_refused_is_a_repeat() -> None:
    """R3 could not see these: a route of a former life was asked for every second, each time as if for the first."""
    stage = Stage()
    cluster = stage.cluster()
    (detector,) = (each for each in cluster.decode[0].detectors if each.target == "P0")
    detector.state = detector.state._replace(epoch=1)  # a life that the server has not heard of
    cluster.router.submit("r0", 1000, 10)
    stage.until(4.5)
    assert stage.world.marks["stale_route_refused"] == 4
    asked = [(round(event.t), event.repeat) for event in stage.of(Requested, node="D0", route="GET /route")]
    assert asked == [(1, 0), (1, 0), (2, 1), (3, 2), (4, 3)]  # the topology, and then the route
