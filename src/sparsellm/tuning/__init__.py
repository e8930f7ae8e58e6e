"""Fine-tuning of a pruned model that keeps every zero, by all weights or by a low-rank adapter."""
