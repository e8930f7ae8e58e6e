"""One saliency threshold over the whole model: weights whose removal costs the loss least are pruned first."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation
from sparsellm.allocation.exact import bounds, round_exactly
from sparsellm.allocation.survey import Survey
from sparsellm.registry import Needs
from sparsellm.sweep.gradients import TOKENS
from sparsellm.sweep.saliency import BINS


def _needs(options: dict[str, Any]) -> Needs:
    return Needs(surveyed_tokens=options["tokens"], gradient_tokens=options["tokens"], token_states=True)


@ALLOCATIONS.register(
    "threshold",
    paper="optimal brain damage (LeCun et al. 1990) with the empirical Fisher",
    needs=_needs,
)
def threshold(
    survey: Survey,
    *,
    level: Annotated[Literal["block", "linear"], "whether each block or each linear has its own sparsity"] = "linear",
    span: Annotated[float, Field(ge=0, le=1), "how far a linear's sparsity may be from the target"] = 0.15,
    tokens: Annotated[int, Field(ge=1), "calibration tokens for the gradients, in four windows or more"] = TOKENS,
) -> Allocation:
    """Zeros of each linear: its weights whose saliency ½ w² E[g² x²] is below one threshold for the whole model.

    See :class:`~sparsellm.sweep.saliency.SaliencyHistograms`. With ``level=block`` the weights are counted for each
    block, and its linears share one sparsity. A linear that no token reached has the target sparsity, and so has one
    whose weight the model uses in several places, because the sweep covers only one of them.
    """
    counts = {name: one for name, one in survey.gradients.saliency.items() if name not in survey.shared}
    report = {"tokens": survey.gradients.tokens, "kept_target": sorted(survey.names - counts.keys())}
    return replace(from_histograms(survey, counts, level=level, span=span), report=report)


def from_histograms(
    survey: Survey, counts: dict[str, Tensor], *, level: Literal["block", "linear"], span: float
) -> Allocation:
    """As :func:`threshold`, from the histograms ``counts``, int64 ``(BINS,)``, of the linears that have one.

    In the bin that contains the threshold, all linears lose the same share of the weights in that bin.
    """
    linears = survey.linears
    weights = [linear.weights for linear in linears]
    fewest, most = bounds(weights, survey.sparsity, span)
    for i, linear in enumerate(linears):
        if linear.name not in counts:
            fewest[i], most[i] = math.floor(survey.sparsity * weights[i]), math.ceil(survey.sparsity * weights[i])
    groups: dict[object, list[int]] = {}  # indices of the linears that share one sparsity
    for i, linear in enumerate(linears):
        alone = level == "linear" or linear.name not in counts
        groups.setdefault(linear.name if alone else linear.block, []).append(i)
    members = list(groups.values())
    low = torch.tensor([sum(fewest[i] for i in group) for group in members], dtype=torch.float64)
    high = torch.tensor([sum(most[i] for i in group) for group in members], dtype=torch.float64)
    below = torch.zeros(len(members), BINS + 1, dtype=torch.float64)  # weights below each edge of the bins
    for row, group in enumerate(members):
        for i in group:
            if linears[i].name in counts:
                below[row, 1:] += counts[linears[i].name].cumsum(0)
    given = below.clamp(low[:, None], high[:, None])  # (groups, edges): zeros with the threshold at each edge
    edge = int(torch.searchsorted(given.sum(0), float(survey.zeros)))
    if edge == 0 or edge > BINS:  # all at their fewest, or all at their most
        chosen = given[:, min(edge, BINS)]
    else:
        before, after = given[:, edge - 1], given[:, edge]
        step = (after - before).sum()
        chosen = before + (after - before) * ((survey.zeros - before.sum()) / step)
    wanted = [0.0] * len(linears)
    for group, zeros in zip(members, chosen.tolist(), strict=True):
        size = sum(weights[i] for i in group)
        for i in group:
            wanted[i] = zeros * weights[i] / size
    rounded = round_exactly(wanted, survey.zeros, (fewest, most))
    return Allocation(dict(zip((linear.name for linear in linears), rounded, strict=True)))
