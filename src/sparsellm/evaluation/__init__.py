"""Perplexity, the divergence of one model's predictions from another's, and tasks of lm-eval."""
