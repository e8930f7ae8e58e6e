"""Methods, which prune one block: functions registered in this package, and one method made of each solver."""

from sparsellm.method.blocks import in_order, published  # noqa: F401  (each registers its method)
from sparsellm.method.blocks.local import from_solver
from sparsellm.method.blocks.task import METHODS, BlockTask
from sparsellm.method.solvers import SOLVERS

for _solver in SOLVERS.values():
    METHODS.add(from_solver(_solver))
# a solver that a user registers later
SOLVERS.listeners.append(lambda entry: METHODS.add(from_solver(entry)))

__all__ = ["METHODS", "BlockTask"]
