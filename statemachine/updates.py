"""The bookkeeping that rows of ``spec/kvpoll.toml`` name: pure changes of a state, given a fact's detail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Update = Callable[[Any, Any], Any]
UPDATES: dict[str, Update] = {}


def _update(function: Update) -> Update:
    UPDATES[function.__name__] = function
    return function


# -- rooms


@_update
def own(state: Any, detail: Any) -> Any:
    return state._replace(owned=True)


@_update
def adopt(state: Any, detail: Any) -> Any:
    """The newcomer uses the old entry as its own; the machine gives it the newcomer's identity."""
    return state._replace(cleared=False)


@_update
def expect(state: Any, detail: Any) -> Any:
    return state._replace(expected=detail)


@_update
def note_arrival(state: Any, detail: Any) -> Any:
    return state._replace(arrived=state.arrived | 1 << detail[0])


@_update
def note_abort(state: Any, detail: Any) -> Any:
    return state._replace(asked=state.asked | 1 << detail)


@_update
def count_write(state: Any, detail: Any) -> Any:
    return state._replace(outstanding=state.outstanding + 1, last=state.last or bool(detail))


@_update
def uncount_write(state: Any, detail: Any) -> Any:
    return state._replace(outstanding=max(0, state.outstanding - 1))


@_update
def note_routes(state: Any, detail: Any) -> Any:
    contacted, required = detail
    return state._replace(contacted=contacted, expected=required)


@_update
def note_response(state: Any, detail: Any) -> Any:
    return state._replace(arrived=state.arrived | 1 << detail[0])


@_update
def note_drain(state: Any, detail: Any) -> Any:
    return state._replace(drained=state.drained | 1 << detail)


@_update
def note_death(state: Any, detail: Any) -> Any:
    """A dead process writes nothing any more: its ranks have drained (ENGINES 4)."""
    return state._replace(drained=state.drained | detail)


@_update
def note_refusal(state: Any, detail: Any) -> Any:
    """Whoever may write to the room is refused by the owner itself: all have drained (ENGINES 4)."""
    return state._replace(drained=state.contacted)


@_update
def mark_cleared(state: Any, detail: Any) -> Any:
    return state._replace(cleared=True)


@_update
def forget(state: Any, detail: Any) -> Any:
    return type(state)()


# -- rendezvous


@_update
def count_attempt(state: Any, detail: Any) -> Any:
    """Another PUT of this series; its answer will be of the server as it is now."""
    return state._replace(attempt=state.attempt + 1, replaced=False)


@_update
def first_attempt(state: Any, detail: Any) -> Any:
    return state._replace(attempt=1, replaced=False)


@_update
def no_attempt(state: Any, detail: Any) -> Any:
    return state._replace(attempt=0, replaced=False)


@_update
def meet_server(state: Any, detail: Any) -> Any:
    """A PUT goes to the server as it is now; one that is exhausted no longer counts them."""
    return state._replace(replaced=False)


@_update
def mark_replaced(state: Any, detail: Any) -> Any:
    return state._replace(replaced=True)


@_update
def enter_rank(state: Any, detail: Any) -> Any:
    """The newest process of a rank retires the endpoint of its predecessor."""
    rank, epoch, _ = detail
    if any(name == rank and known > epoch for name, known in state.ranks):
        return state._replace(puts=state.puts + 1)
    others = tuple(entry for entry in state.ranks if entry[0] != rank)
    return state._replace(ranks=tuple(sorted((*others, (rank, epoch)))), puts=state.puts + 1)


@_update
def remove_rank(state: Any, detail: Any) -> Any:
    """A rank leaves on purpose; what counts PUTs counts one less, since that is what it calls readiness (C1)."""
    ranks = tuple(entry for entry in state.ranks if entry[0] != detail[0])
    return state._replace(ranks=ranks, puts=max(0, state.puts - 1) if ranks else 0)


@_update
def enter_dp_rank(state: Any, detail: Any) -> Any:
    return state._replace(rank=detail)


@_update
def resolve_zero(state: Any, detail: Any) -> Any:
    return state._replace(rank=0)


@_update
def resolve_by_room(state: Any, detail: Any) -> Any:
    return state._replace(rank=detail[2])


@_update
def resolve_by_answer(state: Any, detail: Any) -> Any:
    return state._replace(rank=detail)


@_update
def believe_epoch(state: Any, detail: Any) -> Any:
    return state._replace(epoch=max(detail, state.epoch or 0), misses=0)


@_update
def count_miss(state: Any, detail: Any) -> Any:
    return state._replace(misses=state.misses + 1)


# -- collectives


@_update
def enter_collective(state: Any, detail: Any) -> Any:
    index, _, shape = detail
    return state._replace(entered=state.entered | 1 << index, shape=shape)
