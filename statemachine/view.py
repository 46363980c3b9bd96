"""The same tables seen through the ``transitions`` library, for users who want callbacks and its diagrams.

A view holds no decision of its own. Rows of the table become transitions of the library (facts are triggers,
guards are conditions), and every step is taken by ``Machine.step``; a test walks every reachable state and
fact and finds the two equal. It is slow beside the table, so no driver uses it.

    view = as_transitions(protocol.roles["sender"], profile, on_enter_Failed=page_someone)
    view.offer("RequestOpened", 1)          # or view.model.RequestOpened(1)
    view.state, view.lease, view.actions    # "Bootstrapping", "Unreserved", (("ArmDeadline", "bootstrap"),)

What this file will not do: identity. A view is one incarnation; ``RoomMachine.step_room`` settles whose fact
it is. Known warts: ``may_<fact>()`` asks the guards of the main table only, not the lease; a room that joint
rows retire enters its last state by a trigger of its own, ``Settled``; and a callback runs after the step is
decided, so what it reads of the view (``local``, ``lease``, ``actions``) is already the outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpoll.spec.protocol import SAME, Profile, Role, Row
from kvpoll.spec.source import BadInput, nearest
from kvpoll.statemachine.guards import GUARDS
from kvpoll.statemachine.machine import ABSENT, Machine, Orders
from kvpoll.statemachine.roles import STARTS

if TYPE_CHECKING:
    import transitions

SETTLED = "Settled"
"""The trigger of joint rows that move the poll: a cleared room is retired once its memory is back."""

Callback = Callable[[Any], bool | None]
_PLACES = ("on_enter", "on_exit")
_MOMENTS = ("before_state_change", "after_state_change")


class Model:
    """What carries the triggers, one method a fact, when the user brings no object of his own."""

    view: View
    state: str


class View:
    """One machine of a role, driven through the ``transitions`` library.

    machine: the library's Machine. model: the object that carries the triggers; its ``view`` leads back here.
    local: the whole state, as ``Machine.step`` knows it. actions: what the latest fact ordered, as (action
    name, detail) pairs.
    """

    machine: transitions.Machine

    def __init__(self, role: Role, profile: Profile, model: Any) -> None:
        self.table = Machine(role, profile)
        self.model = model
        self.local: Any = ABSENT if role.lease is not None else STARTS[role.name]
        self.actions: Orders = ()
        self._before = self.local

    @property
    def state(self) -> str:
        """Name of the state that the library has its model in; a room's poll."""
        return str(self.model.state)

    @property
    def lease(self) -> str | None:
        """Name of the memory state; None for a role that holds no pages."""
        return str(self.local.lease) if self.table.role.lease is not None else None

    def offer(self, fact: str, detail: Any = None) -> Orders:
        """Take one step and return what it orders.

        Raises IllegalFact; then nothing moved and no callback ran. Raises BadInput for an unknown fact.
        """
        if fact not in self.table.role.table.facts:
            known = self.table.role.table.facts
            raise BadInput(f"role {self.table.role.name!r} has no fact {fact!r}{nearest(fact, known)}")
        self.model.trigger(fact, detail)
        return self.actions

    def restore(self, local: Any) -> None:
        """Go to a state without taking a step and without callbacks."""
        self.local = local
        self.actions = ()
        self.machine.set_state(local[0], self.model)

    def take(self, event: Any) -> None:
        """First callback of every step: let the table decide, before anything is moved."""
        if event.event.name == SETTLED:
            return
        self._before = self.local
        after, orders = self.table.step(self.local, event.event.name, _detail(event))
        self.local, self.actions = after, orders
        if after[0] != (event.transition.dest or event.transition.source):
            self.model.trigger(SETTLED)

    def conclude(self, event: Any) -> None:
        """Last callback of every fact: one that no row took has ordered nothing."""
        if not event.result:
            self.actions = ()

    def recover(self, event: Any) -> None:
        """No row is here: the table knows whether that is illegal. A callback that raises undoes its step."""
        if event.transition is None:
            self.table.step(self.local, event.event.name, _detail(event))
            return
        self.restore(self._before)
        raise event.error


def as_transitions(
    role: Role,
    profile: Profile,
    model: Any = None,
    machine_class: Callable[..., transitions.Machine] | None = None,
    **callbacks: Callback,
) -> View:
    """One machine of ``role`` under ``profile`` as a ``transitions`` machine.

    model: object to carry the triggers; its methods ``on_enter_<State>`` are called, as the library promises.
    machine_class: what builds the library's machine, for example its GraphMachine.
    callbacks: ``on_enter_<State>``, ``on_exit_<State>``, ``before_state_change`` or ``after_state_change``,
    each a function of the library's EventData. Facts offered by a callback are taken after the current one.
    Raises ImportError when the library is missing, BadInput for a callback that names no state.
    """
    machine_class = machine_class or _library_machine()
    view = View(role, profile, Model() if model is None else model)
    view.model.view = view
    placed = _placed(role, callbacks)
    view.machine = machine_class(
        model=view.model,
        states=[_state(name, role, placed) for name in role.table.states],
        initial=role.table.initial,
        transitions=[*_rows(view), *_unrowed(view), *_settling(view)],
        auto_transitions=False,
        send_event=True,
        queued=True,
        before_state_change=[view.take, *placed.get("before_state_change", [])],
        after_state_change=placed.get("after_state_change", []),
        finalize_event=view.conclude,
        on_exception=view.recover,
    )
    return view


def _library_machine() -> type[transitions.Machine]:
    try:
        import transitions
    except ImportError:
        raise ImportError(
            "a view needs the library transitions, which is not installed: pip install 'kvpoll[transitions]'"
        ) from None
    return transitions.Machine


def _placed(role: Role, callbacks: dict[str, Callback]) -> dict[str, list[str | Callback]]:
    """Check the names of callbacks before the library, which would overlook a wrong one."""
    valid = [*_MOMENTS, *(f"{place}_{state}" for place in _PLACES for state in role.table.states)]
    for name in callbacks:
        if name not in valid:
            raise BadInput(f"role {role.name!r} has no callback {name!r}{nearest(name, valid)}")
    return {name: [callback] for name, callback in callbacks.items()}


def _state(name: str, role: Role, placed: dict[str, list[str | Callback]]) -> dict[str, Any]:
    here = {place: placed.get(f"{place}_{name}", []) for place in _PLACES}
    return {"name": name, "final": name in role.table.terminal, **here}


def _rows(view: View) -> list[dict[str, Any]]:
    """One transition for each row and state, in the order in which the table tries them."""
    role, profile = view.table.role, view.table.profile
    return [
        {
            "trigger": fact,
            "source": state,
            "dest": None if row.to in (SAME, state) else row.to,
            "conditions": _conditions(view, row),
        }
        for fact in role.table.facts
        for state in role.table.states
        for row in role.table.cell(state, fact, profile)
    ]


def _conditions(view: View, row: Row) -> list[Callback]:
    return [_condition(view, guard) for guard in row.guards]


def _condition(view: View, guard: str) -> Callback:
    def holds(event: Any) -> bool:
        return GUARDS[guard](view.local, _detail(event), view.table.profile)

    holds.__name__ = guard  # what the library's diagrams show
    return holds


def _unrowed(view: View) -> list[dict[str, Any]]:
    """Cells where no row need hold, and yet something follows: the lease hears the fact, or it is illegal.

    A fact that no row hears under this profile gets a cell too, or the library would not know its name.
    """
    role, profile = view.table.role, view.table.profile
    heard = {row.fact for row in role.table.rows if row.exists_in(profile)}
    in_lease = set(role.lease.facts) if role.lease is not None else set()
    cells = [(fact, role.table.initial) for fact in role.table.facts if fact not in heard | in_lease]
    for fact in role.table.facts:
        for state in role.table.states:
            rows = role.table.cell(state, fact, profile)
            illegal = state in role.table.illegal.get(fact, ())
            certain = any(not row.guards for row in rows)
            if (illegal and rows) or (fact in in_lease and not illegal and not certain):
                cells.append((fact, state))
    return [{"trigger": fact, "source": state, "dest": None} for fact, state in cells]


def _settling(view: View) -> list[dict[str, Any]]:
    return [
        {
            "trigger": SETTLED,
            "source": poll,
            "dest": joint.to_poll,
            "conditions": lambda event, to=joint.to_poll: view.local[0] == to,
        }
        for joint in view.table.role.joint
        if joint.row.exists_in(view.table.profile) and joint.to_poll != SAME
        for poll in joint.polls
    ]


def _detail(event: Any) -> Any:
    return event.args[0] if event.args else event.kwargs.get("detail")
