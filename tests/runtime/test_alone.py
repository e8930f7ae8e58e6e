"""A packed model with sparsepack alone, in a process of its own; and files of format version 2."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsepack
from by_hand import version_2
from extension import child
from sparsepack.module import PackedLinear

ALONE = """
import sys
sys.modules["sparsellm"] = None  # importing it is an error from here on
from transformers import AutoModelForCausalLM, AutoTokenizer
for options in ({}, {"ignore_mismatched_sizes": True}):
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
    except Exception as error:
        assert "import sparsepack before" in str(error), error
    else:
        sys.exit("loaded with random weights")
import sparsepack
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
loaded = sparsepack.load(sys.argv[1])
written = sparsepack.generate(loaded, AutoTokenizer.from_pretrained(sys.argv[1]), "The", max_new_tokens=3)
assert written.new_tokens == 3
assert sparsepack.compare(sys.argv[1], prompt_tokens=3, new_tokens=1, repeats=1).verdict
"""


def test_it_runs_without_sparsellm_and_not_without_sparsepack(packed: Path) -> None:
    done = child(ALONE, str(packed))
    assert done.returncode == 0, done.stderr


def test_version_2_by_another_writer_is_read(llama: Path, tmp_path: Path) -> None:
    """It has offsets of dense weights, no exponents, and no checksum file here."""
    names = [f"model.layers.0.mlp.{kind}_proj" for kind in ("up", "gate", "down")]
    tensors, config = version_2(load_file(llama / "model.safetensors"), names)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    written = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**written, "quantization_config": config})
    )
    packed = sparsepack.load(tmp_path, activations="fp32")
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 3
    plain = AutoModelForCausalLM.from_pretrained(llama)
    scales = tensors[f"{names[0]}.weight_scales"]
    with torch.no_grad():
        up = plain.get_submodule(names[0]).weight
        up.copy_((up / scales[:, None]).round() * scales[:, None])
        ids = torch.arange(20).view(1, -1)
        assert torch.equal(sparsepack.unpack(packed.get_submodule(names[0]).packed), up)
        assert torch.allclose(packed(ids).logits, plain(ids).logits, atol=1e-4)
