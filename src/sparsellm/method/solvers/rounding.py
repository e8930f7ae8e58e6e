"""Kept values rounded to the grid of a packed integer type, each compensating the errors of others.

The error is ``‖(Ŵ − W) G^½‖²`` for the rounded weight Ŵ and its target W, the pruned or the dense weight. Columns of
large inputs take finer steps (AWQ, arXiv 2306.00978): powers of two near a power of the inputs' root mean square, the
one with the least error after rounding to nearest. Each group takes the scale with the least error in the diagonal of
G. Then three things lower the error in the metric of G itself:

1. Inputs are rounded one after another, and all after one make up for its error (GPTQ, arXiv 2210.17323). A descent
   from here ends lower than one from the nearest numbers.
2. The scales of a row's groups are solved for together, with the whole numbers held: least squares.
3. Cyclic coordinate descent (QuantEase, arXiv 2309.01885) moves one input of all outputs at a time: with the others
   held, the best value of ``ŵ_j`` is ``ŵ_j − ((Ŵ − W) G)_j / G_jj``, and the nearest number of the grid is optimal.

2 and 3 take turns, and neither raises the error of a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsellm.method.gram import Factor, Gram
from sparsellm.method.solvers.kernels import kernels_for
from sparsellm.method.solvers.widths import ROUNDED_TOGETHER
from sparsepack import native
from sparsepack.codes import EXPONENTS, anchors, powers_of, whole_numbers
from sparsepack.grid import (
    FEW,
    Groups,
    as_stored,
    in_units,
    on_grid_of,
    scales_of,
    split,
)
from sparsepack.grids import LARGEST_FP16, LEAST
from sparsepack.minima import lines_of, numbers_of

# Rounding a linear takes as long as this many products of its weight with its Gram matrix: 80 in linears with 576
# inputs, 32 with 2048 to 5632.
PRODUCTS = 35

# anchor / largest magnitude; values beyond are clipped
FRACTIONS = tuple(step / 20 for step in range(20, 9, -1))
DAMPING = 0.1  # in units of the inputs' mean square: without it, values fit the text of calibration more than others
# How inputs go together differs from text to text, so without zeros the Gram matrix is drawn to its diagonal.
SHRINKAGE = 0.5
ROUNDS = 3  # turns of scales and numbers; the error falls with each, the third time by little
ENDS = 6  # fractions that are tried for each end of a group with a minimum
RIDGE = 1e-3  # added to the diagonal of the systems of scales, as a share of it: rows hardly tell some groups apart
# bounds of the change of a scale in a turn, for systems that are nearly singular
FACTORS = (0.5, 2.0)
SYSTEMS = 1 << 22  # elements of the systems that are solved at once: 16 MiB
PASSES = 8  # most passes of the descent in a turn; few weights need as many
ENOUGH = 1e-2  # a pass that lowers the error by less than this share of it is the last
WIDE = 256  # inputs whose moves reach all others by one product, which is twice as fast as by four
# powers of the inputs' root mean square tried after 0; 1 was worse
POWERS = (0.25, 0.5, 0.75)
JUDGES = 256  # rows of the weight that choose the power
# the least part of an error's cost that remains after compensation; fp32 does not resolve smaller ones
LEAST_SHARE = 1e-4
CELL = 0.48  # how far an unrounded value may lie from its number of the grid, as a share of its distance from the next


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
        nearest = _Grid(
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
    grid = _Grid(start, gram, powers, groups, dtype)
    first, notes = _one_after_another(grid, target, gram)
    weight, best, scales = _Descent(grid, first, target, gram).run()
    unrounded = grid.within_cells(weight, best, scales)
    exponents = powers.log2().round_().to(torch.int8)
    return Rounded(
        weight, unrounded, exponents if bool(exponents.any()) else None, notes
    )


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
            _Grid(judges, gram, powers, groups, dtype).nearest, minus=judges
        )
        # chosen without a read, for which a GPU would wait
        better = fits & (error < least)
        best = torch.where(better, powers, best)
        least = torch.where(better, error, least)
    return best


class _Grid:
    """The grid of a weight ``(out, in)``: scales and anchors of its groups, and the weight rounded to nearest."""

    def __init__(
        self,
        weight: Tensor,
        gram: Gram,
        powers: Tensor,
        groups: Groups,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.powers = powers
        self.groups = groups
        grouped = groups.collect(weight / powers)
        curvature = groups.collect(
            (gram.diagonal.clamp(min=1e-30) * powers.square()).expand_as(weight)
        )
        places = anchors(grouped)
        extreme = grouped.gather(1, places)  # (groups, 1)
        # (groups, 1): powers of the anchors
        self.units = groups.collect(powers.expand_as(weight)).gather(1, places)

        def scales_at(fraction: float) -> Tensor:
            return scales_of(extreme * fraction, groups, dtype, self.units)

        # (groups, 1): scales to begin with, without the powers of columns
        self.first = self._best(scales_at(1.0), scales_at, grouped, curvature)
        if groups.parts:
            self.first = self._whole_parts(grouped, extreme, curvature)
        free = torch.ones_like(grouped)
        if groups.grid is None or 0 in groups.levels.numbers:
            free = (grouped != 0).to(weight.dtype)
        # (out, in) bool: neither a zero that stays nor an anchor
        self.free = groups.spread(free.scatter_(1, places, 0.0)) != 0
        self.nearest = as_stored(
            groups.spread(groups.numbers(grouped, self.first, places)),
            self.scales(self.first),
            dtype,
        )

    def _best(
        self,
        best: Tensor,
        scales_at: Callable[[float], Tensor],
        grouped: Tensor,
        curvature: Tensor,
    ) -> Tensor:
        """The scales ``(groups, 1)`` with the least error, of those at all ``FRACTIONS``; ``best`` where no error is
        finite."""
        least = torch.full_like(best, math.inf)
        for fraction in FRACTIONS:
            scales = scales_at(fraction)
            values = self.numbers(grouped, scales).mul_(scales)
            error = _error(values, grouped, curvature)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
        return best

    def _whole_parts(
        self, grouped: Tensor, extreme: Tensor, curvature: Tensor
    ) -> Tensor:
        """The best scales that are whole numbers of units, which follow from the first scales; arguments and result as
        in the constructor."""
        groups = self.groups
        grid = groups.grid
        assert grid is not None
        lowest = groups.levels.lowest
        first = scales_of(self.first * lowest, groups, self.dtype)
        units, steps = split(first, grid)
        # The unit is read off the widest part, so that part keeps its scale, and no other may become wider. It has the
        # lowest scale, but for a small unit, which was rounded up in fp16.
        widest = steps.abs().amax(dim=1, keepdim=True)
        fixed = steps.abs() == widest

        def scales_at(fraction: float) -> Tensor:
            near = in_units((extreme * fraction / lowest).view_as(steps), units, grid)
            near = near.clamp(-widest, widest)
            return torch.where(fixed, steps, near).mul_(units).view_as(first)

        return self._best(first, scales_at, grouped, curvature)

    def numbers(self, values: Tensor, scales: Tensor) -> Tensor:
        """The numbers of the grid that are nearest to these values."""
        return whole_numbers(values, scales, self.groups.levels, zero=self.groups.dense)

    def spread(self, of_groups: Tensor) -> Tensor:
        """A matrix ``(out, in)`` from what groups have: one value, ``(groups, 1)``, or one for each column."""
        return self.groups.spread(of_groups.expand(-1, self.groups.size))

    def scales(self, scales: Tensor) -> Tensor:
        """The scale of each value, ``(out, in)``, from those of groups ``(groups, 1)``."""
        return self.spread(scales).mul_(self.powers)

    def within_cells(self, weight: Tensor, best: Tensor, scales: Tensor) -> Tensor:
        """``best``, moved so near to ``weight`` that it is rounded to it, with these scales of groups."""
        levels = self.groups.levels
        scales = self.scales(scales).abs_()
        reach = CELL * levels.closest * scales
        if self.groups.grid is not None:
            # Where anchors are not at the lowest number, scales follow from all values.
            reach = torch.where(scales < FEW * LEAST, 0.0, reach)
        end = -levels.lowest * scales
        moved = weight + (best - weight).clamp(-reach, reach)
        return self.kept(moved.clamp(-end, end), weight, self.dtype)

    def kept(self, moved: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``moved`` in ``dtype``, with the values of ``weight`` where they are not free, or where ``moved`` would be
        rounded to others."""
        moved = torch.where(self.free, moved, weight).to(dtype).float()
        # A coarse dtype may itself round to another number of the grid.
        rounded = on_grid_of(self.groups, moved, dtype, self.powers)
        return torch.where(rounded == weight, moved, weight)


def _error(values: Tensor, grouped: Tensor, curvature: Tensor) -> Tensor:
    """The error of groups, ``(groups, 1)``, if their values ``(groups, size)`` become ``values``, in the diagonal of G,
    the ``curvature``. Overwrites ``values``."""
    errors = values.sub_(grouped).square_().mul_(curvature)
    return errors.sum(dim=1, keepdim=True)


def _one_after_another(
    grid: _Grid, target: Tensor, gram: Gram
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
    kernel = _kernel(grid)
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
        lines = _Lines(weight, gram, groups)
        return lines.nearest + lines.spread(lines.minima)
    return _Grid(weight, gram, torch.ones_like(costs), groups, dtype).nearest


def _kernel(grid: _Grid) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The compiled loop over the inputs of a panel, for this grid; None where there is only torch, whose calls would
    take most of the time."""
    device = grid.free.device
    if device.type == "cpu":
        compiled = native if native.available() is not None else None
    else:
        compiled = kernels_for(device)
    if compiled is None:
        return None
    return partial(
        compiled.round_panel,
        levels=grid.groups.levels,
        dtype=grid.dtype,
        zero=grid.groups.dense,
    )


class _Descent:
    """Scales and numbers of a weight in turn, each with the other held; on transposed matrices ``(in, out)``."""

    def __init__(self, grid: _Grid, start: Tensor, target: Tensor, gram: Gram) -> None:
        self.grid = grid
        self.matrix = gram.matrix
        self.target = target.T.contiguous()
        self.scales = grid.first  # (groups, 1)
        self.columns = start.T.contiguous()
        self.free = grid.free.T.to(self.columns.dtype).contiguous()
        # half the gradient of the error
        self.slope = self.matrix @ (self.columns - self.target)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight ``(out, in)``, the best value of each entry with all others held, and the scales of groups."""
        for _ in range(ROUNDS):
            self._fit_scales()
            self._fit_numbers()
        best = self.columns - self.slope / self.matrix.diagonal()[:, None]
        return self.columns.T.contiguous(), best.T.contiguous(), self.scales

    def _fit_scales(self) -> None:
        """Takes the best scales for the numbers, in the rows where ``_take`` finds a lower error."""
        grid = self.grid
        factors = best_factors(
            self.columns.T, self.slope.T, self.matrix, grid.groups
        ).view_as(self.scales)
        scales = scales_of(
            self.scales * factors * grid.groups.levels.lowest,
            grid.groups,
            grid.dtype,
            grid.units,
        )
        if grid.groups.grid is not None and not grid.groups.parts:
            # A small scale, whose anchor may not be at the lowest number, stays.
            scales = torch.where(self.scales.abs() < FEW * LEAST, self.scales, scales)
        self._take(scales, self.target)

    def _take(self, scales: Tensor, target: Tensor) -> Tensor:
        """Takes scales, for the same numbers and this target ``(in, out)``, in the rows whose error is lower as they
        are stored. Returns the groups of all other rows, bool ``(groups, 1)``."""
        grid = self.grid
        numbers = grid.numbers(self.columns, grid.scales(self.scales).T.contiguous())
        columns = as_stored(numbers, grid.scales(scales).T, grid.dtype)
        gaps = columns - target
        slope = self.matrix @ gaps
        worse = ~(gaps.mul_(slope).sum(dim=0) < self._errors())  # (out,)
        self.columns = torch.where(worse, self.columns, columns)
        self.slope = torch.where(worse, self.slope, slope)
        of_groups = worse.repeat_interleave(len(scales) // len(worse))[:, None]
        self.scales = torch.where(of_groups, self.scales, scales)
        return of_groups

    def _errors(self) -> Tensor:
        """The error of each row of the weight, ``(out,)``."""
        return (self.columns - self.target).mul_(self.slope).sum(dim=0)

    def _fit_numbers(self) -> None:
        """Passes of coordinate descent over the free values."""
        scales = self.grid.scales(self.scales).T.contiguous()
        inverse = (self.free / scales).masked_fill_(scales == 0, 0.0)
        before = self._errors().double().sum()
        for number in range(PASSES):
            gains = self._pass(scales, inverse)
            # One read for all: a GPU would wait for each.
            first, *known = torch.stack([before, *gains]).tolist()
            if number == 0:
                error = first
            gained = sum(known)
            error -= gained
            if gained <= ENOUGH * max(error, 0.0):
                break

    def _pass(self, scales: Tensor, inverse: Tensor) -> list[Tensor]:
        """Moves all inputs one after another, and corrects the slopes. Returns by how much each panel of inputs lowered
        the error, fp64 ``()``."""
        gains = []
        kernel = _kernel(self.grid)
        for start in range(0, len(self.columns), WIDE):
            several = slice(start, start + WIDE)
            moves = []
            for first in range(
                start, min(start + WIDE, len(self.columns)), ROUNDED_TOGETHER
            ):
                rows = slice(first, first + ROUNDED_TOGETHER)
                inner = self.matrix[rows, rows].contiguous()
                if kernel is None:
                    moved, gained = self._move(rows, inner, scales, inverse)
                else:
                    parts = (
                        self.slope[rows],
                        self.columns[rows],
                        scales[rows],
                        self.free[rows],
                        inner,
                    )
                    moved, gained = kernel(parts, first=False)
                self.slope[several].addmm_(self.matrix[several, rows], moved)
                moves.append(moved)
                gains.append(gained.double().sum())
            moved = torch.cat(moves)
            for others in (slice(0, start), slice(start + WIDE, None)):
                self.slope[others].addmm_(self.matrix[others, several], moved)
        return gains

    def _move(
        self, rows: slice, inner: Tensor, scales: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Moves the inputs ``rows`` one after another. Returns their moves, and by how much the error of each output
        fell."""
        moves = torch.zeros_like(self.columns[rows])
        gained = self.columns.new_zeros(self.columns.shape[1])
        levels = self.grid.groups.levels
        zero = self.grid.groups.dense
        dtype = self.grid.dtype
        views = (
            part[rows].unbind()
            for part in (self.columns, self.slope, scales, self.free, inverse)
        )
        # Few operations a column, on views made in advance: on narrow weights the calls take the time.
        columns = zip(inner.diagonal().tolist(), *views, strict=True)
        for number, (curvature, column, slope, scale, free, inverted) in enumerate(
            columns
        ):
            slope = torch.addmv(slope, moves[:number].T, inner[number, :number])
            # 0 where not free
            units = column.add(slope, alpha=-1 / curvature).mul_(inverted)
            value = as_stored(levels.nearest(units, zero=zero), scale, dtype)
            move = (value - column).mul_(free)
            # negative where the error falls
            gain = slope.mul_(2).add_(move, alpha=curvature).mul_(move)
            torch.mul(move, gain < 0, out=moves[number])
            # adding the move may miss the grid by an ulp
            column.copy_(torch.where(gain < 0, value, column))
            gained -= gain.clamp_(max=0)
        return moves, gained


def _on_lines(
    start: Tensor, target: Tensor, gram: Gram, groups: Groups, dtype: torch.dtype
) -> Rounded:
    """``_fitted`` on a grid with minima.

    Numbers times scales are fitted to the target less the minima, in fp32; the sum is rounded to ``dtype`` at the end.
    """
    grid = _Lines(start, gram, groups)
    goal = target - grid.spread(grid.minima)
    first, notes = _one_after_another(grid, goal, gram)
    descent = _DescentOfLines(grid, first, target, gram)
    above, best, scales = descent.run()
    minima = grid.spread(descent.minima)
    weight = (above + minima).to(dtype).float().add_(0.0)
    unrounded = grid.near(weight, best + minima, scales, minima, dtype)
    return Rounded(weight, unrounded, None, notes)


class _Lines(_Grid):
    """A grid with minima. Its ``nearest`` weight lacks them, as all values that are moved do."""

    def __init__(self, weight: Tensor, gram: Gram, groups: Groups) -> None:
        grid = groups.grid
        assert grid is not None
        self.grid = grid
        self.dtype = torch.float32
        self.groups = groups
        self.powers = torch.ones_like(gram.diagonal)
        grouped = groups.collect(weight)
        curvature = groups.collect(gram.diagonal.clamp(min=1e-30).expand_as(weight))
        lowest = grouped.amin(1, keepdim=True).clamp_(max=0)
        highest = grouped.amax(1, keepdim=True)
        scales = (highest - lowest) / grid.highest
        minima = lowest
        least = torch.full_like(lowest, math.inf)
        for below, above in itertools.product(FRACTIONS[:ENDS], repeat=2):
            end = lowest * below
            steps = (highest * above - end) / grid.highest
            steps, depths = lines_of(steps, end, grid)
            values = numbers_of(grouped, steps, depths, grid).mul_(steps).add_(depths)
            error = _error(values, grouped, curvature)
            scales = torch.where(error < least, steps, scales)
            minima = torch.where(error < least, depths, minima)
            least = torch.minimum(error, least)
        self.first, self.minima = lines_of(scales, minima, grid)
        numbers = numbers_of(grouped, self.first, self.minima, grid)
        self.nearest = self.spread(numbers * self.first)
        free = torch.ones_like(grouped)
        free.scatter_(1, grouped.argmax(1, keepdim=True), 0.0)
        # A group without a minimum has no value that stands for it.
        ends = (self.minima == 0).to(free.dtype)
        places = grouped.argmin(1, keepdim=True)
        free.scatter_(1, places, torch.minimum(free.gather(1, places), ends))
        self.free = groups.spread(free) != 0

    def near(
        self,
        weight: Tensor,
        best: Tensor,
        scales: Tensor,
        minima: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """``within_cells``, for these scales ``(groups, 1)`` and minima ``(out, in)``."""
        steps = self.spread(scales)
        moved = weight + (best - weight).clamp(-CELL * steps, CELL * steps)
        highest = minima + self.grid.highest * steps
        return self.kept(moved.maximum(minima).minimum(highest), weight, dtype)


class _DescentOfLines(_Descent):
    """Scales and minima, and numbers, in turn. ``columns`` and ``target`` lack the minima."""

    grid: _Lines

    def __init__(
        self, grid: _Lines, start: Tensor, complete: Tensor, gram: Gram
    ) -> None:
        self.minima = grid.minima  # (groups, 1)
        self.complete = complete  # the target with the minima
        super().__init__(grid, start, complete - grid.spread(grid.minima), gram)

    def _fit_scales(self) -> None:
        """Takes the best scales and minima for the numbers, in the rows where ``_take`` finds a lower error. A group
        without a minimum gets none."""
        grid = self.grid
        factors, minima = best_lines(
            self.columns.T, self.slope.T, self.matrix, grid.groups, self.minima
        )
        scales, minima = lines_of(self.scales * factors, minima, grid.grid)
        target = (self.complete - grid.spread(minima)).T.contiguous()
        worse = self._take(scales, target)
        self.minima = torch.where(worse, self.minima, minima)
        self.target = (self.complete - grid.spread(self.minima)).T.contiguous()


def best_factors(
    weight: Tensor, slope: Tensor, matrix: Tensor, groups: Groups
) -> Tensor:
    """Least-squares scale factor of each group of a weight ``(out, in)``: ``(out, groups)``.

    With the groups of a row as vectors ``v_a``, the factors ``1 + t`` solve ``A t = −s`` with ``A_ab = v_aᵀ G v_b`` and
    ``s_a`` the ``slope`` along ``v_a``: half the gradient of the error, ``(Ŵ − W) G``, for G the ``matrix``. A small
    ridge keeps them near 1 where the rows hardly tell groups apart."""
    count = len(groups.collect(weight[:1]))  # groups of a row
    rows = max(1, SYSTEMS // max(count**2, weight.shape[1]))
    changes = []
    for top in range(0, len(weight), rows):
        # columns of a transposed one would be far apart
        part = weight[top : top + rows].contiguous()
        system = part.new_zeros(len(part), count, count)
        for number in range(count):
            first = number * groups.size
            inside = slice(first, first + groups.size)
            # The system is symmetric: products with the columns of earlier groups are known.
            products = (part[:, inside] @ matrix[inside, first:]).mul_(part[:, first:])
            later = replace(groups, columns=products.shape[1])
            sums = later.collect(products).sum(dim=1)
            system[:, number:, number] = sums.view(len(part), -1)
        along = groups.collect(slope[top : top + rows] * part).sum(dim=1)
        changes.append(_solved(system, along.view(len(part), count)))
    return (1 - torch.cat(changes)).clamp_(*FACTORS)


def best_lines(
    above: Tensor, slope: Tensor, matrix: Tensor, groups: Groups, minima: Tensor
) -> tuple[Tensor, Tensor]:
    """Least-squares factors of scales, and minima, both ``(groups, 1)``, of a weight that is ``above (out, in)`` plus
    its ``minima``.

    The system is that of ``best_factors``, with a second vector for each group, which is 1 in its columns. Minima of 0
    stay."""
    size = groups.size
    count = above.shape[1] // size  # groups of a row
    of_rows = minima.view(len(above), count)
    sums = matrix.view(len(matrix), count, size).sum(dim=2)  # (in, groups)
    ones = sums.view(count, size, count).sum(dim=1)  # (groups, groups)
    rows = max(1, SYSTEMS // max(4 * count**2, above.shape[1]))
    changes = []
    for top in range(0, len(above), rows):
        part = above[top : top + rows].contiguous()
        few = len(part)
        free = (of_rows[top : top + rows] != 0).to(part.dtype)
        system = part.new_zeros(few, 2 * count, 2 * count)
        for number in range(count):
            inside = slice(number * size, (number + 1) * size)
            products = (part[:, inside] @ matrix[inside]).mul_(part)
            system[:, number, :count] = products.view(few, count, size).sum(dim=2)
            system[:, count:, number] = (part[:, inside] @ sums[inside]).mul_(free)
        system[:, count:, count:] = ones * free[:, :, None] * free[:, None, :]
        slopes = slope[top : top + rows]
        along = (slopes * part).reshape(few, count, size).sum(dim=2)
        across = slopes.reshape(few, count, size).sum(dim=2).mul_(free)
        changes.append(_solved(system, torch.cat((along, across), dim=1)))
    of_scales, of_minima = torch.cat(changes).chunk(2, dim=1)
    factors = (1 - of_scales).clamp_(*FACTORS)
    return factors.view(-1, 1), minima - of_minima.reshape(-1, 1)


def _solved(system: Tensor, along: Tensor) -> Tensor:
    """The solutions ``(rows, n)`` of symmetric systems ``(rows, n, n)``, of which the lower halves are read and the
    diagonals raised; 0 where a system has no finite solution."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + RIDGE).masked_fill_(diagonal <= 0, 1.0)
    lower, failed = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(along.unsqueeze(2), lower).squeeze(2)
    solved = (failed == 0) & solution.isfinite().all(dim=1)
    return torch.where(solved.unsqueeze(1), solution, 0.0)
