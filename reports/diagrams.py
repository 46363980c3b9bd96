"""The protocol as pictures and pages, all generated from ``spec/kvpoll.toml``.

``python -m kvpoll.reports.diagrams`` rewrites docs/protocol.md and docs/diagrams/; a test says when they are
stale.

The SVG is drawn here, with plain rectangles and lines, because no pure Python library lays out labelled
edges. States stand in one column in the order of the spec; every label stands on the line that leaves its
state; all lines into one state share one vertical trunk, in one colour, with one arrow head. So labels cannot
overlap, whatever the table says, and the same table gives the same bytes on every machine.
"""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from kvpoll.reports import style
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import SAME, Joint, Profile, Protocol, Role, Row, Rule, Table, Value, load
from kvpoll.spec.vocabulary import POLL_NUMBERS

HOUSE: Final = Path(__file__).resolve().parents[1]
COMMAND: Final = "python -m kvpoll.reports.diagrams"

# ----------------------------------------------------------------------------------------------------
# Edges: what both pictures draw
# ----------------------------------------------------------------------------------------------------


class Edges(NamedTuple):
    """One machine as a graph. moves: (source, target) -> labels. stays: state -> facts heard there."""

    states: tuple[str, ...]
    initial: str
    terminal: tuple[str, ...]
    moves: dict[tuple[str, str], list[str]]
    stays: dict[str, list[str]]


def poll_edges(role: Role, profile: Profile) -> Edges:
    """The main machine of a role, and the joint rows that move it."""
    edges = _edges(role.table, profile)
    for joint in _joints(role, profile):
        if joint.to_poll != SAME:
            label = _guarded(f"lease {' or '.join(joint.leases)}", joint.row.guards)
            _add(edges, joint.polls, joint.to_poll, label)
    return _visible(edges)


def lease_edges(role: Role, profile: Profile) -> Edges | None:
    """The memory machine of a role, and the joint rows that move it. None where no pages are held."""
    if role.lease is None:
        return None
    edges = _edges(role.lease, profile)
    for joint in _joints(role, profile):
        if joint.to_lease != SAME:
            label = _guarded(f"poll {' or '.join(joint.polls)}", joint.row.guards)
            _add(edges, joint.leases, joint.to_lease, label)
    return _visible(edges)


def _visible(edges: Edges) -> Edges:
    """Without the states that no row leads to under this profile, and without what would leave them."""
    reached = {edges.initial}
    while more := {target for source, target in edges.moves if source in reached} - reached:
        reached |= more
    return edges._replace(
        states=tuple(state for state in edges.states if state in reached),
        moves={pair: labels for pair, labels in edges.moves.items() if pair[0] in reached},
    )


def _joints(role: Role, profile: Profile) -> list[Joint]:
    return [joint for joint in role.joint if joint.row.exists_in(profile)]


def _edges(table: Table, profile: Profile) -> Edges:
    edges = Edges(table.states, table.initial, table.terminal, {}, {})
    for row in table.rows:
        if row.exists_in(profile):
            _add(edges, row.states, row.to, _label(row))
    return edges


def _add(edges: Edges, sources: Iterable[str], target: str, label: str) -> None:
    for source in sources:
        if target in (SAME, source):
            known, told = edges.stays.setdefault(source, []), label.split(" [")[0]
        else:
            known, told = edges.moves.setdefault((source, target), []), label
        if told not in known:
            known.append(told)


def _label(row: Row) -> str:
    """Fact and guards; a guard that only says which timer is meant becomes the fact's argument."""
    timers = [guard.removeprefix("timer_is_") for guard in row.guards if guard.startswith("timer_is_")]
    others = [guard for guard in row.guards if not guard.startswith("timer_is_")]
    return _guarded(f"{row.fact}({timers[0]})" if timers else row.fact, others)


def _guarded(label: str, guards: Sequence[str]) -> str:
    return f"{label} [{', '.join(guards)}]" if guards else label


# ----------------------------------------------------------------------------------------------------
# Mermaid
# ----------------------------------------------------------------------------------------------------


def mermaid(role: Role, profile: Profile) -> str:
    """A Mermaid state diagram: one arrow for each pair of states, its facts one below the other."""
    lines = ["stateDiagram-v2"]
    lease = lease_edges(role, profile)
    if lease is None:
        lines += _mermaid_edges(poll_edges(role, profile), "", "    ")
    else:
        for name, edges in (("poll", poll_edges(role, profile)), ("lease", lease)):
            lines += [f"    state {name} {{", *_mermaid_edges(edges, f"{name}_", "        "), "    }"]
    return "\n".join(lines) + "\n"


def _mermaid_edges(edges: Edges, prefix: str, indent: str) -> Iterator[str]:
    if prefix:
        yield from (f'{indent}state "{state}" as {prefix}{state}' for state in edges.states)
    yield f"{indent}[*] --> {prefix}{edges.initial}"
    for (source, target), labels in edges.moves.items():
        yield f"{indent}{prefix}{source} --> {prefix}{target} : {'<br/>'.join(labels)}"


# ----------------------------------------------------------------------------------------------------
# SVG
# ----------------------------------------------------------------------------------------------------

MONO: Final = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
SANS: Final = "'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif"
LABEL_PX: Final = 10
STAY_PX: Final = 9
ADVANCE: Final = 0.61  # a monospaced letter is at most this much of its size wide, in every font named above
LINE_PX: Final = 13
LABEL_CHARS: Final = 42
BOX_PX: Final = 150
LANE_PX: Final = 13
GAP_PX: Final = 14
MARGIN_PX: Final = 24
TOP_PX: Final = 78
HEAD_PX: Final = 36
LABEL_AREA_PX: Final = round(LABEL_CHARS * LABEL_PX * ADVANCE) + 18

LINES: Final = {
    "Failed": style.VERMILLION,
    "Success": style.GREEN,
    "Transferring": style.BLUE,
    "WaitingForInput": "#2A86BF",
    "Bootstrapping": "#9A8700",
}
"""Trunk colours of the polls: those of the figures, darker where a thin line would be hard to see."""

OTHER_LINES: Final = (style.PURPLE, "#B87A00", style.QUIET, style.BLUE, style.GREEN, style.VERMILLION)


class Placed(NamedTuple):
    """A state in the column, in pixels: top and height of its box, where lines arrive, where each leaves."""

    top: int
    height: int
    port: int
    exits: dict[str, int]


def svg(role: Role, profile: Profile) -> str:
    """The role's machine, and its lease beside it, as SVG text. The same input gives the same bytes."""
    panels = [("poll" if role.lease else "", poll_edges(role, profile))]
    lease = lease_edges(role, profile)
    if lease is not None:
        panels.append(("lease", lease))
    parts: list[str] = []
    left, bottom = MARGIN_PX, 0
    for heading, edges in panels:
        placed = _place(edges)
        parts += _panel(left, heading, edges, placed)
        left += _panel_width(edges) + MARGIN_PX
        bottom = max(bottom, *(state.top + state.height for state in placed.values()))
    title = _text(MARGIN_PX, 26, role.title, 14, style.INK, SANS, "bold")
    under = _text(MARGIN_PX, 42, f"profile {profile.name}", 10, style.QUIET, SANS)
    width = max(left, 2 * MARGIN_PX + 10 * len(role.title))
    return _document(width, bottom + MARGIN_PX, role.title, [title, under, *parts])


def _document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    size = f'width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}"'
    paper = f'<rect {size} fill="{style.PAPER}"/>'
    return "\n".join([f'{head} role="img">', f"<title>{escape(title)}</title>", paper, *parts, "</svg>", ""])


def _panel_width(edges: Edges) -> int:
    return BOX_PX + LABEL_AREA_PX + LANE_PX * (len(_targets(edges)) + 1)


def _targets(edges: Edges) -> list[str]:
    return [state for state in edges.states if any(target == state for _, target in edges.moves)]


def _place(edges: Edges) -> dict[str, Placed]:
    """Boxes from top to bottom, each as high as what leaves it and what it hears without leaving."""
    placed = {}
    top = TOP_PX
    for state in edges.states:
        y = top + HEAD_PX
        exits = {}
        for (source, target), labels in edges.moves.items():
            if source == state:
                y += LINE_PX * len(_wrapped(labels)) + 6
                exits[target] = y
        stays = len(edges.stays.get(state, []))
        inside = HEAD_PX + (LINE_PX * (stays + 1) if stays else 0)
        height = max(y - top, inside) + 8
        placed[state] = Placed(top, height, top + 16, exits)
        top += height + GAP_PX
    return placed


def _wrapped(labels: Sequence[str]) -> list[str]:
    return [line for label in labels for line in textwrap.wrap(label, LABEL_CHARS, subsequent_indent="    ")]


def _panel(left: int, heading: str, edges: Edges, placed: Mapping[str, Placed]) -> Iterator[str]:
    if heading:
        yield _text(left, TOP_PX - 14, heading, 12, style.QUIET, SANS, "bold")
    lanes = _lanes(left, edges, placed)
    for target, colour in _colours(edges).items():
        yield from _trunk(left + BOX_PX, lanes[target], target, colour, placed)
    for state in edges.states:
        yield from _box(left, state, edges, placed[state])
        yield from _labels(left + BOX_PX + 10, state, edges, placed[state])


def _colours(edges: Edges) -> dict[str, str]:
    """One colour a trunk: the poll's own, else the next that is free."""
    others = itertools.cycle(OTHER_LINES)
    return {target: LINES.get(target) or next(others) for target in _targets(edges)}


def _lanes(left: int, edges: Edges, placed: Mapping[str, Placed]) -> dict[str, int]:
    """x of each trunk; short trunks stand inside long ones, so that fewer lines cross."""

    def length(target: str) -> int:
        ends = [*_joins(target, placed), placed[target].port]
        return max(ends) - min(ends)

    first = left + BOX_PX + LABEL_AREA_PX
    inside_out = sorted(_targets(edges), key=lambda target: (length(target), edges.states.index(target)))
    return {target: first + LANE_PX * number for number, target in enumerate(inside_out)}


def _joins(target: str, placed: Mapping[str, Placed]) -> list[int]:
    return [state.exits[target] for state in placed.values() if target in state.exits]


def _trunk(right: int, x: int, target: str, colour: str, placed: Mapping[str, Placed]) -> Iterator[str]:
    """Every line into ``target``: from its source to the trunk, along it, and one arrow into the box."""
    port, joins = placed[target].port, _joins(target, placed)
    pen = f'stroke="{colour}" stroke-width="1.6" fill="none"'
    yield f'<path d="M{x} {min(port, *joins)}V{max(port, *joins)}M{x} {port}H{right + 7}" {pen}/>'
    yield f'<path d="M{right} {port}l9 -4.5v9z" fill="{colour}"/>'
    for y in joins:
        yield f'<path d="M{right} {y}H{x}" {pen}/><circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>'


def _box(left: int, state: str, edges: Edges, placed: Placed) -> Iterator[str]:
    look = style.POLL_LOOKS.get(state) or style.LEASE_LOOKS.get(state)
    fill, ink = (look.fill, look.text) if look else (style.BAND, style.INK)
    frame = f'x="{left}" y="{placed.top}" width="{BOX_PX}" rx="5"'
    yield f'<rect {frame} height="{placed.height}" fill="{style.BAND}" stroke="{style.QUIET}"/>'
    yield f'<rect {frame} height="{HEAD_PX - 4}" fill="{fill}" stroke="{style.QUIET}"/>'
    if state in edges.terminal:
        inner = f'x="{left + 3}" y="{placed.top + 3}" width="{BOX_PX - 6}" height="{HEAD_PX - 10}" rx="3"'
        yield f'<rect {inner} fill="none" stroke="{ink}"/>'
    if state == edges.initial:
        y = placed.top + (HEAD_PX - 4) // 2
        yield f'<circle cx="{left - 12}" cy="{y}" r="5" fill="{style.INK}"/>'
        yield f'<path d="M{left - 8} {y}H{left}" stroke="{style.INK}" stroke-width="1.6"/>'
    number = f" {POLL_NUMBERS[state]}" if state in POLL_NUMBERS else ""
    yield _text(left + 9, placed.top + 21, state + number, 11, ink, SANS, "bold")
    for line, fact in enumerate(["hears", *edges.stays[state]] if state in edges.stays else []):
        y = placed.top + HEAD_PX + 8 + LINE_PX * line
        yield _text(left + 9, y, fact, STAY_PX, style.QUIET, MONO if line else SANS)


def _labels(x: int, state: str, edges: Edges, placed: Placed) -> Iterator[str]:
    for target, y in placed.exits.items():
        lines = _wrapped(edges.moves[state, target])
        for number, line in enumerate(lines):
            indent = (len(line) - len(line.lstrip())) * LABEL_PX * ADVANCE
            above = LINE_PX * (len(lines) - number - 1) + 5
            yield _text(round(x + indent), y - above, line.lstrip(), LABEL_PX, style.INK, MONO)


def _text(x: int, y: int, text: str, size: int, colour: str, family: str, weight: str = "normal") -> str:
    font = f'font-family="{family}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {font} fill="{colour}">{escape(text)}</text>'


# ----------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------


def transition_table(role: Role, profile: Profile) -> str:
    """Markdown: what each fact does in each state, then every row with guards, orders, rules and source."""
    parts = [_matrix(role.table, profile), _row_list(role.table.rows, profile)]
    if role.lease is not None:
        parts += ["#### Lease", _matrix(role.lease, profile), _row_list(role.lease.rows, profile)]
        parts += ["#### Joint rows", _joint_list(_joints(role, profile))]
    if role.stale:
        rows = [(f"`{fact}`", _orders(orders)) for fact, orders in role.stale.items()]
        parts += ["#### Facts meant for an incarnation that is over", markdown(("fact", "answer"), rows)]
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Cells may hold any text without line breaks."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _matrix(table: Table, profile: Profile) -> str:
    rows = [(f"`{fact}`", *(_cell(table, state, fact, profile) for state in table.states)) for fact in table.facts]
    return markdown(("", *table.states), rows)


def _cell(table: Table, state: str, fact: str, profile: Profile) -> str:
    """Targets in order of trial; ``stays`` for a row that keeps the state; in italics what is left over."""
    rows = table.cell(state, fact, profile)
    targets = ["stays" if row.to in (SAME, state) else f"**{row.to}**" for row in rows]
    if not any(not row.guards for row in rows):
        targets.append("*illegal*" if state in table.illegal.get(fact, ()) else "*ignored*")
    return " / ".join(dict.fromkeys(targets))


def _row_list(rows: Iterable[Row], profile: Profile) -> str:
    head = ("from", "fact", "if", "to", "orders", "cause", "bookkeeping", "when rule", "source")
    return markdown(head, [_row_cells(row) for row in rows if row.exists_in(profile)])


def _row_cells(row: Row) -> tuple[str, ...]:
    to = "stays" if row.to == SAME else row.to
    return (
        ", ".join(row.states),
        f"`{row.fact}`",
        _names(row.guards),
        to,
        _orders(row.actions),
        row.cause or "",
        _names(row.update),
        _when(row),
        row.source or "",
    )


def _joint_list(joints: Iterable[Joint]) -> str:
    rows = [
        (
            ", ".join(joint.polls),
            ", ".join(joint.leases),
            _names(joint.row.guards),
            _moves(joint),
            _orders(joint.row.actions),
            _when(joint.row),
            joint.row.source or "",
        )
        for joint in joints
    ]
    return markdown(("poll", "lease", "if", "then", "orders", "when rule", "source"), rows)


def _moves(joint: Joint) -> str:
    moves = (("poll", joint.to_poll), ("lease", joint.to_lease))
    return ", ".join(f"{machine} {to}" for machine, to in moves if to != SAME)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _orders(actions: Iterable[tuple[str, str | None]]) -> str:
    return ", ".join(f"`{name}({argument})`" if argument else f"`{name}`" for name, argument in actions)


def _when(row: Row) -> str:
    return ", ".join(f"{rule} = {' or '.join(values)}" for rule, values in row.when.items())


def _alternatives(role: Role, reference: Profile) -> str:
    """The rows that only other profiles have, with the invariants that they break; may be empty."""
    others = [
        (*texts, _orders(row.actions), _when(row), ", ".join(row.defect), row.source or "")
        for *texts, row in _every_row(role)
        if not row.exists_in(reference)
    ]
    head = ("from", "fact", "if", "to", "orders", "when rule", "breaks", "source")
    return markdown(head, others) if others else ""


def _every_row(role: Role) -> Iterator[tuple[str, str, str, str, Row]]:
    """(from, fact, guards, to) as text, and the row itself."""
    for row in (*role.table.rows, *(role.lease.rows if role.lease else ())):
        to = "stays" if row.to == SAME else row.to
        yield ", ".join(row.states), f"`{row.fact}`", _names(row.guards), to, row
    for joint in role.joint:
        pair = f"{', '.join(joint.polls)} with {', '.join(joint.leases)}"
        yield pair, "", _names(joint.row.guards), _moves(joint), joint.row


# ----------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------

PREFACE: Final = f"""# The protocol

<!-- Generated from spec/kvpoll.toml by `{COMMAND}`; edit that file and run it again. -->

Every table and picture here is generated from `spec/kvpoll.toml`, under the profile `reference`.

**How to read a picture.** A box is a state; the number is its KVPoll value; a double frame is terminal; the
dot is where a machine begins. A line leaves its state under the facts that take it, with guards in brackets;
all lines into one state share a trunk of one colour. What a box *hears* does not leave it.

**How to read a table.** Rows are tried in order, and the first whose guards hold is taken. *ignored* means
that the fact is expected and does nothing; *illegal* means that it raises `IllegalFact` and moves nothing.
Joint rows are triggered by the pair of states alone, after every step. In *source*, P and D numbers are the
transitions of sender and receiver in SGLang 0.5.23; A, B and C numbers are known races.
"""


def page(protocol: Protocol) -> str:
    """docs/protocol.md as text."""
    reference = protocol.profile("reference")
    parts = [PREFACE.rstrip(), "## Roles"]
    parts += [f"- [{role.title}](#{name})" for name, role in protocol.roles.items()]
    for role in protocol.roles.values():
        parts.append(_role_section(role, reference))
    parts += ["## Orders", _meanings("order", protocol.actions)]
    parts += ["## Rules", _rule_list(protocol, reference), "## Profiles", _profile_list(protocol)]
    bounds = zip(protocol.bounds._fields, map(_plain, protocol.bounds), strict=True)
    parts += ["## Bounds", markdown(("bound", "value"), bounds)]
    parts += ["## Invariants", _invariant_list(protocol)]
    return "\n\n".join(_joined_lists(parts)) + "\n"


def _meanings(what: str, meanings: Mapping[str, str]) -> str:
    return markdown((what, "meaning"), ((f"`{name}`", meaning) for name, meaning in meanings.items()))


def _joined_lists(parts: Iterable[str]) -> Iterator[str]:
    """Neighbouring list items belong to one list."""
    items: list[str] = []
    for part in parts:
        if part.startswith("- "):
            items.append(part)
            continue
        if items:
            yield "\n".join(items)
            items = []
        yield part


def _role_section(role: Role, reference: Profile) -> str:
    picture = f"![{role.title}](diagrams/{role.name}.svg)\n\n[Mermaid source](diagrams/{role.name}.mmd)"
    facts, table = _meanings("fact", role.table.facts), transition_table(role, reference).rstrip()
    parts = [f"### {role.name}", _sentence(role.title), picture, facts, table]
    others = _alternatives(role, reference)
    if others:
        parts += ["#### Rows of other profiles", others]
    return "\n\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _rule_list(protocol: Protocol, reference: Profile) -> str:
    """Choices with their values, then numbers with their units, each beside what SGLang does."""
    sglang = protocol.profiles.get("sglang-0.5.23", reference)
    choices = [rule for rule in protocol.rules.values() if rule.kind == "choice"]
    numbers = [rule for rule in protocol.rules.values() if rule.kind == "number"]
    head = ("`reference`", f"`{sglang.name}`", "SGLang's variable", "source")
    first = [(f"`{rule.name}`", _values(rule), *_chosen(rule, reference, sglang)) for rule in choices]
    second = [(f"`{rule.name}`", rule.unit or "", *_chosen(rule, reference, sglang)) for rule in numbers]
    return f"{markdown(('rule', 'values', *head), first)}\n\n{markdown(('rule', 'unit', *head), second)}"


def _values(rule: Rule) -> str:
    return "; ".join(f"`{value}`: {meaning}" for value, meaning in rule.values.items())


def _chosen(rule: Rule, *profiles: Profile) -> tuple[str, ...]:
    values = [f"`{_plain(profile[rule.name])}`" for profile in profiles]
    return (*values, _variable(rule), rule.source or "")


def _variable(rule: Rule) -> str:
    return f"`{rule.env}`" if rule.env else ""


def _plain(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _profile_list(protocol: Protocol) -> str:
    """Each profile with what it changes relative to its base."""
    rows = [
        (
            f"`{profile.name}`",
            profile.title,
            f"`{profile.base}`" if profile.base else "",
            _changes(protocol, profile),
            profile.upstream or "",
        )
        for profile in protocol.profiles.values()
    ]
    return markdown(("profile", "what it shows", "base", "changes", "upstream"), rows)


def _changes(protocol: Protocol, profile: Profile) -> str:
    if profile.base is None:
        return "chooses every rule, see above"
    base = protocol.profile(profile.base)
    changed = {rule: value for rule, value in profile.rules.items() if base[rule] != value}
    return ", ".join(f"`{rule}` = `{_plain(value)}`" for rule, value in changed.items())


def _invariant_list(protocol: Protocol) -> str:
    """Each invariant, and the rules under which a row of some table is known to break it."""
    rows = [
        (invariant.id, invariant.name, invariant.klass, invariant.sentence, _breakers(protocol, invariant.id))
        for invariant in INVARIANTS.values()
    ]
    return markdown(("id", "name", "class", "what must hold", "broken by rows under"), rows)


def _breakers(protocol: Protocol, invariant: str) -> str:
    rows = [row for role in protocol.roles.values() for *_, row in _every_row(role)]
    return "; ".join(dict.fromkeys(_when(row) for row in rows if invariant in row.defect))


# ----------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------


def documents(protocol: Protocol) -> dict[str, str]:
    """Every generated file, by its path below the top of the house, with its text."""
    reference = protocol.profile("reference")
    texts = {"docs/protocol.md": page(protocol)}
    for name, role in protocol.roles.items():
        texts[f"docs/diagrams/{name}.svg"] = svg(role, reference)
        texts[f"docs/diagrams/{name}.mmd"] = mermaid(role, reference)
    return texts


def write_docs(root: Path, protocol: Protocol | None = None) -> list[Path]:
    """Write docs/protocol.md and docs/diagrams/ below ``root``; returns the files written."""
    written = []
    for name, text in documents(protocol or load()).items():
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    print(*write_docs(Path(sys.argv[1]) if len(sys.argv) > 1 else HOUSE), sep="\n")
