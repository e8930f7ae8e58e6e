"""A registered solver as the methods call it: its weight is scaled, and the solution of a plugin is checked."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from sparsellm.errors import RecipeError
from sparsellm.method.gram import Gram
from sparsellm.method.solvers.scaling import safe_factor
from sparsellm.method.solvers.solver import Solution, Solver, solution
from sparsellm.model.products import Bf16Products
from sparsellm.patterns import NM, Pattern
from sparsellm.registry import Entry


def prepared(
    entry: Entry[Solver],
    products: Bf16Products | None = None,
    costs: Tensor | None = None,
) -> Solver:
    """The solver of an entry, for weights of any size.

    A pattern without zeros keeps every bit. A weight whose largest value is beyond 2^±32 is solved times a power of
    two, since its squares would leave the range of fp32. A plugin whose result
    is not a solution is refused with a RecipeError.

    Args:
        entry: the solver.
        products: those of the chain, for a solver that declares ``narrow``; None for products in fp32.
        costs: positive weights ``c (out,)`` of the outputs' squared errors, ``Σ_i c_i ‖(w_i − w̃_i) G^½‖²``; None for
            equal ones. That is the plain objective of ``√c_i w_i``. The error in the solution is without them.
    """
    narrowed = None
    if entry.narrow:
        narrowed = products
    ours = entry.function.__module__.startswith("sparsellm.")

    def checked(
        weight: Tensor, gram: Gram, pattern: Pattern, **options: object
    ) -> Solution:
        with narrowed or nullcontext():
            result: Solution = entry.function(weight, gram, pattern, **options)
        if not ours and not _is_solution(result, weight.shape, pattern):
            raise RecipeError(
                f"solver {entry.name}: no Solution of shape {tuple(weight.shape)} with the zeros of its pattern; "
                "return solution(weight, pruned, pattern.mask(scores), gram)"
            )
        return result

    def solve(
        weight: Tensor, gram: Gram, pattern: Pattern, **options: object
    ) -> Solution:
        if not pattern.sparsity:
            return Solution(weight, torch.ones_like(weight, dtype=torch.bool), 0.0)
        factor = safe_factor(weight)
        if factor != 1:
            scaled = solve(weight * factor, gram, pattern, **options)
            return replace(scaled, weight=scaled.weight / factor)
        if costs is None:
            return checked(weight, gram, pattern, **options)
        root = costs.sqrt()[:, None]  # (out, 1)
        result = checked(weight * root, gram, pattern, **options)
        return solution(
            weight,
            result.weight / root,
            result.mask,
            gram,
            result.notes,
            fitted=result.fitted,
        )

    return solve


def _is_solution(result: Solution, shape: torch.Size, pattern: Pattern) -> bool:
    """Whether a plugin returned a solution of this shape and pattern; unstructured, it may keep one more a row."""
    if not isinstance(result, Solution):
        return False
    if result.weight.shape != shape or result.mask.shape != shape:
        return False
    if isinstance(pattern, NM):
        kept = result.mask.reshape(-1, pattern.m).sum(dim=1)
        surplus = float(kept.max()) - pattern.n
    else:
        rows, columns = shape
        most = rows * (columns * (1 - pattern.sparsity) + 1)
        surplus = float(result.mask.sum()) - most
    return surplus <= 0 and not bool(((result.weight != 0) > result.mask).any())
