"""The committed matrix: is it of this spec and these models, does `reference` have no broken cell, do its rows repeat?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpoll.reports import matrix as page
from kvpoll.reports.decisions import BEGIN, END, PAGES, QUESTIONS, row
from kvpoll.sim.explorer.matrix import judge
from kvpoll.sim.explorer.model import load_model, names_available
from kvpoll.spec.protocol import load

PROTOCOL = load()
REPORTS = Path(__file__).resolve().parents[2] / "reports"
DATA = json.loads((REPORTS / "matrix.json").read_text(encoding="utf-8"))


def verdicts(**fields: str) -> list[dict[str, Any]]:
    return [each for each in DATA["verdicts"] if all(each[name] == value for name, value in fields.items())]


def test_the_matrix_is_of_this_spec_and_of_all_models_and_profiles() -> None:
    """When it is not: `kvpoll matrix --max-states 1500000 --out reports`."""
    assert DATA["spec"] == PROTOCOL.digest
    digests = {name: load_model(name, PROTOCOL).digest for name in names_available()}
    assert {each["model"]: each["digest"] for each in DATA["verdicts"]} == digests
    assert {(each["model"], each["profile"]) for each in DATA["verdicts"]} == {
        (model, profile) for model in digests for profile in PROTOCOL.profiles
    }


def test_reference_has_no_broken_cell() -> None:
    for each in verdicts(profile="reference"):
        assert each["complete"]
        assert (each["model"], each["broken"], each["unwitnessed"]) == (each["model"], {}, [])


def test_every_counterexample_replayed_in_the_simulator() -> None:
    broken = [found for each in DATA["verdicts"] for found in each["broken"].values()]
    assert broken
    assert all(found["replays"] for found in broken)


@pytest.mark.parametrize(
    ("model", "profile"), [("notices", "sglang-0.5.23"), ("one-room-small", "before-sglang-24772")]
)
def test_a_verdict_repeats(model: str, profile: str) -> None:
    (told,) = verdicts(model=model, profile=profile)
    again = judge(profile, model)
    assert again.states == told["states"]
    assert {name: found.length for name, found in again.broken.items()} == {
        name: found["length"] for name, found in told["broken"].items()
    }


def test_the_page_shows_every_candidate_and_a_picture_for_every_broken_cell() -> None:
    text = (REPORTS / "matrix.md").read_text(encoding="utf-8")
    for entry in page.candidates(PROTOCOL):
        assert f"### {entry['id']}: {entry['title']} (" in text
        assert entry["advice"].strip() in text
    assert "(open)" not in text
    pictures = {part.split(")")[0] for part in text.split("](")[1:]}
    assert pictures
    assert all((REPORTS / picture).is_file() for picture in pictures)
    assert {path.stem for path in (REPORTS / page.PICTURES).glob("*.toml")} == {Path(each).stem for each in pictures}


@pytest.mark.parametrize("question", QUESTIONS[:1], ids=lambda question: question.page)
def test_the_options_of_a_decision_page_are_true(question: Any) -> None:
    """The cheap page in full; the others are written by the same function from the same rules."""
    table = (PAGES / question.page).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    for option in question.options:
        for model in question.models:
            assert row(PROTOCOL, model, option) in table
