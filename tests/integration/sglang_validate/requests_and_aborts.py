"""Requests, aborts and reused rooms through the real classes of SGLang 0.5.23, recorded. Run by the test beside it.

usage: requests_and_aborts.py HARNESS SEED REQUESTS unique|reused TRACE
"""

import contextlib
import os
import random
import sys
import time

sys.path.insert(0, sys.argv[1])
import harness
import numpy as np
from harness import KVPoll, wait_for
from tracer import Tracer

ENDS = (KVPoll.Success, KVPoll.Failed)
KINDS = ("good", "good", "decode first", "prefill aborts early", "decode aborts early", "prefill aborts", "decode aborts",
         "decode aborts before a chunk", "prefill aborts too late")  # fmt: skip
SOURCE = np.array([3, 4, 5, 9, 10, 11], dtype=np.int32)
TARGET = np.array([20, 21, 22, 40, 41, 42], dtype=np.int32)


def publish(receiver: object) -> None:
    receiver.send_metadata(TARGET, aux_index=5, state_indices=None, decode_prefix_len=0)


def begin(pair: object, room: int, kind: str) -> tuple:
    """Both sides open the room, in the order that the kind wants, and decode publishes its pages."""
    if kind == "decode first":
        receiver = pair.receiver(room)
        publish(receiver)
        return pair.sender(room), receiver
    sender, receiver = pair.sender(room), pair.receiver(room, init=False)
    if kind == "decode aborts early":
        receiver.abort()
        return sender, receiver
    receiver.init(0)
    if kind == "prefill aborts early":
        sender.abort()
    publish(receiver)
    return sender, receiver


def transfer(pair: object, room: int, kind: str, sender: object, receiver: object) -> None:
    """Two chunks, and whoever gives up in between."""
    wait_for(lambda: sender.poll() in (KVPoll.WaitingForInput, *ENDS), 10, "the metadata")
    if kind == "decode aborts before a chunk":
        receiver.abort()
        return
    sender.pop_decode_prefix_len()
    pair.set_meta(2, room, token=1)
    sender.init(len(SOURCE), aux_index=2)
    sender.send(SOURCE[:3])
    if kind == "prefill aborts":
        sender.abort()
        return
    if kind == "decode aborts":
        receiver.abort()
    sender.send(SOURCE[3:])
    wait_for(lambda: sender.poll() in ENDS and receiver.poll() in ENDS, 10, "an end on both sides")
    if kind == "prefill aborts too late":
        sender.abort()


def end(sender: object, receiver: object) -> None:
    """What a scheduler does with a room that has ended, or that it gives up."""
    for side in (sender, receiver):
        poll = side.poll()
        if poll not in ENDS:
            side.abort()
        if poll == KVPoll.Failed:
            with contextlib.suppress(Exception):
                side.failure_exception()
        side.clear()
    time.sleep(0.01)


def main() -> None:
    seed, number, rooms, place = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    chance, tracer = random.Random(seed), Tracer()
    pair = harness.Pair(engine="memmove", trace=tracer)
    for request in range(number):
        room, kind = 1000 + (request if rooms == "unique" else 0), chance.choice(KINDS)
        sender, receiver = begin(pair, room, kind)
        try:
            if "early" not in kind:
                transfer(pair, room, kind, sender, receiver)
        except TimeoutError as error:
            print(f"request {request} ({kind}): {error}")  # in a reused room: a failure on record of an earlier one
        end(sender, receiver)
    tracer.dump(place)
    print(f"recorded {len(tracer.events)} events")
    sys.stdout.flush()
    os._exit(0)  # SGLang's threads do not end by themselves


main()
