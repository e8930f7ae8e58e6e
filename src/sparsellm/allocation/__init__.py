"""Allocations choose the sparsity of each block or linear. Each is one decorated function in this package."""

import importlib
import pkgutil

from sparsellm.allocation.allocator import ALLOCATIONS, Allocation, Allocator
from sparsellm.allocation.survey import LinearSize, Survey

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ALLOCATIONS", "Allocation", "Allocator", "LinearSize", "Survey"]
