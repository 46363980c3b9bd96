"""Every invariant has a mutant that it must catch: a judge that has never said no may be asleep.

A mutant is one mistake. Most are mistakes in the data: another word in `kvpoll.toml`, another value of a rule, a
guard that says yes or no too easily. Where the data cannot break an invariant, because only drivers do what it
forbids, the mistake is made in the simulator and ``how`` is "driver". Each scenario is small, and under the
unmutated reference it breaks nothing. `pytest -s` prints the table.

L3 (no-cycle) has no monitor yet, and no mutant: prefill holds no pages while it waits for decode's, so no mistake
of this size can close a cycle. The catalogue says what the protocol would have to do first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvpoll.sim.run import Outcome, Run
from kvpoll.sim.scenario import Scenario, find, load_scenario, names_available, parse_scenario
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import SPEC_PATH, Profile, Protocol, Value, load, parse
from kvpoll.spec.source import Source
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.guards import GUARDS
from kvpoll.statemachine.ranks.pool import Pool
from kvpoll.statemachine.ranks.prefill import PrefillRank
from kvpoll.statemachine.ranks.rank import Timers
from kvpoll.statemachine.updates import UPDATES

TEXT = SPEC_PATH.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Mutant:
    """One mistake, the invariant that must catch it, and the scenario in which it shows.

    text: (what stands in kvpoll.toml once, what is written instead). rules: values chosen otherwise than the
    reference. guards, updates: replaced functions by name. driver: (class, method, replacement).
    """

    invariant: str
    says: str
    scenario: str
    text: tuple[tuple[str, str], ...] = ()
    rules: Mapping[str, Value] = field(default_factory=dict)
    guards: Mapping[str, Any] = field(default_factory=dict)
    updates: Mapping[str, Any] = field(default_factory=dict)
    driver: tuple[type[Any], str, Any] | None = None

    @property
    def how(self) -> str:
        kinds = {"table": self.text, "rule": self.rules, "guard": self.guards, "update": self.updates}
        return "+".join(kind for kind, change in kinds.items() if change) or "driver"

    def protocol(self) -> Protocol:
        """The protocol with its words replaced; each stands there exactly once, or the mutant is out of date."""
        changed = TEXT
        for old, new in self.text:
            assert changed.count(old) == 1, f"{old!r} stands {changed.count(old)} times in kvpoll.toml"
            changed = changed.replace(old, new)
        return parse(Source("mutant.toml", changed)) if self.text else load()

    def profile(self, protocol: Protocol) -> Profile:
        for rule, value in self.rules.items():
            assert protocol.rules[rule].kind == "number" or value in protocol.rules[rule].values
        return protocol.profile("reference").with_rules(self.rules)


# --------------------------------------------------------------------------------------------------- scenarios

ONE_REQUEST = """
[workload]
kind = "requests"
requests = [{ at_s = 1.0, input_tokens = 4000, output_tokens = 16 }]
"""

TWO_REQUESTS = """
[workload]
kind = "requests"
requests = [
  { at_s = 1.0, input_tokens = 4000, output_tokens = 16 },
  { at_s = 1.5, input_tokens = 4000, output_tokens = 16 },
]
"""

PARTITION = (
    ONE_REQUEST
    + """
[timing]
hostile_s = 200
[[fault]]
kind = "partition"
target = "P0"
peer = "R"
at_s = 0.5
for_s = 199
"""
)

SMALL: dict[str, str] = {
    "a late write, and its request is given up": TWO_REQUESTS
    + """
[topology.prefill]
kv_pages = 12
[topology.decode]
kv_pages = 12
[[fault]]
kind = "write_late"
target = "P0"
at_s = 0.5
for_s = 0.9
share = 1.0
late_s = 2.0
[[fault]]
kind = "prefill_abort"
at_s = 0.5
for_s = 0.9
share = 1.0
after_s = 0.2
""",
    "rooms are reused while alive": """
[workload]
kind = "poisson"
rate_per_s = 10
input_tokens = 4000
output_tokens = 64
until_s = 3
[[fault]]
kind = "room_reuse"
share = 0.5
""",
    "writes fail": ONE_REQUEST
    + """
[[fault]]
kind = "write_fail"
target = "P0"
for_s = 5
share = 1.0
""",
    "prefill gives up while decode's answer is on its way": ONE_REQUEST
    + """
[[fault]]
kind = "message_delay"
target = "D0"
trigger = { event = "Stepped", node = "D0", fact = "SetupFinished" }
for_s = 10
delay_s = 1.0
[[fault]]
kind = "prefill_abort"
for_s = 10
share = 1.0
after_s = 0.5
""",
    "one of two prefill ranks has a slow link": ONE_REQUEST
    + """
[topology.prefill]
tp = 2
[[fault]]
kind = "slow_link"
target = "P0/tp1"
for_s = 10
factor = 20
""",
    "two data-parallel replicas": TWO_REQUESTS
    + """
[topology.prefill]
dp = 2
""",
    "a write takes longer than any deadline": ONE_REQUEST
    + """
[[fault]]
kind = "write_late"
target = "P0"
for_s = 5
share = 1.0
late_s = 300
""",
    "prefill gives up at once": ONE_REQUEST
    + """
[[fault]]
kind = "prefill_abort"
for_s = 10
share = 1.0
after_s = 0.0
""",
    "the bootstrap server loses its memory": ONE_REQUEST.replace("1.0", "15.0")
    + """
[[fault]]
kind = "bootstrap_amnesia"
target = "B0"
at_s = 5
for_s = 3
""",
    "the bootstrap server is slow": ONE_REQUEST
    + """
[[fault]]
kind = "bootstrap_slow"
target = "B0"
at_s = 0.5
for_s = 5
slow_s = 2
""",
    "decode has no memory for two minutes": TWO_REQUESTS.replace(
        "output_tokens = 16 },\n  {", "output_tokens = 9000 },\n  {"
    )
    + """
[topology.decode]
kv_pages = 12
""",
    "prefill never hears of a request": PARTITION,
    "one of two replicas never hears of a request": PARTITION
    + """
[topology]
load_balance = "total_requests"
[topology.prefill]
dp = 2
""",
    "prefill gives up while decode waits for memory": TWO_REQUESTS.replace("16 },", "200 },", 1)
    + """
[topology.decode]
kv_pages = 12
[[fault]]
kind = "prefill_abort"
at_s = 1.4
for_s = 10
share = 1.0
after_s = 0.1
""",
    "an endpoint cannot be had": ONE_REQUEST
    + """
[[fault]]
kind = "bootstrap_error"
target = "B0"
trigger = { event = "Answered", node = "D0", route = "GET /route", status = 200 }
for_s = 50
share = 1.0
[timing]
hostile_s = 60
""",
    "the bootstrap server is late": ONE_REQUEST.replace("1.0", "15.0")
    + """
[[fault]]
kind = "bootstrap_late"
target = "B0"
for_s = 8
""",
}


@functools.cache
def scenario(name: str) -> Scenario:
    """One of the scenarios that come with kvpoll, or a small one of this file."""
    if name in names_available():
        return load_scenario(find(name), load())
    timing = "" if "[timing]" in SMALL[name] else "[timing]\nhostile_s = 20\n"
    text = f'title = "{name}"\n{timing}{SMALL[name]}'
    return parse_scenario(Source(f"{name}.toml", text), load(), name)


# ----------------------------------------------------------------------------------------------------- mutants


def always(state: Any, detail: Any, profile: Profile) -> bool:
    return True


def any_success_completes(state: Any, detail: Any, profile: Profile) -> bool:
    return bool(detail[1] == "Success")


def revive(state: Any, detail: Any) -> Any:
    """In the table this would be a terminal state with an exit, which the loader refuses."""
    poll = "Transferring" if state.poll == "Failed" else state.poll
    return state._replace(outstanding=max(0, state.outstanding - 1), poll=poll)


def resolve_next_door(state: Any, detail: Any) -> Any:
    return state._replace(rank=(detail[2] + 1) % detail[0])


def release_and_lose_one(self: Pool, incarnation: Incarnation) -> None:
    """Gives pages back and drops one of them from the free list."""
    PRISTINE_RELEASE(self, incarnation)
    self.free.pop()


def reserve_and_leave_free(self: Pool, incarnation: Incarnation, count: int) -> Any:
    """Hands out pages and leaves them in the free list."""
    free = list(self.free)
    pages = PRISTINE_RESERVE(self, incarnation, count)
    self.free = free
    return pages


def post_one_chunk_ahead(self: PrefillRank, entry: Any, chunk: int, *rest: Any) -> None:
    PRISTINE_POST(self, entry, chunk + 1, *rest)


def ring_the_first_only(self: Timers, name: str) -> None:
    """Fires what is due and never looks at the queue again, until somebody arms a timer."""
    self._rings.pop(name, None)
    due = self._due[name]
    while due and due[first := next(iter(due))] <= self.host.now + 1e-9:
        del due[first]
        self._fire(first, name)


PRISTINE_RELEASE, PRISTINE_RESERVE, PRISTINE_POST = Pool.release, Pool.reserve, PrefillRank.post

MUTANTS = [
    Mutant(
        "S1",
        "destination pages are released without waiting for any drain",
        "a late write, and its request is given up",
        guards={"all_have_drained": always},
    ),
    Mutant(
        "S1",
        "source pages are released under running writes",
        "a late write, and its request is given up",
        guards={"no_write_outstanding": always},
    ),
    Mutant(
        "S2",
        "facts act on whatever holds the room number",
        "rooms are reused while alive",
        rules={"identity": "room", "duplicate_room": "shared"},
    ),
    Mutant(
        "S3",
        "the end of a failed write brings its room back to Transferring",
        "writes fail",
        updates={"uncount_write": revive},
    ),
    Mutant(
        "S3",
        "a failed set-up is overwritten",
        "an endpoint cannot be had",
        rules={"setup_failure": "overwritten"},
    ),
    Mutant(
        "S4",
        "a late destination opens a tombstone",
        "prefill gives up while decode's answer is on its way",
        text=(
            (
                '{ from = ["Retired"], fact = "DestinationRegistered", to = "=", actions = ["AnswerDecode(Failed)"]',
                '{ from = ["Retired"], fact = "DestinationRegistered", to = "Announced", update = ["note_arrival"]',
            ),
        ),
    ),
    Mutant(
        "S4",
        "nothing is left of a cleared room, and a late destination makes a new one",
        "prefill gives up while decode's answer is on its way",
        rules={"clear_leaves": "nothing"},
    ),
    Mutant(
        "S5",
        "the first prefill rank's Success completes the room",
        "one of two prefill ranks has a slow link",
        guards={"response_completes": any_success_completes},
    ),
    Mutant(
        "S6",
        "decode looks on the next DP rank",
        "two data-parallel replicas",
        updates={"resolve_by_room": resolve_next_door},
    ),
    Mutant("S6", "nobody compares the DP ranks", "sglang-22901", rules={"dp_conflict": "unchecked"}),
    Mutant(
        "S7",
        "a stage drops what has failed locally",
        "sglang-34572",
        rules={"pp_decision": "consensus_or_local_failed"},
    ),
    Mutant(
        "S7",
        "each rank queues a request when it has resolved it, and queues are zipped",
        "sglang-21299",
        rules={"decode_enqueue": "after_resolution", "agreement": "by_position"},
    ),
    Mutant("S8", "a page is lost with every release", "happy", driver=(Pool, "release", release_and_lose_one)),
    Mutant("S8", "pages are handed out and stay free", "happy", driver=(Pool, "reserve", reserve_and_leave_free)),
    Mutant(
        "S9",
        "a failed leg is answered with success",
        "writes fail",
        text=(
            (
                'to = "Answered", cause = "detail", actions = ["AnswerClient(failed)", "CancelLeg"]',
                'to = "Answered", cause = "detail", actions = ["AnswerClient(ok)", "CancelLeg"]',
            ),
        ),
    ),
    Mutant(
        "S9",
        "the router makes up its cause",
        "writes fail",
        text=(
            (
                'fact = "LegFailed", to = "Answered", cause = "detail"',
                'fact = "LegFailed", to = "Answered", cause = "internal_error"',
            ),
        ),
    ),
    Mutant(
        "S10",
        "metadata may be sent only when it has been",
        "happy",
        text=(
            (
                'fact = "MetadataSent", guards = ["has_routes"], to = "="',
                'fact = "MetadataSent", guards = ["memory_is_exposed"], to = "="',
            ),
        ),
    ),
    Mutant(
        "S11", "the writer is one chunk ahead of the computation", "happy", driver=(PrefillRank, "post", post_one_chunk_ahead)
    ),
    Mutant(
        "S12",
        "two requests share a room",
        "rooms are reused while alive",
        rules={"identity": "room", "duplicate_room": "shared"},
    ),
    Mutant(
        "L1",
        "neither side bounds a transfer",
        "a write takes longer than any deadline",
        text=(('actions = ["CancelDeadline(admission)", "ArmDeadline(waiting)"]', 'actions = ["CancelDeadline(admission)"]'),),
        rules={"prefill_transfer_deadline": "none"},
    ),
    Mutant(
        "L1", "no timer ever rings", "a write takes longer than any deadline", driver=(Timers, "arm", lambda *_: None)
    ),
    Mutant(
        "L2",
        "the router does not cancel the other leg",
        "prefill gives up while decode waits for memory",
        text=(
            (
                'to = "Answered", cause = "detail", actions = ["AnswerClient(failed)", "CancelLeg"]',
                'to = "Answered", cause = "detail", actions = ["AnswerClient(failed)"]',
            ),
        ),
    ),
    Mutant(
        "L4",
        "nobody registers again with a server that has lost its memory",
        "the bootstrap server loses its memory",
        rules={"registration_watch": "none"},
    ),
    Mutant("L5", "the reaper needs new work", "happy", driver=(Timers, "_ring", ring_the_first_only)),
    Mutant(
        "L6", "the scheduler waits for HTTP", "the bootstrap server is slow", rules={"http_calls": "blocking"}
    ),
    Mutant(
        "L7",
        "decode's wait for its own memory is taken for prefill's silence",
        "decode has no memory for two minutes",
        text=(
            (
                'actions = ["CancelDeadline(bootstrap)", "ArmDeadline(admission)"]',
                'actions = ["CancelDeadline(bootstrap)", "ArmDeadline(waiting)"]',
            ),
        ),
    ),
    Mutant(
        "L7",
        "prefill gives up on a decode that waits for memory",
        "decode has no memory for two minutes",
        rules={"admission_timeout_s": 200},
    ),
    Mutant(
        "R1",
        "a finished transfer keeps its source pages",
        "happy",
        text=(
            (
                '{ poll = ["Success"], lease = ["Exposed"], to_lease = "Released", actions = ["ReleasePages"]',
                '{ poll = ["Success"], lease = ["Exposed"], to_lease = "Released", actions = []',
            ),
        ),
    ),
    Mutant(
        "R2",
        "an announced room waits for its owner for ever",
        "prefill never hears of a request",
        text=(
            (
                'to = "Announced", update = ["note_arrival"], actions = ["ArmDeadline(announced)"]',
                'to = "Announced", update = ["note_arrival"]',
            ),
        ),
    ),
    Mutant(
        "R3",
        "a rank that is not known yet is asked for a hundred times a second",
        "one of two replicas never hears of a request",
        rules={"dp_query_retry_s": 0.01},
    ),
    Mutant(
        "O1",
        "a dropped request stays where it is queued",
        "prefill gives up at once",
        text=(
            (
                '{ from = ["Bootstrap", "Waiting", "Inflight"], fact = "DropAgreed", to = "Done" }',
                '{ from = ["Bootstrap", "Waiting", "Inflight"], fact = "DropAgreed", to = "=" }',
            ),
        ),
    ),
    Mutant(
        "O1", "a later stage is told of admissions only", "sglang-26912", rules={"pp_decision": "consensus_good_only"}
    ),
    Mutant("O2", "health says that a thread answers", "the bootstrap server is late", rules={"health": "process_alive", "register_attempts": 1}),
    Mutant("O2", "ready counts PUTs", "bootstrap-double-put", rules={"ready_means": "count_of_puts"}),
]  # fmt: skip


def perform(mutant: Mutant, patch: pytest.MonkeyPatch) -> Outcome:
    protocol = mutant.protocol()
    for name, guard in mutant.guards.items():
        patch.setitem(GUARDS, name, guard)
    for name, update in mutant.updates.items():
        patch.setitem(UPDATES, name, update)
    if mutant.driver is not None:
        patch.setattr(*mutant.driver)
    return Run(protocol, scenario(mutant.scenario), mutant.profile(protocol))()


@functools.cache
def unmutated(name: str) -> Outcome:
    return Run(load(), scenario(name), load().profile("reference"))()


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[list[tuple[str, ...]]]:
    """Rows of (invariant, how, mutant, scenario), printed when all have run."""
    rows: list[tuple[str, ...]] = []
    yield rows
    print()
    for row in rows:
        print("{:4} {:11} {:76} {}".format(*row))


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{mutant.invariant}: {mutant.says}" for mutant in MUTANTS])
def test_a_mutant_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch, table: list[tuple[str, ...]]) -> None:
    sound = unmutated(mutant.scenario)
    assert sound.violations == {}
    assert sound.unfired == []
    outcome = perform(mutant, monkeypatch)
    assert mutant.invariant in outcome.violations
    table.append((mutant.invariant, mutant.how, mutant.says, mutant.scenario))


def test_every_invariant_with_a_monitor_has_a_mutant() -> None:
    judged = {invariant.id for invariant in INVARIANTS.values() if invariant.monitor is not None}
    assert {mutant.invariant for mutant in MUTANTS} == judged
    assert {invariant.id for invariant in INVARIANTS.values()} - judged == {"L3"}


def test_a_mutant_out_of_date_says_so() -> None:
    with pytest.raises(AssertionError, match="stands 0 times"):
        Mutant("S1", "", "happy", text=(("no such words", ""),)).protocol()
