"""Results of campaigns in one SQLite file: every finished seed is committed at once, so an interrupt loses none.

A store holds any number of campaigns, told apart by `Identity`: all that decides what a seed does. Results of
another specification, scenario, profile or simulator are another campaign and are never summed with these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvpoll.spec.source import BadInput

APPLICATION = 0x6B76706C
"""SQLite's application_id of a store: "kvpl"."""

LAYOUT = 1
"""SQLite's user_version of a store: which tables it has."""

WAIT_S = 30.0
"""How long to wait while another process writes."""

TABLES = """
CREATE TABLE campaigns (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    scenario TEXT NOT NULL,
    scenario_digest TEXT NOT NULL,
    spec_digest TEXT NOT NULL,
    code_digest TEXT NOT NULL,
    profile TEXT NOT NULL,
    rules TEXT NOT NULL,
    swarm INTEGER NOT NULL,
    minutes REAL NOT NULL,
    workload TEXT NOT NULL,
    plan TEXT NOT NULL
);
CREATE TABLE runs (
    campaign INTEGER NOT NULL REFERENCES campaigns (id),
    seed INTEGER NOT NULL,
    digest TEXT,
    verdict TEXT NOT NULL,
    invariant TEXT,
    node TEXT,
    t REAL,
    text TEXT,
    counts TEXT NOT NULL,
    draw TEXT NOT NULL,
    faults TEXT NOT NULL,
    fired TEXT NOT NULL,
    causes TEXT NOT NULL,
    requests INTEGER NOT NULL,
    succeeded INTEGER NOT NULL,
    events INTEGER NOT NULL,
    simulated_s REAL NOT NULL,
    seconds REAL NOT NULL,
    repeat TEXT NOT NULL,
    PRIMARY KEY (campaign, seed)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Identity:
    """All that decides what a seed does. ``plan`` is the command as JSON, which the trace of a run names too.

    rules: every rule of the profile, as JSON. minutes: the hostile phase. workload: digest of a given trace, or "".
    """

    scenario: str
    scenario_digest: str
    spec_digest: str
    code_digest: str
    profile: str
    rules: str
    swarm: bool
    minutes: float
    workload: str
    plan: str

    @property
    def key(self) -> str:
        """Digest of all of it."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What came of one seed. verdict: "holds", "breaks", or "crashed" when the simulator itself failed.

    invariant, node, t, text: the first violation. counts: invariant -> how often it broke. faults: the schedule.
    fired: kind of fault -> how often it really did something. causes: first cause of failure -> requests.
    """

    seed: int
    digest: str | None
    verdict: str
    invariant: str | None
    node: str | None
    t: float | None
    text: str | None
    counts: dict[str, int]
    draw: str
    faults: list[dict[str, Any]]
    fired: dict[str, int]
    causes: dict[str, int]
    requests: int
    succeeded: int
    events: int
    simulated_s: float
    seconds: float
    repeat: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Result))
JSON_COLUMNS = ("counts", "faults", "fired", "causes")


class Campaign(NamedTuple):
    """A row of the store."""

    number: int
    identity: Identity


class Store:
    """One open file. Raises BadInput for whatever is wrong with it."""

    def __init__(self, path: Path, must_exist: bool = False) -> None:
        self.path = path
        if must_exist and not path.is_file():
            raise BadInput(f"{path}: there is no campaign store here; run `kvpoll campaign --store {path}` first")
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
        try:
            with self._explained():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _open(self) -> None:
        """Make the tables of a new file, or see that these are ours. Nothing foreign is written to."""
        if self._is_new():
            self._connection.execute("PRAGMA journal_mode = WAL")
            with self._transaction():
                if self._is_new():  # still, now that no other process can write
                    self._make()
        if self._pragma("application_id") != APPLICATION:
            raise self._unusable("it is a database of another program")
        if self._pragma("user_version") != LAYOUT:
            raise self._unusable("another version of kvpoll wrote it")
        if self._ask("PRAGMA quick_check(1)")[0][0] != "ok":
            raise self._unusable("it is damaged")

    def _is_new(self) -> bool:
        return not self._pragma("application_id") and not self._ask("SELECT count(*) FROM sqlite_master")[0][0]

    def _make(self) -> None:
        for statement in TABLES.split(";"):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
        self._connection.execute(f"PRAGMA user_version = {LAYOUT}")

    def _pragma(self, name: str) -> Any:
        return self._ask(f"PRAGMA {name}")[0][0]

    def _ask(self, question: str, *values: Any) -> list[Any]:
        return self._connection.execute(question, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, also when Ctrl-C comes in the middle; only one process at a time."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(str(error.strerror)) from None
        except sqlite3.Error as error:
            raise self._unusable(str(error)) from None

    def _unusable(self, cause: str) -> BadInput:
        return BadInput(f"{self.path}: cannot be used as a campaign store: {cause}; choose another --store")

    def campaign(self, identity: Identity) -> int:
        """The number of a campaign, which is entered if it is new."""
        fields = {**dataclasses.asdict(identity), "key": identity.key}
        marks = ", ".join("?" * len(fields))
        with self._explained(), self._transaction():
            insert = f"INSERT OR IGNORE INTO campaigns ({', '.join(fields)}) VALUES ({marks})"
            self._connection.execute(insert, tuple(fields.values()))
            return int(self._ask("SELECT id FROM campaigns WHERE key = ?", identity.key)[0][0])

    def campaigns(self) -> list[Campaign]:
        """All campaigns, the oldest first."""
        names = [field.name for field in dataclasses.fields(Identity)]
        with self._explained():
            rows = self._ask(f"SELECT id, {', '.join(names)} FROM campaigns ORDER BY id")
        found = (dict(zip(names, row[1:], strict=True)) for row in rows)
        identities = [Identity(**{**entry, "swarm": bool(entry["swarm"])}) for entry in found]
        return [Campaign(row[0], identity) for row, identity in zip(rows, identities, strict=True)]

    def seeds(self, campaign: int) -> set[int]:
        """The seeds that are done."""
        with self._explained():
            return {seed for (seed,) in self._ask("SELECT seed FROM runs WHERE campaign = ?", campaign)}

    def add(self, campaign: int, result: Result) -> None:
        """Keep a finished seed. One that another process has finished meanwhile stays: it is the same."""
        values = [getattr(result, name) for name in COLUMNS]
        stored = [
            json.dumps(value, separators=(",", ":")) if name in JSON_COLUMNS else value
            for name, value in zip(COLUMNS, values, strict=True)
        ]
        marks = ", ".join("?" * (len(COLUMNS) + 1))
        with self._explained(), self._transaction():
            insert = f"INSERT OR IGNORE INTO runs (campaign, {', '.join(COLUMNS)}) VALUES ({marks})"
            self._connection.execute(insert, (campaign, *stored))

    def results(self, campaign: int) -> list[Result]:
        """All that is done, in order of seeds."""
        with self._explained():
            rows = self._ask(f"SELECT {', '.join(COLUMNS)} FROM runs WHERE campaign = ? ORDER BY seed", campaign)
        return [
            Result(
                **{
                    name: json.loads(value) if name in JSON_COLUMNS else value
                    for name, value in zip(COLUMNS, row, strict=True)
                }
            )
            for row in rows
        ]
