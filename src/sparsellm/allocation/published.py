"""The rules of papers, and the same sparsity everywhere."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation, from_block_importance
from sparsellm.allocation.survey import Survey
from sparsellm.patterns import lowest
from sparsellm.registry import Workspace


@ALLOCATIONS.register("uniform", paper="none", workspace=Workspace(weights=0, grams=0))
def uniform(survey: Survey) -> Allocation:
    """The same sparsity in every linear, each rounded by itself, as in the pruning papers."""
    return Allocation.of(survey.linears, [round(survey.sparsity * linear.weights) for linear in survey.linears])


@ALLOCATIONS.register("owl", paper="arXiv 2310.05175", workspace=Workspace(weights=1, grams=0, blocks=1))
def owl(
    survey: Survey,
    *,
    M: Annotated[float, Field(gt=0), "an outlier is above M times the mean of its block"] = 5.0,
    lam: Annotated[float, Field(ge=0), "λ: sparsities of blocks differ by 2λ at most"] = 0.08,
) -> Allocation:
    """Importance of a block by its outliers: the share of its Wanda metrics above M times their mean.

    ``D_l = Σ 1(A_ij > M · mean(A^l)) / |A^l|`` over all linears of a block, ``A_ij = |w_ij| ‖x_j‖`` (section 3.2)."""
    shares = {}
    for block, metrics in survey.wanda_metrics():
        count = max(sum(metric.numel() for metric in metrics), 1)
        limit = M * sum(float(metric.double().sum()) for metric in metrics) / count
        shares[block] = sum(int((metric > limit).sum()) for metric in metrics) / count
    return from_block_importance(survey, shares, lam, {"outlier_share": [*shares.values()]})


@ALLOCATIONS.register("dlp", paper="arXiv 2505.23807", workspace=Workspace(weights=1, grams=0, blocks=3))
def dlp(
    survey: Survey,
    *,
    alpha: Annotated[float, Field(ge=0), "α: sparsities of blocks differ by 2α at most"] = 0.15,
) -> Allocation:
    """Relative importance by the median: I_l = 1 − median(A^l) / Σ_k median(A^k), A the Wanda metric of a block.

    The median is over all linears of a block together (of an even number, the lower of the two in the middle)."""
    medians = {}
    for block, metrics in survey.wanda_metrics():
        values = torch.cat([metric.flatten() for metric in metrics] or [torch.zeros(1)])
        medians[block] = float(lowest(values[None], (len(values) + 1) // 2))
    total = sum(medians.values()) or 1.0
    importance = {block: 1 - median / total for block, median in medians.items()}
    return from_block_importance(survey, importance, alpha, {"importance": [*importance.values()]})
