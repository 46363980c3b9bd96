"""C3: the metadata gate takes room number 0 in a metadata row for "not written yet".

Four requests go through the real ``DecodeTransferQueue``, with a waiting timeout of one second and several seconds to
wait: a common one, one whose room is 0, one whose metadata write is reported as done and did not happen, and one whose
prefill never sends. Scheduler and requests are hollow; receivers, managers, frames, gate and queue are SGLang's.
"""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

os.environ["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] = "1"  # before SGLang reads it

from engine_on_cpu import KVPoll, Pair, get_parallel, lonely_group, name, send, tell, until
from sglang.srt.disaggregation.decode import DecodeRequest, DecodeTransferQueue
from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator

WAIT_S = 4.0
SLOTS = {"common": 1, "room_zero": 2, "metadata_lost": 3, "never_sent": 4}
ROOMS = {"common": 11, "room_zero": 0, "metadata_lost": 13, "never_sent": 14}


def transfer_queue(pair: Pair) -> DecodeTransferQueue:
    get_parallel().override_permanently(attn_tp_group=SimpleNamespace(cpu_group=lonely_group()))
    scheduler = MagicMock(enable_decode_hicache=False, enable_hisparse=False, kv_checksum_computer=None)
    return DecodeTransferQueue(ReqToMetadataIdxAllocator(8), pair.decode_memory.metadata, scheduler, MagicMock())


def request(rid: str, pair: Pair) -> tuple[DecodeRequest, object]:
    """A request that has published its pages, as it stands in the transfer queue, and prefill's end of it."""
    sender, receiver = pair.handshake(ROOMS[rid], SLOTS[rid])
    hollow = MagicMock(rid=rid, bootstrap_room=ROOMS[rid], bootstrap_host="127.0.0.1")
    hollow.return_logprob = hollow.return_sampling_mask = False
    return DecodeRequest(req=hollow, kv_receiver=receiver, metadata_buffer_index=SLOTS[rid]), sender


def poll_for(queue: DecodeTransferQueue, seconds: float) -> list[str]:
    """What a decode scheduler does every step; returns the requests that were handed on to be decoded."""
    handed_on, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        handed_on += [req.rid for req in queue.pop_transferred()]
        time.sleep(0.02)
    return handed_on


def waiting(queue: DecodeTransferQueue) -> list[str]:
    return [each.req.rid for each in queue.queue]


def main() -> None:
    pair = Pair()
    queue = transfer_queue(pair)
    pair.decode.engine.lost.add(pair.decode_memory.room_cell(SLOTS["metadata_lost"]))
    requests = {rid: request(rid, pair) for rid in ROOMS}
    queue.extend([decode for decode, _ in requests.values()])
    for rid, (_, sender) in requests.items():
        if rid != "never_sent":
            send(sender, page=1)
            until(lambda status=pair.decode.request_status, room=ROOMS[rid]: status[room] == KVPoll.Success, rid)

    handed_on = poll_for(queue, WAIT_S)
    kept = {each.req.rid: name(each.kv_receiver.poll()) for each in queue.queue}
    seen = {"timeout_s": pair.decode.waiting_timeout, "waited_s": WAIT_S, "handed_on": handed_on, "kept": kept}
    seen["failed"] = sorted(set(ROOMS) - set(handed_on) - set(kept))

    stuck = next(each for each in queue.queue if each.req.rid == "room_zero")
    stuck.kv_receiver.abort()
    poll_for(queue, 0.1)
    tell("C3", seen | {"kept_after_clients_abort": waiting(queue)})


if __name__ == "__main__":
    main()
