"""The solvers that keep weights as they are: those with the highest scores."""

from __future__ import annotations

from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.method.solvers.solver import SOLVERS, Solution, solution
from sparsellm.patterns import Pattern


@SOLVERS.register(
    "magnitude",
    paper="arXiv 1506.02626",
)
def magnitude(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
    """Keeps the weights of largest magnitude in the whole matrix, as they are."""
    return solution(weight, weight, pattern.mask(weight.abs()), gram, fitted=False)


@SOLVERS.register(
    "wanda",
    paper="arXiv 2306.11695",
)
def wanda(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
    """Keeps, of each output, the weights with the largest ``|w| · rms of their input``, as they are (eq. 1)."""
    scores = weight.abs() * gram.diagonal.clamp(min=0).sqrt()  # (out, in)
    return solution(
        weight, weight, pattern.mask(scores, scope="row"), gram, fitted=False
    )
