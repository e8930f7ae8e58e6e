"""Fine-tuning of a pruned model that keeps every zero: of all weights, or of a low-rank adapter."""
