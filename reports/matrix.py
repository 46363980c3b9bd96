"""The page of the matrix: profiles against invariants, with a picture of the shortest trace in every broken cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvpoll.reports.behaviours import draw_behaviour
from kvpoll.sim.explorer.judges import NOT_JUDGED
from kvpoll.sim.explorer.matrix import Cell, Shortest, Verdict, as_object, blame
from kvpoll.sim.explorer.schedule import ScheduledRun
from kvpoll.sim.scenario import parse_scenario
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Protocol, check_rule_values
from kvpoll.spec.source import BadInput, Source

HERE: Final = Path(__file__).resolve().parent
CANDIDATES: Final = HERE / "candidates.toml"
PICTURES: Final = "counterexamples"
_CANDIDATE: Final = {
    "id": str, "title": str, "model": str, "invariant": str, "rules": dict, "given": dict, "verdict": str,
    "evidence": str, "claim": str, "advice": str,
}  # fmt: skip

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
    tell("exploring the candidates")
    found = blames(protocol)
    pictures = _pictures(folder, protocol, profiles, cells, tell)
    ordered = sorted(verdicts, key=lambda verdict: (verdict.profile, verdict.model))
    data = {"spec": protocol.digest, "verdicts": [as_object(verdict) for verdict in ordered]}
    (folder / "matrix.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = folder / "matrix.md"
    page.write_text(render(protocol, profiles, ordered, cells, pictures, found), encoding="utf-8")
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
    told = f"{cell.invariant} after {found.length} moves{ends}"
    draw_behaviour(place, found.text, f"{cell.model}, {profile}", told, events)


# -- the page


def render(
    protocol: Protocol,
    profiles: Sequence[str],
    verdicts: Sequence[Verdict],
    cells: Cells,
    pictures: Mapping[tuple[str, str], str],
    found: Mapping[str, Shortest | None],
) -> str:
    """The page as Markdown. ``found``: what the rules of each candidate do."""
    parts = [
        "# What holds under which profile",
        "Written by `kvpoll matrix`; do not edit. Every model of `spec/models/` was explored under every profile. "
        "A number is the length, in moves, of the shortest behaviour that breaks the invariant, and leads "
        "to its picture; beside the picture stands the same behaviour as a scenario (`kvpoll run FILE`). A number "
        "with + goes on for ever. `holds`: no behaviour of any model breaks it. `to N`: no behaviour of N moves "
        "breaks it, and a model was too large to be finished. `-`: no model exercises it.",
        _table(profiles, cells, pictures),
        _not_judged(),
        "## SGLang 0.5.23, candidate by candidate",
        *(_candidate(entry, found.get(entry["id"])) for entry in candidates(protocol)),
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
        return {"holds": "holds", "not exercised": "-"}.get(cell.verdict, f"to {cell.length}")
    more = "+" if cell.found.cycle else ""
    return f"[**{cell.length}{more}**]({picture})"


def _not_judged() -> str:
    said = "; ".join(f"{name}: {why}" for name, why in NOT_JUDGED.items())
    waiting = "; ".join(f"{each.id}: {each.waits_for}" for each in INVARIANTS.values() if each.waits_for)
    return f"Not judged by exploration (the simulator judges them): {said}. Without a monitor: {waiting}."


def candidates(protocol: Protocol) -> list[dict[str, Any]]:
    """The candidates of ``candidates.toml``, checked. Raises BadInput."""
    source = Source(CANDIDATES)
    source.require_known((), source.data, ("candidate",), "section")
    entries: list[dict[str, Any]] = source.data.get("candidate", [])
    for place, entry in enumerate(entries):
        path = ("candidate", place)
        source.require_forms(path, entry, _CANDIDATE)
        source.require_all(path, entry, ("id", "title", "claim", "advice"), "a candidate")
        if "rules" in entry:
            source.require_all(path, entry, ("model", "invariant"), "a candidate with rules")
            source.require_known((*path, "invariant"), [entry["invariant"]], INVARIANTS, "invariant")
            for key in ("rules", "given"):
                check_rule_values(source, (*path, key), entry.get(key, {}), protocol.rules)
        elif entry.get("verdict") not in ("confirmed", "refuted", "open") or "evidence" not in entry:
            raise source.error(
                path, 'a candidate without rules needs evidence, and verdict = "confirmed", "refuted" or "open"'
            )
    return entries


def blames(protocol: Protocol) -> dict[str, Shortest | None]:
    """What the rules of each candidate do when they are switched in `reference`. Raises BadInput if nothing is shown,
    because what is given beside them breaks the invariant already.
    """
    found: dict[str, Shortest | None] = {}
    for entry in candidates(protocol):
        if "rules" in entry:
            given = entry.get("given", {})
            if given and blame(entry["model"], given, entry["invariant"]) is not None:
                raise BadInput(f"{CANDIDATES}: {entry['id']}: what is given breaks {entry['invariant']} already")
            found[entry["id"]] = blame(entry["model"], {**given, **entry["rules"]}, entry["invariant"])
    return found


def _candidate(entry: Mapping[str, Any], found: Shortest | None) -> str:
    """One candidate as a paragraph: claim, verdict with its evidence, advice."""
    if "rules" in entry:
        rules = ", ".join(f"`{name} = {value}`" for name, value in entry["rules"].items())
        given = "".join(f" (given `{name} = {value}`)" for name, value in entry.get("given", {}).items())
        where = f"on model `{entry['model']}`: {rules} alone, switched in `reference`{given},"
        verdict = "confirmed" if found is not None else "refuted"
        evidence = f"{where} leaves {entry['invariant']} whole."
        if found is not None:
            evidence = f"{where} breaks {entry['invariant']} in {found.length} moves ({found.text})."
        evidence = evidence[0].upper() + evidence[1:]
    else:
        verdict, evidence = entry["verdict"], entry["evidence"].strip()
    claim, advice = entry["claim"].strip(), entry["advice"].strip()
    return f"### {entry['id']}: {entry['title']} ({verdict})\n\n{claim}\n\n{evidence}\n\n**Advice.** {advice}"


def _models(verdicts: Sequence[Verdict]) -> str:
    lines = ["| model | profile | states | seconds | liveness | not witnessed |", "|---|---|---:|---:|---|---|"]
    for each in verdicts:
        if each.profile in ("reference", "sglang-0.5.23"):
            missing = ", ".join(each.unwitnessed) or "-"
            live = "judged" if each.liveness else "-"
            states = f"{each.states:,}" if each.complete else f"{each.states:,}, not all"
            lines.append(f"| {each.model} | {each.profile} | {states} | {each.seconds:.1f} | {live} | {missing} |")
    return "\n".join(lines)


__all__ = ["candidates", "render", "write"]
