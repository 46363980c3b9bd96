"""Each invariant as short stories: traces that break it, and near misses that do not."""

from __future__ import annotations

import io

import pytest
import stories_leaks
import stories_liveness
import stories_memory
import stories_ranks
import stories_rooms
from invariant_traces import BOUNDS, Story, found

from kvpoll.spec import trace
from kvpoll.spec.invariants import INVARIANTS, judge

SHELVES = (stories_memory, stories_rooms, stories_ranks, stories_liveness, stories_leaks)
STORIES = {ident: stories for shelf in SHELVES for ident, stories in shelf.STORIES.items()}
ALL = [
    pytest.param(ident, story, id=f"{ident}-{story.name}") for ident, stories in STORIES.items() for story in stories
]


@pytest.mark.parametrize(("ident", "story"), ALL)
def test_story(ident: str, story: Story) -> None:
    """The invariant alone says exactly what the story says of it: id, time, node and pair."""
    watch = judge(story.events, BOUNDS, only=[ident])
    assert found(watch) == [each for each in story.found if each[0] == ident]


@pytest.mark.parametrize(("ident", "story"), ALL)
def test_story_survives_the_file(ident: str, story: Story) -> None:
    """Read back from a recorded trace a story is judged as it was when it happened."""
    lines = "\n".join(['{"kvpoll_trace": 1}', *map(trace.encode, story.events)])
    _, events = trace.read_trace(io.StringIO(lines), "story")
    assert found(judge(events, BOUNDS)) == found(judge(story.events, BOUNDS))


def test_every_monitor_has_both_stories() -> None:
    """Nothing is trusted that was not seen to fail and to pass."""
    for ident, invariant in INVARIANTS.items():
        stories = STORIES.get(ident, [])
        verdicts = {any(each[0] == ident for each in story.found) for story in stories}
        assert verdicts == ({True, False} if invariant.monitor else set()), ident


def test_texts_name_what_was_seen() -> None:
    """A text alone tells an engineer where to look."""
    assert said("S5", 0) == (
        "page 1, component P0/tp1: expected room 7 (attempt 0), found page 1 of room 8 (attempt 0) from P0/tp1"
    )
    assert said("S1", 0) == (
        "kv page 12 went to room 8 (attempt 0) while write 1 of P0 for room 7 (attempt 0) was not settled"
    )
    assert said("S6", 0) == "P1 took the pages, the request runs on P0, and D0 has not ended"
    assert said("S6", 3) == (
        "P0 in epoch 1 took pages meant for its epoch 0, the request runs on P0, and D0 has not ended"
    )
    assert said("L2", 0) == "still live 2 s after it could know that P0 failed"
    assert said("O1", 1) == "on an idle node: num_prealloc says 0, counted 1"


def said(ident: str, story: int) -> str:
    return judge(STORIES[ident][story].events, BOUNDS).first[ident].text
