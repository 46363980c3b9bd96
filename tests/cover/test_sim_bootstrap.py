"""The bootstrap server over HTTP: what it answers, when it does not, and what it forgets."""

from __future__ import annotations

from typing import Any

import pytest
from sim_stage import Stage

from kvpoll.sim.bootstrap import BootstrapServer
from kvpoll.spec.trace import Answered, HealthReported, NodeStarted, NodeStopped, Requested

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
