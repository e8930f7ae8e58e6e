"""Weights that a packed integer type represents exactly: whole numbers times the scale of their group.

A group shares a scale: a row for int8; for int4 and int3 the columns of a row of which about 32 are kept. Its value of
largest magnitude, the *anchor*, stands at the end of the grid (-128, -8, -4 or ±127). So the scale can be read off the
weight, ``on_grid`` does not change a weight that is on its grid, and packing it finds the same numbers again.

Columns may have exponents: every value of a column is then multiplied by that power of two, exactly, and magnitudes
compare without it. They cannot be read off a weight; the caller passes them.

In a weight that is packed with a bitmask no value becomes 0: it would leave the mask. In one that is packed dense, 0 is
a number like the others.

The same functions round to the grids of other programs (``sparsepack.grids``) by their names, and ``codes_of``
reads numbers and scales from such a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsepack.codes import PLAIN, Levels, anchors, levels_of, powers_of, whole_numbers
from sparsepack.errors import FormatError
from sparsepack.grids import GRIDS, LARGEST_FP16, LEAST, Grid, grid_for
from sparsepack.layout import form_of
from sparsepack.minima import on_lines

INTEGERS = tuple(PLAIN)
FEW = 128  # multiples of LEAST: bf16 has more digits than fp16 below as many
# weights that are rounded together: what that needs stays in the cache
AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Groups:
    """The groups of a weight with ``columns`` whose values share a scale; ``size`` columns, at the end of a row fewer.

    ``levels`` are the numbers of the grid; ``dense``, whether the weight is packed dense, where a value may become 0;
    ``grid``, the grid of another program, if it is one."""

    columns: int
    size: int
    levels: Levels
    dense: bool = False
    grid: Grid | None = None

    @classmethod
    def of(cls, weight: Tensor, value_type: str) -> Groups:
        """The groups in which ``weight`` would be packed as int8, int4 or int3, which depend on its zeros alone; or
        those of the grid of another program, by its name."""
        columns = weight.shape[1]
        if value_type in GRIDS:
            grid = grid_for(value_type, columns)
            numbers = Levels(grid.numbers)
            return cls(columns, grid.group or columns, numbers, dense=True, grid=grid)
        _, layout, group = form_of(weight, value_type)
        return cls(
            columns, group or columns, levels_of(value_type, layout), layout == "dense"
        )

    def collect(self, dense: Tensor) -> Tensor:
        """The values ``(groups, size)`` of a matrix ``(out, in)``, with 0 beyond its columns."""
        return nn.functional.pad(dense, (0, -self.columns % self.size)).reshape(
            -1, self.size
        )

    def spread(self, grouped: Tensor) -> Tensor:
        """The inverse of ``collect``: ``(out, in)``."""
        return grouped.reshape(-1, self.columns + -self.columns % self.size)[
            :, : self.columns
        ].contiguous()

    @property
    def parts(self) -> int:
        """The groups whose scales are whole numbers of one unit; 0 where each has a scale of its own."""
        return 0 if self.grid is None else self.grid.parts

    def numbers(self, grouped: Tensor, scales: Tensor, places: Tensor) -> Tensor:
        """The numbers nearest to values ``(groups, size)`` with scales and places of anchors ``(groups, 1)``."""
        numbers = whole_numbers(grouped, scales, self.levels, zero=self.dense)
        if self.grid is not None and self.grid.anchored:
            lowest = float(self.levels.lowest)
            others = numbers.gather(1, places)
            numbers.scatter_(1, places, torch.where(scales == 0, others, lowest))
        return numbers


def scales_of(
    extreme: Tensor, groups: Groups, dtype: torch.dtype, unit: Tensor | None = None
) -> Tensor:
    """The scales with which ``extreme (groups, 1)`` become anchors, in fp32 as they are read from a file.

    An anchor is ``extreme`` times the power of two of its column, ``unit (groups, 1)`` or 1, rounded to ``dtype`` for
    int8 and to bf16 otherwise. One that ``dtype`` cannot hold becomes the largest that it can, and values are clipped.
    """
    levels = groups.levels
    if groups.grid is not None:
        return _scales_of_grid(extreme / levels.lowest, groups.grid, dtype)
    one = torch.ones_like(extreme) if unit is None else unit
    largest = (
        LARGEST_FP16 if dtype == torch.float16 else torch.finfo(torch.bfloat16).max
    )
    if levels == PLAIN["int8"]:
        return (extreme.abs() * one).clamp(max=largest).to(dtype).float() / one / 127
    # Rounded again: fp16 has a narrower range.
    end = -levels.lowest * one
    return (extreme / levels.lowest).bfloat16().float().mul_(end).clamp_(
        -largest, largest
    ).to(dtype).float() / end


def _scales_of_grid(scales: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Scales ``(groups, 1)`` as a file of this grid has them."""
    if not grid.parts:
        stored = _stored(scales, grid, dtype)
        if _in_fp16(grid, dtype) and not grid.anchored:
            levels = Levels(grid.numbers)
            number = whole_numbers(scales * grid.lowest, stored, levels, zero=True)
            stored = _readable(stored, number, grid, dtype)
        return stored
    of_parts = scales.view(-1, grid.parts)
    widest = _widest(of_parts)
    units = _stored(widest / grid.lowest_scale, grid, dtype)
    if _in_fp16(grid, dtype):
        number = in_units(widest, units, grid).mul_(grid.lowest)
        units = _readable(units, number, grid, dtype)
    return (in_units(of_parts, units, grid) * units).view(-1, 1)


def _in_fp16(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether the scales of a checkpoint in ``dtype`` must be numbers of fp16."""
    return grid.half or dtype == torch.float16


def _readable(stored: Tensor, number: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Scales, or units, that a reader finds again from the anchors, each of which is ``number`` of them.

    A small one was rounded away from 0, and its anchor, rounded too, may lead a reader to the next lower one. That one
    is then taken, and clips a value by a little."""
    read = as_stored(number, stored, dtype) / grid.lowest / grid.lowest_scale
    small = stored.abs() <= FEW * LEAST
    return torch.where(small, _stored(read, grid, dtype), stored)


def _stored(scales: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Scales, or units, as numbers that a file has."""
    largest = LARGEST_FP16
    if not _in_fp16(grid, dtype):
        largest = torch.finfo(torch.bfloat16).max
    if dtype == torch.float16 or not grid.half:
        # A weight of the checkpoint must be finite too. A power of two, so that bf16
        # has the quotient.
        largest /= 1 << (abs(grid.lowest * grid.lowest_scale) - 1).bit_length()
    stored = scales.clamp(-largest, largest).bfloat16().float()
    if grid.uneven:
        # An anchor is rounded to bf16, and not each leads back to the scale of which
        # it was made: one that does is near.
        anchors_of = (stored * grid.lowest).bfloat16().float()
        stored = (anchors_of / grid.lowest).bfloat16().float()
    if not _in_fp16(grid, dtype):
        return stored
    return _in_half(stored, up=grid.parts > 0 or not grid.anchored)


def _in_half(scales: Tensor, *, up: bool) -> Tensor:
    """Scales of bf16 as numbers of fp16, which has all but small ones. With ``up`` those are rounded away from 0, so
    that none becomes 0 and no value lies beyond the last number; else to the nearest."""
    multiples = scales.abs() / LEAST
    steps = multiples.ceil() if up else multiples.round()
    return torch.where(multiples < FEW, steps.mul_(LEAST) * scales.sign(), scales)


def _widest(of_parts: Tensor) -> Tensor:
    """The scale of largest magnitude, ``(units, 1)``, of those that share a unit, ``(units, parts)``."""
    return of_parts.gather(1, anchors(of_parts))


def in_units(of_parts: Tensor, units: Tensor, grid: Grid) -> Tensor:
    """The whole numbers of units ``(units, 1)`` that are nearest to scales ``(units, parts)``."""
    steps = (of_parts / torch.where(units == 0, math.inf, units)).round_()
    return steps.clamp_(grid.lowest_scale, grid.highest_scale)


def split(scales: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Units ``(units, 1)`` and whole numbers of them ``(units, parts)`` of scales ``(out, groups)`` that are on a grid
    with parts."""
    of_parts = scales.reshape(-1, grid.parts)
    widest = _widest(of_parts) / grid.lowest_scale
    # A small unit was rounded away from 0, and the whole numbers after that.
    units = _in_half(widest, up=True)
    fits = in_units(of_parts, units, grid).mul_(units) == of_parts
    larger = units + LEAST * units.sign()
    units = torch.where(fits.all(1, keepdim=True), units, larger)
    return units, in_units(of_parts, units, grid)


def as_stored(
    numbers: Tensor, scales: Tensor, dtype: torch.dtype, minima: Tensor | None = None
) -> Tensor:
    """The values of whole numbers, fp32, rounded as a checkpoint in ``dtype`` has them."""
    exact = numbers * scales
    if minima is not None:
        exact += minima
    # 0 times a negative scale is -0.0
    return exact.to(dtype).float().add_(0.0)


def on_grid(
    weight: Tensor,
    value_type: str,
    dtype: torch.dtype,
    exponents: Tensor | None = None,
    *,
    groups: Groups | None = None,
) -> Tensor:
    """The fp32 weight ``(out, in)`` with each value at the nearest number of its grid; zeros stay zero, if it has 0.

    The scales follow from the largest magnitudes of ``weight``, as in ``scales_of``; a value beyond the last number
    becomes it. ``dtype`` is the checkpoint's; ``exponents``, int8 ``(in,)``; ``groups``, if they are known already."""
    groups = Groups.of(weight, value_type) if groups is None else groups
    powers = torch.ones(weight.shape[1], device=weight.device)
    if exponents is not None:
        powers = powers_of(exponents)
    rounded = on_grid_of(groups, weight, dtype, powers)
    if groups.dense and not Groups.of(rounded, value_type).dense:
        rounded = on_grid_of(replace(groups, dense=False), weight, dtype, powers)
    return rounded


def on_grid_of(
    groups: Groups, weight: Tensor, dtype: torch.dtype, powers: Tensor
) -> Tensor:
    """``on_grid`` for given groups and powers of two ``(in,)`` of columns; a few rows at a time on a CPU."""
    rounded = torch.empty_like(weight)
    few = _rows_at_once(weight)
    units_of_few = groups.collect(powers.expand(few, -1))
    for start in range(0, len(weight), few):
        grouped = groups.collect(weight[start : start + few] / powers)
        units = units_of_few[: len(grouped)]
        numbers, scales, minima = _nearest(groups, grouped, dtype, units)
        rounded[start : start + few] = groups.spread(
            as_stored(numbers, scales * units, dtype, minima)
        )
    return rounded


def codes_of(weight: Tensor, grid: Grid, name: str) -> tuple[Tensor, Tensor]:
    """The whole numbers, int8 ``(out, in)``, and scales, fp32 ``(out, groups)``, of a weight that is on a grid; or
    scales and minima ``(out, groups, 2)``.

    ``weight`` is ``(out, in)`` in the dtype of its checkpoint and equals the numbers times the scales, rounded to it;
    ``name`` is that of its linear. Raises FormatError if the weight is not on the grid, or groups do not fit a row."""
    groups = Groups.of(weight, grid.name)
    if weight.shape[1] % groups.size:
        fault = f"its {weight.shape[1]} inputs are not a multiple of {groups.size}, the group"
        raise FormatError(
            f"{name} cannot be stored as {grid.name}: {fault}; prune with another grid"
        )
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    few = _rows_at_once(weight)
    for start in range(0, len(weight), few):
        rows = slice(start, start + few)
        grouped = groups.collect(weight[rows].float())
        numbers, of_groups, minima = _nearest(
            groups, grouped, weight.dtype, torch.ones_like(grouped)
        )
        stored = as_stored(numbers, of_groups, weight.dtype, minima)
        if not torch.equal(stored, grouped):
            raise FormatError(
                f"{name} is not on the grid {grid.name}; export what `prune --grid {grid.name}` wrote"
            )
        codes[rows] = groups.spread(numbers).to(torch.int8)
        if minima is not None:
            of_groups = torch.cat((of_groups, minima), dim=1)
        scales.append(of_groups)
    shape = (len(weight), weight.shape[1] // groups.size)
    every = torch.cat(scales)
    return codes, every.view(shape if every.shape[1] == 1 else (*shape, 2))


def _rows_at_once(weight: Tensor) -> int:
    """The rows of a weight that are rounded together: all of them on a GPU."""
    rows = len(weight)
    if weight.device.type == "cpu":
        rows = min(rows, AT_ONCE // weight.shape[1])
    return max(1, rows)


def _nearest(
    groups: Groups, grouped: Tensor, dtype: torch.dtype, units: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The numbers ``(groups, size)`` nearest to values without the powers of their columns, ``units (groups, size)``;
    scales ``(groups, 1)``; and minima, if the grid has them."""
    if groups.grid is not None and groups.grid.minima:
        return on_lines(grouped, groups.grid)
    places = anchors(grouped)
    extreme = grouped.gather(1, places)
    scales = scales_of(extreme, groups, dtype, units.gather(1, places))
    return groups.numbers(grouped, scales, places), scales, None
