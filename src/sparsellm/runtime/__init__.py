"""Running packed models: module, kernels, loading, conversion of checkpoints, generation and its speed."""
