"""SparseGPT: prune the inputs one after another, and update the weights of later inputs to compensate each error.

With ``UᵀU = (G + λI)⁻¹``, ``U`` upper triangular, pruning weight ``w_j`` of an output costs ``w_j² / U_jj²``, and the
best update of the later weights of that output is ``w_k −= (w_j / U_jj) U_jk`` (the optimal brain surgeon,
arXiv 2301.00774, sections 3.2 to 3.4).

The result is that of the column-by-column algorithm. A range of columns is halved recursively: the left half is pruned,
one matrix product carries its errors to the right half, which is pruned then. So nearly all work is large products.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.method.solvers.kernels import kernels_for
from sparsellm.method.solvers.solver import SOLVERS, Solution, solution
from sparsellm.method.solvers.widths import PRUNED_TOGETHER
from sparsellm.patterns import NM, Pattern

LEAF = 16  # columns eliminated one by one: few enough to stay in cache, enough that the products outside are efficient


@SOLVERS.register(
    "sparsegpt",
    paper="arXiv 2301.00774",
)
def sparsegpt(
    weight: Tensor,
    gram: Gram,
    pattern: Pattern,
    *,
    damping: Annotated[
        float,
        Field(ge=0),
        "added to the Gram matrix's diagonal, as a fraction of its mean",
    ] = 0.01,
) -> Solution:
    """Prunes input by input, and updates the weights of later inputs to compensate the error."""
    factor = gram.inverse_cholesky(damping)
    elimination = _Elimination(
        weight.masked_fill(gram.dead, 0.0), factor.matrix, pattern
    )
    elimination.prune(0, weight.shape[1], elimination.step)
    pruned = elimination.columns.T.contiguous()
    kept = elimination.kept.T.contiguous()
    del elimination
    return solution(weight, pruned, kept, gram, factor.notes, fitted=False)


class _Elimination:
    """State of the elimination, which prunes the columns of a weight from left to right."""

    def __init__(self, weight: Tensor, upper: Tensor, pattern: Pattern) -> None:
        # (in, out): a column of the weight is one contiguous row here
        self.columns = weight.T.contiguous()
        # (in, out): w_j / U_jj where pruned, 0 where kept
        self.errors = torch.zeros_like(self.columns)
        self.kept = torch.empty_like(self.columns, dtype=torch.bool)  # (in, out)
        self.upper = upper  # (in, in)
        self.pattern = pattern
        self.kernels = kernels_for(weight.device)
        self.groups: NM | None = None  # whose mask the kernel chooses
        self.step = PRUNED_TOGETHER
        if isinstance(pattern, NM):
            self.step = pattern.m
            if self.kernels is not None and pattern.m <= PRUNED_TOGETHER:
                self.groups = pattern
                self.step = PRUNED_TOGETHER // pattern.m * pattern.m

    def prune(self, start: int, stop: int, step: int) -> None:
        """Chooses the mask of columns ``start:stop``, ``step`` columns at a time, and eliminates the pruned weights."""
        if stop - start > step:
            middle = start + step * ((stop - start + step) // (2 * step))
            self.prune(start, middle, step)
            self.carry(start, middle, stop)
            self.prune(middle, stop, step)
            return
        pivots = self.upper.diagonal()[start:stop, None]
        kept = self.kept[start:stop]
        if self.groups is None:
            scores = (self.columns[start:stop] / pivots).square_()
            kept.copy_(self.pattern.mask_columns(scores, start, len(self.columns)))
        if self.kernels is not None:
            for first in range(start, stop, PRUNED_TOGETHER):
                rows = slice(first, min(first + PRUNED_TOGETHER, stop))
                self.kernels.prune_panel(
                    self.columns[rows],
                    self.kept[rows],
                    errors=self.errors[rows],
                    upper=self.upper[rows, rows].contiguous(),
                    pattern=self.groups,
                )
                self.carry(first, rows.stop, stop)
            return
        # Divisors are U_jj where pruned and ∞ where kept, so that an error is w_j / divisor, one operation. They come
        # from one-byte integers: torch selects by a bool mask, or converts one, several times as slowly.
        self.eliminate(start, stop, pivots / kept.logical_not().view(torch.uint8))

    def eliminate(self, start: int, stop: int, divisors: Tensor) -> None:
        """Prunes columns by their divisors ``(columns, out)``, and updates the later columns of ``start:stop``."""
        if stop - start > LEAF:
            middle = (start + stop) // 2
            self.eliminate(start, middle, divisors[: middle - start])
            self.carry(start, middle, stop)
            self.eliminate(middle, stop, divisors[middle - start :])
            return
        # Two operations a column, on views made in advance: on narrow weights, indexing took longer than arithmetic.
        # Errors of later columns are still zero.
        errors = self.errors[start:stop]
        before = errors.T  # (out, columns)
        factors = self.upper[start:stop, start:stop].T.tril(-1)
        rows = (self.columns[start:stop], factors, divisors, errors)
        for column, factor, divisor, error in zip(
            *(matrix.unbind() for matrix in rows), strict=True
        ):
            column.addmv_(before, factor, alpha=-1)
            torch.div(column, divisor, out=error)

    def carry(self, start: int, middle: int, stop: int) -> None:
        """Updates columns ``middle:stop`` for the errors of columns ``start:middle``."""
        self.columns[middle:stop].addmm_(
            self.upper[start:middle, middle:stop].T, self.errors[start:middle], alpha=-1
        )
