"""Least squares on a fixed support: the best values of the weights that are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsellm.method.gram import Gram


class Refined(NamedTuple):
    weight: Tensor  # (out, in), zero off the mask
    objective: float  # ‖(W − W₀) (G + damping·diag G)^½‖²_F


def refine_on_support(
    original: Tensor,
    gram: Gram,
    mask: Tensor,
    start: Tensor,
    iterations: int,
    damping: float = 0.0,
) -> Refined:
    """Minimise ``tr (W − W₀)(G + damping·diag G)(W − W₀)ᵀ`` over ``W (out, in)`` that are zero off the mask, for the
    original ``W₀``, from ``start``, which is ignored off the mask.

    Conjugate gradients on all rows at once, preconditioned by the diagonal (ALPS, arXiv 2406.07831, algorithm 2): ten
    iterations reach the minimum within 1 %. No row ends worse than it started, even if the Gram matrix is singular.
    Directions that no token excites keep their start."""
    scale = gram.scale
    matrix = gram.divided_by(scale)  # where the preconditioner is the identity
    target = original * scale  # (out, in)
    # torch selects by a bool mask twenty times as slowly
    kept = mask.view(torch.uint8).to(original.dtype)
    begin = start * kept * scale
    missing = target - begin
    image = (missing @ matrix).add_(missing, alpha=damping)
    begin_loss = (missing * image).sum(dim=1, keepdim=True)  # (out, 1)

    # A row is done when its residual is rounding noise: the curvature along it is noise too, and steps are unbounded.
    # (out, 1)
    noise = (torch.finfo(matrix.dtype).eps * matrix.norm()) ** 2 * missing.square().sum(
        dim=1, keepdim=True
    )
    del missing
    weight = begin.clone()
    residual = image.mul_(kept)
    direction = residual.clone()
    nothing = residual.new_zeros(1)
    square = residual.square().sum(dim=1, keepdim=True)  # (out, 1)
    for _ in range(iterations):
        # Bf16Products replaces this call. Rounded factors only make the step a little worse than the best.
        image = (
            torch.addmm(nothing, direction, matrix)
            .add_(direction, alpha=damping)
            .mul_(kept)
        )
        curvature = (direction * image).sum(dim=1, keepdim=True)
        # (out, 1)
        length = torch.where(
            (square > noise) & (curvature > 0), square / curvature, 0.0
        )
        weight.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before = square
        square = residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(before > noise, square / before, 0.0)).add_(residual)

    del image, residual, direction
    missing = target - weight
    # (out, 1)
    loss = (missing * (missing @ matrix).add_(missing, alpha=damping)).sum(
        dim=1, keepdim=True
    )
    weight = torch.where(loss <= begin_loss, weight, begin)
    return Refined(
        weight.div_(scale), float(torch.minimum(loss, begin_loss).double().sum())
    )
