"""DLP: sparsity of a block by the median of its Wanda metric."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation, from_block_importance
from sparsellm.allocation.survey import Survey
from sparsellm.patterns import lowest
from sparsellm.registry import Workspace


@ALLOCATIONS.register("dlp", paper="arXiv 2505.23807", workspace=Workspace(weights=1, grams=0, blocks=3))
def dlp(
    survey: Survey,
    *,
    alpha: Annotated[float, Field(ge=0), "α: sparsities of blocks differ by 2α at most"] = 0.15,
) -> Allocation:
    """Relative importance by the median: I_l = 1 − median(A^l) / Σ_k median(A^k), A the Wanda metric of a block.

    The median is over all linears of a block together (of an even number, the lower of the two in the middle). Then
    :func:`~sparsellm.allocation.allocator.from_block_importance` rescales with α.
    """
    medians = {block: _median(metrics) for block, metrics in survey.wanda_metrics()}
    total = sum(medians.values()) or 1.0
    importance = {block: 1 - median / total for block, median in medians.items()}
    return from_block_importance(survey, importance, alpha, {"importance": [importance[b] for b in survey.blocks]})


def _median(metrics: list[Tensor]) -> float:
    if not metrics:
        return 0.0
    values = torch.cat([metric.flatten() for metric in metrics])
    return float(lowest(values[None], (len(values) + 1) // 2))
