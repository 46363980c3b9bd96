"""C2: a prefill worker's Success and decode's ABORT meet between the read and the write of ``update_status``.

The listener and the transfer worker are SGLang's own threads and the ABORT is a real frame. Forced is only the order:
the worker is held after its read, until the listener has stored Failed.
"""

from __future__ import annotations

import sys
import threading

from engine_on_cpu import KVPoll, MooncakeKVSender, Pair, name, send, tell, until


class HeldAfterRead(dict):
    """``request_status`` that stops whoever has read in order to store Success, and logs what is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.has_read, self.may_write = threading.Event(), threading.Event()
        self.log: list[str] = []

    def get(self, room, default=None):
        value, caller = super().get(room, default), sys._getframe(1)
        if caller.f_code.co_name == "update_status" and caller.f_locals["status"] == KVPoll.Success:
            self.log.append(f"worker reads {name(value)}")
            self.has_read.set()
            assert self.may_write.wait(10)
        return value

    def __setitem__(self, room, status) -> None:
        super().__setitem__(room, status)
        self.log.append(
            f"{'worker' if self.has_read.is_set() and status == KVPoll.Success else 'other'} {name(status)}"
        )


def meet(pair: Pair, room: int, clear: bool):
    """Let the two meet; with ``clear`` the scheduler polls Failed and clears the room before the worker goes on."""
    status = pair.prefill.request_status = HeldAfterRead()
    sender, receiver = pair.handshake(room, slot=room % 8)
    send(sender, page=1)
    assert status.has_read.wait(10)
    receiver.abort()
    until(lambda: dict.get(status, room) == KVPoll.Failed, "the listener's Failed")
    if clear:
        assert sender.poll() == KVPoll.Failed
        sender.clear()
    status.may_write.set()
    until(lambda: status.log[-1] == "worker Success", "the worker's write")
    return status, sender, receiver


def main() -> None:
    pair = Pair()
    status, sender, receiver = meet(pair, room=1, clear=False)
    seen = {
        "written": status.log[-3:],
        "prefill": name(status[1]),
        "prefill_sender": name(sender.poll()),
        "decode_receiver": name(receiver.poll()),
    }
    status, sender, _ = meet(pair, room=2, clear=True)
    seen["cleared_room_is_back_as"] = name(status[2])
    seen["next_request_of_that_room"] = name(MooncakeKVSender(pair.prefill, pair.address, 2).poll())
    tell("C2", seen)


if __name__ == "__main__":
    main()
