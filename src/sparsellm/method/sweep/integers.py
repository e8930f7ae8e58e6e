"""Pruned linears whose values are integers times a scale while the parameters behind them are trained in fp32.

A step of a sweep is far smaller than a step of a grid, so few values change their integer. The scales are what a sweep
can fit: each group has a factor that is trained, too (EfficientQAT, arXiv 2407.11062, trains scales alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsellm.model import Chain
from sparsellm.model.structure import LinearView
from sparsepack.codes import exponents_of_text
from sparsepack.grid import Groups, on_grid

FACTORS = ".factors"  # behind the name of a weight: the factors of its groups


@dataclass(frozen=True)
class Integers:
    """The linears of a model whose values are rounded to grids, by name in ``values`` and ``exponents``."""

    chain: Chain
    values: Mapping[str, str]  # an integer type, or the name of another program's grid
    exponents: Mapping[str, str]  # exponents of columns, as records have them
    # by name of the weight; filled by factors()
    groups: dict[str, Groups] = field(default_factory=dict)

    def factors(self, index: int) -> dict[str, Tensor]:
        """Ones ``(out, groups)`` for the weights of these linears in the loaded block ``index``, by their names."""
        factors = {}
        for linear in self._of(index):
            weight = linear.weight()
            groups = Groups.of(weight, self.values[linear.name])
            self.groups[linear.weight_name] = groups
            of_a_row = len(groups.collect(weight)) // len(weight)
            factors[linear.weight_name + FACTORS] = weight.new_ones(
                len(weight), of_a_row
            )
        return factors

    def of(
        self, parameters: Mapping[str, nn.Parameter], index: int
    ) -> dict[str, nn.Parameter]:
        """The parameters on which block ``index`` runs: without factors, and with the weights of these linears rounded.
        The gradient at a rounded weight is taken for that of the weight behind it (straight-through)."""
        rounded = {
            name: parameter
            for name, parameter in parameters.items()
            if not name.endswith(FACTORS)
        }
        for linear in self._of(index):
            weight = _seen(linear, parameters[linear.weight_name].detach())
            factors = parameters[linear.weight_name + FACTORS].detach()
            groups = self.groups[linear.weight_name]
            weight = groups.spread(groups.collect(weight) * factors.reshape(-1, 1))
            rounded[linear.weight_name] = nn.Parameter(
                _seen(linear, self._rounded(linear, weight, groups))
            )
        return rounded

    def pull_back(
        self,
        parameters: Mapping[str, nn.Parameter],
        rounded: Mapping[str, nn.Parameter],
        index: int,
    ) -> None:
        """Sets the gradients of the factors of block ``index`` from those of its weights: the whole numbers of a group
        are held, so its values move together. ``rounded`` is what ``of`` made of ``parameters``."""
        for linear in self._of(index):
            name = linear.weight_name
            if (gradient := parameters[name].grad) is None:
                continue
            products = _seen(linear, gradient * rounded[name].detach())
            factors = parameters[name + FACTORS]
            sums = self.groups[name].collect(products).sum(dim=1)
            factors.grad = sums.view_as(factors).div_(factors.detach())

    @torch.no_grad()
    def settle(self, index: int) -> None:
        """Rounds the weights of the loaded block ``index``."""
        for linear in self._of(index):
            linear.assign(self._rounded(linear, linear.weight()))

    def _of(self, index: int) -> list[LinearView]:
        return [
            linear for linear in self.chain.linears(index) if linear.name in self.values
        ]

    def _rounded(
        self, linear: LinearView, weight: Tensor, groups: Groups | None = None
    ) -> Tensor:
        exponents = exponents_of_text(self.exponents[linear.name])
        exponents = None if exponents is None else exponents.to(weight.device)
        return on_grid(
            weight,
            self.values[linear.name],
            linear.storage_dtype,
            exponents,
            groups=groups,
        )


def _seen(linear: LinearView, matrix: Tensor) -> Tensor:
    """A matrix, transposed between the layout of its parameter and ``(out, in)`` where the linear stores ``Wᵀ``."""
    return matrix.t().contiguous() if linear.transposed else matrix
