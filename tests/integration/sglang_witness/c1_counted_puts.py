"""C1: a rank's PUT is applied but answered too late; its own retry is counted as a second rank.

Server, registration with its retry and decode's lookup are SGLang's. Forced is only the timeout of the first answer.
"""

from __future__ import annotations

import requests
from engine_on_cpu import KVPoll, MooncakeKVReceiver, Pair, free_port, name, start_bootstrap, tell


def register_with_a_late_answer(manager, port: int) -> int:
    """Register this rank as one of two; the first answer is lost. Returns the number of PUTs that were sent."""
    manager.bootstrap_port, manager.attn_tp_size = port, 2
    sent, put = [], requests.put

    def first_answer_is_late(*args, **kwargs):
        sent.append(put(*args, **kwargs))
        if len(sent) == 1:
            raise requests.Timeout("the answer came after five seconds")
        return sent[-1]

    requests.put = first_answer_is_late
    try:
        manager.register_to_bootstrap()
    finally:
        requests.put = put
    return len(sent)


def status_of(address: str, tp_rank: int) -> int:
    """Status of ``GET /route`` for one rank; -1 asks whether the whole engine is ready."""
    others = {key: min(tp_rank, 0) for key in ("prefill_dp_rank", "prefill_cp_rank", "target_pp_rank")}
    return requests.get(f"http://{address}/route", {**others, "target_tp_rank": tp_rank}, timeout=5).status_code


def main() -> None:
    pair, port = Pair(), free_port()
    address = f"127.0.0.1:{port}"
    start_bootstrap(port)
    puts = register_with_a_late_answer(pair.prefill, port)
    seen = {"puts_of_rank_0": puts, "engine": status_of(address, -1), "rank_0": status_of(address, 0)}
    seen["rank_1"] = status_of(address, 1)

    assert pair.decode.try_ensure_parallel_info(address)
    receiver = MooncakeKVReceiver(pair.decode, address, 1)
    receiver.init(0)
    assert receiver.poll() == KVPoll.Failed
    tell("C1", seen | {"request": name(receiver.poll()), "reason": pair.decode.failure_records[1]})


if __name__ == "__main__":
    main()
