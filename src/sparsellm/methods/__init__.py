"""Methods, which prune one block: functions registered in this package, and one method made of each solver."""

from sparsellm.methods import sparsellm, sparsellm_paper  # noqa: F401  (each registers its method)
from sparsellm.methods.local import from_solver
from sparsellm.methods.task import METHODS, BlockTask
from sparsellm.solvers import SOLVERS

for _solver in SOLVERS.values():
    METHODS.add(from_solver(_solver))
SOLVERS.listeners.append(lambda entry: METHODS.add(from_solver(entry)))  # a solver that a user registers later

__all__ = ["METHODS", "BlockTask"]
