"""The version of sparsellm, below everything that stamps its files with it."""

__version__ = "0.2.0"
