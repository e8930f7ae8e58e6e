"""One weight solved by several processes: each solves some rows, and they agree on thresholds over all rows.

In these solvers, rows of a weight depend on each other in two ways only: they compete for a number of zeros, and errors
are sums over them. The pattern does both, so a solver is written as if it had the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.chain.products import Bf16Products, bf16_products
from sparsellm.patterns import Pattern, Scope, Unstructured, highest_of_rows, require_finite, share
from sparsellm.registry import Entry
from sparsellm.solvers.solver import Solution, Solver, solution
from sparsellm.statistics import Gram

# Digits of a score as (shift, bins), the highest first. Each digit is decided by counting scores into bins; few bins
# are quick to sum over processes.
DIGITS = ((21, 1 << 11), (10, 1 << 11), (0, 1 << 10))
SIGN = -(1 << 31)


def divide(entry: Entry[Solver], products: Bf16Products | None = None) -> Solver:
    """The solver with its work divided over the processes of this run.

    All processes call it with the same arguments, and each gets the whole solution. In one process it is the solver
    itself. The main process solves alone if the solver is not registered as distributed, or if the weight has fewer
    rows than there are processes. A pattern without zeros leaves the weight as it is.

    Args:
        entry: the solver.
        products: those of the chain, for a solver that declares ``narrow``; None for products in fp32.
    """

    def run(weight: Tensor, gram: Gram, pattern: Pattern, **options: object) -> Solution:
        with bf16_products(products if entry.workspace.narrow else None):
            return entry.function(weight, gram, pattern, **options)

    def solve(weight: Tensor, gram: Gram, pattern: Pattern, **options: object) -> Solution:
        if not pattern.zeros(weight.shape):
            return Solution(weight, torch.ones_like(weight, dtype=torch.bool), 0.0)
        if parallel.size() == 1:
            return run(weight, gram, pattern, **options)
        if not entry.distributed or len(weight) < parallel.size():
            return _in_main(lambda: run(weight, gram, pattern, **options), weight)
        rows = parallel.share(len(weight))
        own = run(weight[rows], gram, DividedRows(pattern, len(weight), rows.start), **options)
        error, notes = _joined(own, gram.energy(weight[rows]))
        return Solution(
            torch.cat(parallel.gather_list(own.weight)), torch.cat(parallel.gather_list(own.mask)), error, notes
        )

    return solve


def divided_solution(
    original: Tensor, weight: Tensor, mask: Tensor, gram: Gram, notes: tuple[str, ...] = ()
) -> Solution:
    """As :func:`~sparsellm.solvers.solver.solution`, with the error computed by all processes, each for some rows.

    Every process has the whole weight, which is zero off the mask.
    """
    if parallel.size() == 1:
        return solution(original, weight, mask, gram, notes)
    rows = parallel.share(len(weight))
    own = solution(original[rows], weight[rows], mask[rows], gram, notes)
    return Solution(weight, mask, *_joined(own, gram.energy(original[rows])))


def _joined(own: Solution, energy: float) -> tuple[float, tuple[str, ...]]:
    """Error and notes of the whole weight, from each process's solution of its rows and their outputs' energy."""
    parts = parallel.gather((energy, own.error * energy, own.notes))
    energy, lost = sum(part[0] for part in parts), sum(part[1] for part in parts)
    return lost / energy if energy > 0 else 0.0, tuple(dict.fromkeys(note for part in parts for note in part[2]))


def _in_main(solve: Callable[[], Solution], weight: Tensor) -> Solution:
    """Solves in the main process and returns the solution in all."""
    solutions: list[Solution] = []  # of the main process; empty in the others

    def error_and_notes() -> tuple[float, tuple[str, ...]]:
        solutions.append(solve())
        return solutions[0].error, solutions[0].notes

    error, notes = parallel.from_main(error_and_notes)
    sparse = solutions[0].weight.contiguous() if solutions else torch.empty_like(weight)
    mask = solutions[0].mask.contiguous() if solutions else torch.empty_like(weight, dtype=torch.bool)
    return Solution(parallel.broadcast_(sparse), parallel.broadcast_(mask), error, notes)


@dataclass(frozen=True)
class DividedRows(Pattern):
    """The pattern of a weight whose rows are divided over the processes, in order.

    Args:
        whole: the pattern of the whole weight.
        all_rows: the number of rows of the whole weight.
        first: the index of this process's first row.
    """

    whole: Pattern
    all_rows: int
    first: int

    @property
    def sparsity(self) -> float:
        return self.whole.sparsity

    @property
    def step(self) -> int:
        return self.whole.step

    def zeros(self, shape: tuple[int, ...] | torch.Size) -> int:
        """The number of zeros of the whole weight, from the shape of some of its rows."""
        return self.whole.zeros((self.all_rows, shape[1]))

    def validate(self, shape: tuple[int, ...] | torch.Size, name: str = "weight") -> None:
        self.whole.validate(shape, name)

    def mask(self, scores: Tensor, scope: Scope = "matrix") -> Tensor:
        if not isinstance(self.whole, Unstructured):
            return self.whole.mask(scores, scope)  # groups of N:M lie within rows
        require_finite(scores)
        zeros = self.zeros(scores.shape)
        if scope == "row":
            return highest_of_rows(scores, zeros, self.first, self.all_rows)
        return highest_of_all(scores.reshape(1, -1), zeros).reshape(scores.shape)

    def mask_columns(self, scores: Tensor, start: int, inputs: int) -> Tensor:
        if not isinstance(self.whole, Unstructured):
            return self.whole.mask_columns(scores, start, inputs)
        zeros = share(self.zeros((self.all_rows, inputs)), start, start + len(scores), inputs)
        return highest_of_all(scores, zeros)

    def total(self, value: float) -> float:
        return parallel.total(value)

    def violations(self, weight: Tensor) -> int:
        """The number of zeros missing in the whole weight; for N:M, in its groups."""
        if isinstance(self.whole, Unstructured):
            zeros = int(parallel.total(weight.numel() - int(weight.count_nonzero())))
            return max(0, self.zeros(weight.shape) - zeros)
        return int(parallel.total(self.whole.violations(weight)))


def highest_of_all(scores: Tensor, zeros: int) -> Tensor:
    """The mask that is False for the ``zeros`` lowest scores of all processes; among equal scores the first are kept.

    Args:
        scores: ``(outer, inner)``, fp32 or coarser; indices run over outer, then the processes, then inner.
        zeros: in all processes together.

    Returns:
        Bool ``(outer, inner)``, equal to the part of :func:`~sparsellm.patterns.highest` for the scores of all
        processes, joined along inner and flattened.
    """
    if zeros <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    keys = _ordered(scores)
    threshold, surplus = _lowest_of_all(keys, zeros)
    kept, tied = keys > threshold, keys == threshold
    if surplus:
        ties = torch.tensor(parallel.gather(tied.sum(dim=1).tolist()))  # (processes, outer)
        of_outer = ties.sum(dim=0)
        before = (of_outer.cumsum(0) - of_outer + ties[: parallel.rank()].sum(dim=0)).to(scores.device)  # (outer,)
        row, column = tied.nonzero(as_tuple=True)
        in_row = torch.bincount(row, minlength=len(tied))
        place = torch.arange(len(row), device=row.device) - (in_row.cumsum(0) - in_row)[row] + before[row]
        first = place < surplus
        kept[row[first], column[first]] = True
    return kept


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the same order as the scores: the bits of each float, reversed for negative ones."""
    if scores.dtype == torch.float64:
        raise TypeError("scores of fp64 are not compared over processes; a solver's scores are fp32")
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: −0.0 equals 0.0, and its bits must too
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _lowest_of_all(keys: Tensor, rank: int) -> tuple[int, int]:
    """The ``rank``-th lowest key (from 1) of all processes, and the number of equal keys after it. Goes by digits."""
    threshold, after = SIGN, 0
    pool = keys.flatten()
    for shift, bins in DIGITS:
        digits = ((pool ^ SIGN) >> shift) & (bins - 1)
        counts = parallel.all_sum_(torch.bincount(digits, minlength=bins))
        running = counts.cumsum(0)
        digit = int(torch.searchsorted(running, rank))
        after = int(running[digit]) - rank
        rank -= int(running[digit] - counts[digit])
        pool = pool[digits == digit]
        threshold += digit << shift
    return threshold, after
