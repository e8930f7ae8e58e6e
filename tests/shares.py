"""Patterns that tests give by a fraction, whatever the shape of the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsellm.patterns import NM, Pattern, Scope, Unstructured


@dataclass(frozen=True)
class Share(Pattern):
    """Zeros anywhere: that share of the weights, rounded."""

    fraction: float

    def __str__(self) -> str:
        return f"{self.fraction:g}"

    @property
    def sparsity(self) -> float:
        return self.fraction

    def of(self, shape: Sequence[int]) -> Unstructured:
        return Unstructured(zeros_of(self, shape), math.prod(shape))

    def validate(self, shape: Sequence[int], name: str = "weight") -> None:
        pass

    def unchecked(self, scores: Tensor, scope: Scope = "matrix") -> Tensor:
        return self.of(scores.shape).unchecked(scores, scope)

    def mask_columns(self, scores: Tensor, start: int, inputs: int) -> Tensor:
        return self.of((scores.shape[1], inputs)).mask_columns(scores, start, inputs)


def zeros_of(pattern: Pattern, shape: Sequence[int]) -> int:
    """The number of zeros in a weight of this shape."""
    return round(pattern.sparsity * math.prod(shape))


def violations(pattern: NM, weight: Tensor) -> int:
    """The number of zeros that a weight lacks for a pattern; 0 if it satisfies the pattern."""
    return int(
        ((weight != 0).reshape(-1, pattern.m).sum(dim=1) - pattern.n).clamp(min=0).sum()
    )
