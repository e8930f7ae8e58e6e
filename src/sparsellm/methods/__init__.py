"""Pruning methods for one block. Each is one decorated function in this package; no other code names it."""

import importlib
import pkgutil

from sparsellm.methods.local import from_solver
from sparsellm.methods.task import METHODS, BlockTask
from sparsellm.records import LinearResult
from sparsellm.solvers import SOLVERS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _solver in SOLVERS.values():
    METHODS.add(from_solver(_solver))
SOLVERS.listeners.append(lambda entry: METHODS.add(from_solver(entry)))  # a solver that a user registers later

__all__ = ["METHODS", "BlockTask", "LinearResult"]
