"""Auxiliary variables: the alternating minimisation that prunes a feed-forward unit.

``objective`` defines the function to minimise, ``updates`` has one update for each variable, ``loop`` alternates them.
"""

from sparsellm.decomposition.loop import Record, Result, Settings, prune_feed_forward
from sparsellm.decomposition.objective import Chunk, Coefficients, FeedForward, LazyChunks, Linear, true_error

__all__ = [
    "Chunk",
    "Coefficients",
    "FeedForward",
    "LazyChunks",
    "Linear",
    "Record",
    "Result",
    "Settings",
    "prune_feed_forward",
    "true_error",
]
