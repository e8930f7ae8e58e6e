"""The choice of the items that are held out from a fit."""

from __future__ import annotations


def spread_evenly(count: int, total: int) -> set[int]:
    """``count`` of the numbers below ``total``, as far from each other and from both ends as possible."""
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}
