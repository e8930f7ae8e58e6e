"""Where checkpoints come from: a directory, the hub, a GGUF file, the demo model."""
