"""A packed model in use: module, kernels, loading, conversion of checkpoints, generation and its speed."""
