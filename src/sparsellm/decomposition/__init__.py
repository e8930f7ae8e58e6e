"""Auxiliary variables: the alternating minimisation that prunes a feed-forward unit as a whole.

``objective`` defines the function to minimise, ``updates`` has one update for each variable, ``loop`` alternates them.
"""

from sparsellm.decomposition.loop import Record, Result, Settings, prune_feed_forward
from sparsellm.decomposition.objective import (
    Chunk,
    Coefficients,
    FeedForward,
    LazyChunks,
    Linear,
    Terms,
    default_coefficients,
    split,
    true_error,
)

__all__ = [
    "Chunk",
    "Coefficients",
    "FeedForward",
    "LazyChunks",
    "Linear",
    "Record",
    "Result",
    "Settings",
    "Terms",
    "default_coefficients",
    "prune_feed_forward",
    "split",
    "true_error",
]
