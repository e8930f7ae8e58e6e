"""The same sparsity in every linear."""

from __future__ import annotations

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation
from sparsellm.allocation.survey import Survey
from sparsellm.registry import Workspace


@ALLOCATIONS.register("uniform", paper="none", workspace=Workspace(weights=0, grams=0))
def uniform(survey: Survey) -> Allocation:
    """The same sparsity in every linear, each rounded by itself, as in the pruning papers."""
    return Allocation.of(survey.linears, [round(survey.sparsity * linear.weights) for linear in survey.linears])
