"""Arrivals: the recorded hour is read strictly, the fitted one resembles it, and a seed says everything."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from kvpoll.reports import workload_fit
from kvpoll.sim import workload
from kvpoll.sim.workload import Arrival, Fixed, Lengths, Lognormal, Table, WorkloadError

PROJECT = Path(__file__).resolve().parents[2]
TRACE = PROJECT.parent / "shared" / "traces" / "mooncake_conversation.jsonl"
needs_trace = pytest.mark.skipif(not TRACE.exists(), reason="the recorded hour does not lie beside the project")


def row(timestamp: int = 0, **changes: Any) -> str:
    """One good trace line of 600 input tokens (two blocks), with changes; None removes the key."""
    entries = {"timestamp": timestamp, "input_length": 600, "output_length": 5, "hash_ids": [0, 1], **changes}
    return json.dumps({key: value for key, value in entries.items() if value is not None})


def complaint(tmp_path: Path, *lines: str | bytes) -> str:
    """What read_mooncake says of a file with these lines, less the folder."""
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    with pytest.raises(WorkloadError) as caught:
        workload.read_mooncake(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/")


# ------------------------------------------------------------------------------------- recorded traces


def test_a_trace_is_read_in_order_and_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([row(0), row(0, output_length=1), row(2999, input_length=512, hash_ids=[7])]))
    assert workload.read_mooncake(path) == [
        Arrival(0.0, 600, 5),
        Arrival(0.0, 600, 1),
        Arrival(2.999, 512, 5),
    ]


def test_until_s_stops_before_the_first_later_arrival_and_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([row(0), row(2999), row(3000), "damaged"]))
    assert [arrival.t for arrival in workload.read_mooncake(path, until_s=3.0)] == [0.0, 2.999]
    with pytest.raises(WorkloadError, match=r"^until_s is 0; give a finite number above 0$"):
        workload.read_mooncake(path, until_s=0)


TRUNCATED = "not a whole JSON object (is the line truncated?); fetch the trace again or delete the line"
BLOCK_LIST = "hash_ids is not a list of integers from 0 up; write one block id for every 512 tokens"


@pytest.mark.parametrize(
    ("line", "cause_and_mend"),
    [
        (row(3000)[:40], TRUNCATED),
        (b'{"timestamp": "\xff"}', TRUNCATED),
        ("[" * 100_000, TRUNCATED),
        ("", "the line is blank; delete it"),
        ("[3]", "a JSON object is needed, this is [3]; write one {...} a line"),
        (
            row(output_length=None),
            "key 'output_length' is missing; every line needs timestamp, input_length, output_length, hash_ids",
        ),
        (row(input_length=None, input_len=600), "unknown key \"input_len\"; rename it to 'input_length'"),
        (row(priority=1), 'unknown key "priority"; remove it'),
        (row(timestamp=0.5), "timestamp is 0.5, not a whole number; write an integer"),
        (row(input_length="600"), 'input_length is "600", not a whole number; write an integer'),
        (row(output_length=True), "output_length is true, not a whole number; write an integer"),
        (
            row(output_length=[9] * 99),
            f"output_length is [{'9, ' * 12}..., not a whole number; write an integer",
        ),
        (row(timestamp=-1), "timestamp is -1; give an integer from 0 to 9007199254740992"),
        (
            row(timestamp=2**53 + 1),
            "timestamp is 9007199254740993; give an integer from 0 to 9007199254740992",
        ),
        (row(input_length=-600), "input_length is -600; give an integer from 1 to 9007199254740992"),
        (row(output_length=0), "output_length is 0; give an integer from 1 to 9007199254740992"),
        (row(hash_ids=7), BLOCK_LIST),
        (row(hash_ids=[0, 1.0]), BLOCK_LIST),
        (row(hash_ids=[0, -1]), BLOCK_LIST),
        (row(hash_ids=[0]), "1 hash_ids for input_length 600; give 2, one for every 512 tokens begun"),
        (row(2999), "timestamp 2999 is before 3000 of the line above; sort by timestamp"),
    ],
)
def test_a_damaged_line_is_named_with_cause_and_mend(tmp_path: Path, line: str | bytes, cause_and_mend: str) -> None:
    assert complaint(tmp_path, row(0), row(3000), line, row(9000)) == f"trace.jsonl:3: {cause_and_mend}"


def test_a_trace_cut_off_in_its_last_line_is_not_a_shorter_trace(tmp_path: Path) -> None:
    assert complaint(tmp_path, row(0), row(3000)[:-1]) == f"trace.jsonl:2: {TRUNCATED}"


def test_an_empty_file_is_not_a_workload(tmp_path: Path) -> None:
    message = "trace.jsonl:1: the file is empty; give a trace with one request a line"
    assert complaint(tmp_path) == message


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "conversation.jsonl").touch()
    near, far = tmp_path / "conversatoin.jsonl", tmp_path / "nowhere" / "trace.jsonl"
    with pytest.raises(WorkloadError) as caught:
        workload.read_mooncake(near)
    assert str(caught.value) == f"{near}: no such file; did you mean '{tmp_path}/conversation.jsonl'?"
    with pytest.raises(WorkloadError) as caught:
        workload.read_mooncake(far)
    assert str(caught.value) == f"{far}: no such file; give the path of a file that exists"


def test_a_folder_is_not_a_trace(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError) as caught:
        workload.read_mooncake(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read (Is a directory); give a readable file"


# ------------------------------------------------------------------------------------- random arrivals


def test_poisson_keeps_rate_order_and_end() -> None:
    arrivals = workload.poisson(random.Random(1), 5.0, 2000.0, workload.fixed(700, 30))
    times = [arrival.t for arrival in arrivals]
    assert times == sorted(times)
    assert 0.0 < times[0] < times[-1] < 2000.0
    assert len(arrivals) == pytest.approx(10_000, abs=400)  # four standard deviations
    assert {arrival[1:] for arrival in arrivals} == {(700, 30)}


def test_periodic_bursts_come_at_the_end_of_each_period() -> None:
    arrivals = workload.bursts(random.Random(2), 0.0, 20.0, 2.0, 10.0, 100.0, workload.fixed(1, 1))
    assert {int(arrival.t) % 10 for arrival in arrivals} == {8, 9}
    assert {int(arrival.t) // 10 for arrival in arrivals} == set(range(10))
    assert len(arrivals) == pytest.approx(400, abs=80)


def test_random_bursts_leave_a_quiet_stream_between_them() -> None:
    arrivals = workload.bursts(random.Random(3), 1.0, 50.0, 1.0, 20.0, 4000.0, workload.fixed(1, 1), periodic=False)
    times = [arrival.t for arrival in arrivals]
    assert times == sorted(times)
    assert times[-1] < 4000.0
    assert len(arrivals) / 4000.0 == pytest.approx((19 * 1.0 + 1 * 50.0) / 20, rel=0.15)
    assert len({int(t) % 20 for t in times}) == 20  # not periodic


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda rng, many: workload.poisson(rng, 0, 9, many),
            "rate_per_s is 0; give a finite number above 0",
        ),
        (
            lambda rng, many: workload.poisson(rng, 1, float("inf"), many),
            "duration_s is inf; give a finite number above 0",
        ),
        (
            lambda rng, many: workload.bursts(rng, -1, 9, 1, 5, 9, many),
            "quiet_rate_per_s is -1; give a finite number above 0",
        ),
        (
            lambda rng, many: workload.bursts(rng, 1, 9, 5, 5, 9, many),
            "period_s is 5; give a number of seconds above burst_s (5)",
        ),
        (
            lambda rng, many: workload.synthetic(rng, float("nan")),
            "duration_s is nan; give a finite number above 0",
        ),
        (lambda rng, many: workload.fixed(0, 1), "input_tokens is 0; give a finite number above 0"),
        (lambda rng, many: workload.fixed(1, -1), "output_tokens is -1; give a finite number above 0"),
        (
            lambda rng, many: workload.synthetic(rng, 9.0, "conversatoin"),
            "no workload is named 'conversatoin'; did you mean 'conversation'?",
        ),
        (
            lambda rng, many: workload.synthetic(rng, 9.0, "x"),
            "no workload is named 'x'; known here: conversation",
        ),
    ],
)
def test_numbers_and_names_that_make_no_sense_are_refused(call: Any, message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        call(random.Random(0), workload.fixed(1, 1))
    assert str(caught.value) == message


def test_lognormal_lengths_are_clipped_and_keep_their_median() -> None:
    rng = random.Random(4)
    length = Lognormal(1000.0, 1.0, 100, 3000)
    tokens = sorted(length.draw(rng) for _ in range(4000))
    assert (tokens[0], tokens[-1]) == (100, 3000)
    assert tokens[2000] == pytest.approx(1000, rel=0.08)


def test_a_table_interpolates_logarithms_and_keeps_point_masses() -> None:
    table = Table((0.0, 0.25, 0.5, 1.0), (3, 3, 10, 1000))
    assert [table.at(u) for u in (0.0, 0.2, 0.25, 0.5, 0.75)] == [3, 3, 3, 10, 100]
    assert table.at(0.999999) == 1000


def make(name: str, seed: int, duration_s: float) -> list[Arrival]:
    rng, many = random.Random(seed), Lengths(Lognormal(900.0, 1.0, 1, 9000), Fixed(3))
    if name == "poisson":
        return workload.poisson(rng, 3.0, duration_s, many)
    if name == "synthetic":
        return workload.synthetic(rng, duration_s)
    return workload.bursts(rng, 1.0, 9.0, 4.0, 20.0, duration_s, many, periodic=name == "bursts")


@pytest.mark.parametrize("name", ["poisson", "bursts", "random bursts", "synthetic"])
def test_a_seed_says_everything_and_a_longer_run_begins_with_the_shorter(name: str) -> None:
    long = make(name, 7, 300.0)
    assert make(name, 7, 300.0) == long
    assert make(name, 8, 300.0) != long
    short = make(name, 7, 100.0)
    assert 0 < len(short) < len(long)
    assert long[: len(short)] == short
    assert long[len(short)].t >= 100.0


# ------------------------------------------------------------------------------------ the fitted model

MODEL = """# a small model
[arrivals]
start_rate_per_s = 2.0
end_rate_per_s = 4  # comment
ramp_s = 100.0
level_s = 10.0
level_cv = 0.0

[input_tokens]
probabilities = [0.0, 1.0]
tokens = [
    10,
    10,
]

[output_tokens]
probabilities = [0, 0.5, 1]
tokens = [1, 2, 3]
"""


def test_a_model_file_says_what_it_reads_like(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(MODEL)
    lengths = Lengths(Table((0.0, 1.0), (10, 10)), Table((0.0, 0.5, 1.0), (1, 2, 3)))
    model = workload.Model(2.0, 4.0, 100.0, 10.0, 0.0, lengths)
    assert workload.read_model(path) == model
    assert [model.mean_rate_per_s(t) for t in (0.0, 50.0, 100.0, 900.0)] == [2.0, 3.0, 4.0, 4.0]


def test_without_levels_the_rate_follows_the_line(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(MODEL.replace("ramp_s = 100.0", "ramp_s = 4000.0"))
    arrivals = workload.from_model(random.Random(5), workload.read_model(path), 6000.0)
    thousands = [sum(arrival.t // 1000 == number for arrival in arrivals) for number in range(6)]
    assert thousands == pytest.approx([2250, 2750, 3250, 3750, 4000, 4000], rel=0.07)


@pytest.mark.parametrize(
    ("old", "new", "where_cause_mend"),
    [
        ("[arrivals]", "[arrival]", ":1: table [arrivals] is missing; rename 'arrival' to 'arrivals'"),
        ("[arrivals]", "arrivals = 3", ":1: table [arrivals] is missing; add it"),
        ("ramp_s", "ramps_s", ":2: ramp_s is missing from [arrivals]; rename 'ramps_s' to 'ramp_s'"),
        ("level_cv = 0.0", "", ":2: level_cv is missing from [arrivals]; add it"),
        ("= 2.0", "= 0", ":3: start_rate_per_s is 0; give a finite number above 0"),
        ("= 4  #", "= true  #", ":4: end_rate_per_s is true; give a finite number above 0"),
        ("= 100.0", "= inf", ":5: ramp_s is Infinity; give a finite number above 0"),
        ("= 10.0", "= 1979-05-27", ':6: level_s is "1979-05-27"; give a finite number above 0'),
        ("level_cv = 0.0", "level_cv = -1", ":7: level_cv is -1; give a finite number at least 0"),
        ("[0.0, 1.0]", "[0.0, 0.9]", ":10: probabilities do not rise from 0 to 1; sort them"),
        ("[0.0, 1.0]", "[]", ":10: probabilities do not rise from 0 to 1; sort them"),
        ("[0.0, 1.0]", "0.5", ":10: probabilities is not a list of numbers; write probabilities = [...]"),
        ("[0, 0.5, 1]", "[0, 1, 1]", ":17: probabilities do not rise from 0 to 1; sort them"),
        ("[1, 2, 3]", "[1, 3]", ":18: 2 tokens for 3 probabilities; give one length for each probability"),
        ("[1, 2, 3]", "[1, 2.5, 3]", ":18: tokens is not a list of whole numbers; write tokens = [...]"),
        (
            "[1, 2, 3]",
            "[1, 3, 2]",
            ":18: tokens fall, or leave 1 to 9007199254740992; sort and bound them",
        ),
        (
            "[1, 2, 3]",
            "[0, 2, 3]",
            ":18: tokens fall, or leave 1 to 9007199254740992; sort and bound them",
        ),
        (
            "ramp_s = 100.0",
            "ramp_s =",
            ": not TOML (Invalid value (at line 5, column 9)); correct it or fit the workload again",
        ),
    ],
)
def test_a_damaged_model_is_named_with_line_cause_and_mend(
    tmp_path: Path, old: str, new: str, where_cause_mend: str
) -> None:
    path = tmp_path / "model.toml"
    assert old in MODEL
    path.write_text(MODEL.replace(old, new, 1))
    with pytest.raises(WorkloadError) as caught:
        workload.read_model(path)
    assert str(caught.value) == f"{path}{where_cause_mend}"


def test_a_missing_model_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError) as caught:
        workload.read_model(tmp_path / "model.toml")
    assert str(caught.value) == f"{tmp_path}/model.toml: no such file; give the path of a file that exists"


@pytest.mark.parametrize("column", ["input", "output"])
def test_synthetic_quantiles_are_those_of_its_file(column: str) -> None:
    model = workload.read_model(workload.WORKLOADS / "conversation.toml")
    table = getattr(model.lengths, column)
    arrivals = workload.synthetic(random.Random(1), 3540.0)
    tokens = [getattr(arrival, f"{column}_tokens") for arrival in arrivals]
    assert table.tokens[0] <= min(tokens) <= max(tokens) <= table.tokens[-1]
    for probability, expected in zip(table.probabilities, table.tokens, strict=True):
        at_or_below = sum(drawn <= expected for drawn in tokens) / len(tokens)
        below = sum(drawn < expected for drawn in tokens) / len(tokens)
        assert below - 0.015 <= probability <= at_or_below + 0.015, (probability, expected)


def test_synthetic_load_rises_as_its_file_says() -> None:
    model = workload.read_model(workload.WORKLOADS / "conversation.toml")
    runs = [workload.synthetic(random.Random(seed), 3540.0) for seed in range(8)]
    mean_per_s = (model.start_rate_per_s + model.end_rate_per_s) / 2
    assert fmean(map(len, runs)) == pytest.approx(mean_per_s * 3540, rel=0.015)
    early = fmean(sum(arrival.t < 600 for arrival in run) for run in runs)
    assert early == pytest.approx(600 * model.mean_rate_per_s(300.0), rel=0.05)


# ------------------------------------------------------------------------------------------- the fit


def test_the_fit_finds_the_model_that_made_the_arrivals() -> None:
    lengths = Lengths(Fixed(600), Lognormal(200.0, 0.8, 1, 2000))
    truth = workload.Model(4.0, 8.0, 20_000.0, 30.0, 0.3, lengths)
    found = workload_fit.fit(workload.from_model(random.Random(6), truth, 20_000.0))
    assert found["arrivals"]["start_rate_per_s"] == pytest.approx(4.0, rel=0.08)
    assert found["arrivals"]["end_rate_per_s"] == pytest.approx(8.0, rel=0.08)
    assert found["arrivals"]["level_cv"] == pytest.approx(0.3, rel=0.15)
    assert set(found["input_tokens"]["tokens"]) == {600}
    middle = workload_fit.PROBABILITIES.index(0.5)
    assert found["output_tokens"]["tokens"][middle] == pytest.approx(200, rel=0.03)


def test_a_recorder_that_stamps_every_three_seconds_is_noticed() -> None:
    stamps = [0.0, 0.0, 0.0, 3.0, 3.0, 5.999, 5.999, 5.999, 9.0, 9.0]
    assert workload_fit.tick_s([Arrival(t, 1, 1) for t in stamps]) == 3.0
    assert workload_fit.tick_s([Arrival(t, 1, 1) for t in (0.0, 1.0, 1.5, 1.5)]) == 0.001
    assert workload_fit.recorded([Arrival(t, 1, 1) for t in stamps]).ticks == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert workload_fit.drawn([Arrival(t, 1, 1) for t in (0.1, 2.9, 3.1)], 3.0).ticks == [0, 0, 1]


def test_dispersion_about_a_trend_ignores_the_trend() -> None:
    rising = [10, 12, 14, 16, 18, 20]
    assert workload_fit.dispersion(rising) == pytest.approx(14 / 15)
    assert workload_fit.dispersion_about_trend(rising) == pytest.approx(0.0)


def test_ks_distance_is_the_largest_gap_between_distributions() -> None:
    assert workload_fit.ks_distance([1, 2, 3, 4], [4, 3, 2, 1]) == 0.0
    assert workload_fit.ks_distance([1, 1, 2, 2], [2, 2, 2, 2]) == 0.5
    assert workload_fit.ks_distance([1, 2], [3, 4]) == 1.0


def test_a_trace_too_short_to_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(row(second * 1000) for second in range(60)))
    assert workload_fit.main([str(path), "--model", str(tmp_path / "model.toml")]) == 2
    assert capsys.readouterr().err == "the trace lasts 59 s; give one of at least 300 s\n"
    assert not (tmp_path / "model.toml").exists()


def test_the_report_writes_a_model_a_figure_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rng = random.Random(9)
    times_ms = sorted(rng.randrange(600_000) for _ in range(600))
    path, model, figure = tmp_path / "trace.jsonl", tmp_path / "model.toml", tmp_path / "figures" / "fit.png"
    path.write_text("\n".join(row(ms, output_length=rng.randrange(1, 99)) for ms in times_ms))
    assert workload_fit.main([str(path), "--model", str(model), "--figure", str(figure)]) == 0
    assert workload.read_model(model).lengths.input == Table(workload_fit.PROBABILITIES, (600,) * 33)
    assert figure.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert table.startswith("| | requests | requests/s | dispersion 1 s | dispersion 60 s |")
    assert "| input tokens | recorded |" + " 600 |" * 8 in table


# -------------------------------------------------------------------------------- the recorded hour


@pytest.fixture(scope="module")
def hour() -> list[Arrival]:
    return workload.read_mooncake(TRACE)


@needs_trace
def test_the_recorded_hour_is_read_whole(hour: list[Arrival]) -> None:
    assert len(hour) == 12_031
    assert (hour[0], hour[-1]) == (Arrival(0.0, 6758, 500), Arrival(3536.999, 20774, 508))
    assert sum(arrival.input_tokens for arrival in hour) == 144_793_823
    first = workload.read_mooncake(TRACE, until_s=60.0)
    assert first == [arrival for arrival in hour if arrival.t < 60.0]


@needs_trace
def test_the_committed_model_is_the_fit_to_the_recorded_hour(hour: list[Arrival]) -> None:
    committed = (workload.WORKLOADS / "conversation.toml").read_text()
    assert workload_fit.to_toml(workload_fit.fit(hour), len(hour)) == committed


@needs_trace
def test_the_drawn_hour_resembles_the_recorded_one_and_the_page_shows_it(hour: list[Arrival]) -> None:
    real = workload_fit.recorded(hour)
    synthetic = workload_fit.drawn(workload.synthetic(random.Random(1), 3540.0), real.tick_s)
    assert real.tick_s == 3.0
    assert workload_fit.ks_distance(real.input_tokens, synthetic.input_tokens) < 0.015
    assert workload_fit.ks_distance(real.output_tokens, synthetic.output_tokens) < 0.015
    assert workload_fit.ks_distance(real.counts(3.0, 3540.0), synthetic.counts(3.0, 3540.0)) < 0.05
    page = (PROJECT / "docs" / "workload.md").read_text(encoding="utf-8")
    assert workload_fit.comparison(real, synthetic, 3540.0) in page
