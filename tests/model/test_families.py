"""The families that people use: pruned from a directory, read again by plain transformers, under the names they had."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError
from sparsellm.files.reader import CheckpointReader
from sparsellm.model import open_chain
from sparsellm.model.experts import separate_experts
from tests.files.small import tensors_of
from tests.killing import stop_after_one
from tests.method.sweep.helpers import same_bits
from tests.models import save_tiny
from tests.models.families import (
    FAMILIES,
    MIXTURES,
    STAY_DENSE,
    family,
    gemma3,
    git,
    mixtral,
    qwen3_5,
)

IDS = torch.arange(4, 100).view(4, 24)
RECIPE = Recipe(
    method="sparsegpt", samples=4, seq_len=24, sparsity=0.5, allow_dense=STAY_DENSE
)


# of which transformers merges tensors when it loads them, and two others
CONVERTED = [*(name for name in MIXTURES if name in FAMILIES), "GPTNeoX", "Llama"]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(family(name), None, tmp_path_factory.mktemp(name) / "dense")


@pytest.fixture(scope="module")
def pruned(source: Path) -> sparsellm.PruneResult:
    return sparsellm.prune(
        source, RECIPE, out=source.parent / "pruned", calibration=IDS
    )


@lru_cache(
    maxsize=3
)  # of a family what was saved, what was pruned, and what a test wrote
def read_back(directory: Path) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    loaded, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    return loaded.eval(), {
        kind: set(info[kind])
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def test_half_of_every_matrix_is_zero_under_the_source_names(
    name: str, source: Path, pruned: Any
) -> None:
    dense = sum(matrix.weights for matrix in pruned.dense)
    if name in MIXTURES:  # routers and the gates of shared experts stay dense
        assert dense < 0.02 * pruned.matrices.weights
        assert all(
            matrix.reason in ("gate", "small") or "conv" in matrix.name
            for matrix in pruned.dense
        )
    else:
        assert all("conv" in matrix.name for matrix in pruned.dense)
    assert pruned.sparsity_pruned == pytest.approx(0.5, abs=1e-3)
    assert pruned.sparsity == pytest.approx(
        0.5 * (1 - dense / pruned.matrices.weights), abs=1e-3
    )
    assert any("was requested" in warning for warning in pruned.warnings) == (dense > 0)
    assert set(CheckpointReader(pruned.path)) == set(CheckpointReader(source))
    index = json.loads((pruned.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(CheckpointReader(source))
    loaded, info = read_back(pruned.path)
    assert info == read_back(source)[1]
    assert not info["missing_keys"]
    state = separate_experts(loaded)[0].state_dict()
    for linear in pruned.linears:
        assert int((state[f"{linear.name}.weight"] == 0).sum()) == linear.zeros, (
            linear.name
        )
    inspected = {
        matrix.name: matrix.zeros
        for matrix in sparsellm.inspect(pruned.path)
        if matrix.linear
    }
    assert inspected == {linear.name: linear.zeros for linear in pruned.linears}


def test_at_sparsity_zero_no_bit_changes(source: Path, tmp_path: Path) -> None:
    sparsellm.prune(
        source,
        RECIPE.updated(sparsity=0.0, method="magnitude"),
        out=tmp_path / "p",
        calibration=IDS,
    )
    assert torch.equal(
        logits(read_back(tmp_path / "p")[0]), logits(read_back(source)[0])
    )
    assert same_bits(tensors_of(tmp_path / "p"), tensors_of(source))


@pytest.mark.parametrize(
    "name",
    ["Llama", "Zamba2", "Mixtral", "GptOss", "Gemma4Text"],
    indirect=True,
    scope="module",
)
def test_a_resumed_run_has_the_same_bits(
    source: Path, pruned: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        sparsellm.prune(
            source,
            RECIPE,
            out=tmp_path / "p",
            calibration=IDS,
            progress=stop_after_one("prune"),
        )
    assert (
        sparsellm.prune(source, RECIPE, out=tmp_path / "p", calibration=IDS).resumed
        == 1
    )
    assert same_bits(tensors_of(tmp_path / "p"), tensors_of(pruned.path))


def test_packed_and_unpacked_bit_for_bit(pruned: Any, tmp_path: Path) -> None:
    assert any(sparsellm.pack(pruned.path, out=tmp_path / "packed").linears.values())
    sparsellm.unpack(tmp_path / "packed", out=tmp_path / "dense")
    assert same_bits(tensors_of(tmp_path / "dense"), tensors_of(pruned.path))
    assert torch.allclose(
        logits(sparsellm.load(tmp_path / "packed")),
        logits(read_back(pruned.path)[0]),
        atol=1e-4,
    )


@pytest.mark.parametrize("name", CONVERTED, indirect=True, scope="module")
def test_a_model_in_memory_is_saved_under_published_names(
    name: str, source: Path, tmp_path: Path
) -> None:
    model = family(name)
    names, before = list(model.state_dict()), logits(model)
    recipe = RECIPE.updated(method="magnitude")
    result = sparsellm.prune(model, recipe, out=tmp_path / "p", calibration=IDS)
    sparsellm.prune(source, recipe, out=tmp_path / "q", calibration=IDS)
    assert same_bits(tensors_of(tmp_path / "p"), tensors_of(tmp_path / "q"))
    # the caller's object is as it was, but for the values
    assert list(model.state_dict()) == names
    assert result.model is model
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), logits(read_back(tmp_path / "p")[0]))


@pytest.mark.parametrize("build", [gemma3, git, qwen3_5])
def test_a_vision_tower_is_copied_and_said_so(build: Any, tmp_path: Path) -> None:
    source = save_tiny(build(), None, tmp_path / "dense")
    result = sparsellm.prune(source, RECIPE, out=tmp_path / "p", calibration=IDS)
    before, after = tensors_of(source), tensors_of(tmp_path / "p")
    tower = {
        key for key in before if "vision" in key or "visual" in key or "image" in key
    }
    assert len(tower) > 5
    assert same_bits(
        {key: before[key] for key in tower}, {key: after[key] for key in tower}
    )
    assert any(
        "copied as they are, not pruned" in warning for warning in result.warnings
    )
    assert all("vision" not in linear.name for linear in result.linears)


def test_a_tower_stays_packed_under_its_names_and_is_not_loaded(tmp_path: Path) -> None:
    source = save_tiny(gemma3(), None, tmp_path / "dense")
    sparsellm.prune(
        source, RECIPE.updated(method="magnitude"), out=tmp_path / "p", calibration=IDS
    )
    sparsellm.pack(tmp_path / "p", out=tmp_path / "packed")
    sparsellm.load(tmp_path / "packed").save_pretrained(tmp_path / "again")
    sparsellm.unpack(tmp_path / "again", out=tmp_path / "unpacked")
    assert same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(tmp_path / "p"))
    chain = open_chain(source, device=torch.device("cpu"))
    with chain.outer():
        assert all(
            parameter.is_meta
            for parameter in chain.model.get_submodule(chain.towers[0]).parameters()
        )


def test_a_text_model_of_a_multimodal_directory_is_read_back(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny(qwen3_5(), None, tmp_path / "dense")
    )
    model.save_pretrained(tmp_path / "saved")
    sparsellm.prune(
        model,
        RECIPE.updated(sparsity=0.0, method="magnitude"),
        out=tmp_path / "p",
        calibration=IDS,
    )
    assert same_bits(tensors_of(tmp_path / "p"), tensors_of(tmp_path / "saved"))
    assert read_back(tmp_path / "p")[1] == read_back(tmp_path / "saved")[1]


def test_an_unknown_conversion_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(mixtral(), None, tmp_path / "dense")
    monkeypatch.setattr("sparsellm.model.names._part_before", lambda *_: None)
    with pytest.raises(ModelError) as refused:
        sparsellm.prune(source, RECIPE, out=tmp_path / "p", calibration=IDS)
    assert "merges, splits or transposes 24 tensors" in str(refused.value)
    assert "experts.gate_up_proj" in str(refused.value)
    assert "pass the model to prune()" in str(refused.value)
    assert not list(tmp_path.glob("p*"))
