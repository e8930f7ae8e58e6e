"""Experts are removed from mixtures: what is left is the model that one would build by hand, and runs everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, RecipeError, StorageError
from sparsellm.mixtures.scores import SCORES, MixtureView
from tests import killing
from tests.killing import KILLED
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.families import MIXTURES, family, mixtral
from tests.storage.small import tree

IDS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(3))
RECIPE: dict[str, Any] = {"sparsity": 0.0, "samples": 6, "seq_len": 24, "batch_tokens": 48, "experts": 2}
EIGHT = {"num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8}


def removed(source: Path, out: Path, **changes: Any) -> sparsellm.PruneResult:
    return sparsellm.prune(source, Recipe(**{**RECIPE, **changes}), out=out, calibration=IDS)


def loaded(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True).eval()


def by_hand(dense: PreTrainedModel, small: PreTrainedModel, kept: dict[int, list[int]]) -> PreTrainedModel:
    """A model of the small one's config with the rows of the dense one's tensors that belong to ``kept`` experts."""
    made, values = type(small)(small.config).eval(), dense.state_dict()
    for name, value in made.state_dict().items():
        source = values[name]
        for dim, (many, few) in enumerate(zip(source.shape, value.shape, strict=True)):
            if many != few:
                block = int(name.split("layers." if "layers." in name else "blocks.")[1].partition(".")[0])
                experts = len(kept[block]) * many // few
                rows = torch.arange(many).view(experts, -1)[kept[block]].flatten()
                source = source.index_select(dim, rows)
        value.copy_(source)
    return made


@pytest.mark.parametrize("name", sorted(MIXTURES))
@torch.no_grad()
def test_what_is_left_is_the_model_built_by_hand(name: str, tmp_path: Path) -> None:
    dense = family(name, **EIGHT)
    source = save_tiny(dense, None, tmp_path / "dense")
    result = removed(source, tmp_path / "small", experts=4, expert_refit=False, effort=0)
    small = loaded(tmp_path / "small")
    kept = {each.block: each.kept for each in result.experts}
    assert kept
    assert all(len(numbers) == 4 for numbers in kept.values())
    hand = by_hand(loaded(source), small, kept)
    assert torch.equal(small(IDS).logits, hand(IDS).logits)
    assert small.num_parameters() < dense.num_parameters()
    assert not (tmp_path / "small-experts").exists()


def test_a_refit_lowers_the_error_and_composes_with_zeros_and_int4(tmp_path: Path) -> None:
    source = save_tiny(mixtral(), None, tmp_path / "dense")
    result = removed(source, tmp_path / "small", sparsity=0.5, method="sparsegpt", values="int4")
    assert all(each.refitted < each.error for each in result.experts)
    assert result.sparsity > 0.49
    assert {linear.name.split(".experts.")[1][0] for linear in result.linears if ".experts." in linear.name} == {
        "0",
        "1",
    }
    assert result.base.name == "dense"
    record = json.loads((tmp_path / "small" / "pruning.json").read_text())
    assert record["experts"][0]["tokens"] == result.experts[0].tokens
    assert (
        "| experts of each mixture | 2 of 4, kept by `coordinated` |" in (tmp_path / "small" / "README.md").read_text()
    )
    assert "2 of 4 experts stayed in each mixture" in (tmp_path / "small" / "report.html").read_text()
    assert loaded(tmp_path / "small")(IDS).logits.isfinite().all()


def test_killed_between_blocks_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    source = save_tiny(mixtral().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "dense")
    recipe = {**RECIPE, "method": "wanda", "sparsity": 0.5, "dtype": "float32"}
    whole = killing.run(killing.prune, source, tmp_path / "whole", recipe)
    assert whole.code == 0
    first, last = (tree(tmp_path / "whole")[name] for name in ("model-00001-of-00003.safetensors", "config.json"))
    renames = whole.steps["rename"]
    for at in range(1, renames, max(1, renames // 6)):
        out = tmp_path / f"cut-{at}"
        assert killing.run(killing.prune, source, out, recipe, at=("rename", at)).code == KILLED
        assert killing.run(killing.prune, source, out, recipe).code == 0
        assert tree(out)["model-00001-of-00003.safetensors"] == first
        assert tree(out)["config.json"] == last


def view(**changes: Any) -> MixtureView:
    tokens = torch.tensor([10, 0, 40, 20])
    known: dict[str, Any] = {
        "block": 0, "keep": 2, "groups": 1, "tokens": tokens, "seed": 0,
        "strength": torch.tensor([30.0, 0.0, 40.0, 50.0], dtype=torch.float64), "error_of": lambda kept: 1.0,
    }  # fmt: skip
    return MixtureView(**{**known, **changes})


def test_scores_follow_their_definitions() -> None:
    assert SCORES["reap"].function(view()).tolist() == [3.0, 0.0, 1.0, 2.5]
    assert view().best(SCORES["frequency"].function(view())) == [2, 3]
    assert view(groups=2).best(SCORES["frequency"].function(view())) == [0, 2]
    random = SCORES["random"].function
    assert torch.equal(random(view()), random(view()))
    assert not torch.equal(random(view()), random(view(seed=1)))


def test_coordinated_finds_the_best_set_by_exchanges() -> None:
    worth = {frozenset({0, 1}): 0.1, frozenset({0, 3}): 0.9, frozenset({1, 3}): 0.5}
    score: Tensor = SCORES["coordinated"].function(view(error_of=lambda kept: worth.get(frozenset(kept), 0.8)))
    assert view().best(score) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": 1}, "routing needs 2 or more"),
        ({"experts": 0.99}, "routing needs 2 or more"),
        ({"experts": 4}, "removes none of 4 experts"),
        ({"expert_score": "reep"}, "did you mean 'reap'"),
        ({"expert_options": {"trials": 1}, "expert_score": "reap"}, "no options"),
    ],
)
def test_what_cannot_be_removed_is_refused_before_the_work(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = save_tiny(mixtral(), None, tmp_path / "dense")
    with pytest.raises(RecipeError, match=said):
        removed(source, tmp_path / "small", **changes)
    assert not (tmp_path / "small").exists()


def test_a_model_without_mixtures_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tiny_llama(), None, tmp_path / "dense")
    with pytest.raises(ModelError, match="has no mixture of experts"):
        removed(source, tmp_path / "small")
    with pytest.raises(RecipeError, match="on disk"):
        sparsellm.prune(tiny_llama(), Recipe(**RECIPE), calibration=IDS)


def test_a_checkpoint_of_the_user_is_not_taken_for_the_smaller_model(tmp_path: Path) -> None:
    source = save_tiny(mixtral(), None, tmp_path / "dense")
    removed(source, tmp_path / "small-experts", experts=3)
    before = tree(tmp_path / "small-experts")
    with pytest.raises(StorageError, match="small-experts"):
        removed(source, tmp_path / "small")
    assert tree(tmp_path / "small-experts") == before
