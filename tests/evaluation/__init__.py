"""Tests of perplexity and divergence."""
