"""SGLang 0.5.23's own rank mapping and head slices, held against ours.

Set ``KVPOLL_SGLANG_PYTHON`` as for test_sglang_candidates.py; without it everything here skips. The scripts in
``sglang_mapping/`` run in a process of that interpreter and answer a list of questions with a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kvpoll.runtime.pools.layout import Layout
from kvpoll.runtime.pools.plan import share
from kvpoll.statemachine.mapping import Sizes, map_ranks

HERE = Path(__file__).parent
SCRIPTS = HERE / "sglang_mapping"
PACKAGE_ON_CPU = HERE / "sglang_witness"  # engine_on_cpu.py: what a launcher would have set
TOPOLOGIES: list[dict[str, Any]] = tomllib.loads((SCRIPTS / "topologies.toml").read_text())["topology"]
LIMIT_S = 240.0
FLAGS = ("mla", "hybrid_mla", "kv_sharding", "all_cp_ranks")

pytestmark = pytest.mark.slow


def run(python: str, *arguments: str, questions: object = None) -> subprocess.CompletedProcess[str]:
    """One process of SGLang's interpreter, with the questions on its standard input."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ON_CPU), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [python, *arguments], env=environment, input=json.dumps(questions), capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip


def answers(python: str, script: str, questions: list[dict[str, Any]], *arguments: str) -> list[Any]:
    told = run(python, str(SCRIPTS / script), *arguments, questions=questions)
    assert told.returncode == 0, told.stderr[-4000:]
    found = json.loads(told.stdout.splitlines()[-1])
    assert len(found) == len(questions)
    return found


def pinned(topology: dict[str, Any]) -> dict[str, Any]:
    """What the table says SGLang answers."""
    return {
        "tp_ranks": topology["tp_ranks"],
        "cp_ranks": topology.get("cp_ranks", [0]),
        "pp_ranks": topology.get("pp_ranks", [0]),
        "destinations": topology["destinations"],
        "responses": topology["responses"],
        "dummies": topology.get("dummies", False),
    }


def ours(question: dict[str, Any]) -> dict[str, Any]:
    flags = {name: question.get(name, False) for name in FLAGS}
    try:
        mapping = map_ranks(Sizes(**question["prefill"]), Sizes(**question["decode"]), *question["rank"], **flags)
    except ValueError:
        return {"refused": True}
    tp_ranks, cp_ranks, pp_ranks, destinations, responses, dummies = mapping
    return {
        "tp_ranks": list(tp_ranks),
        "cp_ranks": list(cp_ranks),
        "pp_ranks": list(pp_ranks),
        "destinations": destinations,
        "responses": responses,
        "dummies": dummies,
    }


def test_the_table_is_what_real_decode_managers_answer(sglang_python: str) -> None:
    """Each of the 18 managers is constructed for real, with that topology's sizes."""
    found = answers(sglang_python, "resolve.py", TOPOLOGIES, "construct")
    assert {each["name"]: answer for each, answer in zip(TOPOLOGIES, found, strict=True)} == {
        each["name"]: pinned(each) for each in TOPOLOGIES
    }


def every_topology() -> list[dict[str, Any]]:
    """All ranks of all decode engines for TP up to 8, CP and PP up to 4, with every combination of flags."""
    questions = []
    for ptp, dtp, cp, pp, *flags in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (1, 2, 3), *[(False, True)] * 4):
        for dpp in {1, pp, 2}:
            for tp, stage in product(range(dtp), range(dpp)):
                sizes = {"prefill": {"tp": ptp, "cp": cp, "pp": pp}, "decode": {"tp": dtp, "pp": dpp}}
                questions.append({**sizes, "rank": [tp, stage], **dict(zip(FLAGS, flags, strict=True))})
    return questions


def test_every_rank_of_every_topology_is_mapped_or_refused_alike(sglang_python: str) -> None:
    questions = every_topology()
    found = answers(sglang_python, "resolve.py", questions)
    different = [
        (question, theirs) for question, theirs in zip(questions, found, strict=True) if ours(question) != theirs
    ]
    assert different == []
    assert {"refused": True} in found and len(questions) > 20_000


def every_pair() -> list[list[int]]:
    """Each prefill rank with each decode rank that contacts it, for TP up to 16 and up to 16 KV heads."""
    questions = []
    for ptp, dtp, heads in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        for rank in range(dtp):
            contacted = map_ranks(Sizes(tp=ptp), Sizes(tp=dtp), rank).tp_ranks
            questions += [[ptp, dtp, source, rank, heads] for source in contacted]
    return questions


def test_each_pair_of_ranks_shares_the_heads_that_sglang_slices(sglang_python: str) -> None:
    """Ours differ in one thing only: copies of one head divide the tokens of a page, so that each byte has one writer."""
    questions = every_pair()
    page_tokens = 16
    for question, theirs in zip(questions, answers(sglang_python, "slices.py", questions), strict=True):
        ptp, dtp, source, target, heads = question
        part = share(
            Layout((0,), 1, page_tokens, heads, 8, tp_size=ptp, tp_rank=source),
            Layout((0,), 1, page_tokens, heads, 8, tp_size=dtp, tp_rank=target),
        )
        assert part is not None, question
        assert [part.source_head, part.heads, part.target_head] == theirs, question
        copies_of_head = max(1, ptp // max(heads, dtp))
        assert part.tokens == page_tokens // copies_of_head, question
