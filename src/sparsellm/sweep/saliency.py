"""What a weight's removal costs the loss, counted in histograms: one currency for all weights of the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsellm.chain import Feed, LinearView
from sparsellm.errors import NumericalError
from sparsellm.sweep.gradients import OutputSquares, Visitor, backward_sweep, not_finite

BINS = 1 << 14
LOWEST, HIGHEST = -160.0, 60.0  # of log₂ of a saliency in nats: all that fp32 factors give; a bin is 1 % wide


class SaliencyHistograms(Visitor):
    """Counts of ``log₂ s_ij``, ``s_ij = ½ w_ij² F_ij``, for each linear.

    ``F_ij = Σ_t g_ti² x_tj² / N`` is the exact diagonal of the empirical Fisher of a token, in fp32, one product
    ``(g∘g)ᵀ(x∘x)`` a batch; ``s_ij`` is then the loss, in nats a token, that the weight's removal adds to second order
    (the optimal brain damage of LeCun et al. 1990). Only one block's ``F`` is in memory at a time.

    Attributes:
        counts: int64 ``(BINS,)`` for each linear that a token reached; bin 0 also holds what costs nothing at all.
        outputs: what the same sweep says of whole outputs.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.outputs = OutputSquares(tokens)
        self.counts: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}  # (out, in) fp32

    def linear(self, index: int, linear: LinearView, entering: Tensor, gradient: Tensor) -> None:
        self.outputs.linear(index, linear, entering, gradient)
        rows = entering.flatten(0, -2).float().square()  # (tokens, in)
        if not len(rows):
            return
        if linear.name not in self._fisher:
            shape = (linear.out_features, linear.in_features)
            self._fisher[linear.name] = torch.zeros(shape, device=rows.device)
        self._fisher[linear.name].addmm_(gradient.flatten(0, -2).float().square().T, rows)

    def block(self, index: int, linears: list[LinearView]) -> None:
        for linear in linears:
            if linear.name in self._fisher:
                fisher = self._fisher.pop(linear.name).div_(self.tokens)
                self.counts[linear.name] = histogram(linear, fisher)


def histogram(linear: LinearView, fisher: Tensor) -> Tensor:
    """int64 ``(BINS,)`` on the CPU, from ``F (out, in)``, which is used up.

    Raises:
        NumericalError: ``F`` has values that are NaN or infinite.
    """
    if not bool(torch.isfinite(fisher).all()):
        raise NumericalError(not_finite(linear.name))
    logarithm = fisher.log2_().add_(linear.weight().abs_().log2_(), alpha=2).sub_(1)
    bins = logarithm.sub_(LOWEST).mul_(BINS / (HIGHEST - LOWEST)).clamp_(0, BINS - 1)
    total = torch.zeros(BINS, dtype=torch.int64)
    for rows in bins.split(max(1, (1 << 22) // bins.shape[1])):
        total += torch.bincount(rows.flatten().to(torch.int64), minlength=BINS).cpu()
    return total


@dataclass(frozen=True)
class LossGradients:
    """What one backward sweep of the dense model says of its linears. A linear that no token reached is in neither.

    Attributes:
        tokens: that gradients were taken of.
        output_squares: ``E[g_i²]`` of each output i of a linear, ``(out,)`` fp32: what an error of that output costs
            the loss, to second order.
        saliency: a histogram of each linear, see :class:`SaliencyHistograms`; empty where nobody asked for it.
    """

    tokens: int
    output_squares: dict[str, Tensor]
    saliency: dict[str, Tensor] = field(default_factory=dict)


def loss_gradients(feed: Feed, names: Collection[str], *, saliency: bool = False) -> LossGradients:
    """Sweeps the dense model backward once, and sums up what the methods and allocations ask for.

    Args:
        feed: the chain, and the windows that gradients are taken of.
        names: of the linears to look at.
        saliency: also count the saliency of every single weight.

    Raises:
        NumericalError: a gradient is NaN or infinite.
        ModelError: the model has no gradient.
    """
    tokens = feed.windows.numel()
    seen = SaliencyHistograms(tokens) if saliency else OutputSquares(tokens)
    backward_sweep(feed.in_pieces(), seen, names)
    if isinstance(seen, SaliencyHistograms):
        return LossGradients(tokens, seen.outputs.means(), seen.counts)
    return LossGradients(tokens, seen.means())
