"""The script that tries every type of model: what it calls right, and its page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsellm

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_script_tries_types_of_every_kind_and_writes_a_page(tmp_path: Path) -> None:
    """One that is right, one with linears that no token reaches, one with convolutions, and two that are refused."""
    wanted = {
        "gpt_neox": "right",
        "marian": "right",
        "mamba2": "right, some dense",
        "cpmant": "in part",
        "xlm": "refused",
    }
    page = tmp_path / "families.md"
    command = [sys.executable, str(SCRIPTS / "families.py"), "--out", str(page), "--types", *wanted]
    paths = os.pathsep.join([str(Path(sparsellm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert {row[0].removeprefix("| "): row[1] for row in rows} == wanted
    assert "5 types built with transformers" in page.read_text(encoding="utf-8")
