"""The saliency of every weight (the loss that its removal adds), as one histogram for each linear."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsellm.chain import Feed, LinearView
from sparsellm.errors import NumericalError
from sparsellm.sweep.gradients import SHARE, OutputSquares, Visitor, backward_sweep, not_finite

BINS = 1 << 14
LOWEST, HIGHEST = -160.0, 60.0  # log₂ of a saliency in nats: the range of fp32 factors; a bin is 1 % wide


class SaliencyHistograms(Visitor):
    """Counts of ``log₂ s_ij``, ``s_ij = ½ w_ij² F_ij``, for each linear.

    ``F_ij = Σ_t g_ti² x_tj² / N`` is the diagonal of the empirical Fisher of a token: one product ``(g∘g)ᵀ(x∘x)`` per
    batch, with factors in bf16 if ``narrow`` (their rounding is less than a bin), summed in fp32. ``s_ij`` is the loss,
    in nats a token, that removing the weight adds, to second order (the optimal brain damage of LeCun et al. 1990).
    Only one block's ``F`` is in memory at a time.

    Attributes:
        counts: int64 ``(BINS,)`` for each linear that a token reached; bin 0 includes weights of zero saliency.
        outputs: the squared gradients of whole outputs, from the same sweep.
    """

    def __init__(self, tokens: int, *, narrow: bool = False) -> None:
        self.tokens = tokens
        self.dtype = torch.bfloat16 if narrow else torch.float32
        self.outputs = OutputSquares(tokens)
        self.counts: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}  # (out, in) fp32

    def linear(self, index: int, linear: LinearView, x: Tensor, gradient: Tensor) -> None:
        self.outputs.linear(index, linear, x, gradient)
        rows = x.flatten(0, -2).float().square()  # (tokens, in)
        if not len(rows):
            return
        if linear.name not in self._fisher:
            shape = (linear.out_features, linear.in_features)
            self._fisher[linear.name] = torch.zeros(shape, device=rows.device)
        costs = gradient.flatten(0, -2).float().square()  # (tokens, out)
        self._fisher[linear.name] += costs.to(self.dtype).T @ rows.to(self.dtype)

    def block(self, index: int, linears: list[LinearView]) -> None:
        for linear in linears:
            if linear.name in self._fisher:
                fisher = self._fisher.pop(linear.name).div_(self.tokens)
                self.counts[linear.name] = histogram(linear, fisher)


def histogram(linear: LinearView, fisher: Tensor) -> Tensor:
    """The histogram of a linear, int64 ``(BINS,)`` on the CPU, from ``F (out, in)``, which is overwritten.

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
    """The results of one backward sweep of the dense model. Linears that no token reached are in neither mapping.

    Attributes:
        tokens: the number of tokens of the sweep.
        output_squares: ``E[g_i²]`` of each output i of a linear, ``(out,)`` fp32: the cost of an error of that output
            to the loss, to second order.
        saliency: a histogram of each linear, see :class:`SaliencyHistograms`; empty if it was not requested.
    """

    tokens: int
    output_squares: dict[str, Tensor]
    saliency: dict[str, Tensor] = field(default_factory=dict)


def loss_gradients(feed: Feed, names: Collection[str], *, saliency: bool = False) -> LossGradients:
    """The squared gradients at outputs, and optionally the saliency of weights, from one backward sweep.

    Args:
        feed: the dense chain, and the windows for the gradients.
        names: the linears to include.
        saliency: also count the saliency of every weight.

    Raises:
        NumericalError: a gradient is NaN or infinite.
        ModelError: the model has no gradient.
    """
    tokens = feed.windows.numel()
    narrow = feed.chain.products is not None
    seen = SaliencyHistograms(tokens, narrow=narrow) if saliency else OutputSquares(tokens)
    backward_sweep(feed.in_pieces(), seen, names, share=SHARE)
    if isinstance(seen, SaliencyHistograms):
        return LossGradients(tokens, seen.outputs.means(), seen.counts)
    return LossGradients(tokens, seen.means())
