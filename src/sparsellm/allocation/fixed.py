"""Zeros that the recipe fixes for some linears; the other linears get the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsellm.allocation.allocator import Allocation
from sparsellm.allocation.exact import LARGEST, bounds, round_exactly
from sparsellm.allocation.survey import LinearSize
from sparsellm.errors import RecipeError

_DIGITS = 10**6  # bounds of the possible sparsity are shown with six digits, rounded inward


@dataclass(frozen=True)
class Division:
    """The zeros of a model: ``fixed`` ones by the name of the linear, and ``zeros`` in the ``free`` linears together,
    which then have ``sparsity``."""

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
        goals = [chosen.zeros[x.name] if chosen else self.sparsity * x.weights for x in self.free]
        limits = bounds([x.weights for x in self.free], self.sparsity)
        free = Allocation.of(self.free, round_exactly(goals, self.zeros, limits))
        return Allocation({**self.fixed, **free.zeros}, chosen.report if chosen else {})


def divide(linears: Sequence[LinearSize], sparsity: float) -> Division:
    """Divides ``round(sparsity · weights)`` zeros into fixed and free ones.

    If every linear is fixed, their sum may differ from the total by the rounding of each.

    Raises:
        RecipeError: the free linears cannot make up for the fixed ones; the message names the possible sparsities.
    """
    fixed = {x.name: x.fixed for x in linears if x.fixed is not None}
    free = [x for x in linears if x.fixed is None]
    weights, weights_free = sum(x.weights for x in linears), sum(x.weights for x in free)
    given = sum(fixed.values())
    zeros = round(sparsity * weights) - given
    if not fixed:
        return Division({}, free, zeros, sparsity)
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
