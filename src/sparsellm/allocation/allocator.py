"""The registry of allocations, their return type, and the rescaling of block scores to sparsities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsellm.allocation.exact import bounds, round_exactly, round_to_groups, shift_to_total
from sparsellm.allocation.survey import LinearSize, Survey
from sparsellm.registry import Registry


@dataclass(frozen=True)
class Allocation:
    """The number of zeros of each linear by its name, and JSON values that explain the choice to the user."""

    zeros: dict[str, int]
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, linears: Sequence[LinearSize], zeros: Sequence[int], report: dict[str, Any] | None = None
    ) -> Allocation:
        return cls({linear.name: count for linear, count in zip(linears, zeros, strict=True)}, report or {})


Allocator = Callable[..., Allocation]
"""``allocator(survey, **options) -> Allocation``. It must not change the model of the survey."""

ALLOCATIONS: Registry[Allocator] = Registry("allocation")


def in_groups(allocation: Allocation, linears: Sequence[LinearSize], m: int, total: int) -> Allocation:
    """The allocation of N:M nearest to one of single weights, with ``total`` zeros or the nearest number possible."""
    zeros = round_to_groups([allocation.zeros[x.name] for x in linears], [x.weights for x in linears], m, total)
    return Allocation.of(linears, zeros, allocation.report)


def from_sparsities(
    survey: Survey, sparsities: Mapping[str, float], report: dict[str, Any] | None = None
) -> Allocation:
    """The allocation nearest to these sparsities, with the exact total.

    One number is added to all sparsities, so that the mean over the weights is right; they are clipped to [0, 0.99].
    """
    weights = [linear.weights for linear in survey.linears]
    limits = bounds(weights, survey.sparsity)
    shifted = shift_to_total(weights, [sparsities[linear.name] for linear in survey.linears], survey.zeros, limits)
    return Allocation.of(survey.linears, round_exactly(shifted, survey.zeros, limits), report)


def from_block_importance(
    survey: Survey, importance: Mapping[int, float], reach: float, report: dict[str, Any]
) -> Allocation:
    """The allocation from the importance of blocks, by the rescaling of OWL (2310.05175, section 3.2) and DLP
    (2505.23807).

    With ``d_l = 2 reach (I_l − min I) / (max I − min I)``, block l keeps the fraction ``1 − S + d_l − mean(d)``. So
    sparsity falls linearly with importance, and the most and least important block are ``2 reach`` apart.
    """
    least, most = min(importance.values()), max(importance.values())
    unit = 2 * reach / (most - least) if most > least else 0.0
    above = {block: unit * (value - least) for block, value in importance.items()}
    mean = sum(above.values()) / len(above)
    blocks = {block: survey.sparsity - (value - mean) for block, value in above.items()}
    return from_sparsities(survey, {linear.name: blocks[linear.block] for linear in survey.linears}, report)
