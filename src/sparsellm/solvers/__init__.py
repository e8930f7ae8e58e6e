"""Local solvers: (weight, Gram matrix, pattern) → sparse weight. Importing a module registers its solver."""

import importlib
import pkgutil

from sparsellm.solvers.solver import SOLVERS, Solution, Solver

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SOLVERS", "Solution", "Solver"]
