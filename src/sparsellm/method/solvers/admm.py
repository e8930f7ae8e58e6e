"""ADMM: alternate between weights and mask, then fit the kept weights.

Minimise ``tr (W − W₀) H (W − W₀)ᵀ`` over sparse ``W``, where ``H`` is ``G`` with a ridge, by splitting ``W = D`` with
``D`` sparse (ALPS, arXiv 2406.07831, eq. 4; Boža, arXiv 2401.02938). With the scaled multiplier ``V``, an iteration is

    W ← W₀ + (D − V − W₀) ρ(H + ρI)⁻¹        the weights, drawn towards the last sparse ones
    D ← W + V, pruned to the pattern           the sparse weights
    V ← V + W − D                              the multiplier of the constraint W = D

``D`` equals ``W + V`` on the support and ``V`` equals ``W + V`` off it, so ``W + V`` is the only state. An iteration is
one matrix product. All linears with the same input share ``(H + ρI)⁻¹``, because ρ follows a fixed schedule. Where the
run multiplies in bf16, so do the iterations and the fit; what decides between two solutions is fp32.

Differences from the papers, measured on the linears of a 135M model, on tokens held out from the Gram matrix:
* Weights compare with each input divided by the part of it that the other inputs do not predict, as in the optimal
  brain surgeon, not by its root mean square: the error is 0 to 3 % lower.
* The support has its final size from the first iteration. Growing it step by step is no better.
* Four steps of conjugate gradients end the fit: the last iterations are near the minimum, and four more gain nothing.
* The ridge is 0.05, not 0.01, of the mean curvature: slightly worse on the tokens of the Gram matrix, better on others.
* Every input's mean square gets some of the mean of all (``FLOOR``): weights of inputs that are nearly 0 stay small.
* Weights compete in the whole matrix. If they compete within rows, the error at 70 % is 1 to 23 % higher.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.method.solvers.solver import SOLVERS, Solution, solution
from sparsellm.method.solvers.support import refine_on_support
from sparsellm.patterns import Pattern

# for predicting an input from the others; anything from 0.02 to 1 works
PREDICTION_RIDGE = 0.1
# First and last penalty between weights and mask; the mean curvature is 1. The support settles where ρ rises: without
# the rise the error is up to 7 % higher.
RHO = (0.2, 0.8)
RHO_STEPS = 4  # each needs an inverse
# Added to every input's mean square, times the damping and the mean of all: else weights of an input that is nearly 0
# grow to hundreds of times their size for nothing, and rounding and the sweep, whose steps are relative, suffer.
FLOOR = 0.02
# for the refit of the first mask: it ends within a tenth of the minimum
ROUGH_ITERATIONS = 3
CLEARLY_BETTER = 0.9  # the first mask is refitted in full only if the last one's objective is above this share of it


@SOLVERS.register(
    "admm",
    paper="arXiv 2406.07831",
    narrow=True,
)
def admm(
    weight: Tensor,
    gram: Gram,
    pattern: Pattern,
    *,
    iterations: Annotated[
        int,
        Field(ge=0),
        "alternations of weights and mask; 0 keeps the mask of the start",
    ] = 16,
    refine_iterations: Annotated[
        int, Field(ge=0), "conjugate-gradient steps on the weights that are kept"
    ] = 4,
    damping: Annotated[
        float, Field(ge=0), "ridge towards the dense weight, in mean curvatures"
    ] = 0.05,
) -> Solution:
    """Alternates between weights, drawn to the last sparse ones, and their mask, then refits the kept weights."""
    metric, scale = gram.remember(("admm", damping), lambda: _metric(gram, damping))
    # (out, in): W₀, from here on in the units of the metric
    dense = weight * scale.masked_fill(gram.dead, 0.0)
    kept = pattern.mask(dense.abs())
    first = refine_on_support(
        dense,
        metric,
        kept,
        dense,
        ROUGH_ITERATIONS if iterations else refine_iterations,
    )
    if not iterations:
        return solution(weight, first.weight / scale, kept, gram)

    start = kept
    state = dense  # W + V
    notes: tuple[str, ...] = ()
    last_rho = RHO[0]
    for iteration in range(iterations):
        step = round((RHO_STEPS - 1) * iteration / max(iterations - 1, 1))
        rho = RHO[0] * (RHO[1] / RHO[0]) ** (step / (RHO_STEPS - 1))
        inverse = metric.inverse(rho)
        notes = notes or inverse.notes
        # D; torch selects by a bool mask twenty times as slowly
        sparse = state * kept.view(torch.uint8).float()
        # V, in units of the present ρ
        multiplier = (state - sparse).mul_(last_rho / rho)
        # ρ(D − V − W₀)
        pull = (
            sparse.sub_(multiplier)
            .sub_(dense)
            .mul_(inverse.damping * metric.mean_diagonal)
        )
        # in bf16 where the run multiplies in it
        state = torch.addmm(multiplier.add_(dense), pull, inverse.matrix)
        # what is not finite stays so, and `solution` refuses it
        kept = pattern.unchecked(state.abs())
        last_rho = rho
        # the fit that follows takes the most memory
        del sparse, multiplier, pull, inverse

    last = refine_on_support(dense, metric, kept, state, refine_iterations)
    # With few or collinear inputs the last mask may be worse than the first: the better of the two is kept.
    if last.objective > CLEARLY_BETTER * first.objective:
        first = refine_on_support(dense, metric, start, first.weight, refine_iterations)
        if first.objective < last.objective:
            last = first
            kept = start
    return solution(weight, last.weight / scale, kept, gram, notes)


def _metric(gram: Gram, damping: float) -> tuple[Gram, Tensor]:
    """``H = G + ridge``, with a floor under the mean squares of inputs, scaled so that weights compare, and the scale
    of the weights (in,).

    ``1 / (R + τI)⁻¹_jj − τ`` is the part of an input's mean square (1 in the normalised ``R``) that others do not
    predict. The mean diagonal of the scaled ``G`` is 1 over live inputs."""
    floor = FLOOR * damping * gram.mean_diagonal
    scale = (gram.diagonal + floor).sqrt().masked_fill(gram.dead, 1.0)
    matrix = gram.divided_by(scale)
    matrix.diagonal().masked_fill_(~gram.dead, 1.0)
    normalised = Gram(matrix, gram.tokens)
    unexplained = (
        1 / normalised.inverse(PREDICTION_RIDGE).matrix.diagonal() - PREDICTION_RIDGE
    )
    unit = unexplained.clamp(min=1e-4).sqrt()
    matrix = normalised.divided_by(unit)
    # a dead input would make the ridge and ρ smaller for the others
    live = (~gram.dead).sum().clamp(min=1)
    size = (matrix.diagonal().sum() / live).clamp(min=torch.finfo(matrix.dtype).tiny)
    matrix /= size
    matrix.diagonal().masked_fill_(gram.dead, 1.0).add_(damping)
    return Gram(matrix, gram.tokens), scale * unit * size.sqrt()
