"""Each published rule against its formula, computed on the whole model with none of the library's code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median_low

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm.allocation import ALLOCATIONS, Survey
from sparsellm.chain import Feed, open_chain
from tests.allocation.helpers import Record, bare_survey, sizes_of, survey_of, survey_on, weight_of, windows
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer

Family = Callable[..., PreTrainedModel]


def metrics_of(model: PreTrainedModel, survey: Survey) -> dict[int, Tensor]:
    """All Wanda metrics of each block in one vector, with the norm over the tokens as the papers have it."""
    record = Record(model, survey.feed.windows, [linear.name for linear in survey.linears])
    result: dict[int, list[Tensor]] = {}
    for linear in survey.linears:
        norm = record.inputs[linear.name].double().norm(dim=0)
        metric = weight_of(model.get_submodule(linear.name)).abs() * norm
        result.setdefault(linear.block, []).append(metric.flatten())
    return {block: torch.cat(parts) for block, parts in result.items()}


def block_sparsities(survey: Survey, zeros: dict[str, int]) -> list[float]:
    """The sparsity of each block; inside, all linears give the same share."""
    result = []
    for block in survey.blocks:
        inside = [linear for linear in survey.linears if linear.block == block]
        share = sum(zeros[linear.name] for linear in inside) / sum(linear.weights for linear in inside)
        for linear in inside:
            assert zeros[linear.name] / linear.weights == pytest.approx(share, abs=1.1 / linear.weights + 1e-4)
        result.append(share)
    return result


def test_uniform_is_the_same_count_that_the_recipe_gives() -> None:
    survey = bare_survey([[(7, 9), (3, 5)], [(10, 10)]], 0.37)
    assert list(ALLOCATIONS["uniform"].function(survey).zeros.values()) == [round(0.37 * n) for n in (63, 15, 100)]


def test_owl_counts_outliers(family: Family) -> None:
    model = family()
    survey = survey_of(model, 0.6)
    allocation = ALLOCATIONS["owl"].function(survey, M=3.0, lam=0.1)
    shares = [float((m > 3 * m.mean()).double().mean()) for m in metrics_of(model, survey).values()]
    assert allocation.report["outlier_share"] == pytest.approx(shares, abs=2.5e-4)  # one weight at the limit
    scaled = [0.2 * (share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    expected = [0.6 - d + sum(scaled) / len(scaled) for d in scaled]
    assert block_sparsities(survey, allocation.zeros) == pytest.approx(expected, abs=0.01)


def test_dlp_compares_medians(family: Family) -> None:
    model = family()
    survey = survey_of(model, 0.6)
    allocation = ALLOCATIONS["dlp"].function(survey, alpha=0.1)
    medians = [median_low(m.tolist()) for m in metrics_of(model, survey).values()]
    importance = [1 - value / sum(medians) for value in medians]
    assert allocation.report["importance"] == pytest.approx(importance, rel=1e-4)
    scaled = [0.2 * (i - min(importance)) / (max(importance) - min(importance)) for i in importance]
    expected = [0.6 - d + sum(scaled) / len(scaled) for d in scaled]
    assert block_sparsities(survey, allocation.zeros) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["owl", "dlp"])
def test_allocations_on_disk_are_those_in_memory(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    chain = open_chain(save_tiny(model, tiny_tokenizer(), tmp_path / "m"), device=torch.device("cpu"))
    lazy = survey_on(Feed(chain, windows(), 40), sizes_of(chain), 0.6)
    assert ALLOCATIONS[name].function(lazy) == ALLOCATIONS[name].function(survey_of(model, 0.6))
    assert all(parameter.is_meta for parameter in chain.model.parameters())  # nothing stays loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["owl", "dlp", "threshold"])
def test_the_model_is_left_as_it_was(name: str, dtype: torch.dtype) -> None:
    families: dict[str, Family] = {"owl": tiny_llama, "dlp": tiny_opt, "threshold": tiny_gpt2}
    model = families[name]().to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = {key: id(value) for key, value in model.named_parameters()}
    survey = survey_of(model, 0.6, gradients=name == "threshold")
    allocation = ALLOCATIONS[name].function(survey)
    assert sum(allocation.zeros.values()) == pytest.approx(survey.zeros, abs=8)  # uniform rounds each by itself
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {key: id(value) for key, value in model.named_parameters()} == objects
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
