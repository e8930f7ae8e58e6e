"""Training a pruned model further without losing a zero: in full, or by a low-rank adapter."""
