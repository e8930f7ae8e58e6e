"""The registry of allocations, what one gives back, and how published scores of blocks become sparsities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsellm.allocation.exact import bounds, round_exactly, shift_to_total
from sparsellm.allocation.survey import Survey
from sparsellm.patterns import Pattern, Unstructured
from sparsellm.registry import Registry


@dataclass(frozen=True)
class Allocation:
    """How many zeros each linear gets.

    Attributes:
        zeros: of each linear, by name.
        report: what the user should see of how they were found; JSON values.
    """

    zeros: dict[str, int]
    report: dict[str, Any] = field(default_factory=dict)

    def patterns(self, survey: Survey) -> dict[str, Pattern]:
        """The pattern of each linear of the survey, which counts exactly those zeros."""
        return {linear.name: pattern_of(self.zeros[linear.name], linear.weights) for linear in survey.linears}


Allocator = Callable[..., Allocation]
"""``allocator(survey, **options) -> Allocation``. The model behind the survey is left as it was."""

ALLOCATIONS: Registry[Allocator] = Registry("allocation")


def pattern_of(zeros: int, weights: int) -> Unstructured:
    """The pattern with this very count: the quotient is off by half a unit in the last place, far less than one."""
    largest = 1 - 2.0**-53  # the fraction of a pattern is below 1, also where it rounds to every weight
    return Unstructured(min(zeros / weights, largest))


def from_sparsities(
    survey: Survey, sparsities: Mapping[str, float], report: dict[str, Any] | None = None
) -> Allocation:
    """Whole zeros from wanted sparsities of all linears, the total exact.

    All are shifted by one number, so that the mean over the weights is right, and clipped to [0, 0.99].
    """
    weights = [linear.weights for linear in survey.linears]
    limits = bounds(weights, survey.sparsity)
    wanted = [sparsities[linear.name] for linear in survey.linears]
    zeros = round_exactly(shift_to_total(weights, wanted, survey.zeros, limits), survey.zeros, limits)
    return Allocation(dict(zip((linear.name for linear in survey.linears), zeros, strict=True)), report or {})


def from_block_importance(
    survey: Survey, importance: Mapping[int, float], reach: float, report: dict[str, Any]
) -> Allocation:
    """The rescaling that OWL (2310.05175, section 3.2) and DLP (2505.23807) share: importance to densities.

    With ``d_l = 2 reach (I_l − min I) / (max I − min I)``, block l keeps ``1 − S + d_l − mean(d)``: so sparsities are
    ``2 reach`` apart at most, in a straight line with importance, and the block of most importance keeps most.

    Args:
        survey: the linears.
        importance: of each block.
        reach: half the distance between the densest and the sparsest block.
    """
    least, most = min(importance.values()), max(importance.values())
    unit = 2 * reach / (most - least) if most > least else 0.0
    above = {block: unit * (value - least) for block, value in importance.items()}
    mean = sum(above.values()) / len(above)
    blocks = {block: survey.sparsity - (value - mean) for block, value in above.items()}
    return from_sparsities(survey, {linear.name: blocks[linear.block] for linear in survey.linears}, report)
