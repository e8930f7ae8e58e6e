"""compressed-tensors: what transformers loads has the logits of the checkpoint, to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompressedTensorsConfig

import sparsellm
from sparsellm.errors import MissingExtraError, ModelError, StorageError
from sparsellm.files.reader import CheckpointReader
from tests.exports.checkpoints import family, logits, mixtral, pruned, wide_llama
from tests.models import tiny_gpt2
from tests.report.pages import EVALUATION, write_results

MODELS = {
    "llama": wide_llama,
    "fp32": lambda: wide_llama().float(),
    "fp16": lambda: wide_llama().half(),
    "tied": lambda: wide_llama(tie_word_embeddings=True),
    "phi3": lambda: family("Phi3"),  # q, k and v in one linear, gate and up in another
    "mixtral": mixtral,
    "qwen2moe": lambda: family(
        "Qwen2Moe", moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
}


def exported(directory: Path) -> Path:
    out = directory.with_name("out")
    sparsellm.export(directory, to="compressed-tensors", out=out)
    return out


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *((name, "w4a16-32") for name in MODELS),
        ("llama", "w8a16"),
        ("mixtral", "w8a16"),
    ],
)
def test_the_logits_are_those_of_the_checkpoint(
    tmp_path: Path, name: str, grid: str
) -> None:
    directory = pruned(MODELS[name](), tmp_path, grid)
    assert torch.equal(logits(exported(directory)), logits(directory))


def test_a_mixture_with_experts_in_two_forms_is_refused(tmp_path: Path) -> None:
    """transformers stacks the experts of a mixture, and would fill one that it does not find at random."""
    with pytest.raises(
        ModelError,
        match=r"experts\.1\.\S+ was not pruned, and transformers loads only mixtures",
    ):
        exported(pruned(mixtral(), tmp_path, "w4a16-32", exclude=["*.experts.1.*"]))


def test_three_bits_cross_the_words_in_which_they_are(tmp_path: Path) -> None:
    directory = pruned(
        wide_llama(hidden_size=128, intermediate_size=256, head_dim=32),
        tmp_path,
        "w3a16",
        effort=1,
    )
    assert torch.equal(logits(exported(directory)), logits(directory))


def test_int8_activations_are_left_to_the_loader(tmp_path: Path) -> None:
    directory = pruned(wide_llama(), tmp_path, "w8a8")
    write_results(directory, EVALUATION)
    out = exported(directory)
    # it was measured without
    assert "No result holds for these files." in (out / "README.md").read_text()
    scheme = config_of(out)["config_groups"]["group_0"]
    assert (
        scheme["input_activations"]["strategy"],
        scheme["input_activations"]["dynamic"],
    ) == ("token", True)
    assert (
        CheckpointReader(out).dtype("model.layers.0.mlp.up_proj.weight") == torch.int8
    )
    assert torch.equal(
        logits(out, quantization_config=CompressedTensorsConfig(dequantize=True)),
        logits(directory),
    )


def test_what_is_dense_stays_so_and_is_named(tmp_path: Path) -> None:
    directory = pruned(mixtral(), tmp_path, "q4_0", exclude=["*.v_proj"])
    out = exported(directory)
    config, parts = (
        config_of(out),
        ("mlp.gate", "block_sparse_moe.gate", "self_attn.v_proj"),
    )
    dense = {f"model.layers.{i}.{part}" for i in (0, 1) for part in parts}
    assert set(config["ignore"]) == {"lm_head", "model.embed_tokens", *dense}
    # with which vLLM refuses a model
    assert not {"sparsity_config", "compression_config"} & set(config)
    assert config["format"] == "pack-quantized"
    reader = CheckpointReader(out)
    assert reader.shape("model.layers.0.self_attn.q_proj.weight_packed") == (64, 8)
    assert reader.shape("model.layers.0.self_attn.q_proj.weight_scale") == (64, 2)
    assert reader.get("model.layers.0.self_attn.q_proj.weight_shape").tolist() == [
        64,
        64,
    ]
    assert "model.layers.0.self_attn.v_proj.weight" in reader
    assert torch.equal(logits(out), logits(directory))


def test_a_packed_checkpoint_is_exported_as_well(tmp_path: Path) -> None:
    directory = pruned(wide_llama(), tmp_path, "w4a16-32")
    sparsellm.pack(directory, out=tmp_path / "packed", head="keep")
    assert torch.equal(logits(exported(tmp_path / "packed")), logits(directory))


def test_a_directory_has_what_belongs_to_the_model_and_no_place(tmp_path: Path) -> None:
    directory = pruned(wide_llama(), tmp_path, "w8a16")
    write_results(directory, {**EVALUATION, "perplexity": {"value": 9.0}}, EVALUATION)
    out = exported(directory)
    # the first is superseded
    assert (out / "README.md").read_text().count("windows of 512 tokens") == 1
    names = {file.name for file in out.iterdir()}
    assert {
        "tokenizer.json",
        "generation_config.json",
        "pruning.json",
        "recipe.yaml",
        "README.md",
    } <= names
    assert "vllm serve" in (out / "README.md").read_text()
    assert (
        str(tmp_path)
        not in (out / "config.json").read_text() + (out / "README.md").read_text()
    )
    assert not list(tmp_path.glob("*.partial"))


def test_what_the_format_does_not_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = pruned(tiny_gpt2(n_embd=64, n_inner=96), tmp_path, "w8a16")
    assert (
        "c_attn is a Conv1D, which only GGUF has; take q4_0 or q8_0"
        in (directory / "pruning.json").read_text()
    )
    with pytest.raises(
        ModelError,
        match=r"c_attn is a Conv1D, .*prune with --grid q4_0 and export to gguf",
    ):
        exported(directory)
    stacked = pruned(family("GptOss"), tmp_path / "stacked", "w4a16-32")
    assert (
        "gate_proj has no tensor of its own; exclude it"
        in (stacked / "pruning.json").read_text()
    )
    with pytest.raises(
        ModelError,
        match=r"gate_proj has no tensor of its own in .*, so it is not exported",
    ):
        exported(stacked)
    with pytest.raises(StorageError, match="overlaps with the model"):
        sparsellm.export(
            directory, to="compressed-tensors", out=directory, overwrite=True
        )
    monkeypatch.setitem(
        sys.modules, "compressed_tensors.compressors.pack_quantized", None
    )
    with pytest.raises(MissingExtraError, match="pip install compressed-tensors"):
        exported(directory)
    assert not (tmp_path / "out").exists()
