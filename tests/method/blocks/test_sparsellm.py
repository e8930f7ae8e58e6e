"""The coordinated method: better than its solver alone on unseen tokens, exact, repeatable, harmless at zero."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, NumericalError
from sparsellm.method.blocks import in_order
from sparsellm.method.blocks.weighting import token_weights
from sparsellm.method.gram import least_squares
from sparsellm.method.sweep.gradients import loss_gradients
from sparsellm.model import Feed, open_chain
from tests.method.sweep.helpers import ids_of
from tests.models import tiny_gpt2, tiny_llama, tiny_opt
from tests.models.families import STAY_DENSE
from tests.models.families import family as family_of

Family = Callable[..., PreTrainedModel]
IDS, UNSEEN = ids_of(24, 48, seed=1), ids_of(24, 48, seed=9)


def error(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    """Relative squared error of the logits on tokens that nothing was fitted to."""
    with torch.no_grad():
        expected, logits = dense(UNSEEN).logits, model(UNSEEN).logits
    return float((logits - expected).square().sum() / expected.square().sum())


def pruned(family: Family, method: str, **settings: Any) -> PreTrainedModel:
    model = family()
    result = sparsellm.prune(
        model,
        Recipe(method=method, sparsity=0.6, **settings, batch_tokens=200),
        calibration=IDS,
    )
    if method == "sparsellm":
        assert result.zeros == round(0.6 * result.weights)
        assert len({linear.asked for linear in result.linears}) > 1
    else:
        assert all(
            abs(linear.zeros - 0.6 * linear.weights) <= 0.5 for linear in result.linears
        )
    assert all(
        linear.zeros == round(linear.asked * linear.shape[0] * linear.shape[1])
        for linear in result.linears
    )
    return model


def test_the_refit_lowers_the_error_on_unseen_tokens(family: Family) -> None:
    dense = family()
    assert error(pruned(family, "sparsellm", effort=0), dense) < error(
        pruned(family, "admm"), dense
    )


@pytest.mark.parametrize("name", ["Llama", "GPTJ", "Phi", "Cohere", "Falcon"])
def test_both_writers_are_refitted_where_sublayers_read_one_input(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Mock(wraps=least_squares)
    monkeypatch.setattr(in_order, "least_squares", fit)
    model = family_of(name)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    sparsellm.prune(
        model, Recipe(sparsity=0.6, effort=0, allow_dense=STAY_DENSE), calibration=IDS
    )
    fitted = [call.kwargs["prior"] for call in fit.call_args_list]
    writers = [
        weight
        for key, weight in dense.items()
        if any(torch.equal(weight, prior) for prior in fitted)
    ]
    assert len(fitted) == len(writers) == 2 * model.config.num_hidden_layers


def test_a_writer_that_runs_twice_in_a_block_is_not_refitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama()
    for block in model.model.layers:
        monkeypatch.setattr(
            block.mlp, "forward", lambda x, once=block.mlp.forward: once(once(x))
        )
    fit = Mock(wraps=least_squares)
    monkeypatch.setattr(in_order, "least_squares", fit)
    result = sparsellm.prune(model, Recipe(sparsity=0.6, effort=0), calibration=IDS)
    assert fit.call_count == len(model.model.layers)  # attention's
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)


def test_token_weights_tame_massive_activations_only() -> None:
    hidden = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    hidden[1, 7] *= 1000
    (weights,) = token_weights([hidden], 1.5)
    norms = hidden.norm(dim=-1)
    # torch's median is the lower of the two middle values
    limit = 1.5 * norms.flatten().sort().values[49]
    assert torch.equal(weights == 1, norms <= limit)
    torch.testing.assert_close(weights[1, 7], (limit / norms[1, 7]) ** 2)


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_auxiliary_variables_record_their_history_and_never_end_worse(
    values: str,
) -> None:
    model, recipe = (
        tiny_opt(),
        Recipe(
            sparsity=0.6, options={"iterations": 2}, batch_tokens=200, values=values
        ),
    )
    result = sparsellm.prune(model, recipe, calibration=IDS)
    units = [linear for linear in result.linears if linear.history]
    assert [linear.name.rpartition(".")[2] for linear in units] == [
        "fc2"
    ] * model.config.num_hidden_layers
    for linear in units:
        (chosen,) = (record for record in linear.history if record.chosen)
        assert (
            linear.error
            == chosen.held_out_error
            == min(record.held_out_error for record in linear.history)
        )
    for linear in result.linears:
        assert linear.zeros == round(linear.asked * linear.shape[0] * linear.shape[1])
        # the error of a unit is given once, unrounded
        assert math.isnan(linear.error) == linear.name.endswith("fc1")
    assert error(model, tiny_opt()) < error(pruned(tiny_opt, "admm"), tiny_opt())


def test_iterations_in_other_units_are_told_and_change_nothing() -> None:
    models = [tiny_llama(), tiny_llama()]
    results = [
        sparsellm.prune(
            model, Recipe(sparsity=0.6, effort=0, options=options), calibration=IDS
        )
        for model, options in zip(models, ({}, {"iterations": 2}), strict=True)
    ]
    assert all(
        torch.equal(*pair)
        for pair in zip(*(model.state_dict().values() for model in models), strict=True)
    )
    told = [
        linear.name
        for linear in results[1].linears
        if any("two-layer ReLU" in note for note in linear.notes)
    ]
    assert told == [
        linear.name
        for linear in results[1].linears
        if linear.name.endswith("down_proj")
    ]
    # then attention is with the unit
    recipe = Recipe(effort=0, exclude=["*.out_proj"], options={"iterations": 2})
    result = sparsellm.prune(tiny_opt(), recipe, calibration=IDS)
    noted = [x for x in result.linears if "other linears" in "".join(x.notes)]
    assert [x.name[-3:] for x in noted] == ["fc2"] * tiny_opt().config.num_hidden_layers


@pytest.mark.parametrize(
    ("family", "goal", "solver", "taken"),
    [
        (tiny_opt, {"pattern": "1:4"}, "admm", True),
        (tiny_opt, {"pattern": "1:4"}, "sparsegpt", False),
        (tiny_opt, {"sparsity": 0.8}, "sparsegpt", True),
        (tiny_opt, {"sparsity": 0.9}, "admm", False),
        (tiny_opt, {"sparsity": 0.7}, "sparsegpt", False),
        (tiny_llama, {"sparsity": 0.9}, "sparsegpt", False),  # gated
        (tiny_gpt2, {"sparsity": 0.9}, "sparsegpt", False),  # GELU
    ],
)
def test_auxiliary_variables_run_where_they_pay(
    family: Family, goal: dict[str, Any], solver: str, taken: bool
) -> None:
    def histories(**options: Any) -> list[Any]:
        recipe = Recipe(
            effort=0,
            options={"solver": solver, **options},
            allocation="uniform",
            **goal,
        )
        return [
            x.history
            for x in sparsellm.prune(family(), recipe, calibration=IDS).linears
            if x.history
        ]

    assert bool(histories()) == taken
    if taken:
        assert not histories(iterations=0)
        assert not histories(refit=False)


@pytest.mark.parametrize("family", [tiny_llama, tiny_opt], ids=["gated", "relu"])
def test_the_published_algorithm_runs_on_a_model_and_shows_its_errors(
    family: Family,
) -> None:
    model = family()
    result = sparsellm.prune(
        model, Recipe(method="sparsellm-paper", options={"epochs": 3}), calibration=IDS
    )
    histories = [linear.history for linear in result.linears if linear.history]
    assert len(histories) == model.config.num_hidden_layers
    for history in histories:
        assert [record.chosen for record in history] == [False, False, True]
        assert all(record.held_out_error is None for record in history)
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.fixture
def diverging() -> PreTrainedModel:
    """Its gradient steps on S overshoot in block 1, where the other branch is large."""
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1e6
    return model


def test_the_published_algorithm_says_where_it_diverged(
    diverging: PreTrainedModel,
) -> None:
    said = r"layers\.1\.mlp\.down_proj: .*diverged in iteration \d+ .*0\.\d+.*options\.safeguard=true"
    with pytest.raises(NumericalError, match=said):
        sparsellm.prune(
            diverging,
            Recipe(method="sparsellm-paper", options={"epochs": 30}),
            calibration=IDS,
        )


def test_the_published_algorithm_says_what_it_does_not_know() -> None:
    with pytest.raises(ModelError, match=r"mlp\.c_proj: .*ReLU"):
        sparsellm.prune(tiny_gpt2(), Recipe(method="sparsellm-paper"), calibration=IDS)


def test_outputs_that_cost_more_keep_more_weights(family: Family) -> None:
    """The rows of every linear compete by the loss's own gradient: what a row keeps follows what its errors cost."""

    def kept(metric: float) -> dict[str, Tensor]:
        model = family()
        recipe = Recipe(
            effort=0,
            sparsity=0.6,
            allocation="uniform",
            options={"output_metric": metric},
        )
        result = sparsellm.prune(model, recipe, calibration=IDS)
        assert all(
            linear.zeros == round(0.6 * linear.shape[0] * linear.shape[1])
            for linear in result.linears
        )
        shares = {}
        for linear in result.linears:
            weight = model.get_submodule(linear.name).weight
            # (out,)
            shares[linear.name] = (
                (weight.t() if family is tiny_gpt2 else weight).ne(0).float().mean(1)
            )
        return shares

    model = family()
    plain, weighed = kept(0.0), kept(1.0)
    costs = loss_gradients(
        Feed(open_chain(model, device=torch.device("cpu")), IDS, 2048), plain.keys()
    ).output_squares
    assert costs.keys() == plain.keys()
    # by role, since a linear of one block has few rows
    moved: dict[str, list[Tensor]] = {}
    for name, cost in costs.items():
        # a hidden unit that never fires costs nothing
        bounded = (cost / cost.mean()).clamp(min=1e-4).log()
        moved.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(
            torch.stack([weighed[name] - plain[name], bounded])
        )
    by_role = [
        float(torch.corrcoef(torch.cat(blocks, dim=1))[0, 1])
        for blocks in moved.values()
    ]
    assert min(by_role) > 0.2
    assert sum(by_role) / len(by_role) > 0.5
    half_power = kept(0.5)
    shifts = [
        sum(float((shares[name] - plain[name]).abs().sum()) for name in plain)
        for shares in (half_power, weighed)
    ]
    assert 0 < shifts[0] < 0.9 * shifts[1]
