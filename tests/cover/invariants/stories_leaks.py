"""What is left, and what is said of it: R1 to R3, O1, O2."""

from __future__ import annotations

from invariant_traces import (
    A_AGAIN,
    A,
    B,
    Story,
    announced,
    end,
    forgotten,
    incarnation,
    opened,
    queued,
    repeated,
    step,
    stopped,
    surveyed,
)

from kvpoll.spec import trace

STORIES: dict[str, list[Story]] = {
    "R1": [
        Story("a room is left in a table",
            [surveyed(1, tables=(("rooms", 1), ("kv", 0)))], [("R1", 1, "D0", None)]),
        Story("nothing is left in any table",
            [surveyed(1, tables=(("rooms", 0), ("kv", 0)))], []),
    ],
    "R2": [
        Story("orphans pile up (B49)",
            [announced(t, "P0", (t, 0)) for t in range(1, 5)], [("R2", 3, "P0", (3, 0))]),
        Story("an orphan stays too long, though a message moves it on",
            [announced(1, "P0", A), step(2, "P0", A, "PeerFailed", "Announced", "Failed"), end(12)],
            [("R2", 11.0, "P0", A)]),
        Story("orphans are opened, forgotten, or die with their node in time",
            [announced(1, "P0", A), announced(1, "P0", B), opened(2, "P0", before="Announced"),
             forgotten(11, "P0", B), announced(11, "P0", (9, 0)), stopped(12, "P0"), end(50)],
            []),
        Story("an owner comes, but the poll of the room that did without stays",
            [step(1, "P0", A, "DestinationRegistered", "Absent", "WaitingForInput"),
             step(2, "P0", A, "RequestOpened", "WaitingForInput", "WaitingForInput"), end(50)],
            []),
        Story("the owner of another attempt is none",
            [announced(1, "P0", A),
             step(2, "P0", A, "RequestOpened", "Announced", "Announced", meant=incarnation(A_AGAIN)),
             end(12)],
            [("R2", 11.0, "P0", A)]),
        Story("a second announcement of a room has its own time",
            [announced(1, "P0", A), forgotten(9, "P0", A), announced(10, "P0", A), end(19)], []),
    ],
    "R3": [
        Story("a node asks again and again (B43)",
            [repeated(t) for t in (1.0, 1.2, 1.4, 1.6, 1.8)], [("R3", 1.6, "D0", None)]),
        Story("as many repeats as allowed, in windows and nodes of their own",
            [repeated(t) for t in (1.1, 1.2, 1.3, 2.1, 2.2, 2.3)] + [repeated(2.3, "D1")], []),
        Story("first tries are no repeats",
            [repeated(1.0, repeat=0) for _ in range(9)], []),
    ],
    "O1": [
        Story("an idle gauge is not zero",
            [surveyed(1, gauges=(("num_running", 2.0),))], [("O1", 1, "D0", None)]),
        Story("an idle gauge says zero while a request is in the queue",
            [queued(0, 1), surveyed(1, gauges=(("num_prealloc", 0.0),))], [("O1", 1, "D0", None)]),
        Story("a request is in a queue without gauge",
            [queued(0, 1), surveyed(1)], [("O1", 1, "D0", None)]),
        Story("all went that came",
            [queued(0, 1), queued(0, -1), surveyed(1, gauges=(("num_prealloc", 0.0),))], []),
        Story("a queue of another node, or of another life",
            [queued(0, 1, "D1"), queued(0, 1), stopped(1, "D0"),
             surveyed(2, gauges=(("num_prealloc", 0.0),))],
            []),
    ],
    "O2": [
        Story("a stuck engine says it is healthy",
            [trace.HealthReported(1, "D0", True, False)], [("O2", 1, "D0", None)]),
        Story("a stuck engine says so, a sound one says so too",
            [trace.HealthReported(1, "D0", False, False), trace.HealthReported(1, "D0", True, True)], []),
    ],
}  # fmt: skip
