"""Which of several things are held out from a fit, to judge it by."""

from __future__ import annotations


def spread_evenly(count: int, total: int) -> set[int]:
    """``count`` of the numbers below ``total``, as far from each other and from both ends as they can be."""
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}
