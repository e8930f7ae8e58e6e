"""Checkpoints: read tensor by tensor, written shard by shard."""
