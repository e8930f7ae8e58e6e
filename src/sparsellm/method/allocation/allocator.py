"""The registry of allocations, what they return, and zeros that the recipe fixes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from sparsellm.errors import RecipeError, shown
from sparsellm.method.allocation.exact import LARGEST, bounds, shift_to_total
from sparsellm.method.allocation.survey import LinearSize, Survey
from sparsellm.patterns import round_exactly
from sparsellm.records import Settings
from sparsellm.registry import Registry

# bounds of the possible sparsity are shown with six digits, rounded inward
_DIGITS = 10**6


@dataclass(frozen=True)
class HeadForm:
    """The type of embedding or head, and what an error in each of its columns costs while it is rounded."""

    values: str
    squares: list[float]


@dataclass(frozen=True)
class Allocation:
    """The number of zeros of each linear by its name, and JSON values that explain the choice to the user. ``values``
    is what the values of each linear are rounded to, by its name; it is empty if the recipe says that for all.
    ``heads`` are the forms of embedding and head, by their tensors; it is empty where they stay as they are."""

    zeros: dict[str, int]
    report: Settings = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    heads: dict[str, HeadForm] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        linears: Sequence[LinearSize],
        zeros: Sequence[int],
        report: Settings | None = None,
    ) -> Self:
        return cls(
            {linear.name: count for linear, count in zip(linears, zeros, strict=True)},
            report or {},
        )


Allocator = Callable[..., Allocation]
"""``allocator(survey, **options) -> Allocation``. It must not change the model of the survey."""

ALLOCATIONS: Registry[Allocator] = Registry("allocation")


def from_sparsities(survey: Survey, sparsities: Mapping[str, float]) -> Allocation:
    """The allocation nearest to these sparsities, with the exact total: one number is added to all sparsities, so that
    the mean over the weights is right; they are clipped to [0, 0.99]."""
    if odd := [
        x.name
        for x in survey.linears
        if not math.isfinite(sparsities.get(x.name, math.nan))
    ]:
        raise RecipeError(
            f"from_sparsities got no finite sparsity for {odd[0]}; give one for every linear"
        )
    weights = [linear.weights for linear in survey.linears]
    limits = bounds(weights, survey.sparsity)
    shifted = shift_to_total(
        weights,
        [sparsities[linear.name] for linear in survey.linears],
        survey.zeros,
        limits,
    )
    return Allocation.of(survey.linears, round_exactly(shifted, survey.zeros, limits))


@ALLOCATIONS.register("uniform", paper="none")
def uniform(survey: Survey) -> Allocation:
    """The same sparsity in every linear, each rounded by itself, as in the pruning papers."""
    return Allocation.of(
        survey.linears,
        [round(survey.sparsity * linear.weights) for linear in survey.linears],
    )


@dataclass(frozen=True)
class Division:
    """The zeros of a model: those that the recipe fixes, by the name of the linear, and ``zeros`` in the ``free``
    linears together, which then have ``sparsity``."""

    fixed: dict[str, int]
    free: list[LinearSize]
    zeros: int
    sparsity: float

    def wrong(self, chosen: Allocation) -> str:
        """What is wrong with a user's allocation, as a clause, or nothing. A wrong sum is corrected."""
        zeros = chosen.zeros if isinstance(chosen, Allocation) else {}
        for linear in self.free:
            if (
                type(count := zeros.get(linear.name)) is not int
                or not 0 <= count <= linear.weights
            ):
                return f"gives {linear.name} {shown(count)} of its {linear.weights} weights as zeros"
        return ""

    def allocation(self, chosen: Allocation | None = None) -> Allocation:
        """The zeros of all linears. Free ones have those that were ``chosen``, corrected to the right sum; or, for
        None, the same sparsity each."""
        limits = bounds(sizes := [x.weights for x in self.free], self.sparsity)
        goals = [
            chosen.zeros[x.name] if chosen else self.sparsity * x.weights
            for x in self.free
        ]
        # too many to be corrected one by one
        if abs(sum(goals) - self.zeros) > len(goals):
            shares = [goal / size for goal, size in zip(goals, sizes, strict=True)]
            goals = shift_to_total(sizes, shares, self.zeros, limits)
        free = Allocation.of(self.free, round_exactly(goals, self.zeros, limits))
        said = (
            {str(key): value for key, value in chosen.report.items()} if chosen else {}
        )
        report = json.loads(json.dumps(said, default=str))  # tensors as text
        return Allocation({**self.fixed, **free.zeros}, report)


def divide_zeros(linears: Sequence[LinearSize], sparsity: float) -> Division:
    """Divides ``round(sparsity · weights)`` zeros into fixed and free ones. If every linear is fixed, their sum may
    differ from the total by the rounding of each. A RecipeError says that the free linears cannot make up for the fixed
    ones, and names the possible sparsities."""
    fixed = {x.name: x.fixed for x in linears if x.fixed is not None}
    free = [x for x in linears if x.fixed is None]
    weights = sum(x.weights for x in linears)
    weights_free = sum(x.weights for x in free)
    given = sum(fixed.values())
    zeros = round(sparsity * weights) - given
    if not fixed:
        return Division({}, free, zeros, sparsity)
    if free and 0 <= zeros <= LARGEST * weights_free:
        return Division(fixed, free, zeros, zeros / weights_free)
    if not free and abs(zeros) <= len(linears):
        return Division(fixed, [], 0, 0.0)
    least = given / weights
    most = (given + LARGEST * weights_free) / weights
    possible = f"{math.ceil(least * _DIGITS) / _DIGITS:g} to {math.floor(most * _DIGITS) / _DIGITS:g} are"
    raise RecipeError(
        f"sparsity {sparsity:g} cannot be reached: sparsity_of fixes {len(fixed)} of {len(linears)} linears, with "
        f"which {possible if free else f'only {least:.10g} is'} possible; change sparsity or sparsity_of"
    )
