"""One pruning run from start to end: :class:`~sparsellm.run.run.Run` tells it in order."""
