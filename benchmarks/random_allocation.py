"""A plugin for `equal.py`: an allocation by chance, to compare those with that choose for a reason."""

from __future__ import annotations

import random
from typing import Annotated

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation, from_sparsities
from sparsellm.allocation.survey import Survey
from sparsellm.registry import Workspace


@ALLOCATIONS.register("random", paper="none", workspace=Workspace(weights=0, grams=0))
def chance(
    survey: Survey,
    *,
    span: Annotated[float, "how far a linear's sparsity may be from the target"] = 0.15,
    seed: Annotated[int, "of the sparsities"] = 0,
) -> Allocation:
    """Sparsities of linears drawn uniformly from the target ± span."""
    draw = random.Random(seed)
    return from_sparsities(
        survey, {linear.name: survey.sparsity + draw.uniform(-span, span) for linear in survey.linears}
    )
