"""Sparsity patterns: unstructured and N:M, with exact masks. Among equal scores the lowest index (row by row, then
along the input) is kept, so a weight with many equal values always gets the same mask with the same count."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from torch import Tensor

from sparsellm.errors import NumericalError, RecipeError, shown

Scope = Literal["matrix", "row"]
Limits = tuple[list[int], list[int]]  # the fewest and the most zeros of each linear

RANKED = 16  # largest M whose members are ranked by comparing pairs, which is far cheaper than a sort


class Pattern(ABC):
    """A rule for the number and the positions of zeros in a weight ``(out, in)``."""

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Fraction of zeros."""

    @abstractmethod
    def validate(
        self, shape: tuple[int, ...] | torch.Size, name: str = "weight"
    ) -> None:
        """Raises RecipeError, with the name of the weight, if this pattern does not fit a weight of this shape."""

    def mask(self, scores: Tensor, scope: Scope = "matrix") -> Tensor:
        """The kept weights ``(out, in)``: True at the highest ``scores`` that the pattern allows.

        ``matrix`` compares all weights, ``row`` those of one output, with the same total, spread evenly over the rows;
        N:M compares within groups. A NumericalError if a score is not finite."""
        require_finite(scores, "scores")
        return self.unchecked(scores, scope)

    @abstractmethod
    def unchecked(self, scores: Tensor, scope: Scope = "matrix") -> Tensor:
        """:meth:`mask` of scores that the caller checks, since a GPU waits for each check."""

    @abstractmethod
    def mask_columns(self, scores: Tensor, start: int, inputs: int) -> Tensor:
        """The kept weights of consecutive inputs, from ``start`` of ``inputs``, decided before later ones, with their
        even share of zeros; ``scores`` and the result are ``(columns, out)``."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """``zeros`` zeros anywhere among ``weights`` weights."""

    zeros: int
    weights: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights

    def validate(
        self, shape: tuple[int, ...] | torch.Size, name: str = "weight"
    ) -> None:
        if math.prod(shape) != self.weights:
            raise RecipeError(
                f"{name} of shape {tuple(shape)} has not the {self.weights} weights of its pattern"
            )

    def unchecked(self, scores: Tensor, scope: Scope = "matrix") -> Tensor:
        self.validate(scores.shape, "scores")
        if scope == "matrix":
            return highest(scores.reshape(1, -1), self.zeros).reshape(scores.shape)
        return highest_of_rows(scores, self.zeros)

    def mask_columns(self, scores: Tensor, start: int, inputs: int) -> Tensor:
        zeros = even_part(self.zeros, start, start + len(scores), inputs)
        return highest(scores.reshape(1, -1), zeros).reshape(scores.shape)


@dataclass(frozen=True)
class NM(Pattern):
    """N:M keeps ``n`` of every ``m`` consecutive inputs of an output; 2:4 keeps two of four."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RecipeError(
                f"pattern is {self.n}:{self.m}; n:m keeps n of every m weights, so 0 < n < m"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def validate(
        self, shape: tuple[int, ...] | torch.Size, name: str = "weight"
    ) -> None:
        if shape[1] % self.m:
            odd = f"{name} has {shape[1]} inputs, which {self.m} does not divide"
            raise RecipeError(
                f"{odd}; leave it out, or choose another pattern than {self}"
            )

    def mask_columns(self, scores: Tensor, start: int, inputs: int) -> Tensor:
        return self.unchecked(scores.T).T

    def unchecked(self, scores: Tensor, scope: Scope = "matrix") -> Tensor:
        self.validate(scores.shape, "scores")
        # few operations, and much memory
        if scores.device.type != "cpu" and self.m <= RANKED // 2:
            groups = scores.reshape(-1, self.m, 1)
            others = groups.mT
            before = torch.ones(
                self.m, self.m, dtype=torch.bool, device=scores.device
            ).tril(-1)
            beaten = (others > groups) | ((others == groups) & before)
            return (beaten.sum(dim=2) < self.n).view(scores.shape)
        if self.m > RANKED:
            return highest(scores.reshape(-1, self.m), self.m - self.n).reshape(
                scores.shape
            )
        # m times (groups,)
        members = [
            member.contiguous() for member in scores.reshape(-1, self.m).unbind(1)
        ]
        # number of higher members
        rank = torch.zeros(
            self.m, len(members[0]), dtype=torch.uint8, device=scores.device
        )
        for later in range(1, self.m):
            for earlier in range(later):
                # the earlier of two equals wins
                beaten = (members[earlier] >= members[later]).view(torch.uint8)
                rank[later] += beaten
                rank[earlier] += beaten ^ 1
        return torch.stack((rank < self.n).unbind(), dim=1).reshape(scores.shape)


def parse_pattern(text: str) -> NM:
    """The N:M pattern of a text such as ``"2:4"``; another text is a RecipeError."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text, re.ASCII)
    if match is None:
        raise RecipeError(
            f"pattern is {shown(text)}; write n:m with whole numbers, such as 2:4 for two kept of every four"
        )
    return NM(int(match[1]), int(match[2]))


def most_kept(weight: Tensor) -> tuple[int, int]:
    """The most weights that are not zero in any 4 and in any 8 consecutive inputs of a weight ``(out, in)``, at least
    1; 4 or 8 where that does not divide the inputs. These are the groups that kernels exist for."""

    def most(m: int) -> int:
        if not weight.numel() or weight.shape[1] % m:
            return m
        return max(1, int((weight != 0).reshape(-1, m).sum(dim=1).max()))

    return most(4), most(8)


def strictest(kept: Iterable[tuple[int, int]]) -> str | None:
    """The strictest N:4 and N:8 that weights with these :func:`most_kept` satisfy, such as ``3:8, 2:4``, or None."""
    four, eight = map(max, zip(*kept, strict=True))
    patterns = []
    if eight < min(8, 2 * four):
        patterns.append(NM(eight, 8))
    if four < min(4, eight):
        patterns.append(NM(four, 4))
    patterns.sort(key=lambda pattern: pattern.sparsity, reverse=True)
    return ", ".join(map(str, patterns)) or None


def even_part(total: int, start: int, stop: int, length: int) -> int:
    """The part of ``total`` for ``start:stop`` if spread evenly over ``length`` places; parts add up exactly."""
    return total * stop // length - total * start // length


def highest(scores: Tensor, zeros: int) -> Tensor:
    """The mask ``(rows, columns)``: False for the ``zeros`` lowest scores of a row; of equal ones the first stays."""
    if zeros <= 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # A GPU sorts faster than it counts, and never waits for the number of ties.
    if scores.device.type != "cpu":
        order = scores.argsort(dim=1, descending=True, stable=True)[
            :, : scores.shape[1] - zeros
        ]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    threshold = lowest(scores, zeros)  # (rows, 1)
    kept = scores > threshold
    # (rows,) equals that stay
    surplus = scores.shape[1] - zeros - kept.sum(dim=1, dtype=torch.int32)
    tied = surplus.nonzero()[:, 0]
    if len(tied):
        row, column, place = places_in_rows(scores[tied] == threshold[tied])
        first = place < surplus[tied][row]
        kept[tied[row[first]], column[first]] = True
    return kept


def places_in_rows(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column, and number among those of its row, for each True of a mask ``(rows, columns)``, in order."""
    row, column = mask.nonzero(as_tuple=True)
    in_row = torch.bincount(row, minlength=len(mask))
    return (
        row,
        column,
        torch.arange(len(row), device=row.device) - (in_row.cumsum(0) - in_row)[row],
    )


def highest_of_rows(scores: Tensor, zeros: int) -> Tensor:
    """The mask ``(rows, columns)`` of :func:`highest`, with ``zeros`` spread evenly over the rows of a matrix."""
    rows = len(scores)
    edges = torch.arange(rows + 1, device=scores.device) * zeros // rows
    shares = edges.diff()
    kept = torch.empty_like(scores, dtype=torch.bool)
    for count in (zeros // rows, zeros // rows + 1):  # rows differ by one zero at most
        chosen = shares == count
        kept[chosen] = highest(scores[chosen], count)
    return kept


def lowest(scores: Tensor, rank: int) -> Tensor:
    """The ``rank``-th lowest score (from 1) of each row, ``(rows, 1)``."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy selects with vector instructions: twenty times faster than torch.kthvalue
        ordered = numpy.partition(scores.detach().numpy(), rank - 1, axis=1)
        return torch.from_numpy(ordered[:, rank - 1 : rank].copy())
    return scores.kthvalue(rank, dim=1, keepdim=True).values


def require_finite(values: Tensor, name: str) -> None:
    """Raises NumericalError, with this name, if a value is NaN or infinite."""
    # A finite sum shows that all are finite, without a temporary; if finite values overflow, the exact test decides.
    if not math.isfinite(values.sum().item()) and not bool(
        torch.isfinite(values).all()
    ):
        bad = f"{int((~torch.isfinite(values)).sum())} of {values.numel()} values are NaN or infinite"
        raise NumericalError(f"{name}: {bad}; look for such weights or activations")


def count_zeros(weight: Tensor) -> int:
    return int(weight.numel() - torch.count_nonzero(weight))


def round_exactly(aims: Sequence[float], total: int, limits: Limits) -> list[int]:
    """Whole numbers near ``aims``, within the limits, that add up to ``total``; the largest remainders round up.

    If ``aims`` are within the limits and add up to ``total``, each number is within one of its aim. Among equal
    remainders the first is raised. A ValueError says that the limits do not allow the total."""
    fewest, most = limits
    if not sum(fewest) <= total <= sum(most):
        raise ValueError(f"{total} zeros are not between {sum(fewest)} and {sum(most)}")
    zeros = [
        min(max(math.floor(value), low), high)
        for value, low, high in zip(aims, fewest, most, strict=True)
    ]
    while (missing := total - sum(zeros)) != 0:
        step = 1 if missing > 0 else -1
        room = [i for i in range(len(zeros)) if fewest[i] <= zeros[i] + step <= most[i]]
        # the furthest from its aim comes first
        room.sort(key=lambda i: (step * (zeros[i] - aims[i]), i))
        for i in room[: abs(missing)]:
            zeros[i] += step
    return zeros
