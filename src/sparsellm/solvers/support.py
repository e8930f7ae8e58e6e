"""Least squares on a fixed support: the best values of the weights that are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsellm.statistics import Gram


class Refined(NamedTuple):
    weight: Tensor  # (out, in), zero off the mask
    objective: float  # ‖(W − W₀) (G + damping·diag G)^½‖²_F


def refine_on_support(
    wanted: Tensor, gram: Gram, mask: Tensor, start: Tensor, iterations: int, damping: float = 0.0
) -> Refined:
    """Minimise ``tr (W − W₀)(G + damping·diag G)(W − W₀)ᵀ`` over ``W`` that are zero off the mask.

    Conjugate gradients on all rows at once, preconditioned by the diagonal: one product with ``G`` an iteration,
    whatever the mask (ALPS, arXiv 2406.07831, algorithm 2). The objective falls in every iteration. A singular Gram
    matrix is no obstacle: directions that no token excites stay as they were at the start.

    Args:
        wanted: W₀ (out, in), the weight to come near.
        gram: of the inputs (in, in).
        mask: bool (out, in), True where kept.
        start: (out, in), where to begin; off the mask it is ignored.
        iterations: products with the Gram matrix, one more is needed for the start; 10 are within 1 % of the minimum.
        damping: ridge towards ``wanted``, as a fraction of the mean square of each input.
    """
    matrix, scale = gram.normalised.matrix, gram.scale  # in inputs of unit size the preconditioner is the identity
    weight = torch.where(mask, start, 0.0) * scale
    missing = wanted * scale - weight  # (out, in)
    image = (missing @ matrix).add_(missing, alpha=damping)
    objective = (missing * image).sum(dim=1, keepdim=True)  # (out, 1)
    residual = image.mul_(mask)
    direction = residual.clone()
    square = residual.square().sum(dim=1, keepdim=True)  # (out, 1)
    # A row is done when only rounding is left of its residual; going on would step along noise.
    done = square * torch.finfo(weight.dtype).eps ** 2
    for _ in range(iterations):
        image = (direction @ matrix).add_(direction, alpha=damping).mul_(mask)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = torch.where((square > done) & (curvature > 0), square / curvature, 0.0)  # (out, 1)
        weight.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        objective -= length * square
        before, square = square, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(before > done, square / before, 0.0)).add_(residual)
    return Refined(weight.div_(scale), float(objective.double().sum()))
