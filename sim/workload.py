"""Who asks, when, and for how much: the arrivals that a simulated deployment has to serve.

A workload is a list of `Arrival` in order of time. It comes from one of four places: a Poisson process
(`poisson`), a quiet stream with bursts (`bursts`), a model fitted to a recorded hour (`synthetic`), or a
recorded trace in the Mooncake format (`read_mooncake`). All randomness comes from the `random.Random` that
the caller passes, drawn in order of time: the same seed gives the same list, and a longer run of the same
seed begins with the shorter one.

What it does not say: which prompts share a prefix. A trace's ``hash_ids`` are checked and then dropped, since
the transfer protocol moves pages whatever they hold.
"""

from __future__ import annotations

import json
import random
import tomllib
from bisect import bisect_right
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, Protocol

WORKLOADS: Final[Path] = Path(__file__).parent / "workloads"
"""Folder of the fitted models, one ``<name>.toml`` each."""

BLOCK_TOKENS: Final = 512
"""Tokens that one entry of a Mooncake trace's ``hash_ids`` stands for; the last block may be partly full."""

_MOONCAKE_KEYS: Final = ("timestamp", "input_length", "output_length", "hash_ids")
_MOONCAKE_KEY_SET: Final = frozenset(_MOONCAKE_KEYS)
_MODEL_WORDS: Final = frozenset(
    (
        *("arrivals", "start_rate_per_s", "end_rate_per_s", "ramp_s", "level_s", "level_cv"),
        *("input_tokens", "output_tokens", "probabilities", "tokens"),
    )
)
_LARGEST: Final = 2**53  # beyond it milliseconds no longer convert to a float exactly


class WorkloadError(ValueError):
    """A workload cannot be made from this input. The message is one line: ``path:line: cause; mend``.

    The line is left out where there is none (a missing file), the path where a number was passed in a call.
    """


class Arrival(NamedTuple):
    """One request: seconds since the start, prompt length, length of the answer (tokens, both >= 1)."""

    t: float
    input_tokens: int
    output_tokens: int


# ---------------------------------------------------------------------------------------------- lengths


class Draw(Protocol):
    """Anything that yields a number of tokens from a random source."""

    def draw(self, rng: random.Random) -> int: ...


class Fixed(NamedTuple):
    """Always the same number of tokens."""

    tokens: int

    def draw(self, rng: random.Random) -> int:
        return self.tokens


class Lognormal(NamedTuple):
    """A lognormal length, clipped (not redrawn) to [low_tokens, high_tokens]; sigma is of the logarithm."""

    median_tokens: float
    sigma: float
    low_tokens: int
    high_tokens: int

    def draw(self, rng: random.Random) -> int:
        tokens = round(self.median_tokens * rng.lognormvariate(0.0, self.sigma))
        return min(max(tokens, self.low_tokens), self.high_tokens)


class Table(NamedTuple):
    """A distribution as its quantiles: probabilities rise from 0 to 1, tokens start above 0 and never fall.

    Between two entries the logarithm of the length is uniform. Equal neighbours make a point mass, which is
    how the fit keeps the many three-token answers of the recorded hour.
    """

    probabilities: tuple[float, ...]
    tokens: tuple[int, ...]

    def at(self, probability: float) -> int:
        """The quantile at a probability in [0, 1), in whole tokens."""
        right = bisect_right(self.probabilities, probability)
        before, after = self.probabilities[right - 1], self.probabilities[right]
        low, high = self.tokens[right - 1], self.tokens[right]
        return int(low * (high / low) ** ((probability - before) / (after - before)) + 0.5)

    def draw(self, rng: random.Random) -> int:
        return self.at(rng.random())


class Lengths(NamedTuple):
    """How long prompts and answers are, drawn independently (their rank correlation in the trace is 0.07)."""

    input: Draw
    output: Draw

    def arrival(self, rng: random.Random, t: float) -> Arrival:
        return Arrival(t, self.input.draw(rng), self.output.draw(rng))


def fixed(input_tokens: int, output_tokens: int) -> Lengths:
    """Every request has the same two lengths (tokens, both >= 1, else WorkloadError)."""
    _require_positive("input_tokens", input_tokens)
    _require_positive("output_tokens", output_tokens)
    return Lengths(Fixed(input_tokens), Fixed(output_tokens))


# ---------------------------------------------------------------------------------- plain random arrivals


def poisson(rng: random.Random, rate_per_s: float, duration_s: float, lengths: Lengths) -> list[Arrival]:
    """Independent arrivals at a constant rate, all before ``duration_s``."""
    _require_positive("rate_per_s", rate_per_s)
    _require_positive("duration_s", duration_s)
    return [lengths.arrival(rng, t) for t in _times(rng, rate_per_s, 0.0, duration_s)]


def bursts(
    rng: random.Random,
    quiet_rate_per_s: float,
    burst_rate_per_s: float,
    burst_s: float,
    period_s: float,
    duration_s: float,
    lengths: Lengths,
    *,
    periodic: bool = True,
) -> list[Arrival]:
    """A quiet Poisson stream with bursts of ``burst_s`` seconds at a higher rate.

    One period is a quiet gap and then a burst. ``periodic``: every gap lasts ``period_s - burst_s``; if
    not, the gaps are exponential with that mean. ``quiet_rate_per_s`` may be 0. Raises WorkloadError on a
    number that makes no sense.
    """
    if quiet_rate_per_s != 0:
        _require_positive("quiet_rate_per_s", quiet_rate_per_s)
    for name, number in (
        ("burst_rate_per_s", burst_rate_per_s),
        ("burst_s", burst_s),
        ("duration_s", duration_s),
    ):
        _require_positive(name, number)
    if not burst_s < period_s < float("inf"):
        raise WorkloadError(f"period_s is {period_s}; give a number of seconds above burst_s ({burst_s})")
    arrivals: list[Arrival] = []
    start_s = 0.0
    while start_s < duration_s:
        gap_s = period_s - burst_s if periodic else rng.expovariate(1.0 / (period_s - burst_s))
        windows = (quiet_rate_per_s, gap_s), (burst_rate_per_s, burst_s)
        for rate_per_s, window_s in windows:
            end_s = start_s + window_s
            times = _times(rng, rate_per_s, start_s, min(end_s, duration_s))
            arrivals.extend(lengths.arrival(rng, t) for t in times)
            start_s = end_s
    return arrivals


def _times(rng: random.Random, rate_per_s: float, start_s: float, end_s: float) -> Iterator[float]:
    """Poisson times in [start_s, end_s). Lazy: the caller draws the lengths of one before the next time."""
    if rate_per_s == 0.0:
        return
    t = start_s + rng.expovariate(rate_per_s)
    while t < end_s:
        yield t
        t += rng.expovariate(rate_per_s)


def _require_positive(name: str, number: float) -> None:
    if not 0 < number < float("inf"):
        raise WorkloadError(f"{name} is {number}; give a finite number above 0")


# --------------------------------------------------------------------------------------- the fitted model


class Model(NamedTuple):
    """A recorded hour in a few numbers.

    The mean rate goes in a straight line from ``start_rate_per_s`` to ``end_rate_per_s`` over ``ramp_s`` and
    then stays. Every ``level_s`` seconds it is multiplied by a fresh gamma level of mean 1 and coefficient of
    variation ``level_cv`` (0: plain Poisson), because minutes of the trace vary more than a Poisson stream's.
    """

    start_rate_per_s: float
    end_rate_per_s: float
    ramp_s: float
    level_s: float
    level_cv: float
    lengths: Lengths

    def mean_rate_per_s(self, t: float) -> float:
        share = min(t / self.ramp_s, 1.0)
        return self.start_rate_per_s + share * (self.end_rate_per_s - self.start_rate_per_s)


def synthetic(rng: random.Random, duration_s: float, name: str = "conversation") -> list[Arrival]:
    """Arrivals before ``duration_s`` drawn from the fitted model ``workloads/<name>.toml``.

    Raises WorkloadError if there is no such model or its file is damaged.
    """
    return from_model(rng, read_model(_model_path(name)), duration_s)


def from_model(rng: random.Random, model: Model, duration_s: float) -> list[Arrival]:
    """Arrivals before ``duration_s`` drawn from ``model``."""
    _require_positive("duration_s", duration_s)
    arrivals: list[Arrival] = []
    start_s = 0.0
    while start_s < duration_s:
        end_s = start_s + model.level_s
        level = _level(rng, model.level_cv)
        # The mean is monotonous, so the larger end of the window bounds it: draw at that rate, then thin.
        highest_per_s = max(model.mean_rate_per_s(start_s), model.mean_rate_per_s(end_s))
        for t in _times(rng, highest_per_s * level, start_s, min(end_s, duration_s)):
            if rng.random() * highest_per_s < model.mean_rate_per_s(t):
                arrivals.append(model.lengths.arrival(rng, t))
        start_s = end_s
    return arrivals


def _level(rng: random.Random, cv: float) -> float:
    return rng.gammavariate(cv**-2, cv**2) if cv > 0.0 else 1.0


def read_model(path: Path | str) -> Model:
    """The model in a TOML file (tables arrivals, input_tokens, output_tokens); WorkloadError if it is bad."""
    file = _ModelFile(path)
    return Model(
        start_rate_per_s=file.number("arrivals", "start_rate_per_s"),
        end_rate_per_s=file.number("arrivals", "end_rate_per_s"),
        ramp_s=file.number("arrivals", "ramp_s"),
        level_s=file.number("arrivals", "level_s"),
        level_cv=file.number("arrivals", "level_cv", zero_allowed=True),
        lengths=Lengths(file.table("input_tokens"), file.table("output_tokens")),
    )


def _model_path(name: str) -> Path:
    known = sorted(file.stem for file in WORKLOADS.glob("*.toml"))
    if name not in known:
        raise WorkloadError(f"no workload is named {name!r}; {_nearest(name, known)}")
    return WORKLOADS / f"{name}.toml"


class _ModelFile:
    """A model's TOML while it is being checked; every complaint names the line of the key it is about."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        try:
            self.text = _read_bytes(path).decode()
            self.tables = tomllib.loads(self.text)
        except WorkloadError:
            raise
        except (ValueError, RecursionError) as error:
            raise WorkloadError(f"{path}: not TOML ({error}); correct it or fit the workload again") from None

    def number(self, table: str, key: str, *, zero_allowed: bool = False) -> float:
        value = self._value(table, key)
        if type(value) not in (int, float) or not (0 < value < float("inf") or (zero_allowed and value == 0)):
            kind = "at least 0" if zero_allowed else "above 0"
            raise self._error(table, key, f"{key} is {_shown(value)}", f"give a finite number {kind}")
        return float(value)

    def table(self, name: str) -> Table:
        probabilities = self._list(name, "probabilities", (int, float))
        tokens = self._list(name, "tokens", (int,))
        rising = all(before < after for before, after in pairwise(probabilities))
        if not (rising and len(probabilities) >= 2 and probabilities[0] == 0 and probabilities[-1] == 1):
            raise self._error(name, "probabilities", "probabilities do not rise from 0 to 1", "sort them")
        if len(tokens) != len(probabilities):
            cause = f"{len(tokens)} tokens for {len(probabilities)} probabilities"
            raise self._error(name, "tokens", cause, "give one length for each probability")
        if not 1 <= tokens[0] <= tokens[-1] <= _LARGEST or any(before > after for before, after in pairwise(tokens)):
            raise self._error(name, "tokens", f"tokens fall, or leave 1 to {_LARGEST}", "sort and bound them")
        return Table(tuple(map(float, probabilities)), tuple(tokens))

    def _list(self, table: str, key: str, types: tuple[type, ...]) -> list[Any]:
        values = self._value(table, key)
        if not isinstance(values, list) or any(type(value) not in types for value in values):
            kind = "whole numbers" if types == (int,) else "numbers"
            raise self._error(table, key, f"{key} is not a list of {kind}", f"write {key} = [...]")
        return values

    def _value(self, table: str, key: str) -> Any:
        entries = self.tables.get(table)
        if not isinstance(entries, dict):
            raise self._error("", "", f"table [{table}] is missing", _missing(table, list(self.tables)))
        if key not in entries:
            raise self._error(table, "", f"{key} is missing from [{table}]", _missing(key, list(entries)))
        return entries[key]

    def _error(self, table: str, key: str, cause: str, mend: str) -> WorkloadError:
        return WorkloadError(f"{self.path}:{self._line(table, key)}: {cause}; {mend}")

    def _line(self, table: str, key: str) -> int:
        """Line of ``key`` in ``[table]``; of the header if there is no such key; 1 if there is no table."""
        header, current = 1, ""
        for number, line in enumerate(self.text.split("\n"), start=1):
            word = line.split("#")[0].split("=")[0].strip()
            if word.startswith("["):
                current = word.strip("[] ")
                header = number if current == table else header
            elif current == table and word == key != "":
                return number
        return header


# ---------------------------------------------------------------------------------------- recorded traces


def read_mooncake(path: Path | str, until_s: float | None = None) -> list[Arrival]:
    """The arrivals of a Mooncake trace: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

    ``until_s``: read no further than the first arrival at or after it. Strict, because a damaged trace would
    otherwise pass for a light load: WorkloadError names the first line that is truncated, lacks a key, has an
    unknown one, holds something other than whole numbers in range, or goes back in time.
    """
    if until_s is not None:
        _require_positive("until_s", until_s)
    arrivals: list[Arrival] = []
    previous_ms = 0
    for number, line in enumerate(_read_bytes(path).splitlines(), start=1):
        try:
            timestamp_ms, arrival = _mooncake_arrival(line)
            if timestamp_ms < previous_ms:
                _reject(f"timestamp {timestamp_ms} is before {previous_ms} of the line above", "sort by timestamp")
        except WorkloadError as error:
            raise WorkloadError(f"{path}:{number}: {error}") from None
        if until_s is not None and arrival.t >= until_s:
            return arrivals
        previous_ms = timestamp_ms
        arrivals.append(arrival)
    if not arrivals:
        raise WorkloadError(f"{path}:1: the file is empty; give a trace with one request a line")
    return arrivals


def _mooncake_arrival(line: bytes) -> tuple[int, Arrival]:
    row = _json_object(line)
    if row.keys() != _MOONCAKE_KEY_SET:
        _reject_keys(row)
    timestamp_ms, input_tokens, output_tokens, blocks = map(row.__getitem__, _MOONCAKE_KEYS)
    _check_whole("timestamp", timestamp_ms, 0)
    _check_whole("input_length", input_tokens, 1)
    _check_whole("output_length", output_tokens, 1)
    _check_blocks(blocks, input_tokens)
    return timestamp_ms, Arrival(timestamp_ms / 1000, input_tokens, output_tokens)


def _json_object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        _reject("the line is blank", "delete it")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        _reject("not a whole JSON object (is the line truncated?)", "fetch the trace again or delete the line")
    if not isinstance(row, dict):
        _reject(f"a JSON object is needed, this is {_shown(row)}", "write one {...} a line")
    return row


def _reject_keys(row: dict[str, Any]) -> None:
    missing = [key for key in _MOONCAKE_KEYS if key not in row]
    unknown = sorted(row.keys() - _MOONCAKE_KEY_SET)
    if not unknown:
        _reject(f"key {missing[0]!r} is missing", "every line needs " + ", ".join(_MOONCAKE_KEYS))
    nearest = get_close_matches(unknown[0], missing, n=1)
    mend = f"rename it to {nearest[0]!r}" if nearest else "remove it"
    _reject(f"unknown key {_shown(unknown[0])}", mend)


def _check_whole(key: str, value: Any, least: int) -> None:
    if type(value) is not int:  # a bool is an int to isinstance
        _reject(f"{key} is {_shown(value)}, not a whole number", "write an integer")
    if not least <= value <= _LARGEST:
        _reject(f"{key} is {_shown(value)}", f"give an integer from {least} to {_LARGEST}")


def _check_blocks(blocks: Any, input_tokens: int) -> None:
    if not isinstance(blocks, list) or any(type(block) is not int or block < 0 for block in blocks):
        _reject("hash_ids is not a list of integers from 0 up", "write one block id for every 512 tokens")
    needed = -(-input_tokens // BLOCK_TOKENS)
    if len(blocks) != needed:
        cause = f"{len(blocks)} hash_ids for input_length {input_tokens}"
        _reject(cause, f"give {needed}, one for every {BLOCK_TOKENS} tokens begun")


# ------------------------------------------------------------------------------------------------ complaints


def _reject(cause: str, mend: str) -> NoReturn:
    raise WorkloadError(f"{cause}; {mend}")


def _shown(value: Any) -> str:
    """A bad value on one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known here: " + (", ".join(sorted(known)) or "nothing")


def _missing(name: str, present: list[str]) -> str:
    """The mend for a missing word of a model file: probably one that means nothing there was meant."""
    close = get_close_matches(name, [word for word in present if word not in _MODEL_WORDS], n=1)
    return f"rename {close[0]!r} to {name!r}" if close else "add it"


def _read_bytes(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise WorkloadError(f"{path}: no such file; {_nearest_file(Path(path))}") from None
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return f"did you mean {str(folder / close[0])!r}?" if close else "give the path of a file that exists"
