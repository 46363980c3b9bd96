"""A behaviour of a model, written down move by move, and played in virtual time under the streaming monitors.

This is what a counterexample is kept as: a scenario file whose ``[schedule]`` names a model and the moves. Playing
it uses neither the search nor its tables: each move calls the step functions afresh, SimPy's clock goes on by
``STEP_S`` a move, and the same monitors judge that judge every simulation. So a counterexample of the explorer is
believed only after the simulator has seen it break.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

import simpy

from kvpoll.sim.explorer.judges import NOT_JUDGED
from kvpoll.sim.explorer.model import ModelFile, load_model
from kvpoll.sim.explorer.schedule_text import Schedule
from kvpoll.sim.explorer.system import Move, Outcome, System
from kvpoll.sim.run import Outcome as Result
from kvpoll.sim.run import Progress, Recorder
from kvpoll.spec.invariants import INVARIANTS, Watch
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput, nearest
from kvpoll.spec.trace import CollectiveEntered, Delivered, FaultBegan, FaultEnded, Lost, Marked, Sent, Stream
from kvpoll.spec.vocabulary import Incarnation

STEP_S: Final = 0.001
"""Virtual time between two moves."""


STAND_INS: Final = {"pipeline": ("D0",)}
"""Nodes whose steps a kind of model tells without a machine: a judge of the trace takes them at their word."""


class Stepper:
    """A system that is moved by hand, one named move at a time."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.state = system.initial()
        self._moves = {move.name: move for move in system.moves}
        self._cells = {cell.name: cell for cell in system.cells}

    def take(self, written: str) -> Outcome:
        """Make a move and return what came of it. Raises BadInput when it is not possible in this state."""
        name, _, label = written.partition(" | ")
        move = self._moves.get(name)
        if move is None:
            raise BadInput(f"{name!r} is not a move of model {self.system.name!r}{nearest(name, self._moves)}")
        if move.kind == "deadline" and any(self._moves_on(other) for other in self.system.moves if _is_prompt(other)):
            raise BadInput(f"{name!r} is not possible here: deadlines wait until nothing else can happen")
        outcomes = [outcome for told, outcome in self._told_apart(move) if label in ("", told)]
        if not outcomes:
            possible = [other.name for other in self.system.moves if self.outcomes(other)]
            raise BadInput(f"{written!r} is not possible here; possible are: {', '.join(possible)}")
        self.state.update(self._after(move, outcomes[0]))
        return outcomes[0]

    def move(self, written: str) -> Move:
        """The move that a line of a schedule names."""
        return self._moves[written.partition(" | ")[0]]

    def outcomes(self, move: Move) -> list[Outcome]:
        """What a move may lead to from here; what changes nothing is no step."""
        values = [self.state[cell] for cell in move.scope]
        return [each for each in move.act(*values) if each.effects or each.after != tuple(values)]

    def written(self, move: Move, outcome: Outcome) -> str:
        """How a schedule names this outcome."""
        told = self._told_apart(move)
        if len(told) == 1:
            return move.name
        return next(f"{move.name} | {label}" for label, each in told if each == outcome)

    def _told_apart(self, move: Move) -> list[tuple[str, Outcome]]:
        """The outcomes of a move, each with a label that no other has: of equal ones, the later ones are numbered."""
        told: dict[str, Outcome] = {}
        for outcome in self.outcomes(move):
            same = sum(each.label == outcome.label for each in told.values())
            told[f"{outcome.label} #{same + 1}" if same else outcome.label] = outcome
        return list(told.items())

    def _moves_on(self, move: Move) -> bool:
        """Would this move change anything?"""
        return any(self._after(move, outcome) for outcome in self.outcomes(move))

    def _after(self, move: Move, outcome: Outcome) -> dict[str, Any]:
        """The cells that an outcome changes, as it leaves them."""
        cells = dict(zip(move.scope, outcome.after, strict=True))
        for cell, operation in outcome.effects:
            apply = self._cells[cell].apply
            assert apply is not None
            cells[cell] = apply(cells.get(cell, self.state[cell]), operation)
        return {cell: value for cell, value in cells.items() if value != self.state[cell]}

    def survey(self) -> Iterator[Any]:
        """What every node says of itself now."""
        for cell in self.system.cells:
            yield from self.system.survey(cell.name, self.state[cell.name])


class Post:
    """Tells the messages of a behaviour: what a move put on a channel, took from it, or lost with it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._serials: dict[str, list[tuple[Any, int]]] = {name: [] for name in state if name.startswith("chan ")}
        self._count = 0

    def tell(self, move: Move, state: dict[str, Any], t: float) -> list[Any]:
        """Sent, Delivered and Lost events of the move that led to this state.

        What a fault takes from a channel is lost, and so is what arrives where no process is up.
        """
        told: list[Any] = []
        for name, underway in self._serials.items():
            _, sender, to = name.split(" ")
            now = list(state[name])
            lost = move.kind == "fault" or not getattr(state.get(to), "up", True)
            while underway and (not now or underway[0][0] != now[0]):
                message, serial = underway.pop(0)
                gone = Lost if lost else Delivered
                told.append(gone(t, to, sender, _said(message), _identity(message), serial))
            for message in now[len(underway) :]:
                self._count += 1
                underway.append((message, self._count))
                told.append(Sent(t, sender, to, _said(message), _identity(message), self._count))
        return sorted(told, key=lambda event: isinstance(event, Sent))


def _counted(event: Any, entered: Counter[tuple[str, str]]) -> Any:
    """A collective with the number that it has on this rank."""
    if not isinstance(event, CollectiveEntered):
        return event
    place = (event.group, event.node)
    entered[place] += 1
    return event._replace(sequence=entered[place] - 1)


def _faults(move: Move, outcome: Outcome, t: float) -> list[Any]:
    """A fault of the environment begins and ends with its move."""
    if move.kind != "fault":
        return []
    node = move.scope[0].split(" ")[-1]
    kind = next((mark.removeprefix("fault ") for mark in outcome.marks if mark.startswith("fault ")), "fault")
    return [FaultBegan(t, node, move.name, kind, ()), FaultEnded(t, node, move.name, kind)]


def _said(message: tuple[Any, ...]) -> str:
    """How a message is called in a picture: its kind, and the outcome that it carries if it does."""
    outcomes = [part for part in message[1:] if part in ("Success", "Failed")]
    return " ".join([str(message[0]), *outcomes])


def _identity(message: tuple[Any, ...]) -> Incarnation:
    return next((part for part in message if isinstance(part, Incarnation)), Incarnation(0, 0, 0))


def _is_prompt(move: Move) -> bool:
    return move.kind == "step" and move.fair


@dataclass
class ScheduledRun:
    """Plays a schedule as ``sim.run.Run`` plays a scenario, with the same kind of result."""

    protocol: Protocol
    scenario: Any
    profile: Profile
    seed: int | str = 0
    line: str = ""
    trace: IO[str] | None = None
    record: bool = False
    collect: list[Any] | None = None
    progress: Progress | None = None

    def __call__(self) -> Result:
        """Play it. Raises BadInput when a move is not possible."""
        began = time.perf_counter()
        schedule = self.scenario.schedule
        model = load_model(schedule.model, self.protocol)
        stepper = Stepper(model.build(self.protocol, self.profile))
        stream = Stream()
        watch = Watch(stream, self.protocol.bounds, tuple(name for name in INVARIANTS if name not in NOT_JUDGED))
        recorder = Recorder(stream, self._header(model), self.trace) if self.trace or self.record else None
        if self.collect is not None:
            stream.subscribe_all(self.collect.append)
        env, marks, events = simpy.Environment(), dict[str, int](), 0
        for now, happened, seen in self._play(env, stepper, schedule):
            watch.advance(now)
            for event in happened:
                stream.emit(event._replace(t=now))
                events += 1
            for mark in seen:
                marks[mark] = marks.get(mark, 0) + 1
                stream.emit(Marked(now, "R", mark))
        watch.finish(env.now)
        return self._result(watch, marks, events, env.now, time.perf_counter() - began, recorder)

    def _play(self, env: simpy.Environment, stepper: Stepper, schedule: Schedule) -> Iterator[Any]:
        """(time, events, marks) of each move, as SimPy's clock goes on."""
        post, entered = Post(stepper.state), Counter[tuple[str, str]]()
        yield env.now, stepper.system.start, ()
        for written in (*schedule.moves, *schedule.cycle):
            env.run(until=env.now + STEP_S)
            outcome = stepper.take(written)
            move = stepper.move(written)
            happened = outcome.events
            if stepper.system.numbers_kinds:
                happened = tuple(_counted(event, entered) for event in happened)
            events = (*happened, *post.tell(move, stepper.state, env.now))
            yield env.now, (*_faults(move, outcome, env.now), *events), outcome.marks
        if schedule.ends == "for ever":
            bounds = self.protocol.bounds
            env.run(until=env.now + 1 + max(bounds.end_s, bounds.recover_s, bounds.propagate_s, bounds.ownerless_s))
        if schedule.ends != "here":
            env.run(until=env.now + STEP_S)
            yield env.now, tuple(stepper.survey()), ()

    def _result(
        self, watch: Watch, marks: dict[str, int], events: int, now: float, wall_s: float, recorder: Recorder | None
    ) -> Result:
        return Result(
            scenario=self.scenario.name,
            profile=self.profile.name,
            seed=self.seed,
            line=self.line,
            violations=dict(watch.first),
            counts={name: count for name, count in watch.counts.items() if count},
            marks=marks,
            unfired=[],
            requests=0,
            succeeded=0,
            causes={},
            ttft_s=[],
            events=events,
            simulated_s=now,
            wall_s=wall_s,
            digest=recorder.digest if recorder is not None else None,
        )

    def _header(self, model: ModelFile) -> dict[str, Any]:
        return {
            "kvpoll_trace": 1,
            "spec": self.protocol.digest,
            "scenario": self.scenario.name,
            "scenario_digest": self.scenario.digest,
            "model_digest": model.digest,
            "title": self.scenario.title,
            "profile": self.profile.name,
            "seed": self.seed,
            "repeat": self.line,
            "not_machines": list(STAND_INS.get(model.kind, ())),
        }
