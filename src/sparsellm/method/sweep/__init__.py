"""Gradients of the loss block by block, and the sweep, which trains the kept weights of the whole pruned model."""
