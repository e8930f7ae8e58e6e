"""Rounds wanted sparsities to whole numbers of zeros that add up exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

LARGEST = 0.99  # sparsity of one linear; without any weights it would cut its block in two
_HALVINGS = 200

Limits = tuple[list[int], list[int]]
"""The fewest and the most zeros of each linear."""


def bounds(weights: Sequence[int], sparsity: float, span: float = 1.0) -> Limits:
    """The fewest and the most zeros of each linear: its sparsity is within ``span`` of the target, and in [0, 0.99].

    The target itself is always within the limits, so the total can always be met. Limits are whole, rounded outward.
    """
    fewest = [math.floor(max(0.0, sparsity - span) * count) for count in weights]
    most = [
        max(math.ceil(sparsity * count), min(math.ceil((sparsity + span) * count), math.floor(LARGEST * count)))
        for count in weights
    ]
    return fewest, most


def shift_to_total(weights: Sequence[int], wanted: Sequence[float], total: int, limits: Limits) -> list[float]:
    """Zeros ``z_i = clip(n_i (s_i + t), fewest_i, most_i)`` with the one ``t`` that makes them add up to ``total``.

    Args:
        weights: ``n_i``.
        wanted: sparsities ``s_i``, any real numbers.
        total: the sum, between the sums of the limits.
        limits: fewest and most.
    """

    def shifted(shift: float) -> list[float]:
        return [
            min(max(count * (share + shift), low), high)
            for count, share, low, high in zip(weights, wanted, *limits, strict=True)
        ]

    low, high = -1.0 - max(wanted), 1.0 - min(wanted)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if math.fsum(shifted(middle)) < total:
            low = middle
        else:
            high = middle
    return shifted(high)


def round_exactly(wanted: Sequence[float], total: int, limits: Limits) -> list[int]:
    """Whole numbers near ``wanted``, within the limits, that add up to ``total``; the largest remainders round up.

    If ``wanted`` adds up to ``total``, each number is within one of its wanted value. Among equal remainders the first
    is raised.

    Raises:
        ValueError: the limits do not allow this total.
    """
    fewest, most = limits
    if not sum(fewest) <= total <= sum(most):
        raise ValueError(f"{total} zeros are not between {sum(fewest)} and {sum(most)}")
    zeros = [min(max(math.floor(value), low), high) for value, low, high in zip(wanted, fewest, most, strict=True)]
    while (missing := total - sum(zeros)) != 0:
        step = 1 if missing > 0 else -1
        room = [i for i in range(len(zeros)) if fewest[i] <= zeros[i] + step <= most[i]]
        room.sort(key=lambda i: (step * (zeros[i] - wanted[i]), i))  # the furthest from its wanted value comes first
        for i in room[: abs(missing)]:
            zeros[i] += step
    return zeros
