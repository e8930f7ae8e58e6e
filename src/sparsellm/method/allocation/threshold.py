"""One saliency threshold over the whole model: weights whose removal costs the loss least are pruned first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.method.allocation.allocator import ALLOCATIONS, Allocation
from sparsellm.method.allocation.exact import bounds
from sparsellm.method.allocation.survey import Survey
from sparsellm.method.sweep.gradients import BINS, TOKENS
from sparsellm.patterns import round_exactly
from sparsellm.records import Settings
from sparsellm.registry import Needs


@ALLOCATIONS.register(
    "threshold",
    paper="optimal brain damage (LeCun et al. 1990) with the empirical Fisher",
    needs=lambda options: Needs(gradient_tokens=options["tokens"], token_states=True),
)
def threshold(
    survey: Survey,
    *,
    span: Annotated[
        float, Field(ge=0, le=1), "how far a linear's sparsity may be from the target"
    ] = 0.15,
    tokens: Annotated[
        int,
        Field(ge=1),
        "calibration tokens for the gradients, in four windows or more",
    ] = TOKENS,
) -> Allocation:
    """Zeros of each linear: its weights whose saliency ½ w² E[g² x²] is below one threshold for the whole model.

    A linear that no token reached has the target sparsity, and so has one whose weight the model uses in several
    places, because its gradients are taken at only one of them."""
    counts = {
        name: one
        for name, one in survey.gradients.saliency.items()
        if name not in survey.shared
    }
    report: Settings = {
        "tokens": survey.gradients.tokens,
        "kept_target": [*sorted(survey.names - counts.keys())],
    }
    return replace(from_histograms(survey, counts, span=span), report=report)


def from_histograms(
    survey: Survey, counts: Mapping[str, Tensor], *, span: float
) -> Allocation:
    """The allocation of ``threshold`` from the histograms ``counts``, int64 ``(BINS,)``, of linears that have one.
    In the bin that contains the threshold, all linears lose the same share of the weights in that bin."""
    weights = [linear.weights for linear in survey.linears]
    fewest, most = bounds(weights, survey.sparsity, span)
    # (linears, edges): weights below each bin's edge
    below = torch.zeros(len(weights), BINS + 1, dtype=torch.float64)
    for i, linear in enumerate(survey.linears):
        if linear.name in counts:
            below[i, 1:] = counts[linear.name].cumsum(0)
        else:
            fewest[i] = math.floor(survey.sparsity * weights[i])
            most[i] = math.ceil(survey.sparsity * weights[i])
    low, high = (
        torch.tensor(limits, dtype=torch.float64)[:, None] for limits in (fewest, most)
    )
    zeros = below.clamp_(low, high)  # with the threshold at each edge
    edge = int(torch.searchsorted(zeros.sum(0), float(survey.zeros)))
    if edge == 0 or edge > BINS:  # all at their fewest, or all at their most
        chosen = zeros[:, min(edge, BINS)]
    else:
        before = zeros[:, edge - 1]
        after = zeros[:, edge]
        chosen = before + (after - before) * (
            (survey.zeros - before.sum()) / (after - before).sum()
        )
    return Allocation.of(
        survey.linears, round_exactly(chosen.tolist(), survey.zeros, (fewest, most))
    )
