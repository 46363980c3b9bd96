"""Writes the tables of ``kvpoll.toml`` as a TLA+ module: ``python -m kvpoll.spec.tables_tla``.

TLC is a second opinion on the explorer only if both decide from the same rows and from nothing else in common. So
the rows, and the rule values of every profile, are generated; what a guard or an update *means* is written twice,
once in ``statemachine/`` and once, by hand, in ``spec/tla/Machine.tla``. A test says when ``Tables.tla`` is stale.

What is left out: rules counted in seconds or fractions. The machines have no clock, so no step asks for them, and
TLA+ has no number for 0.2.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvpoll.spec.protocol import Joint, Profile, Protocol, Role, Row, Rule, Table, Value, load

TABLES_PATH = Path(__file__).with_name("tla") / "Tables.tla"
COMMAND = "python -m kvpoll.spec.tables_tla"
NONE = "None"
"""How a missing text is written: no argument, no cause."""

CLOCK_UNITS = ("seconds", "fraction")
WIDTH = 110

_HEADER = """\
-------------------------------- MODULE Tables --------------------------------
(* GENERATED from spec/kvpoll.toml by `{command}`; edit that file
   and run it again. A test says when this file is stale.

   Nothing here decides anything: Machine.tla says how rows are tried and taken.

   row      from    states in which it applies        fact     what happened
            guards  all must hold                     to       next state ("=" stays)
            update  bookkeeping, in order             actions  <<name, argument>>, argument "None" if there is none
            when    <<rule, values>>: all rules must have one of the values, or the row does not exist
            cause   first failure cause to remember ("None": no; "detail": taken from the fact)
   joint    polls, leases: the pair of states that triggers it; to_poll, to_lease: where it leads
   ignored, illegal   <<fact, states>>: what is said of a cell in which no row is taken
   stale    <<fact, actions>>: what a fact meant for an incarnation that is over is answered

   The comment behind a row is its source in kvpoll.toml, with the invariants that it breaks, if any. *)
EXTENDS Integers, Sequences, TLC
"""


def render(protocol: Protocol) -> str:
    """The whole module. Equal protocols give equal texts."""
    parts = [_HEADER.format(command=COMMAND), _profiles(protocol)]
    parts += [_role(role) for role in protocol.roles.values()]
    names = ",\n".join(f"  {name} |-> {_role_name(name)}" for name in protocol.roles)
    parts.append(f"Roles == [\n{names}]\n")
    parts.append("=" * 79 + "\n")
    return "\n".join(parts)


def rules_record(protocol: Protocol, profile: Profile) -> str:
    """The rules of any profile, also one with switched rules, as the TLA+ record that Machine.tla calls Rules."""
    return _wrapped("[", [f"{name} |-> {_literal(profile.rules[name])}" for name in _told(protocol)], "]")


def _told(protocol: Protocol) -> list[str]:
    """Names of the rules that a step may ask for."""
    return [name for name, rule in protocol.rules.items() if _is_told(rule)]


def _is_told(rule: Rule) -> bool:
    return rule.unit not in CLOCK_UNITS


# -- profiles


def _profiles(protocol: Protocol) -> str:
    parts = ["\\* ---- profiles: the value of every rule that a step may ask for\n"]
    parts += [_profile(protocol, profile) for profile in protocol.profiles.values()]
    names = [f'"{name}" :> {_profile_name(name)}' for name in protocol.profiles]
    parts.append("Profiles ==\n     " + "\n  @@ ".join(names) + "\n")
    return "\n".join(parts)


def _profile(protocol: Protocol, profile: Profile) -> str:
    """A profile in full, or as what it changes in the profile that it stands on."""
    head = f"\\* {profile.name}: {profile.title}\n{_profile_name(profile.name)} ==\n  "
    if profile.base is None:
        return head + rules_record(protocol, profile) + "\n"
    base = protocol.profiles[profile.base]
    changed = [name for name in _told(protocol) if profile.rules[name] != base.rules[name]]
    if not changed:
        return head + _profile_name(profile.base) + "\n"
    entries = [f"!.{name} = {_literal(profile.rules[name])}" for name in changed]
    return head + _wrapped(f"[{_profile_name(profile.base)} EXCEPT ", entries, "]") + "\n"


def _profile_name(name: str) -> str:
    return "Rules_" + re.sub(r"\W", "_", name)


def _role_name(name: str) -> str:
    return f"Role_{name}"


def _literal(value: Value) -> str:
    """A count with a fraction is rounded up, which is what comparing whole numbers with it comes to."""
    return _text(value) if isinstance(value, str) else str(math.ceil(value))


# -- roles


def _role(role: Role) -> str:
    stale = [f"<<{_text(fact)}, {_actions(answers)}>>" for fact, answers in role.stale.items()]
    lines = [f"\\* ---- {role.name}: {role.title}\n", f"{_role_name(role.name)} == [", *_table(role.table, "  ")]
    lines[-1] += ","
    lines.append("  lease |-> [")
    lines += _table(role.lease, "    ") if role.lease is not None else _no_table("    ")
    lines[-1] += "],"
    lines += _listed("joint", [(_joint(joint), joint.row) for joint in role.joint], "  ", ",")
    lines += _listed("stale", [(text, None) for text in stale], "  ", "]")
    return "\n".join(lines) + "\n"


def _table(table: Table, indent: str) -> list[str]:
    """The fields of one machine, without the closing bracket."""
    lines = [
        f"{indent}states |-> {_set(table.states)},",
        f"{indent}initial |-> {_text(table.initial)},",
        f"{indent}terminal |-> {_set(table.terminal)},",
        f"{indent}facts |-> {_set(table.facts)},",
    ]
    lines += _listed("rows", [(_row(row), row) for row in table.rows], indent, ",")
    lines += _listed("ignored", _cells(table.ignored), indent, ",")
    lines += _listed("illegal", _cells(table.illegal), indent, "")
    return lines


def _no_table(indent: str) -> list[str]:
    """A role that holds no pages has a lease that hears nothing, so that all roles have one form."""
    return [
        f'{indent}states |-> {{}}, initial |-> "{NONE}", terminal |-> {{}}, facts |-> {{}},',
        f"{indent}rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>",
    ]


def _cells(said: Mapping[str, tuple[str, ...]]) -> list[tuple[str, Row | None]]:
    return [(f"<<{_text(fact)}, {_set(states)}>>", None) for fact, states in said.items()]


def _listed(name: str, items: list[tuple[str, Row | None]], indent: str, end: str) -> list[str]:
    """A sequence, one element a line, each with the comment of the row it is."""
    if not items:
        return [f"{indent}{name} |-> <<>>{end}"]
    lines = [f"{indent}{name} |-> <<"]
    for place, (text, row) in enumerate(items, start=1):
        comma = "," if place < len(items) else ""
        lines.append(f"{indent}  {text}{comma}{_comment(row)}")
    return [*lines, f"{indent}>>{end}"]


def _row(row: Row) -> str:
    return f"[from |-> {_set(row.states)}, fact |-> {_text(row.fact)}, to |-> {_text(row.to)}, {_orders(row)}]"


def _joint(joint: Joint) -> str:
    to = f"to_poll |-> {_text(joint.to_poll)}, to_lease |-> {_text(joint.to_lease)}"
    # `to` is spelled twice so that a joint row can be taken like any other row, in the field of the lease.
    return (
        f"[polls |-> {_set(joint.polls)}, leases |-> {_set(joint.leases)}, {to}, "
        f"to |-> {_text(joint.to_lease)}, {_orders(joint.row)}]"
    )


def _orders(row: Row) -> str:
    when = _sequence(f"<<{_text(rule)}, {_set(map(str, values))}>>" for rule, values in row.when.items())
    return (
        f"guards |-> {_sequence(map(_text, row.guards))}, update |-> {_sequence(map(_text, row.update))}, "
        f"actions |-> {_actions(row.actions)}, when |-> {when}, cause |-> {_text(row.cause or NONE)}"
    )


def _actions(actions: Iterable[tuple[str, str | None]]) -> str:
    return _sequence(f"<<{_text(name)}, {_text(argument or NONE)}>>" for name, argument in actions)


def _comment(row: Row | None) -> str:
    said = [] if row is None else [row.source or "", f"breaks {', '.join(row.defect)}" if row.defect else ""]
    text = "; ".join(filter(None, said))
    return f" \\* {text}" if text else ""


def _text(text: str) -> str:
    return f'"{text}"'


def _set(texts: Iterable[str]) -> str:
    return "{" + ", ".join(map(_text, texts)) + "}"


def _sequence(texts: Iterable[str]) -> str:
    return "<<" + ", ".join(texts) + ">>"


def _wrapped(start: str, entries: list[str], end: str) -> str:
    """Entries after one another, on as few lines as are readable."""
    lines = [start]
    for place, entry in enumerate(entries, start=1):
        piece = entry + ("," if place < len(entries) else end)
        if len(lines[-1]) + len(piece) >= WIDTH:
            lines.append("    ")
        lines[-1] += piece if lines[-1].endswith(("[", "    ", "EXCEPT ")) else f" {piece}"
    return "\n".join(lines)


def write(path: Path = TABLES_PATH) -> Path:
    """Write the module from the protocol as it stands."""
    path.write_text(render(load()), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1]) if len(sys.argv) > 1 else TABLES_PATH))
