"""A plugin for `equal.py`: allocations to compare ours with, those of two papers and one by chance.

The papers score blocks by the Wanda metrics of all their weights, ``|w_ij| √E[x_j²]``, and turn scores ``I_l`` into
sparsities alike: with ``d_l = 2 reach (I_l − min I) / (max I − min I)``, block l keeps ``1 − S + d_l − mean d``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.method.allocation.allocator import (
    ALLOCATIONS,
    Allocation,
    from_sparsities,
)
from sparsellm.method.allocation.survey import Survey
from sparsellm.model import LinearView
from sparsellm.model.capture import watch


@ALLOCATIONS.register("random", paper="none")
def chance(
    survey: Survey,
    *,
    span: Annotated[float, "how far a linear's sparsity may be from the target"] = 0.15,
    seed: Annotated[int, "of the sparsities"] = 0,
) -> Allocation:
    """Sparsities of linears drawn uniformly from the target ± span."""
    draw = random.Random(seed)
    return from_sparsities(
        survey,
        {
            linear.name: survey.sparsity + draw.uniform(-span, span)
            for linear in survey.linears
        },
    )


@ALLOCATIONS.register("owl", paper="arXiv 2310.05175")
def owl(
    survey: Survey,
    *,
    M: Annotated[float, "an outlier is above M times the mean of its block"] = 5.0,
    lam: Annotated[float, "sparsities of blocks differ by 2 lam at most"] = 0.08,
) -> Allocation:
    """Importance of a block by its outliers: the share of its metrics above M times their mean (section 3.2)."""
    shares = {
        block: float((values > M * values.double().mean()).double().mean())
        for block, values in _metrics(survey)
    }
    return _from_importance(survey, shares, lam)


@ALLOCATIONS.register("dlp", paper="arXiv 2505.23807")
def dlp(
    survey: Survey,
    *,
    alpha: Annotated[float, "sparsities of blocks differ by 2 alpha at most"] = 0.15,
) -> Allocation:
    """Relative importance of a block: 1 less the median of its metrics divided by the sum of all blocks' medians."""
    medians = {block: float(values.median()) for block, values in _metrics(survey)}
    total = sum(medians.values()) or 1.0
    return _from_importance(
        survey, {block: 1 - median / total for block, median in medians.items()}, alpha
    )


def _metrics(survey: Survey) -> Iterator[tuple[int, Tensor]]:
    """For each block the metrics of all its weights in one vector."""
    chain, feed = survey.chain, survey.feed
    assert parallel.size() == 1
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        sums[linear.name] = sums.get(linear.name, 0.0) + rows.square().sum(0)
        tokens[linear.name] = tokens.get(linear.name, 0) + len(rows)

    stream = feed.stream()
    for index in range(len(chain)):
        seen = [
            linear for linear in chain.linears(index) if linear.name in survey.names
        ]
        with chain.block(index, feed.blocks), watch(seen, see):
            stream.advance(index)
            reached = [linear for linear in seen if linear.name in sums]
            roots = (
                (sums[linear.name] / tokens[linear.name]).sqrt() for linear in reached
            )
            parts = [
                (linear.weight().abs() * root).flatten()
                for linear, root in zip(reached, roots, strict=True)
            ]
        if parts:
            yield index, torch.cat(parts)
    stream.close()


def _from_importance(
    survey: Survey, importance: Mapping[int, float], reach: float
) -> Allocation:
    least, most = min(importance.values()), max(importance.values())
    above = {
        block: 2 * reach * (value - least) / ((most - least) or 1.0)
        for block, value in importance.items()
    }
    mean = sum(above.values()) / len(above)
    return from_sparsities(
        survey,
        {
            linear.name: survey.sparsity - above[linear.block] + mean
            for linear in survey.linears
        },
    )
