"""One pruning run from start to end: ``sparsellm.run.prune`` is its story."""
