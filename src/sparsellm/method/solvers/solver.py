"""The registry of local solvers, and the solution that they return."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm.errors import NumericalError
from sparsellm.method.gram import Gram
from sparsellm.registry import Registry


@dataclass(frozen=True, eq=False)
class Solution:
    """A pruned weight."""

    weight: Tensor  # (out, in) fp32; +0.0 wherever the mask is False
    mask: Tensor  # (out, in) bool, True where kept; exactly the pattern's count
    # ‖(W − W₀) G^½‖²_F / ‖W₀ G^½‖²_F: the part of the output's energy that is lost
    error: float
    notes: tuple[str, ...] = ()  # messages to the user, such as a raised damping
    fitted: bool = True  # whether kept values are as good as their mask allows; else rounding aims at the dense weight


Solver = Callable[..., Solution]
"""``solver(weight (out, in) fp32, gram, pattern, **options) -> Solution``. Pure: no argument is changed."""

SOLVERS: Registry[Solver] = Registry("solver")


def solution(
    original: Tensor,
    weight: Tensor,
    mask: Tensor,
    gram: Gram,
    notes: tuple[str, ...] = (),
    *,
    fitted: bool = True,
) -> Solution:
    """The solution ``weight (out, in)`` for a weight ``original``, with exact zeros off the mask, and its error.
    ``fitted`` says whether the solver fits the values it keeps. A NumericalError says that a weight is not finite."""
    # A product with floats takes a twentieth of the time of torch.where. + 0.0 turns −0.0 into 0.0; a packed file would
    # store −0.0 as a kept value.
    sparse = (weight * mask.view(torch.uint8).to(weight.dtype)).add_(0.0)
    energy, lost = torch.stack(
        (gram.energy(original), gram.energy(sparse, minus=original))
    ).tolist()
    if not math.isfinite(lost) or not math.isfinite(energy):
        raise NumericalError(
            f"a pruned weight of shape {tuple(weight.shape)} has error {lost} of energy {energy}"
        )
    error = 0.0
    if energy > 0:
        error = lost / energy
    return Solution(sparse, mask, error, notes, fitted)
