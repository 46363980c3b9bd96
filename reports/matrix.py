"""The page of the matrix: profiles against invariants, with a picture of the shortest trace in every broken cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvpoll.reports.spacetime import Panel, draw
from kvpoll.sim.explorer.matrix import Cell, Shortest, Verdict, as_object
from kvpoll.sim.explorer.schedule import ScheduledRun
from kvpoll.sim.scenario import parse_scenario
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Protocol
from kvpoll.spec.source import Source

HERE: Final = Path(__file__).resolve().parent
CANDIDATES: Final = HERE / "candidates.toml"
PICTURES: Final = "counterexamples"

Cells = Mapping[tuple[str, str], Cell]


def write(
    folder: Path,
    protocol: Protocol,
    profiles: Sequence[str],
    verdicts: Sequence[Verdict],
    cells: Cells,
    tell: Callable[[str], None],
) -> list[Path]:
    """Write matrix.json, matrix.md and the pictures and scenarios of broken cells into a folder."""
    pictures = _pictures(folder, protocol, profiles, cells, tell)
    ordered = sorted(verdicts, key=lambda verdict: (verdict.profile, verdict.model))
    data = {"spec": protocol.digest, "verdicts": [as_object(verdict) for verdict in ordered]}
    (folder / "matrix.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = folder / "matrix.md"
    page.write_text(render(protocol, profiles, ordered, cells, pictures), encoding="utf-8")
    return [page, folder / "matrix.json", *sorted({folder / name for name in pictures.values()})]


def _pictures(
    folder: Path, protocol: Protocol, profiles: Sequence[str], cells: Cells, tell: Callable[[str], None]
) -> dict[tuple[str, str], str]:
    """One picture for each distinct behaviour; profiles that share a behaviour share its picture."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for old in (folder / PICTURES).iterdir():
        old.unlink()
    drawn: dict[tuple[str, ...], str] = {}
    named: dict[tuple[str, str], str] = {}
    for profile in profiles:
        for invariant in INVARIANTS:
            found = cells[profile, invariant].found
            if found is None:
                continue
            key = (invariant, *found.moves)
            if key not in drawn:
                name = f"{PICTURES}/{profile}-{invariant}"
                tell(f"drawing {name}")
                _draw(folder / f"{name}.png", protocol, profile, cells[profile, invariant], found)
                (folder / f"{name}.toml").write_text(found.scenario, encoding="utf-8")
                drawn[key] = f"{name}.png"
            named[profile, invariant] = drawn[key]
    return named


def _draw(place: Path, protocol: Protocol, profile: str, cell: Cell, found: Shortest) -> None:
    scenario = parse_scenario(Source(place.stem, found.scenario), protocol, place.stem)
    events: list[Any] = []
    ScheduledRun(protocol, scenario, protocol.profile(profile), collect=events)()
    ends = "" if not found.cycle else f", then {found.cycle} for ever"
    panel = Panel(f"{cell.model}, {profile}", f"{cell.invariant} after {found.length} moves{ends}", events)
    draw([panel], place, found.text)


# -- the page


def render(
    protocol: Protocol,
    profiles: Sequence[str],
    verdicts: Sequence[Verdict],
    cells: Cells,
    pictures: Mapping[tuple[str, str], str],
) -> str:
    """The page as Markdown."""
    parts = [
        "# What holds under which profile",
        "Written by `kvpoll matrix`; do not edit. Every model of `spec/models/` was explored completely under every "
        "profile. A number is the length, in moves, of the shortest behaviour that breaks the invariant, and leads "
        "to its picture; beside the picture stands the same behaviour as a scenario (`kvpoll run FILE`). A number "
        "with + goes on for ever. `holds`: no behaviour of any model breaks it. `-`: no model exercises it.",
        _table(profiles, cells, pictures),
        _not_judged(),
        "## SGLang 0.5.23, candidate by candidate",
        *_candidates(cells),
        "## The models",
        _models(verdicts),
    ]
    return "\n\n".join(parts) + "\n"


def _table(profiles: Sequence[str], cells: Cells, pictures: Mapping[tuple[str, str], str]) -> str:
    heads = [profile.replace("sglang-", "") if "-sglang-" in profile else profile for profile in profiles]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(profiles)]
    for name, invariant in INVARIANTS.items():
        row = [_shown(cells[profile, name], pictures.get((profile, name))) for profile in profiles]
        lines.append(f"| {name} {invariant.name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _shown(cell: Cell, picture: str | None) -> str:
    if cell.found is None:
        return "holds" if cell.verdict == "holds" else "-"
    more = "+" if cell.found.cycle else ""
    return f"[**{cell.length}{more}**]({picture})"


def _not_judged() -> str:
    from kvpoll.sim.explorer.judges import NOT_JUDGED

    said = "; ".join(f"{name}: {why}" for name, why in NOT_JUDGED.items())
    waiting = "; ".join(f"{each.id}: {each.waits_for}" for each in INVARIANTS.values() if each.waits_for)
    return f"Not judged by exploration (the simulator judges them): {said}. Without a monitor: {waiting}."


def candidates() -> list[dict[str, Any]]:
    """The candidates of the race catalogue's section 3, with what the explorer says of each. Raises BadInput."""
    source = Source(CANDIDATES)
    entries: list[dict[str, Any]] = source.data.get("candidate", [])
    for place, entry in enumerate(entries):
        path = ("candidate", place)
        source.require_all(path, entry, ("id", "claim", "verdict", "advice"), "a candidate")
        if entry["verdict"] not in ("confirmed", "refuted", "open"):
            raise source.error(path, 'verdict must be "confirmed", "refuted" or "open"')
    return entries


def _candidates(cells: Cells) -> list[str]:
    parts = []
    for entry in candidates():
        evidence = ""
        if "invariant" in entry:
            cell = cells.get(("sglang-0.5.23", entry["invariant"]))
            model = entry["model"]
            evidence = f" Model `{model}`, invariant {entry['invariant']}"
            if cell is not None and cell.model == model and cell.length is not None:
                evidence += f", {cell.length} moves"
            evidence += f"; with `{entry['mend']}` it holds." if "mend" in entry else "."
        parts.append(
            f"**{entry['id']}, {entry['verdict']}.** {entry['claim'].strip()}{evidence} {entry['advice'].strip()}"
        )
    return parts


def _models(verdicts: Sequence[Verdict]) -> str:
    lines = ["| model | profile | states | seconds | liveness | not witnessed |", "|---|---|---:|---:|---|---|"]
    for each in verdicts:
        if each.profile in ("reference", "sglang-0.5.23"):
            missing = ", ".join(each.unwitnessed) or "-"
            live = "judged" if each.liveness else "-"
            lines.append(
                f"| {each.model} | {each.profile} | {each.states:,} | {each.seconds:.1f} | {live} | {missing} |"
            )
    return "\n".join(lines)


__all__ = ["candidates", "render", "write"]
