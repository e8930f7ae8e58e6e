"""ATP: sparsity that rises (or falls) linearly with depth."""

from __future__ import annotations

from typing import Annotated

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation, from_sparsities
from sparsellm.allocation.survey import Survey
from sparsellm.registry import Workspace


@ALLOCATIONS.register("atp", paper="arXiv 2502.14770", workspace=Workspace(weights=0, grams=0))
def atp(
    survey: Survey,
    *,
    b: Annotated[float, "how much sparser each block is than the one before it"] = 0.005,
) -> Allocation:
    """Arithmetic progression over the L blocks: s_i = S − b (L − 1) / 2 + b i for i = 0 … L − 1."""
    first = survey.sparsity - b * (len(survey.blocks) - 1) / 2
    place = {block: i for i, block in enumerate(survey.blocks)}
    return from_sparsities(survey, {linear.name: first + b * place[linear.block] for linear in survey.linears})
