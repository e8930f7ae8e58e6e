"""The demo on the real model, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.mark.slow
def test_the_demo_prunes_measures_and_saves_a_model_that_plain_transformers_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsellm", "demo", "--out", str(tmp_path / "pruned"), "--json"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert report["sparsity_reached"] == pytest.approx(0.7, abs=1e-4)
    assert 5 < report["perplexity"]["dense"] < report["perplexity"]["pruned"] < 1000
    assert report["continuations"]["dense"] != report["continuations"]["pruned"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for block in model.model.layers:
        weight = block.mlp.up_proj.weight
        assert int((weight == 0).sum()) == round(0.7 * weight.numel())
    dense = AutoModelForCausalLM.from_pretrained(report["dense_path"])
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
