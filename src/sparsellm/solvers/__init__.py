"""Local solvers: (weight, Gram matrix, pattern) → sparse weight. Importing a module registers its solver."""

from sparsellm.solvers import admm, magnitude_and_wanda, sparsegpt  # noqa: F401  (each registers its solvers)
from sparsellm.solvers.solver import SOLVERS, Solution, Solver

__all__ = ["SOLVERS", "Solution", "Solver"]
