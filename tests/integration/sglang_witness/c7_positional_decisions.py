"""C7: a later pipeline stage applies stage 0's decisions by position to a queue that differs.

Both queues run the real ``pop_bootstrapped``. They are made to differ by one metadata buffer: stage 1 has none left for
request b (``finalize_bootstrap`` decides that by itself), so b leaves the queue of stage 0 only. The senders answer
what they are told; the link between the stages keeps the order of what is sent.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from unittest.mock import MagicMock

from engine_on_cpu import KVPoll, configure, free_port, lonely_group, tell
from sglang.srt.disaggregation.prefill import PrefillBootstrapQueue
from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator


class Link:
    """The pipeline group as the two stages see it: one ordered channel from stage 0 to stage 1."""

    def __init__(self) -> None:
        self.sent: deque[list[int]] = deque()

    def send_object(self, data: list[int], dst: int, **_: object) -> list[object]:
        self.sent.append(list(data))
        return []

    def recv_object(self, src: int, **_: object) -> list[int]:
        return self.sent.popleft()


class Stage:
    """One stage's queue, with the few things of its scheduler that it uses."""

    def __init__(self, rank: int, link: Link, group: object, buffers: int) -> None:
        self.failed: list[str] = []
        self.queue = object.__new__(PrefillBootstrapQueue)
        self.queue.queue, self.queue.pp_size, self.queue.pp_rank = [], 2, rank
        self.queue.pp_poll_sync_work_list, self.queue.scheduler_stage_metrics = [], None
        self.queue.req_to_metadata_buffer_idx_allocator = ReqToMetadataIdxAllocator(buffers)
        self.queue.scheduler = SimpleNamespace(
            attn_cp_cpu_group=group,
            attn_tp_cpu_group=group,
            pp_group=link,
            handle_bootstrap_failure=lambda req: self.failed.append(req.rid),
            processed_tokens_counter=0,
            token_to_kv_pool_allocator=SimpleNamespace(page_size=1),
            tree_cache=MagicMock(),
        )

    def add(self, rid: str, poll: KVPoll) -> None:
        req = MagicMock(rid=rid, metadata_buffer_index=-1, pending_bootstrap=True, origin_input_ids=[1])
        req.disagg_kv_sender.poll_pp_consensus.return_value = poll
        req.disagg_kv_sender.pop_decode_prefix_len.return_value = 0
        self.queue.queue.append(req)

    def step(self) -> list[str]:
        return [req.rid for req in self.queue.pop_bootstrapped()]

    def left(self) -> list[str]:
        return [req.rid for req in self.queue.queue]


def main() -> None:
    configure(free_port())
    link, group = Link(), lonely_group()
    first, second = Stage(0, link, group, buffers=2), Stage(1, link, group, buffers=1)
    for rid in ("a", "b"):
        first.add(rid, KVPoll.WaitingForInput)
        second.add(rid, KVPoll.WaitingForInput)
    seen: dict[str, object] = {"admitted": [first.step(), second.step()]}
    for stage in (first, second):
        stage.add("c", KVPoll.Failed)
    seen["admitted_then"] = [first.step(), second.step()]
    seen |= {"failed": [first.failed, second.failed], "left": [first.left(), second.left()]}

    first.add("d", KVPoll.WaitingForInput)
    second.queue.queue.clear()
    first.step(), second.step()
    tell("C7", seen | {"lists_unread_by_an_empty_stage": len(link.sent)})


if __name__ == "__main__":
    main()
