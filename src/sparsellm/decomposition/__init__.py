"""Auxiliary variables: the alternating minimisation that prunes a feed-forward unit as a whole."""

from sparsellm.decomposition.activations import Activation, as_activation, generic, identify
from sparsellm.decomposition.feed_forward import FeedForward, Linear
from sparsellm.decomposition.loop import (
    Chunk,
    Record,
    Result,
    Settings,
    StoredChunks,
    prune_feed_forward,
    split,
    true_error,
)
from sparsellm.decomposition.objective import Coefficients, Terms, default_coefficients

__all__ = [
    "Activation",
    "Chunk",
    "Coefficients",
    "FeedForward",
    "Linear",
    "Record",
    "Result",
    "Settings",
    "StoredChunks",
    "Terms",
    "as_activation",
    "default_coefficients",
    "generic",
    "identify",
    "prune_feed_forward",
    "split",
    "true_error",
]
