"""Wanda: magnitude of the weight times the root mean square of its input."""

from __future__ import annotations

from torch import Tensor

from sparsellm.patterns import Pattern
from sparsellm.registry import Workspace
from sparsellm.solvers.solver import SOLVERS, Solution, check, solution
from sparsellm.statistics import Gram


@SOLVERS.register("wanda", paper="arXiv 2306.11695", workspace=Workspace(weights=6, grams=1), distributed=True)
def wanda(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
    """Keeps, of each output, the weights with the largest ``|w| · rms of their input``, as they are (eq. 1)."""
    check(weight, gram, pattern)
    scores = weight.abs() * gram.diagonal.clamp(min=0).sqrt()  # (out, in)
    return solution(weight, weight, pattern.mask(scores, scope="row"), gram)
