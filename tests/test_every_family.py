"""The script that tries every type of model: what it calls right, and its page."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import Recipe
from tests.models import save_tiny, tiny_llama

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
IDS = torch.arange(4, 100).view(4, 24)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("families")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(tiny_llama(), None, tmp_path / "dense")


def fault(families: Any, source: Path, result: sparsellm.PruneResult, changed: Path) -> str:
    model, *info = families.read(source)
    found: str = families.faults(result, changed, source, info, families.logits(model, IDS), IDS)
    return found


def test_what_is_wrong_with_a_run_is_seen(families: Any, source: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="magnitude", sparsity=0.0, samples=4, seq_len=24)
    result = sparsellm.prune(source, recipe, out=tmp_path / "out", calibration=IDS)
    assert fault(families, source, result, tmp_path / "out") == ""

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert fault(families, source, result, save_tiny(model, None, tmp_path / "other")) == "other logits at sparsity 0"
    del model.model.layers[1].mlp.down_proj
    assert "other names" in fault(families, source, result, save_tiny(model, None, tmp_path / "less"))

    result.recipe = recipe.updated(sparsity=0.5)
    assert "without a word" in fault(families, source, result, tmp_path / "out")
    result.warnings.append("sparsity 0.00% was reached, 50.00% was requested")
    assert "in what was pruned" in fault(families, source, result, tmp_path / "out")


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
