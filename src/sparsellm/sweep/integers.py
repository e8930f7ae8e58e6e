"""Pruned linears whose values are integers times a scale while the parameters behind them are trained in fp32."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sparsellm.chain import Chain
from sparsellm.packed.grid import on_grid


@dataclass(frozen=True)
class Integers:
    """The linears of a model whose values are rounded to the grid of a packed type.

    Attributes:
        values: the type.
        linears: names of the linears.
    """

    values: Literal["int8", "int4"]
    linears: Collection[str]

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
                weight = on_grid(weight, self.values, linear.storage_dtype)
                rounded[linear.weight_name] = nn.Parameter(weight.t().contiguous() if linear.transposed else weight)
        return rounded

    @torch.no_grad()
    def settle(self, chain: Chain, index: int) -> None:
        """Rounds the weights of the loaded block ``index``."""
        for linear in chain.linears(index):
            if linear.name in self.linears and chain.owns(linear.weight_name):
                linear.assign(on_grid(linear.weight(), self.values, linear.storage_dtype))
