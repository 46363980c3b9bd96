"""The ranks of one engine as processes: collectives and turns over the control plane.

The siblings of ``sim.group``. Rank 0 of a group gathers what the ranks bring to a collective, steps its machine, and
gives every rank what all have brought; where the machine says that the ranks block, nobody gets anything, as with
gloo and NCCL. Turns need no leader: whoever wants one tells the others its number.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.control.messages import Envelope, Message
from kvpoll.runtime.host import Host
from kvpoll.runtime.loop import Happening
from kvpoll.spec.trace import CollectiveEntered
from kvpoll.spec.vocabulary import Incarnation
from kvpoll.statemachine.agreement import Memory, Report
from kvpoll.statemachine.ranks.host import Request, Waiting
from kvpoll.statemachine.ranks.prefill import NOBODY, Step
from kvpoll.statemachine.roles import Collective

_write: Final = msgspec.msgpack.Encoder().encode

Commands = tuple[tuple[Any, ...], ...]
_PAYLOADS: Final[dict[tuple[str, str], Any]] = {
    ("prefill", "step"): tuple[Commands, dict[str, Report], int],
    ("decode", "step"): tuple[Commands, dict[str, Report], Memory],
    ("prefill", "requests"): Commands,
    ("decode", "requests"): Commands,
}
"""What ranks bring to a collective, by side and kind; every other kind brings a vector of polls."""


def read_payload(side: str, kind: str, payload: bytes) -> Any:
    """What ``_write`` wrote, with the requests in its commands restored."""
    found = msgspec.msgpack.decode(payload, type=_PAYLOADS.get((side, kind), list[int]))
    if kind == "step":
        return (read_commands(found[0]), *found[1:])
    return read_commands(found) if kind == "requests" else found


def read_commands(commands: Any) -> Commands:
    """Commands as ranks know them: ("open", Request), ("abort", rid, cause), ("generated", rid)."""
    return tuple(
        (kind, msgspec.convert(rest[0], Request)) if kind == "open" else (kind, *rest) for kind, *rest in commands
    )


class Collectives:
    """The sequence of collectives of one group, as the rank with this ``index`` sees it."""

    def __init__(self, host: Host, name: str, nodes: tuple[str, ...], index: int, side: str) -> None:
        self.host = host
        self.name = name
        self.nodes = nodes
        self.index = index
        self.side = side
        self.size = len(nodes)
        self.blocked = False
        self._next = 0
        self._waiting: dict[int, tuple[Happening, str]] = {}
        self._gathered: dict[int, tuple[Collective, list[bytes]]] = {}

    def enter(self, index: int, node: str, kind: str, shape: Any, payload: Any) -> Waiting:
        """Enter the next collective; returns the payloads of all ranks once all have entered one like it."""
        sequence = self._next
        self._next += 1
        host = self.host
        host.emit(CollectiveEntered(host.now, node, self.name, sequence, kind, shape))
        happening = host.happening()
        self._waiting[sequence] = (happening, kind)
        entry = wire.Enter(self.name, sequence, index, kind, str(shape), _write(payload))
        if index == 0:
            self.entered(entry)
        else:
            host.tell(self.nodes[0], entry, "Enter", NOBODY, any_life=False)
        payloads = yield happening
        return [read_payload(self.side, kind, each) for each in payloads]

    def entered(self, entry: wire.Enter) -> None:
        """Rank 0: a rank has brought what it has."""
        state, payloads = self._gathered.get(entry.sequence) or (Collective(), [b""] * self.size)
        payloads[entry.index] = entry.payload
        detail = (entry.index, self.size, (entry.kind, entry.shape))
        state, orders = self.host.machines.collective.step(state, "RankEntered", detail)
        self._gathered[entry.sequence] = (state, payloads)
        for order, _ in orders:
            if order == "DeliverDecision":
                del self._gathered[entry.sequence]
                self._tell_all(wire.Deliver(self.name, entry.sequence, tuple(payloads)))
            elif order == "BlockRanks":
                self.host.mark(self.nodes[0], "collective_mismatch")
                self._tell_all(wire.Mismatch(self.name, entry.sequence))

    def _tell_all(self, message: wire.Deliver | wire.Mismatch) -> None:
        for node in self.nodes[1:]:
            self.host.tell(node, message, type(message).__name__, NOBODY, any_life=False)
        self.heard(message)

    def heard(self, message: wire.Deliver | wire.Mismatch) -> None:
        """Rank 0 says how a collective ended."""
        if isinstance(message, wire.Mismatch):
            self.block()
        elif message.sequence in self._waiting:
            happening, _ = self._waiting.pop(message.sequence)
            happening.succeed(message.payloads)

    def block(self) -> None:
        """The collective can never complete: this rank hangs in it."""
        if not self.blocked:
            self.blocked = True
            if self.host.rank is not None:
                self.host.rank.engine.report_health()


class Turns:
    """The turns that the ranks of one group take together, asleep while there is nothing to see."""

    def __init__(self, host: Host, name: str, others: tuple[str, ...] = ()) -> None:
        self.host = host
        self.name = name
        self.others = others
        self._wanted = 0
        self._begun = 0
        self._sleeper: Happening | None = None

    def wake(self) -> None:
        """Something changed: one more turn for everybody, after the one that this rank has begun."""
        self._want(self._begun + 1)

    def again(self, index: int) -> None:
        """The turn that this rank has just taken changed something: one more after it."""
        self._want(self._begun + 1)

    def _want(self, turn: int) -> None:
        if turn > self._wanted:
            for node in self.others:
                self.host.tell(node, wire.TurnWanted(self.name, turn), "TurnWanted", NOBODY, any_life=False)
        self.wanted(turn)

    def wanted(self, turn: int) -> None:
        """A rank of the group wants this turn to be taken."""
        if turn <= self._wanted:
            return
        self._wanted = turn
        if self._sleeper is not None:
            sleeper, self._sleeper = self._sleeper, None
            sleeper.succeed()

    def rest(self, index: int) -> Waiting:
        """Sleep until a turn is wanted that this rank has not begun, then begin it."""
        if self._begun >= self._wanted:
            sleeper = self._sleeper = self.host.happening()
            yield sleeper
        self._begun += 1


class Group:
    """One rank's place among the processes of its replica: a decode group, or a pipeline of prefill stages.

    stages: node names, stage by stage; decode has one. pp, index: where this rank stands.
    """

    def __init__(
        self, host: Host, name: str, dp: int, stages: tuple[tuple[str, ...], ...], pp: int, index: int
    ) -> None:
        self.host = host
        self.name = name
        self.dp = dp
        self.nodes = stages
        self.stages = len(stages)
        self.size = sum(map(len, stages))
        self.pp = pp
        self.index = index
        self.side = "prefill" if name.startswith("P") else "decode"
        stage_name = f"{name}/pp{pp}" if self.side == "prefill" else name
        own = stages[pp][index]
        self.collectives = Collectives(host, stage_name, stages[pp], index, self.side)
        self.turns = Turns(host, name, tuple(node for node in stages[0] if node != own))
        self._steps: dict[str, Any] = {}
        host.written = self.write  # type: ignore[method-assign]
        host.mail |= {
            wire.Enter: self._entered, wire.Deliver: self._ended, wire.Mismatch: self._ended,
            wire.TurnWanted: self._turn_wanted, wire.Step: self._step, wire.Agreed: self._agreed,
        }  # fmt: skip

    # -- what a rank asks of its group

    def stage_collectives(self, pp: int) -> Collectives:
        """The collectives of this rank's stage."""
        return self.collectives

    def stage_turns(self) -> Turns:
        """Turns of a rank of a later stage, which follows the steps of stage 0."""
        return Turns(self.host, f"{self.name}/follow")

    def wake(self) -> None:
        """Every rank of stage 0 takes a turn; the later stages follow."""
        self.turns.wake()

    def block(self) -> None:
        """The pipeline hangs."""
        self.collectives.block()

    def leader_of(self, rank: Any) -> str:
        """The stage-0 rank of the same column."""
        return self.nodes[0][self.index]

    def successor_of(self, rank: Any) -> str | None:
        """The same column's rank in the next stage."""
        return self.nodes[self.pp + 1][self.index] if self.pp + 1 < self.stages else None

    # -- messages

    def write(self, kind: str, incarnation: Incarnation, arguments: tuple[Any, ...]) -> Message:
        """A message between ranks of this engine."""
        if kind == "StageStatus":
            stage, rid, report = arguments
            return wire.StageStatus(incarnation, stage, rid, report.poll, report.cause)
        if kind == "Step":
            (step,) = arguments
            return wire.Step(step.number, _write(step))
        return wire.Agreed(arguments[0])

    def _is_ours(self, envelope: Envelope) -> bool:
        return any(envelope.node in stage for stage in self.nodes)

    def _entered(self, envelope: Envelope, message: wire.Enter) -> None:
        known = message.group == self.collectives.name and message.index < self.collectives.size
        if known and self.index == 0 and self.collectives.nodes[message.index] == envelope.node:
            self.collectives.entered(message)

    def _ended(self, envelope: Envelope, message: wire.Deliver | wire.Mismatch) -> None:
        if message.group == self.collectives.name and envelope.node == self.collectives.nodes[0]:
            self.collectives.heard(message)

    def _turn_wanted(self, envelope: Envelope, message: wire.TurnWanted) -> None:
        if message.group == self.turns.name and self._is_ours(envelope):
            self.turns.wanted(message.turn)

    def _step(self, envelope: Envelope, message: wire.Step) -> None:
        if self._is_ours(envelope):
            step = msgspec.msgpack.decode(message.payload, type=Step)
            step = step._replace(commands=read_commands(step.commands))
            self.host.rank.receive("Step", NOBODY, step)

    def _agreed(self, envelope: Envelope, message: wire.Agreed) -> None:
        if self._is_ours(envelope):
            self.host.rank.receive("Agreed", NOBODY, message.candidates)
