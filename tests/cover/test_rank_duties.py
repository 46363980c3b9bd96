"""What a rank decides with an answer of its host: memory that does not fit, writes to end or to refuse, leaving."""

from __future__ import annotations

from typing import Any

import pytest
from sim_stage import A, Stage, shape

from kvpoll.sim.topology import Topology
from kvpoll.spec.trace import Answered, Fenced, HealthReported, Released, Requested, Sent, Stepped
from kvpoll.statemachine.ranks.engine import EngineShape
from kvpoll.statemachine.ranks.host import Destination, Request
from kvpoll.statemachine.ranks.prefill import Work

PAGES = 4


class Scene(Stage):
    """A cluster whose host gives these answers, and one request that its ranks are told of by hand."""

    def __init__(self, profile: str = "reference", problem: str | None = None, refuses: bool = False, **rules: Any):
        super().__init__(
            Topology(prefill=EngineShape(kv_pages=64), decode=EngineShape(kv_pages=64)), 0, profile, **rules
        )
        self.explained: list[str] = []
        self.abandoned: list[Any] = []
        self.refused: list[Any] = []
        world: Any = self.world
        world.problem = lambda destination: problem
        world.explain = lambda own, reason: self.explained.append(reason)
        world.abandon = self.abandoned.append
        world.refuse = lambda own: bool(self.refused.append(own)) or refuses
        cluster = self.cluster()
        self.prefill: Any = cluster.rank("P0")
        self.decode: Any = cluster.rank("D0")
        tokens = PAGES * self.world.topology.page_tokens
        self.request = Request("r0", A.pair, 1.0, tokens, 4, 0, 0, 0, 0)

    def open(self) -> None:
        self.prefill._open(self.request)

    def publish(self, count: int = PAGES) -> None:
        """Decode's metadata arrives, with so many pages."""
        self.prefill.receive("Metadata", A, Destination("D0", A, 0, tuple(range(count)), 0), 1)

    def seen(self) -> tuple[str, str | None]:
        """Poll and cause of the room on prefill; the scheduler clears it soon after its end."""
        steps = [step for step in self.of(Stepped, node="P0") if step.poll_after not in ("Retired", "Absent")]
        return steps[-1].poll_after, steps[-1].cause

    def expose(self) -> None:
        """Decode's pages are known to prefill; then the client leaves."""
        self.decode._open(self.request)
        self.until(self.world.now + 0.5)
        assert self.decode.rooms[A.room].local.lease == "Exposed"
        self.world.network.severed.append(("P0", "D0"))
        self.decode.deliver("AbortRequested", A, "client_left")


@pytest.mark.parametrize("profile", ["reference", "sglang-0.5.23"])
@pytest.mark.parametrize("is_early", [False, True])
def test_memory_that_cannot_be_written_to_fails_the_request_at_once(profile: str, is_early: bool) -> None:
    """Whether decode's pages come before the request or after it: long before a page of KV is computed."""
    scene = Scene(profile, problem="number of KV heads differs")
    if is_early:
        scene.publish()
        assert scene.explained == []
        scene.open()
    else:
        scene.open()
        assert scene.seen()[0] == "Bootstrapping"
        scene.publish()
    assert scene.seen() == ("Failed", "layout_mismatch")
    assert scene.explained == ["number of KV heads differs"]


def test_what_gets_no_bytes_needs_no_memory() -> None:
    scene = Scene(problem="no such memory")
    scene.open()
    scene.publish(0)
    assert scene.seen() == ("WaitingForInput", None) and scene.explained == []


def compute(scene: Scene, *chunks: int) -> None:
    """Prefill computes the prompt in chunks of so many pages."""
    entry = scene.prefill.entries["r0"]
    entry.state = entry.state._replace(state="Waiting")
    scene.prefill._reserve(entry)
    first = 0
    for chunk in chunks:
        tokens = chunk * scene.world.topology.page_tokens
        scene.prefill._send_chunk(entry, Work("r0", first, tokens, first + tokens == scene.request.input_tokens))
        first += tokens


@pytest.mark.parametrize(
    ("published", "chunks", "told"),
    [
        (PAGES, (3, 1), None),
        (PAGES - 1, (2, 2), "prefill has 4 pages, decode published 3"),
        (PAGES - 2, (3, 1), "prefill has 3 pages or more, decode published 2"),
        (PAGES + 1, (3, 1), "prefill has 4 pages, decode published 5"),
    ],
)
def test_a_prompt_of_another_length_than_decode_has_published_fails(
    published: int, chunks: tuple[int, ...], told: str | None
) -> None:
    """A08: SGLang hands a shortened prompt off, and decode believes the pages that nobody has filled."""
    scene = Scene()
    scene.open()
    scene.publish(published)
    compute(scene, *chunks)
    scene.until(scene.world.now + 0.5)
    if told is None:
        assert scene.seen() == ("Success", None)
    else:
        assert scene.seen() == ("Failed", "page_count_mismatch") and scene.explained == [told]
    unchecked = Scene("sglang-0.5.23")
    unchecked.open()
    unchecked.publish(published)
    compute(unchecked, *chunks)
    unchecked.until(unchecked.world.now + 0.5)
    assert unchecked.seen() == ("Success", None) and unchecked.explained == []


def test_the_writes_of_a_failed_request_are_given_up_once() -> None:
    scene = Scene()
    scene.open()
    scene.publish()
    compute(scene, 3)
    assert scene.abandoned == []
    scene.prefill.deliver("AbortRequested", A, "client_left")
    scene.prefill.deliver("AbortRequested", A, "again")
    assert scene.abandoned == [A]
    left = Scene(failed_writes="left")
    left.open()
    left.publish()
    compute(left, 3)
    left.prefill.deliver("AbortRequested", A, "client_left")
    assert left.seen() == ("Failed", "client_left") and left.abandoned == []


# -- the fence


def test_a_fence_frees_the_pages_without_a_word_of_their_writer() -> None:
    scene = Scene(refuses=True)
    scene.expose()
    began_s = scene.world.now
    scene.until(began_s + 1.0)
    assert scene.refused == [A]
    ((fence,), (released,)) = scene.of(Fenced), scene.of(Released, node="D0", pool="kv")
    assert fence == Fenced(pytest.approx(began_s + 0.1), "D0", A) and released.t == fence.t
    assert "pages_quarantined" not in scene.world.marks


def test_who_cannot_refuse_waits_for_proof_and_tries_again() -> None:
    scene = Scene(drain_timeout_s=2)
    scene.expose()
    scene.until(scene.world.now + 5.0)
    assert scene.refused == [A, A, A]
    assert scene.of(Fenced) == scene.of(Released, node="D0", pool="kv") == []
    assert scene.decode.rooms[A.room].local.lease == "Quarantined"
    scene.decode.receive("AbortAck", A, 0)
    scene.until(scene.world.now + 5.0)
    assert scene.refused == [A, A, A] and scene.of(Released, node="D0", pool="kv")


def test_a_writer_that_acknowledges_in_time_is_not_refused() -> None:
    scene = Scene(refuses=True)
    scene.expose()
    scene.decode.receive("AbortAck", A, 0)
    scene.until(scene.world.now + 1.0)
    assert scene.refused == [] and scene.of(Fenced) == []


@pytest.mark.parametrize("rule", ["never", "proof_or_timeout"])
def test_where_pages_go_without_proof_nobody_asks_for_one(rule: str) -> None:
    scene = Scene(refuses=True, release_requires_quiescence=rule)
    scene.expose()
    scene.until(scene.world.now + 1.0)
    assert scene.refused == []


# -- leaving


def test_a_rank_leaves_and_its_requests_go_on() -> None:
    scene = Scene()
    scene.open()
    told: list[float] = []
    began_s = scene.world.now
    scene.prefill.leave(lambda: told.append(scene.world.now))
    scene.until(began_s + 0.5)
    assert scene.prefill.registration.state == "Left" and len(told) == 1 and told[0] > began_s
    (answer,) = scene.of(Answered, node="P0", route="DELETE /route")
    assert answer.status == 200
    assert [(each.healthy, each.able) for each in scene.of(HealthReported, node="P0")][-1] == (False, False)
    scene.publish()
    compute(scene, PAGES)
    scene.until(scene.world.now + 0.5)
    assert scene.seen() == ("Success", None)
    scene.prefill.leave(lambda: told.append(scene.world.now))
    assert len(told) == 2 and len(scene.of(Requested, route="DELETE /route")) == 1


def test_a_rank_that_has_left_stays_away_when_the_server_is_restarted() -> None:
    """Its answer was lost with the server; the new one does not know the rank, and is not told of it."""
    scene = Scene()
    cluster = scene.world.cluster
    server = cluster.server_of("P0")
    server.stop()
    scene.prefill.leave()
    scene.until(scene.world.now + 1.0)
    assert scene.prefill.registration.state == "Left"
    server.start()
    scene.until(scene.world.now + 60.0)
    assert scene.prefill.registration.state == "Left" and server.registry.ranks == ()


def test_a_rank_whose_loop_has_ended_can_leave_and_one_whose_process_has_ended_has_nothing_to_wait_for() -> None:
    scene = Scene("sglang-0.5.23")
    scene.prefill.stop_loop("illegal fact")
    told: list[str] = []
    scene.prefill.leave(lambda: told.append("left"))
    scene.until(scene.world.now + 1.0)
    assert told == ["left"] and len(scene.of(Requested, route="DELETE /route")) == 1
    scene.prefill.over = True
    scene.prefill.leave(lambda: told.append("over"))
    assert told == ["left", "over"]


# -- a dead sibling


def test_a_dead_prefill_rank_is_told_to_its_living_siblings_in_the_same_moment() -> None:
    """Both stages write to one decode rank. The living one used to hear of it drain_timeout_s later (L2)."""
    stage = Stage(Topology(prefill=shape(pp=2, kv_pages=64), decode=shape(kv_pages=64)))
    cluster: Any = stage.cluster()
    request = Request("r0", A.pair, 1.0, 2048, 4, 0, 0, 0, 0)
    for node in ("P0/pp0", "P0/pp1", "D0"):
        cluster.rank(node)._open(request)
    while len(stage.of(Stepped, role="sender", poll_after="WaitingForInput")) < 2:
        stage.until(stage.world.now + 0.0005)
    died_s = stage.world.now
    cluster.rank("D0").bury("P0/pp0", 1)
    assert "P0/pp1" in {event.to for event in stage.of(Sent, node="D0", message="Abort", t=died_s)}
    stage.until(died_s + 0.1)
    (failed,) = stage.of(Stepped, node="P0/pp1", poll_after="Failed", poll_before="WaitingForInput")
    assert failed.cause == "aborted_by_decode"
    released = stage.of(Released, node="D0", pool="kv")
    assert len(released) == 1, "one rank is dead, and the other has acknowledged"
