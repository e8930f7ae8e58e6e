"""Gram matrices and cross-moments, accumulated in chunks and summed over processes."""

from sparsellm.statistics.gram import CrossAccumulator, Factor, Fit, Gram, GramAccumulator, least_squares

__all__ = ["CrossAccumulator", "Factor", "Fit", "Gram", "GramAccumulator", "least_squares"]
