"""Mixtures with fewer experts: which experts stay, and how those that stay make up for the others."""

from sparsellm.method.experts.scores import SCORES

__all__ = ["SCORES"]
