"""OWL: sparsity of a block by the outliers of its Wanda metric."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation, from_block_importance
from sparsellm.allocation.survey import Survey
from sparsellm.registry import Workspace


@ALLOCATIONS.register("owl", paper="arXiv 2310.05175", workspace=Workspace(weights=1, grams=0, blocks=1))
def owl(
    survey: Survey,
    *,
    M: Annotated[float, Field(gt=0), "an outlier is above M times the mean of its block"] = 5.0,
    lam: Annotated[float, Field(ge=0), "λ: sparsities of blocks differ by 2λ at most"] = 0.08,
) -> Allocation:
    """Importance of a block by its outliers: the share of its Wanda metrics above M times their mean.

    ``D_l = Σ 1(A_ij > M · mean(A^l)) / |A^l|`` over all linears of a block, ``A_ij = |w_ij| ‖x_j‖`` (section 3.2).
    Then :func:`~sparsellm.allocation.allocator.from_block_importance` rescales with λ.
    """
    shares = {}
    for block, metrics in survey.wanda_metrics():
        count = sum(metric.numel() for metric in metrics)
        limit = M * sum(float(metric.double().sum()) for metric in metrics) / max(count, 1)
        shares[block] = sum(int((metric > limit).sum()) for metric in metrics) / max(count, 1)
    return from_block_importance(survey, shares, lam, {"outlier_share": [shares[b] for b in survey.blocks]})
