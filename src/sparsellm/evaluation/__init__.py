"""Perplexity, and the divergence of one model's predictions from another's."""

from sparsellm.evaluation.perplexity import Perplexity, kl_divergence, nll_from_logits, perplexity

__all__ = ["Perplexity", "kl_divergence", "nll_from_logits", "perplexity"]
