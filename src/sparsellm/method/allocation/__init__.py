"""Allocations choose the sparsity of each block or linear. Each is one decorated function in this package."""

from sparsellm.method.allocation import threshold  # noqa: F401  (it registers its allocation)
from sparsellm.method.allocation.allocator import (
    ALLOCATIONS,
    Allocation,
    Allocator,
    HeadForm,
)
from sparsellm.method.allocation.survey import LinearSize, Survey

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Allocator",
    "HeadForm",
    "LinearSize",
    "Survey",
]
