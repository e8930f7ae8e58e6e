"""Descent of a rounded weight's error: scales by least squares, and numbers one input at a time, in turn.

For the numbers that is cyclic coordinate descent (QuantEase, arXiv 2309.01885): with the others held, the best value of
``ŵ_j`` is ``ŵ_j − ((Ŵ − W) G)_j / G_jj``, and the nearest number of the grid is optimal. No turn raises the error of a
row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.method.solvers.group_scales import best_factors, best_lines
from sparsellm.method.solvers.weight_grid import WeightGrid, WeightLines, panel_kernel
from sparsellm.method.solvers.widths import ROUNDED_TOGETHER
from sparsepack.grid import FEW, as_stored, scales_of
from sparsepack.grids import LEAST
from sparsepack.minima import lines_of

ROUNDS = 3  # turns of scales and numbers; the error falls with each, the third time by little
PASSES = 8  # most passes of the descent in a turn; few weights need as many
ENOUGH = 1e-2  # a pass that lowers the error by less than this share of it is the last
WIDE = 256  # inputs whose moves reach all others by one product, which is twice as fast as by four


class Descent:
    """Scales and numbers of a weight in turn, each with the other held; on transposed matrices ``(in, out)``."""

    def __init__(
        self, grid: WeightGrid, start: Tensor, target: Tensor, gram: Gram
    ) -> None:
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
        kernel = panel_kernel(self.grid)
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


class DescentOfLines(Descent):
    """Scales and minima, and numbers, in turn. ``columns`` and ``target`` lack the minima."""

    grid: WeightLines

    def __init__(
        self, grid: WeightLines, start: Tensor, complete: Tensor, gram: Gram
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
