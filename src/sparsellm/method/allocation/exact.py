"""Rounds sparsities to whole numbers of zeros that add up exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

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


def round_to_groups(
    aims: Sequence[float], weights: Sequence[int], m: int, total: int
) -> list[int]:
    """Zeros of N:M, from 1 to m − 1 of every m weights of a linear, that add up to ``total`` as nearly as steps allow.

    Each linear gets one of the three multiples nearest to its aim, so that the sum is as near to ``total`` as possible
    and then ``Σ (z_i − aims_i)² / weights_i`` the least, by dynamic programming over the sum. If the sum is off by a
    step of the largest linear or more, since many aims are outside the limits, the choice is made again around the last
    one, as long as that helps. Aims must add up to about ``total``, and weights be multiples of m."""
    unit = math.gcd(*weights) // m
    # units of one more zero in every group
    steps = [count // m // unit for count in weights]
    base = [
        min(max(round(m * aim / count), 1), m - 1)
        for aim, count in zip(aims, weights, strict=True)
    ]

    def missing_of(zeros: list[int]) -> float:
        return total / unit - sum(
            n * step for n, step in zip(zeros, steps, strict=True)
        )

    def changed(base: list[int], missing: float) -> list[int]:
        """Changes each of ``base`` by one at most, so that the sum of changes is as near to ``missing`` as can be."""
        middle = math.ceil(abs(missing)) + 2 * max(steps)
        # the least cost of each sum of changes
        best = numpy.full(2 * middle + 1, numpy.inf)
        best[middle] = 0.0
        taken = []
        for zeros, step, aim, count in zip(base, steps, aims, weights, strict=True):
            costs = numpy.full((3, len(best)), numpy.inf)
            for change in (-1, 0, 1):
                if 1 <= zeros + change <= m - 1:
                    shift = change * step
                    source = best[max(0, -shift) : len(best) - max(0, shift)]
                    cost = ((zeros + change) * count / m - aim) ** 2 / count
                    costs[change + 1, max(0, shift) : len(best) - max(0, -shift)] = (
                        source + cost
                    )
            taken.append(costs.argmin(axis=0) - 1)
            best = costs.min(axis=0)
        reached = numpy.flatnonzero(numpy.isfinite(best))
        place = int(min(reached, key=lambda at: (abs(at - middle - missing), best[at])))
        for i in range(len(base) - 1, -1, -1):
            change = int(taken[i][place])
            base[i] += change
            place -= change * steps[i]
        return base

    missing = missing_of(base)
    while True:
        base = changed(base, missing)
        left = missing_of(base)
        if abs(left) < max(steps) or abs(left) >= abs(missing):
            return [
                zeros * count // m for zeros, count in zip(base, weights, strict=True)
            ]
        missing = left
