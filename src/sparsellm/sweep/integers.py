"""Pruned linears whose values are integers times a scale while the parameters behind them are trained in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsellm.chain import Chain
from sparsellm.chain.linears import LinearView
from sparsellm.packed.codes import exponents_of_text
from sparsellm.packed.grid import on_grid


@dataclass(frozen=True)
class Integers:
    """The linears of a model whose values are rounded to the grid of a packed type.

    Attributes:
        values: the type.
        linears: the exponents of the columns of each linear by its name, as records have them.
    """

    values: Literal["int8", "int4", "int3"]
    linears: Mapping[str, str]

    def of(self, parameters: dict[str, nn.Parameter], chain: Chain, index: int) -> dict[str, nn.Parameter]:
        """The same parameters of block ``index``, with rounded ones in place of the weights of these linears.

        A gradient of a rounded weight is taken as that of the weight behind it (straight-through). The scale of a group
        follows its largest weight, so scales are trained too.
        """
        rounded = dict(parameters)
        for linear in chain.linears(index):
            if linear.name in self.linears and linear.weight_name in parameters:
                weight = parameters[linear.weight_name].detach()
                weight = weight.t().contiguous() if linear.transposed else weight
                weight = self._rounded(linear, weight)
                rounded[linear.weight_name] = nn.Parameter(weight.t().contiguous() if linear.transposed else weight)
        return rounded

    @torch.no_grad()
    def settle(self, chain: Chain, index: int) -> None:
        """Rounds the weights of the loaded block ``index``."""
        for linear in chain.linears(index):
            if linear.name in self.linears and chain.owns(linear.weight_name):
                linear.assign(self._rounded(linear, linear.weight()))

    def _rounded(self, linear: LinearView, weight: Tensor) -> Tensor:
        exponents = exponents_of_text(self.linears[linear.name])
        exponents = None if exponents is None else exponents.to(weight.device)
        return on_grid(weight, self.values, linear.storage_dtype, exponents)
