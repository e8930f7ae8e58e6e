"""Sources of checkpoints: a directory, the hub, a GGUF file, the demo model."""
