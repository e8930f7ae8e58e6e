"""Allocations choose the sparsity of each block or linear. Each is one decorated function in this package."""

from sparsellm.allocation import threshold  # noqa: F401  (it registers its allocation)
from sparsellm.allocation.allocator import ALLOCATIONS, Allocation, Allocator
from sparsellm.allocation.survey import LinearSize, Survey

__all__ = ["ALLOCATIONS", "Allocation", "Allocator", "LinearSize", "Survey"]
