"""Grids with minima: a value is a number from 0 on, times the scale of its group, less the minimum of its group.

Scales are whole numbers of a unit that several groups share, and so are minima, of another unit. The least value of a
group stands at 0 where it has a minimum, the largest at the highest number, and the unit is read off the group with the
largest scale. A difference of two values that are rounded to bf16 has fewer digits than one of them, so units have six
binary digits, and a minimum is at most ``FAR`` times the widest group's range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsepack.codes import anchors
from sparsepack.grids import LARGEST_FP16, LEAST, Grid

FAR = 1.5
_DIGITS = 64


def lines_of(scales: Tensor, minima: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and minima ``(groups, 1)``, the latter at most 0, as a file of this grid has them."""
    most = grid.lowest_scale
    reach = grid.highest * most
    of_parts = scales.clamp(min=0).view(-1, grid.parts)
    units = _unit(of_parts.clamp(max=LARGEST_FP16 / reach * most), most)
    below = minima.clamp(max=0).neg().view(-1, grid.parts)
    limit = torch.where(units == 0, LARGEST_FP16, FAR * reach * units)
    below = torch.minimum(below, limit.clamp(max=LARGEST_FP16))
    of_minima = _unit(below, most)
    stored = _whole(of_parts, units, most) * units
    depths = _whole(below, of_minima, most) * of_minima
    return stored.view(-1, 1), depths.neg().view(-1, 1)


def _unit(of_parts: Tensor, most: int) -> Tensor:
    """The unit ``(units, 1)`` of which the largest of some scales ``(units, parts)`` is the largest whole number."""
    mantissa, exponent = torch.frexp(of_parts.amax(1, keepdim=True) / most)
    rounded = torch.ldexp((mantissa * _DIGITS).round_() / _DIGITS, exponent)
    multiples = rounded / LEAST  # multiples of the least number of fp16
    return torch.where(multiples < _DIGITS, multiples.round() * LEAST, rounded)


def _whole(of_parts: Tensor, units: Tensor, most: int) -> Tensor:
    """The whole numbers of units that are nearest to scales ``(units, parts)``; the largest scale is ``most``."""
    steps = (of_parts / torch.where(units == 0, math.inf, units)).round_()
    largest = most * (units != 0).to(steps.dtype)
    return steps.clamp_(0, most).scatter_(1, anchors(of_parts), largest)


def split_lines(stored: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Units ``(units, 1)`` and whole numbers of them ``(units, parts)`` of scales, or of minima without their sign,
    that are on a grid."""
    of_parts = stored.reshape(-1, grid.parts)
    units = of_parts.amax(1, keepdim=True) / grid.lowest_scale
    return units, (of_parts / torch.where(units == 0, math.inf, units)).round_()


def numbers_of(grouped: Tensor, scales: Tensor, minima: Tensor, grid: Grid) -> Tensor:
    """The numbers of values ``(groups, size)`` on lines ``(groups, 1)``: the nearest, but for the ends of a group."""
    steps = torch.where(scales == 0, math.inf, scales)
    numbers = ((grouped - minima) / steps).round_().clamp_(0, grid.highest)
    highest = grouped.argmax(1, keepdim=True)
    lowest = grouped.argmin(1, keepdim=True)
    numbers.scatter_(1, highest, grid.highest * (scales != 0).to(numbers.dtype))
    others = numbers.gather(1, lowest)
    return numbers.scatter_(1, lowest, torch.where(minima < 0, 0.0, others))


def on_lines(grouped: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest numbers of values ``(groups, size)``, and the scales and minima ``(groups, 1)`` that are read off
    them."""
    minima = grouped.amin(1, keepdim=True).clamp_(max=0)
    scales = (grouped.amax(1, keepdim=True) - minima) / grid.highest
    scales, minima = lines_of(scales, minima, grid)
    return numbers_of(grouped, scales, minima, grid), scales, minima
