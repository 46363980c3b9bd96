"""The conditions that rows of ``spec/kvpoll.toml`` name: pure questions about a state and a fact's detail.

Each guard is called as ``guard(state, detail, profile)`` and answers yes or no. A guard never looks at a rule
that a row could name in ``when`` instead; the exceptions are numeric rules (limits).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpoll.spec.protocol import Profile

Guard = Callable[[Any, Any, Profile], bool]
GUARDS: dict[str, Guard] = {}


def _guard(function: Guard) -> Guard:
    GUARDS[function.__name__] = function
    return function


def _timer(name: str) -> None:
    GUARDS[f"timer_is_{name}"] = lambda state, detail, profile: detail == name


for _name in ("bootstrap", "transfer", "announced", "tombstone", "waiting", "admission", "drain"):
    _timer(_name)


# -- senders


@_guard
def needs_no_destination(state: Any, detail: Any, profile: Profile) -> bool:
    """A dummy CP rank moves no bytes (PROTOCOL 4.1, P1')."""
    return detail == 0


@_guard
def abort_was_early(state: Any, detail: Any, profile: Profile) -> bool:
    return state.asked != 0


@_guard
def destinations_were_complete(state: Any, detail: Any, profile: Profile) -> bool:
    return state.arrived.bit_count() >= detail


@_guard
def arrival_completes(state: Any, detail: Any, profile: Profile) -> bool:
    """This destination is the last one that was missing; its message says how many there are."""
    index, required = detail
    return (state.arrived | 1 << index).bit_count() >= required


@_guard
def was_last_write(state: Any, detail: Any, profile: Profile) -> bool:
    return state.last and state.outstanding == 1


@_guard
def no_write_outstanding(state: Any, detail: Any, profile: Profile) -> bool:
    return state.outstanding == 0


@_guard
def abort_is_owed(state: Any, detail: Any, profile: Profile) -> bool:
    return state.asked != 0


@_guard
def has_no_owner(state: Any, detail: Any, profile: Profile) -> bool:
    return not state.owned


# -- receivers


@_guard
def has_routes(state: Any, detail: Any, profile: Profile) -> bool:
    return state.contacted != 0


@_guard
def has_no_routes(state: Any, detail: Any, profile: Profile) -> bool:
    return not has_routes(state, detail, profile)


@_guard
def outcome_is_failed(state: Any, detail: Any, profile: Profile) -> bool:
    return detail[1] == "Failed"


@_guard
def response_completes(state: Any, detail: Any, profile: Profile) -> bool:
    """Success from the k-th distinct prefill rank (PROTOCOL 4.2, D6); duplicates do not count."""
    return outcome_is_success(state, detail, profile) and (
        (state.arrived | 1 << detail[0]).bit_count() >= state.expected > 0
    )


@_guard
def outcome_is_success(state: Any, detail: Any, profile: Profile) -> bool:
    return bool(detail[1] == "Success")


@_guard
def is_not_committed(state: Any, detail: Any, profile: Profile) -> bool:
    """The room's pages have not been handed to the running request yet (that happens with Cleared)."""
    return state.poll == "Success" and not state.cleared


@_guard
def memory_is_exposed(state: Any, detail: Any, profile: Profile) -> bool:
    return state.lease == "Exposed"


@_guard
def all_have_drained(state: Any, detail: Any, profile: Profile) -> bool:
    return state.drained & state.contacted == state.contacted


@_guard
def not_all_have_drained(state: Any, detail: Any, profile: Profile) -> bool:
    return not all_have_drained(state, detail, profile)


@_guard
def a_sibling_lives(state: Any, detail: Any, profile: Profile) -> bool:
    """Of the prefill ranks that this room contacts, some are not among those that died."""
    return bool(state.contacted & ~detail)


# -- both


@_guard
def memory_is_back(state: Any, detail: Any, profile: Profile) -> bool:
    return state.lease in ("Unreserved", "Settled", "Released")


@_guard
def was_cleared(state: Any, detail: Any, profile: Profile) -> bool:
    return state.cleared


@_guard
def remembers_success(state: Any, detail: Any, profile: Profile) -> bool:
    return state.cause is None


@_guard
def remembers_failure(state: Any, detail: Any, profile: Profile) -> bool:
    return state.cause is not None


# -- rendezvous


@_guard
def server_was_replaced(state: Any, detail: Any, profile: Profile) -> bool:
    return bool(state.replaced)


@_guard
def attempts_left(state: Any, detail: Any, profile: Profile) -> bool:
    return state.attempt < profile.number("register_attempts")


@_guard
def registration_completes(state: Any, detail: Any, profile: Profile) -> bool:
    """Ready is a set of ranks; SGLang counts PUTs, so a retried PUT counts twice (C1)."""
    rank, _, expected = detail
    if profile["ready_means"] == "count_of_puts":
        return state.puts + 1 >= expected
    return len({name for name, _ in state.ranks} | {rank}) >= expected


@_guard
def rank_is_known(state: Any, detail: Any, profile: Profile) -> bool:
    return detail is None or any(name == detail for name, _ in state.ranks)


@_guard
def rank_is_listed(state: Any, detail: Any, profile: Profile) -> bool:
    return any(name == detail[0] for name, _ in state.ranks)


@_guard
def a_later_life_is_listed(state: Any, detail: Any, profile: Profile) -> bool:
    return any(name == detail[0] and epoch > detail[1] for name, epoch in state.ranks)


@_guard
def is_the_last_rank(state: Any, detail: Any, profile: Profile) -> bool:
    return len(state.ranks) == 1 and rank_is_listed(state, detail, profile)


@_guard
def one_dp_rank(state: Any, detail: Any, profile: Profile) -> bool:
    return detail[0] == 1


@_guard
def follows_the_room(state: Any, detail: Any, profile: Profile) -> bool:
    return bool(detail[1])


@_guard
def answer_is_known(state: Any, detail: Any, profile: Profile) -> bool:
    return detail is not None


@_guard
def epoch_is_new(state: Any, detail: Any, profile: Profile) -> bool:
    return state.epoch is not None and detail > state.epoch


@_guard
def miss_is_last(state: Any, detail: Any, profile: Profile) -> bool:
    return state.misses + 1 >= profile.number("heartbeat_max_failure")


# -- collectives


@_guard
def shape_differs(state: Any, detail: Any, profile: Profile) -> bool:
    return state.entered != 0 and state.shape != detail[2]


@_guard
def everyone_entered(state: Any, detail: Any, profile: Profile) -> bool:
    index, size, _ = detail
    return (state.entered | 1 << index).bit_count() >= size
