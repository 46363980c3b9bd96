"""Model files (``spec/models/*.toml``): small clusters whose every behaviour is explored.

A model names its kind; the module of that kind reads the rest of the file and builds the system of cells and moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import kvpoll.spec
from kvpoll.sim.explorer.system import System
from kvpoll.spec.protocol import Profile, Protocol
from kvpoll.spec.source import BadInput, Source, nearest

MODELS: Final = Path(str(kvpoll.spec.__path__[0])) / "models"
KINDS: Final = ("transfer", "pipeline", "group", "rendezvous")
"""Each is a module of this package, with ``read(source)`` and ``build(model, protocol, profile)``."""


@dataclass(frozen=True)
class ModelFile:
    """One checked model file. ``digest`` identifies its text.

    exercises: rules whose value matters in this model. sometimes: marks that `reference` must witness, besides one
    for each kind of fault in its budget. checked: TLC can count its states in a reasonable time.
    """

    name: str
    path: str
    digest: str
    title: str
    story: str
    kind: str
    module: str
    exercises: tuple[str, ...]
    sometimes: tuple[str, ...]
    checked: bool
    faults: Mapping[str, int]
    content: Any

    def build(self, protocol: Protocol, profile: Profile) -> System:
        """The system of this model under a profile."""
        system: System = _kind(self.kind).build(self.content, protocol, profile)
        return system

    @property
    def is_shipped(self) -> bool:
        """Does it come with kvpoll, so that its name is enough?"""
        return Path(self.path).parent == MODELS

    @property
    def marks(self) -> frozenset[str]:
        """What must be witnessed, so that nothing holds because nothing happened."""
        kinds = {f"fault {kind}" for kind, count in self.faults.items() if count and kind != "total"}
        return frozenset(kinds | set(self.sometimes))


def names_available() -> list[str]:
    """The models that come with kvpoll."""
    return sorted(path.stem for path in MODELS.glob("*.toml"))


def find(name: str) -> Path:
    """The path of a model given as a path or by name. Raises BadInput."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    names = names_available()
    if name not in names:
        raise BadInput(f"unknown model {name!r}{nearest(name, names)}")
    return MODELS / f"{name}.toml"


def load_model(name: str, protocol: Protocol) -> ModelFile:
    """Read and check a model file. Raises BadInput naming file and line."""
    path = find(name)
    return parse_model(Source(path), protocol, path.stem)


FAULTS_MOST: Final = 9
"""Most faults of one kind; every fault moves a model towards sizes that no search can finish."""

HEAD: Final = {
    "title": str, "story": str, "kind": str, "exercises": list, "sometimes": list, "checked": bool,
}  # fmt: skip


def parse_model(source: Source, protocol: Protocol, name: str) -> ModelFile:
    """Check a parsed model. Raises BadInput."""
    head = source.data.get("model")
    if not isinstance(head, dict):
        raise source.error(("model",), "a model file begins with a [model] section")
    source.require_all(("model",), head, ("title", "kind"), "a model")
    for key, form in HEAD.items():
        if key in head:
            _require(source, key, head[key], form)
    if head["kind"] not in KINDS:
        raise source.error(("model", "kind"), f"unknown kind {head['kind']!r}{nearest(head['kind'], KINDS)}")
    source.require_known(("model", "exercises"), head.get("exercises", ()), protocol.rules, "rule")
    content = _kind(head["kind"]).read(name, source)
    return ModelFile(
        name=name,
        path=source.name,
        digest=hashlib.sha256(source.text.encode()).hexdigest()[:12],
        title=head["title"],
        story=head.get("story", "").strip(),
        kind=head["kind"],
        module=head["kind"].capitalize(),
        exercises=tuple(head.get("exercises", ())),
        sometimes=tuple(head.get("sometimes", ())),
        checked=head.get("checked", False),
        faults=content.faults,
        content=content,
    )


def _require(source: Source, key: str, value: Any, form: type) -> None:
    if form is bool:
        if not isinstance(value, bool):
            raise source.error(("model", key), f"`{key}` must be true or false, got {value!r}")
        return
    source.require_form(("model", key), key, value, form)


def read_faults(source: Source, known: tuple[str, ...]) -> dict[str, int]:
    """The [faults] section: how many of each kind at most, and in "total"."""
    entry = source.data.get("faults", {})
    source.require_form(("faults",), "faults", entry, dict)
    source.require_known(("faults",), entry, (*known, "total"), "fault")
    for kind, count in entry.items():
        if type(count) is not int or not 0 <= count <= FAULTS_MOST:
            raise source.error(
                ("faults", kind), f"`{kind}` must be a whole number from 0 to {FAULTS_MOST}, got {count!r}"
            )
    return dict(entry)


def _kind(kind: str) -> Any:
    return import_module(f"kvpoll.sim.explorer.{kind}")
