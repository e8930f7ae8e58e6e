"""Powers of two that keep the squares of a weight within the range of fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAFE = 32  # weights from 2^-32 to 2^32 have squares and errors that fp32 holds
LEAST_EXPONENT = -120  # the factor of a smaller weight would leave the range itself


def safe_factor(weight: Tensor) -> float:
    """The power of two that brings a weight's largest value near 1, if its squares could leave fp32's range; else 1."""
    least, most = torch.stack(torch.aminmax(weight)).tolist()
    largest = max(abs(least), abs(most))
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= SAFE:
        return 1.0
    return math.ldexp(1.0, -max(exponent, LEAST_EXPONENT))
