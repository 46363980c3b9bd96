"""What several of these tests need: an interpreter that has SGLang itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

VERSION = "0.5.23"
WITNESSES = Path(__file__).parent / "sglang_witness"
ASK = "import importlib.metadata as m; print(m.version('sglang')); import engine_on_cpu"
LIMIT_S = 120


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """An interpreter that can import SGLang's prefill/decode classes; skips with the reason where there is none."""
    python = os.environ.get("KVPOLL_SGLANG_PYTHON")
    if not python:
        pytest.skip("KVPOLL_SGLANG_PYTHON does not name an interpreter with sglang " + VERSION)
    environment = {**os.environ, "PYTHONPATH": str(WITNESSES), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        asked = subprocess.run(
            [python, "-c", ASK], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except OSError as error:
        pytest.skip(f"KVPOLL_SGLANG_PYTHON={python} does not run: {error}")
    found = asked.stdout.strip()
    if found and found != VERSION:
        pytest.skip(f"{python} has sglang {found}; what is told here is of {VERSION}")
    if asked.returncode:
        pytest.skip(f"{python} cannot import sglang {VERSION}: {asked.stderr.strip().splitlines()[-1]}")
    return python
