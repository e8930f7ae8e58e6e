"""Kept values rounded to the grid of a packed integer type, each making up for the others.

The error is ``‖(Ŵ − W) G^½‖²`` for a pruned weight W and its rounded one Ŵ. Columns of large inputs take finer steps
(AWQ, arXiv 2306.00978): their exponents are those of a power of the inputs' root mean square, the power with the least
error after rounding to nearest. Each group takes the scale with the least error in the diagonal of G. Then three things
lower the error in the metric of G itself:

1. Inputs are rounded one after another, and all after one make up for its error (GPTQ, arXiv 2210.17323). A descent
   from here ends lower than one from the nearest numbers.
2. The scales of a row's groups are solved for together, with the whole numbers held: least squares.
3. Cyclic coordinate descent (QuantEase, arXiv 2309.01885) moves one input of all outputs at a time: with the others
   held, the best value of ``ŵ_j`` is ``ŵ_j − ((Ŵ − W) G)_j / G_jj``, and the number of the grid that is nearest to it
   is optimal.

2 and 3 take turns, and neither raises the error of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.registry import Workspace
from sparsellm.statistics import Gram
from sparsellm.statistics.gram import Factor
from sparsepack.codes import EXPONENTS, anchors, powers_of, whole_numbers
from sparsepack.grid import Groups, as_stored, on_grid_of, scales_of

# It takes the time of 50 products in linears with 576 inputs, and of 11 with 5632.
ROUNDING = Workspace(weights=16, grams=3, remembered=1, products=25)

FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # of the largest magnitude: beyond, clipped
DAMPING = 0.03  # of the factor for rounding one after another; 0.01 and 0.1 give the same error after the descent
ROUNDS = 3  # of scales and numbers
RIDGE = 1e-3  # added to the diagonal of the systems of scales, as a part of it
FACTORS = (0.5, 2.0)  # of a scale: the least and the greatest in a round
SYSTEMS = 1 << 22  # elements of the systems that are solved at once: 16 MiB
PASSES = 8  # of the descent, in a round
ENOUGH = 1e-2  # a pass that lowers the error by less than this part of it is the last
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
        notes: for the user.
    """

    weight: Tensor
    unrounded: Tensor
    exponents: Tensor | None
    notes: tuple[str, ...] = ()


def rounded(weight: Tensor, gram: Gram, value_type: str, dtype: torch.dtype, *, fixed_mask: bool = False) -> Rounded:
    """The weight with its values on the grid of a packed integer type; zeros stay zero.

    All processes call it with the same arguments and get the same result; each rounds some rows.

    Args:
        weight: ``(out, in)`` fp32, pruned.
        gram: of its inputs.
        value_type: ``int8``, ``int4`` or ``int3``.
        dtype: of the checkpoint that it is written to.
        fixed_mask: keep every value that is not 0. Otherwise one that is nearer to 0 than to its grid becomes 0, and
            the others make up for it. In a weight so full that it is packed dense values may become 0 in any case.

    Raises:
        NumericalError: the Gram matrix cannot be factorised with any damping.
    """
    groups, kind = Groups.of(weight, value_type), _Kind(value_type, dtype)
    powers = _powers(weight, gram, groups, kind)
    if groups.dense:
        found = _fitted(weight, weight, gram, powers, groups, kind)
        groups = Groups.of(found.weight, value_type)
    if not groups.dense:
        start = weight if fixed_mask else _without_small(weight, gram, powers, kind)
        found = _fitted(start, weight, gram, powers, replace(Groups.of(start, value_type), dense=False), kind)
    exponents = powers.log2().round_().to(torch.int8)
    return replace(found, exponents=exponents if bool(exponents.any()) else None)


def _fitted(start: Tensor, target: Tensor, gram: Gram, powers: Tensor, groups: Groups, kind: _Kind) -> Rounded:
    """The target ``(out, in)`` on the grid of a weight whose zeros it takes; without exponents.

    The processes divide the rows: rows depend on each other only in when the descent ends.
    """
    divided = len(target) >= parallel.size()
    rows = parallel.share(len(target)) if divided else slice(None)
    grid = _Grid(start[rows], gram, powers, groups, kind)
    first, notes = _one_after_another(grid, target[rows], gram)
    weight, best, scales = _Descent(grid, first, target[rows], gram).run()
    unrounded = grid.within_cells(weight, best, scales)
    if divided:
        weight, unrounded = (torch.cat(parallel.gather_list(each)) for each in (weight, unrounded))
    else:
        weight, unrounded = (parallel.broadcast_(each.contiguous()) for each in (weight, unrounded))
    return Rounded(weight, unrounded, None, notes)


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
        error = gram.energy(_Grid(judges, gram, tried, groups, kind).nearest, minus=judges)
        if error < least:
            found, least = tried, error
    return parallel.broadcast_(found)


class _Grid:
    """The grid of a weight: scales and anchors of its groups, and the weight rounded to nearest.

    Args:
        weight: ``(out, in)`` fp32.
        gram: of its inputs.
        powers: of two, one for each column.
        groups: of the weight.
        kind: the type.
    """

    def __init__(self, weight: Tensor, gram: Gram, powers: Tensor, groups: Groups, kind: _Kind) -> None:
        self.kind, self.powers, self.groups, self.levels, self.zero = kind, powers, groups, groups.levels, groups.dense
        grouped = groups.collect(weight / powers)
        curvature = groups.collect((gram.diagonal.clamp(min=1e-30) * powers.square()).expand_as(weight))
        places = anchors(grouped)
        extreme = grouped.gather(1, places)  # (groups, 1)
        self.units = groups.collect(powers.expand_as(weight)).gather(1, places)  # (groups, 1), of the anchors
        least = torch.full_like(extreme, math.inf)
        self.first = torch.zeros_like(extreme)  # (groups, 1): scales to begin with, without the powers of columns
        for fraction in FRACTIONS:
            tried = scales_of(extreme * fraction, self.levels, kind.dtype, self.units)
            error = whole_numbers(grouped, tried, self.levels, zero=self.zero).mul_(tried).sub_(grouped)
            error = error.square_().mul_(curvature).sum(dim=1, keepdim=True)
            self.first, least = torch.where(error < least, tried, self.first), torch.minimum(error, least)
        whole = whole_numbers(grouped, self.first, self.levels, zero=self.zero)
        free = (grouped != 0).scatter_(1, places, False).to(weight.dtype)
        self.free = groups.spread(free) != 0  # (out, in) bool: neither zero nor an anchor
        self.nearest = as_stored(groups.spread(whole), self.scales(self.first), kind.dtype)  # (out, in)

    def scales(self, of_groups: Tensor) -> Tensor:
        """``(out, in)``: the scale of each value, from those of groups ``(groups, 1)``."""
        return self.groups.spread(of_groups.expand(-1, self.groups.size)).mul_(self.powers)

    def within_cells(self, weight: Tensor, best: Tensor, of_groups: Tensor) -> Tensor:
        """``best``, moved as near to ``weight`` as it must be to be rounded to it, with these scales of groups."""
        scales = self.scales(of_groups).abs_()
        reach, end = CELL * self.levels.closest * scales, -self.levels.lowest * scales
        moved = weight + (best - weight).clamp(-reach, reach)
        moved = torch.where(self.free, moved.clamp(-end, end), weight).to(self.kind.dtype).float()
        # A coarse dtype may itself round to another number of the grid.
        again = on_grid_of(self.groups, moved, self.kind.dtype, self.powers)
        return torch.where(again == weight, moved, weight)


def _without_small(weight: Tensor, gram: Gram, powers: Tensor, kind: _Kind) -> Tensor:
    """The weight without the values that are nearer to 0 than to the smallest number of their grid."""
    groups = replace(Groups.of(weight, kind.values), dense=False)
    nearest = _Grid(weight, gram, powers, groups, kind).nearest
    return weight.masked_fill(weight.abs() < 0.5 * nearest.abs(), 0.0)


def _one_after_another(grid: _Grid, target: Tensor, gram: Gram) -> tuple[Tensor, tuple[str, ...]]:
    """The target ``(out, in)`` rounded input by input, each error made up for by the inputs after it, and notes.

    With ``UᵀU = (G + λI)⁻¹`` the best change of the later inputs for an error ``e_j`` of one is ``−(e_j / U_jj) U_jk``
    (arXiv 2210.17323, section 3). Inputs with the largest mean square come first, while there are most to make up.
    """
    order, factor = gram.remember(("rounding", DAMPING), lambda: _ordered(gram))
    columns = target.T[order]  # (in, out), a copy
    found = torch.where(grid.free, 0.0, grid.nearest).T[order]  # anchors and zeros are what they are
    scales, free = grid.scales(grid.first).T[order], grid.free.T[order].to(target.dtype)
    for start in range(0, len(columns), BLOCK):
        rows = slice(start, start + BLOCK)
        upper = factor.matrix[rows, rows].contiguous()
        errors = torch.zeros_like(columns[rows])
        for number, place in enumerate(range(start, start + len(errors))):
            wanted = torch.addmv(columns[place], errors[:number].T, upper[:number, number], alpha=-1)
            whole = whole_numbers(wanted, scales[place], grid.levels, zero=grid.zero)
            value = as_stored(whole, scales[place], grid.kind.dtype)
            found[place].add_(value.mul_(free[place]))
            torch.sub(wanted, found[place], out=errors[number]).div_(upper[number, number])
        columns[start + BLOCK :].addmm_(factor.matrix[rows, start + BLOCK :].T, errors, alpha=-1)
    del columns, scales, free
    return torch.empty_like(found).index_copy_(0, order, found).T.contiguous(), factor.notes


def _ordered(gram: Gram) -> tuple[Tensor, Factor]:
    """The inputs by their mean square, the largest first, and the inverse Cholesky factor in that order."""
    order = gram.diagonal.argsort(descending=True, stable=True)
    return order, Gram(gram.matrix[order][:, order], gram.tokens).inverse_cholesky(DAMPING)


class _Descent:
    """Scales and numbers of a weight in turn, each with the other held; on transposed matrices ``(in, out)``."""

    def __init__(self, grid: _Grid, start: Tensor, target: Tensor, gram: Gram) -> None:
        self.grid, self.matrix, self.target = grid, gram.matrix, target.T.contiguous()
        self.scales = grid.first  # (groups, 1)
        self.columns = start.T.contiguous()
        self.free = grid.free.T.to(self.columns.dtype).contiguous()
        self.slope = self.matrix @ (self.columns - self.target)  # half the gradient of the error

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight ``(out, in)`` with the least error found, the best value of each of its entries with all others
        held, and the scales of its groups."""
        for _ in range(ROUNDS):
            self._fit_scales()
            self._fit_numbers()
        curvature = self.matrix.diagonal()[:, None]
        best = torch.where(curvature > 0, self.columns - self.slope / curvature, self.columns)
        return self.columns.T.contiguous(), best.T.contiguous(), self.scales

    def _fit_scales(self) -> None:
        """Takes the best scales for the numbers, in the rows where they have a lower error as they are stored."""
        grid = self.grid
        factors = best_factors(self.columns.T, self.slope.T, self.matrix, grid.groups).view_as(self.scales)
        found = scales_of(self.scales * factors * grid.levels.lowest, grid.levels, grid.kind.dtype, grid.units)
        whole = whole_numbers(self.columns, grid.scales(self.scales).T.contiguous(), grid.levels, zero=grid.zero)
        columns = as_stored(whole, grid.scales(found).T, grid.kind.dtype)
        slope = self.matrix @ (columns - self.target)
        worse = ~(self._errors(columns, slope) < self._errors(self.columns, self.slope))  # (out,)
        columns[:, worse], slope[:, worse] = self.columns[:, worse], self.slope[:, worse]
        self.columns, self.slope = columns, slope
        kept = worse.repeat_interleave(len(found) // len(worse))[:, None]
        self.scales = torch.where(kept, self.scales, found)

    def _errors(self, columns: Tensor, slope: Tensor) -> Tensor:
        """The error of each row of the weight, ``(out,)``."""
        return (columns - self.target).mul_(slope).sum(dim=0)

    def _fit_numbers(self) -> None:
        """Passes of coordinate descent over the free values."""
        scales = self.grid.scales(self.scales).T.contiguous()
        inverse = (self.free / scales).masked_fill_(scales == 0, 0.0)
        self._round_unreached(scales, inverse)
        error = parallel.total(float(self._errors(self.columns, self.slope).double().sum()))
        for _ in range(PASSES):
            blocks = range(0, len(self.columns), BLOCK)
            gained = parallel.total(sum(self._block(start, scales, inverse) for start in blocks))
            error -= gained
            if gained <= ENOUGH * max(error, 0.0):
                break

    def _round_unreached(self, scales: Tensor, inverse: Tensor) -> None:
        """Rounds the inputs that no token reaches to nearest: they have no part in the error, and no slope."""
        places = (self.matrix.diagonal() <= 0).nonzero().flatten()
        whole = self.grid.levels.nearest(self.target[places] * inverse[places], zero=self.grid.zero)
        rounded = as_stored(whole, scales[places], self.grid.kind.dtype)
        self.columns[places] = torch.where(self.free[places] != 0, rounded, self.columns[places])

    def _block(self, start: int, scales: Tensor, inverse: Tensor) -> float:
        """Moves some inputs one after another, then corrects the slopes of all; returns by how much the error fell."""
        rows = slice(start, min(start + BLOCK, len(self.columns)))
        inner = self.matrix[rows, rows].contiguous()
        moves = torch.zeros_like(self.columns[rows])
        gained = self.columns.new_zeros(self.columns.shape[1])
        levels, zero, dtype = self.grid.levels, self.grid.zero, self.grid.kind.dtype
        parts = (each[rows].unbind() for each in (self.columns, self.slope, scales, self.free, inverse))
        # Few operations a column, on views made in advance: on narrow weights the calls take the time.
        columns = zip(inner.diagonal().tolist(), *parts, strict=True)
        for number, (curvature, column, slope, scale, free, inverted) in enumerate(columns):
            if curvature <= 0:
                continue  # no token reaches it
            slope = torch.addmv(slope, moves[:number].T, inner[number, :number])
            units = column.add(slope, alpha=-1 / curvature).mul_(inverted)  # 0 where not free
            value = as_stored(levels.nearest(units, zero=zero), scale, dtype)
            move = (value - column).mul_(free)
            gain = slope.mul_(2).add_(move, alpha=curvature).mul_(move)  # negative where the error falls
            torch.mul(move, gain < 0, out=moves[number])
            column.copy_(torch.where(gain < 0, value, column))  # adding the move may miss the grid by an ulp
            gained -= gain.clamp_(max=0)
        self.slope.addmm_(self.matrix[:, rows], moves)
        return float(gained.double().sum())


def best_factors(weight: Tensor, slope: Tensor, matrix: Tensor, groups: Groups) -> Tensor:
    """By what to multiply each group of a weight so that the error of its row is least, ``(out, groups)``.

    With the groups of a row as vectors ``v_a``, the factors ``1 + t`` solve ``A t = −s`` with ``A_ab = v_aᵀ G v_b`` and
    ``s_a`` the slope along ``v_a``. A small ridge keeps them near 1 where the rows hardly tell groups apart.

    Args:
        weight: ``(out, in)``.
        slope: ``(out, in)``: half the gradient of the error, ``(Ŵ − W) G``.
        matrix: G.
        groups: of the weight.
    """
    of_a_row = len(groups.collect(weight[:1]))
    factors = weight.new_ones(len(weight), of_a_row)
    rows = max(1, SYSTEMS // max(of_a_row**2, weight.shape[1]))
    for top in range(0, len(weight), rows):
        part = weight[top : top + rows].contiguous()  # columns of a transposed one would be far apart
        system = part.new_zeros(len(part), of_a_row, of_a_row)
        for number in range(of_a_row):
            first = number * groups.size
            inside = slice(first, first + groups.size)
            # The system is symmetric: products with the columns of earlier groups are known.
            products = (part[:, inside] @ matrix[inside, first:]).mul_(part[:, first:])
            products = replace(groups, columns=products.shape[1]).collect(products).sum(dim=1).view(len(part), -1)
            system[:, number:, number] = products
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal.mul_(1 + RIDGE).masked_fill_(diagonal <= 0, 1.0)
        along = groups.collect(slope[top : top + rows] * part).sum(dim=1).view(len(part), of_a_row, 1)
        lower, failed = torch.linalg.cholesky_ex(system)  # of the lower half; a row where it fails keeps its scales
        found = torch.cholesky_solve(along, lower).squeeze(2)
        found = torch.where((failed == 0).unsqueeze(1) & found.isfinite(), found, 0.0)
        factors[top : top + rows] -= found
    return factors.clamp_(*FACTORS)
