"""Surveys without a model and of tiny ones, and gradients of a whole model by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm.method.allocation import LinearSize, Survey
from sparsellm.method.sweep.gradients import LossGradients, loss_gradients
from sparsellm.model import Chain, Feed, open_chain
from tests.models import windows

IDS = windows(6, 20)


def sizes_of(chain: Chain) -> list[LinearSize]:
    return [
        LinearSize(linear.name, index, (linear.out_features, linear.in_features))
        for index in range(len(chain))
        for linear in chain.linears(index)
    ]


def survey_of(
    model: PreTrainedModel,
    sparsity: float,
    ids: Tensor = IDS,
    gradients: bool = False,
    **changes: Any,
) -> Survey:
    """With batches of two windows, so that sums over batches are seen."""
    chain = open_chain(model, device=torch.device("cpu"))
    feed = Feed(chain, ids, changes.pop("batch_tokens", 2 * ids.shape[1]), **changes)
    names = {size.name for size in sizes_of(chain)}
    return survey_on(
        feed,
        sizes_of(chain),
        sparsity,
        loss_gradients(feed, names, saliency=True) if gradients else None,
    )


def bare_survey(shapes: Sequence[Sequence[tuple[int, int]]], sparsity: float) -> Survey:
    """Sizes alone, block by block; anything that needs a model fails."""
    linears = [
        LinearSize(f"blocks.{b}.{i}", b, shape)
        for b, inside in enumerate(shapes)
        for i, shape in enumerate(inside)
    ]
    return survey_on(Feed(None, torch.zeros(1, 2), 2), linears, sparsity)  # type: ignore[arg-type]


def survey_on(
    feed: Feed,
    linears: list[LinearSize],
    sparsity: float,
    gradients: LossGradients | None = None,
) -> Survey:
    return Survey(
        feed,
        linears,
        sparsity,
        round(sparsity * sum(linear.weights for linear in linears)),
        gradients,
    )


def weight_of(module: nn.Module) -> Tensor:
    """``(out, in)``, fp64."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.T if isinstance(module, Conv1D) else weight).detach().double()


class Record:
    """Inputs and output gradients of every linear by plain autograd of the whole model, all windows at once."""

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, names: Sequence[str]
    ) -> None:
        self.inputs: dict[str, Tensor] = {}  # (tokens, in)
        outputs: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            def see(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor
            ) -> None:
                self.inputs[name] = args[0].detach().flatten(0, -2)
                outputs[name] = output

            return see

        handles = [
            model.get_submodule(name).register_forward_hook(hook(name))
            for name in names
        ]
        result = model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        self.loss = functional.cross_entropy(
            result.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(self.loss, [*outputs.values()])
        self.gradient = {
            name: value.flatten(0, -2)
            for name, value in zip(outputs, gradients, strict=True)
        }

    def fisher(self, name: str) -> Tensor:
        """``E[g_i² x_j²]`` token by token, fp64 ``(out, in)``."""
        g, x = self.gradient[name].double(), self.inputs[name].double()
        return torch.einsum("ti,tj->tij", g, x).square().mean(0)
