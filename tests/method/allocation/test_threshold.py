"""The threshold against a sort of all saliencies of a tiny model, which plain autograd and fp64 give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm import Recipe, prune
from sparsellm.method.allocation import ALLOCATIONS, Survey
from sparsellm.method.allocation.threshold import from_histograms
from sparsellm.method.sweep.gradients import BINS, HIGHEST, LOWEST
from tests.method.allocation.helpers import (
    IDS,
    Record,
    bare_survey,
    survey_of,
    weight_of,
)
from tests.method.sweep.helpers import Family
from tests.models import tiny_llama, tiny_opt


def saliencies(model: PreTrainedModel, survey: Survey) -> dict[str, Tensor]:
    record = Record(
        model, survey.feed.windows, [linear.name for linear in survey.linears]
    )
    return {
        linear.name: 0.5
        * weight_of(model.get_submodule(linear.name)).square()
        * record.fisher(linear.name)
        for linear in survey.linears
    }


def near(values: Tensor, threshold: float) -> int:
    """How many saliencies are within two bins of a threshold: those that a histogram cannot tell apart."""
    width = 2.0 ** (2 * (HIGHEST - LOWEST) / BINS)
    return int(((values > threshold / width) & (values < threshold * width)).sum())


def test_it_gives_what_a_sort_of_all_saliencies_gives(family: Family) -> None:
    model = family()
    survey = survey_of(model, gradients=True, sparsity=0.6)
    result = ALLOCATIONS["threshold"].function(survey, span=1.0).zeros
    exact = saliencies(model, survey)
    order = iter(
        sorted(
            (value, name)
            for name, values in exact.items()
            for value in values.flatten().tolist()
        )
    )
    given = dict.fromkeys(exact, 0)
    # the cheapest weight first, of any linear that has not given 99 % yet
    while sum(given.values()) < survey.zeros:
        threshold, name = next(order)
        given[name] += given[name] < int(0.99 * exact[name].numel())
    assert sum(result.values()) == survey.zeros
    for name, values in exact.items():
        assert abs(result[name] - given[name]) <= near(values, threshold) + 1, name
    shares = [result[linear.name] / linear.weights for linear in survey.linears]
    assert max(shares) - min(shares) > 0.2  # there was something to find


def test_span_limits_every_linear() -> None:
    survey = survey_of(tiny_llama(), gradients=True, sparsity=0.6)
    result = ALLOCATIONS["threshold"].function(survey, span=0.05).zeros
    assert sum(result.values()) == survey.zeros
    shares = [result[linear.name] / linear.weights for linear in survey.linears]
    assert min(shares) >= 0.55 - 0.002
    assert max(shares) <= 0.65 + 0.002
    assert min(shares) < 0.551  # the limit is met
    alike = ALLOCATIONS["threshold"].function(survey, span=0.0).zeros
    assert all(
        abs(alike[linear.name] - 0.6 * linear.weights) < 1 for linear in survey.linears
    )


def test_histograms_count_every_weight_free_ones_first() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[:16] = (
        0.0  # half of it is already gone
    )
    survey = survey_of(model, gradients=True, sparsity=0.6)
    counts = survey.gradients.saliency
    assert all(
        int(counts[linear.name].sum()) == linear.weights for linear in survey.linears
    )
    assert int(counts["model.layers.1.mlp.down_proj"][0]) == 16 * 80
    assert (
        from_histograms(survey, counts, span=1.0).zeros["model.layers.1.mlp.down_proj"]
        >= 16 * 80
    )


def test_windows_beyond_the_number_asked_for_are_not_read() -> None:
    def chosen(tokens: int, ids: Tensor) -> dict[str, int]:
        recipe = Recipe(
            method="magnitude",
            sparsity=0.6,
            allocation="threshold",
            allocation_options={"tokens": tokens},
        )
        return {
            linear.name: linear.zeros
            for linear in prune(tiny_opt(), recipe, calibration=ids).linears
        }

    some = chosen(5 * 20 + 19, IDS)
    assert some == chosen(120, IDS[:5])
    assert some != chosen(120, IDS)
    assert chosen(1, IDS) == chosen(120, IDS[:4])


def test_a_linear_that_no_token_reached_keeps_the_target() -> None:
    survey = bare_survey([[(20, 50), (20, 50)], [(20, 50)]], 0.7)
    counts = {
        "blocks.0.0": histogram(at=100, weights=1000),
        "blocks.1.0": histogram(at=200, weights=1000),
    }
    assert from_histograms(survey, counts, span=0.2).zeros == {
        "blocks.0.0": 900,
        "blocks.0.1": 700,
        "blocks.1.0": 500,
    }


def test_a_weight_in_two_places_keeps_the_target_and_is_reported() -> None:
    model = tiny_llama()
    model.model.layers[2].mlp.up_proj = model.model.layers[1].mlp.up_proj
    result = ALLOCATIONS["threshold"].function(
        survey_of(model, gradients=True, sparsity=0.6)
    )
    name = "model.layers.1.mlp.up_proj"
    assert result.report == {"tokens": 6 * 20, "kept_target": [name]}
    assert abs(result.zeros[name] - 0.6 * 80 * 32) <= 1
    assert abs(result.zeros["model.layers.0.mlp.up_proj"] - 0.6 * 80 * 32) > 20


def test_one_bin_that_holds_everything_is_shared() -> None:
    survey = bare_survey([[(20, 50)], [(40, 50)]], 0.7)
    counts = {
        "blocks.0.0": histogram(at=5, weights=1000),
        "blocks.1.0": histogram(at=5, weights=2000),
    }
    assert from_histograms(survey, counts, span=1.0).zeros == {
        "blocks.0.0": 700,
        "blocks.1.0": 1400,
    }


def histogram(at: int, weights: int) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    counts[at] = weights
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_left_as_it_was(family: Family, dtype: torch.dtype) -> None:
    model = family().to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = {key: id(value) for key, value in model.named_parameters()}
    survey = survey_of(model, 0.6, gradients=True)
    assert sum(ALLOCATIONS["threshold"].function(survey).zeros.values()) == survey.zeros
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    assert {key: id(value) for key, value in model.named_parameters()} == objects
    assert all(
        parameter.requires_grad and parameter.grad is None
        for parameter in model.parameters()
    )
    assert not any(module._forward_hooks for module in model.modules())
