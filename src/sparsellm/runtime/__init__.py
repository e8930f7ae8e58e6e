"""Packed sparse weights in memory: their layout, the modules that compute with them, generation and its speed."""
