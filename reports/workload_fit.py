"""Fit ``sim/workloads/conversation.toml`` to a recorded hour, and show how close the drawn arrivals come.

``python -m kvpoll.reports.workload_fit TRACE`` reads a trace in the Mooncake format, writes the model, draws
the figure and prints the tables that docs/workload.md repeats. The same trace gives the same model, byte for
byte.
"""

from __future__ import annotations

import argparse
import random
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import linear_regression, median, variance
from typing import Any, Final, NamedTuple, TypeVar

from kvpoll.sim.workload import WORKLOADS, Arrival, WorkloadError, from_model, read_model, read_mooncake

Number = TypeVar("Number", int, float)

FIGURE: Final = Path(__file__).parent / "figures" / "workload_fit.png"
TREND_BIN_S: Final = 60.0
LEVEL_S: Final = 30.0  # the excess over Poisson is slight at 3 s and full at 60 s: levels last something between
PROBABILITIES: Final = (
    *(0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4),
    *(0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999, 1.0),
)
SHOWN: Final = {
    "p1": 0.01,
    "p10": 0.1,
    "p25": 0.25,
    "p50": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p99": 0.99,
    "max": 1.0,
}
BLUE, VERMILION, GREY = (
    "#0072B2",
    "#D55E00",
    "#666666",
)  # Okabe and Ito: apart for every kind of colour vision


# ------------------------------------------------------------------------------------------- measuring


class Sample(NamedTuple):
    """Arrivals reduced to what is compared: tick numbers (time over ``tick_s``) and lengths in tokens."""

    tick_s: float
    ticks: list[int]
    input_tokens: list[int]
    output_tokens: list[int]

    def counts(self, bin_s: float, duration_s: float) -> list[int]:
        """Arrivals in each whole bin of ``bin_s`` before ``duration_s``."""
        ticks_a_bin = round(bin_s / self.tick_s)
        found = Counter(tick // ticks_a_bin for tick in self.ticks)
        return [found[number] for number in range(int(duration_s / bin_s + 1e-9))]

    def gaps_s(self) -> list[float]:
        return [(after - before) * self.tick_s for before, after in pairwise(self.ticks)]


def tick_s(arrivals: Sequence[Arrival]) -> float:
    """The recorder's time step: 3 s for the conversation hour, whose requests share 1,180 stamps; else 1 ms.

    Where most requests share their stamp with the one before, the median distance of stamps is the step.
    """
    gaps_s = [after.t - before.t for before, after in pairwise(arrivals)]
    steps_s = [gap_s for gap_s in gaps_s if gap_s > 0]
    return round(median(steps_s), 3) if steps_s and len(steps_s) < len(gaps_s) / 2 else 0.001


def recorded(arrivals: Sequence[Arrival]) -> Sample:
    """A trace on its own ticks. Rounded, because its stamps wander a few milliseconds about the tick."""
    step_s = tick_s(arrivals)
    return _sample(arrivals, step_s, (round(arrival.t / step_s) for arrival in arrivals))


def drawn(arrivals: Sequence[Arrival], step_s: float) -> Sample:
    """Drawn arrivals as a recorder with that step would have stamped them: at the start of their tick."""
    return _sample(arrivals, step_s, (int(arrival.t / step_s) for arrival in arrivals))


def _sample(arrivals: Sequence[Arrival], step_s: float, ticks: Iterable[int]) -> Sample:
    inputs = [arrival.input_tokens for arrival in arrivals]
    return Sample(step_s, list(ticks), inputs, [arrival.output_tokens for arrival in arrivals])


def dispersion(counts: Sequence[int]) -> float:
    """Variance over mean of counts: 1 for a steady Poisson stream."""
    return variance(counts) * len(counts) / sum(counts)


def dispersion_about_trend(counts: Sequence[int]) -> float:
    """The same about a straight line instead of the mean, so that a rising load does not count as bursts."""
    line = linear_regression(range(len(counts)), counts)
    squares = sum((count - line.intercept - line.slope * x) ** 2 for x, count in enumerate(counts))
    return squares / (len(counts) - 2) * len(counts) / sum(counts)


def quantile(ordered: Sequence[Number], probability: float) -> Number:
    """The smallest value with at least that share of the sorted sample at or below it."""
    return ordered[max(ceil(probability * len(ordered) - 1e-9) - 1, 0)]


def ks_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Kolmogorov-Smirnov: the largest gap between the two samples' cumulative distributions."""
    a, b = sorted(one), sorted(other)
    return max(abs(bisect_right(a, x) / len(a) - bisect_right(b, x) / len(b)) for x in {*a, *b})


# --------------------------------------------------------------------------------------------- fitting


def fit(arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """The tables of a model file: arrivals (rates, levels), input_tokens and output_tokens (quantiles).

    Raises WorkloadError if the trace is shorter than five minutes, too little to tell a trend from levels.
    """
    sample = recorded(arrivals)
    return {
        "arrivals": _fit_arrivals(sample, _duration_s(sample)),
        "input_tokens": _fit_lengths(sample.input_tokens),
        "output_tokens": _fit_lengths(sample.output_tokens),
    }


def _duration_s(sample: Sample) -> float:
    return (sample.ticks[-1] + 1) * sample.tick_s


def _fit_arrivals(sample: Sample, duration_s: float) -> dict[str, float]:
    counts = sample.counts(TREND_BIN_S, duration_s)
    if len(counts) < 5:
        raise WorkloadError(f"the trace lasts {duration_s:.0f} s; give one of at least {5 * TREND_BIN_S:.0f} s")
    line = linear_regression([(x + 0.5) * TREND_BIN_S for x in range(len(counts))], counts)
    mean_per_s = sum(counts) / (len(counts) * TREND_BIN_S)
    # A bin holds whole levels, so its dispersion is 1 + (mean arrivals in a level) * cv squared.
    excess = max(dispersion_about_trend(counts) - 1.0, 0.0)
    start_per_s, end_per_s = (
        line.intercept / TREND_BIN_S,
        (line.intercept + line.slope * duration_s) / TREND_BIN_S,
    )
    least_per_s = mean_per_s / 100  # a steep line may cross zero, a rate may not
    return {
        "start_rate_per_s": round(max(start_per_s, least_per_s), 4),
        "end_rate_per_s": round(max(end_per_s, least_per_s), 4),
        "ramp_s": round(duration_s, 3),
        "level_s": LEVEL_S,
        "level_cv": round((excess / (mean_per_s * LEVEL_S)) ** 0.5, 4),
    }


def _fit_lengths(tokens: Sequence[int]) -> dict[str, list[Any]]:
    ordered = sorted(tokens)
    quantiles = [quantile(ordered, probability) for probability in PROBABILITIES]
    return {"probabilities": list(PROBABILITIES), "tokens": quantiles}


def to_toml(model: dict[str, Any], requests: int) -> str:
    """The model file's text; ``requests`` is how many arrivals it was fitted to, for the comment on top."""
    arrivals = model["arrivals"]
    lines = [
        f"# Fitted to {requests:,} requests in {arrivals['ramp_s']:.0f} s by",
        "#     python -m kvpoll.reports.workload_fit TRACE",
        "# Quantiles are stored, not requests. docs/workload.md names the trace and shows the match.",
        "",
        "[arrivals]",
        f"start_rate_per_s = {arrivals['start_rate_per_s']}  # the mean goes in a straight line from here",
        f"end_rate_per_s = {arrivals['end_rate_per_s']}  # to here",
        f"ramp_s = {arrivals['ramp_s']}  # over this long, and then stays",
        f"level_s = {arrivals['level_s']}  # this often it gets a fresh gamma factor of mean 1",
        f"level_cv = {arrivals['level_cv']}  # and of this coefficient of variation",
    ]
    for name in ("input_tokens", "output_tokens"):
        lines += ["", f"[{name}]", *_toml_list("probabilities", model[name]["probabilities"])]
        lines += _toml_list("tokens", model[name]["tokens"])
    return "\n".join(lines) + "\n"


def _toml_list(key: str, numbers: Sequence[float]) -> list[str]:
    rows = [numbers[start : start + 11] for start in range(0, len(numbers), 11)]
    return [f"{key} = [", *(f"    {', '.join(map(str, row))}," for row in rows), "]"]


# ------------------------------------------------------------------------------------------- comparing


def comparison(real: Sample, synthetic: Sample, duration_s: float) -> str:
    """Two Markdown tables, rates and quantiles, of a recorded sample and a drawn one on the same ticks."""
    return "\n".join([*_rate_table(real, synthetic, duration_s), "", *_quantile_table(real, synthetic, duration_s)])


def _rate_table(real: Sample, synthetic: Sample, duration_s: float) -> list[str]:
    tick = _tick_bin_s(real)
    head = f"| | requests | requests/s | dispersion {tick:g} s | dispersion 60 s | 60 s about the trend |"
    rows = [head, "|---|--:|--:|--:|--:|--:|"]
    for name, sample in (("recorded", real), ("drawn", synthetic)):
        requests, minutes = len(sample.ticks), sample.counts(60.0, duration_s)
        of_ticks, of_minutes = dispersion(sample.counts(tick, duration_s)), dispersion(minutes)
        about = dispersion_about_trend(minutes)
        numbers = f"{requests / duration_s:.3f} | {of_ticks:.2f} | {of_minutes:.2f} | {about:.2f}"
        rows.append(f"| {name} | {requests:,} | {numbers} |")
    return rows


def _quantile_table(real: Sample, synthetic: Sample, duration_s: float) -> list[str]:
    tick = _tick_bin_s(real)
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "input tokens": (real.input_tokens, synthetic.input_tokens),
        "output tokens": (real.output_tokens, synthetic.output_tokens),
        "inter-arrival (s)": (real.gaps_s(), synthetic.gaps_s()),
        f"requests in {tick:g} s": (real.counts(tick, duration_s), synthetic.counts(tick, duration_s)),
        "requests in 60 s": (real.counts(60.0, duration_s), synthetic.counts(60.0, duration_s)),
    }
    rows = [f"| | | {' | '.join(SHOWN)} | KS |", f"|---|---|{'--:|' * (len(SHOWN) + 1)}"]
    for name, (a, b) in pairs.items():
        rows.append(f"| {name} | recorded | {_quantile_cells(a)} | |")
        rows.append(f"| | drawn | {_quantile_cells(b)} | {ks_distance(a, b):.3f} |")
    return rows


def _quantile_cells(numbers: Sequence[float]) -> str:
    ordered = sorted(numbers)
    return " | ".join(f"{quantile(ordered, probability):,.0f}" for probability in SHOWN.values())


def _tick_bin_s(sample: Sample) -> float:
    return max(sample.tick_s, 1.0)


# --------------------------------------------------------------------------------------------- drawing


def draw_figure(path: Path, real: Sample, synthetic: Sample, duration_s: float) -> None:
    """Write a PNG, 1,800 pixels wide: arrivals per minute above, the two length distributions below."""
    from matplotlib.figure import Figure  # imported here so that fitting needs nothing but Python

    figure = Figure(figsize=(9, 6), dpi=200, layout="constrained", facecolor="white")
    panels = figure.subplot_mosaic([["minutes", "minutes"], ["input", "output"]])
    _draw_minutes(panels["minutes"], real, synthetic, duration_s)
    _draw_cdf(panels["input"], "Prompt length (tokens)", real.input_tokens, synthetic.input_tokens)
    _draw_cdf(panels["output"], "Answer length (tokens)", real.output_tokens, synthetic.output_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _draw_minutes(axes: Any, real: Sample, synthetic: Sample, duration_s: float) -> None:
    for sample, style in ((real, _recorded_style()), (synthetic, _drawn_style())):
        counts = sample.counts(60.0, duration_s)
        axes.stairs(counts, baseline=None, **style)
    axes.set(xlabel="Minute", ylabel="Requests in the minute", xlim=(0, duration_s / 60), ylim=(0, None))
    axes.set_title("The load rises through the hour", loc="left")
    axes.legend(loc="lower right", ncols=2, frameon=False)
    _tidy(axes)


def _draw_cdf(axes: Any, label: str, real: Sequence[int], synthetic: Sequence[int]) -> None:
    for tokens, style in ((real, _recorded_style()), (synthetic, _drawn_style())):
        axes.ecdf(tokens, **style)
    axes.set_xscale("log")
    axes.set(xlabel=label, ylabel="Share of requests", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.text(0.04, 0.93, f"KS distance {ks_distance(real, synthetic):.3f}", transform=axes.transAxes, va="top")
    _tidy(axes)


def _recorded_style() -> dict[str, Any]:
    return {"color": BLUE, "linewidth": 2.4, "label": "recorded hour"}


def _drawn_style() -> dict[str, Any]:
    return {"color": VERMILION, "linewidth": 1.7, "linestyle": (0, (4, 1.2)), "label": "drawn from the fit"}


def _tidy(axes: Any) -> None:
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, write, compare, draw. Returns 0, or 2 on bad input, which gets one line on standard error."""
    options = _options(arguments)
    try:
        _run(options)
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed; pip install 'kvpoll[reports]'", file=sys.stderr)
        return 2
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvpoll.reports.workload_fit", description=__doc__)
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a trace in the Mooncake format")
    parser.add_argument("--seed", type=int, default=1, help="of the drawn hour (default 1)")
    model = WORKLOADS / "conversation.toml"
    parser.add_argument("--model", type=Path, default=model, metavar="TOML", help=f"written (default {model})")
    parser.add_argument("--figure", type=Path, default=FIGURE, metavar="PNG", help=f"written (default {FIGURE})")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    arrivals = read_mooncake(options.trace)
    real = recorded(arrivals)
    options.model.write_text(to_toml(fit(arrivals), len(arrivals)))
    duration_s = _duration_s(real)
    synthetic = drawn(from_model(random.Random(options.seed), read_model(options.model), duration_s), real.tick_s)
    print(comparison(real, synthetic, duration_s))
    draw_figure(options.figure, real, synthetic, duration_s)


if __name__ == "__main__":
    sys.exit(main())
