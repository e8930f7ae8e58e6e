"""Kept values rounded to the grid of a packed integer type, each making up for the others.

The error is ``‖(Ŵ − W) G^½‖²`` for a pruned weight W and its rounded one Ŵ. Columns of large inputs take finer steps
(AWQ, arXiv 2306.00978): their exponents are those of a power of the inputs' root mean square, the power with the least
error after rounding to nearest. Each group takes the scale with the least error in the diagonal of G. Then cyclic
coordinate descent (QuantEase, arXiv 2309.01885) moves one input of all outputs at a time: with the others held, the
best value of ``ŵ_j`` is ``ŵ_j − ((Ŵ − W) G)_j / G_jj``, and the number of the grid that is nearest to it is optimal. So
the error never rises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.packed.codes import EXPONENTS, anchors, powers_of, whole_numbers
from sparsellm.packed.grid import Groups, as_stored, on_grid, scales_of
from sparsellm.registry import Workspace
from sparsellm.statistics import Gram

ROUNDING = Workspace(weights=15, grams=1.5, products=6)

FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # of the largest magnitude: beyond, clipped
PASSES = 8  # of the descent
ENOUGH = 3e-3  # a pass that lowers the error by less than this part of it is the last
BLOCK = 64  # inputs whose errors are carried to the others together
POWERS = (0.25, 0.5, 0.75)  # of the inputs' root mean square that are tried beside 0, in this order
JUDGES = 256  # rows of the weight that choose the power
CELL = 0.48  # how far an unrounded value may lie from its number of the grid, as a part of its distance from the next


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight on its grid.

    Attributes:
        weight: ``(out, in)`` fp32.
        unrounded: ``(out, in)`` fp32: the best value of each weight with all others at theirs, within the cell that
            rounds to ``weight``. It is where training goes on.
        exponents: int8 ``(in,)``, of the columns; None if all are 0.
    """

    weight: Tensor
    unrounded: Tensor
    exponents: Tensor | None


def rounded(weight: Tensor, gram: Gram, value_type: str, dtype: torch.dtype, *, fixed_mask: bool = False) -> Rounded:
    """The weight with its values on the grid of a packed integer type; zeros stay zero.

    All processes call it with the same arguments and get the same result.

    Args:
        weight: ``(out, in)`` fp32, pruned.
        gram: of its inputs.
        value_type: ``int8``, ``int4`` or ``int3``.
        dtype: of the checkpoint that it is written to.
        fixed_mask: keep every value that is not 0. Otherwise one that is nearer to 0 than to its grid becomes 0, and
            the others make up for it.
    """
    groups, kind = Groups.of(weight, value_type), _Kind(value_type, dtype)
    powers = _powers(weight, gram, groups, kind)
    if groups.dense:
        chosen = _Choice(weight, gram, powers, groups, kind)
        final, best = _Descent(chosen, weight, gram).run()
        groups = Groups.of(final, value_type)
    if not groups.dense:
        start = weight if fixed_mask else _without_small(weight, gram, powers, kind)
        chosen = _Choice(start, gram, powers, replace(Groups.of(start, value_type), dense=False), kind)
        final, best = _Descent(chosen, weight, gram).run()
    found = parallel.broadcast_(final.contiguous())
    unrounded = parallel.broadcast_(chosen.within_cells(final, best).contiguous())
    exponents = powers.log2().round_().to(torch.int8)
    return Rounded(found, unrounded, exponents if bool(exponents.any()) else None)


@dataclass(frozen=True)
class _Kind:
    """The packed type, and the dtype of the checkpoint."""

    values: str
    dtype: torch.dtype


def _powers(weight: Tensor, gram: Gram, groups: Groups, kind: _Kind) -> Tensor:
    """Two to the power of each column's exponent, fp32 ``(in,)``: the values of a column are multiplied by it."""
    magnitudes = gram.scale.log2()  # 0 for dead inputs
    magnitudes = torch.where(gram.dead, 0.0, magnitudes - magnitudes.sum() / (~gram.dead).sum().clamp(min=1))
    judges = weight[:: max(1, len(weight) // JUDGES)]
    found, least = torch.ones_like(magnitudes), math.inf
    for power in (0.0, *POWERS):
        exponents = (-power * magnitudes).round_().clamp_(EXPONENTS.start, EXPONENTS.stop - 1)
        tried = powers_of(exponents.to(torch.int8))
        error = gram.energy(_Choice(judges, gram, tried, groups, kind).nearest, minus=judges)
        if error < least:
            found, least = tried, error
    return parallel.broadcast_(found)


class _Choice:
    """The grid of a weight: scales and anchors of its groups, and the weight rounded to nearest.

    Args:
        weight: ``(out, in)`` fp32.
        gram: of its inputs.
        powers: of two, one for each column.
        groups: of the weight.
        kind: the type.
    """

    def __init__(self, weight: Tensor, gram: Gram, powers: Tensor, groups: Groups, kind: _Kind) -> None:
        self.kind, self.powers, self.levels, self.zero = kind, powers, groups.levels, groups.dense
        units = groups.collect(powers.expand_as(weight))
        grouped = groups.collect(weight / powers)
        curvature = groups.collect((gram.diagonal.clamp(min=1e-30) * powers.square()).expand_as(weight))
        places = anchors(grouped)
        extreme, unit = grouped.gather(1, places), units.gather(1, places)  # (groups, 1)
        least = torch.full_like(extreme, math.inf)
        scales = torch.zeros_like(extreme)
        for fraction in FRACTIONS:
            tried = scales_of(extreme * fraction, self.levels, kind.dtype, unit)
            error = whole_numbers(grouped, tried, self.levels, zero=self.zero).mul_(tried).sub_(grouped)
            error = error.square_().mul_(curvature).sum(dim=1, keepdim=True)
            scales, least = torch.where(error < least, tried, scales), torch.minimum(error, least)
        whole = whole_numbers(grouped, scales, self.levels, zero=self.zero)
        free = (grouped != 0).scatter_(1, places, False).to(weight.dtype)
        self.free = groups.spread(free) != 0  # (out, in) bool: neither zero nor an anchor
        self.scales = groups.spread(scales * units)  # (out, in)
        self.nearest = as_stored(groups.spread(whole), self.scales, kind.dtype)  # (out, in)

    def within_cells(self, weight: Tensor, best: Tensor) -> Tensor:
        """``best``, moved as near to ``weight`` as it must be to be rounded to it, with the same scales."""
        reach, end = CELL * self.levels.closest * self.scales.abs(), -self.levels.lowest * self.scales.abs()
        moved = weight + (best - weight).clamp(-reach, reach)
        moved = torch.where(self.free, moved.clamp(-end, end), weight).to(self.kind.dtype).float()
        # A coarse dtype may itself round to another number of the grid.
        again = on_grid(moved, self.kind.values, self.kind.dtype, self.powers.log2().to(torch.int8))
        return torch.where(again == weight, moved, weight)


def _without_small(weight: Tensor, gram: Gram, powers: Tensor, kind: _Kind) -> Tensor:
    """The weight without the values that are nearer to 0 than to the smallest number of their grid."""
    groups = replace(Groups.of(weight, kind.values), dense=False)
    nearest = _Choice(weight, gram, powers, groups, kind).nearest
    return weight.masked_fill(weight.abs() < 0.5 * nearest.abs(), 0.0)


class _Descent:
    """Coordinate descent over the free values of a weight, on transposed matrices ``(in, out)``."""

    def __init__(self, choice: _Choice, target: Tensor, gram: Gram) -> None:
        self.choice, self.matrix, self.target, self.gram = choice, gram.matrix, target, gram
        self.columns = choice.nearest.T.contiguous()
        self.scales = choice.scales.T.contiguous()
        self.free = choice.free.T.to(self.columns.dtype).contiguous()
        self.inverse = torch.where(choice.free, 1 / choice.scales, 0.0).T.contiguous()
        self.slope = self.matrix @ (choice.nearest - target).T.contiguous()  # half the gradient of the error

    def run(self) -> tuple[Tensor, Tensor]:
        """The weight with the least error found, and the best value of each of its entries with all others held."""
        error = before = self.gram.energy(self.choice.nearest, minus=self.target)
        for _ in range(PASSES):
            gained = sum(self._block(start) for start in range(0, len(self.columns), BLOCK))
            error -= gained
            if gained <= ENOUGH * max(error, 0.0):
                break
        final = self.columns.T.contiguous()
        if self.gram.energy(final, minus=self.target) > before:  # rounding errors of the slopes, at the optimum
            final = self.choice.nearest
        curvature = self.matrix.diagonal()[:, None]
        best = torch.where(curvature > 0, self.columns - self.slope / curvature, self.columns)
        return final, best.T.contiguous()

    def _block(self, start: int) -> float:
        """Moves some inputs one after another, then corrects the slopes of all; returns by how much the error fell."""
        rows = slice(start, min(start + BLOCK, len(self.columns)))
        inner = self.matrix[rows, rows].contiguous()
        moves = torch.zeros_like(self.columns[rows])
        gained = self.columns.new_zeros(self.columns.shape[1])
        levels, zero, dtype = self.choice.levels, self.choice.zero, self.choice.kind.dtype
        parts = (each[rows].unbind() for each in (self.columns, self.slope, self.scales, self.free, self.inverse))
        # Few operations a column, on views made in advance: on narrow weights the calls take the time.
        for number, (column, slope, scales, free, inverse) in enumerate(zip(*parts, strict=True)):
            curvature = float(inner[number, number])
            if curvature <= 0:
                continue  # no token reaches it: nearest is as good as any
            slope = torch.addmv(slope, moves[:number].T, inner[number, :number])
            units = column.add(slope, alpha=-1 / curvature).mul_(inverse)  # 0 where not free
            value = as_stored(levels.nearest(units, zero=zero), scales, dtype)
            move = (value - column).mul_(free)
            gain = slope.mul_(2).add_(move, alpha=curvature).mul_(move)  # negative where the error falls
            torch.mul(move, gain < 0, out=moves[number])
            column.copy_(torch.where(gain < 0, value, column))  # adding the move may miss the grid by an ulp
            gained -= gain.clamp_(max=0)
        self.slope.addmm_(self.matrix[:, rows], moves)
        return float(gained.double().sum())
