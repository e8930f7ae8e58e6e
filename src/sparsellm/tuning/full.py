"""Fine-tuning that keeps every pruned weight at zero."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from sparsellm.errors import ModelError
from sparsellm.model.structure import find_blocks


class ZeroKeeper:
    """Records the zeros in the weights of a model's blocks, and keeps them at zero during training.

    Gradients of pruned weights are set to zero as they are computed, so that they affect neither the gradient norm nor
    an optimiser's moments. ``restore``, after each step, undoes changes that an optimiser makes without a gradient.
    The masks take one byte per weight.

    Example, in a training loop::

        with ZeroKeeper(model) as keeper:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                keeper.restore()
                optimizer.zero_grad()

    Args:
        model: the pruned model; every matrix of its blocks, and every stack of experts, that has a zero gets a mask.

    Raises:
        ModelError: no matrix of the blocks has a zero, or the model has an adapter, which begins with zeros of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(hasattr(module, "base_layer") for module in model.modules()):
            advice = "leave KeepZeros out, and mask the update as examples/lora.py does"
            raise ModelError(
                f"{type(model).__name__} has an adapter, whose zeros would be kept too; {advice}"
            )
        name, blocks = find_blocks(model)
        matrices = (
            (key, weight)
            for key, weight in blocks.named_parameters(name)
            if weight.dim() > 1
        )
        self._weights = {
            key: w
            for key, w in matrices
            if not key.endswith("bias") and bool((w == 0).any())
        }
        if not self._weights:
            raise ModelError(
                f"no matrix in the blocks of {type(model).__name__} has a zero; prune the model first"
            )
        self.masks: dict[str, Tensor] = {
            key: weight.detach() != 0 for key, weight in self._weights.items()
        }
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, weight in self._weights.items():
            if weight.requires_grad:
                self._hooks.append(
                    weight.register_hook(
                        lambda g, mask=self.masks[name]: _cleared(g.clone(), mask)
                    )
                )
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def restore(self) -> None:
        """Sets every pruned weight to zero again."""
        for name, weight in self._weights.items():
            _cleared(weight, self.masks[name])


def _cleared(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` with zeros off the mask, also where not finite; torch fills by a bool mask many times as slowly."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    # all ones where kept
    values.view(integer).bitwise_and_(mask.to(values.device, integer).neg_())
    return values


class KeepZeros(TrainerCallback):
    """A ``ZeroKeeper`` for ``transformers.Trainer``: ``Trainer(..., callbacks=[KeepZeros()])``.

    It keeps the zeros that the model has when training begins."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._keeper = ZeroKeeper(model).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keeper.restore()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keeper.__exit__()
        del self._keeper
