"""Pruning methods for one block. Each is one decorated function in this package; no other code names it."""

from sparsellm.methods import sparsellm, sparsellm_paper  # noqa: F401  (each registers its method)
from sparsellm.methods.local import from_solver
from sparsellm.methods.task import METHODS, BlockTask
from sparsellm.solvers import SOLVERS

for _solver in SOLVERS.values():
    METHODS.add(from_solver(_solver))
SOLVERS.listeners.append(lambda entry: METHODS.add(from_solver(entry)))  # a solver that a user registers later

__all__ = ["METHODS", "BlockTask"]
