"""C4: the node at ``h:899`` is lost; what happens to the cached endpoints and the requests of ``h:8998``?

Three answers: for a request that is doing nothing just then; for one that is sending just then (the order is forced:
its thread is held after it has taken the cached socket, until the cleanup has closed it); and for one whose decode rank
has registered with that prefill rank a moment ago (nothing is forced: the cleanup closes the socket with linger 0).
"""

from __future__ import annotations

import threading
import time

import numpy as np
from engine_on_cpu import (
    CopyingManager,
    DisaggregationMode,
    KVPoll,
    MooncakeKVReceiver,
    MooncakeKVSender,
    Pair,
    name,
    send,
    tell,
    until,
)


class HeldBeforeSend:
    """A socket's lock that stops one thread: it has the socket, and has not yet sent."""

    def __init__(self) -> None:
        self.lock, self.holder = threading.Lock(), None
        self.has_socket, self.may_send = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        if threading.current_thread() is self.holder:
            self.has_socket.set()
            assert self.may_send.wait(10)
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def publish(receiver) -> None:
    receiver.send_metadata(np.array([1], dtype=np.int32), aux_index=1)


def lose(pair: Pair, address: str) -> dict[str, list[str]]:
    """Run the cleanup; which keys of the endpoint cache go, and which stay."""
    before = set(pair.decode.connection_pool)
    pair.decode._handle_node_failure(address)
    after = set(pair.decode.connection_pool)
    return {"dropped": sorted(before - after), "kept": sorted(after)}


def registered(pair: Pair) -> bool:
    """Whether prefill knows where decode's pages lie."""
    return pair.decode.engine.session in pair.prefill.decode_kv_args_table


def start(pair: Pair, receiver) -> MooncakeKVSender:
    """Prefill's side of a published request, up to the moment when its page is queued."""
    room = receiver.bootstrap_room
    sender = MooncakeKVSender(pair.prefill, pair.address, room)
    publish(receiver)
    until(lambda: sender.poll() == KVPoll.WaitingForInput, "the handshake")
    sender.init(1, aux_index=1)
    send(sender, page=1)
    return sender


def quiet_request(pair: Pair, lost: str) -> dict[str, object]:
    """Request 1 has its endpoints and waits; the cleanup runs; then it goes on to its end."""
    receiver, bystander = pair.receiver(1), MooncakeKVReceiver(pair.decode, lost, 2)
    until(lambda: registered(pair), "the registration")
    seen: dict[str, object] = {"unrelated_address": lose(pair, "elsewhere:1"), "prefix_address": lose(pair, lost)}
    seen |= {"request_of_lost_node": name(bystander.poll()), "healthy_after_cleanup": name(receiver.poll())}
    start(pair, receiver)
    until(lambda: receiver.poll() == KVPoll.Success, "the healthy transfer, over a new socket")
    return seen | {"healthy_at_the_end": name(receiver.poll())}


def sending_request(pair: Pair, lost: str) -> dict[str, object]:
    """Request 3 has taken the cached socket when the cleanup closes it."""
    receiver = pair.receiver(3)
    [info] = receiver.bootstrap_infos
    endpoint = f"tcp://{info['rank_ip']}:{info['rank_port']}"
    gate = MooncakeKVReceiver._socket_locks[endpoint] = HeldBeforeSend()
    gate.holder = threading.Thread(target=publish, args=(receiver,))
    gate.holder.start()
    assert gate.has_socket.wait(10)
    lose(pair, lost)
    gate.may_send.set()
    gate.holder.join(10)
    reason = pair.decode.failure_records.get(3, "").replace(endpoint.removeprefix("tcp://"), "ENDPOINT")
    return {"sending_healthy": name(receiver.poll()), "reason": reason}


def first_request(pair: Pair, lost: str, room: int):
    """The first request of a fresh decode rank, with the cleanup just after its registration was sent."""
    pair.decode = CopyingManager(pair.decode_memory.described(), DisaggregationMode.DECODE, pair.decode.server_args)
    assert pair.decode.try_ensure_parallel_info(pair.address)
    receiver = pair.receiver(room)
    lose(pair, lost)
    time.sleep(0.3)  # far longer than a registration takes: if it is absent now, it is lost
    return receiver


def registering_request(pair: Pair, lost: str) -> dict[str, object]:
    """A registration that the cleanup cut off (about two of three are), and what it does to its request."""
    receivers = (first_request(pair, lost, room) for room in range(10, 40))
    receiver = next(each for each in receivers if not registered(pair))
    died = threading.Event()
    threading.excepthook = lambda _: died.set()
    sender = start(pair, receiver)
    return {"prefill_worker_died": died.wait(5), "prefill": name(sender.poll()), "decode": name(receiver.poll())}


def main() -> None:
    pair = Pair()
    lost = pair.address[:-1]
    seen = {"lost": lost, "healthy": pair.address, "quiet": quiet_request(pair, lost)}
    seen |= {"sending": sending_request(pair, lost), "registering": registering_request(pair, lost)}
    tell("C4", seen)


if __name__ == "__main__":
    main()
