"""ADMM: alternate between weights and mask, then fit the kept weights.

Minimise ``tr (W − W₀) H (W − W₀)ᵀ`` over sparse ``W``, where ``H`` is ``G`` with a ridge, by splitting ``W = D`` with
``D`` sparse (ALPS, arXiv 2406.07831, eq. 4; Boža, arXiv 2401.02938). With the scaled multiplier ``V``, an iteration is

    W ← W₀ + (D − V − W₀) ρ(H + ρI)⁻¹        the weights, drawn towards the last sparse ones
    D ← W + V, pruned to the pattern           the sparse weights
    V ← V + W − D                              the multiplier of the constraint W = D

``D`` equals ``W + V`` on the support and ``V`` equals ``W + V`` off it, so ``W + V`` is the only state. An iteration is
one matrix product. All linears with the same input share ``(H + ρI)⁻¹``, because ρ follows a fixed schedule.

Differences from the papers, measured on the linears of a 135M model, on tokens held out from the Gram matrix:
* The projection needs a scale in which weights compare. The papers divide each input by its root mean square. Here each
  input is divided by the part of it that the other inputs do not predict, as in the optimal brain surgeon: the error
  is 0 to 3 % lower.
* The support has its final size from the first iteration. Growing it step by step is no better.
* ρ rises from 0.2 to 1 in five steps. Without the rise the support does not settle and the error doubles.
* The ridge is 0.05, not 0.01, of the mean curvature: slightly worse on the tokens of the Gram matrix, better on others.
* Weights compete in the whole matrix. If they compete within rows, the error at 70 % is 1 to 23 % higher.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.patterns import Pattern, Scope
from sparsellm.registry import Workspace
from sparsellm.solvers.solver import SOLVERS, Solution, check, solution
from sparsellm.solvers.support import refine_on_support
from sparsellm.statistics import Gram

PREDICTION_RIDGE = 0.1  # for predicting an input from the others; anything from 0.02 to 1 works
RHO_STEPS = 5  # each needs an inverse


@SOLVERS.register(
    "admm",
    paper="arXiv 2406.07831",
    workspace=Workspace(weights=12, grams=3, remembered=5, products=40),
    distributed=True,
)
def admm(  # noqa: PLR0913 - options
    weight: Tensor,
    gram: Gram,
    pattern: Pattern,
    *,
    iterations: Annotated[int, Field(ge=0), "alternations of weights and mask; 0 keeps the mask of the start"] = 20,
    refine_iterations: Annotated[int, Field(ge=0), "conjugate-gradient steps on the weights that are kept"] = 8,
    scope: Annotated[Scope, "weights compete in the whole matrix, or in each row (output)"] = "matrix",
    damping: Annotated[float, Field(ge=0), "ridge towards the dense weight, in mean curvatures"] = 0.05,
    rho_start: Annotated[float, Field(gt=0), "first penalty between weights and mask; the mean curvature is 1"] = 0.2,
    rho_stop: Annotated[float, Field(gt=0), "last penalty between weights and mask"] = 1.0,
) -> Solution:
    """Alternates between weights and mask, each optimal near the other, then refits the kept weights."""
    check(weight, gram, pattern)
    metric, scale = gram.remember(("admm", damping), lambda: _metric(gram, damping))
    dense = weight.masked_fill(gram.dead, 0.0) * scale  # (out, in): W₀, from here on in the units of the metric
    mask = pattern.mask(dense.abs(), scope)
    best = refine_on_support(dense, metric, mask, dense, refine_iterations)

    state, kept = dense, mask  # state: W + V
    notes: tuple[str, ...] = ()
    last_rho = rho_start
    for iteration in range(iterations):
        step = round((RHO_STEPS - 1) * iteration / max(iterations - 1, 1))
        rho = rho_start * (rho_stop / rho_start) ** (step / (RHO_STEPS - 1))
        inverse = metric.inverse(rho)
        notes = notes or inverse.notes
        sparse = torch.where(kept, state, 0.0)  # D
        multiplier = (state - sparse).mul_(last_rho / rho)  # V, in units of the present ρ
        pull = sparse.sub_(multiplier).sub_(dense)  # D − V − W₀
        state = torch.addmm(dense, pull, inverse.matrix, alpha=inverse.damping * metric.mean_diagonal).add_(multiplier)
        kept = pattern.mask(state.abs(), scope)
        last_rho = rho
        del sparse, multiplier, pull, inverse  # the fit that follows takes the most memory

    if iterations:
        # With few or collinear inputs the last mask may be worse than the first: the better of the two is kept.
        last = refine_on_support(dense, metric, kept, state, refine_iterations)
        if pattern.total(last.objective) < pattern.total(best.objective):
            best, mask = last, kept
    return solution(weight, best.weight / scale, mask, gram, notes)


def _metric(gram: Gram, damping: float) -> tuple[Gram, Tensor]:
    """``H = G + ridge`` with inputs scaled so that weights compare, and the scale of the weights (in,).

    ``1 / (R + τI)⁻¹_jj − τ`` is the part of an input's mean square (1 in the normalised ``R``) that others do not
    predict. The mean diagonal of the scaled ``G`` is 1.
    """
    normalised = gram.normalised
    unexplained = 1 / normalised.inverse(PREDICTION_RIDGE).matrix.diagonal() - PREDICTION_RIDGE
    unit = unexplained.clamp(min=1e-4).sqrt()
    matrix = (normalised.matrix / unit).div_(unit[:, None])
    size = matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    matrix /= size
    matrix.diagonal().add_(damping)
    return Gram(matrix, gram.tokens), gram.scale * unit * size.sqrt()
