"""One pruning run from start to end: :class:`~sparsellm.run.run.Run` has its steps in order."""
