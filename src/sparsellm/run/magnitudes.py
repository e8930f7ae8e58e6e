"""Histograms of weight magnitudes before and after pruning, small enough for a run's record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST, HIGHEST, BINS = -16, 4, 40  # powers of two, in half steps; magnitudes beyond count in the last bins
_MOST = 1 << 20  # weights of one linear that are counted: evenly spaced rows

Counts = list[int]
Magnitudes = dict[str, dict[str, Counts]]  # by kind of linear: ``before`` and ``after``


@torch.no_grad()
def magnitudes(weight: Tensor) -> Counts:
    """The number of nonzero weights in each of :data:`BINS` bins of ``log2 |w|``.

    Bins that do not depend on the weights can be added up over linears, and over the starts of a resumed run. Of a
    large weight, evenly spaced rows are counted.
    """
    rows = weight.detach()[:: max(1, -(-weight.numel() // _MOST))]
    values = rows.float().abs()
    powers = values[values > 0].log2().clamp(LOWEST, HIGHEST)
    return [int(count) for count in torch.histc(powers, BINS, LOWEST, HIGHEST).cpu()]


def add(total: Magnitudes, kind: str, when: str, counts: Counts) -> None:
    """Adds the counts of one linear to those of its kind, in place."""
    known = total.setdefault(kind, {}).get(when, [0] * BINS)
    total[kind][when] = [a + b for a, b in zip(known, counts, strict=True)]


def joined(parts: Sequence[Magnitudes | None]) -> Magnitudes:
    """The counts of several blocks added up, by kind of linear; empty if those of a block are not known."""
    total: Magnitudes = {}
    for part in parts:
        if part is None:
            return {}
        for kind, both in part.items():
            for when, counts in both.items():
                add(total, kind, when, counts)
    return total
