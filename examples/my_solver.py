"""A solver of your own: scores as Wanda has them, and the weights that are kept fitted anew by least squares.

    sparsellm prune demo --out pruned --plugin examples/my_solver.py --method wanda-refit --sparsity 0.5

Every solver is a method, and can be the solver inside of others: `--set options.solver=wanda-refit`.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.method.solvers.solver import SOLVERS, Solution, solution
from sparsellm.method.solvers.support import refine_on_support
from sparsellm.patterns import Pattern


@SOLVERS.register("wanda-refit", paper="arXiv 2306.11695, with a refit")
def wanda_refit(
    weight: Tensor,  # (out, in) fp32; it must not be changed
    gram: Gram,  # Σ x xᵀ of the inputs x of this linear, over all calibration tokens
    pattern: Pattern,  # how many zeros there are to be, and where they may stand
    *,
    power: Annotated[
        float, Field(ge=0), "exponent of the inputs' root mean square; 1 is Wanda"
    ] = 1.0,
    iterations: Annotated[
        int, Field(ge=0), "steps of the fit; 0 keeps the weights as they are"
    ] = 10,
) -> Solution:
    """Keeps, of each output, the weights with the largest ``|w| · rms^power``, and fits them to the outputs."""
    scores = weight.abs() * gram.diagonal.clamp(min=0).sqrt() ** power
    mask = pattern.mask(scores, scope="row")
    fitted = refine_on_support(weight, gram, mask, weight, iterations).weight
    return solution(weight, fitted, mask, gram)
