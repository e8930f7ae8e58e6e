"""Local solvers: (weight, Gram matrix, pattern) → sparse weight. Importing a module registers its solver."""

from sparsellm.method.solvers import admm, magnitude_and_wanda, sparsegpt  # noqa: F401  (each registers its solvers)
from sparsellm.method.solvers.solver import SOLVERS, Solution, Solver

__all__ = ["SOLVERS", "Solution", "Solver"]
