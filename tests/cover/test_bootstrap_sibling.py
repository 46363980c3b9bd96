"""The real server and the simulated one are siblings: asked the same in the same order, they say the same."""

from __future__ import annotations

from typing import Any

import pytest
from bootstrap_stage import PROTOCOL, ask, leave, put, rank, route, server
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_stage import Stage

from kvpoll.runtime.bootstrap import BootstrapServer
from kvpoll.sim.bootstrap import BootstrapServer as SimulatedServer
from kvpoll.statemachine.dp_rank import entry_key

SIZE = 3
TP = st.integers(0, SIZE - 1)
PAIR = st.tuples(st.integers(1, 2), st.integers(0, 1))
CALLS = st.lists(
    st.tuples(st.just("put"), TP, st.integers(0, 2))
    | st.tuples(st.just("leave"), TP, st.integers(0, 2))
    | st.tuples(st.just("engine"))
    | st.tuples(st.just("rank"), st.integers(0, SIZE))
    | st.tuples(st.just("enter"), PAIR, st.integers(0, 3))
    | st.tuples(st.just("query"), st.lists(PAIR, max_size=3)),
    max_size=12,
)
Call = tuple[Any, ...]


class Simulated:
    """The server of a world without a cluster."""

    def __init__(self, profile: str) -> None:
        self.stage = Stage(profile=profile)
        self.server = SimulatedServer(self.stage.world, "B0")
        self.server.start()

    def ask(self, call: Call) -> tuple[Any, Any]:
        answers: list[tuple[Any, Any]] = []
        path, detail = self._request(call)
        self.server.request("P0", path, detail, 0, lambda status, body: answers.append((status, body)))
        self.stage.until(self.stage.world.now + 1.0)
        ((status, body),) = answers
        if call[0] == "rank":
            body = body[f"tp{call[1]}"] if status == 200 else None
        return status, body if call[0] in ("rank", "query") else None

    def _request(self, call: Call) -> tuple[str, Any]:
        profile = self.stage.world.profile
        match call:
            case ("put", tp, epoch):
                return "PUT /route", (f"tp{tp}", epoch, SIZE)
            case ("leave", tp, epoch):
                return "DELETE /route", (f"tp{tp}", epoch)
            case ("rank", tp):
                return "GET /route", f"tp{tp}"
            case ("enter", pair, dp_rank):
                return "POST /register_dp_rank", (entry_key(profile, pair), dp_rank)
            case ("query", pairs):
                return "POST /query_dp_ranks", tuple(entry_key(profile, pair) for pair in pairs)
        return "GET /route", None


class Real:
    """The server behind a socket, asked in the words of its API."""

    def __init__(self, target: BootstrapServer) -> None:
        self.target = target

    def ask(self, call: Call) -> tuple[Any, Any]:
        target = self.target
        match call:
            case ("put", tp, epoch):
                return put(target, rank(tp, SIZE, process_epoch=epoch)).status_code, None
            case ("leave", tp, epoch):
                return leave(target, tp, epoch).status_code, None
            case ("rank", tp):
                answer = route(target, tp)
                return answer.status_code, answer.json().get("process_epoch")
            case ("enter", (room, attempt), dp_rank):
                body = {"bootstrap_room": room, "attempt": attempt, "dp_rank": dp_rank}
                return ask(target, "POST", "/register_dp_rank", json=body).status_code, None
            case ("query", pairs):
                rooms, attempts = [room for room, _ in pairs], [attempt for _, attempt in pairs]
                answer = ask(target, "POST", "/query_dp_ranks", json={"bootstrap_rooms": rooms, "attempts": attempts})
                return answer.status_code, {self._key(name): dp_rank for name, dp_rank in answer.json().items()}
        return route(target).status_code, None

    def _key(self, name: str) -> Any:
        room, _, attempt = name.partition("/")
        return entry_key(self.target.profile, (int(room), int(attempt)))


@pytest.mark.parametrize("profile", ["reference", "sglang-0.5.23"])
@settings(max_examples=40)
@given(calls=CALLS)
def test_both_say_the_same(profile: str, calls: list[Call]) -> None:
    """One difference is meant: a late PUT of an older life is passed over in silence there, and refused with 409 here.

    There it still counts as a PUT, which only a count of PUTs notices; so under that rule lives do not go back here.
    """
    simulated = Simulated(profile)
    counts = simulated.stage.world.profile["ready_means"] == "count_of_puts"
    newest: dict[int, int] = {}
    with server(PROTOCOL.profile(profile)) as target:
        real = Real(target)
        for call in calls:
            if call[0] == "put":
                late = newest.get(call[1], 0) > call[2]
                if late and counts:
                    continue
                newest[call[1]] = max(newest.get(call[1], 0), call[2])
                assert simulated.ask(call)[0] == 200
                assert real.ask(call)[0] == (409 if late else 200)
            else:
                answer = real.ask(call)
                assert answer == simulated.ask(call)
                if call[0] == "leave" and answer[0] == 200:
                    del newest[call[1]]
        assert target.table.registry.state == simulated.server.registry.state
        lives = {place.tp: dict(target.table.registry.ranks)[place.name] for place in target.table._rows}
        assert lives == {int(name.removeprefix("tp")): epoch for name, epoch in simulated.server.registry.ranks}
