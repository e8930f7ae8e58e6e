"""One weight solved by several processes: each solves some rows, and they agree on thresholds over all rows.

Rows only compete for zeros. The pattern compares those of all processes, so a solver is written as if it had all rows.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.errors import RecipeError
from sparsellm.method.gram import Gram
from sparsellm.method.solvers.solver import Solution, Solver, solution
from sparsellm.model.products import Bf16Products
from sparsellm.patterns import (
    NM,
    Pattern,
    Scope,
    Unstructured,
    highest_of_rows,
    ordered,
    places_in_rows,
    share,
)
from sparsellm.registry import Entry

# Digits of a score as (shift, bins), the highest first. Each is decided by counts in bins, few enough to sum quickly.
DIGITS = ((21, 1 << 11), (10, 1 << 11), (0, 1 << 10))
SIGN = -(1 << 31)
SAFE = (
    32  # weights up to 2^32 and down to 2^-32 have squares and errors that fp32 holds
)


def divide(
    entry: Entry[Solver],
    products: Bf16Products | None = None,
    costs: Tensor | None = None,
) -> Solver:
    """The solver with its work divided over the processes, which all pass the same arguments and get all rows.

    A solver that is not registered as distributed, or has fewer rows than processes, solves all rows in each. A pattern
    without zeros keeps every bit. A weight whose largest value is beyond 2^±32 is solved times a power of two, since
    its squares would leave the range of fp32.

    Args:
        entry: the solver.
        products: those of the chain, for a solver that declares ``narrow``; None for products in fp32.
        costs: positive weights ``c (out,)`` of the outputs' squared errors, ``Σ_i c_i ‖(w_i − w̃_i) G^½‖²``; None for
            equal ones. That is the plain objective of ``√c_i w_i``. The error in the solution is without them.
    """
    root = None if costs is None else costs.sqrt()[:, None]  # (out, 1)

    def run(
        rows: slice, weight: Tensor, gram: Gram, pattern: Pattern, **options: object
    ) -> Solution:
        weight = weight[rows]
        scaled = weight if root is None else weight * root[rows]
        with products if products is not None and entry.narrow else nullcontext():
            result = entry.function(scaled, gram, pattern, **options)
        if not (
            entry.function.__module__.startswith("sparsellm.")
            or _is_solution(result, weight.shape, pattern)
        ):
            no = f"no Solution of shape {tuple(weight.shape)} with the zeros of its pattern"
            raise RecipeError(
                f"solver {entry.name}: {no}; return solution(weight, pruned, pattern.mask(scores), gram)"
            )
        if root is None:
            return result
        return solution(
            weight,
            result.weight / root[rows],
            result.mask,
            gram,
            result.notes,
            fitted=result.fitted,
        )

    def solve(
        weight: Tensor, gram: Gram, pattern: Pattern, **options: object
    ) -> Solution:
        if not pattern.sparsity:
            return Solution(weight, torch.ones_like(weight, dtype=torch.bool), 0.0)
        if (factor := safe_factor(weight)) != 1:
            scaled = solve(weight * factor, gram, pattern, **options)
            return replace(scaled, weight=scaled.weight / factor)
        if (
            parallel.size() == 1
            or not entry.distributed
            or len(weight) < parallel.size()
        ):
            full = run(slice(None), weight, gram, pattern, **options)
            sparse, mask = (
                parallel.broadcast_(part.contiguous())
                for part in (full.weight, full.mask)
            )
            return Solution(
                sparse, mask, *parallel.broadcast((full.error, full.notes, full.fitted))
            )
        rows = parallel.share(len(weight))
        if isinstance(pattern, Unstructured):  # groups of N:M lie within rows
            pattern = DividedUnstructured(
                pattern.zeros, pattern.weights, rows.start, len(weight)
            )
        part = run(rows, weight, gram, pattern, **options)
        energy = float(gram.energy(weight[rows]))
        parts = parallel.gather((energy, part.error * energy, part.notes))
        energy, lost = sum(part[0] for part in parts), sum(part[1] for part in parts)
        return Solution(
            torch.cat(parallel.gather_list(part.weight)),
            torch.cat(parallel.gather_list(part.mask)),
            lost / energy if energy > 0 else 0.0,
            tuple(dict.fromkeys(note for part in parts for note in part[2])),
            part.fitted,
        )

    return solve


def _is_solution(result: Solution, shape: torch.Size, pattern: Pattern) -> bool:
    """Whether a plugin returned a solution of this shape and pattern; unstructured, it may keep one more a row."""
    if (
        not isinstance(result, Solution)
        or not result.weight.shape == result.mask.shape == shape
    ):
        return False
    if isinstance(pattern, NM):
        surplus = float(result.mask.reshape(-1, pattern.m).sum(1).max()) - pattern.n
    else:  # over the rows of all processes
        surplus = parallel.total(
            float(result.mask.sum())
            - shape[0] * (shape[1] * (1 - pattern.sparsity) + 1)
        )
    return surplus <= 0 and not bool(((result.weight != 0) > result.mask).any())


def safe_factor(weight: Tensor) -> float:
    """The power of two that brings a weight's largest value near 1, if its squares could leave fp32's range; else 1."""
    largest = max(map(abs, torch.stack(torch.aminmax(weight)).tolist()))
    if (
        largest == 0
        or not math.isfinite(largest)
        or abs(exponent := math.frexp(largest)[1]) <= SAFE
    ):
        return 1.0
    return math.ldexp(1.0, -max(exponent, -120))


@dataclass(frozen=True)
class DividedUnstructured(Unstructured):
    """The pattern of a weight with ``rows`` rows for those of this process, from row ``first`` on."""

    first: int
    rows: int

    def validate(
        self, shape: tuple[int, ...] | torch.Size, name: str = "weight"
    ) -> None:
        super().validate((self.rows, shape[1]), name)

    def unchecked(self, scores: Tensor, scope: Scope = "matrix") -> Tensor:
        if scope == "row":
            return highest_of_rows(scores, self.zeros, self.first, self.rows)
        return highest_of_all(scores.reshape(1, -1), self.zeros).reshape(scores.shape)

    def mask_columns(self, scores: Tensor, start: int, inputs: int) -> Tensor:
        return highest_of_all(
            scores, share(self.zeros, start, start + len(scores), inputs)
        )


def highest_of_all(scores: Tensor, zeros: int) -> Tensor:
    """This process's part ``(outer, inner)`` of :func:`~sparsellm.patterns.highest` for the scores of all processes,
    fp32 or coarser. Indices run over outer, then the processes, then inner; ``zeros`` are those of all processes."""
    if zeros <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    keys = ordered(scores)
    threshold, surplus = _lowest_of_all(keys, zeros)
    kept, tied = keys > threshold, keys == threshold
    if surplus:
        ties = torch.tensor(
            parallel.gather(tied.sum(dim=1).tolist())
        )  # (processes, outer)
        in_outer = ties.sum(dim=0)
        before = (
            in_outer.cumsum(0) - in_outer + ties[: parallel.rank()].sum(dim=0)
        ).to(scores.device)  # (outer,)
        row, column, place = places_in_rows(tied)
        first = place + before[row] < surplus
        kept[row[first], column[first]] = True
    return kept


def _lowest_of_all(keys: Tensor, rank: int) -> tuple[int, int]:
    """The ``rank``-th lowest key (from 1) of all processes, and the number of equal keys after it."""
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
