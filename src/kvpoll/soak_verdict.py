"""What a soak has shown: whether anything was violated, leaked or corrupted, whether memory is flat; in figures."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from kvpoll.bench import machine
from kvpoll.soak_process import REQUEST_BYTES
from kvpoll.spec.source import BadInput

if TYPE_CHECKING:
    from kvpoll.soak import Soak

GROWTH_MAX: Final = 0.05
"""Of its resident memory, so much may a process that lived through it all have gained over the second half."""

OPENED_MAX: Final = 4
"""More open files or threads than at most in the first third are so many connections that come and go."""

SAMPLES_KEPT: Final = 240

JUDGED: Final = ("judged", "late", "counts", "violated", "idle", "finished")
"""What the judge's last words are kept of."""


def verdict(soak: Soak) -> dict[str, Any]:
    """All figures, "holds", and the one "line"."""
    totals: Counter[str] = Counter()
    for member in soak.members:
        totals.update(member.total)
        totals.update(member.stats.get("counts", {}))
    memory = {m.name: growth(soak.samples, m.name, soak.over) for m in soak.members if m.lives == 1}
    found: dict[str, Any] = {
        "requests": soak.over, "asked_for": soak.plan.requests, "seed": soak.plan.seed,
        "traffic_s": round(soak.traffic_s, 1), "per_s": round(soak.over / soak.traffic_s, 1),
        "outcomes": dict(soak.outcomes.most_common()), "counts": dict(totals),
        "router_tells": soak.plan.router_tells, "told_by_router": dict(soak.told_by_router),
        "probes": dict(soak.probed),
        "bytes_verified": soak.outcomes["ok"] * REQUEST_BYTES,
        "faults": dict(Counter(f"{fault['deed']} {fault['whom']}" for fault in soak.faults)),
        "lives": {member.name: member.lives for member in soak.members},
        "judge": {key: soak.verdict_of_judge.get(key) for key in JUDGED},
        "left": {m.name: left(m.survey) for m in soak.members},
        "ends": {m.name: ends(m) for m in soak.members}, "memory": memory, "unexpected": soak.unexpected,
        "load": os.getloadavg(), "machine": machine(), "samples": thinned(soak.samples), "strikes": soak.faults,
    }  # fmt: skip
    found["problems"] = problems(soak, found)
    found["holds"] = not found["problems"]
    found["line"] = line(found)
    return found


def left(survey: dict[str, int] | None) -> dict[str, int]:
    """What is not zero; a process that never answered is no proof of anything."""
    return {"no answer": 1} if survey is None else {name: count for name, count in survey.items() if count}


def ends(member: Any) -> dict[str, Any]:
    """Open files and threads of the last life of a process: near its beginning, and now."""
    keys = ("fds", "threads")
    return {key: [member.first_stats.get(key), member.stats.get(key)] for key in keys}


def opened(samples: list[dict[str, Any]], name: str) -> list[str]:
    """Files and threads that a process which lived through it all has more of in the end than at most in the first
    third: peers that died and came back, however often, may not have left any.
    """
    said = []
    for place, what in ((1, "open files"), (2, "threads")):
        seen = [sample["processes"][name][place] for sample in samples if name in sample["processes"]]
        early, end = max(seen[: max(1, len(seen) // 3)], default=0), seen[-1] if seen else 0
        said += (
            [f"{name} has {end} {what}, and had {early} at most in the first third"] if end > early + OPENED_MAX else []
        )
    return said


def growth(samples: list[dict[str, Any]], name: str, over: int) -> dict[str, float]:
    """Resident memory of one process: at the middle of the traffic and at its end (medians of a tenth of the samples
    each), and the slope of a line through the second half, in bytes a request.
    """
    points = [(s["over"], s["processes"][name][0]) for s in samples if name in s["processes"]]
    points = [point for point in points if point[0] < over] or points
    if len(points) < 4:
        return {"middle": 0.0, "end": 0.0, "growth": 0.0, "bytes_a_request": 0.0}
    half, tenth = points[len(points) // 2 :], max(1, len(points) // 10)
    middle, end = median(y for _, y in half[:tenth]), median(y for _, y in half[-tenth:])
    return {
        "middle": float(middle), "end": float(end), "growth": round(end / middle - 1.0, 4),
        "bytes_a_request": round(slope(half), 2),
    }  # fmt: skip


def slope(points: list[tuple[int, int]]) -> float:
    """Of the line of least squares."""
    across, up = (sum(column) / len(points) for column in zip(*points, strict=True))
    width = sum((x - across) ** 2 for x, _ in points)
    return sum((x - across) * (y - up) for x, y in points) / width if width else 0.0


def thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most SAMPLES_KEPT of them, evenly."""
    step = max(1, len(samples) // SAMPLES_KEPT)
    return samples[::step]


def problems(soak: Soak, found: dict[str, Any]) -> list[str]:
    """Everything that should not be, in words."""
    said = [f"invariant {name} {count} times" for name, count in (found["judge"]["counts"] or {}).items()]
    if not found["judge"]["finished"]:
        said.append("the judge did not come to its end")
    for member in soak.members:
        stats = member.stats
        said += [f"{member.name}, monitored: {text}" for text in stats.get("violated", ())]
        said += [f"{member.name}, defect: {text}" for text in stats.get("defects", ())]
    said += [f"{found['outcomes']['corrupt']} requests arrived wrong"] if "corrupt" in found["outcomes"] else []
    said += [f"{found['counts']['touched']} free slots were written to"] if found["counts"].get("touched") else []
    said += [f"{key} ({count})" for key, count in found["counts"].items() if key.startswith("refused")]
    said += [f"{name} still has {left}" for name, left in found["left"].items() if left]
    said += [f"{len(soak.owing)} requests never ended"] if soak.owing else []
    said += [] if soak.is_healed else ["the faults never came to an end"]
    said += [f"{count} probes: {outcome}" for outcome, count in soak.probed.items() if outcome != "ok"]
    said += [
        f"{name} grew by {each['growth']:.1%}"
        for name, each in found["memory"].items()
        if is_settled(found) and each["growth"] > GROWTH_MAX
    ]
    said += [text for name in found["memory"] for text in opened(soak.samples, name)]
    return said + soak.unexpected


def is_settled(found: dict[str, Any]) -> bool:
    """Had tombstones begun to leave by the middle of the traffic? Until then tables and memory grow as they should."""
    from kvpoll.soak import RULES  # which imports this module

    return bool(found["traffic_s"] / 2 > RULES["tombstone_timeout_s"])


def line(found: dict[str, Any]) -> str:
    """The verdict."""
    kills = sum(count for name, count in found["faults"].items() if name.startswith("kill"))
    stops = sum(found["faults"].values()) - kills
    aborted = found["outcomes"].get("soak", 0) + found["outcomes"].get("aborted", 0)
    did = (
        f"soak: {found['requests']:,} requests in {found['traffic_s']:,.0f} s ({found['per_s']:,.0f}/s), "
        f"{found['outcomes'].get('ok', 0):,} ok, {aborted:,} aborted, {kills} kills, {stops} stops, "
        f"{found['judge']['judged'] or 0:,} events judged, {found['bytes_verified'] / 1e6:,.0f} MB compared: "
    )
    if found["holds"]:
        memory = "memory flat" if is_settled(found) else "too short to judge memory"
        return did + f"nothing violated, nothing leaked, {memory}"
    return did + f"{len(found['problems'])} problems, the first: {found['problems'][0]}"


def check_path(path: str, figure: str | None) -> None:
    """What can be known of a file before minutes are spent on what goes into it. Raises BadInput."""
    if not Path(path).parent.is_dir():
        raise BadInput(f"{path}: there is no folder {Path(path).parent}; create it, or name another file")
    if path != figure:
        return
    try:
        from kvpoll.reports.style import check_target

        check_target(Path(path))
    except ModuleNotFoundError as error:
        raise BadInput(f"--figure needs {error.name}, which is not installed: pip install 'kvpoll[reports]'") from None
    except ValueError as error:
        raise BadInput(str(error)) from None


def write(found: dict[str, Any], out: str | None, figure: str | None) -> None:
    """The figures as JSON, and the picture."""
    if out:
        Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if figure:
        from kvpoll.reports.soak import draw

        draw(found, Path(figure))
