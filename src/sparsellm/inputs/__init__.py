"""Readers of input from users and other tools, which check it against limits before any work."""
