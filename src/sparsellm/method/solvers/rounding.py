"""Kept values rounded to the grid of a packed integer type, each compensating the errors of others.

The error is ``‖(Ŵ − W) G^½‖²`` for the rounded weight Ŵ and its target W, the pruned or the dense weight. Columns of
large inputs take finer steps (AWQ, arXiv 2306.00978): powers of two near a power of the inputs' root mean square, the
one with the least error after rounding to nearest. Each group takes the scale with the least error in the diagonal of
G (``weight_grid``). Then three things lower the error in the metric of G itself:

1. Inputs are rounded one after another, and all after one make up for its error (GPTQ, arXiv 2210.17323). A descent
   from here ends lower than one from the nearest numbers.
2. The scales of a row's groups are solved for together, with the whole numbers held (``group_scales``).
3. Whole numbers move one after another, with the scales held (``descent``).

2 and 3 take turns, and neither raises the error of a row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsellm.method.gram import Factor, Gram
from sparsellm.method.solvers.descent import Descent, DescentOfLines
from sparsellm.method.solvers.weight_grid import WeightGrid, WeightLines, panel_kernel
from sparsellm.method.solvers.widths import ROUNDED_TOGETHER
from sparsepack.codes import EXPONENTS, powers_of
from sparsepack.grid import Groups, as_stored
from sparsepack.grids import LARGEST_FP16

# Rounding a linear takes as long as this many products of its weight with its Gram matrix: 80 in linears with 576
# inputs, 32 with 2048 to 5632.
PRODUCTS = 35

DAMPING = 0.1  # in units of the inputs' mean square: without it, values fit the text of calibration more than others
# How inputs go together differs from text to text, so without zeros the Gram matrix is drawn to its diagonal.
SHRINKAGE = 0.5
# powers of the inputs' root mean square tried after 0; 1 was worse
POWERS = (0.25, 0.5, 0.75)
JUDGES = 256  # rows of the weight that choose the power
# the least part of an error's cost that remains after compensation; fp32 does not resolve smaller ones
LEAST_SHARE = 1e-4


class Rounded(NamedTuple):
    """A weight on its grid."""

    weight: Tensor  # (out, in) fp32
    unrounded: Tensor  # (out, in) fp32: training goes on from these, the best values that are rounded to ``weight``
    exponents: Tensor | None  # int8 (in,), one for each column; None if all are 0
    notes: tuple[str, ...]


def rounded(
    weight: Tensor,
    gram: Gram,
    value_type: str,
    dtype: torch.dtype,
    *,
    fixed_mask: bool = False,
    target: Tensor | None = None,
) -> Rounded:
    """A pruned weight ``(out, in)`` with its values on the grid of an integer type, or on one of
    ``sparsepack.grids.GRIDS`` by its name, for a checkpoint in this dtype; zeros stay zero.
    It is fitted to ``target (out, in)``, or to the weight itself.

    With ``fixed_mask`` every value that is not 0 is kept. Otherwise one that is nearer to 0 than to its grid becomes 0,
    and the others make up for it. In a weight that is so full that it is packed dense, values may become 0 in any
    case. A NumericalError says that the Gram matrix cannot be factorised with any damping."""
    groups = Groups.of(weight, value_type)
    target = weight if target is None else target
    metric = _metric(gram, dense=groups.dense)
    # Other programs have no exponents of columns.
    powers = (
        torch.ones_like(metric.diagonal)
        if groups.grid is not None
        else _powers(weight, metric, groups, dtype)
    )
    if groups.dense:
        result = _fitted(weight, target, metric, powers, groups, dtype)
        if Groups.of(result.weight, value_type).dense:
            return result
        metric = _metric(gram, dense=False)
    # values that are nearer to 0 than to the smallest number of their grid
    if not fixed_mask:
        nearest = WeightGrid(
            weight, metric, powers, replace(groups, dense=False), dtype
        ).nearest
        weight = weight.masked_fill(weight.abs() < 0.5 * nearest.abs(), 0.0)
        groups = Groups.of(weight, value_type)
    return _fitted(weight, target, metric, powers, replace(groups, dense=False), dtype)


def _metric(gram: Gram, *, dense: bool) -> Gram:
    """``(1 − ρ) G + ρ diag(G) + λI``, in whose metric values are rounded. Inputs that no token reaches count too.

    The part towards the diagonal is shrinkage (Ledoit and Wolf, 2004; to unequal variances: Schäfer and Strimmer,
    2005). With zeros there is none: values make up for what the solver left, which fits G."""
    shrinkage = SHRINKAGE if dense else 0.0

    def damped() -> Gram:
        matrix = gram.matrix * (1 - shrinkage)
        added = shrinkage * gram.diagonal + DAMPING * gram.mean_diagonal
        matrix.diagonal().add_(added)
        return Gram(matrix, gram.tokens)

    return gram.remember(f"rounding, {shrinkage}", damped)


def _fitted(
    start: Tensor,
    target: Tensor,
    gram: Gram,
    powers: Tensor,
    groups: Groups,
    dtype: torch.dtype,
) -> Rounded:
    """The target ``(out, in)`` on the grid of ``start``, whose zeros it takes."""
    if groups.grid is not None and groups.grid.minima:
        return _on_lines(start, target, gram, groups, dtype)
    grid = WeightGrid(start, gram, powers, groups, dtype)
    first, notes = _one_after_another(grid, target, gram)
    weight, best, scales = Descent(grid, first, target, gram).run()
    unrounded = grid.within_cells(weight, best, scales)
    exponents = powers.log2().round_().to(torch.int8)
    return Rounded(
        weight, unrounded, exponents if bool(exponents.any()) else None, notes
    )


def _on_lines(
    start: Tensor, target: Tensor, gram: Gram, groups: Groups, dtype: torch.dtype
) -> Rounded:
    """``_fitted`` on a grid with minima.

    Numbers times scales are fitted to the target less the minima, in fp32; the sum is rounded to ``dtype`` at the end.
    """
    grid = WeightLines(start, gram, groups)
    goal = target - grid.spread(grid.minima)
    first, notes = _one_after_another(grid, goal, gram)
    descent = DescentOfLines(grid, first, target, gram)
    above, best, scales = descent.run()
    minima = grid.spread(descent.minima)
    weight = (above + minima).to(dtype).float().add_(0.0)
    unrounded = grid.near(weight, best + minima, scales, minima, dtype)
    return Rounded(weight, unrounded, None, notes)


def _powers(weight: Tensor, gram: Gram, groups: Groups, dtype: torch.dtype) -> Tensor:
    """Two to the power of each column's exponent, fp32 ``(in,)``: the values of a column are multiplied by it."""
    magnitudes = gram.scale.log2()  # 0 for dead inputs
    magnitudes = torch.where(
        gram.dead, 0.0, magnitudes - magnitudes.sum() / (~gram.dead).sum().clamp(min=1)
    )
    judges = weight[:: max(1, len(weight) // JUDGES)]
    best = torch.ones_like(magnitudes)
    least = magnitudes.new_full((), math.inf, dtype=torch.float64)
    fits = torch.ones_like(least, dtype=torch.bool)
    for power in (0.0, *POWERS):
        exponents = (
            (-power * magnitudes).round_().clamp_(EXPONENTS.start, EXPONENTS.stop - 1)
        )
        powers = powers_of(exponents.to(torch.int8))
        # every number of the grid must be one of fp16, in any column
        if power and dtype == torch.float16:
            ends = groups.collect((weight / powers).abs()).amax(1) * groups.collect(
                powers.expand_as(weight)
            ).amax(1)
            fits &= ends.max() <= LARGEST_FP16
        error = gram.energy(
            WeightGrid(judges, gram, powers, groups, dtype).nearest, minus=judges
        )
        # chosen without a read, for which a GPU would wait
        better = fits & (error < least)
        best = torch.where(better, powers, best)
        least = torch.where(better, error, least)
    return best


def _one_after_another(
    grid: WeightGrid, target: Tensor, gram: Gram
) -> tuple[Tensor, tuple[str, ...]]:
    """The target ``(out, in)`` rounded input by input, with later inputs compensating each error; and notes.

    With ``UᵀU = (G + λI)⁻¹`` the best change of the later inputs for an error ``e_j`` of one is ``−(e_j / U_jj) U_jk``
    (arXiv 2210.17323, section 3). Inputs with the largest mean square come first, while there are most to make up."""
    order, factor = _ordered(gram)
    columns = target.T[order]  # (in, out), a copy
    # anchors and zeros are what they are
    result = torch.where(grid.free, 0.0, grid.nearest).T[order]
    scales = grid.scales(grid.first).T[order]
    free = grid.free.T[order].to(target.dtype)
    kernel = panel_kernel(grid)
    for start in range(0, len(columns), ROUNDED_TOGETHER):
        rows = slice(start, start + ROUNDED_TOGETHER)
        upper = factor.matrix[rows, rows].contiguous()
        if kernel is not None:
            parts = (columns[rows], result[rows], scales[rows], free[rows], upper)
            errors, _ = kernel(parts, first=True)
        else:
            errors = torch.zeros_like(columns[rows])
            for number, place in enumerate(range(start, start + len(errors))):
                goal = torch.addmv(
                    columns[place], errors[:number].T, upper[:number, number], alpha=-1
                )
                value = as_stored(
                    grid.numbers(goal, scales[place]), scales[place], grid.dtype
                )
                result[place].add_(value.mul_(free[place]))
                torch.sub(goal, result[place], out=errors[number]).div_(
                    upper[number, number]
                )
        columns[start + ROUNDED_TOGETHER :].addmm_(
            factor.matrix[rows, start + ROUNDED_TOGETHER :].T, errors, alpha=-1
        )
    del columns, scales, free
    return torch.empty_like(result).index_copy_(
        0, order, result
    ).T.contiguous(), factor.notes


def _ordered(gram: Gram) -> tuple[Tensor, Factor]:
    """The inputs by their mean square, the largest first, and the inverse Cholesky factor in that order."""

    def made() -> tuple[Tensor, Factor]:
        order = gram.diagonal.argsort(descending=True, stable=True)
        ordered = Gram(gram.matrix[order][:, order], gram.tokens)
        return order, ordered.inverse_cholesky(DAMPING)

    return gram.remember("ordered", made)


def uncompensated(gram: Gram, *, dense: bool) -> Tensor:
    """The cost of an error of each input, ``(in,)``, after the later inputs have made up for it. It takes the place of
    the input's mean square. ``dense`` says that the weight has no zeros.

    ``_one_after_another`` answers an error of input j by a change of the later ones, along row ``u_j`` of the factor U.
    In units of ``U_jj``, an error ``e_j`` then costs ``e_j² u_j G u_jᵀ``. By the definition of U,
    ``u_j ((1 − ρ) G + D) u_jᵀ`` is 1, where the diagonal D is what ``_metric`` and the damping of the factor add. So
    the cost is ``e_j² (1 − u_j D u_jᵀ) / (1 − ρ)``.

    Summed over values that are rounded to nearest, these costs are above the error that ``rounded`` reaches, by the
    same share for all types: what its descent gains."""
    shrinkage = SHRINKAGE if dense else 0.0
    damped = _metric(gram, dense=dense)
    order, factor = _ordered(damped)
    upper = factor.matrix
    ridge = DAMPING * gram.mean_diagonal + factor.damping * damped.mean_diagonal
    added = shrinkage * gram.diagonal[order] + ridge
    share = (1 - upper.square() @ added) / (1 - shrinkage)
    share.clamp_(min=LEAST_SHARE)
    costs = torch.empty_like(gram.diagonal)
    costs[order] = share / upper.diagonal().square()
    return costs


def to_nearest(
    weight: Tensor, costs: Tensor, value_type: str, dtype: torch.dtype
) -> Tensor:
    """A weight ``(out, in)`` with its values rounded to nearest on the grid of a type. Its groups take the scales with
    the least error, where an error of input j costs ``costs_j (in,)``."""
    gram = Gram(costs.diag(), 1)
    groups = Groups.of(weight, value_type)
    if groups.grid is not None and groups.grid.minima:
        lines = WeightLines(weight, gram, groups)
        return lines.nearest + lines.spread(lines.minima)
    return WeightGrid(weight, gram, torch.ones_like(costs), groups, dtype).nearest
