"""``kvpoll demo``: in under a minute, the workload, the known races, and that the reference holds."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvpoll.commands import reproduce, run
from kvpoll.commands.options import Verbs, add_seed, add_verb
from kvpoll.commands.plan import Plan, prepare
from kvpoll.commands.screen import Screen
from kvpoll.commands.verdict import as_object, percentile
from kvpoll.sim.workload import WORKLOADS, Draw, from_model, read_model

MODEL = WORKLOADS / "conversation.toml"
SHARES = (0.1, 0.5, 0.9, 0.99)


class Fit(NamedTuple):
    """One quantity of the recorded hour, as the model keeps it, and of an hour drawn from the model."""

    quantity: str
    recorded: float
    drawn: float


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(
        verbs, "demo", "Show the workload, reproduce the known races, run ten minutes with every fault.", act
    )
    add_seed(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Three steps; the exit status is the worst of the last two."""
    quiet = arguments.json
    fits = workload_fit(arguments.seed)
    if not quiet:
        _show_fit(fits, screen)
    with screen.progress("reproducing") as advance:
        rows = reproduce.play(reproduce.choose([], None, None), arguments.seed, None, advance)
    if not quiet:
        _title(
            "2. The known races: under the profile of the defect, after its repair, and under the reference",
            screen,
        )
        reproduce.show(rows, screen)
        _title("3. Ten minutes on 2P2D, twelve ranks, one fault of every kind drawn by seed", screen)
    prepared = prepare(Plan())
    outcome = run.play(prepared, arguments.seed, None, screen)
    if quiet:
        screen.json(_object(fits, rows, as_object(outcome, prepared.expectation)))
    else:
        run.show(prepared, outcome, None, screen)
        _where_next(arguments.seed, screen)
    return max(reproduce.status(rows), run.status(outcome))


def _title(text: str, screen: Screen) -> None:
    screen.say()
    screen.say(text, "bold")
    screen.say()


# ---------------------------------------------------------------------------------------------- the workload


def workload_fit(seed: int) -> list[Fit]:
    """The model's rates and length quantiles, which are the recorded hour's, beside an hour drawn from it."""
    model = read_model(MODEL)
    drawn = from_model(random.Random(f"{seed}/workload"), model, model.ramp_s)
    rate = Fit("requests/s", (model.start_rate_per_s + model.end_rate_per_s) / 2, len(drawn) / model.ramp_s)
    inputs, outputs = (
        [arrival.input_tokens for arrival in drawn],
        [arrival.output_tokens for arrival in drawn],
    )
    return [
        rate,
        *_lengths("input tokens", model.lengths.input, inputs),
        *_lengths("output tokens", model.lengths.output, outputs),
    ]


def _lengths(name: str, table: Draw, drawn: Sequence[int]) -> list[Fit]:
    at: Any = getattr(table, "at")  # noqa: B009
    return [Fit(f"{name} p{share * 100:g}", at(share), percentile(drawn, share) or 0.0) for share in SHARES]


def _show_fit(fits: Sequence[Fit], screen: Screen) -> None:
    told = MODEL.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").removesuffix(" by")
    screen.say("1. The workload: requests drawn from a model of one recorded hour of conversations", "bold")
    screen.say()
    screen.say(f"{MODEL.name}: {told[0].lower()}{told[1:]}; docs/workload.md shows the whole fit")
    rows = [
        [fit.quantity, f"{fit.recorded:,.6g}", f"{fit.drawn:,.6g}", f"{fit.drawn / fit.recorded - 1:+.1%}"]
        for fit in fits
    ]
    screen.table(["quantity", "recorded", "drawn", "apart"], rows, right=["recorded", "drawn", "apart"])


def _where_next(seed: int, screen: Screen) -> None:
    screen.say()
    screen.say("Where to look next", "bold")
    screen.say("  README.md, docs/protocol.md     what this is; the machine, rule by rule")
    screen.say("  sim/scenarios/*.toml            the races as text: copy one, change it, kvpoll run FILE")
    screen.say("  kvpoll list                     scenarios, profiles, invariants, faults, rules")
    screen.say("  kvpoll run --trace FILE         the same with recorded requests (README names the file)")
    screen.say("  kvpoll run --seeds 200          200 seeds; each must hold")
    screen.say("  kvpoll report                   a figure of every race")
    screen.say(f"kvpoll demo --seed {seed}")


def _object(fits: Sequence[Fit], rows: Sequence[reproduce.Row], outcome: dict[str, Any]) -> dict[str, Any]:
    return {
        "workload": [fit._asdict() for fit in fits],
        "reproduce": [reproduce.as_row(row) for row in rows],
        "run": outcome,
    }
