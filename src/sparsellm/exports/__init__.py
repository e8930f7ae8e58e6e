"""Writes a pruned checkpoint in the formats of other programs: GGUF and compressed-tensors."""
