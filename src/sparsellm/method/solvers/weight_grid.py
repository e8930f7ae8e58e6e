"""The grid on which the values of one weight are rounded: scales of its groups, chosen group by group.

Each group takes the scale, or the scale and the minimum, with the least error in the diagonal of the Gram matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.method.solvers.kernels import kernels_for
from sparsepack import native
from sparsepack.codes import anchors, whole_numbers
from sparsepack.grid import (
    FEW,
    Groups,
    as_stored,
    in_units,
    on_grid_of,
    scales_of,
    split,
)
from sparsepack.grids import LEAST
from sparsepack.minima import lines_of, numbers_of

# anchor / largest magnitude; values beyond are clipped
FRACTIONS = tuple(step / 20 for step in range(20, 9, -1))
ENDS = 6  # fractions that are tried for each end of a group with a minimum
CELL = 0.48  # how far an unrounded value may lie from its number of the grid, as a share of its distance from the next


class WeightGrid:
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


class WeightLines(WeightGrid):
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


def _error(values: Tensor, grouped: Tensor, curvature: Tensor) -> Tensor:
    """The error of groups, ``(groups, 1)``, if their values ``(groups, size)`` become ``values``, in the diagonal of G,
    the ``curvature``. Overwrites ``values``."""
    errors = values.sub_(grouped).square_().mul_(curvature)
    return errors.sum(dim=1, keepdim=True)


def panel_kernel(grid: WeightGrid) -> Callable[..., tuple[Tensor, Tensor]] | None:
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
