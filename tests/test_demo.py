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
    command = [sys.executable, "-m", "sparsellm", "demo", "--out", str(tmp_path), "--json"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert report["sparsity_reached"] == pytest.approx(0.5, abs=1e-4)
    evaluation, speeds = report["evaluation"], report["speeds"]
    assert 5 < evaluation["against"]["perplexity"]["value"] < evaluation["perplexity"]["value"] < 100
    assert 0 < evaluation["against"]["kl"] < 1.5
    assert 0.4 < evaluation["against"]["agreement"] < 1
    assert speeds["packed_disk_bytes"] < 0.75 * speeds["dense_disk_bytes"]
    assert speeds["packed_bytes"] < 0.75 * speeds["dense_bytes"]
    assert report["continuations"]["dense"] != report["continuations"]["pruned"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    weights = [getattr(block.mlp, name).weight for block in model.model.layers for name in ("gate_proj", "up_proj")]
    assert all(0.3 < (weight == 0).float().mean() < 0.7 for weight in weights)
    dense = AutoModelForCausalLM.from_pretrained(report["dense_path"])
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
