"""SGLang's own prefill and decode classes against the two bootstrap servers whose ports are given. Nothing is forced.

On the first server an engine of one rank registers, and one request is transferred from it to a decode rank that has
found it there. On the second an engine of two tensor-parallel ranks registers one by one, the first of them twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import engine_on_cpu
import numpy as np
from engine_on_cpu import KVPoll, MooncakeKVReceiver, Pair, name, send, until
from sglang.srt.disaggregation.common.conn import CommonKVSender

ROOM = 41


def one_request(pair: Pair) -> dict[str, Any]:
    """From registration to Success, with the bytes that arrived."""
    pair.prefill_memory.pages[0][3] = 7
    sender, receiver = pair.handshake(ROOM, 3)
    send(sender, 3)
    until(lambda: receiver.poll() == KVPoll.Success and sender.poll() == KVPoll.Success, "the transfer")
    arrived = pair.decode_memory.pages[0]
    moved = bool((arrived[3] == 7).all()) and not np.delete(arrived, 3, axis=0).any()
    endpoints = [
        {**info, "rank_port": info["rank_port"] == pair.prefill.rank_port} for info in receiver.bootstrap_infos
    ]
    return {"prefill": name(sender.poll()), "decode": name(receiver.poll()), "moved": moved, "endpoints": endpoints}


def dp_ranks(pair: Pair) -> Any:
    """Filed by SGLang's sender, asked for by SGLang's receiver."""
    sender = CommonKVSender.__new__(CommonKVSender)
    sender.kv_mgr, sender.bootstrap_server_url, sender.bootstrap_room = pair.prefill, pair.address, ROOM
    pair.prefill.attn_dp_rank = 5
    sender._register_prefill_dp_rank()
    pair.prefill.attn_dp_rank = 0
    return MooncakeKVReceiver.query_prefill_dp_ranks(pair.address, [ROOM, ROOM + 1])


def two_ranks(pair: Pair, port: int) -> dict[str, Any]:
    """Whether decode takes the engine for ready after each registration, and what a receiver then contacts."""
    address = f"127.0.0.1:{port}"
    manager = pair.prefill
    manager.bootstrap_port, manager.attn_tp_size = port, 2
    ready = [pair.decode.try_ensure_parallel_info(address)]
    for tp_rank in (0, 0, 1):
        manager.attn_tp_rank = tp_rank
        manager.register_to_bootstrap()
        ready.append(pair.decode.try_ensure_parallel_info(address))
    receiver = MooncakeKVReceiver(pair.decode, address, ROOM + 2)
    receiver.init(0)
    return {"ready": ready, "poll": name(receiver.poll()), "contacted": len(receiver.bootstrap_infos)}


def main() -> None:
    first, second = (int(port) for port in sys.argv[1:])
    engine_on_cpu.start_bootstrap = lambda port: None  # it is there already, and it is not SGLang's
    pair = Pair(first)
    info = dataclasses.asdict(pair.decode.prefill_info_table[pair.address])
    seen = {"info": info, "request": one_request(pair), "dp_ranks": dp_ranks(pair), "two": two_ranks(pair, second)}
    print(json.dumps(seen), flush=True)
    os._exit(0)  # SGLang leaves threads that never end


if __name__ == "__main__":
    main()
