"""Gram and cross moments, accumulated in chunks, reduced over processes."""

from sparsellm.statistics.gram import CrossAccumulator, Factor, Fit, Gram, GramAccumulator, least_squares

__all__ = ["CrossAccumulator", "Factor", "Fit", "Gram", "GramAccumulator", "least_squares"]
