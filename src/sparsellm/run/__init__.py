"""One pruning run from start to end: :mod:`sparsellm.run.prune` is its story."""
