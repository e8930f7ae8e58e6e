"""Magnitude pruning: the baseline, which uses the weight alone."""

from __future__ import annotations

from torch import Tensor

from sparsellm.patterns import Pattern
from sparsellm.registry import Workspace
from sparsellm.solvers.solver import SOLVERS, Solution, check, solution
from sparsellm.statistics import Gram


@SOLVERS.register("magnitude", paper="arXiv 1506.02626", workspace=Workspace(weights=6, grams=1), distributed=True)
def magnitude(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
    """Keeps the weights of largest magnitude in the whole matrix, as they are."""
    check(weight, gram, pattern)
    return solution(weight, weight, pattern.mask(weight.abs()), gram)
