"""Weights that a packed integer type represents exactly: whole numbers times the scale of their group.

A group is what shares a scale: a row for int8; for int4 so many columns of a row that about 32 values are kept. Its
value of largest magnitude, the *anchor*, stands at the end of the grid (-8 or ±127). So the scale can be read off the
weight, :func:`on_grid` does not change a weight that is on its grid, and packing it finds the same numbers again. No
kept value is 0: it would leave the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsellm.packed.layout import int4_group

INTEGERS = ("int8", "int4")
LOWEST = {"int8": -127, "int4": -8}
HIGHEST = {"int8": 127, "int4": 7}
BITS = {"int8": 8.0, "int4": 4.5}  # of a kept value; with its share of a scale for int4, if a group keeps 32


@dataclass(frozen=True)
class Groups:
    """The groups of a weight ``(out, in)`` whose values share a scale.

    Attributes:
        columns: of the weight.
        size: columns of a group; the last group of a row may have fewer.
    """

    columns: int
    size: int

    @classmethod
    def of(cls, weight: Tensor, value_type: str) -> Groups:
        """The groups in which ``weight`` would be packed; they depend on its zeros alone."""
        columns = weight.shape[1]
        return cls(columns, columns if value_type == "int8" else int4_group(weight))

    def collect(self, dense: Tensor) -> Tensor:
        """The values ``(groups, size)`` of a matrix ``(out, in)``, with 0 beyond its columns."""
        return nn.functional.pad(dense, (0, -self.columns % self.size)).reshape(-1, self.size)

    def spread(self, grouped: Tensor) -> Tensor:
        """The inverse of :meth:`collect`: ``(out, in)``."""
        return grouped.reshape(-1, self.columns + -self.columns % self.size)[:, : self.columns].contiguous()


def anchors(grouped: Tensor) -> Tensor:
    """The place of the value of largest magnitude in each group, ``(groups, 1)``."""
    return grouped.abs().argmax(dim=1, keepdim=True)


def scales_of(extreme: Tensor, value_type: str, dtype: torch.dtype) -> Tensor:
    """The scales with which these values become anchors, in fp32 as they are read from a packed file.

    Args:
        extreme: ``(groups, 1)``; rounded to ``dtype`` for int8, and to bf16 for int4, so that the anchor is exact.
        value_type: ``int8`` or ``int4``.
        dtype: of the checkpoint.
    """
    if value_type == "int8":
        return extreme.abs().to(dtype).float() / 127
    return (extreme / -8).bfloat16().float().mul_(8).to(dtype).float() / 8  # again: fp16 has a narrower range


def whole_numbers(values: Tensor, scales: Tensor, value_type: str) -> Tensor:
    """The nearest numbers of the grid, without 0, in units of ``scales``; 0 for a value of 0."""
    units = torch.where(scales == 0, 0.0, values / scales)
    whole = units.round().clamp_(LOWEST[value_type], HIGHEST[value_type])
    return torch.where(whole == 0, units.sign(), whole)


def as_stored(whole: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of whole numbers, fp32, rounded as a checkpoint in ``dtype`` has them."""
    return (whole * scales).to(dtype).float()


def on_grid(weight: Tensor, value_type: str, dtype: torch.dtype) -> Tensor:
    """The weight ``(out, in)`` with each value at the nearest number of its grid; zeros stay zero. fp32.

    The scales follow from the largest magnitudes of ``weight``, so nothing is clipped.

    Args:
        weight: fp32.
        value_type: ``int8`` or ``int4``.
        dtype: of the checkpoint that it is written to.
    """
    groups = Groups.of(weight, value_type)
    grouped = groups.collect(weight)
    scales = scales_of(grouped.gather(1, anchors(grouped)), value_type, dtype)
    return groups.spread(as_stored(whole_numbers(grouped, scales, value_type), scales, dtype))
