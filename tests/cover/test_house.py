"""Style is executed: the rules of the house are checked here, so that reviews can be about ideas.

Each rule is a small function from a source text (or a folder) to a list of complaints. It is applied twice:
to the house, which must give none, and to a bad snippet, which must give the complaint written beside it.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pytest

HOUSE = Path(__file__).resolve().parents[2]
ROOMS = ("spec", "statemachine", "sim", "runtime", "reports")
FACE = "face"  # src/kvpoll itself: public names, command line, bench

MAY_IMPORT = {
    "spec": {"spec"},
    "statemachine": {"spec", "statemachine"},
    "sim": {"spec", "statemachine", "sim"},
    "runtime": {"spec", "statemachine", "runtime"},
    "reports": {"spec", "statemachine", "sim", "runtime", "reports"},
    FACE: {*ROOMS, FACE},
}

PURE_ROOMS = {"spec", "statemachine"}
IMPURE = {"time", "datetime", "random", "secrets", "threading", "_thread", "concurrent", "multiprocessing"}
IMPURE |= {"asyncio", "socket", "select", "selectors", "subprocess"}

TRANSITIONS_VIEW = "statemachine/view.py"
BENCH_FILES = ("sim/bench*.py", "src/kvpoll/bench*.py")
HOMES = {
    "simpy": ("sim/**",),
    "matplotlib": ("reports/**",),
    "mpl_toolkits": ("reports/**",),
    "rich": ("src/kvpoll/**",),
    "transitions": (TRANSITIONS_VIEW, *BENCH_FILES),
    "statemachine": BENCH_FILES,  # the package python-statemachine, a peer that bench measures
    "torch": ("runtime/**",),
    "requests": ("runtime/**",),
    "zmq": ("runtime/**",),
    "msgspec": ("runtime/**", "src/kvpoll/trace_lines.py"),
    "aiohttp": ("runtime/**",),
    "prometheus_client": ("runtime/**", "src/kvpoll/live_metrics.py"),
    "mooncake": ("runtime/transports/**",),
    "nixl_cu12": ("runtime/transports/**",),
    "pytest": ("src/kvpoll/testing/**",),
    "hypothesis": (),  # for tests only
}
"""Third-party package -> the only files that may import it; others are free outside the pure rooms."""

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 700
MARKERS = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error")
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "base"}


# --- what the house contains ----------------------------------------------------------------------


def python_files(*folders: str) -> list[PurePosixPath]:
    """Python files below these folders of the house, as paths from its top, each under its real name only."""
    found = (path for folder in folders for path in (HOUSE / folder).rglob("*.py") if path.resolve() == path)
    return sorted(PurePosixPath(path.relative_to(HOUSE).as_posix()) for path in found)


SOURCES = python_files(*ROOMS, "src/kvpoll")
TESTS = python_files("tests")
TEST_FILES = [path for path in TESTS if path.name.startswith("test_")]


def room_of(path: PurePosixPath) -> str:
    return path.parts[0] if path.parts[0] in ROOMS else FACE


def module_of(path: PurePosixPath) -> str:
    """Dotted name under which a source file is imported: spec/trace.py is kvpoll.spec.trace."""
    parts = path.parts[1:] if path.parts[0] == "src" else ("kvpoll", *path.parts)
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


# --- rule: arrows between rooms, and one home for each third-party package ------------------------


def imports(path: PurePosixPath, text: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; relative and importlib imports are spelled out."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = ".".join(package.split(".")[: len(package.split(".")) - level + 1]) if level else ""
                source = ".".join(filter(None, (above, module)))
                yield from ((node.lineno, f"{source}.{name.name}") for name in names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if call_name(node) in (
                "import_module",
                "__import__",
            ):
                yield node.lineno, name


def call_name(node: ast.Call) -> str:
    """Last word of what is called: ``pytest.raises(...)`` is raises."""
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def bad_arrows(path: PurePosixPath, text: str) -> list[str]:
    """Imports that point the wrong way between rooms, or that break the purity of spec and statemachine."""
    complaints = []
    for line, name in imports(path, text):
        reason = kvpoll_reason(path, name) if name.split(".")[0] == "kvpoll" else foreign_reason(path, name)
        if reason:
            complaints.append(f"{path}:{line}: {name}: {reason}")
    return complaints


def kvpoll_reason(path: PurePosixPath, name: str) -> str:
    here = room_of(path)
    second = name.split(".")[1] if "." in name else FACE
    there = second if second in ROOMS else FACE
    allowed = sorted(MAY_IMPORT[here])
    return "" if there in allowed else f"{here} may import only {', '.join(allowed)}"


def foreign_reason(path: PurePosixPath, name: str) -> str:
    top, here = name.split(".")[0], room_of(path)
    if top in HOMES:
        homes = HOMES[top]
        at_home = any(matches(path, home) for home in homes)
        return "" if at_home else f"{top} may be imported only in {' and '.join(homes) or 'tests'}"
    if here in PURE_ROOMS and top in IMPURE:
        return f"{here} has no clock, randomness, threads or I/O"
    if here in PURE_ROOMS and top not in sys.stdlib_module_names:
        return f"{here} imports only the standard library"
    return ""


def matches(path: PurePosixPath, pattern: str) -> bool:
    if pattern.endswith("/**"):
        return str(path).startswith(pattern.removesuffix("**"))
    return path.match(pattern) and len(path.parts) == len(PurePosixPath(pattern).parts)


# --- rules: sizes, leftovers, names, docstrings ---------------------------------------------------


def long_functions(path: PurePosixPath, text: str) -> list[str]:
    """Functions longer than a screen, by name, with their length."""
    complaints = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                complaints.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, over {FUNCTION_LINES_MAX}")
    return complaints


def long_file(path: PurePosixPath, text: str) -> list[str]:
    lines = text.count("\n")
    return [f"{path}: {lines} lines, over {FILE_LINES_MAX}"] if lines > FILE_LINES_MAX else []


def leftover_markers(path: PurePosixPath, text: str) -> list[str]:
    pattern = re.compile(rf"\b({'|'.join(MARKERS)})\b")
    numbered = enumerate(text.splitlines(), start=1)
    return [f"{path}:{line}: leftover {found[1]}" for line, row in numbered if (found := pattern.search(row))]


def empty_name(path: PurePosixPath, text: str) -> list[str]:
    """A file or folder whose name says nothing about what is inside."""
    del text
    empty = [word for word in (*path.parts[:-1], path.stem) if word in EMPTY_NAMES]
    return [f"{path}: the name {word} says nothing: name the idea inside" for word in empty]


def missing_docstring(path: PurePosixPath, text: str) -> list[str]:
    return [] if (ast.get_docstring(ast.parse(text)) or "").strip() else [f"{path}: no module docstring"]


# --- rule: every test can fail --------------------------------------------------------------------

CHECKING_CALLS = {"raises", "warns", "fail", "RaisesGroup"}


def checks_something(node: ast.AST) -> bool:
    """An assert about something that is not a constant, or a call like pytest.raises, anywhere below node."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert) and not isinstance(inner.test, ast.Constant):
            return True
        if isinstance(inner, ast.Call) and call_name(inner) in CHECKING_CALLS:
            return True
    return False


def toothless_tests(path: PurePosixPath, text: str) -> list[str]:
    """Test files and tests that assert nothing, themselves or through a function of the same file."""
    tree = ast.parse(text)
    if not checks_something(tree):
        return [f"{path}: asserts nothing"]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    checkers = {function.name for function in functions if checks_something(function)}
    return [
        f"{path}:{function.lineno}: {function.name} asserts nothing"
        for function in functions
        if function.name.startswith("test_")
        and not checks_something(function)
        and not any(isinstance(node, ast.Call) and call_name(node) in checkers for node in ast.walk(function))
    ]


# --- rule: one relative link per room -------------------------------------------------------------


def bad_room_links(house: Path) -> list[str]:
    """src/kvpoll holds one link for each room and no other, relative so that a checkout can be moved."""
    package = house / "src" / "kvpoll"
    complaints = []
    for room in ROOMS:
        link = package / room
        if not link.is_symlink():
            complaints.append(f"src/kvpoll/{room} is not a symbolic link")
        elif (target := str(link.readlink())) != f"../../{room}":
            complaints.append(f"src/kvpoll/{room} points to {target}, not to ../../{room}")
    others = sorted(path.name for path in package.rglob("*") if path.is_symlink() and path.name not in ROOMS)
    return complaints + [f"src/kvpoll/{name} is a link to no room" for name in others]


# --- rule: links in pages lead somewhere ----------------------------------------------------------

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINKS = (
    re.compile(r"\]\(\s*<?([^)>\s]+)>?[^)]*\)"),  # [text](target "title") and ![alt](target)
    re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?([^>\s]+)>?", re.MULTILINE),  # [name]: target
    re.compile(r"""\b(?:src|href|srcset)=["']([^"']+)["']"""),  # <img src="target">
)


def broken_links(house: Path, page: Path) -> list[str]:
    """Links of one Markdown page to files that are not there. Web addresses and anchors are not followed."""
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    complaints = []
    for target in (found for pattern in LINKS for found in pattern.findall(text)):
        name = unquote(re.split(r"[#?]", target)[0])
        if not name or re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
            continue
        start = house / name.lstrip("/") if name.startswith("/") else page.parent / name
        if not start.exists():
            complaints.append(f"{page.relative_to(house)}: links to {target}, which does not exist")
    return complaints


def pages() -> list[Path]:
    below = [page for folder in ("docs", "tests", *ROOMS) for page in (HOUSE / folder).rglob("*.md")]
    return sorted([*HOUSE.glob("*.md"), *below])


# --- the rules, applied to the house --------------------------------------------------------------

Rule = Callable[[PurePosixPath, str], list[str]]


def complaints_of(rule: Rule, paths: list[PurePosixPath]) -> list[str]:
    return [line for path in paths for line in rule(path, (HOUSE / path).read_text(encoding="utf-8"))]


def assert_none(complaints: list[str]) -> None:
    """All complaints, one a line: a bare comparison with [] would show the first and hide the rest."""
    assert not complaints, "\n" + "\n".join(complaints)


def test_there_is_a_house_to_check() -> None:
    """Without this, a moved folder would make every rule below hold because nothing is read."""
    assert {room_of(path) for path in SOURCES} >= set(ROOMS)
    assert PurePosixPath("tests/cover/test_house.py") in TEST_FILES


def test_arrows_between_rooms_point_one_way() -> None:
    assert_none(complaints_of(bad_arrows, SOURCES))


def test_functions_fit_on_a_screen() -> None:
    assert_none(complaints_of(long_functions, SOURCES + TESTS))


def test_files_hold_one_idea() -> None:
    assert_none(complaints_of(long_file, SOURCES + TESTS))


def test_nothing_is_left_over() -> None:
    assert_none(complaints_of(leftover_markers, SOURCES + TESTS))


def test_names_say_what_is_inside() -> None:
    assert_none(complaints_of(empty_name, SOURCES + TESTS))


def test_modules_say_what_they_are_for() -> None:
    assert_none(complaints_of(missing_docstring, SOURCES))


def test_every_test_can_fail() -> None:
    assert_none(complaints_of(toothless_tests, TEST_FILES))


def test_each_room_has_one_relative_link() -> None:
    assert_none(bad_room_links(HOUSE))


def test_links_in_pages_lead_to_files() -> None:
    assert_none([line for page in pages() for line in broken_links(HOUSE, page)])


# --- the rules, seen to fail ----------------------------------------------------------------------

PURE = "has no clock, randomness, threads or I/O"


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("spec/a.py", "import kvpoll.statemachine", "spec may import only spec"),
        ("spec/a.py", "from kvpoll import sim", "spec may import only spec"),
        ("spec/a.py", "import numpy", "spec imports only the standard library"),
        ("spec/a.py", "import simpy", "simpy may be imported only in sim/**"),
        ("spec/sub/a.py", "from ...runtime import tcp", "spec may import only spec"),
        ("statemachine/__init__.py", "from ..sim import world", "may import only spec, statemachine"),
        ("statemachine/a.py", "import time", f"statemachine {PURE}"),
        ("statemachine/a.py", "from random import choice", f"statemachine {PURE}"),
        ("statemachine/a.py", "def f():\n    import threading", f"statemachine {PURE}"),
        ("statemachine/a.py", "import asyncio.events", f"statemachine {PURE}"),
        ("statemachine/view.py", "import socket", f"statemachine {PURE}"),
        (
            "statemachine/a.py",
            "import transitions",
            "transitions may be imported only in statemachine/view.py",
        ),
        ("statemachine/a.py", "import kvpoll.cli", "statemachine may import only spec, statemachine"),
        ("sim/a.py", "from kvpoll.runtime.tcp import x", "sim may import only sim, spec, statemachine"),
        (
            "sim/a.py",
            "importlib.import_module('kvpoll.runtime')",
            "sim may import only sim, spec, statemachine",
        ),
        ("sim/a.py", "from kvpoll.reports import draw", "sim may import only sim, spec, statemachine"),
        ("sim/a.py", "from kvpoll import cli", "sim may import only sim, spec, statemachine"),
        ("sim/a.py", "import rich.progress", "rich may be imported only in src/kvpoll/**"),
        ("sim/world.py", "from transitions import Machine", "transitions may be imported only in"),
        (
            "runtime/a.py",
            "if TYPE_CHECKING:\n    from kvpoll.sim import w",
            "runtime may import only runtime",
        ),
        ("runtime/a.py", "import simpy", "simpy may be imported only in sim/**"),
        ("reports/a.py", "import kvpoll.cli", "reports may import only"),
        ("src/kvpoll/cli.py", "import matplotlib.pyplot", "matplotlib may be imported only in reports/**"),
        ("src/kvpoll/cli.py", "import hypothesis", "hypothesis may be imported only in tests"),
    ],
)
def test_a_bad_arrow_is_named(path: str, text: str, complaint: str) -> None:
    [found] = bad_arrows(PurePosixPath(path), text)
    assert found.startswith(f"{path}:") and complaint in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("spec/a.py", "import json\nfrom kvpoll.spec.trace import read_trace\nfrom . import vocabulary"),
        ("statemachine/a.py", "from ..spec import trace\nfrom kvpoll.statemachine import lease"),
        ("statemachine/view.py", "from transitions.extensions import GraphMachine"),
        ("sim/world.py", "import random\nimport simpy\nfrom kvpoll import spec, statemachine"),
        ("sim/bench_step.py", "import transitions\nimport statemachine"),
        ("runtime/a.py", "import threading, zmq, torch\nfrom .. import statemachine"),
        ("reports/a.py", "import matplotlib\nfrom kvpoll.sim import workload"),
        (
            "src/kvpoll/bench.py",
            "import transitions, rich\nfrom statemachine import State\nfrom . import cli",
        ),
    ],
)
def test_a_good_arrow_is_left_alone(path: str, text: str) -> None:
    assert bad_arrows(PurePosixPath(path), text) == []


def test_a_long_function_is_named_with_its_length() -> None:
    text = "class Rank:\n    async def drain(self):\n" + "        pass\n" * 70
    assert long_functions(PurePosixPath("sim/a.py"), text) == ["sim/a.py:2: drain has 71 lines, over 70"]
    assert long_functions(PurePosixPath("sim/a.py"), "def f():\n" + "    pass\n" * 69) == []


def test_a_long_file_is_named_with_its_length() -> None:
    assert long_file(PurePosixPath("sim/a.py"), "pass\n" * 701) == ["sim/a.py: 701 lines, over 700"]
    assert long_file(PurePosixPath("sim/a.py"), "pass\n" * 700) == []


@pytest.mark.parametrize("marker", MARKERS)
def test_a_leftover_marker_is_named(marker: str) -> None:
    text = f"pass\nraise Error  # {marker}: later\n"
    assert leftover_markers(PurePosixPath("sim/a.py"), text) == [f"sim/a.py:2: leftover {marker}"]
    assert leftover_markers(PurePosixPath("sim/a.py"), f"{marker}S = 1\n") == []


@pytest.mark.parametrize("path", ["sim/utils.py", "runtime/common/tcp.py", "tests/cover/helpers.py", "spec/base.py"])
def test_an_empty_name_is_named(path: str) -> None:
    assert len(empty_name(PurePosixPath(path), "")) == 1
    assert empty_name(PurePosixPath("sim/baseline.py"), "") == []


@pytest.mark.parametrize("text", ["", "import json\n", '"""   """\n', "# a comment is not a docstring\n"])
def test_a_missing_docstring_is_named(text: str) -> None:
    assert missing_docstring(PurePosixPath("sim/a.py"), text) == ["sim/a.py: no module docstring"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("def test_a():\n    run()\n", "a.py: asserts nothing"),
        ("def test_a():\n    assert True\n", "a.py: asserts nothing"),
        ("def test_a():\n    assert f()\ndef test_b():\n    f()\n", "a.py:3: test_b asserts nothing"),
        (
            "class TestA:\n    async def test_a(self):\n        with open(x):\n            f()\nassert x\n",
            "a.py:2: test_a asserts nothing",
        ),
    ],
)
def test_a_toothless_test_is_named(text: str, complaint: str) -> None:
    assert toothless_tests(PurePosixPath("a.py"), text) == [complaint]


@pytest.mark.parametrize(
    "body",
    ["assert f() == 1", "with pytest.raises(ValueError):\n        f()", "pytest.fail('no')", "judge(f())"],
)
def test_a_test_with_teeth_is_left_alone(body: str) -> None:
    text = f"def judge(x):\n    assert x == 1\n\ndef test_a():\n    {body}\n"
    assert toothless_tests(PurePosixPath("a.py"), text) == []


def test_a_bad_room_link_is_named(tmp_path: Path) -> None:
    package = tmp_path / "src" / "kvpoll"
    package.mkdir(parents=True)
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (package / room).symlink_to(f"../../{room}")
    assert bad_room_links(tmp_path) == []

    (package / "sim").unlink()
    (package / "sim").mkdir()
    (package / "spec").unlink()
    (package / "spec").symlink_to(tmp_path / "spec")
    (package / "cellar").symlink_to("../../sim")
    assert bad_room_links(tmp_path) == [
        f"src/kvpoll/spec points to {tmp_path}/spec, not to ../../spec",
        "src/kvpoll/sim is not a symbolic link",
        "src/kvpoll/cellar is a link to no room",
    ]


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "two words.md").touch()
    page = tmp_path / "docs" / "page.md"
    good = '[a](two%20words.md#x "title") [b](#here) [c](https://example.org/x) [d](/docs/page.md) `[e](gone)`\n'
    page.write_text(good + "```\n[f](gone)\n```\n", encoding="utf-8")
    assert broken_links(tmp_path, page) == []

    bad = '[a](gone.md#x)\n![b](<gone.png>)\n<img src="../gone.svg">\n\n[c]: gone.txt\n'
    page.write_text(bad, encoding="utf-8")
    gone = ["gone.md#x", "gone.png", "gone.txt", "../gone.svg"]
    assert broken_links(tmp_path, page) == [f"docs/page.md: links to {x}, which does not exist" for x in gone]


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of a wheel built from a copy: building in place leaves build/, whose old files hide new gaps."""
    copy, out = tmp_path_factory.mktemp("house") / "kvpoll", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOUSE / name, copy)
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in (*ROOMS, "src"):
        shutil.copytree(HOUSE / folder, copy / folder, symlinks=True, ignore=leave)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    built = subprocess.run([*pip, *options, str(copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = out.glob("kvpoll-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def packaged(path: Path) -> str:
    """Where a file of the house lies in the wheel."""
    inside = path.relative_to(HOUSE)
    return (inside.relative_to("src") if inside.parts[0] == "src" else Path("kvpoll") / inside).as_posix()


def test_the_wheel_holds_every_module(wheel_names: set[str]) -> None:
    """setuptools must follow the room links, and every folder with code needs an __init__.py."""
    assert {packaged(HOUSE / path) for path in SOURCES} - wheel_names == set()
    assert "kvpoll/statemachine/__init__.py" in wheel_names
    assert "kvpoll/py.typed" in wheel_names


@pytest.mark.parametrize("room", ["spec", "sim"])
def test_the_wheel_holds_every_data_file(wheel_names: set[str], room: str) -> None:
    """The table, the scenarios and the workloads are read from beside the code that reads them."""
    suffixes = {".toml", ".tla", ".cfg"}
    data = {packaged(path) for path in (HOUSE / room).rglob("*") if path.suffix in suffixes}
    assert data - wheel_names == set()


def test_the_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    strangers = {name for name in wheel_names if not name.startswith(("kvpoll/", "kvpoll-"))}
    assert strangers == set()
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_names)
