"""The dense and the pruned stream: the same where nothing is pruned; targets that hooks on a plain model confirm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import RecipeError
from sparsellm.method.blocks import METHODS
from sparsellm.method.blocks import in_order as module
from sparsellm.method.blocks.in_order import _Fitting
from sparsellm.method.blocks.task import BlockTask
from sparsellm.method.gram import CrossAccumulator
from sparsellm.method.sweep.sweep_task import SweepTask
from sparsellm.model import LinearView
from sparsellm.run import sweeping
from sparsellm.run.choice import Choice
from tests.killing import ahead_of
from tests.method.sweep.helpers import ids_of, same_bits, tiny_mistral
from tests.model.outputs import hooked
from tests.models import tiny_gpt2, tiny_llama, tiny_opt

IDS = ids_of(6)
BATCH = 48  # tokens: two windows
EVERYTHING = {
    "passes": 2,
    "options": {"iterations": 1, "norm_weighting": 0, "output_metric": 1.0},
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["default", "everything"])
def test_nothing_changes_where_nothing_is_pruned(
    family: Callable[..., Any], settings: dict[str, Any]
) -> None:
    model = family()
    result = sparsellm.prune(
        model, Recipe(sparsity=0.0, **settings, batch_tokens=BATCH), calibration=IDS
    )
    assert same_bits(model.state_dict(), family().state_dict())
    assert result.sweeps == []


def nothing(task: BlockTask) -> None:
    """A method that looks at nothing and asks for the dense stream."""


@pytest.mark.usefixtures("forgotten_plugins")
@pytest.mark.parametrize(
    "family", [tiny_llama, tiny_opt, tiny_mistral], ids=lambda family: family.__name__
)
def test_the_dense_stream_is_of_the_dense_model(
    family: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    METHODS.register("nothing", paper="none", effort=1)(nothing)
    tasks: list[SweepTask] = []
    monkeypatch.setattr(sweeping, "sweep", lambda task: tasks.append(task) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparsellm.prune(
            family(),
            Recipe(method="nothing", sparsity=0.5, batch_tokens=BATCH),
            calibration=IDS,
        )
    (task,) = tasks
    chain, dense = task.feed.chain, task.dense
    assert dense is not None
    # it is pruned by now
    assert not same_bits(chain.model.state_dict(), family().state_dict())
    logits = torch.cat(
        [chain.finish(h, IDS[2 * i : 2 * i + 2]) for i, h in enumerate(dense)]
    )
    torch.testing.assert_close(
        logits, family()(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


FAMILIES = {
    "llama": (tiny_llama, "model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "opt": (tiny_opt, "model.decoder.layers", "self_attn.out_proj", "fc2"),
    "gpt2": (tiny_gpt2, "transformer.h", "attn.c_proj", "mlp.c_proj"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_of_writers_against_hooks_on_plain_models(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fit of each writer in block 1 was given, from a model as it was when that sublayer's turn came."""
    family, blocks, first, last = FAMILIES[name]
    writers, model = [f"{blocks}.1.{first}", f"{blocks}.1.{last}"], family()
    targets: list[list[Tensor]] = []
    states: list[PreTrainedModel] = []

    class Watched(CrossAccumulator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.is_mean = args[0] == 1
            if not self.is_mean:
                targets.append([])

        def update(
            self, target: Tensor, x: Tensor, token_weights: Tensor | None = None
        ) -> None:
            if not self.is_mean:
                targets[-1].append(
                    target.view(-1, IDS.shape[1], target.shape[-1]).clone()
                )
            super().update(target, x, token_weights)

    def see(*_: Any, recorded: LinearView | None, **__: Any) -> None:
        # the first group of a sublayer, at which the targets are recorded
        if recorded is not None:
            states.append(copy.deepcopy(model))

    monkeypatch.setattr(module, "CrossAccumulator", Watched)
    ahead_of(monkeypatch, _Fitting, "_moments", see)
    sparsellm.prune(
        model,
        Recipe(method="sparsellm", sparsity=0.6, effort=0, batch_tokens=BATCH),
        calibration=IDS,
    )
    at = 2  # sublayers of block 0 come first
    for number, writer in enumerate(writers):
        plain = states[at + number]
        linear = plain.get_submodule(writer)
        (output,) = hooked(plain, [linear], IDS)
        output = output.view(*IDS.shape, -1)  # (windows, seq, features)
        expected = output if linear.bias is None else output - linear.bias.detach()
        torch.testing.assert_close(
            torch.cat(targets[at + number]), expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    "left_in", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]
)
def test_one_group_without_variables_is_the_local_solver(left_in: str) -> None:
    """With one group in each block both have the same statistics, so every bit is the same."""
    every = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    left_out = [f"*.{name}" for name in every if name not in left_in.split()]
    settings: dict[str, Any] = {
        "sparsity": 0.6,
        "allocation": "uniform",
        "exclude": left_out,
        "batch_tokens": BATCH,
    }
    one = tiny_llama()
    sparsellm.prune(one, Recipe(method="admm", **settings), calibration=IDS)
    for more in ({"refit": False}, {}):  # a writer alone is fitted to nothing
        other, options = (
            tiny_llama(),
            {"solver": "admm", "norm_weighting": 0, "output_metric": 0, **more},
        )
        sparsellm.prune(
            other,
            Recipe(method="sparsellm", effort=0, options=options, **settings),
            calibration=IDS,
        )
        assert same_bits(one.state_dict(), other.state_dict())


def test_a_group_of_several_is_never_taken_for_a_writer() -> None:
    """Without o and down, gate and up are the last group that is left; neither is fitted to the other's target."""
    settings: dict[str, Any] = {
        "sparsity": 0.6,
        "exclude": ["*.o_proj", "*.down_proj"],
        "batch_tokens": BATCH,
    }
    fitted, plain = tiny_llama(), tiny_llama()
    for model, options in ((fitted, {}), (plain, {"refit": False})):
        recipe = Recipe(
            method="sparsellm",
            effort=0,
            options={"norm_weighting": 0, **options},
            **settings,
        )
        sparsellm.prune(model, recipe, calibration=IDS)
    assert same_bits(fitted.state_dict(), plain.state_dict())


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"options.iterations .* leave options.refit at true"
    ):
        Choice.of(Recipe(sparsity=0.5, options={"iterations": 2, "refit": False}))
