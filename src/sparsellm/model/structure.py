"""The blocks, towers and linears of a model, found by structure: no family and no attribute is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm.errors import ModelError

# in the name of a config inside one that is the text's own
_SENSES = re.compile("vision|audio")


@dataclass(frozen=True)
class LinearView:
    """One linear as ``Y = X Wᵀ + b`` with ``W (out, in)``, however its module stores it. Assigned values are rounded to
    the storage dtype at once, so that the model in memory equals the model on disk."""

    name: str  # the module's in the model
    module: nn.Module  # an nn.Linear, or the Conv1D of GPT-2, which stores Wᵀ
    storage_dtype: torch.dtype  # in which the weight will be written
    # in which the bias will be written, if there is one
    bias_dtype: torch.dtype | None = None

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def out_features(self) -> int:
        return int(self.parameter.shape[self._axis(0)])

    @property
    def in_features(self) -> int:
        return int(self.parameter.shape[self._axis(1)])

    def _axis(self, axis: int) -> int:
        """The dimension of the parameter that has the outputs (axis 0) or inputs (axis 1)."""
        if self.transposed:
            return 1 - axis
        return axis

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        if isinstance(bias, Tensor):
            return bias.detach().to(torch.float32, copy=True)
        return None

    def weight(self) -> Tensor:
        """A copy of the weight, ``(out, in)``, fp32."""
        weight = self.parameter.detach().to(torch.float32, copy=True)
        if self.transposed:
            return weight.t().contiguous()
        return weight

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Overwrites the weight with ``weight (out, in)``, without negative zeros."""
        if self.transposed:
            weight = weight.t()
        stored = weight.to(self.storage_dtype) + 0.0
        self.parameter.copy_(stored.to(self.parameter.dtype))

    @torch.no_grad()
    def assign_bias(self, bias: Tensor | None) -> None:
        """Overwrites the bias with ``bias (out,)``; None is that of a linear without one."""
        if bias is not None:
            self.module.get_parameter("bias").copy_(bias.to(self.bias_dtype))

    @torch.no_grad()
    def permute(
        self, *, inputs: Tensor | None = None, outputs: Tensor | None = None
    ) -> None:
        """Reorders inputs or outputs, the bias included: place i gets what was at ``inputs[i]`` or ``outputs[i]``."""
        for index, axis in ((outputs, 0), (inputs, 1)):
            if index is not None:
                self.parameter.copy_(
                    self.parameter.index_select(self._axis(axis), index)
                )
        if outputs is not None and isinstance(self.module.bias, Tensor):
            self.module.bias.copy_(self.module.bias[outputs])


def iterate_linears(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every ``nn.Linear`` or ``Conv1D`` below ``module``, with its name in the whole model, in definition order."""
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, Conv1D)):
            place = f"{prefix}.{name}".strip(".")
            if "weight" not in child._parameters:
                raise ModelError(
                    f"{place} has a quantised, masked or parametrised weight; load a plain one"
                )
            yield place, child


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks, with its name in the model: the ``ModuleList`` outside towers with most weights in
    linears, the outer one of two that hold equally many. A ModelError says that no ``ModuleList`` holds linears."""
    if getattr(model, "is_quantized", False):
        raise ModelError(
            "the model is packed or quantised; load a plain one, such as `sparsellm unpack` writes"
        )
    towers: tuple[str, ...] = ()
    if isinstance(model, PreTrainedModel):
        towers = tuple(f"{tower}." for tower in tower_names(model))
    sizes = {
        name: sum(
            linear.get_parameter("weight").numel()
            for _, linear in iterate_linears(module, name)
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not name.startswith(towers)
    }
    name = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(name):
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with linear layers; it cannot be pruned"
        )
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks


def tower_names(model: PreTrainedModel) -> list[str]:
    """The outermost modules of a multimodal model that read no text, by name: those whose config is not the text's."""
    config = model.config
    text = config.get_text_config()
    inner = [
        getattr(config, key, None)
        for key in getattr(config, "sub_configs", {})
        if _SENSES.search(key)
    ]
    kinds: tuple[type, ...] = (PretrainedConfig,)
    if text is config:
        kinds = tuple({type(part) for part in inner if part is not None})
    towers: list[str] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, PreTrainedModel)
            and isinstance(module.config, kinds)
            and not isinstance(module.config, (type(text), type(config)))
            and not name.startswith(tuple(f"{tower}." for tower in towers))
        ):
            towers.append(name)
    return towers
