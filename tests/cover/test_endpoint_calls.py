"""What an engine may call and when, and what it is told: both ends of a transfer in one process."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from endpoint_stage import LIMIT_S, SOON, Stage, fill, over, same_bytes, until

from kvpoll.runtime import DecodeEndpoint, KVPoll, PrefillTransfer, Settings, TransferError
from kvpoll.runtime.control import messages as wire
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import Stepped


@pytest.fixture(scope="module")
def stage() -> Any:
    with Stage() as made:
        yield made


def test_a_request_from_admission_to_release(stage: Stage) -> None:
    """Prompt pages 7, 8, 9 go to 21, 20, 22 in two chunks; decode finds every byte and the aux row."""
    polls: list[tuple[str, KVPoll]] = []
    source = stage.prefill.admit(70, on_poll=lambda end, poll: polls.append(("prefill", poll)))
    target = stage.decode.admit(70, stage.address, on_poll=lambda end, poll: polls.append(("decode", poll)))
    assert source.pages_free and target.pages_free and not target.is_over
    assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    assert target.publish([21, 20, 22], row=3)
    assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    assert target.aux() is None, "nothing is said before Success"
    fill(stage.prefill, (7, 8, 9), 70)
    assert source.send([7, 8])
    assert not source.pages_free and source.pages_held() == 2
    assert source.send([9], last=True, first_token=1234, prompt_tokens=11, cached_tokens=2)
    assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
    assert same_bytes(stage, (7, 8, 9), (21, 20, 22))
    said = target.aux()
    assert said is not None
    assert (said.pair, said.first_token, said.prompt_tokens, said.cached_tokens, said.pages) == (
        (70, 0),
        1234,
        11,
        2,
        3,
    )
    assert source.wait_pages_free(LIMIT_S), "prefill's pages are free with Success"
    target.commit()
    target.commit()
    assert not target.pages_free, "decode's are the engine's until it releases them"
    assert (source.failure, target.failure) == (None, None)
    over(source, target)
    assert [poll for side, poll in polls if side == "prefill"] == [2, 3, 4]
    assert [poll for side, poll in polls if side == "decode"] == [2, 4]


def test_calls_that_cannot_mean_anything_are_refused_and_change_nothing(stage: Stage) -> None:
    source = stage.prefill.admit(80)
    with pytest.raises(TransferError, match="Bootstrapping; wait until"):
        source.send([1])
    target = stage.decode.admit(80, stage.address)
    assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    with pytest.raises(TransferError, match="is WaitingForInput; its pages are whole"):
        target.commit()
    for pages, row, says in (
        ([], 0, "no pages"), ([1, 1], 0, "page 1 is given twice"), ([64], 0, "page 64 is outside the pool of 64"),
        ([-1], 0, "page -1 is outside"), ([1], 8, "row 8 is outside the pool of 8 rows"),
    ):  # fmt: skip
        with pytest.raises(TransferError, match=says):
            target.publish(pages, row)
    assert target.pages_free, "a refused call takes nothing"
    target.publish([1, 2], 0)
    with pytest.raises(TransferError, match="published already"):
        target.publish([3], 1)
    assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    with pytest.raises(TransferError, match="no pages of 80/0"):
        source.send([])
    with pytest.raises(TransferError, match="go with the last pages"):
        source.send([1], first_token=3)
    with pytest.raises(TransferError, match="above 64 bits"):
        source.send([1], last=True, prompt_tokens=-1)
    source.send([1])
    with pytest.raises(TransferError, match="page 1 was given to 80/0 before"):
        source.send([1, 2], last=True)
    source.send([2], last=True)
    with pytest.raises(TransferError, match="has sent its last pages"):
        source.send([3])
    assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
    over(source, target)
    with pytest.raises(TransferError, match="was given up before"):
        target.commit()


def test_memory_is_one_transfers_at_a_time(stage: Stage) -> None:
    source, target = stage.ready((10, 11), row=1)
    other = stage.decode.admit(90, stage.address)
    gone = stage.decode.admit(91, stage.address)
    gone.release()
    with pytest.raises(TransferError, match="91/0 was released"):
        gone.publish([40], 3)
    assert other.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    with pytest.raises(TransferError, match="page 11 is still held by room"):
        other.publish([11], 2)
    with pytest.raises(TransferError, match="row 1 is still held by room"):
        other.publish([12], 1)
    source.send([0, 1], last=True)
    assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
    with pytest.raises(TransferError, match="page 11 is still held"):
        other.publish([11], 1)
    over(source, target)
    assert other.publish([11], 1), "and now it is free"
    over(other)


def test_rooms_and_attempts(stage: Stage) -> None:
    with pytest.raises(TransferError, match="rooms are from 1"):
        stage.prefill.admit(0)
    with pytest.raises(TransferError, match="attempts from 0"):
        stage.prefill.admit(1, attempt=-1)
    with pytest.raises(BadInput, match="nowhere"):
        stage.decode.admit(1, "nowhere")
    source, target = stage.ready(room=95)
    with pytest.raises(TransferError, match="room 95 is in use"):
        stage.prefill.admit(95)
    rivals = stage.admit(95, attempt=1)
    for rival in rivals:
        assert rival.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert rival.failure == "room_in_use", "another attempt of a live room is refused (A22)"
    over(*rivals)
    source.send([3, 4], last=True)
    assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
    over(source, target)
    stage.served(room=95, attempt=2)
    late = stage.prefill.admit(95, attempt=2)
    assert late.wait(timeout_s=LIMIT_S) == KVPoll.Failed and late.failure == "room_in_use", "that one is over"
    over(late)


def test_decode_is_quicker_with_the_next_attempt_than_prefill_with_clearing_the_last(stage: Stage) -> None:
    """Prefill's engine has not released attempt 0 when decode publishes attempt 1: that is kept, not dropped."""
    source, target = stage.ready(room=96)
    source.send([0, 1], last=True)
    assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
    over(target)
    gone = stage.decode.admit(96, stage.address, attempt=1)
    assert gone.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    gone.publish([2], 1)
    heir = stage.decode.admit(97, stage.address)
    until(lambda: stage.prefill.sender._early_count == 1, "prefill having heard of attempt 1")
    over(source)
    again = stage.prefill.admit(96, attempt=1)
    assert again.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    again.send([2], last=True)
    assert gone.wait(timeout_s=LIMIT_S) == KVPoll.Success
    over(again, gone, heir)
    assert stage.prefill.sender._early_count == 0


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("moment", ["Bootstrapping", "WaitingForInput", "Transferring", "Success"])
def test_an_abort_at_every_poll_reaches_the_other_side_with_its_cause(stage: Stage, side: str, moment: str) -> None:
    """The reason that an engine gives is heard by the peer at once: long before any timer, which are 60 s and more."""
    if moment == "Bootstrapping":
        source, target = stage.admit()
        given_up = source if side == "prefill" else target
        given_up.abort("client left: tab closed")
        if side == "decode":
            assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
            source.abort("told by the router")  # nobody has told prefill of a room that decode gave up so early
        else:
            assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) in (KVPoll.WaitingForInput, KVPoll.Failed)
            if target.poll() == KVPoll.WaitingForInput:
                target.publish([30], 2)
    else:
        source, target = stage.ready((30, 31), row=2)
        given_up = source if side == "prefill" else target
        if moment == "WaitingForInput":
            given_up.abort("client left: tab closed")
        elif moment == "Transferring":
            source.send([30])
            given_up.abort("client left: tab closed")
        else:
            source.send([30, 31], last=True)
            assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
            given_up.abort("client left: tab closed")
            if side == "decode":
                with pytest.raises(TransferError, match="was given up before"):
                    target.commit()
    for end in (source, target):
        wanted = KVPoll.Success if moment == "Success" else KVPoll.Failed
        assert end.wait(timeout_s=LIMIT_S) == wanted, end
    if moment not in ("Success", "Bootstrapping"):
        told = target.failure if side == "prefill" else source.failure
        own = source.failure if side == "prefill" else target.failure
        assert own == "client left: tab closed"
        assert told == ("failed_by_prefill: client left: tab closed" if side == "prefill" else "aborted_by_decode")
    if source.poll() == KVPoll.Failed:
        assert not source.send([40], last=True), "of a failed transfer nothing is taken"
    over(source, target)
    assert not stage.prefill._claims and not stage.decode._claims


def test_the_first_cause_stays(stage: Stage) -> None:
    source, target = stage.ready()
    source.abort("first")
    source.abort("second")
    assert source.wait(timeout_s=LIMIT_S) == target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
    target.abort("third")
    over(source, target)
    assert (source.failure, target.failure) == ("first", "failed_by_prefill: first")


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_failure_reaches_the_peer_by_message_before_any_timer(side: str) -> None:
    """Told as an order of events: what fails the peer's room is the news, and no deadline has rung anywhere."""
    with Stage() as stage:
        steps: list[tuple[str, str, str]] = []

        def note(event: Any) -> None:
            if isinstance(event, Stepped) and event.poll_after == "Failed" != event.poll_before:
                steps.append((event.role, event.fact, event.cause or ""))

        source, target = stage.ready()
        stage.prefill.host.emitted.append(note)
        stage.decode.host.emitted.append(note)
        (source if side == "prefill" else target).abort("no more")
        assert source.wait(timeout_s=LIMIT_S) == target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert sorted(steps) == sorted(
            [("sender", "AbortRequested", "no more"), ("receiver", "StatusReceived", "failed_by_prefill")]
            if side == "prefill"
            else [("receiver", "AbortRequested", "no more"), ("sender", "PeerAborted", "aborted_by_decode")]
        )
        over(source, target)


def test_prefill_must_have_as_many_pages_as_decode_published(stage: Stage) -> None:
    """Else decode would succeed with pages that nobody filled."""
    for sent, last, says in (
        ([0], True, "prefill has 1 pages, decode published 2"),
        ([0, 1, 2], False, "3 pages or more"),
    ):
        source, target = stage.ready()
        source.send(sent, last)
        assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert says in (source.failure or "") and says in (target.failure or "")
        over(source, target)


def test_callbacks_that_raise_harm_nobody(stage: Stage) -> None:
    before, seen = stage.prefill.callback_errors, []

    def bad(*arguments: Any) -> None:
        seen.append(threading.current_thread())
        raise RuntimeError("the engine's own mistake")

    source = stage.prefill.admit(200, on_poll=bad, on_pages_free=bad)
    target = stage.decode.admit(200, stage.address)
    assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    target.publish([0], 0)
    assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    source.send([0], last=True)
    assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
    over(source, target)
    assert stage.prefill.callback_errors == before + 4 == before + len(seen)
    assert stage.prefill.health()["ok"] and stage.prefill.health()["defects"] == []
    stage.served()


def test_waiting_in_a_callback_is_refused(stage: Stage) -> None:
    refusals: list[str] = []

    def waits(end: PrefillTransfer, poll: KVPoll) -> None:
        for call in (
            lambda: end.wait(timeout_s=1), lambda: end.wait_pages_free(1), lambda: stage.prefill.drain(1),
            stage.prefill.close, lambda: stage.prefill.wait_registered(1),
        ):  # fmt: skip
            try:
                call()
            except TransferError as error:
                refusals.append(str(error))

    source = stage.prefill.admit(210, on_poll=waits)
    source.abort()
    until(lambda: len(refusals) == 5, "five refusals")
    assert all("in a callback and would wait for itself" in refusal for refusal in refusals)
    over(source)


def test_no_call_waits_for_a_peer_or_for_http(stage: Stage) -> None:
    """The engine's thread goes on while the endpoint's is held: everything that it asks for is only handed over."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(LIMIT_S)

    source, target = stage.ready()
    stage.prefill.do(hold)
    assert held.wait(LIMIT_S)
    more = stage.prefill.admit(220)
    source.send([0, 1], last=True)
    more.abort()
    more.release()
    assert (more.poll(), source.poll()) == (KVPoll.Bootstrapping, KVPoll.WaitingForInput)
    assert stage.prefill.health()["transfers"] == 2 and b"kvpoll_transfers_live" in stage.prefill.metrics.text()
    go.set()
    assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
    over(source, target, more)


def test_asyncio_awaits_polls_and_pages(stage: Stage) -> None:
    async def request(room: int) -> str:
        source = stage.prefill.admit(room)
        target = stage.decode.admit(room, stage.address)
        await target.reached(KVPoll.WaitingForInput)
        target.publish([room % 8], row=room % 8)
        await source.reached(KVPoll.WaitingForInput)
        source.send([room % 8], last=True)
        done = await target.reached(), await source.reached()
        source.release()
        target.release()
        await asyncio.gather(source.pages_returned(), target.pages_returned())
        return "/".join(poll.name for poll in done)

    async def all_of_them() -> list[str]:
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.gather(*(request(room) for room in range(300, 308)))

    assert asyncio.run(all_of_them()) == ["Success/Success"] * 8


def test_a_coroutine_that_was_left_behind_does_not_trouble_the_endpoint(stage: Stage) -> None:
    source = stage.prefill.admit(320)
    loop = asyncio.new_event_loop()
    task = loop.create_task(source.reached(KVPoll.WaitingForInput))
    loop.run_until_complete(asyncio.sleep(0))
    waiting = list(source._waiters)
    assert len(waiting) == 1
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    source._waiters += waiting  # as if the loop had been closed under it
    source.abort()
    assert source.wait(timeout_s=LIMIT_S) == KVPoll.Failed
    over(source)
    assert stage.prefill.health()["defects"] == []


def test_numbers_of_any_whole_kind_name_the_same_memory(stage: Stage) -> None:
    (one, first), (other, second) = stage.admit(330), stage.admit(331)
    for target in (first, second):
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
    assert first.publish(np.array([1, 2], np.uint32), np.uint32(3))  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="row 3 is still held by room 330"):
        second.publish([4], 3)
    with pytest.raises(TypeError):
        second.publish([4], 2.0)  # type: ignore[arg-type]
    over(one, first, other, second)


def test_what_sending_raises_ends_no_loop(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        monkeypatch.undo()
        raise ValueError("a metric of the user's")

    monkeypatch.setattr(stage.decode.host.plane, "flush", broken)
    stage.served(room=341)
    assert stage.decode.health()["defects"] == ["ValueError: a metric of the user's"]


def test_a_defect_in_one_request_fails_that_request_only(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A27: the plan of one request raises; the requests behind it in the queue are served."""
    writes = stage.prefill.host.writes
    assert writes is not None
    whole = writes._ranges

    def broken(destination: Any, *arguments: Any) -> Any:
        if destination.incarnation.room == 401:
            raise IndexError("a plan that cannot be made")
        return whole(destination, *arguments)

    monkeypatch.setattr(writes, "_ranges", broken)
    for room in (400, 401, 402):
        source, target = stage.ready(room=room)
        source.send([0, 1], last=True)
        wanted = KVPoll.Failed if room == 401 else KVPoll.Success
        assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == wanted
        if room == 401:
            assert source.failure == "transfer_error: a plan that cannot be made"
            assert target.failure == "failed_by_prefill: transfer_error: a plan that cannot be made"
        over(source, target)
    monkeypatch.undo()

    def worse(pair: Any, *arguments: Any) -> None:
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(stage.prefill.rank, "send_chunk", worse)
    source, target = stage.ready()
    source.send([0, 1], last=True)
    assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Failed
    assert source.failure == "internal_error"
    until(lambda: stage.prefill.health()["defects"], "the defect is told, after the request was failed for it")
    assert stage.prefill.health()["defects"] == ["RuntimeError: a defect of ours"]
    assert stage.prefill.health()["ok"], "requests still finish here"
    monkeypatch.undo()
    stage.prefill.host.loop.failed.clear()
    over(source, target)
    stage.served()


def test_strange_messages_change_nothing(stage: Stage) -> None:
    """Frames of the wrong side, of unknown rooms and of nobody; then a request as ever (A04, S10)."""
    from kvpoll.spec.vocabulary import Incarnation

    stage.served()
    host = stage.decode.host

    def tell() -> None:
        node = stage.prefill.node
        for number in range(50):
            host.tell(node, wire.Status(Incarnation(number, 0, 1), 0, "Success", None), "Status", Incarnation(0, 0, 0))
            host.tell(node, wire.AbortAck(Incarnation(number, 3, 1), 0), "AbortAck", Incarnation(0, 0, 0))
            host.tell(
                node,
                wire.Abort(Incarnation(9000 + number, 0, 1), 0, Incarnation(1, 1, 1)),
                "Abort",
                Incarnation(0, 0, 0),
            )
        host.plane._channels[host.directory[node].endpoint].socket.send(b"\x00garbage")

    stage.decode.do(tell)
    until(lambda: sum(stage.prefill.dropped.values()) >= 1, "the garbage being dropped")
    stage.served()
    assert stage.prefill.health()["ok"] and stage.prefill.health()["defects"] == []


def test_deadlines_do_not_follow_the_wall_clock(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = stage.ready()
    day_s = 86_400
    now, ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + day_s)
    monkeypatch.setattr(time, "time_ns", lambda: ns() + day_s * 10**9)
    stage.served((2, 3), 1)
    assert (source.poll(), target.poll()) == (KVPoll.WaitingForInput,) * 2
    source.send([0, 1], last=True)
    assert target.wait(timeout_s=LIMIT_S) == KVPoll.Success
    over(source, target)


def test_the_deadline_that_was_asked_for_ends_a_request() -> None:
    """Prefill never sends; its own deadline and decode's are each enough, and the cause says whose it was."""
    with Stage(decode={"rules": {"waiting_timeout_s": 0.3}}) as stage:
        source, target = stage.ready()
        assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert (target.failure, source.failure) == ("waiting_timeout", "aborted_by_decode")
        over(source, target)


def test_another_name_for_the_same_server(stage: Stage) -> None:
    """Prefill knows its bootstrap server as 127.0.0.1, decode as localhost: they find each other all the same."""
    address = stage.address.replace("127.0.0.1", "localhost")
    with DecodeEndpoint(
        Settings(stage.decode.settings.layout, transport="memory", options={"fabric": stage.fabric})
    ) as decode:
        source, target = stage.prefill.admit(500), decode.admit(500, address)
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, target.failure
        target.publish([5], 0)
        assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        source.send([5], last=True)
        assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
        over(source, target)
        source, target = stage.prefill.admit(501), decode.admit(501, address)
        assert target.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput, target.failure
        target.publish([5], 0)
        assert source.wait(KVPoll.WaitingForInput, timeout_s=LIMIT_S) == KVPoll.WaitingForInput
        source.abort("no")
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        over(source, target)


def test_aux_rows_of_prefill_are_waited_for() -> None:
    """Eight requests end at once and prefill has two aux rows: each gets one in its turn, none goes without."""
    from dataclasses import replace

    from endpoint_stage import LAYOUT

    with Stage(moving=False, prefill={"layout": replace(LAYOUT, rows=2)}) as stage:
        ends = [stage.ready((page,), row=page) for page in range(8)]
        for page, (source, _) in enumerate(ends):
            source.send([page], last=True, first_token=1000 + page)
        until(lambda: len(stage.prefill.host.writes or ()) == 8, "eight writes")
        stage.moving = True
        for page, (source, target) in enumerate(ends):
            assert target.wait(timeout_s=LIMIT_S) == source.wait(timeout_s=LIMIT_S) == KVPoll.Success
            said = target.aux()
            assert said is not None and said.first_token == 1000 + page
        over(*(end for pair in ends for end in pair))


def test_a_suspected_peer_fails_the_request_and_says_so() -> None:
    """Decode's loop stands still. Prefill asks it, hears nothing, and gives up its rooms; no page is lost (A20)."""
    with Stage(rules=SOON) as stage:
        source, target = stage.ready()
        held, go = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            go.wait(LIMIT_S)

        stage.decode.do(hold)
        assert held.wait(LIMIT_S)
        assert source.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        assert source.failure == "decode_lost"
        assert not source.send([0, 1], last=True) and source.pages_free, "nothing is taken by a transfer that failed"
        go.set()
        assert target.wait(timeout_s=LIMIT_S) == KVPoll.Failed
        over(source, target)
        stage.served()
