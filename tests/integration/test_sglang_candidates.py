"""What the unmodified SGLang 0.5.23 does in the situations of candidates C1, C2, C3, C4 and C7 (reports/candidates.toml).

Set ``KVPOLL_SGLANG_PYTHON`` to the interpreter of an environment in which sglang 0.5.23 is installed; a CPU build of
torch will do, and no transport is needed. Without it, or where the classes cannot be imported, everything here skips.
Each script in ``sglang_witness/`` runs in a process of its own and prints one line of JSON: what it saw.

A test that fails may mean that SGLang was mended: then the verdict in candidates.toml wants a new date.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

WITNESSES = Path(__file__).parent / "sglang_witness"
LIMIT_S = 120.0

pytestmark = pytest.mark.slow


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One process that finds the witnesses' own module and the interpreter's packages, and nothing else of ours."""
    environment = {**os.environ, "PYTHONPATH": str(WITNESSES), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [python, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def seen(python: str, script: str) -> dict[str, Any]:
    """What a witness saw."""
    told = run(python, str(WITNESSES / script))
    assert told.returncode == 0, told.stderr[-4000:]
    line = json.loads(told.stdout.splitlines()[-1])
    assert line["candidate"] == script[:2].upper()
    return line["seen"]


def test_c1_a_repeated_put_makes_an_engine_ready_with_a_rank_missing(sglang_python: str) -> None:
    answer = seen(sglang_python, "c1_counted_puts.py")
    reason = answer.pop("reason")
    assert answer == {"puts_of_rank_0": 2, "engine": 200, "rank_0": 200, "rank_1": 404, "request": "Failed"}
    assert "Could not fetch bootstrap info" in reason and "target_tp_rank: 1" in reason


def test_c2_a_worker_overwrites_failed_and_revives_a_cleared_room(sglang_python: str) -> None:
    assert seen(sglang_python, "c2_unlocked_status.py") == {
        "written": ["worker reads WaitingForInput", "other Failed", "worker Success"],
        "prefill": "Success",
        "prefill_sender": "Success",
        "decode_receiver": "Failed",
        "cleared_room_is_back_as": "Success",
        "next_request_of_that_room": "Success",
    }


def test_c3_room_zero_and_a_lost_metadata_write_wait_without_a_timer(sglang_python: str) -> None:
    """``never_sent`` shows that the timer is alive, ``common`` that the gate opens."""
    answer = seen(sglang_python, "c3_room_zero.py")
    assert answer["waited_s"] > 2 * answer["timeout_s"] > 0
    assert answer["handed_on"] == ["common"]
    assert answer["failed"] == ["never_sent"]
    assert answer["kept"] == {"room_zero": "Success", "metadata_lost": "Success"}
    assert answer["kept_after_clients_abort"] == ["metadata_lost"]


def test_c4_cleanup_of_a_node_drops_the_endpoints_of_every_address_that_it_begins(sglang_python: str) -> None:
    answer = seen(sglang_python, "c4_prefix_cleanup.py")
    key = f"{answer['healthy']}_0_0_0"
    assert answer["healthy"].startswith(answer["lost"]) and answer["healthy"] != answer["lost"]
    assert answer["quiet"] == {
        "unrelated_address": {"dropped": [], "kept": [key]},
        "prefix_address": {"dropped": [key], "kept": []},
        "request_of_lost_node": "Failed",
        "healthy_after_cleanup": "WaitingForInput",
        "healthy_at_the_end": "Success",
    }
    assert answer["sending"] == {"sending_healthy": "Failed", "reason": "send_metadata to prefill ENDPOINT failed"}
    waits = {"prefill": "WaitingForInput", "decode": "WaitingForInput"}
    assert answer["registering"] == {"prefill_worker_died": True, **waits}


def test_c7_a_decision_fails_the_wrong_request_and_an_empty_stage_leaves_a_list_unread(sglang_python: str) -> None:
    assert seen(sglang_python, "c7_positional_decisions.py") == {
        "admitted": [["a", "b"], ["a"]],
        "admitted_then": [[], []],
        "failed": [["c"], ["b"]],
        "left": [[], ["c"]],
        "lists_unread_by_an_empty_stage": 1,
    }
