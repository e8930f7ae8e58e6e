"""Rounds sparsities to whole numbers of zeros that add up exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsellm.patterns import Limits

LARGEST = 0.99  # the largest sparsity of one linear: without any weights its outputs would not depend on its inputs


def bounds(weights: Sequence[int], sparsity: float, span: float = 1.0) -> Limits:
    """The fewest and the most zeros of each linear: its sparsity is within ``span`` of the target and in [0, 0.99]. The
    span is rounded outward, 0.99 inward; the target itself is always allowed, so the total can always be met."""
    fewest = [math.floor(max(0.0, sparsity - span) * count) for count in weights]
    most = [
        max(
            math.ceil(sparsity * count),
            min(math.ceil((sparsity + span) * count), math.floor(LARGEST * count)),
        )
        for count in weights
    ]
    return fewest, most


def shift_to_total(
    weights: Sequence[int], aims: Sequence[float], total: int, limits: Limits
) -> list[float]:
    """Zeros ``z_i = clip(n_i (s_i + t), fewest_i, most_i)`` with the one ``t`` that makes them add up to ``total``, for
    ``n_i`` weights and sparsities ``s_i``, which may be any real numbers; the limits must allow the total."""
    from scipy.optimize import bisect

    def shifted(shift: float) -> list[float]:
        linears = zip(weights, aims, *limits, strict=True)
        return [
            min(max(count * (aim + shift), low), high)
            for count, aim, low, high in linears
        ]

    return shifted(
        bisect(
            lambda shift: math.fsum(shifted(shift)) - total,
            -1.0 - max(aims),
            1.0 - min(aims),
        )
    )
