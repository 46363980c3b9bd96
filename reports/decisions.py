"""What the explorer says of each option in docs/decisions: run `python -m kvpoll.reports.decisions`.

The options are rules switched in `reference`, one row of a table each. The tables stand between two marks in the
decision pages, and a test says when a row is no longer true.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from kvpoll.sim.explorer.explore import Limits, explore
from kvpoll.sim.explorer.model import load_model
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.protocol import Protocol, load

PAGES: Final = Path(__file__).resolve().parent.parent / "docs" / "decisions"
BEGIN: Final = "<!-- options: written by python -m kvpoll.reports.decisions -->"
END: Final = "<!-- end of options -->"


class Option(NamedTuple):
    """One way to decide: the rules that differ from `reference`, and what people call it."""

    name: str
    rules: dict[str, str]


class Question(NamedTuple):
    """A decision page: its models and its options. The first option is the choice of `reference`."""

    page: str
    models: tuple[str, ...]
    options: tuple[Option, ...]


WAITS: Final = {"router_join": "waits_for_both"}
"""While the router tells the other side of every failure, it hides whether the protocol would have."""

QUESTIONS: Final = (
    Question(
        "0002-completion-and-failure-delivery.md",
        ("notices",),
        (
            Option("told at once, and again when the link is back; the router cancels the other leg", {}),
            Option("the same, but the router waits for both legs", WAITS),
            Option("and told only once", {**WAITS, "resend_on_reconnect": "no"}),
            Option(
                "and prefill keeps its aborts to itself", {**WAITS, "prefill_failure_notice": "transfer_errors_only"}
            ),
            Option("and an abort before its room is forgotten", {**WAITS, "early_abort": "forgotten"}),
            Option("and decode tells only whom it has found", {**WAITS, "decode_failure_notice": "known_ranks"}),
        ),
    ),
    Question(
        "0003-abort-and-quiescence.md",
        ("late-write",),
        (
            Option("on proof only", {}),
            Option(
                "destination pages on proof or after a timeout", {"release_requires_quiescence": "proof_or_timeout"}
            ),
            Option("destination pages at once", {"release_requires_quiescence": "never"}),
            Option("source pages at once", {"source_release": "at_once"}),
        ),
    ),
    Question(
        "0004-room-generation.md",
        ("shared-room", "peer-restart"),
        (
            Option("(room, attempt, epoch), a tombstone, one owner", {}),
            Option("the room number", {"identity": "room"}),
            Option("no tombstone", {"clear_leaves": "nothing"}),
            Option("two owners share a room", {"duplicate_room": "shared"}),
            Option(
                "as SGLang: all three",
                {"identity": "room", "clear_leaves": "nothing", "duplicate_room": "shared"},
            ),
        ),
    ),
)


def row(protocol: Protocol, model_name: str, option: Option) -> str:
    """What the explorer says of one option on one model, as a row of Markdown."""
    model = load_model(model_name, protocol)
    profile = protocol.profile("reference").with_rules(option.rules)
    report = explore(model, protocol, profile, option.rules, limits=Limits(memory_bytes=6 << 30, liveness=True))
    order = [name for name in INVARIANTS if name in report.broken]
    broken = ", ".join(f"{name} ({report.broken[name].depth})" for name in order) or "none"
    rules = ", ".join(f"`{name} = {value}`" for name, value in option.rules.items()) or "`reference`"
    return f"| {option.name} | {rules} | {model_name} | {report.safety.states:,} | {broken} |"


def table(protocol: Protocol, question: Question) -> str:
    """The table of one page."""
    lines = [
        "| option | rules | model | states | invariants broken (moves of the shortest trace) |",
        "|---|---|---|---:|---|",
    ]
    lines += [row(protocol, model, option) for option in question.options for model in question.models]
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """A page with its table replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the page has no place for the table: put {BEGIN!r} and {END!r} into it"
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(argv: Sequence[str]) -> int:
    """Rewrite the tables of all pages, or of those whose number is given."""
    protocol = load()
    for question in QUESTIONS:
        if argv and question.page[:4] not in argv:
            continue
        print(question.page, flush=True)
        place = PAGES / question.page
        place.write_text(with_table(place.read_text(encoding="utf-8"), table(protocol, question)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
