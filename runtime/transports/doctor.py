"""Which transports and dependencies are installed, can be imported, and really work here; what is missing, by name.

Everything is tried in a child process of its own, with a limit of time: an engine that crashes or hangs while it is
imported is a finding, not the end of the examination.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from kvpoll.runtime.transports import NAMES
from kvpoll.runtime.transports.doctor_probe import IN_NAMESPACE
from kvpoll.runtime.transports.mooncake_namespace import open_interfaces

DEFAULTS: Final = ("memory", "shm", "tcp")
"""Transports that need no extra of kvpoll but ``runtime``; without them nothing runs."""

DISTRIBUTIONS: Final[dict[str, tuple[str, ...]]] = {
    "numpy": ("numpy",),
    "msgspec": ("msgspec",),
    "pyzmq": ("pyzmq",),
    "aiohttp": ("aiohttp",),
    "requests": ("requests",),
    "prometheus_client": ("prometheus_client",),
    "mooncake": (
        "mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine", "mooncake-transfer-engine-cuda13",
    ),
    "nixl": ("nixl-cu12", "nixl-cu13"),
    "cuda_ipc": ("torch",),
    "torch": ("torch",),
    "CUDA": ("torch",),
    "triton": ("triton",),
    "matplotlib": ("matplotlib",),
    "Java": (),
}  # fmt: skip
"""Whose version stands for each; the first that is installed counts. Transports that are not here are kvpoll's own."""

DEPENDENCIES: Final = tuple(name for name in DISTRIBUTIONS if name not in NAMES)
LIMIT_S: Final = 60.0
AT_ONCE: Final = 2
PROBE: Final = "kvpoll.runtime.transports.doctor_probe"


class Finding(NamedTuple):
    """One line of the examination.

    kind: "transport" or "dependency". installed: its version, or None. importable, usable: None where it was not
    tried, because the step before failed. note: what is missing and the mend, or something to know.
    """

    name: str
    kind: str
    installed: str | None
    importable: bool | None
    usable: bool | None
    note: str = ""


def examine(
    names: Sequence[str] = (*NAMES, *DEPENDENCIES),
    limit_s: float = LIMIT_S,
    done: Callable[[int], None] = lambda number: None,
) -> list[Finding]:
    """Try each, some at once; in the order of ``names``. ``done`` is told how many are finished."""
    findings = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for finding in pool.map(lambda name: try_one(name, limit_s), names):
            findings.append(finding)
            done(len(findings))
    return findings


def healthy(findings: Sequence[Finding]) -> bool:
    """Do the default transports work?"""
    return all(finding.usable for finding in findings if finding.name in DEFAULTS)


def try_one(name: str, limit_s: float) -> Finding:
    """One transport or dependency, in a child process."""
    if name == "Java":
        return _java(limit_s)
    kind = "transport" if name in NAMES else "dependency"
    installed = _version(name)
    command, environment, remark = _command(name)
    stages = list(_stages(command, environment, limit_s))
    reached = [stage for stage, _ in stages]
    note = stages[-1][1] if stages else ""
    own = name in NAMES and name not in DISTRIBUTIONS
    importable = True if own else "imported" in reached or "used" in reached
    usable = "used" in reached if importable else None
    notes = [note, remark if usable else ""]
    return Finding(name, kind, installed, importable, usable, "; ".join(filter(None, notes)))


def _version(name: str) -> str | None:
    """Read from the package's metadata: nothing is imported."""
    for distribution in DISTRIBUTIONS.get(name, ("kvpoll",)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _command(name: str) -> tuple[list[str], dict[str, str], str]:
    """How to start the probe; more environment; and what to know about a probe that succeeded."""
    command = [sys.executable, "-P", "-m", PROBE, name]
    if name != "mooncake" or not _reachable() or shutil.which("unshare") is None:
        return command, {}, ""
    # It listens on every interface, and a look at the installation opens no port to other machines.
    return ["unshare", "-rn", *command], {IN_NAMESPACE: "1"}, "only in a network namespace of its own: unshare -rn"


def _reachable() -> bool:
    try:
        return bool(open_interfaces())
    except OSError:
        return True


def _stages(command: list[str], environment: dict[str, str], limit_s: float) -> Iterator[tuple[str, str]]:
    """What the child told, stage by stage; how it ended, where that was no good end."""
    # The child finds the same kvpoll as this process, however this one found it.
    package = str(Path(__file__).parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    try:
        told, said = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        told, said = _end(child)
        yield from _lines(told)
        yield "failed", f"it was not finished after {limit_s:g} s; try `{' '.join(command[-3:])}` by hand"
        return
    lines = list(_lines(told))
    yield from lines
    if not lines or lines[-1][0] == "imported":
        yield "failed", f"the process that tried it {_fate(child.returncode)}{_last(said)}"


def _end(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill the child and what it started: they are a session of their own."""
    os.killpg(child.pid, signal.SIGKILL)
    return child.communicate()


def _lines(told: str) -> Iterator[tuple[str, str]]:
    for line in told.splitlines():
        stage = json.loads(line)
        yield stage["stage"], stage["note"]


def _fate(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _last(said: str) -> str:
    """The last line of what it complained of."""
    lines = [line for line in said.splitlines() if line.strip()]
    return f": {' '.join(lines[-1].split())}" if lines else ""


def _java(limit_s: float) -> Finding:
    """For ``kvpoll check``, which runs TLC."""
    try:
        told = subprocess.run(
            ["java", "-version"], capture_output=True, text=True, timeout=limit_s, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        mend = "`kvpoll check` runs TLC on it; apt-get install default-jre-headless"
        return Finding("Java", "dependency", None, None, None, mend)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("Java", "dependency", None, None, False, f"java does not run: {' '.join(str(error).split())}")
    found = re.search(r'version "([^"]+)"', told.stderr)
    works = told.returncode == 0
    note = "" if works else f"java -version {_fate(told.returncode)}{_last(told.stderr)}"
    return Finding("Java", "dependency", found[1] if found else None, None, works, note)
