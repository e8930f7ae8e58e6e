"""What a weight's removal costs the loss, counted in histograms: one currency for all weights of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsellm.allocation.survey import Survey
from sparsellm.chain import LinearView
from sparsellm.errors import NumericalError
from sparsellm.refine.gradients import OutputSquares, Visitor, not_finite

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


def saliency_histograms(survey: Survey) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The histogram of every linear of the survey that a token reached, and ``E[g_i²]`` of its outputs ``(out,)``, by
    one backward sweep of the dense model."""
    seen = SaliencyHistograms(survey.windows.numel())
    survey.sweep(seen)
    return seen.counts, seen.outputs.means()
