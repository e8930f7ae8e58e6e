"""Sparsities that the recipe fixes for some linears; the other linears get the rest of the zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsellm.allocation.allocator import Allocation
from sparsellm.allocation.exact import LARGEST, bounds, round_exactly
from sparsellm.allocation.survey import LinearSize
from sparsellm.errors import RecipeError

_DIGITS = 10**6  # bounds of the possible sparsity are shown with six digits, rounded inward


@dataclass(frozen=True)
class Division:
    """The zeros of a model, divided into fixed ones and those of free linears.

    Attributes:
        fixed: zeros of the linears whose sparsity the recipe fixes, by name.
        free: the other linears.
        zeros: of all free linears together.
        sparsity: over the free linears.
    """

    fixed: dict[str, int]
    free: list[LinearSize]
    zeros: int
    sparsity: float

    def allocation(self, chosen: Allocation | None = None) -> Allocation:
        """The zeros of all linears.

        Args:
            chosen: the zeros of the free linears, whose sum is corrected if it is not ``zeros``; None for the same
                sparsity in each.
        """
        if chosen is not None and not self.fixed:
            return chosen
        weights = [linear.weights for linear in self.free]
        wanted = [chosen.zeros[x.name] if chosen else self.sparsity * x.weights for x in self.free]
        zeros = round_exactly(wanted, self.zeros, bounds(weights, self.sparsity)) if self.free else []
        free = dict(zip((linear.name for linear in self.free), zeros, strict=True))
        return replace(chosen or Allocation({}), zeros={**self.fixed, **free})


def divide(linears: Sequence[LinearSize], sparsity: float) -> Division:
    """Divides ``round(sparsity · weights)`` zeros into fixed and free ones.

    If every linear is fixed, their sum may differ from the total by the rounding of each.

    Args:
        linears: the linears to prune.
        sparsity: over all of them.

    Raises:
        RecipeError: the free linears cannot make up for the fixed ones; the message names the possible sparsities.
    """
    fixed = {x.name: round(x.fixed * x.weights) for x in linears if x.fixed is not None}
    free = [x for x in linears if x.fixed is None]
    if not fixed:
        return Division({}, free, round(sparsity * sum(x.weights for x in free)), sparsity)
    weights, weights_free = sum(x.weights for x in linears), sum(x.weights for x in free)
    given = sum(fixed.values())
    zeros = round(sparsity * weights) - given
    if free and 0 <= zeros <= LARGEST * weights_free:
        return Division(fixed, free, zeros, zeros / weights_free)
    if not free and abs(zeros) <= len(linears):
        return Division(fixed, [], 0, 0.0)
    least, most = given / weights, (given + LARGEST * weights_free) / weights
    possible = f"{math.ceil(least * _DIGITS) / _DIGITS:g} to {math.floor(most * _DIGITS) / _DIGITS:g} are"
    raise RecipeError(
        f"sparsity {sparsity:g} cannot be reached: sparsity_of fixes {len(fixed)} of {len(linears)} linears, with "
        f"which {possible if free else f'only {least:.10g} is'} possible; change sparsity or sparsity_of"
    )
