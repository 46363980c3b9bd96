"""Small traces for the tests of the validator: one happy SGLang request, and a way to spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]

ROOM = 4711
SCHEDULER, CONTROL, WORKER, LISTENER = "MainThread", "Thread-2 (bootstrap_thread)", "Thread-5", "Thread-7"


def put(node: str, before: str | None, after: str | None, thread: str = SCHEDULER, room: int = ROOM) -> Event:
    return {"thr": thread, "node": node, "ev": "status", "room": room, "frm": before, "to": after}


def heard(node: str, *frames: object) -> Event:
    thread = CONTROL if node[0] == "P" else LISTENER
    return {"thr": thread, "node": node, "ev": "recv", "frames": [str(frame) for frame in frames]}


def called(node: str, method: str, thread: str = SCHEDULER, room: int = ROOM, **arguments: Any) -> Event:
    return {"thr": thread, "node": node, "ev": method, "bootstrap_room": room, **arguments}


def metadata(node: str = "P0", room: int = ROOM, required: int = 1, port: int = 5001) -> Event:
    return heard(node, room, "127.0.0.1", port, f"127.0.0.1:{port + 1}", "pages", "5", "", required, "0")


def chunk(last: bool, room: int = ROOM) -> Event:
    return called("P0", "add_transfer_request", room=room, is_last_chunk=last)


def concluded(status: str = "Success", room: int = ROOM) -> Event:
    return called("P0", "conclude_transfer", WORKER, room, status=status)


def applied(status: str = "Success", rank: int = 0, room: int = ROOM) -> Event:
    return called("D0", "apply_prefill_status", LISTENER, room, status=status, prefill_rank=rank)


B, W, T, S, F = "Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed"


def happy(room: int = ROOM) -> list[Event]:
    """One request through Mooncake's classes, which never store Transferring; fourteen events."""
    return [
        put("P0", None, B, room=room),
        put("D0", None, B, room=room),
        put("D0", B, W, room=room),
        metadata(room=room),
        put("P0", B, W, CONTROL, room),
        chunk(False, room),
        chunk(True, room),
        concluded(room=room),
        put("P0", W, S, WORKER, room),
        heard("D0", room, 4, 0),
        applied(room=room),
        put("D0", W, S, LISTENER, room),
        put("P0", S, None, room=room),
        put("D0", S, None, room=room),
    ]


def numbered(events: Sequence[Event], step_s: float = 0.001) -> list[str]:
    """The lines of a trace: every event with its place and its time."""
    return [json.dumps({"seq": seq, "t": 100 + seq * step_s, **event}) for seq, event in enumerate(events)]


def written(path: Path, events: Sequence[Event]) -> Path:
    path.write_text("".join(f"{line}\n" for line in numbered(events)))
    return path


Spoil = Callable[[list[Event]], object]
